"""Prefill attention by mma.sync (sm_80 and later): warps of 16 queries, a tile of queries a block, cp.async by all.

A quarter of a tile's scores become weights beside the product of the quarter before with values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.architectures import has_dependent_launch
from kernels.attention.prefill.epilogue import writer
from kernels.attention.prefill.softmax import (
    earliest,
    mask,
    new_maximum,
    peak_eight,
    peak_from,
    running_total,
    tile_of,
    weigh_eight,
)
from kernels.attention.prefill.tiling import HALF_TILE, TILES, Tiling
from kernels.attention.softmax import TILE, row_sum
from kernels.cuda import cuda, device_function, float32, int32, int64, uint8, uint32
from kernels.device import HALVES
from kernels.launch import Kernel, LaunchOptions, kernel_factory


@kernel_factory
def warps(dtype: str, head_dim: int, paged: bool, tiling: Tiling, arch: str) -> Kernel:
    """q, k_cache, v_cache, work, table, out, Hq / Hk, pages of a slot, log2 of a page, strides of the cache (slot or
    page, head), of q and of out, factor, window; grid (heads at work at a time, tiles of queries, the rest).

    dtype: "bf16" or "f16". paged: whether the cache is.
    """
    workers, threads, stages = tiling.rows // 16, tiling.threads, tiling.stages
    parts = 2 * TILE // tiling.part  # of a tile: its keys, then its values
    ahead = stages // 2  # parts that are on their way while one is worked on
    split = tiling.part == HALF_TILE  # whether a part is half a tile's keys or values
    row_bytes = 2 * head_dim
    totals_at = stages * tiling.part * row_bytes
    full_at = totals_at + head_dim // 8 * threads * 16
    empty_at = full_at + 8 * stages
    score_words, o_words, q_words = TILE // 2, head_dim // 2, head_dim // 4
    own_totals = o_words * 128  # bytes of a warp
    write, combine_segment = writer(dtype, head_dim), _segments(o_words)
    copy_queries, load_queries = _queries(head_dim)
    place_of, wait, release = _ring(head_dim, tiling, arch, empty_at)
    copy, copy_ahead = _copies(head_dim, tiling, paged, wait, (full_at, empty_at))
    multiply_keys, multiply_values = _key_products(dtype, head_dim), _value_products(dtype, head_dim)

    @device_function
    def second_scores(score, peak, largest, queries, k_at, first, rows):
        """Scores of the second half of the tile at position `first`; those of both halves masked; the rows' peaks."""
        position, count, row, column, own, seen, seen_end, window = rows
        middle, end = int32(first + HALF_TILE), int32(first + TILE)
        for h in range(2):
            peak[h] = largest[h]
        if end > own + 1 or (window > 0 and first < own + 16 - window):
            if middle < seen_end and end > seen:
                multiply_keys(score, peak, queries, k_at, 1, False)
            if middle > own + 1 or window > 0:
                mask(score, int32(position + row), first, window, int32(count - row), column, 0, 8)
            mask(score, int32(position + row), first, window, int32(count - row), column, 8, 16)
            for h in range(2):
                for i in range(8):
                    peak_eight(score, peak, h, i)
        else:
            multiply_keys(score, peak, queries, k_at, 1, True)

    @device_function
    def first_weights(score, peak, largest, online, added, factor):
        """Both rows' new largest, and the weights of the tile's first 32 positions. online: alpha, shift, sums."""
        alpha, shift, sums = online
        for h in range(2):
            peak_from(score, peak, 2, h)
            new_maximum(peak, largest, alpha, shift, factor, h)
        for i in range(4):
            for h in range(2):
                weigh_eight(score, sums, shift, factor, h, i)
        for h in range(2):
            added[h] = sums[h]

    def attention(
        q, k_cache, v_cache, work, table, out, group, pages, page_bits, slot_stride, head_stride, q_stride, out_stride,
        factor, window,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(0, uint8)
        ring = (ptx.shared_address(memory) + uint32(255)) & uint32(0xFFFFFF00)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        ptx.griddepcontrol_wait()
        # Some heads take all tiles, then the next ones do: their keys and values stay in L2 meanwhile.
        head = int32(cuda.blockIdx.z * cuda.gridDim.x + cuda.blockIdx.x)
        token, count, position, slot = tile_of(work, int64(cuda.blockIdx.y))
        if thread == 0:
            for s in range(stages):
                ptx.mbarrier_init(ring + uint32(full_at + 8 * s), uint32(threads))
                ptx.mbarrier_init(ring + uint32(empty_at + 8 * s), uint32(workers))
        cuda.syncthreads()
        low, limit = earliest(position, window, 0), int32(position + count)
        tile = int32(low >> 7)
        nth = int32(0)  # of the tiles that the block walks over
        base = int32(head // group) * head_stride
        if not paged:
            base += int64(slot) * slot_stride
        cache, span = (k_cache, v_cache, base, table, int32(slot * pages), page_bits, slot_stride), (low, limit)
        # The warp's queries come by way of the place of its totals.
        own_place = ring + uint32(totals_at) + uint32(warp * own_totals)
        copy_queries(q, own_place, q_stride, token, count, warp, head, lane)
        for part in range(ahead):
            copy(part, nth, tile, span, cache, ring, thread)

        r8, matrix, column = int32(lane & 7), int32(lane >> 3), int32((lane & 3) * 2)
        k_at = ring + uint32((r8 + (matrix >> 1) * 8) * row_bytes + ((matrix & 1) ^ r8) * 16)
        lane_at = uint32((r8 + (matrix & 1) * 8) * row_bytes + ((matrix >> 1) ^ r8) * 16)
        v_at, q_at = ring + lane_at, own_place + lane_at
        row = int32(warp * 16 + (lane >> 2))
        queries = cuda.local.array(q_words, uint32)
        score = cuda.local.array(score_words, float32)
        o = cuda.local.array(o_words, float32)
        largest = cuda.local.array(2, float32)
        total = cuda.local.array(2, float32)
        alpha = cuda.local.array(2, float32)
        shift = cuda.local.array(2, float32)
        peak = cuda.local.array(2, float32)
        sums = cuda.local.array(2, float32)
        added = cuda.local.array(2, float32)
        all_largest = cuda.local.array(2, float32)
        all_total = cuda.local.array(2, float32)
        for h in range(2):
            largest[h], total[h] = float32(-math.inf), float32(0.0)
            all_largest[h], all_total[h] = float32(-math.inf), float32(0.0)
        for i in range(o_words):
            o[i] = float32(0.0)
        online, totals, totals_place = (alpha, shift, sums), (all_largest, all_total), own_place + uint32(lane * 16)
        kept = False
        load_queries(queries, q_at)
        # Of the warp's rows the first one's position, and what any of them sees: nothing, where there are none.
        own = int32(position + warp * 16)
        seen_end = int32(own + 16) if int32(warp * 16) < count else int32(0)
        seen = int32(max(own - window + 1, 0)) if window > 0 else int32(0)
        rows = (position, count, row, column, own, seen, seen_end, window)
        while int32(tile * TILE) < limit:
            # The tile's second half, where no row of the warp sees it, is waited for and no more.
            first, middle, end = int32(tile * TILE), int32(tile * TILE + HALF_TILE), int32(tile * TILE + TILE)
            for i in range(score_words):
                score[i] = float32(0.0)
            # A copy waits until all warps have left what it overwrites: mostly they have by the middle of a whole part.
            number = int32(nth * parts)
            if split:
                copy_ahead(0, nth, tile, span, cache, ring, thread)
            wait(ring + uint32(full_at), number, 0)
            if first < seen_end and middle > seen:
                multiply_keys(score, peak, queries, k_at + place_of(0, nth), 0, False)
            if split:
                release(ring, number, lane)
                copy_ahead(1, nth, tile, span, cache, ring, thread)
                wait(ring + uint32(full_at), int32(number + 1), 0)
            else:
                copy_ahead(0, nth, tile, span, cache, ring, thread)
            second_scores(score, peak, largest, queries, k_at + place_of(1, nth), first, rows)
            release(ring, int32(number + parts // 2 - 1), lane)
            first_weights(score, peak, largest, online, added, factor)
            number += int32(parts // 2)
            if split:
                copy_ahead(2, nth, tile, span, cache, ring, thread)
            wait(ring + uint32(full_at), number, 0)
            multiply_values(o, score, online, added, factor, v_at + place_of(2, nth), 0)
            multiply_values(o, score, online, added, factor, v_at + place_of(2, nth), 1)
            if split:
                release(ring, number, lane)
                copy_ahead(3, nth, tile, span, cache, ring, thread)
                number += int32(1)
                wait(ring + uint32(full_at), number, 0)
            else:
                copy_ahead(1, nth, tile, span, cache, ring, thread)
            if middle < seen_end and end > seen:
                multiply_values(o, score, online, added, factor, v_at + place_of(3, nth), 2)
                multiply_values(o, score, online, added, factor, v_at + place_of(3, nth), 3)
            release(ring, number, lane)
            for h in range(2):
                total[h] = ptx.fma_rn_f32(total[h], alpha[h], added[h])
            tile += int32(1)
            nth += int32(1)
            more = int32(tile * TILE) < limit
            if not more or tile % TILES == 0:
                combine_segment(o, (largest, total), totals, kept, more, factor, totals_place)
                kept = True
        place = int64(token) * out_stride + head * head_dim
        write(out, o, all_total, place, out_stride, int32(warp * 16), count, own_place, lane)

    name = f"attention_prefill_{tiling.name}_{'paged_' if paged else ''}d{head_dim}{HALVES[dtype].suffix}_{arch}"
    kinds = (*(f"{dtype}*",) * 3, "i32*", "i32*", f"{dtype}*", *("i32",) * 3, *("i64",) * 4, "f32", "i32")
    return Kernel(
        name, attention, kinds, threads, dynamic_shared=tiling.shared(head_dim), blocks_per_sm=256 // threads,
        options=LaunchOptions(programmatic=True),
        architectures=(arch,),
    )  # fmt: skip


def _ring(
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


def _copies(
    head_dim: int, tiling: Tiling, paged: bool, wait: Callable[..., None], barriers: tuple[int, int]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that start copying a part of a tile, and the part that lies as far ahead as the ring has room.

    They take a cache: keys, values, the head's first element, table, the slot's row in it, log2 of a page, stride of a
    slot or page; and a span: the positions seen, the first and the one after the last. wait: of `_ring`.
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


def _queries(head_dim: int) -> tuple[Callable[..., None], Callable[..., None]]:
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


def _key_products(dtype: str, head_dim: int) -> Callable[..., None]:
    """A function that computes the scores of half a tile of keys."""
    steps, row_bytes = head_dim // 16, 2 * head_dim
    mma = HALVES[dtype].mma

    @device_function
    def two_steps(score, peak, queries, at, half_tile, beside, s):
        b = cuda.local.array(16, uint32)
        for k in range(2):
            for i in range(4):
                got = ptx.ldmatrix_x4((at ^ uint32(64 * s + 32 * k)) + uint32(i * 16 * row_bytes))
                for e in range(4):
                    b[4 * i + e] = got[e]
            a = 4 * (2 * s + k)
            for i in range(8):  # sums that do not wait for each other
                c = 4 * (half_tile * 8 + i)
                d4 = mma(
                    queries[a], queries[a + 1], queries[a + 2], queries[a + 3], b[2 * i], b[2 * i + 1],
                    score[c], score[c + 1], score[c + 2], score[c + 3],
                )  # fmt: skip
                for e in range(4):
                    score[c + e] = d4[e]
            if beside:
                for i in range(8 // steps):
                    for h in range(2):
                        peak_eight(score, peak, h, (2 * s + k) * (8 // steps) + i)

    # The steps are written out: as loops they are too long for the compiler to unroll.
    @device_function
    def multiply_keys(score, peak, queries, at, half_tile, beside):
        """at: where the lane's row of the half's first matrices begins. beside: go on with the rows' largest meanwhile,
        by the first half's scores."""
        two_steps(score, peak, queries, at, half_tile, beside, 0)
        two_steps(score, peak, queries, at, half_tile, beside, 1)
        if steps > 4:
            two_steps(score, peak, queries, at, half_tile, beside, 2)
            two_steps(score, peak, queries, at, half_tile, beside, 3)

    return multiply_keys


def _value_products(dtype: str, head_dim: int) -> Callable[..., None]:
    """A function that accumulates P·V for 32 positions, while the next 32 are exponentiated."""
    columns, row_bytes = head_dim // 8, 2 * head_dim
    mma, rounded_pair = HALVES[dtype].mma, HALVES[dtype].pack

    @device_function
    def some_values(o, p, alpha, at, s, begin):
        """The product's 64 columns from 32 * begin on: in one loop O would be in memory, on some architectures."""
        b = cuda.local.array(8, uint32)
        for n in range(begin, begin + 2):
            for i in range(2):
                got = ptx.ldmatrix_x4_trans((at ^ uint32(64 * n + 32 * i)) + uint32(s % 4 * 16 * row_bytes))
                for e in range(4):
                    b[4 * i + e] = got[e]
            for i in range(4):
                c = 4 * (4 * n + i)
                if s == 0:
                    for e in range(4):
                        o[c + e] = ptx.mul_rn_f32(o[c + e], alpha[e // 2])
                d4 = mma(p[0], p[1], p[2], p[3], b[2 * i], b[2 * i + 1], o[c], o[c + 1], o[c + 2], o[c + 3])
                for e in range(4):
                    o[c + e] = d4[e]

    @device_function
    def value_step(o, score, online, factor, at, s, following):
        """Accumulate P·V for 16 positions, while half of the 32 positions `following`, where that is not 0, are
        exponentiated. With the first step O is multiplied with alpha."""
        alpha, shift, sums = online
        p = cuda.local.array(4, uint32)
        for i in range(4):
            p[i] = rounded_pair(score[8 * s + 2 * i + 1], score[8 * s + 2 * i])
        some_values(o, p, alpha, at, s, 0)
        if columns > 8:
            some_values(o, p, alpha, at, s, 2)
        if following:
            first = 4 * following + s % 2 * 2
            weigh_eight(score, sums, shift, factor, 0, first)
            weigh_eight(score, sums, shift, factor, 1, first)
            weigh_eight(score, sums, shift, factor, 0, first + 1)
            weigh_eight(score, sums, shift, factor, 1, first + 1)

    @device_function
    def multiply_values(o, score, online, added, factor, at, g):
        """O goes on by 32 positions, `added` by the weights of the 32 after them. online: alpha, shift, sums."""
        _, _, sums = online
        following = (g + 1) % 4
        value_step(o, score, online, factor, at, 2 * g, following)
        value_step(o, score, online, factor, at, 2 * g + 1, following)
        if following:
            for h in range(2):
                added[h] = ptx.add_rn_f32(added[h], sums[h])

    return multiply_values


def _segments(o_words: int) -> Callable[..., None]:
    """A function that ends a segment."""
    put_total, combine = running_total(o_words, 512)

    @device_function
    def combine_segment(o, segment, totals, kept, more, factor, at):
        """A segment's O, m and l become those of all segments up to it; kept: whether there are some before. Where
        there are more, the next one begins."""
        largest, total = segment
        all_largest, all_total = totals
        if kept:
            combine(o, largest, total, all_largest, all_total, factor, at)
        else:
            for h in range(2):
                all_largest[h], all_total[h] = largest[h], row_sum(total[h])
        if more:
            put_total(o, at)
            for i in range(o_words):
                o[i] = float32(0.0)
            for h in range(2):
                largest[h], total[h] = float32(-math.inf), float32(0.0)

    return combine_segment
