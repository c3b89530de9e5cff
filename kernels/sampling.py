"""From logits to tokens: argmax, filtered sampling, repetition penalty. A row's result depends on that row alone.

| version | what it does |
|---|---|
| naive | filters by a search for the threshold over the 32 bits of a logit, a pass over the row a bit |
| split | bf16, fp16; many blocks a row, the last to finish ends it; filters by counting equal logits, in one pass |

Measured times: `reports/REPORT.md`.

Order of summation, naive: thread i sums elements i, i + THREADS, … in order, then a tree over the threads (upper half
onto the lower). Sums of subsets use the same tree, so that a larger subset never sums to less.

split: a 16-bit logit is one of 65536, so the likelihoods of a row are added as (number of equal logits) * (likelihood
in units of 2**-40, rounded down), in 64-bit integers. Such sums are exact: they depend on no order, nor on the number
of blocks. A share of the mass (top_p) is compared with them in fp64. All else is as in naive, to the bit.

In both the largest logit is taken off before the rest is divided by the temperature, so that no temperature makes the
likeliest tokens infinite or NaN, and equal ones stay equally likely (`_score`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kernels import check, device, ptx
from kernels.cuda import SIMULATED, cuda, device_function, float32, float64, int32, int64, uint16, uint32, uint64
from kernels.launch import Kernel, LaunchOptions, kernel_factory

# The simulator pays for every thread at every barrier.
THREADS = 8 if SIMULATED else 512
NOTHING = 0x7FFFFFFF
# What a row is sampled with, in the order of `sample`'s arguments.
SETTINGS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "position": torch.int32,
}


def reference_filter(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """One row of logits [V], not NaN, less the largest and divided by temperature, what the filters drop at -inf:
    transformers' order and rules. The largest are at 0, infinite ones too."""
    x = logits.double()
    x = torch.where(x == x.max(), 0.0, (x - x.max()) / temperature)
    if 0 < top_k < len(x):
        x = x.masked_fill(x < torch.topk(x, top_k).values[-1], -math.inf)
    if top_p < 1.0:
        ascending, order = torch.sort(x)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[-1] = False
        x = x.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -math.inf)
    if min_p > 0.0:
        probabilities = x.softmax(-1)
        x = x.masked_fill(probabilities < min_p * probabilities.max(), -math.inf)
    return x


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in plain Python: four 32-bit words. Source: Salmon et al., SC 2011, "Parallel random numbers"."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]


@device_function
def _philox_word(counter0, counter1, counter2, counter3, key0, key1):
    """First word of Philox4x32-10; counters and key are uint64 below 2**32."""
    c0, c1, c2, c3 = counter0, counter1, counter2, counter3
    k0, k1 = key0, key1
    low = uint64(0xFFFFFFFF)
    shift = uint64(32)
    for _ in range(10):
        first = uint64(0xD2511F53) * c0
        second = uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ k0, second & low, (first >> shift) ^ c3 ^ k1, first & low
        k0 = (k0 + uint64(0x9E3779B9)) & low
        k1 = (k1 + uint64(0xBB67AE85)) & low
    return c0


@device_function
def _gumbel(token, position, seed):
    """The draw of (seed, position, token) from the standard Gumbel distribution: -log(-log(1 - u)).

    u = (word + 1/2) / 2**32 has its finest steps near 0, where the draws are that win.
    """
    low = uint64(0xFFFFFFFF)
    word = _philox_word(uint64(token), uint64(0), uint64(position), uint64(0), seed & low, seed >> uint64(32))
    u = (float32(word) + float32(0.5)) * float32(2.0**-32)
    return -device.log(-device.log1p(-u))


@device_function
def _score(logit, largest, inverse):
    """(logit - largest) / temperature, by its inverse: 0 for the largest, be it infinite or the temperature tiny."""
    if logit == largest:
        return float32(0.0)
    return ptx.mul_rn_f32(ptx.add_rn_f32(logit, -largest), inverse)


@device_function
def _ordered(value):
    """uint32 that orders as the float does, 0 and -0 alike (NaN must not come)."""
    bits = ptx.bits_from_f32(ptx.add_rn_f32(value, float32(0.0)))
    if bits & uint32(0x80000000):
        return uint32(bits ^ uint32(0xFFFFFFFF))
    return uint32(bits | uint32(0x80000000))


@device_function
def _best(values, tokens, thread, value, token, threads):
    """Token of the block's largest value, the lowest token of equal ones; NOTHING where no thread has one."""
    values[thread] = value
    tokens[thread] = token
    cuda.syncthreads()
    half = threads >> 1
    while half > 0:
        if thread < half:
            other, other_token = values[thread + half], tokens[thread + half]
            if other > values[thread] or (other == values[thread] and other_token < tokens[thread]):
                values[thread] = other
                tokens[thread] = other_token
        cuda.syncthreads()
        half >>= 1
    return tokens[0]


@kernel_factory
def naive_argmax(dtype: str) -> Kernel:
    """logits [B, V], out i32[B], V; grid (B,)."""
    load = device.load(dtype)

    def argmax(logits, out, vocabulary):
        values = cuda.shared.array(THREADS, float32)
        tokens = cuda.shared.array(THREADS, int32)
        thread = cuda.threadIdx.x
        row = int64(cuda.blockIdx.x) * vocabulary
        best = float32(-math.inf)
        best_token = NOTHING
        i = thread
        while i < vocabulary:
            value = load(logits, row + i)
            if value > best or (value == best and best_token == NOTHING):
                best = value
                best_token = i
            i += THREADS
        winner = _best(values, tokens, thread, best, best_token, THREADS)
        if thread == 0:
            out[cuda.blockIdx.x] = -1 if winner == NOTHING else winner

    return Kernel(f"argmax_naive_{dtype}", argmax, (f"{dtype}*", "i32*", "i32"), THREADS)


@kernel_factory
def naive_sample(dtype: str) -> Kernel:
    """logits [B, V], temperature, top_k, top_p, min_p, seed, position [B], out i32[B], V; grid (B,)."""
    load = device.load(dtype)

    @device_function
    def weight_from(logits, row, vocabulary, inverse, largest, floor, by_mass, shared, thread):
        """Sum over the tokens at or above `floor` of their likelihood relative to the likeliest's, or of 1 each."""
        total = float32(0.0)
        i = thread
        while i < vocabulary:
            logit = load(logits, row + i)
            if logit == logit and _ordered(logit) >= floor:
                total = total + (device.exp(_score(logit, largest, inverse)) if by_mass else float32(1.0))
            i += THREADS
        return device.block_sum(shared, thread, total, THREADS)

    def sample(logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, out, vocabulary):
        shared = cuda.shared.array(THREADS, float32)
        tokens = cuda.shared.array(THREADS, int32)
        thread = cuda.threadIdx.x
        batch = cuda.blockIdx.x
        row = int64(batch) * vocabulary
        greedy = temperatures[batch] <= float32(0.0)
        inverse = float32(1.0)
        if not greedy:
            inverse = ptx.div_rn_f32(float32(1.0), temperatures[batch])

        largest = float32(-math.inf)
        i = thread
        while i < vocabulary:
            logit = load(logits, row + i)
            if logit > largest:  # never a NaN
                largest = logit
            i += THREADS
        largest = device.block_max(shared, thread, largest, THREADS)

        # Each filter finds the greatest floor above which there still lies enough: k tokens, or a share p of the mass
        # that is left. A floor found bit by bit is a logit of the row, and all equal to it stay. Pass 0 measures what
        # is left, passes 1 to 32 try a bit each.
        floor = uint32(0)
        for by_mass in range(2):
            by_count = by_mass == 0 and 0 < top_ks[batch] < vocabulary
            if not greedy and (by_count or (by_mass == 1 and top_ps[batch] < float32(1.0))):
                wanted = float32(top_ks[batch])
                found = uint32(0)
                for step in range(33):
                    trial = found
                    if step > 0:
                        trial = uint32(found | (uint32(1) << uint32(32 - step)))
                    reached = weight_from(
                        logits, row, vocabulary, inverse, largest, max(trial, floor), by_mass, shared, thread
                    )
                    if step == 0:
                        if by_mass:
                            wanted = reached * max(top_ps[batch], float32(2.0**-126))
                    elif reached >= wanted:
                        found = trial
                floor = max(found, floor)

        best = float32(-math.inf)
        best_token = NOTHING
        i = thread
        while i < vocabulary:
            value = load(logits, row + i)
            kept = value == value
            if kept and not greedy:
                kept = _ordered(value) >= floor
                value = _score(value, largest, inverse)
                if kept:
                    kept = device.exp(value) >= min_ps[batch]
            if kept:
                if not greedy:
                    value = ptx.add_rn_f32(value, _gumbel(i, positions[batch], uint64(seeds[batch])))
                if value > best or (value == best and best_token == NOTHING):
                    best = value
                    best_token = i
            i += THREADS
        winner = _best(shared, tokens, thread, best, best_token, THREADS)
        if thread == 0:
            out[batch] = -1 if winner == NOTHING else winner

    kinds = (f"{dtype}*", "f32*", "i32*", "f32*", "f32*", "i64*", "i32*", "i32*", "i32")
    return Kernel(f"sample_naive_{dtype}", sample, kinds, THREADS, blocks_per_sm=2)


@kernel_factory
def naive_repetition_penalty(dtype: str) -> Kernel:
    """logits [B, V], seen u8[B, V], penalty f32[B], V; grid (B, V / THREADS)."""
    load, store = device.load(dtype), device.store(dtype)

    def repetition_penalty(logits, seen, penalties, vocabulary):
        batch = int64(cuda.blockIdx.x)
        token = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if token < vocabulary:
            i = batch * vocabulary + token
            if seen[i] != 0:
                value = load(logits, i)
                if value < float32(0.0):
                    store(logits, i, ptx.mul_rn_f32(value, penalties[batch]))
                else:
                    store(logits, i, ptx.div_rn_f32(value, penalties[batch]))

    kinds = (f"{dtype}*", "u8*", "f32*", "i32")
    return Kernel(f"repetition_penalty_naive_{dtype}", repetition_penalty, kinds, THREADS)


# --- version split ---------------------------------------------------------------------------------------------------

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
def _logit_bf16(word, half):
    return ptx.f32_from_bits(uint32(word & uint32(0xFFFF0000)) if half else uint32(word << uint32(16)))


@device_function
def _place_bf16(value):
    return uint32(_ordered(value) >> uint32(16))


@device_function
def _logit_at_bf16(place):
    bits = uint32(place << uint32(16))
    if bits & uint32(0x80000000):
        return ptx.f32_from_bits(uint32(bits ^ uint32(0x80000000)))
    return ptx.f32_from_bits(uint32(bits ^ uint32(0xFFFF0000)))


@device_function
def _logit_f16(word, half):
    return ptx.f32_from_f16(uint16(uint32(word >> uint32(16)) if half else uint32(word & uint32(0xFFFF))))


@device_function
def _place_f16(value):
    bits = uint32(ptx.cvt_rn_f16_f32(ptx.add_rn_f32(value, float32(0.0))))
    if bits & uint32(0x8000):
        return uint32(bits ^ uint32(0xFFFF))
    return uint32(bits | uint32(0x8000))


@device_function
def _logit_at_f16(place):
    return ptx.f32_from_f16(uint16(place ^ (uint32(0x8000) if place & uint32(0x8000) else uint32(0xFFFF))))


class _Logits(NamedTuple):
    """Of a 16-bit dtype. of(word, half): float32 of the lower (half 0) or upper element of a pair. place(value): place
    0 … 0xffff of such a float32 in the order of all, as `_ordered` orders. at(place): the float32 of a place."""

    of: Callable[[Any, Any], Any]
    place: Callable[[Any], Any]
    at: Callable[[Any], Any]


_LOGITS = {
    "bf16": _Logits(_logit_bf16, _place_bf16, _logit_at_bf16),
    "f16": _Logits(_logit_f16, _place_f16, _logit_at_f16),
}


@device_function
def _largest_of_block(values, thread, value):
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
def _best_of_block(values, tokens, thread, value, token):
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
def _is_last(workspace, base, thread, last):
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
def _finish(values, tokens, last, workspace, base, thread, value, token, out):
    """Write the row's best token, once all its blocks have brought theirs."""
    value, token = _best_of_block(values, tokens, thread, value, token)
    if thread == 0:
        place = base + PLACES + 2 * int64(cuda.blockIdx.x)
        ptx.st_global_b32(workspace, place, ptx.bits_from_f32(value))
        ptx.st_global_b32(workspace, place + 1, token)
    if _is_last(workspace, base, thread, last):
        value, token = float32(-math.inf), uint32(NOTHING)
        if thread < cuda.gridDim.x:
            place = base + PLACES + 2 * thread
            value = ptx.f32_from_bits(ptx.ld_global_b32(workspace, place))
            token = ptx.ld_global_b32(workspace, place + 1)
        value, token = _best_of_block(values, tokens, thread, value, token)
        if thread == 0:
            out[cuda.blockIdx.y] = -1 if token == uint32(NOTHING) else int32(token)


@kernel_factory
def split_argmax(dtype: str) -> Kernel:
    """logits [B, V], out i32[B], workspace, V; grid (blocks a row, B). dtype: "bf16" or "f16"."""
    logit_of = _LOGITS[dtype].of

    def argmax(logits, out, workspace, vocabulary):
        ptx.griddepcontrol_launch_dependents()
        values = cuda.shared.array(WARPS, float32)
        tokens = cuda.shared.array(WARPS, uint32)
        last = cuda.shared.array(1, int32)
        thread = int64(cuda.threadIdx.x)
        row = int64(cuda.blockIdx.y) * vocabulary
        vectors = int64(vocabulary) // 8
        best, best_token = float32(-math.inf), uint32(NOTHING)
        ptx.griddepcontrol_wait()
        vector = int64(cuda.blockIdx.x) * SPLIT_THREADS + thread
        while vector < vectors:
            words = ptx.ld_global_v4(logits, row + vector * 8)
            for e in range(4):
                for half in range(2):
                    value = logit_of(words[e], half)
                    if value > best or (value == best and best_token == uint32(NOTHING)):
                        best, best_token = value, uint32(vector * 8 + 2 * e + half)
            vector += int64(cuda.gridDim.x) * SPLIT_THREADS
        _finish(values, tokens, last, workspace, int64(cuda.blockIdx.y) * HEAD, thread, best, best_token, out)

    kinds = (f"{dtype}*", "i32*", "i32*", "i32")
    return Kernel(f"argmax_split_{dtype}", argmax, kinds, SPLIT_THREADS, options=PROGRAMMATIC)


@device_function
def _sum_in_warp(value):
    """Sum of a uint64 over the warp."""
    for step in range(5):
        by = uint32(16 >> step)
        lower = ptx.shfl_sync_bfly_u32(ptx.FULL_MASK, uint32(value & uint64(0xFFFFFFFF)), by)
        upper = ptx.shfl_sync_bfly_u32(ptx.FULL_MASK, uint32(value >> uint64(32)), by)
        value = value + (uint64(lower) | (uint64(upper) << uint64(32)))
    return value


@device_function
def _sum_up_to(sums, thread, value):
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


@kernel_factory
def split_floor(dtype: str) -> Kernel:
    """logits [B, V], temperature, top_k, top_p [B], workspace, V; grid (blocks a row, B).

    dtype: "bf16" or "f16". Of rows that are not greedy: the largest logit, and the least that top_k and top_p keep, to
    the workspace.
    """
    logit_of, place_of, logit_at = _LOGITS[dtype]

    @device_function
    def weigh(count, place, least, inverse, largest, by_mass):
        """What `count` logits at `place` in the order of all weigh: 1 each, or their likelihood relative to that of the
        largest; 0 below the place `least`."""
        if count == 0 or place < least:
            return uint64(0)
        if not by_mass:
            return uint64(count)
        likelihood = device.exp(_score(logit_at(place), largest, inverse))
        return uint64(count) * uint64(likelihood * float32(2.0**40))

    def floor(logits, temperatures, top_ks, top_ps, workspace, vocabulary):
        ptx.griddepcontrol_launch_dependents()
        groups = cuda.shared.array(GROUPS, uint64)
        sums = cuda.shared.array(WARPS, uint64)
        found = cuda.shared.array(2, uint32)
        above = cuda.shared.array(1, uint64)
        values = cuda.shared.array(WARPS, float32)
        last = cuda.shared.array(1, int32)
        counts = cuda.local.array(8, int32)
        thread = int64(cuda.threadIdx.x)
        batch = int64(cuda.blockIdx.y)
        base, row = batch * ROW, batch * vocabulary
        vectors = int64(vocabulary) // 8
        ptx.griddepcontrol_wait()
        temperature, top_k, top_p = temperatures[batch], top_ks[batch], top_ps[batch]
        by_count = 0 < top_k < vocabulary
        filters = by_count or top_p < float32(1.0)
        if temperature > float32(0.0):
            if filters:
                groups[thread] = uint64(0)
                cuda.syncthreads()
            largest = float32(-math.inf)
            vector = int64(cuda.blockIdx.x) * SPLIT_THREADS + thread
            while vector < vectors:
                words = ptx.ld_global_v4(logits, row + vector * 8)
                for e in range(4):
                    for half in range(2):
                        value = logit_of(words[e], half)
                        # Neither NaN nor -inf: they come last, weigh nothing, and may be most of the row.
                        if value > float32(-math.inf):
                            largest = ptx.max_f32(largest, value)
                            if filters:
                                place = place_of(value)
                                ptx.red_add_relaxed_u32(workspace, base + COUNTS + int64(place), uint32(1))
                                groups[place >> uint32(8)] = uint64(1)
                vector += int64(cuda.gridDim.x) * SPLIT_THREADS
            if filters:
                cuda.syncthreads()
                if groups[thread] != uint64(0):
                    workspace[base + HEAD + thread] = 1
            largest = _largest_of_block(values, thread, largest)
            if thread == 0:
                place = base + PLACES + int64(cuda.blockIdx.x)
                ptx.st_global_b32(workspace, place, ptx.bits_from_f32(largest))
            if _is_last(workspace, base, thread, last):
                largest = float32(-math.inf)
                if thread < cuda.gridDim.x:
                    largest = ptx.f32_from_bits(ptx.ld_global_b32(workspace, base + PLACES + thread))
                largest = _largest_of_block(values, thread, largest)
                inverse = ptx.div_rn_f32(float32(1.0), temperature)
                # Thread t has the groups, and the places of a group, in descending order.
                mine = int64(GROUPS - 1) - thread
                warp, lane = thread >> 5, thread & 31

                # Each filter finds the group, then in it the place, at which the sum from above reaches what it wants.
                least = uint32(0)
                for by_mass in range(2):
                    if (by_mass == 0 and by_count) or (by_mass == 1 and top_p < float32(1.0)):
                        group = warp
                        while group < GROUPS:
                            weight = uint64(0)
                            if workspace[base + HEAD + group] != 0:
                                for i in range(8):
                                    counts[i] = workspace[base + COUNTS + group * 256 + i * 32 + lane]
                                for i in range(8):
                                    place = uint32(group * 256 + i * 32 + lane)
                                    weight = weight + weigh(counts[i], place, least, inverse, largest, by_mass)
                                weight = _sum_in_warp(weight)
                            if lane == 0:
                                groups[group] = weight
                            group += WARPS
                        if thread == 0:
                            found[0] = uint32(GROUPS)
                        cuda.syncthreads()
                        reached, total = _sum_up_to(sums, thread, groups[mine])
                        wanted = uint64(max(top_k, int32(1)))
                        if by_mass == 1:
                            share = float64(total) * float64(max(top_p, float32(2.0**-126)))
                            wanted = uint64(share)
                            if float64(wanted) < share:
                                wanted = wanted + uint64(1)
                        if reached >= wanted and reached - groups[mine] < wanted:
                            found[0] = uint32(mine)
                            above[0] = reached - groups[mine]
                        cuda.syncthreads()
                        # Fewer logits than top_k wants: all are kept.
                        if found[0] < uint32(GROUPS):
                            place = int64(found[0]) * 256 + mine
                            count = workspace[base + COUNTS + place]
                            weight = weigh(count, uint32(place), least, inverse, largest, by_mass)
                            reached = above[0] + _sum_up_to(sums, thread, weight)[0]
                            if reached >= wanted and reached - weight < wanted:
                                found[1] = uint32(place)
                            cuda.syncthreads()
                            least = found[1]
                        cuda.syncthreads()

                if thread == 0:
                    kept = logit_at(least) if least != uint32(0) else float32(-math.inf)
                    ptx.st_global_b32(workspace, base + FLOOR, ptx.bits_from_f32(kept))
                    ptx.st_global_b32(workspace, base + LARGEST, ptx.bits_from_f32(largest))
                if filters:
                    group = warp
                    while group < GROUPS:
                        if workspace[base + HEAD + group] != 0:
                            for i in range(2):
                                place = base + COUNTS + group * 256 + i * 128 + lane * 4
                                ptx.st_global_v4(workspace, place, uint32(0), uint32(0), uint32(0), uint32(0))
                        group += WARPS
                    cuda.syncthreads()
                    workspace[base + HEAD + thread] = 0

    kinds = (f"{dtype}*", "f32*", "i32*", "f32*", "i32*", "i32")
    return Kernel(f"sample_floor_split_{dtype}", floor, kinds, SPLIT_THREADS, blocks_per_sm=4, options=PROGRAMMATIC)


@kernel_factory
def split_sample(dtype: str) -> Kernel:
    """logits [B, V], temperature, min_p, seed, position [B], out i32[B], workspace, V; grid (blocks a row, B). After
    `split_floor` on the same workspace. dtype: "bf16" or "f16"."""
    logit_of = _LOGITS[dtype].of

    def sample(logits, temperatures, min_ps, seeds, positions, out, workspace, vocabulary):
        ptx.griddepcontrol_launch_dependents()
        values = cuda.shared.array(WARPS, float32)
        tokens = cuda.shared.array(WARPS, uint32)
        last = cuda.shared.array(1, int32)
        thread = int64(cuda.threadIdx.x)
        batch = int64(cuda.blockIdx.y)
        base, row = batch * ROW, batch * vocabulary
        vectors = int64(vocabulary) // 8
        best, best_token = float32(-math.inf), uint32(NOTHING)
        ptx.griddepcontrol_wait()
        temperature, min_p = temperatures[batch], min_ps[batch]
        position, seed = positions[batch], uint64(seeds[batch])
        greedy = temperature <= float32(0.0)
        inverse = float32(1.0)
        floor, largest = float32(-math.inf), float32(0.0)
        if not greedy:
            inverse = ptx.div_rn_f32(float32(1.0), temperature)
            floor = ptx.f32_from_bits(ptx.ld_global_b32(workspace, base + FLOOR))
            largest = ptx.f32_from_bits(ptx.ld_global_b32(workspace, base + LARGEST))
        vector = int64(cuda.blockIdx.x) * SPLIT_THREADS + thread
        while vector < vectors:
            words = ptx.ld_global_v4(logits, row + vector * 8)
            for e in range(4):
                for half in range(2):
                    value = logit_of(words[e], half)
                    kept = value >= floor  # never a NaN
                    if kept and not greedy:
                        value = _score(value, largest, inverse)
                        if min_p > float32(0.0):
                            kept = device.exp(value) >= min_p
                    if kept:
                        token = vector * 8 + 2 * e + half
                        if not greedy:
                            value = ptx.add_rn_f32(value, _gumbel(token, position, seed))
                        if value > best or (value == best and best_token == uint32(NOTHING)):
                            best, best_token = value, uint32(token)
            vector += int64(cuda.gridDim.x) * SPLIT_THREADS
        _finish(values, tokens, last, workspace, base, thread, best, best_token, out)

    kinds = (f"{dtype}*", "f32*", "f32*", "i64*", "i32*", "i32*", "i32*", "i32")
    return Kernel(f"sample_split_{dtype}", sample, kinds, SPLIT_THREADS, options=PROGRAMMATIC)


@kernel_factory
def step_advance() -> Kernel:
    """chosen, tokens, positions, places i32[B], history i32[B, C], B, C; grid (B / SPLIT_THREADS,)."""

    def advance(chosen, tokens, positions, places, history, count, columns):
        ptx.griddepcontrol_launch_dependents()
        row = int64(cuda.blockIdx.x) * SPLIT_THREADS + int64(cuda.threadIdx.x)
        ptx.griddepcontrol_wait()
        if row < count:
            token, place = chosen[row], places[row]
            positions[row] += int32(1)
            tokens[row] = max(token, int32(0))
            history[row * columns + place] = token
            place += int32(1)
            places[row] = int32(0) if place == columns else place

    kinds = (*("i32*",) * 5, "i32", "i32")
    return Kernel("advance_i32", advance, kinds, SPLIT_THREADS, options=PROGRAMMATIC)


def _check_settings(operation: str, count: int, *settings: torch.Tensor) -> None:
    """temperature, top_k, top_p, min_p, seed and position of so many rows. Raises as `check.tensor`."""
    for (name, dtype), given in zip(SETTINGS.items(), settings, strict=True):
        check.tensor(operation, name, given, (count,), dtype)


def argmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[b] = the token of the largest logit of row b: the lowest of equal ones, never a NaN, -1 where all are NaN.

    logits [B, V] bf16, fp16 or fp32 contiguous, out i32[B]. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("argmax", "logits", logits)
    count, vocabulary = check.dimensions("argmax", "logits", logits, "B, V")
    check.tensor("argmax", "logits", logits, (count, vocabulary), logits.dtype)
    check.tensor("argmax", "out", out, (count,), torch.int32)
    if count:
        naive_argmax(dtype).launch((count,), logits, out, vocabulary)
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """out[b] = a token drawn from row b's filtered distribution; -1 where all its logits are NaN.

    logits [B, V] bf16, fp16 or fp32 contiguous. temperature f32[B], finite: scores are the logits less the largest of
    the row, multiplied by 1 / temperature, and 0 for the largest, infinite ones too; temperature 0 is argmax. Then, in
    this order: top_k i32[B] keeps the k largest (0: all), top_p f32[B] the fewest likeliest tokens of at least that
    mass (1: all), min_p f32[B] those at least that share as likely as the likeliest (0: all). Tokens equal to the last
    kept are kept. The draw is the largest score plus Gumbel noise by Philox4x32-10, its counter (token, 0, position,
    0), its key the seed: seed i64[B], position i32[B]. A NaN is never drawn; where there are logits of +inf, only they
    are, each as likely as the others. out i32[B]. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("sample", "logits", logits)
    count, vocabulary = check.dimensions("sample", "logits", logits, "B, V")
    check.tensor("sample", "logits", logits, (count, vocabulary), logits.dtype)
    _check_settings("sample", count, temperature, top_k, top_p, min_p, seed, position)
    check.tensor("sample", "out", out, (count,), torch.int32)
    if count:
        kernel = naive_sample(dtype)
        kernel.launch((count,), logits, temperature, top_k, top_p, min_p, seed, position, out, vocabulary)
    return out


def argmax_workspace_size(count: int) -> int:
    """Elements of the i32 workspace `argmax_split` needs for up to `count` rows."""
    return count * HEAD


def sample_workspace_size(count: int) -> int:
    """Elements of the i32 workspace `sample_split` needs for up to `count` rows: 258 KB each."""
    return count * ROW


def _chunks(count: int, vocabulary: int) -> int:
    """Blocks that share a row: enough of them to fill a GPU, none without a vector for each thread."""
    # Every block costs the simulator much, and small rows are to be shared too.
    if SIMULATED:
        return min(3, -(-vocabulary // 64))
    return min(-(-vocabulary // (8 * SPLIT_THREADS)), PARTIALS, max(8, 2048 // count))


def _check_split(operation: str, logits: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
    """B and V. Raises TypeError or ValueError naming the argument."""
    check.half_name(operation, "logits", logits)
    count, vocabulary = check.dimensions(operation, "logits", logits, "B, V")
    check.tensor(operation, "logits", logits, (count, vocabulary), logits.dtype)
    check.tensor(operation, "out", out, (count,), torch.int32)
    if vocabulary % 8 or vocabulary == 0:
        raise ValueError(f"{operation}: logits has rows of {vocabulary}: a multiple of 8 needed")
    if logits.data_ptr() % 16:
        raise ValueError(f"{operation}: logits does not begin at a multiple of 16 bytes")
    if count > 65535:
        raise ValueError(f"{operation}: logits has {count} rows: at most 65535 at a time")
    return count, vocabulary


def _check_workspace(operation: str, workspace: torch.Tensor, size: int) -> None:
    check.dimensions(operation, "workspace", workspace, "N")
    check.tensor(operation, "workspace", workspace, tuple(workspace.shape), torch.int32)
    if len(workspace) < size:
        raise ValueError(f"{operation}: workspace has {len(workspace)} elements: at least {size} needed")
    if workspace.data_ptr() % 16:
        raise ValueError(f"{operation}: workspace does not begin at a multiple of 16 bytes")


def argmax_split(logits: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
    """`argmax`, by many blocks a row.

    logits [B, V] bf16 or fp16, contiguous, at a multiple of 16 bytes, V a multiple of 8; out i32[B]. workspace: i32 of
    at least argmax_workspace_size(B), zero before its first use and of no other function's; what must be zero is so
    again afterwards. Returns out. Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, vocabulary = _check_split("argmax_split", logits, out)
    _check_workspace("argmax_split", workspace, argmax_workspace_size(count))
    if count:
        split_argmax(check.HALVES[logits.dtype]).launch(
            (_chunks(count, vocabulary), count), logits, out, workspace, vocabulary
        )
    return out


def sample_split(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """`sample`, by many blocks a row: the same tokens, but for top_p where fp32 sums of the mass miss its threshold.

    Arguments as of `sample`, but logits [B, V] bf16 or fp16, at a multiple of 16 bytes, V a multiple of 8. workspace:
    i32 of at least sample_workspace_size(B), zero before its first use and of no other function's; what must be zero is
    so again afterwards. Returns out. Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, vocabulary = _check_split("sample_split", logits, out)
    _check_settings("sample_split", count, temperature, top_k, top_p, min_p, seed, position)
    _check_workspace("sample_split", workspace, sample_workspace_size(count))
    if count:
        grid = (_chunks(count, vocabulary), count)
        dtype = check.HALVES[logits.dtype]
        split_floor(dtype).launch(grid, logits, temperature, top_k, top_p, workspace, vocabulary)
        split_sample(dtype).launch(grid, logits, temperature, min_p, seed, position, out, workspace, vocabulary)
    return out


def advance(
    chosen: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, history: torch.Tensor
) -> None:
    """What a row has chosen becomes its next step's input: one launch between two steps of a CUDA graph.

    positions[b] += 1, tokens[b] = chosen[b] (0 where that is -1), history[b, places[b]] = chosen[b], places[b] moves
    to the next of the C columns, after the last to the first. chosen, tokens, positions, places i32[B], history
    i32[B, C], contiguous; 0 <= places < C (not checked); history may lie in pinned memory of the host, which can then
    read it without a copy. Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    (count,) = check.dimensions("advance", "chosen", chosen, "B")
    _, columns = check.dimensions("advance", "history", history, "B, C")
    check.tensor("advance", "chosen", chosen, (count,), torch.int32)
    check.tensor("advance", "tokens", tokens, (count,), torch.int32)
    check.tensor("advance", "positions", positions, (count,), torch.int32)
    check.tensor("advance", "places", places, (count,), torch.int32)
    check.tensor("advance", "history", history, (count, columns), torch.int32)
    if count:
        grid = (-(-count // SPLIT_THREADS),)
        step_advance().launch(grid, chosen, tokens, positions, places, history, count, columns)


def repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """In place: logits of seen tokens are multiplied by the row's penalty where negative, else divided by it.

    logits [B, V] bf16, fp16 or fp32 contiguous, seen uint8 or bool [B, V], penalty f32[B] (1: no change). Returns
    logits. Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("repetition_penalty", "logits", logits)
    count, vocabulary = check.dimensions("repetition_penalty", "logits", logits, "B, V")
    check.tensor("repetition_penalty", "logits", logits, (count, vocabulary), logits.dtype)
    if seen.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"repetition_penalty: seen is {seen.dtype}: torch.uint8 or torch.bool needed")
    check.tensor("repetition_penalty", "seen", seen, (count, vocabulary), seen.dtype)
    check.tensor("repetition_penalty", "penalty", penalty, (count,), torch.float32)
    if count and vocabulary:
        grid = (count, -(-vocabulary // THREADS))
        naive_repetition_penalty(dtype).launch(grid, logits, seen, penalty, vocabulary)
    return logits
