"""Epilogue of prefill attention: O / l, rounded once, through shared memory to whole rows of out."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.cuda import device_function, float32, int32, int64, uint32
from kernels.device import HALVES, LEAST, LEAST_DIVISOR, MOST, MOST_DIVISOR, quotient


def _divider(dtype: str, head_dim: int) -> tuple[Callable[..., bool], Callable[..., int], Callable[..., int]]:
    """Functions that say whether `quotient` serves all elements of a row of O, and that give its elements over l, a
    pair at a time, by `quotient` or by division."""
    pack = HALVES[dtype].pack

    @device_function
    def divides(o, total, h):
        most, least = float32(0.0), float32(-math.inf)  # of |O|; least is negative
        for i in range(head_dim // 8):
            for e in range(2):
                size = abs(o[4 * i + 2 * h + e])
                most, least = ptx.max_f32(most, size), ptx.max_f32(least, -size)
        common = most <= float32(MOST) and -least >= float32(LEAST)
        return common and float32(LEAST_DIVISOR) <= total[h] <= float32(MOST_DIVISOR)

    @device_function
    def by_reciprocal(o, total, inverse, h, i):
        c = 4 * i + 2 * h
        high, low = quotient(o[c + 1], total[h], inverse), quotient(o[c], total[h], inverse)
        return pack(high, low)

    @device_function
    def by_division(o, total, inverse, h, i):
        c = 4 * i + 2 * h
        return pack(ptx.div_rn_f32(o[c + 1], total[h]), ptx.div_rn_f32(o[c], total[h]))

    return divides, by_reciprocal, by_division


def writer(dtype: str, head_dim: int) -> Callable[..., None]:
    """`write(out, o, total, place, stride, first, count, staged, lane)`: O / l of a warp's 16 rows to out."""
    divides, by_reciprocal, by_division = _divider(dtype, head_dim)
    # Rows lie apart so that no two accesses of a warp meet in a bank.
    pitch, chunks = 2 * head_dim + 16, head_dim // 8
    rows_at_once = 32 // chunks  # that the warp writes

    def staging(pair):
        @device_function
        def stage(o, total, inverse, h, into):
            for i in range(head_dim // 8):
                ptx.st_shared_b32(into + uint32(16 * i), pair(o, total, inverse, h, i))

        return stage

    stage_common, stage_any = staging(by_reciprocal), staging(by_division)

    @device_function
    def stage_row(o, total, h, staged, lane):
        into = staged + uint32(((lane >> 2) + 8 * h) * pitch + (lane & 3) * 4)
        inverse = ptx.div_rn_f32(float32(1.0), total[h])
        if divides(o, total, h):
            stage_common(o, total, inverse, h, into)
        else:
            stage_any(o, total, inverse, h, into)

    @device_function
    def write(out, o, total, place, stride, first, count, staged, lane):
        """O / l of the warp's 16 rows from row `first` (of `count`) on to out, where the head of row 0 begins at
        `place`: whole rows in pieces of 16 bytes, by way of 16 * pitch bytes of shared memory, the warp's own."""
        ptx.bar_warp_sync()
        # Not a loop: it would be too long to unroll, and O would be in memory all along.
        stage_row(o, total, 0, staged, lane)
        stage_row(o, total, 1, staged, lane)
        ptx.bar_warp_sync()
        row, chunk = int32(lane // chunks), int32(lane % chunks)
        for i in range(16 // rows_at_once):
            here = int32(row + i * rows_at_once)
            if first + here < count:
                v = ptx.ld_shared_v4(staged + uint32(here * pitch + chunk * 16))
                ptx.st_global_v4(out, place + int64(first + here) * stride + chunk * 8, v[0], v[1], v[2], v[3])
        ptx.bar_warp_sync()

    return write
