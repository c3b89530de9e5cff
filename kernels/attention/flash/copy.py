"""Tiles of keys and values from the cache, contiguous or paged, to shared memory."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.attention.flash.layout import THREADS, Layout
from kernels.attention.softmax import SEGMENT, TILE
from kernels.cuda import cuda, device_function, int32, int64, uint32


@device_function
def pages_of(table, row, pages, page_bits, segment, lane):
    """Pages of the segment's positions 8 lane and 256 + 8 lane."""
    first = min((segment * SEGMENT + lane * 8) >> page_bits, int64(pages) - 1)
    second = min((segment * SEGMENT + SEGMENT // 2 + lane * 8) >> page_bits, int64(pages) - 1)
    return uint32(table[row + first]), uint32(table[row + second])


def copier(layout: Layout, paged: bool) -> Callable[..., None]:
    """`copy(target, cache, source, tile, span, thread)`: start copying a tile of keys or values.

    source: first element of the KV head (contiguous: of the slot), what `pages_of` gives of the segment, log2 of a
    page, stride of a page, stride of a position. span: begin, limit, own: positions begin … limit - 1 are copied, 0 for
    others, but nothing for position `own`.
    """
    chunks, row_bytes = layout.chunks, layout.row_bytes
    pass_rows = THREADS // chunks  # that the threads copy at a time

    @device_function
    def copy(target, cache, source, tile, span, thread):
        base, page0, page1, page_bits, page_stride, position_stride = source
        begin, limit, own = span
        row, chunk = int32(thread // chunks), int32(thread % chunks)
        # 0 for others, since a weight of 0 times what an old value may hold, infinity, is not 0.
        low, high = int32(max(begin - tile * TILE, 0)), int32(min(limit - tile * TILE, TILE))
        skipped = int32(min(max(own - tile * TILE, -1), TILE))
        to = target + uint32(row * row_bytes + ((chunk ^ (row & 7)) * 16))
        # Most of what a warp executes is here: 32 bits where they do, and sums kept from pass to pass.
        span_rows, ahead, gap = uint32(high - low), int32(row - low), int32(row - skipped)
        within = int32(position_stride)
        mask, eighth = int32(-1), int32(0)
        if paged:
            mask = int32((int32(1) << int32(page_bits)) - 1)
            start = base + chunk * 8 + int32(int32(row & mask) * within)
            held = page0 if tile & 3 < 2 else page1
            eighth = int32(int32(tile & 1) * 16 + row // 8)
        else:
            start = base + chunk * 8 + (tile * TILE + row) * position_stride
        # Up to TILE, which the compiler shall not know: the addresses of all passes at once take more registers
        # than there are.
        first, last = int32(0), int32(cuda.blockDim.x)
        while first < last:
            at = start + int32(int32(first & mask) * within)
            for u in range(4):
                rows_on = u * pass_rows
                place = at + int32(int32(rows_on & mask) * within)
                if paged:
                    page = int32(ptx.shfl_sync_idx_u32(ptx.FULL_MASK, held, uint32(eighth + rows_on // 8)))
                    place += int64(page) * int64(page_stride)
                inside = uint32(ahead + rows_on) < span_rows
                size = uint32(16) if inside else uint32(0)
                wanted = uint32(1) if gap != -rows_on else uint32(0)
                ptx.cp_async_cg_16_zfill_if(wanted, to + uint32(rows_on * row_bytes), cache, place, size)
            first = int32(first + 4 * pass_rows)
            ahead, gap = int32(ahead + 4 * pass_rows), int32(gap + 4 * pass_rows)
            eighth = int32(eighth + 4 * pass_rows // 8)
            to = uint32(to + uint32(4 * pass_rows * row_bytes))

    return copy
