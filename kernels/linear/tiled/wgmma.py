"""Prefill GEMM by wgmma (sm_90a): persistent blocks, a producer warp with tensor maps, consumer warpgroups.

    producer       tile 0 stages, tile 1 stages, …   as far ahead as the ring holds
    warpgroup 0    multiply tile 0 | epilogue 0      | multiply tile 2 | …
    warpgroup 1                      multiply tile 1 | epilogue 1      | …

So with ping-pong (`turns` 2); else both warpgroups multiply the same tile, 64 tokens each.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels import device, ptx
from kernels.cuda import cuda, device_function, float32, int32, uint8, uint16, uint32, uint64
from kernels.launch import Kernel, LaunchOptions, kernel_factory
from kernels.linear.tiled.epilogue import writer
from kernels.linear.tiled.raster import tile_at
from kernels.linear.tiled.tiling import STAGING, Tiling
from kernels.ring import ring
from kernels.tiles import BOX


@kernel_factory
def warpgroups(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """Tensor maps of weight [N, K] and x [T, K], out [T, N or N/2], T, N, K, group; grid (n,), n at most the tiles.

    dtype: "bf16" or "f16". gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    stages, turns, cluster, warps = tiling.stages, tiling.turns, tiling.cluster, tiling.warps
    turn_warps = warps // turns
    parts = 2 if gated else 1
    few_registers, many_registers = ptx.setmaxnreg_dec(40), ptx.setmaxnreg_inc(232)
    full_at = stages * tiling.stage_bytes + warps * STAGING
    extent = _extent(tiling, gated)
    produce, consume = _producer(tiling, gated), _consumer(dtype, tiling, gated)

    def linear(weight, x, out, count, weight_rows, depth, group):
        memory = cuda.shared.array(0, uint8)
        ring_at = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        full = ring_at + uint32(full_at)
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
        columns = weight_rows // parts
        work = extent(count, columns, depth)
        if warp >= warps:
            if turns > 1:
                few_registers()
            if warp == warps and lane == 0:
                produce(weight, x, ring_at, work, group, rank)
            ptx.bar_warp_sync()
        else:
            if turns > 1:
                many_registers()
            consume(out, ring_at, count, columns, work, group, warp, lane)
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


def _extent(tiling: Tiling, gated: bool) -> Callable[..., tuple[int, int, int]]:
    """A function of T, columns of out and K: tiles down, tiles across, stages of a tile."""
    tokens, cluster, stage_columns = tiling.tokens, tiling.cluster, tiling.columns
    tile_columns = tiling.rows // (2 if gated else 1)

    @device_function
    def extent(count, columns, depth):
        down, wide = (count + (tokens - 1)) // tokens, (columns + (tile_columns - 1)) // tile_columns
        if cluster > 1:
            down = (down + (cluster - 1)) // cluster * cluster
        # The last stage of an odd number of boxes ends in zeros, which change no sum.
        return down, wide, (depth + (stage_columns - 1)) // stage_columns

    return extent


def _producer(tiling: Tiling, gated: bool) -> Callable[..., None]:
    """`produce(weight, x, ring_at, work, group, rank)`, by one lane: fill the ring for all tiles of the block.

    work: of `_extent`. rank: of the block in its cluster.
    """
    tokens, rows, stages, stage_bytes, cluster = (
        tiling.tokens, tiling.rows, tiling.stages, tiling.stage_bytes, tiling.cluster,
    )  # fmt: skip
    boxes = tiling.columns // BOX
    # Boxes that the weights of 64 columns come in: gates and ups, or what each block of a cluster copies for both.
    parts = max(2 if gated else 1, cluster)
    part_rows = rows // parts
    weight_bytes, token_bytes = rows * 128, tokens * 128
    full_at = stages * stage_bytes + tiling.warps * STAGING
    wait, _, advance, after = ring(stages)

    @device_function
    def copy_weight(weight, stage_at, barrier, n, k, rank, policy):
        ptx.mbarrier_arrive_expect_tx(barrier, uint32(stage_bytes))
        for h in range(boxes):
            box, group = int32(k * boxes + h), int32(n * (rows // 8))
            if cluster > 1:
                place = uint32(h * weight_bytes + rank * part_rows * 128)
                part = int32(rank if gated else 0)
                group += int32(0 if gated else rank * (part_rows // 8))
                ptx.cp_async_bulk_weight_multicast(
                    stage_at + place, weight, 0, barrier, part, group, box, uint16((1 << cluster) - 1), policy
                )
            else:
                for part in range(parts):
                    place = uint32(h * weight_bytes + part * part_rows * 128)
                    ptx.cp_async_bulk_weight(stage_at + place, weight, 0, barrier, int32(part), group, box, policy)

    @device_function
    def copy_tokens(x, stage_at, barrier, m, k, policy):
        for h in range(boxes):
            place = uint32(boxes * weight_bytes + h * token_bytes)
            column, row = int32((k * boxes + h) * BOX), int32(m * tokens)
            ptx.cp_async_bulk_tensor_2d(stage_at + place, x, 0, barrier, column, row, policy)

    @device_function
    def produce(weight, x, ring_at, work, group, rank):
        full = ring_at + uint32(full_at)
        empty = full + uint32(8 * stages)
        down, wide, stage_count = work
        tile, step = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        # Weights that one tile of tokens alone reads need not stay in L2.
        weight_policy, token_policy = uint64(ptx.EVICT_NORMAL), uint64(ptx.EVICT_NORMAL)
        if down == 1:
            weight_policy, token_policy = uint64(ptx.EVICT_FIRST), uint64(ptx.EVICT_LAST)
        # The first stages of weights need nothing of the kernels ahead.
        m, n = tile_at(tile, group, down, wide)
        early = min(stage_count, int32(stages))
        for k in range(early):
            stage_at, barrier = ring_at + uint32(k * stage_bytes), full + uint32(8 * k)
            copy_weight(weight, stage_at, barrier, n, k, rank, weight_policy)
        ptx.griddepcontrol_wait()
        for k in range(early):
            copy_tokens(x, ring_at + uint32(k * stage_bytes), full + uint32(8 * k), m, k, token_policy)
        stage, parity = after(early)
        begin = early
        while tile < down * wide:
            m, n = tile_at(tile, group, down, wide)
            for k in range(begin, stage_count):
                wait(empty, stage, parity)
                stage_at, barrier = ring_at + uint32(stage * stage_bytes), full + uint32(8 * stage)
                copy_weight(weight, stage_at, barrier, n, k, rank, weight_policy)
                copy_tokens(x, stage_at, barrier, m, k, token_policy)
                stage, parity = advance(stage, parity)
            begin = int32(0)
            tile = int32(tile + step)

    return produce


def _products(dtype: str, tiling: Tiling) -> tuple[Callable[..., tuple[int, int, int]], Callable[..., None]]:
    """Functions that add the products of some stages to a warpgroup's sums, and that wait for the last of them."""
    rows, stages, stage_bytes, cluster = tiling.rows, tiling.stages, tiling.stage_bytes, tiling.cluster
    boxes, weight_bytes, token_bytes = tiling.columns // BOX, rows * 128, tiling.tokens * 128
    full_at = stages * stage_bytes + tiling.warps * STAGING
    two = tiling.tokens // tiling.down == 128
    multiply = device.HALVES[dtype].wgmma(rows)
    keep, keep_upper = ptx.keep_f32(rows // 2), ptx.keep_f32(rows // 2 if two else 1)
    all_but_one, all_done = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)
    wait, _, advance, _ = ring(stages)

    @device_function
    def release(empty, stage, lane):
        """Tell every block that copies to this stage that a warp is done with it."""
        barrier = empty + uint32(8 * stage)
        if cluster > 1:
            if lane < cluster:
                ptx.mbarrier_arrive_at(barrier, uint32(lane))
        elif lane == 0:
            ptx.mbarrier_arrive(barrier)

    @device_function
    def multiply_stages(acc, upper, ring_at, a_place, stage, parity, count, lane):
        """Add the products of `count` stages from `stage` on, all stages but the last released; the next stage, its
        parity and the last one, whose products may be under way."""
        full = ring_at + uint32(full_at)
        empty = full + uint32(8 * stages)
        previous = int32(-1)
        for _ in range(count):
            wait(full, stage, parity)
            stage_at = ring_at + uint32(stage * stage_bytes)
            a = ptx.wgmma_descriptor(stage_at + a_place, uint32(16), uint32(1024))
            b = ptx.wgmma_descriptor(stage_at, uint32(16), uint32(1024))
            keep(acc)
            if two:
                keep_upper(upper)
            ptx.wgmma_fence()
            for h in range(boxes):
                for i in range(4):
                    a_step = a + uint64((h * token_bytes + i * 32) >> 4)
                    b_step = b + uint64((h * weight_bytes + i * 32) >> 4)
                    multiply(acc, a_step, b_step, uint32(1))
                    if two:
                        multiply(upper, a_step + uint64(8192 >> 4), b_step, uint32(1))
            ptx.wgmma_commit_group()
            # While these multiply, those before them are done: their stage may be filled again.
            all_but_one()
            if previous >= 0:
                release(empty, previous, lane)
            previous = stage
            stage, parity = advance(stage, parity)
        return stage, parity, previous

    @device_function
    def finish(acc, upper, ring_at, previous, lane):
        """Wait for the last products; their stage may be filled again."""
        all_done()
        keep(acc)
        if two:
            keep_upper(upper)
        release(ring_at + uint32(full_at + 8 * stages), previous, lane)

    return multiply_stages, finish


def _consumer(dtype: str, tiling: Tiling, gated: bool) -> Callable[..., None]:
    """`consume(out, ring_at, count, columns, work, group, warp, lane)`: every tile that falls to a warpgroup."""
    tokens, rows, stages, down_parts, turns = tiling.tokens, tiling.rows, tiling.stages, tiling.down, tiling.turns
    segments, turn_warps = tiling.segments, tiling.warps // tiling.turns
    staging_at, a_at = stages * tiling.stage_bytes, tiling.columns // BOX * rows * 128
    tile_columns = rows // (2 if gated else 1)
    # A warpgroup multiplies 64 tokens at a time: all of its part, or the lower and the upper 64 of it.
    two = tokens // down_parts == 128
    accumulators = rows // 2
    upper_accumulators = accumulators if two else 1
    first_accumulators = accumulators if segments > 1 else 1
    first_upper_accumulators = upper_accumulators if segments > 1 else 1
    multiply_stages, finish = _products(dtype, tiling)
    write = writer(dtype, 1, rows // 8, gated)

    @device_function
    def set_aside(first, acc, count):
        """A segment's sums, and zeros in their place."""
        for i in range(count):
            first[i], acc[i] = acc[i], float32(0.0)

    @device_function
    def add(acc, first, count):
        for i in range(count):
            acc[i] = ptx.add_rn_f32(first[i], acc[i])

    @device_function
    def skip(stage, parity, others):
        """The place in the ring `others` stages on."""
        stage = int32(stage + others)
        parity ^= uint32(stage // stages) & uint32(1)
        return int32(stage % stages), parity

    @device_function
    def consume(out, ring_at, count, columns, work, group, warp, lane):
        down, wide, stage_count = work
        tile, step = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        turn, own_down = (warp >> 2) // down_parts, (warp >> 2) % down_parts
        a_place = uint32(a_at + own_down * 8192)
        own_staging = ring_at + uint32(staging_at) + uint32(warp * STAGING)
        own_token = own_down * 64 + (warp & 3) * 16
        acc = cuda.local.array(accumulators, float32)
        upper = cuda.local.array(upper_accumulators, float32)
        first = cuda.local.array(first_accumulators, float32)
        first_upper = cuda.local.array(first_upper_accumulators, float32)
        tile = int32(tile + turn * step)
        stage, parity = int32(0), uint32(0)
        others = int32(turn * stage_count)
        while tile < down * wide:
            for i in range(accumulators):
                acc[i] = float32(0.0)
            if two:
                for i in range(accumulators):
                    upper[i] = float32(0.0)
            if turns > 1:
                # Ping-pong: past the ring slots of the other warpgroups' tiles, after the warpgroup before this one has
                # seen its own full: of an earlier round of the ring, a barrier's parity would say nothing.
                stage, parity = skip(stage, parity, others)
                others = int32((turns - 1) * stage_count)
                if tile >= step:
                    ptx.bar_sync(uint32(1 + turn), uint32(64 * turn_warps))
            for segment in range(segments):
                if segment > 0:
                    set_aside(first, acc, first_accumulators)
                    if two:
                        set_aside(first_upper, upper, first_upper_accumulators)
                stage, parity, previous = multiply_stages(
                    acc, upper, ring_at, a_place, stage, parity, stage_count // segments, lane
                )
                if turns > 1 and segment == segments - 1 and tile + step < down * wide:
                    ptx.bar_arrive(uint32(1 + (turn + 1) % turns), uint32(64 * turn_warps))
                finish(acc, upper, ring_at, previous, lane)
            if segments > 1:
                add(acc, first, first_accumulators)
                if two:
                    add(upper, first_upper, first_upper_accumulators)
            m, n = tile_at(tile, group, down, wide)
            write(acc, own_staging, lane, out, m * tokens + own_token, n * tile_columns, count, columns)
            if two:
                write(upper, own_staging, lane, out, m * tokens + own_token + 64, n * tile_columns, count, columns)
            tile = int32(tile + turns * step)

    return consume
