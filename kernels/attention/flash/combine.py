"""Split-KV: a segment's O, m and l to the workspace, and the last of a token's blocks combines them in order."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.attention.flash.layout import THREADS, Layout
from kernels.attention.softmax import SEGMENT, exponential, row_sum
from kernels.cuda import cuda, device_function, float32, int32, int64, uint32
from kernels.device import HALVES

# Tokens of a launch at most: the workspace holds as many.
TOKENS = 256
# Partial results that a thread of the combining block asks for at once.
PARTIALS = 8
PARTIAL_WORDS, PARTIAL_PAIRS = 4 * PARTIALS, 2 * PARTIALS


def _record(heads: int, width: int, segments: int) -> int:
    """fp32 elements of a token in the workspace: O, m, l (and two unused) of each head and segment, then counters."""
    return -(-heads * (segments * (width + 4) + 1) // 4) * 4


def workspace_size(tokens: int, heads: int, width: int, capacity: int) -> int:
    """fp32 elements of `workspace` for up to `tokens` tokens of `heads` query heads of `width` elements.

    capacity: positions of a slot. Beyond TOKENS tokens it grows no more.
    """
    return min(tokens, TOKENS) * _record(heads, width, -(-capacity // SEGMENT))


def record_of(layout: Layout) -> Callable[..., int]:
    """`_record` as a device function of heads and segments."""
    partial = layout.head_dim + 4

    @device_function
    def record_of(heads, segments):
        return (int64(heads) * (int64(segments) * partial + 1) + 3) // 4 * 4

    return record_of


def ender(dtype: str, layout: Layout) -> Callable[..., None]:
    """`end_segment(o, online, memory, places, whole, kv_head, warp, lane)`: O / l to out where the segment is the
    token's only one (`whole`), else O, m and l to the workspace; the next segment begins.

    online: largest, total, alpha. memory: out, workspace. places: the token's row of out, its record in the workspace,
    segments of a slot, the segment.
    """
    head_dim, group, columns, row_blocks = layout.head_dim, layout.group, layout.columns, layout.row_blocks
    partial, o_words = head_dim + 4, 4 * layout.columns
    pack = HALVES[dtype].pack

    @device_function
    def end_segment(o, online, memory, places, whole, kv_head, warp, lane):
        largest, total, _ = online
        out, workspace = memory
        out_row, record, segments, segment = places
        quad, column = lane >> 2, lane & 3
        for h in range(row_blocks):
            value = row_sum(total[h])
            head = h * 8 + quad
            if head < group:
                d = warp * columns * 8 + column * 2
                if whole:
                    place = out_row + (kv_head * group + head) * head_dim + d
                    for i in range(columns):
                        first, second = (
                            ptx.div_rn_f32(o[4 * i + 2 * h], value),
                            ptx.div_rn_f32(o[4 * i + 2 * h + 1], value),
                        )
                        ptx.st_global_b32(out, place + i * 8, pack(second, first))
                else:
                    place = record + ((kv_head * group + head) * segments + segment) * partial
                    for i in range(columns):
                        workspace[place + d + i * 8] = o[4 * i + 2 * h]
                        workspace[place + d + i * 8 + 1] = o[4 * i + 2 * h + 1]
                    if warp == 0 and column == 0:
                        workspace[place + head_dim] = largest[h]
                        workspace[place + head_dim + 1] = value
            largest[h], total[h] = float32(-math.inf), float32(0.0)
        for i in range(o_words):
            o[i] = float32(0.0)

    return end_segment


def combiner(dtype: str, layout: Layout) -> tuple[Callable[..., bool], Callable[..., None]]:
    """Functions that say whether the block is the last of a token's to come there, and that combine in it."""
    head_dim, group, units = layout.head_dim, layout.group, layout.units
    partial = head_dim + 4
    pack = HALVES[dtype].pack

    @device_function
    def arrive_last(counters, counter, others, thread):
        """Whether `others` blocks have arrived before this one; then the counter is zero again."""
        arrived = int32(0)
        cuda.syncthreads()
        if thread == 0 and ptx.atom_add_acq_rel_u32(counters, counter, uint32(1)) == others:
            arrived = int32(1)
            counters[counter] = int32(0)
        return cuda.syncthreads_or(arrived)

    @device_function
    def add_partials(result4, sums, values, others, done, used, factor):
        """O, m and l so far go on by the PARTIALS segments from `done` on, or as many as there are, in order.

        sums: m and l, returned anew.
        """
        all_largest, all_total = sums
        for i in range(PARTIALS):
            if done + i < used:
                segment_largest = ptx.f32_from_bits(others[2 * i])
                new_largest = max(all_largest, segment_largest)
                old_scale = exponential(all_largest, new_largest, factor)
                new_scale = exponential(segment_largest, new_largest, factor)
                all_largest = new_largest
                added = ptx.mul_rn_f32(ptx.f32_from_bits(others[2 * i + 1]), new_scale)
                all_total = ptx.fma_rn_f32(all_total, old_scale, added)
                for e in range(4):
                    added = ptx.mul_rn_f32(ptx.f32_from_bits(values[4 * i + e]), new_scale)
                    result4[e] = ptx.fma_rn_f32(result4[e], old_scale, added)
        return all_largest, all_total

    @device_function
    def combine(out, workspace, out_row, record_at, used, kv_head, factor, thread):
        """record_at: the token's record, segments of a slot, the first segment that is there. used: how many are."""
        record, segments, first_segment = record_at
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
                all_largest, all_total = add_partials(
                    result4, (all_largest, all_total), values, others, done, used, factor
                )
                done += PARTIALS
            for e in range(4):
                result4[e] = ptx.div_rn_f32(result4[e], all_total)
            place = out_row + (kv_head * group + head) * head_dim + d
            ptx.st_global_b32(out, place, pack(result4[1], result4[0]))
            ptx.st_global_b32(out, place + 2, pack(result4[3], result4[2]))
            item += THREADS

    return arrive_last, combine
