"""Matrix product, version tiled: many tokens against the weights, a tile of the output a block at a time.

    multiply "wgmma"    sm_90a: one warp copies boxes by tensor maps into a ring, warpgroups multiply out of it. Blocks
                        stay and take one tile after another.
    multiply "mma"      sm_80 and later: cp.async, ldmatrix and mma.sync; all warps copy and multiply, a tile a block.

Tokens are the products' 16 or 64 rows and weight rows their columns: a thread holds neighbours of an output row. A tile
of `linear_swiglu` has the gate rows of its outputs and their up rows: a thread holds both of an output.

Order of summation: that of `kernels.linear.streamed`, whatever the tiling: K in order on one fp32 accumulator, or in
two halves, one after the other, that are added at the end; rounded once to the dtype. For `linear_swiglu` gate and up
stay fp32 until silu(gate) * up is rounded.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import check, device, ptx
from kernels.architectures import LIMITS, MULTIPROCESSORS
from kernels.cuda import cuda, device_function, float32, int32, int64, uint8, uint16, uint32, uint64
from kernels.launch import Kernel, LaunchOptions, kernel_factory, machine_of
from kernels.linear.streamed import BOX, segments_of
from kernels.linear.streamed import TOKENS as STREAMED
from kernels.tensor_maps import kept_tensor_map

# A warp passes its results on in pieces of 16 tokens and 64 columns; the rows lie apart so that no two of its accesses
# meet in a bank.
PIECE = 8  # fragments of 8 columns
PITCH = 2 * 8 * PIECE + 16
STAGING = 16 * PITCH
# Of a multiprocessor, measured on an H200: clock cycles of a stage, alone and in a cluster, and of a tile beyond their
# multiplications.
STAGE, SHARED_STAGE = 100, 70
TILE = 2000
# Tokens from which clusters gain: a product as long as that runs at the power limit.
SHARING = 2048
# fp32 sums of a thread at most, where K has several segments.
SUMS = 128


@dataclass(frozen=True)
class Tiling:
    """How a block works. tokens, rows: of a tile (gate and up rows together). down, across: parts that the tile's
    tokens and rows are divided into, one a warpgroup ("wgmma", which divides tokens only) or warp ("mma"). columns: of
    K in a stage. stages: of the ring. turns: such groups of warpgroups, which take tiles in turn: one multiplies as the
    other writes. cluster: blocks, 1 or 2, with tiles of the same weights, of which each copies its part for both.
    segments: parts of K that are summed one after the other and added."""

    multiply: str
    tokens: int
    rows: int
    down: int
    across: int
    columns: int
    stages: int
    turns: int = 1
    cluster: int = 1
    segments: int = 1

    @staticmethod
    def of_warpgroups(rows: int, turns: int = 1, cluster: int = 1) -> Tiling:
        """128 tokens between two warpgroups, or all of them for each of two in turn; the ring takes what memory there
        is."""
        columns = 2 * BOX if rows <= 64 else BOX
        tiling = Tiling("wgmma", 128, rows, 2 // turns, 1, columns, 0, turns, cluster)
        return replace(tiling, stages=(LIMITS["sm_90a"].shared_block - tiling.shared) // (tiling.stage_bytes + 16))

    @staticmethod
    def of_warps(tokens: int, rows: int, down: int, across: int, arch: str) -> Tiling:
        tiling = Tiling("mma", tokens, rows, down, across, 32, 0)
        return replace(tiling, stages=min(5, LIMITS[arch].shared_block // tiling.stage_bytes))

    @property
    def name(self) -> str:
        size = f"{self.tokens}x{self.rows}x{self.columns}_{self.down}x{self.across}_s{self.stages}"
        further = (("t", self.turns), ("c", self.cluster), ("k", self.segments))
        return f"{self.multiply}_{size}" + "".join(f"_{letter}{count}" for letter, count in further if count > 1)

    @property
    def warps(self) -> int:
        """That multiply."""
        return self.turns * self.down * self.across * (4 if self.multiply == "wgmma" else 1)

    @property
    def threads(self) -> int:
        """With "wgmma" one warp more, which copies; with turns it has a warpgroup, which leaves registers to others."""
        copying = (4 if self.turns > 1 else 1) if self.multiply == "wgmma" else 0
        return 32 * (self.warps + copying)

    @property
    def stage_bytes(self) -> int:
        return (self.tokens + self.rows) * self.columns * 2

    @property
    def shared(self) -> int:
        """Bytes of a block. "wgmma": the ring from a multiple of 1024 on, the warps' staging, two barriers a stage;
        "mma": the ring, in whose place comes the staging."""
        if self.multiply == "wgmma":
            return 1024 + self.stages * (self.stage_bytes + 16) + self.warps * STAGING
        return max(self.stages * self.stage_bytes, self.warps * STAGING)

    def tiles(self, count: int, rows: int) -> tuple[int, int]:
        """That `count` tokens and `rows` weight rows are divided into; a cluster's blocks have tokens for each."""
        return -(-count // (self.tokens * self.cluster)) * self.cluster, -(-rows // self.rows)

    def group(self, count: int, rows: int, multiprocessors: int) -> int:
        """Tiles down which are worked on together, such that those at work at a time cover about a square."""
        down, _ = self.tiles(count, rows)
        square = math.sqrt(multiprocessors * self.rows / self.tokens) / self.cluster
        return min(down, max(1, round(square)) * self.cluster)

    def fits(self, gated: bool, depth: int) -> bool:
        """Whether the tile divides into whole fragments, segments of K into whole stages, and a thread has registers
        for the sum of each."""
        step = 8 if self.multiply == "wgmma" else 16 * self.across
        whole = self.rows % (2 * step if gated or self.cluster > 1 else step) == 0
        sums = self.tokens * self.rows * self.segments // (32 * self.warps // self.turns)
        return whole and (self.segments == 1 or (sums <= SUMS and depth % (self.segments * self.columns) == 0))

    def blocks(self, count: int, rows: int, multiprocessors: int) -> int:
        """Of the grid: with "wgmma" as many as are at work at a time, else one a tile."""
        down, wide = self.tiles(count, rows)
        at_work = multiprocessors // self.cluster * self.cluster
        return min(down * wide, at_work) if self.multiply == "wgmma" else down * wide

    def clocks(self, count: int, rows: int, depth: int, multiprocessors: int) -> float:
        """About how many clock cycles the product takes: as many tiles one after another as the busiest has."""
        down, wide = self.tiles(count, rows)
        multiply = self.tokens * self.rows / (32 if self.multiply == "wgmma" else 16)
        most = -(-down * wide // multiprocessors)
        stage = STAGE if self.cluster == 1 or count < SHARING else SHARED_STAGE
        # With turns, what a tile takes beyond its multiplications passes while the next one multiplies.
        return most * depth / BOX * (multiply + stage) + (most if self.turns == 1 else 1) * TILE

    @staticmethod
    def choose(count: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int) -> Tiling:
        """For `count` tokens and a weight [rows, depth] on a GPU of so many multiprocessors: the fastest one measured
        for as many tiles of tokens, else by a model of its clock cycles."""
        segments = segments_of(rows, depth, gated)
        kept = measured().get((arch, multiprocessors, rows, depth, gated, -(-count // TOKENS) * TOKENS))
        if kept:
            return replace(kept, segments=segments)
        every = (replace(tiling, segments=segments) for tiling in tilings(arch, gated, rows * depth <= SMALL))
        return min(
            (tiling for tiling in every if tiling.fits(gated, depth)),
            key=lambda tiling: tiling.clocks(count, rows, depth, multiprocessors),
        )


# What stages.tune measured: a line for each weight and number of tokens on a kind of GPU; of TOKENS tokens those alone
# where the streamed version is slower.
MEASURED = Path(__file__).with_name("tilings.csv")
TOKENS = 128  # of a tile of warpgroups
STEP = 64  # tokens that may take another tiling than as many more or fewer: the least of a tile


# A weight as small takes microseconds in any tiling, and each tiling is another kernel that a first start compiles.
SMALL = 1 << 21  # elements


@functools.cache
def measured() -> dict[tuple[str, int, int, int, bool, int], Tiling]:
    """Tilings of MEASURED by architecture, multiprocessors, rows and depth of the weight, whether gated, and tokens."""
    found = {}
    with open(MEASURED, newline="") as file:
        for line in csv.DictReader(file):
            key = (*(int(line[name]) for name in ("multiprocessors", "rows", "depth")), line["gated"] == "1")
            tiling = Tiling.of_warpgroups(*(int(line[name]) for name in ("tile_rows", "turns", "cluster")))
            found[line["arch"], *key, int(line["tokens"])] = tiling
    return found


@functools.cache
def tilings(arch: str, gated: bool, small: bool = False) -> tuple[Tiling, ...]:
    """What `Tiling.choose` chooses from; of a small weight a few."""
    if arch == "sm_90a" and small:
        return tuple(Tiling.of_warpgroups(rows) for rows in (64, 128, 256))
    if arch == "sm_90a":
        alone = tuple(Tiling.of_warpgroups(rows) for rows in (32, 40, 64, 80, 96, 128, 160, 192, 224, 240, 256))
        shared = tuple(Tiling.of_warpgroups(rows, cluster=2) for rows in (160, 192, 224, 256))
        # To write a tile is long work for SwiGLU alone: else turns gain less than the smaller tiles of them lose. A
        # small tile one warpgroup multiplies with fewer reads than two.
        if gated:
            in_turn = (
                Tiling.of_warpgroups(176, 2),
                Tiling.of_warpgroups(192, 2),
                Tiling.of_warpgroups(192, 2, cluster=2),
            )
            return (*alone, *shared, *in_turn)
        return (Tiling.of_warpgroups(64, 2), *alone, *shared)
    return tuple(Tiling.of_warps(*tile, arch) for tile in ((128, 256, 2, 4), (64, 128, 2, 4)))


def is_faster(count: int, rows: int, depth: int, gated: bool, machine: tuple[str, int]) -> bool:
    """Whether this version takes less time than `kernels.linear.streamed`, whose bits it has: beyond that one's passes,
    and where it was measured. machine: architecture and multiprocessors."""
    if count > STREAMED[-1]:
        return True
    return count > STREAMED[-2] and (*machine, rows, depth, gated, TOKENS) in measured()


def _writer(dtype: str, blocks: int, fragments: int, gated: bool) -> Callable[..., None]:
    """A function that writes a warp's accumulators to out.

    They are those of `blocks` x 16 tokens and `fragments` x 8 weight rows, 4 a fragment as mma_m16n8k16 has them, block
    after block; gated: of the fragments the first half are gates, the other half ups.
    """
    kept = fragments // 2 if gated else fragments
    pieces = -(-kept // PIECE)
    pack = device.HALVES[dtype].pack

    @device_function
    def plain(acc, c):
        return pack(acc[c + 1], acc[c])

    def swiglu(silu: Callable[..., float]) -> Callable[..., int]:
        @device_function
        def pair(acc, c):
            u = c + kept * 4
            first, second = ptx.mul_rn_f32(silu(acc[c]), acc[u]), ptx.mul_rn_f32(silu(acc[c + 1]), acc[u + 1])
            return pack(second, first)

        return pair

    @device_function
    def nothing(acc, staging, lane, out, token, column, count, columns):
        pass

    def writer(piece: int) -> Callable[..., None]:
        # A function a piece, not a loop: the compiler would not unroll one as large, and an index that it does not know
        # sends the accumulators to memory.
        m, p = piece // pieces, piece % pieces
        first, last = m * fragments + p * PIECE, m * fragments + min(kept, (p + 1) * PIECE)
        following = writer(piece + 1) if piece + 1 < blocks * pieces else nothing

        def staging_of(pair: Callable[..., int]) -> Callable[..., None]:
            @device_function
            def stage(acc, into):
                for f in range(first, last):
                    place = into + uint32((f - first) * 16)
                    ptx.st_shared_b32(place, pair(acc, f * 4))
                    ptx.st_shared_b32(place + uint32(8 * PITCH), pair(acc, f * 4 + 2))

            return stage

        # Without branches the compiler works on many outputs at a time.
        stage_plain = staging_of(plain)
        stage_common, stage_any = staging_of(swiglu(device.common_silu)), staging_of(swiglu(device.silu))

        @device_function
        def write(acc, staging, lane, out, token, column, count, columns):
            """From [token, column] on of out [count, columns], through the warp's STAGING bytes of shared memory."""
            into = staging + uint32((lane >> 2) * PITCH + (lane & 3) * 4)
            row, chunk = lane >> 3, lane & 7
            outof = staging + uint32(row * PITCH + chunk * 16)
            if gated:
                common = True
                for c in range(first * 4, last * 4):
                    common = common & device.is_common(acc[c])
                if common:
                    stage_common(acc, into)
                else:
                    stage_any(acc, into)
            else:
                stage_plain(acc, into)
            ptx.bar_warp_sync()
            place = column + (p * PIECE + chunk) * 8
            inside = p * PIECE + chunk < kept and place < columns
            for i in range(4):
                here = token + m * 16 + i * 4 + row
                if inside and here < count:
                    v = ptx.ld_shared_v4(outof + uint32(i * 4 * PITCH))
                    ptx.st_global_v4(out, int64(here) * columns + place, v[0], v[1], v[2], v[3])
            ptx.bar_warp_sync()
            following(acc, staging, lane, out, token, column, count, columns)

        return write

    return writer(0)


@device_function
def _place(tile, group, down, wide):
    """Row and column of tile number `tile` of [down, wide]: down through `group` of them, then across, then the next
    `group`."""
    # Unsigned: a division of 32 bits, not of 64.
    tile, group, wide = uint32(tile), uint32(group), uint32(wide)
    begin = uint32(uint32(tile // uint32(group * wide)) * group)
    within = uint32(tile - uint32(begin * wide))
    high = min(group, uint32(uint32(down) - begin))
    return int32(begin + within % high), int32(within // high)


@kernel_factory
def warpgroups(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """Tensor maps of weight [N, K] and x [T, K], out [T, N or N/2], T, N, K, group; grid (n,), n at most the tiles.

    dtype: "bf16" or "f16". gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    tokens, rows, stages, down_parts, turns = tiling.tokens, tiling.rows, tiling.stages, tiling.down, tiling.turns
    boxes = tiling.columns // BOX
    halves, cluster = 2 if gated else 1, tiling.cluster
    kept_rows = rows // halves  # columns of out
    # Boxes that the weights of 64 columns come in: gates and ups, or what each block of a cluster copies for both.
    parts = max(halves, cluster)
    part_rows = rows // parts
    weight_bytes, token_bytes, stage_bytes = rows * 128, tokens * 128, tiling.stage_bytes
    accumulators = rows // 2
    # A warpgroup multiplies 64 tokens at a time: all of its part, or the lower and the higher half of it.
    two = tokens // down_parts == 128
    high_accumulators = accumulators if two else 1
    segments = tiling.segments
    first_accumulators = accumulators if segments > 1 else 1
    first_high_accumulators = high_accumulators if segments > 1 else 1
    warps, turn_warps = tiling.warps, tiling.warps // turns
    multiply = device.HALVES[dtype].wgmma(rows)
    keep, keep_high = ptx.keep_f32(accumulators), ptx.keep_f32(high_accumulators)
    all_but_one, all_done = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)
    few_registers, many_registers = ptx.setmaxnreg_dec(40), ptx.setmaxnreg_inc(232)
    write = _writer(dtype, 1, rows // 8, gated)

    @device_function
    def copy_weight(weight, stage_at, barrier, n, k, half, rank, policy):
        ptx.mbarrier_arrive_expect_tx(barrier, uint32(stage_bytes))
        for h in range(boxes):
            column = int32((k * boxes + h) * BOX)
            if cluster > 1:
                place = uint32(h * weight_bytes + rank * part_rows * 128)
                row = int32(n * kept_rows + rank * (half if gated else part_rows))
                ptx.cp_async_bulk_tensor_2d_multicast(
                    stage_at + place, weight, 0, barrier, column, row, uint16((1 << cluster) - 1), policy
                )
            else:
                for part in range(parts):
                    place = uint32(h * weight_bytes + part * part_rows * 128)
                    row = int32(part * half + n * kept_rows)
                    ptx.cp_async_bulk_tensor_2d(stage_at + place, weight, 0, barrier, column, row, policy)

    @device_function
    def copy_tokens(x, stage_at, barrier, m, k, policy):
        for h in range(boxes):
            place = uint32(boxes * weight_bytes + h * token_bytes)
            column, row = int32((k * boxes + h) * BOX), int32(m * tokens)
            ptx.cp_async_bulk_tensor_2d(stage_at + place, x, 0, barrier, column, row, policy)

    @device_function
    def free(barrier, lane):
        """Tell every block that copies to this stage that a warp is done with it."""
        if cluster > 1:
            if lane < cluster:
                ptx.mbarrier_arrive_at(barrier, uint32(lane))
        elif lane == 0:
            ptx.mbarrier_arrive(barrier)

    @device_function
    def multiply_stages(acc, high, ring, full, empty, a_place, stage, parity, count, lane):
        """Add the products of `count` stages from `stage` on, all stages but the last freed; the next stage, its parity
        and the last one, whose products may be under way."""
        previous = int32(-1)
        for _ in range(count):
            while ptx.mbarrier_try_wait(full + uint32(8 * stage), parity) == 0:
                pass
            stage_at = ring + uint32(stage * stage_bytes)
            a = ptx.wgmma_descriptor(stage_at + a_place, uint32(16), uint32(1024))
            b = ptx.wgmma_descriptor(stage_at, uint32(16), uint32(1024))
            keep(acc)
            if two:
                keep_high(high)
            ptx.wgmma_fence()
            for h in range(boxes):
                for i in range(4):
                    a_step = a + uint64((h * token_bytes + i * 32) >> 4)
                    b_step = b + uint64((h * weight_bytes + i * 32) >> 4)
                    multiply(acc, a_step, b_step, uint32(1))
                    if two:
                        multiply(high, a_step + uint64(8192 >> 4), b_step, uint32(1))
            ptx.wgmma_commit_group()
            # While these multiply, those before them are done: their stage may be filled again.
            all_but_one()
            if previous >= 0:
                free(empty + uint32(8 * previous), lane)
            previous = stage
            stage += int32(1)
            if stage == stages:
                stage, parity = int32(0), parity ^ uint32(1)
        return stage, parity, previous

    def linear(weight, x, out, count, weight_rows, depth, group):
        memory = cuda.shared.array(0, uint8)
        ring = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        staging = ring + uint32(stages * stage_bytes)
        full = staging + uint32(warps * STAGING)
        empty = full + uint32(8 * stages)
        thread = int32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        if thread == 0:
            for s in range(stages):
                ptx.mbarrier_init(full + uint32(8 * s), uint32(1))
                ptx.mbarrier_init(empty + uint32(8 * s), uint32(turn_warps * cluster))
            ptx.fence_mbarrier_init()
        rank = int32(0)
        if cluster > 1:
            rank = int32(ptx.cluster_ctarank())
            ptx.cluster_sync()
        else:
            cuda.syncthreads()
        ptx.griddepcontrol_launch_dependents()
        half = weight_rows // halves
        down, wide = (count + (tokens - 1)) // tokens, (half + (kept_rows - 1)) // kept_rows
        if cluster > 1:
            down = (down + (cluster - 1)) // cluster * cluster
        # The last stage of an odd number of boxes ends in zeros, which change no sum.
        stage_count = (depth + (boxes * BOX - 1)) // (boxes * BOX)
        tile, step = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)

        if warp >= warps:
            if turns > 1:
                few_registers()
            if warp == warps and lane == 0:
                # Weights that one tile of tokens alone reads need not stay in L2.
                weight_policy, token_policy = uint64(ptx.EVICT_NORMAL), uint64(ptx.EVICT_NORMAL)
                if down == 1:
                    weight_policy, token_policy = uint64(ptx.EVICT_FIRST), uint64(ptx.EVICT_LAST)
                # The first stages of weights need nothing of the kernels ahead.
                m, n = _place(tile, group, down, wide)
                early = min(stage_count, int32(stages))
                for k in range(early):
                    copy_weight(
                        weight, ring + uint32(k * stage_bytes), full + uint32(8 * k), n, k, half, rank, weight_policy
                    )
                ptx.griddepcontrol_wait()
                for k in range(early):
                    copy_tokens(x, ring + uint32(k * stage_bytes), full + uint32(8 * k), m, k, token_policy)
                stage, parity = early, uint32(1)
                if stage == stages:
                    stage, parity = int32(0), uint32(0)
                begin = early
                while tile < down * wide:
                    m, n = _place(tile, group, down, wide)
                    for k in range(begin, stage_count):
                        while ptx.mbarrier_try_wait(empty + uint32(8 * stage), parity) == 0:
                            pass
                        stage_at, barrier = ring + uint32(stage * stage_bytes), full + uint32(8 * stage)
                        copy_weight(weight, stage_at, barrier, n, k, half, rank, weight_policy)
                        copy_tokens(x, stage_at, barrier, m, k, token_policy)
                        stage += int32(1)
                        if stage == stages:
                            stage, parity = int32(0), parity ^ uint32(1)
                    begin = int32(0)
                    tile = int32(tile + step)
            ptx.bar_warp_sync()
        else:
            if turns > 1:
                many_registers()
            turn, own_down = (warp >> 2) // down_parts, (warp >> 2) % down_parts
            a_place = uint32(boxes * weight_bytes + own_down * 8192)
            own_staging = staging + uint32(warp * STAGING)
            own_token = own_down * 64 + (warp & 3) * 16
            acc = cuda.local.array(accumulators, float32)
            high = cuda.local.array(high_accumulators, float32)
            first = cuda.local.array(first_accumulators, float32)
            first_high = cuda.local.array(first_high_accumulators, float32)
            tile = int32(tile + turn * step)
            stage, parity = int32(0), uint32(0)
            others = int32(turn * stage_count)
            while tile < down * wide:
                for i in range(accumulators):
                    acc[i] = float32(0.0)
                if two:
                    for i in range(accumulators):
                        high[i] = float32(0.0)
                if turns > 1:
                    # Past the stages of the other turns' tiles, after the turn before this one has seen its own full:
                    # of an earlier round of the ring, a barrier's parity would say nothing.
                    stage = int32(stage + others)
                    parity ^= uint32(stage // stages) & uint32(1)
                    stage = int32(stage % stages)
                    others = int32((turns - 1) * stage_count)
                    if tile >= step:
                        ptx.bar_sync(uint32(1 + turn), uint32(64 * turn_warps))
                for segment in range(segments):
                    if segment > 0:
                        for i in range(first_accumulators):
                            first[i], acc[i] = acc[i], float32(0.0)
                        if two:
                            for i in range(first_high_accumulators):
                                first_high[i], high[i] = high[i], float32(0.0)
                    stage, parity, previous = multiply_stages(
                        acc, high, ring, full, empty, a_place, stage, parity, stage_count // segments, lane
                    )
                    if turns > 1 and segment == segments - 1 and tile + step < down * wide:
                        ptx.bar_arrive(uint32(1 + (turn + 1) % turns), uint32(64 * turn_warps))
                    all_done()
                    keep(acc)
                    if two:
                        keep_high(high)
                    free(empty + uint32(8 * previous), lane)
                if segments > 1:
                    for i in range(first_accumulators):
                        acc[i] = ptx.add_rn_f32(first[i], acc[i])
                    if two:
                        for i in range(first_high_accumulators):
                            high[i] = ptx.add_rn_f32(first_high[i], high[i])
                m, n = _place(tile, group, down, wide)
                write(acc, own_staging, lane, out, m * tokens + own_token, n * kept_rows, count, half)
                if two:
                    write(high, own_staging, lane, out, m * tokens + own_token + 64, n * kept_rows, count, half)
                tile = int32(tile + turns * step)
        if cluster > 1:
            # No block may end while another arrives at its barriers.
            ptx.cluster_sync()

    name = f"linear_{'swiglu_' if gated else ''}tiled_{tiling.name}{device.HALVES[dtype].suffix}_{arch}"
    return Kernel(
        name, linear, ("u8*", "u8*", f"{dtype}*", "i32", "i32", "i32", "i32"), tiling.threads,
        dynamic_shared=tiling.shared, blocks_per_sm=1,
        options=LaunchOptions(programmatic=True, cluster=(cluster, 1, 1) if cluster > 1 else None),
        architectures=(arch,), early=("weight",),
    )  # fmt: skip


@kernel_factory
def warps(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """weight [N, K], x [T, K], out [T, N or N/2], T, N, K, group; grid (tiles,).

    dtype: "bf16" or "f16". gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    tokens, rows, columns, stages = tiling.tokens, tiling.rows, tiling.columns, tiling.stages
    across, threads = tiling.across, tiling.threads
    halves = 2 if gated else 1
    kept_rows = rows // halves  # columns of out
    own_tokens, own_rows = tokens // tiling.down, rows // across  # of a warp
    blocks, fragments = own_tokens // 16, own_rows // 8
    kept = fragments // halves
    chunks = columns // 8  # of 16 bytes in a row of a stage
    row_bytes, token_bytes, stage_bytes = columns * 2, tokens * columns * 2, tiling.stage_bytes
    steps = columns // 16
    accumulators, a_words, b_words = blocks * fragments * 4, blocks * 4, fragments * 2
    two_a, two_b = 2 * a_words, 2 * b_words
    segments = tiling.segments
    first_accumulators = accumulators if segments > 1 else 1
    landed = ptx.cp_async_wait_group(stages - 2)
    write = _writer(dtype, blocks, fragments, gated)
    mma = device.HALVES[dtype].mma

    @device_function
    def swizzled(row, chunk):
        """Bytes from a row's begin to a chunk: 8 rows have the same chunk in 8 different places of 128 bytes."""
        return (chunk ^ (row & 7 if chunks == 8 else row >> 1 & 3)) * 16

    @device_function
    def copy_tokens(x, stage_at, first, k, thread, count, depth):
        for i in range(-(-tokens * chunks // threads)):
            item = i * threads + thread
            row, chunk = item // chunks, item % chunks
            if tokens * chunks % threads == 0 or item < tokens * chunks:
                place = uint32(row * row_bytes + swizzled(row, chunk))
                source = int64(min(first + row, count - 1)) * depth + k * columns + chunk * 8
                ptx.cp_async_cg_16(stage_at + place, x, source)

    @device_function
    def copy_weight(weight, stage_at, first, k, thread, half, depth):
        for i in range(-(-rows * chunks // threads)):
            item = i * threads + thread
            row, chunk = item // chunks, item % chunks
            if rows * chunks % threads == 0 or item < rows * chunks:
                place = uint32(token_bytes + row * row_bytes + swizzled(row, chunk))
                source = int64(row // kept_rows * half + min(first + row % kept_rows, half - 1)) * depth
                ptx.cp_async_cg_16(stage_at + place, weight, source + k * columns + chunk * 8)

    @device_function
    def load(a, b, buffer, a_at, b_at, step, a_chunk, b_chunk, swizzle):
        """Operands of a step of 16 columns to registers."""
        a_place = uint32(((step * 2 + a_chunk) ^ swizzle) * 16)
        b_place = uint32(((step * 2 + b_chunk) ^ swizzle) * 16)
        for m in range(blocks):
            got = ptx.ldmatrix_x4(a_at + uint32(m * 16 * row_bytes) + a_place)
            for j in range(4):
                a[buffer * a_words + m * 4 + j] = got[j]
        for f in range(fragments // 2):
            # Of two fragments; ups lie half a tile behind the gates.
            row = (2 * f) // kept * kept_rows + (2 * f) % kept * 8
            got = ptx.ldmatrix_x4(b_at + uint32(row * row_bytes) + b_place)
            for j in range(4):
                b[buffer * b_words + f * 4 + j] = got[j]

    @device_function
    def multiply(acc, a, b, buffer):
        for m in range(blocks):
            for f in range(fragments):
                c, i, j = (m * fragments + f) * 4, buffer * a_words + m * 4, buffer * b_words + f * 2
                d = mma(a[i], a[i + 1], a[i + 2], a[i + 3], b[j], b[j + 1], acc[c], acc[c + 1], acc[c + 2], acc[c + 3])
                acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = d[0], d[1], d[2], d[3]

    def linear(weight, x, out, count, weight_rows, depth, group):
        memory = cuda.shared.array(0, uint8)
        ring = ptx.shared_address(memory)
        thread = int32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        half = weight_rows // halves
        down, wide = (count + tokens - 1) // tokens, (half + kept_rows - 1) // kept_rows
        stage_count = depth // columns
        m, n = _place(int32(cuda.blockIdx.x), group, down, wide)
        first_token, first_column = m * tokens, n * kept_rows
        ptx.griddepcontrol_launch_dependents()

        # The first stages of weights need nothing of the kernels ahead.
        for s in range(stages - 1):
            if s < stage_count:
                copy_weight(weight, ring + uint32(s * stage_bytes), first_column, s, thread, half, depth)
        ptx.griddepcontrol_wait()
        for s in range(stages - 1):
            if s < stage_count:
                copy_tokens(x, ring + uint32(s * stage_bytes), first_token, s, thread, count, depth)
            ptx.cp_async_commit_group()

        own_down, own_across = warp // across, warp % across
        a_row, b_row = lane & 15, (lane & 7) + (lane >> 4) * 8
        a_chunk, b_chunk, swizzle = lane >> 4, lane >> 3 & 1, swizzled(lane & 7, 0) >> 4
        a_place = uint32((own_down * own_tokens + a_row) * row_bytes)
        b_place = uint32(token_bytes + (own_across * kept * 8 + b_row) * row_bytes)
        acc = cuda.local.array(accumulators, float32)
        a = cuda.local.array(two_a, uint32)
        b = cuda.local.array(two_b, uint32)
        first = cuda.local.array(first_accumulators, float32)
        for i in range(accumulators):
            acc[i] = float32(0.0)
        stage, free = int32(0), int32(stages - 1)
        for k in range(stage_count):
            if segments > 1 and 2 * k == stage_count:
                for i in range(first_accumulators):
                    first[i], acc[i] = acc[i], float32(0.0)
            landed()
            cuda.syncthreads()
            # Every warp is done with the stage before this one: it is filled again.
            following = k + (stages - 1)
            if following < stage_count:
                free_at = ring + uint32(free * stage_bytes)
                copy_weight(weight, free_at, first_column, following, thread, half, depth)
                copy_tokens(x, free_at, first_token, following, thread, count, depth)
            ptx.cp_async_commit_group()
            stage_at = ring + uint32(stage * stage_bytes)
            a_at, b_at = stage_at + a_place, stage_at + b_place
            load(a, b, 0, a_at, b_at, 0, a_chunk, b_chunk, swizzle)
            for step in range(steps):
                if step + 1 < steps:
                    load(a, b, (step + 1) % 2, a_at, b_at, step + 1, a_chunk, b_chunk, swizzle)
                multiply(acc, a, b, step % 2)
            free = stage
            stage = stage + int32(1) if stage + 1 < stages else int32(0)
        if segments > 1:
            for i in range(first_accumulators):
                acc[i] = ptx.add_rn_f32(first[i], acc[i])
        cuda.syncthreads()
        write(
            acc, ring + uint32(warp * STAGING), lane, out, first_token + own_down * own_tokens,
            first_column + own_across * kept * 8, count, half,
        )  # fmt: skip

    name = f"linear_{'swiglu_' if gated else ''}tiled_{tiling.name}{device.HALVES[dtype].suffix}_{arch}"
    return Kernel(
        name, linear, (*(f"{dtype}*",) * 3, "i32", "i32", "i32", "i32"), threads,
        dynamic_shared=tiling.shared, blocks_per_sm=1,
        options=LaunchOptions(programmatic=True), early=("weight",),
        architectures=(arch,),
    )  # fmt: skip


def _kernel(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    return (warpgroups if tiling.multiply == "wgmma" else warps)(dtype, tiling, gated, arch)


def catalogue(
    dtype: str, rows: int, depth: int, gated: bool, tokens: Sequence[int] = range(64, 8193, 64)
) -> list[Kernel]:
    """The kernels for a weight [rows, depth] and these numbers of tokens, each once, as an architecture's usual GPU
    takes them."""
    kernels = {}
    for arch, multiprocessors in MULTIPROCESSORS.items():
        for count in tokens:
            kernel = _kernel(dtype, Tiling.choose(count, rows, depth, gated, arch, multiprocessors), gated, arch)
            kernels[kernel.name] = kernel
    return list(kernels.values())


@functools.cache
def _plan(
    dtype: str, tiling: Tiling, count: int, rows: int, gated: bool, arch: str, multiprocessors: int
) -> tuple[Kernel, tuple[int], int, tuple[int, int] | None]:
    """Kernel, grid, group and, where it reads by tensor maps, rows of the boxes of weights and tokens."""
    grid = (tiling.blocks(count, rows, multiprocessors),)
    boxes = (
        (tiling.rows // max(2 if gated else 1, tiling.cluster), tiling.tokens) if tiling.multiply == "wgmma" else None
    )
    return _kernel(dtype, tiling, gated, arch), grid, tiling.group(count, rows, multiprocessors), boxes


def launch(
    tiling: Tiling, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool, machine: tuple[str, int]
) -> None:
    """The product by one tiling; machine: architecture and multiprocessors. Tensors as those of `linear`, unchecked."""
    count, (rows, depth) = len(x), weight.shape
    kernel, grid, group, boxes = _plan(check.HALVES[x.dtype], tiling, count, rows, gated, *machine)
    if boxes is None:
        kernel.launch(grid, weight, x, out, count, rows, depth, group)
    else:
        maps = kept_tensor_map(weight, boxes[0]), kept_tensor_map(x, boxes[1])
        kernel.launch(grid, *maps, out, count, rows, depth, group)


_choose = functools.cache(Tiling.choose)


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool) -> torch.Tensor:
    count, rows, depth = check.product(x, weight, out, BOX, gated)
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        check.aligned("linear_swiglu" if gated else "linear", name, tensor)
    if count:
        machine = machine_of(max(x.get_device(), 0))
        launch(_choose(count, rows, depth, gated, *machine), x, weight, out, gated, machine)
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = x @ weight.T, accumulated in fp32 in order of K (`segments_of`) and rounded once.

    x [T, K], weight [N, K], out [T, N], all bf16 or all fp16, contiguous; N a multiple of 8, K of 64. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    return _launch(x, weight, out, False)


def linear_swiglu(x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(x @ gate.T) * (x @ up.T), gate and up the halves of gate_up; in fp32, rounded once.

    x [T, K], gate_up [2 I, K], out [T, I], all bf16 or all fp16, contiguous; I a multiple of 8, K of 64. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    return _launch(x, gate_up, out, True)
