"""Online softmax as decode and prefill share it: tiles and segments of positions, and two steps of equal bits."""

from __future__ import annotations

from kernels import ptx
from kernels.cuda import device_function, uint32

TILE = 128  # positions whose scores become weights at once
SEGMENT = 512  # positions that are summed by themselves


@device_function
def exponential(largest, new_largest, factor):
    """2 ** ((largest - new_largest) * factor): what sums relative to `largest` are to be multiplied with."""
    return ptx.ex2_approx_f32(ptx.mul_rn_f32(ptx.add_rn_f32(largest, -new_largest), factor))


@device_function
def row_sum(value):
    """(l_0 + l_1) + (l_2 + l_3) of the four lanes of a row."""
    value = ptx.add_rn_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(1)))
    return ptx.add_rn_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))
