"""A tile of positions: scores, online softmax over the block's four warps, and P·V.

Products have 16 rows: the query heads that share the KV head, GQA's group. A warp has 32 of the tile's positions for
the scores, and a quarter of O's columns for P·V: weights go from one to the other through shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.attention.flash.layout import Layout
from kernels.attention.softmax import TILE, exponential
from kernels.cuda import cuda, device_function, float32, int32, uint32
from kernels.device import HALVES


def scorer(dtype: str, layout: Layout) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Functions that compute the scores of a warp's 32 positions, mask them, and tell the other warps their largest."""
    steps, row_bytes, row_blocks = layout.steps, layout.row_bytes, layout.row_blocks
    mma = HALVES[dtype].mma

    @device_function
    def multiply_keys(score, q, k_lane, lane):
        """k_lane: where the lane's row of the warp's first keys begins."""
        r8, matrix = lane & 7, lane >> 3
        for i in range(16):
            score[i] = float32(0.0)
        for s in range(steps // 2):
            for i in range(4):
                b = ptx.ldmatrix_x4(k_lane + uint32(((4 * s + matrix) ^ r8) * 16) + uint32(i * 8 * row_bytes))
                for n in range(2):
                    c = 2 * s + n
                    d4 = mma(
                        q[4 * c], q[4 * c + 1], q[4 * c + 2], q[4 * c + 3], b[2 * n], b[2 * n + 1],
                        score[4 * i], score[4 * i + 1], score[4 * i + 2], score[4 * i + 3],
                    )  # fmt: skip
                    for e in range(4):
                        score[4 * i + e] = d4[e]

    @device_function
    def mask(score, begin, position, tile, warp, lane):
        """-inf for what the token does not see."""
        column = lane & 3
        oldest, newest = int32(max(begin - tile * TILE, 0)), int32(min(position - tile * TILE, TILE))
        if oldest > 0 or newest < TILE - 1:
            for i in range(4):
                for e in range(2):
                    here = int32(warp * 32 + i * 8 + column * 2 + e)
                    if here < oldest or here > newest:
                        for h in range(row_blocks):
                            score[4 * i + 2 * h + e] = float32(-math.inf)

    @device_function
    def put_largest(score, largest_shared, warp, lane):
        quad, column = lane >> 2, lane & 3
        for h in range(row_blocks):
            value = score[2 * h]
            for i in range(4):
                value = max(value, max(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]))
            value = max(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(1)))
            value = max(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))
            if column == 0:
                ptx.st_shared_b32(largest_shared + uint32((h * 8 + quad) * 16 + warp * 4), ptx.bits_from_f32(value))

    return multiply_keys, mask, put_largest


def weigher(dtype: str, layout: Layout) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Functions that turn scores into weights, rescale O, and let the total go on by all warps' weights."""
    group, columns, row_blocks = layout.group, layout.columns, layout.row_blocks
    pack = HALVES[dtype].pack

    @device_function
    def weigh(score, online, shared, factor, warp, lane):
        """online: largest, total, alpha. shared: of the weights, of all warps' largest scores, of their sums."""
        largest, _, alpha = online
        rows, largest_shared, sums_shared = shared
        quad, column = lane >> 2, lane & 3
        for h in range(row_blocks):
            p_row = h * 8 + quad
            if p_row < group:
                four = ptx.ld_shared_v4(largest_shared + uint32(p_row * 16))
                value = largest[h]
                for e in range(4):
                    value = max(value, ptx.f32_from_bits(four[e]))
                alpha[h] = exponential(largest[h], value, factor)
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
                ptx.st_shared_b32(sums_shared + uint32((p_row * 4 + column) * 16 + warp * 4), ptx.bits_from_f32(part))

    @device_function
    def rescale(o, alpha):
        for i in range(columns):
            for h in range(row_blocks):
                o[4 * i + 2 * h] = ptx.mul_rn_f32(o[4 * i + 2 * h], alpha[h])
                o[4 * i + 2 * h + 1] = ptx.mul_rn_f32(o[4 * i + 2 * h + 1], alpha[h])

    @device_function
    def add_sums(online, sums_shared, lane):
        _, total, alpha = online
        quad, column = lane >> 2, lane & 3
        for h in range(row_blocks):
            if h * 8 + quad < group:
                four = ptx.ld_shared_v4(sums_shared + uint32(((h * 8 + quad) * 4 + column) * 16))
                part = ptx.add_rn_f32(ptx.f32_from_bits(four[0]), ptx.f32_from_bits(four[1]))
                part = ptx.add_rn_f32(part, ptx.f32_from_bits(four[2]))
                part = ptx.add_rn_f32(part, ptx.f32_from_bits(four[3]))
                total[h] = ptx.fma_rn_f32(total[h], alpha[h], part)

    return weigh, rescale, add_sums


def value_products(dtype: str, layout: Layout) -> Callable[..., None]:
    """`multiply_values(o, rows, zeros, v_lane, warp, lane)`: O goes on by the tile's weights times its values."""
    group, columns, row_bytes = layout.group, layout.columns, layout.row_bytes
    p_words = 4 * (TILE // 16)
    mma = HALVES[dtype].mma

    @device_function
    def multiply_values(o, rows, zeros, v_lane, warp, lane):
        r8, matrix = lane & 7, lane >> 3
        row16, chunk16 = r8 + (matrix & 1) * 8, matrix >> 1
        alive = row16 < group
        p = cuda.local.array(p_words, uint32)
        for s in range(TILE // 16):
            p_at = rows + uint32(row16 * 256 + (((2 * s + chunk16) ^ r8) * 16))
            got = ptx.ldmatrix_x4(p_at if alive else zeros)
            for e in range(4):
                p[4 * s + e] = got[e]
        for s in range(TILE // 16):
            for i in range(columns // 2):
                chunk = warp * columns + 2 * i + (matrix >> 1)
                b = ptx.ldmatrix_x4_trans(v_lane + uint32((chunk ^ r8) * 16) + uint32(s * 16 * row_bytes))
                for n in range(2):
                    c = 4 * (2 * i + n)
                    d4 = mma(
                        p[4 * s], p[4 * s + 1], p[4 * s + 2], p[4 * s + 3], b[2 * n], b[2 * n + 1],
                        o[c], o[c + 1], o[c + 2], o[c + 3],
                    )  # fmt: skip
                    for e in range(4):
                        o[c + e] = d4[e]

    return multiply_values
