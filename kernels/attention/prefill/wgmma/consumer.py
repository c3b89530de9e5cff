"""The consumer warpgroups: scores, online softmax and P·V, one tile of keys ahead of the values."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels import ptx
from kernels.attention.prefill.epilogue import writer
from kernels.attention.prefill.softmax import earliest, mask, new_maximum, packer, peak_from, running_total, weigh
from kernels.attention.prefill.tiling import TILES
from kernels.attention.prefill.wgmma.combine import combiner
from kernels.attention.prefill.wgmma.layout import Layout, stage_barriers, wait
from kernels.attention.prefill.wgmma.products import cleaner, products
from kernels.attention.prefill.work_plan import record_size
from kernels.attention.softmax import TILE, row_sum
from kernels.cuda import cuda, device_function, float32, int32, int64, uint32


@device_function
def take_turn(group):
    """Ping-pong: the two warpgroups issue their products in turn, one multiplies as the other weighs."""
    ptx.bar_sync(uint32(1 + group), uint32(256))


@device_function
def give_turn(group):
    ptx.bar_arrive(uint32(2 - group), uint32(256))


@device_function
def sees_all(first, position, group, window):
    """Whether all queries of a warpgroup see the whole tile at position `first`; position: of the entry's first one."""
    own = int32(position + group * 64)
    return not (int32(first + TILE) > int32(own + 1) or (window > 0 and first < int32(own + 64 - window)))


@device_function
def find_maxima(score, online, factor):
    """Both rows' largest go on by a tile's scores. online: peak, largest, alpha, shift, as in `new_maximum`."""
    peak, largest, alpha, shift = online
    for h in range(2):
        peak[h] = largest[h]
        peak_from(score, peak, 0, h)
        new_maximum(peak, largest, alpha, shift, factor, h)


def consumer(dtype: str, layout: Layout) -> Callable[..., None]:
    """`consume(base, out, workspace, out_stride, factor, window, thread)`: every entry that the producer tells of.

    workspace: partials, arrived, Hq.
    """
    head_dim, rows, divided = layout.head_dim, layout.rows, layout.divided
    k_at, v_at, totals_at, box_bytes = layout.k_at, layout.v_at, layout.totals_at, layout.box_bytes
    q_full, k_full, v_full = layout.q_full, layout.k_full, layout.v_full
    q_used, k_used, v_used = layout.q_used, layout.k_used, layout.v_used
    entry_at, entry_stride, spare_at = layout.entry_at, layout.entry_stride, layout.spare_at
    score_words, o_words, p_words = TILE // 2, head_dim // 2, TILE // 4
    own_totals = o_words * 128  # bytes of a warp
    put_total, combine = running_total(o_words, 512)
    write, pack, clear = writer(dtype, head_dim), packer(dtype), cleaner(layout)
    await_stage, peek, release = stage_barriers(layout.stages)
    multiply_keys, multiply_values = products(dtype, layout)
    combine_partials = combiner(o_words, record_size(head_dim), rows)
    keep_score, keep_o, keep_p = ptx.keep_f32(score_words), ptx.keep_f32(o_words), ptx.keep_u32(p_words)
    one_unfinished, none_unfinished = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)

    @device_function
    def set_to_zero(score, o, p):
        for i in range(score_words):
            score[i] = float32(0.0)
        for i in range(o_words):
            o[i] = float32(0.0)
        for i in range(p_words):
            p[i] = uint32(0)

    @device_function
    def begin_sums(largest, total):
        """Of no scores: the largest and the sum of what they weigh."""
        for h in range(2):
            largest[h], total[h] = float32(-math.inf), float32(0.0)

    @device_function
    def matrices_of(base, group):
        """Descriptors of the warpgroup's queries and of the first stage's keys and values."""
        q_matrix = uint32(ptx.wgmma_descriptor(base + uint32(group * 8192), uint32(16), uint32(1024)))
        k_matrices = uint32(ptx.wgmma_descriptor(base + uint32(k_at), uint32(16), uint32(1024)))
        v_matrices = uint32(ptx.wgmma_descriptor(base + uint32(v_at), uint32(box_bytes), uint32(1024)))
        return q_matrix, k_matrices, v_matrices

    @device_function
    def entry(told):
        """Token, count, position and head of the entry that the producer has told of."""
        words = ptx.ld_shared_v4(told)
        return int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])

    @device_function
    def release_queries(base, last, lane):
        """With the product with the last keys the queries are used up: the next ones arrive while these are weighed."""
        if last and lane == 0:
            ptx.mbarrier_arrive(base + uint32(q_used))

    @device_function
    def rescale(o, alpha):
        for i in range(o_words):
            o[i] = ptx.mul_rn_f32(o[i], alpha[i // 2 & 1])

    @device_function
    def computed(total, spare):
        """The weights that make up total[0] are computed before what stands behind this: the assembler would put the
        wait for the product with values ahead of them, and nothing would be under way meanwhile.

        spare: 4 bytes of shared memory that nobody reads.
        """
        if ptx.bits_from_f32(total[0]) == uint32(0xFFFFFFFF):  # as no sum is
            ptx.st_shared_b32(spare, uint32(0))

    @device_function
    def combine_segment(o, segment, totals, kept, factor, at):
        """A segment's O, m and l become those of all segments up to it; kept: whether there are some before."""
        largest, total = segment
        all_largest, all_total = totals
        if kept:
            combine(o, largest, total, all_largest, all_total, factor, at)
        else:
            for h in range(2):
                all_largest[h], all_total[h] = largest[h], row_sum(total[h])

    @device_function
    def first_scores(score, base, matrices, done, last, group, lane):
        """Scores of an entry's first tile: there is nothing else to multiply yet."""
        q_matrix, k_matrices, _ = matrices
        await_stage(base + uint32(k_full), done)
        take_turn(group)
        keep_score(score)
        ptx.wgmma_fence()
        multiply_keys(score, q_matrix, k_matrices, done)
        give_turn(group)
        none_unfinished()
        keep_score(score)
        release(base + uint32(k_used), done, lane)
        release_queries(base, last, lane)

    @device_function
    def last_values(o, p, base, v_matrices, done, fresh, lane):
        """The product of an entry's last weights with their values."""
        keep_o(o)
        keep_p(p)
        ptx.wgmma_fence()
        multiply_values(o, p, v_matrices, done, fresh)
        none_unfinished()
        keep_o(o)
        release(base + uint32(v_used), done, lane)

    @device_function
    def consume(base, out, workspace, out_stride, factor, window, thread):
        group, lane = int32(thread >> 7), int32(thread & 31)
        row, column = int32((thread >> 5) * 16 + (lane >> 2)), int32((lane & 3) * 2)
        score = cuda.local.array(score_words, float32)
        o = cuda.local.array(o_words, float32)
        p = cuda.local.array(p_words, uint32)
        largest = cuda.local.array(2, float32)
        total = cuda.local.array(2, float32)
        alpha = cuda.local.array(2, float32)
        shift = cuda.local.array(2, float32)
        part = cuda.local.array(2, float32)
        peak = cuda.local.array(2, float32)
        done_largest = cuda.local.array(2, float32)
        done_total = cuda.local.array(2, float32)
        all_largest = cuda.local.array(2, float32)
        all_total = cuda.local.array(2, float32)
        set_to_zero(score, o, p)
        online, totals = (peak, largest, alpha, shift), (all_largest, all_total)
        q_matrix, k_matrices, v_matrices = matrices_of(base, group)
        own_place = base + uint32(totals_at) + uint32((thread >> 5) * own_totals)
        totals_place = own_place + uint32(lane * 16)
        # Of tiles that this warpgroup is done with, of earlier queries and these; the parity of queries.
        done, q_parity = uint32(0), uint32(0)
        if group == 1:
            give_turn(group)
        wait(base + uint32(q_full), q_parity)
        told = base + uint32(entry_at)
        token, count, position, head = entry(told)
        while count > 0:
            low, limit = earliest(position, window, 0), int32(position + count)
            if divided:
                words = ptx.ld_shared_v4(told + uint32(16))
                low, limit = int32(words[0]), int32(words[1])
            tile, last_tile = int32(low >> 7), int32(int32(limit - 1) >> 7)
            begin_sums(largest, total)
            begin_sums(all_largest, all_total)
            kept, ended, fresh = False, False, uint32(0)
            first_scores(score, base, (q_matrix, k_matrices, v_matrices), done, tile == last_tile, group, lane)
            first = int32(tile * TILE)
            if not sees_all(first, position, group, window):
                mask(score, int32(position + row), first, window, int32(count - row), column, 0, 16)
            find_maxima(score, online, factor)
            weigh(score, part, total, alpha, shift, factor, 0)
            weigh(score, part, total, alpha, shift, factor, 1)
            pack(p, score)
            if first < low:
                await_stage(base + uint32(v_full), done)
                clear(base + uint32(v_at), done, first, low, limit, int32(thread & 127), group)
            tile += int32(1)
            keys_there = peek(base + uint32(k_full), done + uint32(1))
            values_there = peek(base + uint32(v_full), done)
            while tile <= last_tile:
                # The product with these keys, and that of the last weights with the values before.
                following = done + uint32(1)
                if not keys_there:
                    await_stage(base + uint32(k_full), following)
                if not values_there:
                    await_stage(base + uint32(v_full), done)
                first = int32(tile * TILE)
                take_turn(group)
                keep_score(score)
                keep_o(o)
                keep_p(p)
                ptx.wgmma_fence()
                # Anew each time: else the compiler keeps the descriptors of all steps in registers.
                q_matrix = ptx.shfl_sync_idx_u32(ptx.FULL_MASK, q_matrix, uint32(0))
                multiply_keys(score, q_matrix, k_matrices, following)
                give_turn(group)
                multiply_values(o, p, v_matrices, done, fresh)
                keys_there = peek(base + uint32(k_full), following + uint32(1))
                values_there = peek(base + uint32(v_full), following)
                masked = not sees_all(first, position, group, window)
                one_unfinished()
                keep_score(score)
                release(base + uint32(k_used), following, lane)
                release_queries(base, tile == last_tile, lane)
                if masked:
                    mask(score, int32(position + row), first, window, int32(count - row), column, 0, 16)
                # With this tile another segment begins: O is about to be complete for the one before.
                ended = tile % TILES == 0
                if ended:
                    for h in range(2):
                        done_largest[h], done_total[h] = largest[h], total[h]
                    begin_sums(largest, total)
                find_maxima(score, online, factor)
                weigh(score, part, total, alpha, shift, factor, 0)
                computed(total, base + uint32(spare_at))
                none_unfinished()
                keep_o(o)
                keep_p(p)
                release(base + uint32(v_used), done, lane)
                fresh = uint32(0) if ended else uint32(1)
                if ended:
                    combine_segment(o, (done_largest, done_total), totals, kept, factor, totals_place)
                    put_total(o, totals_place)
                    kept = True
                # The other row's exponentials leave room for the arithmetic beside them. (Where O begins anew, what it
                # is multiplied with does not matter.)
                weigh(score, part, total, alpha, shift, factor, 1)
                rescale(o, alpha)
                pack(p, score)
                done = following
                tile += int32(1)
            await_stage(base + uint32(v_full), done)
            clear(base + uint32(v_at), done, int32(last_tile * TILE), low, limit, int32(thread & 127), group)
            last_values(o, p, base, v_matrices, done, fresh, lane)
            done += uint32(1)
            combine_segment(o, (largest, total), totals, kept, factor, totals_place)
            warp_row, complete = int32(row & ~15), True
            if divided:
                complete, token, count, position, head = combine_partials(
                    o, totals, told, workspace, warp_row, window, factor, lane
                )
            if complete:
                place = int64(token) * out_stride + head * head_dim
                write(out, o, all_total, place, out_stride, warp_row, count, own_place, lane)
            q_parity ^= uint32(1)
            wait(base + uint32(q_full), q_parity)
            told = base + uint32(entry_at) + uint32(entry_stride) * q_parity
            token, count, position, head = entry(told)

    return consume
