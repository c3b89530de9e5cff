"""Prefill attention by mma.sync (sm_80 and later): warps of 16 queries, a tile of queries a block, cp.async by all.

A quarter of a tile's scores become weights beside the product of the quarter before with values.
"""

from __future__ import annotations

import math

from kernels import ptx
from kernels.attention.prefill.epilogue import writer
from kernels.attention.prefill.mma.copies import part_copies, part_ring, query_copies
from kernels.attention.prefill.mma.products import key_products, segment_end, value_products
from kernels.attention.prefill.softmax import (
    earliest,
    mask,
    new_maximum,
    peak_eight,
    peak_from,
    tile_of,
    weigh_eight,
)
from kernels.attention.prefill.tiling import HALF_TILE, TILES, Tiling
from kernels.attention.softmax import TILE
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
    write, combine_segment = writer(dtype, head_dim), segment_end(o_words)
    copy_queries, load_queries = query_copies(head_dim)
    place_of, wait, release = part_ring(head_dim, tiling, arch, empty_at)
    copy, copy_ahead = part_copies(head_dim, tiling, paged, wait, (full_at, empty_at))
    multiply_keys, multiply_values = key_products(dtype, head_dim), value_products(dtype, head_dim)

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
