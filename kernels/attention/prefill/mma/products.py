"""Products of a warp: scores by keys, O by values; the end of a segment."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.attention.prefill.softmax import peak_eight, running_total, weigh_eight
from kernels.attention.softmax import row_sum
from kernels.cuda import cuda, device_function, float32, uint32
from kernels.device import HALVES


def key_products(dtype: str, head_dim: int) -> Callable[..., None]:
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


def value_products(dtype: str, head_dim: int) -> Callable[..., None]:
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


def segment_end(o_words: int) -> Callable[..., None]:
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
