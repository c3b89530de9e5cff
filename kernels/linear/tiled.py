"""Matrix product, version tiled: many tokens against the weights, a tile of the output a block at a time.

    multiply "wgmma"    sm_90a: one warp copies boxes by tensor maps into a ring, warpgroups multiply out of it. Blocks
                        stay and take one tile after another; the blocks of a cluster share the copies of what they
                        have in common.
    multiply "mma"      sm_80 and later: cp.async, ldmatrix and mma.sync; all warps copy and multiply, a tile a block.

Tokens are the products' 16 or 64 rows and weight rows their columns, so that a thread holds neighbours of an output row.
A tile of `linear_swiglu` has the gate rows of its outputs and their up rows: a thread holds both of an output.

Order of summation: K in order on one fp32 accumulator, rounded once to bf16: the bits of `kernels.linear.streamed`,
whatever the tiling. For `linear_swiglu` gate and up stay fp32 until silu(gate) * up is rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels import check, device, ptx
from kernels.cuda import SIMULATED, cuda, device_function, float32, int32, int64, uint8, uint16, uint32, uint64
from kernels.launch import LIMITS, Kernel, LaunchOptions, architecture_of, kernel_factory
from kernels.linear.streamed import BOX, MULTIPROCESSORS, matrix_map

# A warp passes its results on in pieces of 16 tokens and 64 columns; the rows lie apart so that no two of its accesses
# meet in a bank.
PIECE = 8  # fragments of 8 columns
PITCH = 2 * 8 * PIECE + 16
STAGING = 16 * PITCH


@dataclass(frozen=True)
class Tiling:
    """How a block works. tokens, rows: of a tile (gate and up rows together). down, across: parts that the tile's
    tokens and rows are divided into, one a warpgroup ("wgmma") or warp ("mma"). columns: of K in a stage. stages: of
    the ring. cluster: blocks of a cluster; they take neighbouring tiles that have `common` ("tokens" or "rows") in
    common."""

    multiply: str
    tokens: int
    rows: int
    down: int
    across: int
    columns: int
    stages: int
    cluster: int = 1
    common: str = ""

    @property
    def name(self) -> str:
        cluster = f"_c{self.cluster}{self.common}" if self.cluster > 1 else ""
        return f"{self.multiply}_{self.tokens}x{self.rows}x{self.columns}_{self.down}x{self.across}_s{self.stages}{cluster}"

    @property
    def warps(self) -> int:
        """That multiply."""
        return self.down * self.across * (4 if self.multiply == "wgmma" else 1)

    @property
    def threads(self) -> int:
        """With "wgmma" one warp more, which copies."""
        return 32 * (self.warps + (self.multiply == "wgmma"))

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

    @property
    def token_tiles(self) -> int:
        """That the blocks of a cluster take at a time, side by side in tokens."""
        return 1 if self.common == "tokens" else self.cluster

    @property
    def row_tiles(self) -> int:
        return self.cluster if self.common == "tokens" else 1

    def clusters(self, count: int, rows: int) -> tuple[int, int]:
        """Tiles of a cluster that `count` tokens and `rows` weight rows are divided into."""
        return -(-count // (self.tokens * self.token_tiles)), -(-rows // (self.rows * self.row_tiles))

    def group(self, count: int, rows: int, multiprocessors: int) -> int:
        """Tiles down which are worked on together, such that those at work at a time cover about a square."""
        down, _ = self.clusters(count, rows)
        at_work = multiprocessors // self.cluster
        square = math.sqrt(at_work * self.rows * self.row_tiles / (self.tokens * self.token_tiles))
        return min(down, max(1, round(square)))

    @staticmethod
    def choose(count: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int) -> Tiling:
        """For `count` tokens and a weight [rows, depth] on a GPU of so many multiprocessors."""
        raise NotImplementedError


def _writer(blocks: int, fragments: int, gated: bool) -> Callable[..., None]:
    """A function that writes a warp's accumulators to out.

    They are those of `blocks` x 16 tokens and `fragments` x 8 weight rows, 4 a fragment as mma_m16n8k16 has them, block
    after block; gated: of the fragments the first half are gates, the other half ups.
    """
    kept = fragments // 2 if gated else fragments

    @device_function
    def pair(acc, c):
        if gated:
            u = c + kept * 4
            first = ptx.mul_rn_f32(device.silu(acc[c]), acc[u])
            second = ptx.mul_rn_f32(device.silu(acc[c + 1]), acc[u + 1])
            return ptx.cvt_rn_bf16x2_f32(second, first)
        return ptx.cvt_rn_bf16x2_f32(acc[c + 1], acc[c])

    @device_function
    def write(acc, staging, lane, out, token, column, count, columns):
        """From [token, column] on of out [count, columns], through the warp's STAGING bytes of shared memory."""
        into = staging + uint32((lane >> 2) * PITCH + (lane & 3) * 4)
        row, chunk = lane >> 3, lane & 7
        outof = staging + uint32(row * PITCH + chunk * 16)
        for m in range(blocks):
            for p in range(-(-kept // PIECE)):
                for j in range(PIECE):
                    if p * PIECE + j < kept:
                        c = (m * fragments + p * PIECE + j) * 4
                        ptx.st_shared_b32(into + uint32(j * 16), pair(acc, c))
                        ptx.st_shared_b32(into + uint32(8 * PITCH + j * 16), pair(acc, c + 2))
                ptx.bar_warp_sync()
                place = column + (p * PIECE + chunk) * 8
                inside = p * PIECE + chunk < kept and place < columns
                for i in range(4):
                    here = token + m * 16 + i * 4 + row
                    if inside and here < count:
                        v = ptx.ld_shared_v4(outof + uint32(i * 4 * PITCH))
                        ptx.st_global_v4(out, int64(here) * columns + place, v[0], v[1], v[2], v[3])
                ptx.bar_warp_sync()

    return write


@kernel_factory
def warpgroups(tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """Tensor maps of weight [N, K] and x [T, K], out [T, N or N/2], T, N, K, group; grid (n * cluster,).

    gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    tokens, rows, stages, cluster = tiling.tokens, tiling.rows, tiling.stages, tiling.cluster
    across, token_tiles, row_tiles = tiling.across, tiling.token_tiles, tiling.row_tiles
    boxes = tiling.columns // BOX
    halves = 2 if gated else 1
    own_rows = rows // across  # of a warpgroup
    kept_rows = rows // halves  # columns of out
    # A box of weight rows is a warpgroup's gates, or ups; of the operand in common each block copies a share.
    part_rows = own_rows // halves
    share_rows, share_tokens = part_rows // token_tiles, tokens // row_tiles
    weight_bytes, token_bytes, stage_bytes = rows * 128, tokens * 128, tiling.stage_bytes
    accumulators = own_rows // 2
    warps = tiling.warps
    everyone = uint16((1 << cluster) - 1)
    multiply = ptx.wgmma_m64k16_bf16(own_rows)
    keep = ptx.keep_f32(accumulators)
    all_but_one, all_done = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)
    write = _writer(1, own_rows // 8, gated)

    @device_function
    def place(tile, group, down, wide, rank):
        """Tile of tokens and tile of rows that block `rank` of a cluster has of its tile `tile`, in the order: down
        through `group` tiles, then across, then the next `group`."""
        begin = tile // (group * wide) * group
        within = tile - begin * wide
        high = min(group, down - begin)
        m, n = begin + within % high, within // high
        if token_tiles > 1:
            m = m * token_tiles + rank
        if row_tiles > 1:
            n = n * row_tiles + rank
        return m, n

    @device_function
    def release(barrier, lane):
        if cluster == 1:
            if lane == 0:
                ptx.mbarrier_arrive(barrier)
        elif lane < cluster:
            ptx.mbarrier_arrive_cluster(ptx.mapa_shared_cluster(barrier, uint32(lane)))

    @device_function
    def copy_weight(weight, stage_at, barrier, n, k, rank, half, policy):
        ptx.mbarrier_arrive_expect_tx(barrier, uint32(stage_bytes))
        for h in range(boxes):
            for a in range(across):
                for part in range(halves):
                    own = rank * share_rows if token_tiles > 1 else 0
                    place = uint32(h * weight_bytes + ((a * halves + part) * part_rows + own) * 128)
                    column, row = int32((k * boxes + h) * BOX), int32(part * half + n * kept_rows + a * part_rows + own)
                    if token_tiles > 1:
                        ptx.cp_async_bulk_tensor_2d_multicast(
                            stage_at + place, weight, 0, barrier, column, row, everyone, policy
                        )
                    else:
                        ptx.cp_async_bulk_tensor_2d(stage_at + place, weight, 0, barrier, column, row, policy)

    @device_function
    def copy_tokens(x, stage_at, barrier, m, k, rank):
        policy = uint64(ptx.EVICT_LAST)
        for h in range(boxes):
            own = rank * share_tokens if row_tiles > 1 else 0
            place = uint32(boxes * weight_bytes + h * token_bytes + own * 128)
            column, row = int32((k * boxes + h) * BOX), int32(m * tokens + own)
            if row_tiles > 1:
                ptx.cp_async_bulk_tensor_2d_multicast(stage_at + place, x, 0, barrier, column, row, everyone, policy)
            else:
                ptx.cp_async_bulk_tensor_2d(stage_at + place, x, 0, barrier, column, row, policy)

    def linear(weight, x, out, count, weight_rows, depth, group):
        memory = cuda.shared.array(0, uint8)
        ring = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        staging = ring + uint32(stages * stage_bytes)
        full = staging + uint32(warps * STAGING)
        empty = full + uint32(8 * stages)
        thread = int32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        rank = int32(ptx.cluster_ctarank()) if cluster > 1 else int32(0)
        if thread == 0:
            for s in range(stages):
                ptx.mbarrier_init(full + uint32(8 * s), uint32(1))
                ptx.mbarrier_init(empty + uint32(8 * s), uint32(warps * cluster))
            ptx.fence_mbarrier_init()
        cuda.syncthreads()
        if cluster > 1:
            ptx.barrier_cluster_arrive()
            ptx.barrier_cluster_wait()
        ptx.griddepcontrol_launch_dependents()
        half = weight_rows // halves
        down = (count + tokens * token_tiles - 1) // (tokens * token_tiles)
        wide = (half + kept_rows * row_tiles - 1) // (kept_rows * row_tiles)
        stage_count = depth // (boxes * BOX)
        tile = int32(cuda.blockIdx.x) // cluster
        step = int32(cuda.gridDim.x) // cluster

        if warp == warps:
            if lane == 0:
                # Read by one tile of tokens alone, a weight need not stay in L2.
                policy = uint64(ptx.EVICT_FIRST) if down == 1 else uint64(ptx.EVICT_NORMAL)
                # The first stages of weights need nothing of the kernels ahead.
                m, n = place(tile, group, down, wide, rank)
                early = min(stage_count, int32(stages))
                for k in range(early):
                    copy_weight(
                        weight, ring + uint32(k * stage_bytes), full + uint32(8 * k), n, k, rank, half, policy
                    )
                ptx.griddepcontrol_wait()
                for k in range(early):
                    copy_tokens(x, ring + uint32(k * stage_bytes), full + uint32(8 * k), m, k, rank)
                stage, parity = early, uint32(1)
                if stage == stages:
                    stage, parity = int32(0), uint32(0)
                begin = early
                while tile < down * wide:
                    m, n = place(tile, group, down, wide, rank)
                    for k in range(begin, stage_count):
                        while ptx.mbarrier_try_wait(empty + uint32(8 * stage), parity) == 0:
                            pass
                        stage_at, barrier = ring + uint32(stage * stage_bytes), full + uint32(8 * stage)
                        copy_weight(weight, stage_at, barrier, n, k, rank, half, policy)
                        copy_tokens(x, stage_at, barrier, m, k, rank)
                        stage += int32(1)
                        if stage == stages:
                            stage, parity = int32(0), parity ^ uint32(1)
                    begin = int32(0)
                    tile += step
            ptx.bar_warp_sync()
        else:
            warpgroup = warp >> 2
            own_down, own_across = warpgroup // across, warpgroup % across
            a_place = uint32(boxes * weight_bytes + own_down * 8192)
            b_place = uint32(own_across * own_rows * 128)
            own_staging = staging + uint32(warp * STAGING)
            own_token = own_down * 64 + (warp & 3) * 16
            own_column = own_across * part_rows
            acc = cuda.local.array(accumulators, float32)
            stage, parity = int32(0), uint32(0)
            while tile < down * wide:
                for i in range(accumulators):
                    acc[i] = float32(0.0)
                previous = int32(-1)
                for _ in range(stage_count):
                    while ptx.mbarrier_try_wait(full + uint32(8 * stage), parity) == 0:
                        pass
                    stage_at = ring + uint32(stage * stage_bytes)
                    a = ptx.wgmma_descriptor(stage_at + a_place, uint32(16), uint32(1024))
                    b = ptx.wgmma_descriptor(stage_at + b_place, uint32(16), uint32(1024))
                    keep(acc)
                    ptx.wgmma_fence()
                    for h in range(boxes):
                        for i in range(4):
                            multiply(
                                acc,
                                a + uint64((h * token_bytes + i * 32) >> 4),
                                b + uint64((h * weight_bytes + i * 32) >> 4),
                                uint32(1),
                            )
                    ptx.wgmma_commit_group()
                    # While these multiply, those before them are done: their stage may be filled again.
                    all_but_one()
                    if previous >= 0:
                        release(empty + uint32(8 * previous), lane)
                    previous = stage
                    stage += int32(1)
                    if stage == stages:
                        stage, parity = int32(0), parity ^ uint32(1)
                all_done()
                keep(acc)
                release(empty + uint32(8 * previous), lane)
                m, n = place(tile, group, down, wide, rank)
                write(
                    acc, own_staging, lane, out, m * tokens + own_token, n * kept_rows + own_column, count, half
                )
                tile += step
        if cluster > 1:
            # A block stays as long as others copy to it or arrive at its barriers.
            ptx.barrier_cluster_arrive()
            ptx.barrier_cluster_wait()

    raise NotImplementedError
