"""The ring of parts of tiles, and copies to it by all threads of the block; queries to registers."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.architectures import has_dependent_launch
from kernels.attention.prefill.tiling import HALF_TILE, Tiling
from kernels.attention.softmax import TILE
from kernels.cuda import device_function, int32, int64, uint32


def part_ring(
    head_dim: int, tiling: Tiling, arch: str, empty_at: int
) -> tuple[Callable[..., int], Callable[..., None], Callable[..., None]]:
    """Functions that say where part of a tile is in the ring, and that wait for a part and release it.

    Parts are numbered from the block's first one on, and so are tiles (nth).
    """
    stages, part_rows = tiling.stages, tiling.part
    parts, row_bytes = 2 * TILE // part_rows, 2 * head_dim
    stage_bytes = part_rows * row_bytes
    last_stage, stage_bits = stages - 1, stages.bit_length() - 1  # stages are a power of two
    waits = ptx.mbarrier_try_wait if has_dependent_launch(arch) else ptx.mbarrier_test_wait

    @device_function
    def place_of(quarter, nth):
        """Where in the ring half a tile's keys are (0, 1) or its values (2, 3)."""
        number = nth * parts + quarter * HALF_TILE // part_rows
        return uint32((number & last_stage) * stage_bytes) + uint32(quarter * HALF_TILE % part_rows * row_bytes)

    @device_function
    def wait(barrier, number, before):
        """For the stage of a part, or with `before` for that of the part ahead of it in the same place."""
        parity = uint32(number >> stage_bits & 1 ^ before)
        while waits(barrier + uint32(8 * (number & last_stage)), parity) == 0:
            pass

    @device_function
    def release(ring, number, lane):
        ptx.bar_warp_sync()
        if lane == 0:
            ptx.mbarrier_arrive(ring + uint32(empty_at) + uint32(8 * (number & last_stage)))

    return place_of, wait, release


def part_copies(
    head_dim: int, tiling: Tiling, paged: bool, wait: Callable[..., None], barriers: tuple[int, int]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that start copying a part of a tile, and the part that lies as far ahead as the ring has room.

    They take a cache: keys, values, the head's first element, table, the slot's row in it, log2 of a page, stride of a
    slot or page; and a span: the positions seen, the first and the one after the last. wait: of `part_ring`.
    """
    stages, part_rows, threads = tiling.stages, tiling.part, tiling.threads
    parts, ahead, last_stage = 2 * TILE // part_rows, stages // 2, stages - 1
    row_bytes, chunks = 2 * head_dim, head_dim // 8  # 16-byte chunks of a row
    stage_bytes, copied_rows = part_rows * row_bytes, threads // chunks  # rows that the block copies at a time
    full_at, empty_at = barriers

    def copier(checked: bool) -> Callable[..., None]:
        @device_function
        def copy_part(place, first, begin, end, values, source, thread):
            """Start copying the positions from `first` on; with `checked` rows outside begin … end - 1 become 0."""
            base, table, table_row, page_bits, slot_stride = source
            chunk, row = thread % chunks, thread // chunks
            at = base + chunk * 8 + (first + row) * head_dim
            place += uint32(row * row_bytes)
            for i in range(part_rows // copied_rows):
                here = int32(row + i * copied_rows)
                to = place + uint32((chunk ^ (here & 7)) * 16) + uint32(i * copied_rows * row_bytes)
                size = uint32(16)
                if checked:
                    size = uint32(16) if begin <= here < end else uint32(0)
                if paged:
                    position = int32(first + here)
                    page = int64(0)
                    if not checked or begin <= here < end:
                        page = int64(table[int32(table_row + (position >> page_bits))])
                    within = position & ((int64(1) << page_bits) - 1)
                    from_row = base + chunk * 8 + page * slot_stride + within * head_dim
                    ptx.cp_async_cg_16_zfill(to, values, from_row, size)
                else:
                    ptx.cp_async_cg_16_zfill(to, values, at + i * copied_rows * head_dim, size)

        return copy_part

    copy_checked, copy_whole = copier(True), copier(False)

    @device_function
    def copy(part, nth, tile, span, cache, ring, thread):
        """Start copying a part of a tile once its stage is free; rows outside the span become 0."""
        k_cache, v_cache, base, table, table_row, page_bits, slot_stride = cache
        low, limit = span
        number = int32(nth * parts + part)
        wait(ring + uint32(empty_at), number, 1)
        values = k_cache if part < parts // 2 else v_cache
        source = (base, table, table_row, page_bits, slot_stride)
        first = int32(tile * TILE + part * part_rows % TILE)
        place = ring + uint32((number & last_stage) * stage_bytes)
        if first >= low and first + part_rows <= limit:
            copy_whole(place, first, 0, 0, values, source, thread)
        else:
            copy_checked(place, first, int32(low - first), int32(limit - first), values, source, thread)
        ptx.cp_async_mbarrier_arrive(ring + uint32(full_at) + uint32(8 * (number & last_stage)))

    @device_function
    def copy_ahead(part, nth, tile, span, cache, ring, thread):
        """Start copying the part that lies `ahead` of this one."""
        _, limit = span
        following = (part + ahead) // parts
        if int32((tile + following) * TILE) < limit:
            copy((part + ahead) % parts, nth + following, tile + following, span, cache, ring, thread)

    return copy, copy_ahead


def query_copies(head_dim: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that start copying a warp's queries to shared memory, and that load them from there."""
    row_bytes, chunks, steps = 2 * head_dim, head_dim // 8, head_dim // 16
    all_landed = ptx.cp_async_wait_group(0)

    @device_function
    def copy_queries(q, own_place, q_stride, token, count, warp, head, lane):
        for i in range(chunks // 2):
            here, chunk = int32((lane + 32 * i) // chunks), int32(lane % chunks)
            from_row = q_stride * (token + min(int32(warp * 16 + here), count - 1)) + head * head_dim
            to = own_place + uint32(here * row_bytes + (chunk ^ (here & 7)) * 16)
            ptx.cp_async_cg_16(to, q, from_row + chunk * 8)
        ptx.cp_async_commit_group()

    @device_function
    def load_queries(queries, q_at):
        """q_at: the lane's address of the first matrix."""
        all_landed()
        ptx.bar_warp_sync()
        for s in range(steps):
            got = ptx.ldmatrix_x4(q_at ^ uint32(32 * s))
            for e in range(4):
                queries[4 * s + e] = got[e]

    return copy_queries, load_queries
