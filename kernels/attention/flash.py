"""Attention, version flash: tensor cores over tiles of 128 positions, for decode fused with all that comes before it.

One block of 128 threads walks over segments of a token's positions for the query heads that share a KV head: they are
the rows of the matrix products. K and V tiles arrive by cp.async, the next one while the last is worked on.

Order of operations, for the token at position p that attends to positions begin … p (any version may compute it so):
1. Segments are positions 512 s … 512 s + 511, tiles 128 t … 128 t + 127; those without a position of the token are
   left out. Each segment is computed by itself, from m = -inf, l = 0, O = 0, its tiles in order:
2. score_j = q · k_j by mma.sync (m16n8k16, fp32) over d in order; -inf for positions outside begin … p.
3. m' = max(m, the tile's largest score); factor = scale * log2 e in fp32; alpha = 2 ** ((m - m') * factor);
   w_j = 2 ** fma(score_j, factor, -(m' * factor)); every 2 ** x is ex2.approx.ftz.
4. l is four sums: lane c of four adds up columns 8 i + 2 c, 8 i + 2 c + 1 of the tile for i = 4 g … 4 g + 3, in order,
   to u_g (g = 0 … 3); l_c = fma(l_c, alpha, ((u_0 + u_1) + u_2) + u_3), w in fp32.
5. O = O * alpha, then w (rounded to the dtype) times V by mma.sync over the tile's positions in order, added to it.
6. At the segment's end l = (l_0 + l_1) + (l_2 + l_3).
7. Segments are combined in order into M, L, O, which start as -inf, 0, 0: M' = max(M, m_s), a = 2 ** ((M - M') *
   factor), b = 2 ** ((m_s - M') * factor), L = fma(L, a, l_s * b), O = fma(O, a, o_s * b); out = O / L, rounded once.
Which block computes a segment changes no bit.
"""

from __future__ import annotations

import math

import torch

from kernels import check, ptx
from kernels.cuda import cuda, device_function, float32, int32, int64, uint8, uint32
from kernels.device import HALVES, normalised
from kernels.launch import Kernel, LaunchOptions, kernel_factory
from kernels.rope_write import (
    WORDS,
    Cache,
    cache_of,
    check_projection,
    check_tokens,
    load_batch,
    norm_kind,
    norm_scales,
    put_sums,
    rotated,
    sums_of_squares,
)

THREADS = 128
TILE = 128
SEGMENT = 512
# Blocks of a launch that has fewer tokens and KV heads than this: their segments are spread over more blocks.
BLOCKS = 1024
# Tokens of a launch at most: the workspace holds as many.
TOKENS = 256
# Partial results that a thread of the combining block asks for at once.
PARTIALS = 8
PARTIAL_WORDS, PARTIAL_PAIRS = 4 * PARTIALS, 2 * PARTIALS
# What `decode` reads before the kernels ahead are done: its docstring says why it may.
EARLY = ("q_norm", "k_norm", "cos", "sin", "k_cache", "v_cache", "slots", "positions", "table")


def _record(heads: int, width: int, segments: int) -> int:
    """fp32 elements of a token in the workspace: O, m, l (and two unused) of each head and segment, then counters."""
    return -(-heads * (segments * (width + 4) + 1) // 4) * 4


def workspace_size(tokens: int, heads: int, width: int, capacity: int) -> int:
    """fp32 elements of `workspace` for up to `tokens` tokens of `heads` query heads of `width` elements.

    capacity: positions of a slot. Beyond TOKENS tokens it grows no more.
    """
    return min(tokens, TOKENS) * _record(heads, width, -(-capacity // SEGMENT))


@device_function
def _exponential(largest, new_largest, factor):
    """2 ** ((largest - new_largest) * factor)."""
    return ptx.ex2_approx_f32(ptx.mul_rn_f32(ptx.add_rn_f32(largest, -new_largest), factor))


@kernel_factory
def flash(dtype: str, head_dim: int, group: int, source: str, paged: bool) -> Kernel:
    """x, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, positions, table, out, workspace, counters (the same
    memory), Hq, Hk, pages of a slot, log2 of a page, segments of a slot, strides of the cache (slot or page,
    position, head) and of x and out, factor, eps, window; grid (blocks that share a token's segments, Hk, T).

    dtype: "bf16" or "f16". source: what x is: "q" [T, Hq D], ready, with keys and values in the cache; or a projection
    of q, k and v [T, (Hq + 2 Hk) D] that is still to be rotated, "none", or normed with rounding "once" or "twice"
    before. paged: whether the cache is.
    """
    fused, normed = source != "q", source in ("once", "twice")
    pack, mma = HALVES[dtype].pack, HALVES[dtype].mma
    squares, normalise, rotate = sums_of_squares(dtype), normalised(dtype, source == "twice"), rotated(dtype)
    chunks = head_dim // 8  # 16-byte chunks of a row
    row_bytes = 2 * head_dim
    tile_bytes = TILE * row_bytes
    passes = chunks  # of 128 threads over a tile's chunks
    pass_rows = TILE // passes
    steps = head_dim // 16  # of the matrix product over d
    columns = head_dim // 32  # blocks of 8 columns of O that a warp owns
    halves = 2 if group > 8 else 1  # of the 16 rows that are in use
    units = head_dim // 4  # of a head to rotate: two pairs of elements each
    rounds = -(-(group + 1) * units // THREADS)
    partial = head_dim + 4
    # Elements of arrays in registers.
    pair_words, angle_words, q_words_held = 2 * rounds, 4 * rounds, 4 * steps
    o_words, p_words = 4 * columns, 4 * (TILE // 16)
    # Shared memory: K tile, V tile; queries and the new key, in whose place later are the weights and their sums; what
    # warps exchange before: sums of squares, then largest scores; zeros.
    rows_at = 2 * tile_bytes
    sums_at = rows_at + group * 256
    largest_at = sums_at + halves * 512
    zeros_at = largest_at + halves * 128
    shared_bytes = zeros_at + 16

    @device_function
    def pages_of(table, row, pages, page_bits, segment, lane):
        """Pages of the segment's positions 8 lane and 256 + 8 lane."""
        first = min((segment * SEGMENT + lane * 8) >> page_bits, int64(pages) - 1)
        second = min((segment * SEGMENT + SEGMENT // 2 + lane * 8) >> page_bits, int64(pages) - 1)
        return uint32(table[row + first]), uint32(table[row + second])

    @device_function
    def record_of(heads, segments):
        return (int64(heads) * (int64(segments) * partial + 1) + 3) // 4 * 4

    @device_function
    def copy(
        target, cache, base, page0, page1, page_bits, slot_stride, position_stride, tile, begin, limit, own, thread
    ):
        """Positions begin … limit - 1 of the tile to shared memory, 0 for others, but nothing for position `own`.

        0, since a weight of 0 times what an old value may hold, infinity, is not 0."""
        row, chunk = int32(thread // chunks), int32(thread % chunks)
        low, high = int32(max(begin - tile * TILE, 0)), int32(min(limit - tile * TILE, TILE))
        skipped = int32(min(max(own - tile * TILE, -1), TILE))
        to = target + uint32(row * row_bytes + ((chunk ^ (row & 7)) * 16))
        # Most of what a warp executes is here: 32 bits where they do, and sums kept from pass to pass.
        span, ahead, gap = uint32(high - low), int32(row - low), int32(row - skipped)
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
                    place += int64(page) * int64(slot_stride)
                inside = uint32(ahead + rows_on) < span
                size = uint32(16) if inside else uint32(0)
                wanted = uint32(1) if gap != -rows_on else uint32(0)
                ptx.cp_async_cg_16_zfill_if(wanted, to + uint32(rows_on * row_bytes), cache, place, size)
            first = int32(first + 4 * pass_rows)
            ahead, gap = int32(ahead + 4 * pass_rows), int32(gap + 4 * pass_rows)
            eighth = int32(eighth + 4 * pass_rows // 8)
            to = uint32(to + uint32(4 * pass_rows * row_bytes))

    all_but_one, all_landed = ptx.cp_async_wait_group(1), ptx.cp_async_wait_group(0)

    @device_function
    def load_rows(q_words, k_words, pairs, new_v, x, row, q_width, k_width, kv_head, thread):
        """What this thread needs of the projection: for the sums of squares, to rotate, and of the new value."""
        if normed:
            load_batch(q_words, x, row, q_width // 8, thread)
            load_batch(k_words, x, row + q_width, k_width // 8, thread)
        for r in range(rounds):
            unit = r * THREADS + thread
            head, d = unit // units, unit % units * 2
            if head <= group:
                place = row + (kv_head * group + head) * head_dim + d
                if head == group:
                    place = row + q_width + kv_head * head_dim + d
                pairs[2 * r] = ptx.ld_global_b32(x, place)
                pairs[2 * r + 1] = ptx.ld_global_b32(x, place + head_dim // 2)
        if thread < chunks:
            loaded = ptx.ld_global_v4(x, row + q_width + k_width + kv_head * head_dim + thread * 8)
            for e in range(4):
                new_v[e] = loaded[e]

    def attention(
        x, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, positions, table, out, workspace, counters, q_heads,
        kv_heads, pages, page_bits, segments, slot_stride, position_stride, head_stride, x_stride, out_stride, factor,
        eps, window,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(0, uint8)
        k_tile = ptx.shared_address(memory)
        v_tile = k_tile + uint32(tile_bytes)
        rows = k_tile + uint32(rows_at)
        largest_shared = k_tile + uint32(largest_at)
        sums_shared = k_tile + uint32(sums_at)
        zeros = k_tile + uint32(zeros_at)
        thread = int64(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        r8, matrix, quad, column = lane & 7, lane >> 3, lane >> 2, lane & 3
        share, shares = int64(cuda.blockIdx.x), int64(cuda.gridDim.x)
        kv_head = int64(cuda.blockIdx.y)
        token = int64(cuda.blockIdx.z)
        row = token * x_stride
        q_width, k_width = int64(q_heads) * head_dim, int64(kv_heads) * head_dim

        if thread == 0:
            ptx.st_shared_v4(zeros, uint32(0), uint32(0), uint32(0), uint32(0))

        # What no kernel of the step writes may be read before the wait: the norm's weights.
        weights = cuda.local.array(pair_words, uint32)
        pairs = cuda.local.array(pair_words, uint32)
        angles = cuda.local.array(angle_words, float32)
        if normed:
            for r in range(rounds):
                unit = r * THREADS + thread
                head, d = unit // units, unit % units * 2
                weights[2 * r], weights[2 * r + 1] = uint32(0), uint32(0)
                if head < group:
                    weights[2 * r] = ptx.ld_global_b32(q_norm, (kv_head * group + head) * head_dim + d)
                    weights[2 * r + 1] = ptx.ld_global_b32(
                        q_norm, (kv_head * group + head) * head_dim + head_dim // 2 + d
                    )
                elif head == group:
                    weights[2 * r] = ptx.ld_global_b32(k_norm, kv_head * head_dim + d)
                    weights[2 * r + 1] = ptx.ld_global_b32(k_norm, kv_head * head_dim + head_dim // 2 + d)
        # Nor does one write positions, slots, table or earlier keys and values (`decode` asks for that): the first tile
        # is on its way while the kernel ahead still runs.
        if not fused:
            ptx.griddepcontrol_wait()
        position, slot = int64(positions[token]), int64(slots[token])
        begin = int64(0)
        if window > 0:
            begin = max(begin, position - window + 1)
        first_segment, last_segment = begin // SEGMENT, position // SEGMENT
        if share > 0 and first_segment + share > last_segment:
            if fused:
                ptx.griddepcontrol_wait()
            return

        last_tile = position // TILE
        tile = max(begin // TILE, (first_segment + share) * (SEGMENT // TILE))
        limit, own = position + 1, int64(-1)
        if fused:
            limit, own = position, position
        base = kv_head * head_stride
        table_row = slot * pages
        page0, page1 = uint32(0), uint32(0)
        if paged:
            page0, page1 = pages_of(table, table_row, pages, page_bits, tile // 4, lane)
            own_page = int64(table[table_row + (position >> page_bits)])
            own_at = base + own_page * slot_stride + (position & ((int64(1) << page_bits) - 1)) * position_stride
        else:
            base += slot * slot_stride
            own_at = base + position * position_stride
        # The new token's row in a tile, and where its chunk of this thread lies.
        own_row = position % TILE
        own_place = uint32(own_row * row_bytes + ((thread ^ (own_row & 7)) * 16))

        if not fused:
            for i in range(-(-group * chunks // THREADS)):
                vector = i * THREADS + thread
                if vector < group * chunks:
                    head, chunk = vector // chunks, vector % chunks
                    ptx.cp_async_cg_16(
                        rows + uint32(head * row_bytes + ((chunk ^ (head & 7)) * 16)),
                        x, row + kv_head * group * head_dim + vector * 8,
                    )  # fmt: skip
        copy(
            k_tile, k_cache, base, page0, page1, page_bits, slot_stride, position_stride, tile, begin, limit, own,
            thread,
        )  # fmt: skip
        ptx.cp_async_commit_group()
        copy(
            v_tile, v_cache, base, page0, page1, page_bits, slot_stride, position_stride, tile, begin, limit, own,
            thread,
        )  # fmt: skip
        ptx.cp_async_commit_group()
        new_k = cuda.local.array(4, uint32)
        new_v = cuda.local.array(4, uint32)
        q_words = cuda.local.array(WORDS, uint32)
        k_words = cuda.local.array(WORDS, uint32)
        for e in range(4):
            new_k[e], new_v[e] = uint32(0), uint32(0)
        for i in range(pair_words):
            pairs[i] = uint32(0)
        if fused:
            for r in range(rounds):
                unit = r * THREADS + thread
                if unit < (group + 1) * units:
                    angle = position * (head_dim // 2) + unit % units * 2
                    angles[4 * r], angles[4 * r + 1] = cos[angle], sin[angle]
                    angles[4 * r + 2], angles[4 * r + 3] = cos[angle + 1], sin[angle + 1]
            ptx.griddepcontrol_wait()
            load_rows(q_words, k_words, pairs, new_v, x, row, q_width, k_width, kv_head, thread)
            if normed:
                sums = squares(q_words, k_words, x, row, q_width // 8, row + q_width, k_width // 8, thread)
                put_sums(largest_shared, thread, sums[0], sums[1])
            if tile == last_tile and thread < chunks:
                ptx.st_shared_v4(v_tile + own_place, new_v[0], new_v[1], new_v[2], new_v[3])
            q_scale, k_scale = float32(1.0), float32(1.0)
            if normed:
                cuda.syncthreads()
                q_scale, k_scale = norm_scales(largest_shared, thread, q_width, k_width, eps)
            for r in range(rounds):
                unit = r * THREADS + thread
                head, d = unit // units, unit % units * 2
                if head <= group:
                    first, second = pairs[2 * r], pairs[2 * r + 1]
                    if normed:
                        scale = k_scale if head == group else q_scale
                        first = normalise(first, weights[2 * r], scale)
                        second = normalise(second, weights[2 * r + 1], scale)
                    result = rotate(
                        first, second, angles[4 * r], angles[4 * r + 1], angles[4 * r + 2], angles[4 * r + 3]
                    )
                    chunk, inside = d // 8, d % 8 * 2
                    for h in range(2):
                        c = chunk + h * (chunks // 2)
                        place = uint32(head * row_bytes + ((c ^ (head & 7)) * 16) + inside)
                        ptx.st_shared_b32(rows + place, result[h])
                        if head == group and tile == last_tile:
                            place = uint32(own_row * row_bytes + ((c ^ (own_row & 7)) * 16) + inside)
                            ptx.st_shared_b32(k_tile + place, result[h])
        all_but_one()
        cuda.syncthreads()

        # Queries, and later weights, as the operand of 16 rows. Rows beyond the group are 0: the tensor cores' work on
        # them would cost power that the memory's clock needs.
        row16, half16 = r8 + (matrix & 1) * 8, matrix >> 1
        alive = row16 < group
        q = cuda.local.array(q_words_held, uint32)
        for s in range(steps):
            q_at = rows + uint32(row16 * row_bytes + (((2 * s + half16) ^ r8) * 16))
            got = ptx.ldmatrix_x4(q_at if alive else zeros)
            for e in range(4):
                q[4 * s + e] = got[e]
        if fused and thread < chunks:
            loaded = ptx.ld_shared_v4(rows + uint32(group * row_bytes + ((thread ^ (group & 7)) * 16)))
            for e in range(4):
                new_k[e] = loaded[e]

        score = cuda.local.array(16, float32)
        o = cuda.local.array(o_words, float32)
        largest = cuda.local.array(halves, float32)
        total = cuda.local.array(halves, float32)
        alpha = cuda.local.array(halves, float32)
        for h in range(halves):
            largest[h], total[h], alpha[h] = float32(-math.inf), float32(0.0), float32(1.0)
        for i in range(o_words):
            o[i] = float32(0.0)
        k_lane = k_tile + uint32((warp * 32 + r8) * row_bytes)
        v_lane = v_tile + uint32((r8 + (matrix & 1) * 8) * row_bytes)
        record = token * record_of(q_heads, segments)
        running = True
        while running:
            # Scores of this warp's 32 positions.
            for i in range(16):
                score[i] = float32(0.0)
            for s in range(steps // 2):
                for i in range(4):
                    b = ptx.ldmatrix_x4(k_lane + uint32(((4 * s + matrix) ^ r8) * 16) + uint32(i * 8 * row_bytes))
                    for half in range(2):
                        c = 2 * s + half
                        d4 = mma(
                            q[4 * c], q[4 * c + 1], q[4 * c + 2], q[4 * c + 3], b[2 * half], b[2 * half + 1],
                            score[4 * i], score[4 * i + 1], score[4 * i + 2], score[4 * i + 3],
                        )  # fmt: skip
                        for e in range(4):
                            score[4 * i + e] = d4[e]
            low, high = int32(max(begin - tile * TILE, 0)), int32(min(position - tile * TILE, TILE))
            if low > 0 or high < TILE - 1:
                for i in range(4):
                    for e in range(2):
                        here = int32(warp * 32 + i * 8 + column * 2 + e)
                        if here < low or here > high:
                            for h in range(halves):
                                score[4 * i + 2 * h + e] = float32(-math.inf)
            for h in range(halves):
                value = score[2 * h]
                for i in range(4):
                    value = max(value, max(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]))
                value = max(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(1)))
                value = max(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))
                if column == 0:
                    ptx.st_shared_b32(largest_shared + uint32((h * 8 + quad) * 16 + warp * 4), ptx.bits_from_f32(value))
            cuda.syncthreads()

            # Every warp is done with the K tile.
            following = tile + 1
            if following % (SEGMENT // TILE) == 0:
                following += (shares - 1) * (SEGMENT // TILE)
            if following <= last_tile:
                if paged and following // 4 != tile // 4:
                    page0, page1 = pages_of(table, table_row, pages, page_bits, following // 4, lane)
                copy(
                    k_tile, k_cache, base, page0, page1, page_bits, slot_stride, position_stride, following, begin,
                    limit, own, thread,
                )  # fmt: skip
                if fused and following == last_tile and thread < chunks:
                    ptx.st_shared_v4(k_tile + own_place, new_k[0], new_k[1], new_k[2], new_k[3])
            ptx.cp_async_commit_group()

            for h in range(halves):
                p_row = h * 8 + quad
                if p_row < group:
                    four = ptx.ld_shared_v4(largest_shared + uint32(p_row * 16))
                    value = largest[h]
                    for e in range(4):
                        value = max(value, ptx.f32_from_bits(four[e]))
                    alpha[h] = _exponential(largest[h], value, factor)
                    largest[h] = value
                    shift = -ptx.mul_rn_f32(value, factor)
                    part = float32(0.0)
                    for i in range(4):
                        first_weight = ptx.ex2_approx_f32(ptx.fma_rn_f32(score[4 * i + 2 * h], factor, shift))
                        second_weight = ptx.ex2_approx_f32(ptx.fma_rn_f32(score[4 * i + 2 * h + 1], factor, shift))
                        part = ptx.add_rn_f32(ptx.add_rn_f32(part, first_weight), second_weight)
                        ptx.st_shared_b32(
                            rows + uint32(p_row * 256 + (((warp * 4 + i) ^ (p_row & 7)) * 16) + column * 4),
                            pack(second_weight, first_weight),
                        )
                    ptx.st_shared_b32(
                        sums_shared + uint32((p_row * 4 + column) * 16 + warp * 4), ptx.bits_from_f32(part)
                    )
            for i in range(columns):
                for h in range(halves):
                    o[4 * i + 2 * h] = ptx.mul_rn_f32(o[4 * i + 2 * h], alpha[h])
                    o[4 * i + 2 * h + 1] = ptx.mul_rn_f32(o[4 * i + 2 * h + 1], alpha[h])
            all_but_one()
            cuda.syncthreads()

            # The V tile has landed and the weights are there.
            for h in range(halves):
                if h * 8 + quad < group:
                    four = ptx.ld_shared_v4(sums_shared + uint32(((h * 8 + quad) * 4 + column) * 16))
                    part = ptx.add_rn_f32(ptx.f32_from_bits(four[0]), ptx.f32_from_bits(four[1]))
                    part = ptx.add_rn_f32(part, ptx.f32_from_bits(four[2]))
                    part = ptx.add_rn_f32(part, ptx.f32_from_bits(four[3]))
                    total[h] = ptx.fma_rn_f32(total[h], alpha[h], part)
            p = cuda.local.array(p_words, uint32)
            for s in range(TILE // 16):
                p_at = rows + uint32(row16 * 256 + (((2 * s + half16) ^ r8) * 16))
                got = ptx.ldmatrix_x4(p_at if alive else zeros)
                for e in range(4):
                    p[4 * s + e] = got[e]
            for s in range(TILE // 16):
                for i in range(columns // 2):
                    chunk = warp * columns + 2 * i + (matrix >> 1)
                    b = ptx.ldmatrix_x4_trans(v_lane + uint32((chunk ^ r8) * 16) + uint32(s * 16 * row_bytes))
                    for half in range(2):
                        c = 4 * (2 * i + half)
                        d4 = mma(
                            p[4 * s], p[4 * s + 1], p[4 * s + 2], p[4 * s + 3], b[2 * half], b[2 * half + 1],
                            o[c], o[c + 1], o[c + 2], o[c + 3],
                        )  # fmt: skip
                        for e in range(4):
                            o[c + e] = d4[e]

            if fused and tile == last_tile and thread < chunks:
                ptx.st_global_v4(k_cache, own_at + thread * 8, new_k[0], new_k[1], new_k[2], new_k[3])
                ptx.st_global_v4(v_cache, own_at + thread * 8, new_v[0], new_v[1], new_v[2], new_v[3])
            running = following <= last_tile
            if not running or following // 4 != tile // 4:
                for h in range(halves):
                    value = total[h]
                    value = ptx.add_rn_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(1)))
                    value = ptx.add_rn_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))
                    head = h * 8 + quad
                    if head < group:
                        d = warp * columns * 8 + column * 2
                        if first_segment == last_segment:
                            place = token * out_stride + (kv_head * group + head) * head_dim + d
                            for i in range(columns):
                                ptx.st_global_b32(
                                    out, place + i * 8,
                                    pack(
                                        ptx.div_rn_f32(o[4 * i + 2 * h + 1], value),
                                        ptx.div_rn_f32(o[4 * i + 2 * h], value),
                                    ),
                                )  # fmt: skip
                        else:
                            place = record + ((kv_head * group + head) * segments + tile // 4) * partial
                            for i in range(columns):
                                workspace[place + d + i * 8] = o[4 * i + 2 * h]
                                workspace[place + d + i * 8 + 1] = o[4 * i + 2 * h + 1]
                            if warp == 0 and column == 0:
                                workspace[place + head_dim] = largest[h]
                                workspace[place + head_dim + 1] = value
                    largest[h], total[h] = float32(-math.inf), float32(0.0)
                for i in range(o_words):
                    o[i] = float32(0.0)
            if running:
                all_landed()
                cuda.syncthreads()
                # The K tile has landed, and every warp is done with the V tile.
                copy(
                    v_tile, v_cache, base, page0, page1, page_bits, slot_stride, position_stride, following, begin,
                    limit, own, thread,
                )  # fmt: skip
                if fused and following == last_tile and thread < chunks:
                    ptx.st_shared_v4(v_tile + own_place, new_v[0], new_v[1], new_v[2], new_v[3])
                ptx.cp_async_commit_group()
            tile = following

        if first_segment < last_segment:
            # The last of the token's blocks to come here combines.
            used = last_segment - first_segment + 1
            arrived = int32(0)
            counter = record + int64(q_heads) * segments * partial + kv_head
            cuda.syncthreads()
            others_before = uint32(min(used, shares) - 1)
            if thread == 0 and ptx.atom_add_acq_rel_u32(counters, counter, uint32(1)) == others_before:
                arrived = int32(1)
                counters[counter] = int32(0)
            if cuda.syncthreads_or(arrived):
                item = thread
                while item < group * units:
                    head, d = item // units, item % units * 4
                    start = record + ((kv_head * group + head) * segments + first_segment) * partial
                    all_largest, all_total = float32(-math.inf), float32(0.0)
                    result4 = cuda.local.array(4, float32)
                    values = cuda.local.array(PARTIAL_WORDS, uint32)
                    others = cuda.local.array(PARTIAL_PAIRS, uint32)
                    for e in range(4):
                        result4[e] = float32(0.0)
                    done = int64(0)
                    while done < used:
                        for i in range(PARTIALS):
                            if done + i < used:
                                loaded = ptx.ld_global_v4(workspace, start + (done + i) * partial + d)
                                for e in range(4):
                                    values[4 * i + e] = loaded[e]
                                loaded = ptx.ld_global_v4(workspace, start + (done + i) * partial + head_dim)
                                others[2 * i], others[2 * i + 1] = loaded[0], loaded[1]
                        for i in range(PARTIALS):
                            if done + i < used:
                                segment_largest = ptx.f32_from_bits(others[2 * i])
                                new_largest = max(all_largest, segment_largest)
                                keep = _exponential(all_largest, new_largest, factor)
                                add = _exponential(segment_largest, new_largest, factor)
                                all_largest = new_largest
                                all_total = ptx.fma_rn_f32(
                                    all_total, keep, ptx.mul_rn_f32(ptx.f32_from_bits(others[2 * i + 1]), add)
                                )
                                for e in range(4):
                                    result4[e] = ptx.fma_rn_f32(
                                        result4[e], keep, ptx.mul_rn_f32(ptx.f32_from_bits(values[4 * i + e]), add)
                                    )
                        done += PARTIALS
                    for e in range(4):
                        result4[e] = ptx.div_rn_f32(result4[e], all_total)
                    place = token * out_stride + (kv_head * group + head) * head_dim + d
                    ptx.st_global_b32(out, place, pack(result4[1], result4[0]))
                    ptx.st_global_b32(out, place + 2, pack(result4[3], result4[2]))
                    item += THREADS

    name = f"attention_flash_{source}_{'paged_' if paged else ''}d{head_dim}_g{group}{HALVES[dtype].suffix}"
    pointer = f"{dtype}*"
    kinds = (*(pointer,) * 3, "f32*", "f32*", pointer, pointer, *("i32*",) * 3, pointer, "f32*", "i32*")
    kinds += (*("i32",) * 5, "i32" if paged else "i64", *("i64",) * 4, "f32", "f32", "i32")
    return Kernel(
        name, attention, kinds, THREADS, dynamic_shared=shared_bytes, blocks_per_sm=3,
        options=LaunchOptions(programmatic=True), early=EARLY if fused else (),
    )  # fmt: skip


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a packed list of tokens over the cache: prefill, decode and mixtures of them.

    q, out [T, Hq, D], heads contiguous, any token stride; D is 64 or 128. k_cache, v_cache [S, C, Hk, D] of the same
    strides, the last one 1, Hq / Hk at most 16; all bf16, or all fp16; with table i32[S, pages] they are [P, page, Hk,
    D] and position p of slot s is place p % page of page table[s, p // page], page a power of two from 8 to 128. Token
    t reads positions max(0, positions[t] - window + 1) … positions[t] of slots[t]; window 0 is no window. slots,
    positions i32[T] with 0 <= slot < S and 0 <= position < C (not checked). All rows at multiples of 16 bytes.
    workspace fp32, contiguous, at least `workspace_size(T, Hq, D, C)` elements, zero when it is first used and left to
    calls with the same Hq, D and C alone; its counters are zero again after each call. Returns out.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, heads, width = check.dimensions("attention", "q", q, "T, Hq, D")
    if width not in (64, 128):
        raise ValueError(f"attention: q has head dimension {width}: 64 or 128 needed")
    check.half_name("attention", "q", q)
    check.rows("attention", "q", q, (count, heads, width), q.dtype)
    check.rows("attention", "out", out, (count, heads, width), q.dtype)
    check.aligned("attention", "q", q)
    cache = cache_of("attention", k_cache, v_cache, width, table, q.dtype)
    check_tokens("attention", count, width, k_cache, slots, positions)
    _launch("attention", "q", q, None, None, 0.0, None, None, k_cache, v_cache, slots, positions, scale, window, out,
            workspace, table, cache, heads, width)  # fmt: skip
    return out


def decode(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rounding: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """`kernels.rope_write` and then `attention`, in one kernel with the same bits, for tokens of different slots.

    qkv [T, (Hq + 2 Hk) D], rows contiguous; out [T, Hq D], rows contiguous, of one dtype; no slot twice (not checked).
    All else as `rope_write` and `attention`: the new keys and values are in the cache afterwards. Returns out.
    It reads positions, slots, table and the cache while the kernel ahead may still run: in a chain of programmatic
    launches they must be older than the chain's `kernels.embedding`, which lets nothing behind it start before that.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    check.dimensions("decode", "out", out, "T, Hq D")
    check.dimensions("decode", "cos", cos, "P, D/2")
    check.half_name("decode", "qkv", qkv)
    cache = cache_of("decode", k_cache, v_cache, k_cache.shape[-1], table, qkv.dtype)
    heads = out.shape[1] // max(1, 2 * cos.shape[1])
    width = check_projection("decode", qkv, q_norm, k_norm, rounding, cos, sin, heads, cache.kv_heads)
    check_tokens("decode", len(qkv), width, k_cache, slots, positions)
    check.rows("decode", "out", out, (len(qkv), heads * width), qkv.dtype)
    _launch("decode", norm_kind(q_norm, rounding), qkv, q_norm, k_norm, eps, cos, sin, k_cache, v_cache, slots,
            positions, scale, window, out, workspace, table, cache, heads, width)  # fmt: skip
    return out


def _launch(
    operation: str,
    source: str,
    x: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor,
    table: torch.Tensor | None,
    cache: Cache,
    heads: int,
    width: int,
) -> None:
    kv_heads = cache.kv_heads
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{operation}: q has {heads} heads and k_cache {kv_heads}: a multiple of the cache's needed")
    if heads // kv_heads > 16:
        raise ValueError(f"{operation}: q has {heads} heads and k_cache {kv_heads}: at most 16 times as many needed")
    if not scale > 0:
        raise ValueError(f"{operation}: scale is {scale}: a positive number needed")
    if window < 0:
        raise ValueError(f"{operation}: window is {window}: 0 (none) or a number of positions needed")
    check.aligned(operation, "out", out)
    count = len(x)
    needed = workspace_size(count, heads, width, cache.capacity)
    if workspace.dtype != torch.float32:
        raise TypeError(f"{operation}: workspace is {workspace.dtype}: torch.float32 needed")
    if workspace.numel() < needed or not workspace.is_contiguous():
        raise ValueError(f"{operation}: workspace has {workspace.numel()} elements: {needed}, contiguous, needed")
    check.aligned(operation, "workspace", workspace)
    segments = -(-cache.capacity // SEGMENT)
    kernel = flash(check.HALVES[x.dtype], width, heads // kv_heads, source, table is not None)
    counters = workspace.view(torch.int32)
    factor = scale * math.log2(math.e)
    for begin in range(0, count, TOKENS):
        here = slice(begin, begin + TOKENS)
        tokens = min(TOKENS, count - begin)
        shares = min(segments, -(-BLOCKS // (tokens * kv_heads)))
        kernel.launch(
            (shares, kv_heads, tokens), x[here], _or(q_norm, x), _or(k_norm, x), _or(cos, workspace),
            _or(sin, workspace), k_cache, v_cache, slots[here], positions[here], _or(table, slots), out[here],
            workspace, counters, heads, kv_heads, cache.pages, cache.page_bits, segments, cache.slot_stride,
            cache.position_stride, cache.head_stride, x.stride(0), out.stride(0), factor, eps, window,
        )  # fmt: skip


def _or(given: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """The tensor, or one that a kernel that has no use for it may be given."""
    return other if given is None else given
