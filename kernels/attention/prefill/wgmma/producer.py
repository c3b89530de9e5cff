"""The producer warp: draws entries, and copies queries, keys and values by tensor maps."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.attention.prefill.softmax import earliest, tile_of
from kernels.attention.prefill.wgmma.layout import Layout, wait
from kernels.attention.softmax import TILE
from kernels.cuda import cuda, device_function, int32, int64, uint32, uint64


def producer(layout: Layout) -> Callable[..., None]:
    """`produce(base, maps, work, cache, shape, window, lane)`: draw entries, and copy what each needs.

    maps: tensor maps of q, keys, values. cache: table, pages of a slot, log2 of a page. shape: entries, Hq, Hq / Hk,
    heads at work at a time.
    """
    stages, divided, entry_at, entry_stride = layout.stages, layout.divided, layout.entry_at, layout.entry_stride
    k_at, v_at, tile_bytes = layout.k_at, layout.v_at, layout.tile_bytes
    k_full, v_full, k_used, v_used = layout.k_full, layout.v_full, layout.k_used, layout.v_used
    q_full, q_used = layout.q_full, layout.q_used
    copy, copy_queries = _copies(layout)

    @device_function
    def finish(base, work, parity, lane):
        """Tell the consumers that there is no more work: a tile of no queries."""
        wait(base + uint32(q_used), parity)
        parity ^= uint32(1)
        if lane == 0:
            told = base + uint32(entry_at) + uint32(entry_stride) * parity
            ptx.st_shared_v4(told, uint32(0), uint32(0), uint32(0), uint32(0))
            ptx.mbarrier_arrive(base + uint32(q_full))
            if ptx.atom_add_acq_rel_u32(work, 1, uint32(1)) == uint32(cuda.gridDim.x) - uint32(1):
                # Every block has drawn its last number.
                work[0] = int32(0)
                work[1] = int32(0)

    @device_function
    def copy_tiles(base, maps, cache, span, slot, kv_head, place, lane):
        """Keys and values of the positions `span`, a tile after the other; place: stage and parity, returned anew."""
        _, k_map, v_map = maps
        low, limit = span
        stage, parity = place
        tile, last_tile = int32(low >> 7), int32(int32(limit - 1) >> 7)
        while tile <= last_tile:
            wait(base + uint32(k_used) + uint32(8) * stage, parity)
            copy(
                k_map, base + uint32(k_at) + stage * uint32(tile_bytes), base + uint32(k_full) + uint32(8) * stage,
                cache, tile, span, (kv_head, slot), lane,
            )  # fmt: skip
            wait(base + uint32(v_used) + uint32(8) * stage, parity)
            copy(
                v_map, base + uint32(v_at) + stage * uint32(tile_bytes), base + uint32(v_full) + uint32(8) * stage,
                cache, tile, span, (kv_head, slot), lane,
            )  # fmt: skip
            stage += uint32(1)
            if stage == uint32(stages):
                stage, parity = uint32(0), parity ^ uint32(1)
            tile += int32(1)
        return stage, parity

    @device_function
    def produce(base, maps, work, cache, shape, window, lane):
        entries, heads, group_heads, heads_at_once = shape
        item = int32(cuda.blockIdx.x)
        stage, parity, q_parity = uint32(0), uint32(1), uint32(1)
        ptx.griddepcontrol_wait()
        used_entries = int32(work[2]) if divided else int32(entries)
        items = int32(used_entries * heads)
        while item < items:
            following = uint32(0)
            if lane == 0:
                following = ptx.atom_add_acq_rel_u32(work, 0, uint32(1)) + uint32(cuda.gridDim.x)
            # Some heads take all tiles, then the next ones do: their keys and values stay in L2 meanwhile.
            at_once = int32(used_entries * heads_at_once)
            head = int32(item // at_once * heads_at_once + item % heads_at_once)
            entry = int64(item % at_once // heads_at_once)
            token, count, position, slot = tile_of(work, entry)
            low, limit = int32(0), int32(position + count)
            if divided:
                part = ptx.ld_global_v4(work, (entry + 1) * 8 + 4)
                low, limit = int32(part[0]), int32(part[1])
            low = earliest(position, window, low)
            if divided and low >= limit:
                # A segment that no query of the tile sees through its window.
                item = int32(ptx.shfl_sync_idx_u32(ptx.FULL_MASK, following, uint32(0)))
                continue
            wait(base + uint32(q_used), q_parity)
            q_parity ^= uint32(1)
            if lane == 0:
                told = base + uint32(entry_at) + uint32(entry_stride) * q_parity
                ptx.st_shared_v4(told, uint32(token), uint32(count), uint32(position), uint32(head))
                if divided:
                    part = ptx.ld_global_v4(work, (entry + 1) * 8 + 4)  # again: there are few registers here
                    ptx.st_shared_v4(told + uint32(16), uint32(low), uint32(limit), part[2], part[3])
                copy_queries(base, maps, head, token)
            kv_head = int32(head // group_heads)
            stage, parity = copy_tiles(base, maps, cache, (low, limit), slot, kv_head, (stage, parity), lane)
            item = int32(ptx.shfl_sync_idx_u32(ptx.FULL_MASK, following, uint32(0)))
        finish(base, work, q_parity, lane)

    return produce


def _copies(layout: Layout) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that start copying a tile of keys or values, and a tile of queries."""
    head_dim, boxes, box_bytes, tile_bytes = layout.head_dim, layout.boxes, layout.box_bytes, layout.tile_bytes
    rows, q_bytes, q_full = layout.rows, layout.q_bytes, layout.q_full

    @device_function
    def copy(tensor_map, target, barrier, cache, tile, span, place, lane):
        """A tile of the KV head and slot `place`: the lanes a page each, those beyond `span` as zeros."""
        table, pages, page_bits = cache
        low, limit = span
        kv_head, slot = place
        if lane == 0:
            ptx.mbarrier_arrive_expect_tx(barrier, uint32(tile_bytes))
        row, outer = int32(tile * TILE), slot
        if pages > 0:
            row += int32(lane << page_bits)
            outer = int32(-1)
            if low < row + (int32(1) << page_bits) and row < limit and lane < TILE >> page_bits:
                outer = table[int32(slot * pages) + (row >> page_bits)]
            row = int32(0)
        if lane < TILE >> page_bits:
            place_at = target + (uint32(lane) << uint32(page_bits + 7))
            for b in range(boxes):
                ptx.cp_async_bulk_tensor_4d(
                    place_at + uint32(b * box_bytes), tensor_map, 0, barrier, int32(b * 64), row, kv_head, outer,
                    uint64(ptx.EVICT_LAST),
                )  # fmt: skip

    @device_function
    def copy_queries(base, maps, head, token):
        q_map, _, _ = maps
        ptx.mbarrier_arrive_expect_tx(base + uint32(q_full), uint32(q_bytes))
        for b in range(boxes):
            ptx.cp_async_bulk_tensor_2d(
                base + uint32(b * rows * 128), q_map, 0, base + uint32(q_full),
                int32(head * head_dim + b * 64), token, uint64(ptx.EVICT_FIRST),
            )  # fmt: skip

    return copy, copy_queries
