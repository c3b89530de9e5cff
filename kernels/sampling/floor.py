"""Version split: the largest logit of a row, and the least one that top_k and top_p keep.

All blocks of a row count how often each logit occurs; the last to finish walks over the counts from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import device, ptx
from kernels.cuda import cuda, device_function, float32, float64, int32, int64, uint32, uint64
from kernels.launch import Kernel, kernel_factory
from kernels.sampling.blocks import (
    COUNTS,
    FLOOR,
    GROUPS,
    HEAD,
    LARGEST,
    LOGITS,
    PLACES,
    PROGRAMMATIC,
    ROW,
    SPLIT_THREADS,
    WARPS,
    is_last,
    largest_of_block,
    sum_in_warp,
    sum_up_to,
)
from kernels.sampling.scores import score


@kernel_factory
def split_floor(dtype: str) -> Kernel:
    """logits [B, V], temperature, top_k, top_p [B], workspace, V; grid (blocks a row, B).

    dtype: "bf16" or "f16". Of rows that are not greedy: the largest logit, and the least that top_k and top_p keep, to
    the workspace.
    """
    count_logits, search, logit_at = _counter(dtype), _search(dtype), LOGITS[dtype].at

    @device_function
    def clear(workspace, base, thread):
        """The counts of the groups that occur, then the groups, are zero again."""
        group, lane = thread >> 5, thread & 31
        while group < GROUPS:
            if workspace[base + HEAD + group] != 0:
                for i in range(2):
                    place = base + COUNTS + group * 256 + i * 128 + lane * 4
                    ptx.st_global_v4(workspace, place, uint32(0), uint32(0), uint32(0), uint32(0))
            group += WARPS
        cuda.syncthreads()
        workspace[base + HEAD + thread] = 0

    def floor(logits, temperatures, top_ks, top_ps, workspace, vocabulary):
        ptx.griddepcontrol_launch_dependents()
        groups = cuda.shared.array(GROUPS, uint64)
        sums = cuda.shared.array(WARPS, uint64)
        found = cuda.shared.array(2, uint32)
        above = cuda.shared.array(1, uint64)
        values = cuda.shared.array(WARPS, float32)
        last = cuda.shared.array(1, int32)
        thread = int64(cuda.threadIdx.x)
        batch = int64(cuda.blockIdx.y)
        base, row = batch * ROW, batch * vocabulary
        ptx.griddepcontrol_wait()
        temperature, top_k, top_p = temperatures[batch], top_ks[batch], top_ps[batch]
        by_count = 0 < top_k < vocabulary
        filters = by_count or top_p < float32(1.0)
        if temperature > float32(0.0):
            if filters:
                groups[thread] = uint64(0)
                cuda.syncthreads()
            largest = count_logits(logits, row, vocabulary, workspace, base, groups, filters, thread)
            if filters:
                cuda.syncthreads()
                if groups[thread] != uint64(0):
                    workspace[base + HEAD + thread] = 1
            largest = largest_of_block(values, thread, largest)
            if thread == 0:
                place = base + PLACES + int64(cuda.blockIdx.x)
                ptx.st_global_b32(workspace, place, ptx.bits_from_f32(largest))
            if is_last(workspace, base, thread, last):
                largest = float32(-math.inf)
                if thread < cuda.gridDim.x:
                    largest = ptx.f32_from_bits(ptx.ld_global_b32(workspace, base + PLACES + thread))
                largest = largest_of_block(values, thread, largest)
                inverse = ptx.div_rn_f32(float32(1.0), temperature)
                least = uint32(0)
                for by_mass in range(2):
                    if (by_mass == 0 and by_count) or (by_mass == 1 and top_p < float32(1.0)):
                        least = search(
                            workspace, base, (groups, sums, found, above), least, (inverse, largest), (top_k, top_p),
                            by_mass, thread,
                        )  # fmt: skip
                if thread == 0:
                    kept = logit_at(least) if least != uint32(0) else float32(-math.inf)
                    ptx.st_global_b32(workspace, base + FLOOR, ptx.bits_from_f32(kept))
                    ptx.st_global_b32(workspace, base + LARGEST, ptx.bits_from_f32(largest))
                if filters:
                    clear(workspace, base, thread)

    kinds = (f"{dtype}*", "f32*", "i32*", "f32*", "i32*", "i32")
    return Kernel(f"sample_floor_split_{dtype}", floor, kinds, SPLIT_THREADS, blocks_per_sm=4, options=PROGRAMMATIC)


def _counter(dtype: str) -> Callable[..., float]:
    """A function that gives a thread's largest logit and, where there are `filters`, counts its logits and marks their
    groups."""
    logit_of, place_of, _ = LOGITS[dtype]

    @device_function
    def count_logits(logits, row, vocabulary, workspace, base, groups, filters, thread):
        vectors = int64(vocabulary) // 8
        largest = float32(-math.inf)
        vector = int64(cuda.blockIdx.x) * SPLIT_THREADS + thread
        while vector < vectors:
            words = ptx.ld_global_v4(logits, row + vector * 8)
            for e in range(4):
                for upper in range(2):
                    value = logit_of(words[e], upper)
                    # Neither NaN nor -inf: they come last, weigh nothing, and may be most of the row.
                    if value > float32(-math.inf):
                        largest = ptx.max_f32(largest, value)
                        if filters:
                            place = place_of(value)
                            ptx.red_add_relaxed_u32(workspace, base + COUNTS + int64(place), uint32(1))
                            groups[place >> uint32(8)] = uint64(1)
            vector += int64(cuda.gridDim.x) * SPLIT_THREADS
        return largest

    return count_logits


def _search(dtype: str) -> Callable[..., int]:
    """A function that gives the place of the least logit that a filter keeps: the group, then in it the place, at which
    the sum from above reaches what the filter wants."""
    logit_at = LOGITS[dtype].at

    @device_function
    def weigh(count, place, least, scale, by_mass):
        """Weight of `count` logits at `place` in the order of all: 1 each, or their likelihood relative to that of the
        largest; 0 below the place `least`. scale: 1 / temperature and the largest logit."""
        inverse, largest = scale
        if count == 0 or place < least:
            return uint64(0)
        if not by_mass:
            return uint64(count)
        likelihood = device.exp(score(logit_at(place), largest, inverse))
        return uint64(count) * uint64(likelihood * float32(2.0**40))

    @device_function
    def weigh_groups(workspace, base, groups, least, scale, by_mass, thread):
        """The weight of each group that occurs, by a warp each."""
        counts = cuda.local.array(8, int32)
        group, lane = thread >> 5, thread & 31
        while group < GROUPS:
            weight = uint64(0)
            if workspace[base + HEAD + group] != 0:
                for i in range(8):
                    counts[i] = workspace[base + COUNTS + group * 256 + i * 32 + lane]
                for i in range(8):
                    place = uint32(group * 256 + i * 32 + lane)
                    weight = weight + weigh(counts[i], place, least, scale, by_mass)
                weight = sum_in_warp(weight)
            if lane == 0:
                groups[group] = weight
            group += WARPS

    @device_function
    def wanted_of(total, settings, by_mass):
        """The count or the mass to be reached. settings: top_k and top_p."""
        top_k, top_p = settings
        wanted = uint64(max(top_k, int32(1)))
        if by_mass == 1:
            share = float64(total) * float64(max(top_p, float32(2.0**-126)))
            wanted = uint64(share)
            if float64(wanted) < share:
                wanted = wanted + uint64(1)
        return wanted

    @device_function
    def search(workspace, base, shared, least, scale, settings, by_mass, thread):
        """shared: weights of groups, sums of warps, what is found, the sum above it."""
        groups, sums, found, above = shared
        weigh_groups(workspace, base, groups, least, scale, by_mass, thread)
        if thread == 0:
            found[0] = uint32(GROUPS)
        cuda.syncthreads()
        # Thread t has the groups, and the places of a group, in descending order.
        mine = int64(GROUPS - 1) - thread
        reached, total = sum_up_to(sums, thread, groups[mine])
        wanted = wanted_of(total, settings, by_mass)
        if reached >= wanted and reached - groups[mine] < wanted:
            found[0] = uint32(mine)
            above[0] = reached - groups[mine]
        cuda.syncthreads()
        # Fewer logits than top_k wants: all are kept.
        if found[0] < uint32(GROUPS):
            place = int64(found[0]) * 256 + mine
            count = workspace[base + COUNTS + place]
            weight = weigh(count, uint32(place), least, scale, by_mass)
            reached = above[0] + sum_up_to(sums, thread, weight)[0]
            if reached >= wanted and reached - weight < wanted:
                found[1] = uint32(place)
            cuda.syncthreads()
            least = found[1]
        cuda.syncthreads()
        return least

    return search
