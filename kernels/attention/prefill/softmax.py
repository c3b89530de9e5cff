"""Online softmax of a tile: mask, largest scores, weights, and the running total that segments are combined into.

A thread's registers: of a tile's scores and of O columns 8 i + 2 c and the next of the rows q and q + 8, where q is
lane / 4 and c lane % 4: rows h = 0, 1 at [4 i + 2 h], [4 i + 2 h + 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.attention.softmax import TILE, exponential, row_sum
from kernels.cuda import cuda, device_function, float32, int32, uint32
from kernels.device import HALVES


@device_function
def tile_of(work, entry):
    """First token, count, first position and slot of an entry's tile of queries."""
    words = ptx.ld_global_v4(work, (entry + 1) * 8)
    return int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])


@device_function
def earliest(position, window, begin):
    """The first position from `begin` on that the token at `position` sees."""
    if window > 0:
        return max(int32(begin), int32(position - window + 1))
    return int32(begin)


@device_function
def mask(score, position, first, window, count, column, begin, end):
    """-inf for what rows do not see of the positions 8 begin … 8 end - 1 of the tile that begins at position `first`.

    position: of row h = 0. count: rows from there on; later ones are taken as the last.
    """
    for h in range(2):
        newest = int32(position + min(int32(8 * h), count - int32(1)) - first - column)
        for i in range(begin, end):
            for e in range(2):
                if int32(8 * i + e) > newest:
                    score[4 * i + 2 * h + e] = float32(-math.inf)
        if window > 0:
            oldest = int32(newest - window + int32(1))
            for i in range(begin, end):
                for e in range(2):
                    if int32(8 * i + e) < oldest:
                        score[4 * i + 2 * h + e] = float32(-math.inf)


@device_function
def peak_eight(score, peak, h, i):
    """A row's largest so far goes on by its scores of the positions 8 i …."""
    peak[h] = ptx.max_f32(peak[h], ptx.max_f32(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]))


@device_function
def peak_from(score, peak, begin, h):
    """A row's largest so far goes on by its scores from the positions 32 begin … of a tile on."""
    for g in range(begin, 4):
        most = ptx.max_f32(score[16 * g + 2 * h], score[16 * g + 2 * h + 1])
        for i in range(4 * g + 1, 4 * g + 4):
            most = ptx.max_f32(most, ptx.max_f32(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]))
        peak[h] = ptx.max_f32(peak[h], most)


@device_function
def new_maximum(peak, largest, alpha, shift, factor, h):
    """A row's largest becomes that of its four lanes; alpha is what O and total are to be multiplied with, and score
    times factor plus shift are the exponents of the tile's weights."""
    value = ptx.max_f32(peak[h], ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, peak[h], uint32(1)))
    value = ptx.max_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))
    # Where a row has seen nothing yet, any number but -inf makes its weights 0.
    pivot = value if value > float32(-math.inf) else float32(0.0)
    alpha[h] = exponential(largest[h], pivot, factor)
    largest[h] = value
    shift[h] = -ptx.mul_rn_f32(pivot, factor)


@device_function
def weigh_eight(score, part, shift, factor, h, i):
    """A row's scores of the positions 8 i … become weights; part, the sum of 32 positions', goes on by them."""
    c = 4 * i + 2 * h
    first = ptx.ex2_approx_f32(ptx.fma_rn_f32(score[c], factor, shift[h]))
    second = ptx.ex2_approx_f32(ptx.fma_rn_f32(score[c + 1], factor, shift[h]))
    score[c], score[c + 1] = first, second
    part[h] = ptx.add_rn_f32(first if i % 4 == 0 else ptx.add_rn_f32(part[h], first), second)


@device_function
def weigh(score, part, total, alpha, shift, factor, h):
    """A row's scores of a tile become weights, and its total goes on."""
    added = float32(0.0)
    for g in range(4):
        for i in range(4 * g, 4 * g + 4):
            weigh_eight(score, part, shift, factor, h, i)
        added = part[h] if g == 0 else ptx.add_rn_f32(added, part[h])
    total[h] = ptx.fma_rn_f32(total[h], alpha[h], added)


def packer(dtype: str) -> Callable[..., None]:
    """`pack(p, score)`: weights as the operand of 16 rows, registers 4 s … of positions 16 s …."""
    rounded_pair = HALVES[dtype].pack

    @device_function
    def pack(p, score):
        for i in range(TILE // 4):
            p[i] = rounded_pair(score[2 * i + 1], score[2 * i])

    return pack


@device_function
def join(all_largest, largest, old, new, factor, h):
    """Row h's largest of a segment becomes that of the segments up to it; old and new are what O and l so far and the
    segment's are to be multiplied with."""
    value = ptx.max_f32(all_largest[h], largest)
    pivot = value if value > float32(-math.inf) else float32(0.0)
    old[h], new[h] = exponential(all_largest[h], pivot, factor), exponential(largest, pivot, factor)
    all_largest[h] = value


def running_total(words: int, stride: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that put the running total of a thread's `words` elements of O to shared memory, 16 bytes at `at` and
    the next ones `stride` bytes on, and that combine it with a segment's."""

    @device_function
    def put(o, at):
        for i in range(words // 4):
            ptx.st_shared_v4(
                at + uint32(i * stride), ptx.bits_from_f32(o[4 * i]), ptx.bits_from_f32(o[4 * i + 1]),
                ptx.bits_from_f32(o[4 * i + 2]), ptx.bits_from_f32(o[4 * i + 3]),
            )  # fmt: skip

    @device_function
    def combine(o, largest, total, all_largest, all_total, factor, at):
        """A segment's O, m and l become those of the segments up to it; all_largest and all_total too."""
        old = cuda.local.array(2, float32)
        new = cuda.local.array(2, float32)
        for h in range(2):
            join(all_largest, largest[h], old, new, factor, h)
            all_total[h] = ptx.fma_rn_f32(all_total[h], old[h], ptx.mul_rn_f32(row_sum(total[h]), new[h]))
        for i in range(words // 4):
            held = ptx.ld_shared_v4(at + uint32(i * stride))
            for e in range(4):
                added = ptx.mul_rn_f32(o[4 * i + e], new[e // 2])
                o[4 * i + e] = ptx.fma_rn_f32(ptx.f32_from_bits(held[e]), old[e // 2], added)

    return put, combine
