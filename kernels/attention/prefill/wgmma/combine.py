"""Split-KV: segments of a tile by several blocks, combined by the last of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.attention.prefill.softmax import earliest, join
from kernels.attention.softmax import SEGMENT
from kernels.cuda import cuda, device_function, float32, int32, int64, uint32


def combiner(o_words: int, record: int, rows: int) -> Callable[..., tuple]:
    """A function that combines the segments of a divided tile, in the last warp of its rows to come there."""

    @device_function
    def put_partial(partials, at, o, largest, total):
        """A segment's O, m and l to the place that begins at `at` for this lane."""
        for i in range(o_words // 4):
            ptx.st_global_v4(
                partials, at + 128 * i, ptx.bits_from_f32(o[4 * i]), ptx.bits_from_f32(o[4 * i + 1]),
                ptx.bits_from_f32(o[4 * i + 2]), ptx.bits_from_f32(o[4 * i + 3]),
            )  # fmt: skip
        ptx.st_global_v4(
            partials, at + 32 * o_words, ptx.bits_from_f32(largest[0]), ptx.bits_from_f32(largest[1]),
            ptx.bits_from_f32(total[0]), ptx.bits_from_f32(total[1]),
        )  # fmt: skip

    @device_function
    def add_partial(partials, at, o, all_largest, all_total, factor):
        """O, m and l of the segments so far go on by those of the next one."""
        old = cuda.local.array(2, float32)
        new = cuda.local.array(2, float32)
        sums = ptx.ld_global_v4(partials, at + 32 * o_words)
        for h in range(2):
            join(all_largest, ptx.f32_from_bits(sums[h]), old, new, factor, h)
            added = ptx.mul_rn_f32(ptx.f32_from_bits(sums[2 + h]), new[h])
            all_total[h] = ptx.fma_rn_f32(all_total[h], old[h], added)
        for i in range(o_words // 4):
            part = ptx.ld_global_v4(partials, at + 128 * i)
            for e in range(4):
                added = ptx.mul_rn_f32(ptx.f32_from_bits(part[e]), new[e // 2])
                o[4 * i + e] = ptx.fma_rn_f32(o[4 * i + e], old[e // 2], added)

    @device_function
    def combine_partials(o, totals, told, workspace, warp_row, window, factor, lane):
        """Whether O is complete, then the entry's token, count, position and head.

        totals: m and l. told: where the entry is. workspace: partials, arrived, Hq.
        """
        partials, arrived, heads = workspace
        all_largest, all_total = totals
        # Anew, so that no registers keep these meanwhile.
        words = ptx.ld_shared_v4(told)
        token, count, position, head = int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])
        words = ptx.ld_shared_v4(told + uint32(16))
        limit, number, tile_number = int32(words[1]), int32(words[2]), int32(words[3])
        segment = int32(earliest(position, window, 0) // SEGMENT)
        last_segment = int32(int32(position + count - 1) // SEGMENT)
        others = uint32(last_segment - segment)
        complete = True
        if number >= 0 and others > 0 and warp_row < count:
            # Of this warp's 16 rows the one that puts the last segment's result there combines them all.
            at = int64(number) + warp_row // 16
            step = int64(int32(count + 15) // 16) * heads * record
            at = (at * heads + head) * record + lane * 4
            put_partial(partials, at + (limit - 1) // SEGMENT * step, o, all_largest, all_total)
            ptx.bar_warp_sync()
            before = uint32(0)
            if lane == 0:
                mine = (int64(tile_number) * (rows // 16) + warp_row // 16) * heads + head
                before = ptx.atom_add_acq_rel_u32(arrived, mine, uint32(1))
                if before == others:
                    arrived[mine] = int32(0)
            complete = ptx.shfl_sync_idx_u32(ptx.FULL_MASK, before, uint32(0)) == others
            ptx.bar_warp_sync()
            if complete:
                for h in range(2):
                    all_largest[h], all_total[h] = float32(-math.inf), float32(0.0)
                for i in range(o_words):
                    o[i] = float32(0.0)
                while segment <= last_segment:
                    add_partial(partials, at + segment * step, o, all_largest, all_total, factor)
                    segment += int32(1)
        return complete, token, count, position, head

    return combine_partials
