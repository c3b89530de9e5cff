"""Attention, version prefill: flash attention of many tokens of a sequence at a time, over the KV cache.

A block works on a tile of queries of one head, which stay, and walks over the keys and values that any of them sees in
tiles of 128 positions. One warp copies, the others multiply:

    multiply "wgmma"    sm_90a: bulk copies by tensor maps; warpgroups of 64 queries, the product with the next keys
                        under way while the last scores become weights. Blocks stay and take one tile after another.
                        Where that leaves most of the GPU idle, as few queries after a long history do, a tile's
                        segments are work for several blocks, and the last one of them combines.
    multiply "mma"      sm_80 and later: cp.async, ldmatrix and mma.sync; warps of 16 queries, a tile a block. A quarter
                        of a tile's scores become weights beside the product of the quarter before with values.

Order of operations: that of `kernels.attention.flash`, so that a token's result has the same bits whichever computes
it. A tile of positions that a query does not see at all is an identity here (weights 0, alpha 1), and so is a segment
(factors 1 and 0); what may differ between the queries of a tile is no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels import check, ptx
from kernels.architectures import LIMITS, has_dependent_launch
from kernels.attention.flash import SEGMENT, TILE
from kernels.cuda import SIMULATED, cuda, device_function, float32, int32, int64, uint8, uint32, uint64
from kernels.device import HALVES, LEAST, LEAST_DIVISOR, MOST, MOST_DIVISOR, quotient
from kernels.launch import Kernel, LaunchOptions, kernel_factory, machine_of
from kernels.rope_write import cache_of
from kernels.tensor_maps import kept_tensor_map

TILES = SEGMENT // TILE  # of positions, of a segment
# fp32 elements of partial results at most: 64 MiB.
PARTIALS = 1 << 24
HALF = TILE // 2
# Bytes of keys and values that the blocks at work at a time should share: of an L2 of 50 MB.
SHARED_KEYS = 24 << 20


@dataclass(frozen=True)
class Tiling:
    """How a block works. rows: queries of a tile, 64 a warpgroup ("wgmma") or 16 a warp ("mma") that multiplies.
    stages: that there is room for: "wgmma": tiles of keys, and as many of values; "mma": parts of `part` positions, a
    half or all of a tile's keys or values, a power of two."""

    multiply: str
    rows: int
    stages: int
    part: int = TILE

    @property
    def name(self) -> str:
        return f"{self.multiply}_r{self.rows}_s{self.stages}" + (f"_p{self.part}" if self.multiply == "mma" else "")

    @property
    def threads(self) -> int:
        """ "wgmma": with a warpgroup that copies: what registers it does not need the others get."""
        return 2 * self.rows + (128 if self.multiply == "wgmma" else 0)

    def shared(self, head_dim: int) -> int:
        """Bytes of a block: ring, running totals of the queries, barriers, from a multiple of 1024 ("wgmma",
        and with the queries) or 256 on."""
        row = 2 * head_dim
        totals = self.rows * 2 * row
        if self.multiply == "wgmma":
            return 1024 + self.rows * row + 2 * self.stages * TILE * row + totals + 192
        return 256 + self.stages * self.part * row + totals + 16 * self.stages

    @staticmethod
    def choose(head_dim: int, arch: str) -> Tiling:
        """For heads of `head_dim` elements on an architecture."""
        if arch == "sm_90a":
            return Tiling("wgmma", 128, 2)
        return Tiling.of_warps(head_dim, arch)

    @staticmethod
    def of_warps(head_dim: int, arch: str) -> Tiling:
        """The way of every architecture: with room for the next tile beside this one, else for this, else for half."""
        tilings = [Tiling("mma", 128, stages, part) for stages, part in ((4, TILE), (2, TILE), (2, HALF))]
        return next(tiling for tiling in tilings if tiling.shared(head_dim) <= LIMITS[arch].shared_block)


class Plan(NamedTuple):
    """What `plan` makes.

    work: i32 [1 + n, 8] on the device: two counters, 0 between launches, how many of the entries are in use, and five
    unused; then of each entry the tile of queries, by its first one's token, how many they are, the first one's
    position and the slot; the positions it is to look at, the first and the one after the last; the number of its
    tile's first partial result, -1 where there are none; and that of the tile.
    tiles: of queries. rows: of a tile at most. positions: that the sequences' last tokens see, together.
    partials: f32, of each segment and 16 rows of a tile, for each head: O, m and l as the warp's lanes hold them; and
    arrived: i32, 0 between launches: how many segments of the rows are there. Both empty where no tile is divided.
    """

    work: torch.Tensor
    tiles: int
    rows: int
    positions: int
    partials: torch.Tensor
    arrived: torch.Tensor


# --- parts of both ---------------------------------------------------------------------------------------------------
# A thread's registers: of a tile's scores and of O columns 8 i + 2 c and the next of the rows q and q + 8, where q is
# lane / 4 and c lane % 4: rows h = 0, 1 at [4 i + 2 h], [4 i + 2 h + 1].


@device_function
def _tile_of(work, entry):
    """First token, count, first position and slot of an entry's tile of queries."""
    words = ptx.ld_global_v4(work, (entry + 1) * 8)
    return int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])


@device_function
def _earliest(position, window, begin):
    """The first position from `begin` on that the token at `position` sees."""
    if window > 0:
        return max(int32(begin), int32(position - window + 1))
    return int32(begin)


@device_function
def _mask(score, position, first, window, count, column, begin, end):
    """-inf for what rows do not see of the positions 8 begin … 8 end - 1 of the tile that begins at position `first`.

    position: of row h = 0. count: rows from there on; later ones are taken as the last.
    """
    for h in range(2):
        high = int32(position + min(int32(8 * h), count - int32(1)) - first - column)
        for i in range(begin, end):
            for e in range(2):
                if int32(8 * i + e) > high:
                    score[4 * i + 2 * h + e] = float32(-math.inf)
        if window > 0:
            low = int32(high - window + int32(1))
            for i in range(begin, end):
                for e in range(2):
                    if int32(8 * i + e) < low:
                        score[4 * i + 2 * h + e] = float32(-math.inf)


@device_function
def _peak_eight(score, peak, h, i):
    """A row's largest so far goes on by its scores of the positions 8 i …."""
    peak[h] = ptx.max_f32(peak[h], ptx.max_f32(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]))


@device_function
def _peak(score, peak, begin, h):
    """A row's largest so far goes on by its scores from the positions 32 begin … of a tile on."""
    for g in range(begin, 4):
        most = ptx.max_f32(score[16 * g + 2 * h], score[16 * g + 2 * h + 1])
        for i in range(4 * g + 1, 4 * g + 4):
            most = ptx.max_f32(most, ptx.max_f32(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]))
        peak[h] = ptx.max_f32(peak[h], most)


@device_function
def _turn_to(peak, largest, alpha, shift, factor, h):
    """A row's largest becomes that of its four lanes; alpha is what O and total are to be multiplied with, and score
    times factor plus shift are the exponents of the tile's weights."""
    value = ptx.max_f32(peak[h], ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, peak[h], uint32(1)))
    value = ptx.max_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))
    # Where a row has seen nothing yet, any number but -inf makes its weights 0.
    pivot = value if value > float32(-math.inf) else float32(0.0)
    alpha[h] = _power(largest[h], pivot, factor)
    largest[h] = value
    shift[h] = -ptx.mul_rn_f32(pivot, factor)


@device_function
def _weigh_eight(score, part, shift, factor, h, i):
    """A row's scores of the positions 8 i … become weights; part, the sum of 32 positions', goes on by them."""
    c = 4 * i + 2 * h
    first = ptx.ex2_approx_f32(ptx.fma_rn_f32(score[c], factor, shift[h]))
    second = ptx.ex2_approx_f32(ptx.fma_rn_f32(score[c + 1], factor, shift[h]))
    score[c], score[c + 1] = first, second
    part[h] = ptx.add_rn_f32(first if i % 4 == 0 else ptx.add_rn_f32(part[h], first), second)


@device_function
def _weigh(score, part, total, alpha, shift, factor, h):
    """A row's scores of a tile become weights, and its total goes on."""
    added = float32(0.0)
    for g in range(4):
        for i in range(4 * g, 4 * g + 4):
            _weigh_eight(score, part, shift, factor, h, i)
        added = part[h] if g == 0 else ptx.add_rn_f32(added, part[h])
    total[h] = ptx.fma_rn_f32(total[h], alpha[h], added)


def _packer(dtype: str):
    rounded_pair = HALVES[dtype].pack

    @device_function
    def pack(p, score):
        """Weights as the operand of 16 rows: registers 4 s … of positions 16 s …."""
        for i in range(TILE // 4):
            p[i] = rounded_pair(score[2 * i + 1], score[2 * i])

    return pack


@device_function
def _power(largest, pivot, factor):
    """2 ** ((largest - pivot) * factor)."""
    return ptx.ex2_approx_f32(ptx.mul_rn_f32(ptx.add_rn_f32(largest, -pivot), factor))


@device_function
def _row_sum(value):
    """(l_0 + l_1) + (l_2 + l_3) of the four lanes of a row."""
    value = ptx.add_rn_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(1)))
    return ptx.add_rn_f32(value, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, value, uint32(2)))


@device_function
def _join(all_largest, largest, old, new, factor, h):
    """Row h's largest of a segment becomes that of the segments up to it; old and new are what O and l so far and the
    segment's are to be multiplied with."""
    value = ptx.max_f32(all_largest[h], largest)
    pivot = value if value > float32(-math.inf) else float32(0.0)
    old[h], new[h] = _power(all_largest[h], pivot, factor), _power(largest, pivot, factor)
    all_largest[h] = value


def _totals(words: int, stride: int):
    """Functions that keep the running total of a thread's `words` elements of O in shared memory, 16 bytes at `at` and
    the next ones `stride` bytes on."""

    @device_function
    def keep(o, at):
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
            _join(all_largest, largest[h], old, new, factor, h)
            all_total[h] = ptx.fma_rn_f32(all_total[h], old[h], ptx.mul_rn_f32(_row_sum(total[h]), new[h]))
        for i in range(words // 4):
            held = ptx.ld_shared_v4(at + uint32(i * stride))
            for e in range(4):
                added = ptx.mul_rn_f32(o[4 * i + e], new[e // 2])
                o[4 * i + e] = ptx.fma_rn_f32(ptx.f32_from_bits(held[e]), old[e // 2], added)

    return keep, combine


def _divider(dtype: str, head_dim: int):
    """Whether `quotient` serves all elements of a row of O; and its elements over l, a pair at a time, by `quotient` or
    by division."""
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


def _writer(dtype: str, head_dim: int):
    divides, by_reciprocal, by_division = _divider(dtype, head_dim)
    # Rows lie apart so that no two accesses of a warp meet in a bank.
    pitch, chunks = 2 * head_dim + 16, head_dim // 8
    together = 32 // chunks  # rows that the warp writes at a time

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
        for i in range(16 // together):
            here = int32(row + i * together)
            if first + here < count:
                v = ptx.ld_shared_v4(staged + uint32(here * pitch + chunk * 16))
                ptx.st_global_v4(out, place + int64(first + here) * stride + chunk * 8, v[0], v[1], v[2], v[3])
        ptx.bar_warp_sync()

    return write


# --- mma.sync --------------------------------------------------------------------------------------------------------


@kernel_factory
def warps(dtype: str, head_dim: int, paged: bool, tiling: Tiling, arch: str) -> Kernel:
    """q, k_cache, v_cache, work, table, out, Hq / Hk, pages of a slot, log2 of a page, strides of the cache (slot or
    page, head), of q and of out, factor, window; grid (heads that go together, tiles of queries, the rest).

    dtype: "bf16" or "f16". paged: whether the cache is.
    """
    workers, threads, stages, part_rows = tiling.rows // 16, tiling.threads, tiling.stages, tiling.part
    parts = 2 * TILE // part_rows  # of a tile: its keys, then its values
    last_stage, stage_bits = stages - 1, stages.bit_length() - 1  # stages are a power of two
    ahead = stages // 2  # parts that are on their way while one is worked on
    halves = part_rows == HALF
    row_bytes, chunks = 2 * head_dim, head_dim // 8  # 16-byte chunks of a row
    stage_bytes = part_rows * row_bytes
    steps, columns = head_dim // 16, head_dim // 8
    copied_rows = threads // chunks  # that the block copies at a time
    totals_at = stages * stage_bytes
    full_at = totals_at + head_dim // 8 * threads * 16
    empty_at = full_at + 8 * stages
    score_words, o_words, q_words = TILE // 2, head_dim // 2, head_dim // 4
    keep_total, combine = _totals(o_words, 512)
    own_totals = o_words * 128  # bytes of a warp
    write, rounded_pair = _writer(dtype, head_dim), HALVES[dtype].pack
    mma, all_landed = HALVES[dtype].mma, ptx.cp_async_wait_group(0)
    waits = ptx.mbarrier_try_wait if has_dependent_launch(arch) else ptx.mbarrier_test_wait

    # Parts are numbered from the block's first one on; turn counts tiles.
    @device_function
    def place_of(half, turn):
        """Where in the ring half a tile's keys are (0, 1) or its values (2, 3)."""
        number = turn * parts + half * HALF // part_rows
        return uint32((number & last_stage) * stage_bytes) + uint32(half * HALF % part_rows * row_bytes)

    @device_function
    def wait(barrier, number, before):
        """For the stage of a part, or with `before` for that of the part ahead of it in the same place."""
        parity = uint32(number >> stage_bits & 1 ^ before)
        while waits(barrier + uint32(8 * (number & last_stage)), parity) == 0:
            pass

    @device_function
    def release(ring, number, lane):
        ptx.bar_warp_sync()
        if lane == 0:
            ptx.mbarrier_arrive(ring + uint32(empty_at) + uint32(8 * (number & last_stage)))

    def copier(checked):
        @device_function
        def copy_part(place, first, begin, end, cache, base, table, table_row, page_bits, slot_stride, thread):
            """Start copying the positions from `first` on; with `checked` rows outside begin … end - 1 become 0."""
            chunk, row = thread % chunks, thread // chunks
            at = base + chunk * 8 + (first + row) * head_dim
            place += uint32(row * row_bytes)
            for i in range(part_rows // copied_rows):
                here = int32(row + i * copied_rows)
                to = place + uint32((chunk ^ (here & 7)) * 16) + uint32(i * copied_rows * row_bytes)
                size = uint32(16)
                if checked:
                    size = uint32(16) if begin <= here < end else uint32(0)
                if paged:
                    position = int32(first + here)
                    page = int64(0)
                    if not checked or begin <= here < end:
                        page = int64(table[int32(table_row + (position >> page_bits))])
                    within = position & ((int64(1) << page_bits) - 1)
                    ptx.cp_async_cg_16_zfill(to, cache, base + chunk * 8 + page * slot_stride + within * head_dim, size)
                else:
                    ptx.cp_async_cg_16_zfill(to, cache, at + i * copied_rows * head_dim, size)

        return copy_part

    copy_checked, copy_whole = copier(True), copier(False)

    @device_function
    def copy(
        part, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits, slot_stride, ring, thread
    ):
        """Start copying a part of a tile once its stage is free; rows outside low … limit - 1 become 0."""
        number = int32(turn * parts + part)
        wait(ring + uint32(empty_at), number, 1)
        cache = k_cache if part < parts // 2 else v_cache
        first = int32(tile * TILE + part * part_rows % TILE)
        place = ring + uint32((number & last_stage) * stage_bytes)
        if first >= low and first + part_rows <= limit:
            copy_whole(place, first, 0, 0, cache, base, table, table_row, page_bits, slot_stride, thread)
        else:
            begin, end = int32(low - first), int32(limit - first)
            copy_checked(place, first, begin, end, cache, base, table, table_row, page_bits, slot_stride, thread)
        ptx.cp_async_mbarrier_arrive(ring + uint32(full_at) + uint32(8 * (number & last_stage)))

    @device_function
    def copy_ahead(
        part, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits, slot_stride, ring, thread
    ):
        """Start copying the part that lies `ahead` of this one."""
        following = (part + ahead) // parts
        if int32((tile + following) * TILE) < limit:
            copy(
                (part + ahead) % parts, turn + following, tile + following, low, limit, k_cache, v_cache, base, table,
                table_row, page_bits, slot_stride, ring, thread,
            )  # fmt: skip

    # The steps are written out: as loops they are too long for the compiler to unroll.
    @device_function
    def multiply_keys(score, peak, queries, at, half, beside):
        """at: where the lane's row of the half's first matrices begins. beside: go on with the rows' largest meanwhile,
        by the first half's scores."""
        two_key_steps(score, peak, queries, at, half, beside, 0)
        two_key_steps(score, peak, queries, at, half, beside, 1)
        if steps > 4:
            two_key_steps(score, peak, queries, at, half, beside, 2)
            two_key_steps(score, peak, queries, at, half, beside, 3)

    @device_function
    def two_key_steps(score, peak, queries, at, half, beside, s):
        b = cuda.local.array(16, uint32)
        for k in range(2):
            for i in range(4):
                got = ptx.ldmatrix_x4((at ^ uint32(64 * s + 32 * k)) + uint32(i * 16 * row_bytes))
                for e in range(4):
                    b[4 * i + e] = got[e]
            a = 4 * (2 * s + k)
            for i in range(8):  # sums that do not wait for each other
                c = 4 * (half * 8 + i)
                d4 = mma(
                    queries[a], queries[a + 1], queries[a + 2], queries[a + 3], b[2 * i], b[2 * i + 1],
                    score[c], score[c + 1], score[c + 2], score[c + 3],
                )  # fmt: skip
                for e in range(4):
                    score[c + e] = d4[e]
            if beside:
                for i in range(8 // steps):
                    for h in range(2):
                        _peak_eight(score, peak, h, (2 * s + k) * (8 // steps) + i)

    @device_function
    def value_step(o, score, sums, alpha, shift, factor, at, s, following):
        """O goes on by 16 positions, whose weights are there; half of the 32 positions `following`, where that is not
        0, are weighed, for which there is room between the products. With the first step O is multiplied with alpha."""
        p = cuda.local.array(4, uint32)
        for i in range(4):
            p[i] = rounded_pair(score[8 * s + 2 * i + 1], score[8 * s + 2 * i])
        some_values(o, p, alpha, at, s, 0)
        if columns > 8:
            some_values(o, p, alpha, at, s, 2)
        if following:
            first = 4 * following + s % 2 * 2
            _weigh_eight(score, sums, shift, factor, 0, first)
            _weigh_eight(score, sums, shift, factor, 1, first)
            _weigh_eight(score, sums, shift, factor, 0, first + 1)
            _weigh_eight(score, sums, shift, factor, 1, first + 1)

    @device_function
    def some_values(o, p, alpha, at, s, begin):
        """value_step, of the 64 columns from 32 * begin on: in one loop O would be in memory, on some architectures."""
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
    def two_value_steps(o, score, sums, added, alpha, shift, factor, at, g):
        """O goes on by 32 positions and `added` by the weights of the 32 after them."""
        following = (g + 1) % 4
        value_step(o, score, sums, alpha, shift, factor, at, 2 * g, following)
        value_step(o, score, sums, alpha, shift, factor, at, 2 * g + 1, following)
        if following:
            for h in range(2):
                added[h] = ptx.add_rn_f32(added[h], sums[h])

    def attention(
        q, k_cache, v_cache, work, table, out, group, pages, page_bits, slot_stride, head_stride, q_stride, out_stride,
        factor, window,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(0, uint8)
        ring = (ptx.shared_address(memory) + uint32(255)) & uint32(0xFFFFFF00)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        ptx.griddepcontrol_wait()
        # Some heads take all tiles, then the next ones do: their keys and values stay in L2 meanwhile.
        head = int32(cuda.blockIdx.z * cuda.gridDim.x + cuda.blockIdx.x)
        token, count, position, slot = _tile_of(work, int64(cuda.blockIdx.y))
        if thread == 0:
            for s in range(stages):
                ptx.mbarrier_init(ring + uint32(full_at + 8 * s), uint32(threads))
                ptx.mbarrier_init(ring + uint32(empty_at + 8 * s), uint32(workers))
        cuda.syncthreads()
        low, limit = _earliest(position, window, 0), int32(position + count)
        tile = int32(low >> 7)
        turn = int32(0)
        table_row = int32(slot * pages)
        base = int32(head // group) * head_stride
        if not paged:
            base += int64(slot) * slot_stride
        # The warp's queries come by way of the place of its totals.
        own_place = ring + uint32(totals_at) + uint32(warp * own_totals)
        for i in range(chunks // 2):
            here, chunk = int32((lane + 32 * i) // chunks), int32(lane % chunks)
            from_row = q_stride * (token + min(int32(warp * 16 + here), count - 1)) + head * head_dim
            to = own_place + uint32(here * row_bytes + (chunk ^ (here & 7)) * 16)
            ptx.cp_async_cg_16(to, q, from_row + chunk * 8)
        ptx.cp_async_commit_group()
        for part in range(ahead):
            copy(
                part, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits, slot_stride, ring,
                thread,
            )  # fmt: skip

        r8, matrix, column = int32(lane & 7), int32(lane >> 3), int32((lane & 3) * 2)
        k_at = ring + uint32((r8 + (matrix >> 1) * 8) * row_bytes + ((matrix & 1) ^ r8) * 16)
        lane_at = uint32((r8 + (matrix & 1) * 8) * row_bytes + ((matrix >> 1) ^ r8) * 16)
        v_at, q_at = ring + lane_at, own_place + lane_at
        row = int32(warp * 16 + (lane >> 2))
        queries = cuda.local.array(q_words, uint32)
        score = cuda.local.array(score_words, float32)
        o = cuda.local.array(o_words, float32)
        largest = cuda.local.array(2, float32)
        total = cuda.local.array(2, float32)
        alpha = cuda.local.array(2, float32)
        shift = cuda.local.array(2, float32)
        peak = cuda.local.array(2, float32)
        sums = cuda.local.array(2, float32)
        added = cuda.local.array(2, float32)
        all_largest = cuda.local.array(2, float32)
        all_total = cuda.local.array(2, float32)
        for h in range(2):
            largest[h], total[h] = float32(-math.inf), float32(0.0)
            all_largest[h], all_total[h] = float32(-math.inf), float32(0.0)
        for i in range(o_words):
            o[i] = float32(0.0)
        totals = own_place + uint32(lane * 16)
        kept = False
        all_landed()
        ptx.bar_warp_sync()
        for s in range(steps):
            got = ptx.ldmatrix_x4(q_at ^ uint32(32 * s))
            for e in range(4):
                queries[4 * s + e] = got[e]
        # Of the warp's rows the first one's position, and what any of them sees: nothing, where there are none.
        own = int32(position + warp * 16)
        seen_end = int32(own + 16) if int32(warp * 16) < count else int32(0)
        seen = int32(max(own - window + 1, 0)) if window > 0 else int32(0)
        while int32(tile * TILE) < limit:
            # The tile's second half, where no row of the warp sees it, is waited for and no more.
            first, middle, end = int32(tile * TILE), int32(tile * TILE + HALF), int32(tile * TILE + TILE)
            for i in range(score_words):
                score[i] = float32(0.0)
            # A copy waits until all warps have left what it overwrites: mostly they have by the middle of a whole part.
            number = int32(turn * parts)
            if halves:
                copy_ahead(0, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits,
                           slot_stride, ring, thread)  # fmt: skip
            wait(ring + uint32(full_at), number, 0)
            if first < seen_end and middle > seen:
                multiply_keys(score, peak, queries, k_at + place_of(0, turn), 0, False)
            if halves:
                release(ring, number, lane)
                copy_ahead(1, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits,
                           slot_stride, ring, thread)  # fmt: skip
                wait(ring + uint32(full_at), int32(number + 1), 0)
            else:
                copy_ahead(0, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits,
                           slot_stride, ring, thread)  # fmt: skip
            for h in range(2):
                peak[h] = largest[h]
            if end > own + 1 or (window > 0 and first < own + 16 - window):
                if middle < seen_end and end > seen:
                    multiply_keys(score, peak, queries, k_at + place_of(1, turn), 1, False)
                if middle > own + 1 or window > 0:
                    _mask(score, int32(position + row), first, window, int32(count - row), column, 0, 8)
                _mask(score, int32(position + row), first, window, int32(count - row), column, 8, 16)
                for h in range(2):
                    for i in range(8):
                        _peak_eight(score, peak, h, i)
            else:
                multiply_keys(score, peak, queries, k_at + place_of(1, turn), 1, True)
            release(ring, int32(number + parts // 2 - 1), lane)
            for h in range(2):
                _peak(score, peak, 2, h)
                _turn_to(peak, largest, alpha, shift, factor, h)
            for i in range(4):
                for h in range(2):
                    _weigh_eight(score, sums, shift, factor, h, i)
            for h in range(2):
                added[h] = sums[h]
            number += int32(parts // 2)
            if halves:
                copy_ahead(2, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits,
                           slot_stride, ring, thread)  # fmt: skip
            wait(ring + uint32(full_at), number, 0)
            two_value_steps(o, score, sums, added, alpha, shift, factor, v_at + place_of(2, turn), 0)
            two_value_steps(o, score, sums, added, alpha, shift, factor, v_at + place_of(2, turn), 1)
            if halves:
                release(ring, number, lane)
                copy_ahead(3, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits,
                           slot_stride, ring, thread)  # fmt: skip
                number += int32(1)
                wait(ring + uint32(full_at), number, 0)
            else:
                copy_ahead(1, turn, tile, low, limit, k_cache, v_cache, base, table, table_row, page_bits,
                           slot_stride, ring, thread)  # fmt: skip
            if middle < seen_end and end > seen:
                two_value_steps(o, score, sums, added, alpha, shift, factor, v_at + place_of(3, turn), 2)
                two_value_steps(o, score, sums, added, alpha, shift, factor, v_at + place_of(3, turn), 3)
            release(ring, number, lane)
            for h in range(2):
                total[h] = ptx.fma_rn_f32(total[h], alpha[h], added[h])
            tile += int32(1)
            turn += int32(1)
            more = int32(tile * TILE) < limit
            if not more or tile % TILES == 0:
                if kept:
                    combine(o, largest, total, all_largest, all_total, factor, totals)
                else:
                    for h in range(2):
                        all_largest[h], all_total[h] = largest[h], _row_sum(total[h])
                if more:
                    keep_total(o, totals)
                    kept = True
                    for i in range(o_words):
                        o[i] = float32(0.0)
                    for h in range(2):
                        largest[h], total[h] = float32(-math.inf), float32(0.0)
        place = int64(token) * out_stride + head * head_dim
        write(out, o, all_total, place, out_stride, int32(warp * 16), count, own_place, lane)

    name = f"attention_prefill_{tiling.name}_{'paged_' if paged else ''}d{head_dim}{HALVES[dtype].suffix}_{arch}"
    kinds = (*(f"{dtype}*",) * 3, "i32*", "i32*", f"{dtype}*", *("i32",) * 3, *("i64",) * 4, "f32", "i32")
    return Kernel(
        name, attention, kinds, threads, dynamic_shared=tiling.shared(head_dim), blocks_per_sm=256 // threads,
        options=LaunchOptions(programmatic=True),
        architectures=(arch,),
    )  # fmt: skip


# --- wgmma -----------------------------------------------------------------------------------------------------------


@kernel_factory
def warpgroups(dtype: str, head_dim: int, tiling: Tiling, divided: bool) -> Kernel:
    """Tensor maps of q [T, Hq D] (boxes of `rows` rows), k_cache and v_cache [S or P, Hk, C or page, D] (boxes of a
    tile or page); work, table, out, partials, arrived, entries, Hq, Hq / Hk, heads that go together, pages of a
    slot (0: not paged), log2 of a page, stride of out, factor, window; grid (blocks,): at most entries times Hq.

    dtype: "bf16" or "f16". divided: whether an entry may be a segment of a tile and fewer entries may be in use; what
    that takes costs whole tiles 5 %.
    """
    groups, rows, stages = tiling.rows // 64, tiling.rows, tiling.stages
    boxes = head_dim // 64  # of 64 columns
    box_bytes = TILE * 128
    q_bytes, tile_bytes = boxes * rows * 128, boxes * box_bytes
    workers = 128 * groups
    k_at, v_at = q_bytes, q_bytes + stages * tile_bytes
    totals_at = v_at + stages * tile_bytes
    barriers_at = totals_at + head_dim // 8 * workers * 16
    # Barriers: queries, keys and values there; queries, keys and values used up. Behind them the entry worked on and,
    # with `divided`, the next one.
    q_full, k_full, v_full = barriers_at, barriers_at + 8, barriers_at + 8 + 8 * stages
    used = 8 + 16 * stages
    q_used, k_used, v_used = q_full + used, k_full + used, v_full + used
    entry_at = barriers_at + -(-2 * used // 16) * 16
    entry_stride = 32 if divided else 0
    spare_at = entry_at + 64
    score_words, o_words, p_words = TILE // 2, head_dim // 2, TILE // 4
    steps = head_dim // 16
    keep_total, combine = _totals(o_words, 512)
    own_totals = o_words * 128  # bytes of a warp
    record = _record(head_dim)
    write, pack = _writer(dtype, head_dim), _packer(dtype)
    by_keys = HALVES[dtype].wgmma(TILE)
    by_values = HALVES[dtype].wgmma(head_dim, "registers", "n")
    keep_score, keep_o, keep_p = ptx.keep_f32(score_words), ptx.keep_f32(o_words), ptx.keep_u32(p_words)
    one_unfinished, none_unfinished = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)
    give_registers, take_registers = ptx.setmaxnreg_dec(24), ptx.setmaxnreg_inc(240)

    @device_function
    def wait(barrier, parity):
        while ptx.mbarrier_try_wait(barrier, parity) == 0:
            pass

    @device_function
    def await_stage(barriers, tile):
        """For the tile of this number, of all that the block works on."""
        wait(barriers + uint32(8) * (tile % uint32(stages)), tile // uint32(stages) & uint32(1))

    @device_function
    def peek(barriers, tile):
        """Whether the tile of this number is there."""
        parity = tile // uint32(stages) & uint32(1)
        return ptx.mbarrier_test(barriers + uint32(8) * (tile % uint32(stages)), parity) != 0

    @device_function
    def release(barriers, tile, lane):
        if lane == 0:
            ptx.mbarrier_arrive(barriers + uint32(8) * (tile % uint32(stages)))

    @device_function
    def release_queries(base, last, lane):
        """With the product with the last keys the queries are used up: the next ones arrive while these are weighed."""
        if last and lane == 0:
            ptx.mbarrier_arrive(base + uint32(q_used))

    @device_function
    def offset(matrix, tile):
        """The tile's of this number, from that of tile 0."""
        return uint32(matrix + uint32(tile % uint32(stages)) * uint32(tile_bytes >> 4))

    @device_function
    def copy(tensor_map, target, barrier, table, table_row, pages, page_bits, tile, low, limit, kv_head, slot, lane):
        """Start copying a tile: the lanes a page each, those beyond what is seen as zeros."""
        if lane == 0:
            ptx.mbarrier_arrive_expect_tx(barrier, uint32(tile_bytes))
        row, outer = int32(tile * TILE), slot
        if pages > 0:
            row += int32(lane << page_bits)
            outer = int32(-1)
            if low < row + (int32(1) << page_bits) and row < limit and lane < TILE >> page_bits:
                outer = table[table_row + (row >> page_bits)]
            row = int32(0)
        if lane < TILE >> page_bits:
            place = target + (uint32(lane) << uint32(page_bits + 7))
            for b in range(boxes):
                ptx.cp_async_bulk_tensor_4d(
                    place + uint32(b * box_bytes), tensor_map, 0, barrier, int32(b * 64), row, kv_head, outer,
                    uint64(ptx.EVICT_LAST),
                )  # fmt: skip

    @device_function
    def clear(v_tiles, tile, first, low, limit, thread, group):
        """Rows outside low … limit - 1 of the tile of values at position `first` become 0: a weight of 0 times what
        memory happens to hold need not be 0. Each warpgroup does so by itself."""
        if first < low or first + TILE > limit:
            v_tile = v_tiles + tile % uint32(stages) * uint32(tile_bytes)
            begin, end = int32(low - first), int32(limit - first)
            for i in range(8):
                row = int32(i * 16 + (thread >> 3))
                if row < begin or row >= end:
                    for b in range(boxes):
                        zero = uint32(0)
                        place = uint32(b * box_bytes + i * 2048) + uint32(thread * 16)
                        ptx.st_shared_v4(v_tile + place, zero, zero, zero, zero)
            ptx.fence_proxy_async_shared()
            ptx.bar_sync(uint32(3 + group), uint32(128))

    @device_function
    def descriptor(matrix, units):
        """Of the place that lies so many units of 16 bytes on from a matrix; `matrix` is its descriptor's lower half,
        of which alone a register is needed."""
        return ptx.wgmma_descriptor(uint32(0), uint32(0), uint32(1024)) | uint64(uint32(matrix + uint32(units)))

    @device_function
    def multiply_keys(score, q_matrix, k_matrix):
        for s in range(steps):
            along = s % 4 * 2
            by_keys(
                score, descriptor(q_matrix, s // 4 * rows * 8 + along),
                descriptor(k_matrix, s // 4 * box_bytes // 16 + along), uint32(0) if s == 0 else uint32(1),
            )  # fmt: skip
        ptx.wgmma_commit_group()

    @device_function
    def multiply_values(o, p, v_matrix, fresh):
        for s in range(TILE // 16):
            by_values(
                o, p[4 * s], p[4 * s + 1], p[4 * s + 2], p[4 * s + 3], descriptor(v_matrix, 128 * s),
                fresh if s == 0 else uint32(1),
            )  # fmt: skip
        ptx.wgmma_commit_group()

    # The two warpgroups issue their products in turn: one multiplies as the other weighs.
    @device_function
    def take_turn(group):
        ptx.bar_sync(uint32(1 + group), uint32(256))

    @device_function
    def give_turn(group):
        ptx.bar_arrive(uint32(2 - group), uint32(256))

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
    def pass_on(o, largest, total, all_largest, all_total, kept, factor, totals):
        """A segment is complete: the total goes on, and O begins anew."""
        if kept:
            combine(o, largest, total, all_largest, all_total, factor, totals)
        else:
            for h in range(2):
                all_largest[h], all_total[h] = largest[h], _row_sum(total[h])
        keep_total(o, totals)

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
            _join(all_largest, ptx.f32_from_bits(sums[h]), old, new, factor, h)
            added = ptx.mul_rn_f32(ptx.f32_from_bits(sums[2 + h]), new[h])
            all_total[h] = ptx.fma_rn_f32(all_total[h], old[h], added)
        for i in range(o_words // 4):
            part = ptx.ld_global_v4(partials, at + 128 * i)
            for e in range(4):
                added = ptx.mul_rn_f32(ptx.f32_from_bits(part[e]), new[e // 2])
                o[4 * i + e] = ptx.fma_rn_f32(o[4 * i + e], old[e // 2], added)

    def attention(
        q_map, k_map, v_map, work, table, out, partials, arrived, entries, heads, group_heads, together, pages,
        page_bits, out_stride, factor, window,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(0, uint8)
        base = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(1 + 2 * stages):
                ptx.mbarrier_init(base + uint32(q_full + 8 * i), uint32(1))
                ptx.mbarrier_init(base + uint32(q_used + 8 * i), uint32(4 * groups))
            ptx.fence_mbarrier_init()
        cuda.syncthreads()
        if thread >= workers:
            give_registers()
            if thread < workers + 32:
                lane = int32(thread - workers)
                item = int32(cuda.blockIdx.x)
                stage, parity, turn = uint32(0), uint32(1), uint32(1)
                ptx.griddepcontrol_wait()
                used_entries = int32(work[2]) if divided else int32(entries)
                items = int32(used_entries * heads)
                while item < items:
                    following = uint32(0)
                    if lane == 0:
                        following = ptx.atom_add_acq_rel_u32(work, 0, uint32(1)) + uint32(cuda.gridDim.x)
                    # Some heads take all tiles, then the next ones do: their keys and values stay in L2 meanwhile.
                    at_once = int32(used_entries * together)
                    head = int32(item // at_once * together + item % together)
                    entry = int64(item % at_once // together)
                    token, count, position, slot = _tile_of(work, entry)
                    low, limit = int32(0), int32(position + count)
                    if divided:
                        part = ptx.ld_global_v4(work, (entry + 1) * 8 + 4)
                        low, limit = int32(part[0]), int32(part[1])
                    low = _earliest(position, window, low)
                    if divided and low >= limit:
                        # A segment that no query of the tile sees through its window.
                        item = int32(ptx.shfl_sync_idx_u32(ptx.FULL_MASK, following, uint32(0)))
                        continue
                    wait(base + uint32(q_used), turn)
                    turn ^= uint32(1)
                    if lane == 0:
                        told = base + uint32(entry_at) + uint32(entry_stride) * turn
                        ptx.st_shared_v4(told, uint32(token), uint32(count), uint32(position), uint32(head))
                        if divided:
                            part = ptx.ld_global_v4(work, (entry + 1) * 8 + 4)  # again: there are few registers here
                            ptx.st_shared_v4(told + uint32(16), uint32(low), uint32(limit), part[2], part[3])
                        ptx.mbarrier_arrive_expect_tx(base + uint32(q_full), uint32(q_bytes))
                        for b in range(boxes):
                            ptx.cp_async_bulk_tensor_2d(
                                base + uint32(b * rows * 128), q_map, 0, base + uint32(q_full),
                                int32(head * head_dim + b * 64), token, uint64(ptx.EVICT_FIRST),
                            )  # fmt: skip
                    kv_head = int32(head // group_heads)
                    table_row = int32(slot * pages)
                    tile, last_tile = int32(low >> 7), int32(int32(limit - 1) >> 7)
                    while tile <= last_tile:
                        wait(base + uint32(k_used) + uint32(8) * stage, parity)
                        copy(
                            k_map, base + uint32(k_at) + stage * uint32(tile_bytes),
                            base + uint32(k_full) + uint32(8) * stage, table, table_row, pages, page_bits, tile, low,
                            limit, kv_head, slot, lane,
                        )  # fmt: skip
                        wait(base + uint32(v_used) + uint32(8) * stage, parity)
                        copy(
                            v_map, base + uint32(v_at) + stage * uint32(tile_bytes),
                            base + uint32(v_full) + uint32(8) * stage, table, table_row, pages, page_bits, tile, low,
                            limit, kv_head, slot, lane,
                        )  # fmt: skip
                        stage += uint32(1)
                        if stage == uint32(stages):
                            stage, parity = uint32(0), parity ^ uint32(1)
                        tile += int32(1)
                    item = int32(ptx.shfl_sync_idx_u32(ptx.FULL_MASK, following, uint32(0)))
                wait(base + uint32(q_used), turn)
                turn ^= uint32(1)
                if lane == 0:
                    # A tile of no queries: there is no more work.
                    told = base + uint32(entry_at) + uint32(entry_stride) * turn
                    ptx.st_shared_v4(told, uint32(0), uint32(0), uint32(0), uint32(0))
                    ptx.mbarrier_arrive(base + uint32(q_full))
                    if ptx.atom_add_acq_rel_u32(work, 1, uint32(1)) == uint32(cuda.gridDim.x) - uint32(1):
                        # Every block has drawn its last number.
                        work[0] = int32(0)
                        work[1] = int32(0)
        else:
            take_registers()
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
            for i in range(score_words):
                score[i] = float32(0.0)
            for i in range(o_words):
                o[i] = float32(0.0)
            for i in range(p_words):
                p[i] = uint32(0)
            q_matrix = uint32(ptx.wgmma_descriptor(base + uint32(group * 8192), uint32(16), uint32(1024)))
            k_matrices = uint32(ptx.wgmma_descriptor(base + uint32(k_at), uint32(16), uint32(1024)))
            v_matrices = uint32(ptx.wgmma_descriptor(base + uint32(v_at), uint32(box_bytes), uint32(1024)))
            own_place = base + uint32(totals_at) + uint32((thread >> 5) * own_totals)
            totals = own_place + uint32(lane * 16)
            # Of tiles that this warpgroup is done with, of earlier queries and these; then of queries.
            done, turn = uint32(0), uint32(0)
            if group == 1:
                give_turn(group)
            wait(base + uint32(q_full), turn)
            told = base + uint32(entry_at)
            words = ptx.ld_shared_v4(told)
            token, count, position, head = int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])
            while count > 0:
                low, limit = _earliest(position, window, 0), int32(position + count)
                if divided:
                    words = ptx.ld_shared_v4(told + uint32(16))
                    low, limit = int32(words[0]), int32(words[1])
                tile, last_tile = int32(low >> 7), int32(int32(limit - 1) >> 7)
                own = int32(position + group * 64)  # of the warpgroup's first query
                for h in range(2):
                    largest[h], total[h] = float32(-math.inf), float32(0.0)
                    all_largest[h], all_total[h] = float32(-math.inf), float32(0.0)
                kept, ended = False, False
                fresh = uint32(0)
                await_stage(base + uint32(k_full), done)
                take_turn(group)
                keep_score(score)
                ptx.wgmma_fence()
                multiply_keys(score, q_matrix, offset(k_matrices, done))
                give_turn(group)
                none_unfinished()
                keep_score(score)
                release(base + uint32(k_used), done, lane)
                release_queries(base, tile == last_tile, lane)
                first = int32(tile * TILE)
                if int32(first + TILE) > int32(own + 1) or (window > 0 and first < int32(own + 64 - window)):
                    _mask(score, int32(position + row), first, window, int32(count - row), column, 0, 16)
                for h in range(2):
                    peak[h] = largest[h]
                    _peak(score, peak, 0, h)
                    _turn_to(peak, largest, alpha, shift, factor, h)
                _weigh(score, part, total, alpha, shift, factor, 0)
                _weigh(score, part, total, alpha, shift, factor, 1)
                pack(p, score)
                if first < low:
                    await_stage(base + uint32(v_full), done)
                    clear(base + uint32(v_at), done, first, low, limit, int32(thread & 127), group)
                tile += int32(1)
                keys_there, values_there = (
                    peek(base + uint32(k_full), done + uint32(1)),
                    peek(base + uint32(v_full), done),
                )
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
                    multiply_keys(score, q_matrix, offset(k_matrices, following))
                    give_turn(group)
                    multiply_values(o, p, offset(v_matrices, done), fresh)
                    keys_there = peek(base + uint32(k_full), following + uint32(1))
                    values_there = peek(base + uint32(v_full), following)
                    masked = int32(first + TILE) > int32(own + 1) or (window > 0 and first < int32(own + 64 - window))
                    one_unfinished()
                    keep_score(score)
                    release(base + uint32(k_used), following, lane)
                    release_queries(base, tile == last_tile, lane)
                    if masked:
                        _mask(score, int32(position + row), first, window, int32(count - row), column, 0, 16)
                    # With this tile another segment begins: O is about to be complete for the one before.
                    ended = tile % TILES == 0
                    if ended:
                        for h in range(2):
                            done_largest[h], done_total[h] = largest[h], total[h]
                            largest[h], total[h] = float32(-math.inf), float32(0.0)
                    for h in range(2):
                        peak[h] = largest[h]
                        _peak(score, peak, 0, h)
                        _turn_to(peak, largest, alpha, shift, factor, h)
                    _weigh(score, part, total, alpha, shift, factor, 0)
                    computed(total, base + uint32(spare_at))
                    none_unfinished()
                    keep_o(o)
                    keep_p(p)
                    release(base + uint32(v_used), done, lane)
                    fresh = uint32(0) if ended else uint32(1)
                    if ended:
                        pass_on(o, done_largest, done_total, all_largest, all_total, kept, factor, totals)
                        kept = True
                    # The other row's exponentials leave room for the arithmetic beside them. (Where O begins anew, what
                    # it is multiplied with does not matter.)
                    _weigh(score, part, total, alpha, shift, factor, 1)
                    rescale(o, alpha)
                    pack(p, score)
                    done = following
                    tile += int32(1)
                await_stage(base + uint32(v_full), done)
                clear(base + uint32(v_at), done, int32(last_tile * TILE), low, limit, int32(thread & 127), group)
                keep_o(o)
                keep_p(p)
                ptx.wgmma_fence()
                multiply_values(o, p, offset(v_matrices, done), fresh)
                none_unfinished()
                keep_o(o)
                release(base + uint32(v_used), done, lane)
                done += uint32(1)
                if kept:
                    combine(o, largest, total, all_largest, all_total, factor, totals)
                else:
                    for h in range(2):
                        all_largest[h], all_total[h] = largest[h], _row_sum(total[h])
                warp_row, complete = int32(row & ~15), True
                if divided:
                    # Anew, so that no registers keep these meanwhile.
                    words = ptx.ld_shared_v4(told)
                    token, count, position, head = int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])
                    words = ptx.ld_shared_v4(told + uint32(16))
                    limit, number, tile_number = int32(words[1]), int32(words[2]), int32(words[3])
                    segment = int32(_earliest(position, window, 0) // SEGMENT)
                    last_segment = int32(int32(position + count - 1) // SEGMENT)
                    others = uint32(last_segment - segment)
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
                if complete:
                    place = int64(token) * out_stride + head * head_dim
                    write(out, o, all_total, place, out_stride, warp_row, count, own_place, lane)
                turn ^= uint32(1)
                wait(base + uint32(q_full), turn)
                told = base + uint32(entry_at) + uint32(entry_stride) * turn
                words = ptx.ld_shared_v4(told)
                token, count, position, head = int32(words[0]), int32(words[1]), int32(words[2]), int32(words[3])

    name = f"attention_prefill_{tiling.name}_{'divided_' if divided else ''}d{head_dim}{HALVES[dtype].suffix}"
    kinds = ("u8*", "u8*", "u8*", "i32*", "i32*", f"{dtype}*", "f32*", "i32*", *("i32",) * 6, "i64", "f32", "i32")
    return Kernel(
        name, attention, kinds, tiling.threads, dynamic_shared=tiling.shared(head_dim), blocks_per_sm=1,
        options=LaunchOptions(programmatic=True), architectures=("sm_90a",),
    )  # fmt: skip


# --- launch ----------------------------------------------------------------------------------------------------------


def catalogue(dtype: str, head_dims: Iterable[int] = (128,), paged: Iterable[bool] = (False, True)) -> list[Kernel]:
    """The kernels for heads of these dimensions, over a cache that is paged or not."""
    kernels = []
    for head_dim in head_dims:
        for arch in LIMITS:
            tiling = Tiling.choose(head_dim, arch)
            if tiling.multiply == "wgmma":
                kernels += [warpgroups(dtype, head_dim, tiling, divided) for divided in (False, True)]
            else:
                kernels += [warps(dtype, head_dim, each, tiling, arch) for each in paged]
    return kernels


def _choice(head_dim: int, index: int) -> tuple[Tiling, str, int]:
    """Tiling, architecture and multiprocessors of a device; the simulator's has few threads."""
    if SIMULATED:
        return Tiling("mma", 32, 2), "sm_80", 2
    arch, multiprocessors = machine_of(index)
    return Tiling.choose(head_dim, arch), arch, multiprocessors


def plan(
    runs: Iterable[tuple[int, int, int]],
    head_dim: int,
    device: torch.device,
    tiling: Tiling | None = None,
    into: Plan | None = None,
    heads: int = 0,
) -> Plan:
    """How `attention` divides a packed list of tokens: made once for all layers of a pass.

    runs: of each sequence in the list how many tokens it has, its slot, and its first token's position; the tokens of a
    run are at consecutive positions. tiling: of `attention` (default: the device's). into: an earlier plan of as many
    tiles, which is filled in place for launches enqueued later, and returned; its work is divided as far as its memory
    reaches, which the runs it was made of have set. heads: query heads, for which tiles may be divided (0: none is).
    Raises ValueError where `into` has another number of tiles.
    """
    chosen, _, multiprocessors = _choice(head_dim, device.index or 0)
    tiling = tiling or chosen
    begin, positions, tiles = 0, 0, []
    for count, slot, position in runs:
        for row in range(0, count, tiling.rows):
            tiles.append((begin + row, min(tiling.rows, count - row), position + row, slot))
        begin += count
        positions += position + count
    if into is not None and len(tiles) != into.tiles:
        raise ValueError(f"plan: runs of {len(tiles)} tiles for a plan of {into.tiles}: as many needed")
    # The longest first: the last ones to be done are short.
    tiles.sort(key=lambda tile: -tile[1] - tile[2])
    most = 0  # partial results that there may be
    if into is not None:
        most = len(into.partials)
    elif tiling.multiply == "wgmma" and 0 < 2 * len(tiles) * heads <= multiprocessors:
        most = PARTIALS // (heads * _record(head_dim))
    entries, partials = _divided(tiles) if most else ([], 0)
    if not 0 < partials <= most or (into is not None and len(entries) >= len(into.work)):
        entries, partials = [(*tile, 0, tile[1] + tile[2], -1, number) for number, tile in enumerate(tiles)], 0
    head = (0, 0, len(entries), 0, 0, 0, 0, 0)
    packed = torch.tensor([head, *entries], dtype=torch.int32, pin_memory=device.type == "cuda")
    if into is not None:
        into.work[: len(packed)].copy_(packed, non_blocking=True)
        return into
    return Plan(
        packed.to(device, non_blocking=True), len(tiles), tiling.rows, positions,
        torch.empty((partials, heads, _record(head_dim)), device=device),
        torch.zeros((len(tiles) if partials else 0, tiling.rows // 16, heads), dtype=torch.int32, device=device),
    )  # fmt: skip


def _divided(tiles: list[tuple[int, int, int, int]]) -> tuple[list[tuple[int, ...]], int]:
    """An entry for each segment of each tile; and how many partial results those of more than one segment lead to."""
    entries: list[tuple[int, ...]] = []
    partials = 0
    for number, (token, count, position, slot) in enumerate(tiles):
        end = position + count
        segments = range(0, end, SEGMENT)
        first = partials if len(segments) > 1 else -1
        entries += [(token, count, position, slot, at, min(end, at + SEGMENT), first, number) for at in segments]
        if len(segments) > 1:
            partials += len(segments) * -(-count // 16)
    return entries, partials


def _record(head_dim: int) -> int:
    """fp32 elements of a warp's partial result: for each lane O, m and l of two rows."""
    return 32 * (head_dim // 2 + 4)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    scale: float,
    window: int,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Causal attention of the runs of tokens that `plan` was made of over the cache, where their keys and values are.

    q, out [T, Hq, D], heads contiguous, any token stride; D is 64 or 128. k_cache, v_cache [S, C, Hk, D] of the same
    strides, a head's positions one after another, Hq / Hk at most 16; all bf16, or all fp16; with table i32[S, pages]
    they are [P, page, Hk, D] and position p of slot s is place p % page of page table[s, p // page], page a power of
    two from 8 to 128. A token at position p reads positions max(0, p - window + 1) … p of its slot; window 0 is no
    window. All rows at multiples of 16 bytes. plan: of these T tokens, for heads of D elements, on this device (not
    checked: 0 <= slot < S, position < C); not in two launches at a time. tiling: another one than the device's, as the
    plan's. Returns out.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, heads, width = check.dimensions("attention", "q", q, "T, Hq, D")
    if width not in (64, 128):
        raise ValueError(f"attention: q has head dimension {width}: 64 or 128 needed")
    dtype = check.half_name("attention", "q", q)
    for name, given in (("q", q), ("out", out)):
        check.rows("attention", name, given, (count, heads, width), q.dtype)
        check.aligned("attention", name, given)
    cache = cache_of("attention", k_cache, v_cache, width, table, q.dtype)
    if cache.position_stride != width:
        found = f"k_cache has a stride of {cache.position_stride} elements between a head's positions"
        raise ValueError(f"attention: {found}: {width} needed, one after another")
    kv_heads = cache.kv_heads
    if kv_heads == 0 or heads % kv_heads or heads > 16 * kv_heads:
        raise ValueError(f"attention: q has {heads} heads and k_cache {kv_heads}: 1 to 16 times as many needed")
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}: a positive number needed")
    if window < 0:
        raise ValueError(f"attention: window is {window}: 0 (none) or a number of positions needed")
    chosen, arch, multiprocessors = _choice(width, max(q.get_device(), 0))
    tiling = tiling or chosen
    if plan.rows != tiling.rows:
        raise ValueError(f"attention: plan has tiles of {plan.rows} queries: {tiling.rows} needed")
    if not count:
        return out
    group, factor = heads // kv_heads, scale * math.log2(math.e)
    pages_of = plan.work if table is None else table
    together = _together(plan.positions * width * 4, heads, group)
    if tiling.multiply == "wgmma":
        if len(plan.partials) and plan.partials.shape[1] != heads:
            raise ValueError(f"attention: plan is for {plan.partials.shape[1]} heads and q has {heads}")
        entries = len(plan.work) - 1
        box = TILE if table is None else 1 << cache.page_bits
        maps = [kept_tensor_map(q.flatten(1), tiling.rows)]
        maps += [kept_tensor_map(given.transpose(1, 2), box) for given in (k_cache, v_cache)]
        warpgroups(dtype, width, tiling, len(plan.partials) > 0).launch(
            (min(entries * heads, multiprocessors),), *maps, plan.work, pages_of, out,
            plan.partials, plan.arrived, entries, heads, group, together, 0 if table is None else cache.pages,
            7 if table is None else cache.page_bits, out.stride(0), factor, window,
        )  # fmt: skip
    else:
        warps(dtype, width, table is not None, tiling, arch).launch(
            (together, plan.tiles, heads // together), q, k_cache, v_cache, plan.work, pages_of, out, group,
            cache.pages, cache.page_bits, cache.slot_stride, cache.head_stride, q.stride(0), out.stride(0), factor,
            window,
        )  # fmt: skip
    return out


def _together(head_bytes: int, heads: int, group: int) -> int:
    """Query heads whose keys and values, `head_bytes` a KV head, stay in L2 together: a divisor of `heads` in whole
    groups of one KV head."""
    fitting = [n for n in range(group, heads + 1, group) if heads % n == 0 and n // group * head_bytes <= SHARED_KEYS]
    return max(fitting, default=group)
