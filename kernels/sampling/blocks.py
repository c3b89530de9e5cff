"""Parts of version split: a row's workspace, logits by their place in the order of all, reductions over a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kernels import ptx
from kernels.cuda import cuda, device_function, float32, int32, int64, uint16, uint32, uint64
from kernels.launch import LaunchOptions
from kernels.sampling.scores import NOTHING, ordered

SPLIT_THREADS = 256
WARPS = SPLIT_THREADS // 32
# Of a row's workspace, in 32-bit words: blocks that have arrived, least logit kept, largest logit; then from PLACES on
# the best value and token of each block. Behind this HEAD, which is all that argmax needs, the groups of
# 256 logits (by the upper byte of their place in the order of all) that occur in the row, and how often each logit
# occurs. The first word and all behind the head are zero between launches.
ARRIVED, FLOOR, LARGEST, PLACES = 0, 1, 2, 4
PARTIALS = 64
HEAD = PLACES + 2 * PARTIALS
GROUPS = 256
COUNTS = HEAD + GROUPS
ROW = COUNTS + (1 << 16)
assert SPLIT_THREADS == GROUPS and SPLIT_THREADS >= PARTIALS  # a thread for each
PROGRAMMATIC = LaunchOptions(programmatic=True)


@device_function
def _logit_bf16(word, upper):
    return ptx.f32_from_bits(uint32(word & uint32(0xFFFF0000)) if upper else uint32(word << uint32(16)))


@device_function
def _place_bf16(value):
    return uint32(ordered(value) >> uint32(16))


@device_function
def _logit_at_bf16(place):
    bits = uint32(place << uint32(16))
    if bits & uint32(0x80000000):
        return ptx.f32_from_bits(uint32(bits ^ uint32(0x80000000)))
    return ptx.f32_from_bits(uint32(bits ^ uint32(0xFFFF0000)))


@device_function
def _logit_f16(word, upper):
    return ptx.f32_from_f16(uint16(uint32(word >> uint32(16)) if upper else uint32(word & uint32(0xFFFF))))


@device_function
def _place_f16(value):
    bits = uint32(ptx.cvt_rn_f16_f32(ptx.add_rn_f32(value, float32(0.0))))
    if bits & uint32(0x8000):
        return uint32(bits ^ uint32(0xFFFF))
    return uint32(bits | uint32(0x8000))


@device_function
def _logit_at_f16(place):
    return ptx.f32_from_f16(uint16(place ^ (uint32(0x8000) if place & uint32(0x8000) else uint32(0xFFFF))))


class Logits(NamedTuple):
    """Logits of a 16-bit dtype.

    of(word, upper): float32 of the lower (upper 0) or upper element of a pair. place(value): place 0 … 0xffff of such a
    float32 in the order of all, as `ordered` orders. at(place): the float32 of a place.
    """

    of: Callable[[Any, Any], Any]
    place: Callable[[Any], Any]
    at: Callable[[Any], Any]


LOGITS = {
    "bf16": Logits(_logit_bf16, _place_bf16, _logit_at_bf16),
    "f16": Logits(_logit_f16, _place_f16, _logit_at_f16),
}


@device_function
def largest_of_block(values, thread, value):
    """The block's largest value, in all threads. One barrier.

    values f32[WARPS], shared: a barrier is needed before they are used again. No value may be NaN.
    """
    for step in range(5):
        value = ptx.max_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(16 >> step)))
    if thread & 31 == 0:
        values[thread >> 5] = value
    cuda.syncthreads()
    for w in range(WARPS):
        value = ptx.max_f32(value, values[w])
    return value


@device_function
def best_of_block(values, tokens, thread, value, token):
    """In thread 0, (value, token) of the block's largest value, the lowest token of equal ones. One barrier.

    values f32[WARPS], tokens u32[WARPS], shared: a barrier is needed before they are used again.
    """
    for step in range(5):
        other = ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(16 >> step))
        other_token = ptx.shfl_sync_bfly_u32(ptx.FULL_MASK, token, uint32(16 >> step))
        if other > value or (other == value and other_token < token):
            value, token = other, other_token
    if thread & 31 == 0:
        values[thread >> 5] = value
        tokens[thread >> 5] = token
    cuda.syncthreads()
    if thread == 0:
        for w in range(1, WARPS):
            if values[w] > value or (values[w] == value and tokens[w] < token):
                value, token = values[w], tokens[w]
    return value, token


@device_function
def is_last(workspace, base, thread, last):
    """Whether this block is the last of its row to come here; what the others wrote before is then visible. Barriers.

    last: i32[1], shared. The count starts from zero again.
    """
    cuda.syncthreads()
    if thread == 0:
        arrived = ptx.atom_add_acq_rel_u32(workspace, base + ARRIVED, uint32(1))
        last[0] = int32(arrived) == int32(cuda.gridDim.x) - int32(1)
        if last[0]:
            workspace[base + ARRIVED] = 0
    cuda.syncthreads()
    return last[0] != 0


@device_function
def finish(values, tokens, last, workspace, base, thread, value, token, out):
    """Write the row's best token, once all its blocks have brought theirs."""
    value, token = best_of_block(values, tokens, thread, value, token)
    if thread == 0:
        place = base + PLACES + 2 * int64(cuda.blockIdx.x)
        ptx.st_global_b32(workspace, place, ptx.bits_from_f32(value))
        ptx.st_global_b32(workspace, place + 1, token)
    if is_last(workspace, base, thread, last):
        value, token = float32(-math.inf), uint32(NOTHING)
        if thread < cuda.gridDim.x:
            place = base + PLACES + 2 * thread
            value = ptx.f32_from_bits(ptx.ld_global_b32(workspace, place))
            token = ptx.ld_global_b32(workspace, place + 1)
        value, token = best_of_block(values, tokens, thread, value, token)
        if thread == 0:
            out[cuda.blockIdx.y] = -1 if token == uint32(NOTHING) else int32(token)


@device_function
def sum_in_warp(value):
    """Sum of a uint64 over the warp."""
    for step in range(5):
        by = uint32(16 >> step)
        lower = ptx.shfl_sync_bfly_u32(ptx.FULL_MASK, uint32(value & uint64(0xFFFFFFFF)), by)
        upper = ptx.shfl_sync_bfly_u32(ptx.FULL_MASK, uint32(value >> uint64(32)), by)
        value = value + (uint64(lower) | (uint64(upper) << uint64(32)))
    return value


@device_function
def sum_up_to(sums, thread, value):
    """Sum of a uint64 over the threads up to this one, and over all. Barriers before and after.

    sums: u64[WARPS], shared.
    """
    lane = thread & 31
    for step in range(5):
        by = 1 << step
        lower = ptx.shfl_sync_up_u32(ptx.FULL_MASK, uint32(value & uint64(0xFFFFFFFF)), uint32(by))
        upper = ptx.shfl_sync_up_u32(ptx.FULL_MASK, uint32(value >> uint64(32)), uint32(by))
        if lane >= by:
            value = value + (uint64(lower) | (uint64(upper) << uint64(32)))
    if lane == 31:
        sums[thread >> 5] = value
    cuda.syncthreads()
    total = uint64(0)
    for w in range(WARPS):
        if w < thread >> 5:
            value = value + sums[w]
        total = total + sums[w]
    cuda.syncthreads()
    return value, total
