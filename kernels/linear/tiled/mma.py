"""Prefill GEMM by mma.sync (sm_80 and later): all warps copy by cp.async and multiply; a tile a block."""

from __future__ import annotations

from collections.abc import Callable

from kernels import device, ptx
from kernels.cuda import cuda, device_function, float32, int32, int64, uint8, uint32
from kernels.launch import Kernel, LaunchOptions, kernel_factory
from kernels.linear.tiled.epilogue import writer
from kernels.linear.tiled.raster import tile_at
from kernels.linear.tiled.tiling import STAGING, Tiling


@kernel_factory
def warps(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """weight [N, K], x [T, K], out [T, N or N/2], T, N, K, group; grid (tiles,).

    dtype: "bf16" or "f16". gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    tokens, rows, stage_columns, stages = tiling.tokens, tiling.rows, tiling.columns, tiling.stages
    across, stage_bytes, segments = tiling.across, tiling.stage_bytes, tiling.segments
    parts = 2 if gated else 1
    tile_columns = rows // parts
    own_tokens, own_rows = tokens // tiling.down, rows // across  # of a warp
    fragments = own_rows // 8
    own_columns = fragments // parts * 8
    row_bytes, token_bytes = stage_columns * 2, tokens * stage_columns * 2
    accumulators = own_tokens // 16 * fragments * 4
    first_accumulators = accumulators if segments > 1 else 1
    landed = ptx.cp_async_wait_group(stages - 2)
    swizzled = _swizzle(tiling)
    copy_weight, copy_tokens = _copies(tiling, gated)
    multiply_stage = _products(dtype, tiling, gated)
    write = writer(dtype, own_tokens // 16, fragments, gated)

    def linear(weight, x, out, count, weight_rows, depth, group):
        memory = cuda.shared.array(0, uint8)
        ring_at = ptx.shared_address(memory)
        thread = int32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        columns = weight_rows // parts
        down, wide = (count + tokens - 1) // tokens, (columns + tile_columns - 1) // tile_columns
        stage_count = depth // stage_columns
        m, n = tile_at(int32(cuda.blockIdx.x), group, down, wide)
        first_token, first_column = m * tokens, n * tile_columns
        ptx.griddepcontrol_launch_dependents()

        # The first stages of weights need nothing of the kernels ahead.
        for s in range(stages - 1):
            if s < stage_count:
                copy_weight(weight, ring_at + uint32(s * stage_bytes), first_column, s, thread, columns, depth)
        ptx.griddepcontrol_wait()
        for s in range(stages - 1):
            if s < stage_count:
                copy_tokens(x, ring_at + uint32(s * stage_bytes), first_token, s, thread, count, depth)
            ptx.cp_async_commit_group()

        own_down, own_across = warp // across, warp % across
        a_row, b_row = lane & 15, (lane & 7) + (lane >> 4) * 8
        a_chunk, b_chunk, swizzle = lane >> 4, lane >> 3 & 1, swizzled(lane & 7, 0) >> 4
        a_place = uint32((own_down * own_tokens + a_row) * row_bytes)
        b_place = uint32(token_bytes + (own_across * own_columns + b_row) * row_bytes)
        acc = cuda.local.array(accumulators, float32)
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
                free_at = ring_at + uint32(free * stage_bytes)
                copy_weight(weight, free_at, first_column, following, thread, columns, depth)
                copy_tokens(x, free_at, first_token, following, thread, count, depth)
            ptx.cp_async_commit_group()
            stage_at = ring_at + uint32(stage * stage_bytes)
            multiply_stage(acc, stage_at + a_place, stage_at + b_place, a_chunk, b_chunk, swizzle)
            free = stage
            stage = stage + int32(1) if stage + 1 < stages else int32(0)
        if segments > 1:
            for i in range(first_accumulators):
                acc[i] = ptx.add_rn_f32(first[i], acc[i])
        cuda.syncthreads()
        write(
            acc, ring_at + uint32(warp * STAGING), lane, out, first_token + own_down * own_tokens,
            first_column + own_across * own_columns, count, columns,
        )  # fmt: skip

    name = f"linear_{'swiglu_' if gated else ''}tiled_{tiling.name}{device.HALVES[dtype].suffix}_{arch}"
    return Kernel(
        name, linear, (*(f"{dtype}*",) * 3, "i32", "i32", "i32", "i32"), tiling.threads,
        dynamic_shared=tiling.shared, blocks_per_sm=1,
        options=LaunchOptions(programmatic=True),
        architectures=(arch,), early=("weight",),
    )  # fmt: skip


def _swizzle(tiling: Tiling) -> Callable[..., int]:
    chunks = tiling.columns // 8  # of 16 bytes in a row of a stage

    @device_function
    def swizzled(row, chunk):
        """Bytes from a row's begin to a chunk: 8 rows have the same chunk in 8 different places of 128 bytes."""
        return (chunk ^ (row & 7 if chunks == 8 else row >> 1 & 3)) * 16

    return swizzled


def _copies(tiling: Tiling, gated: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that start copying a stage's weight rows, and its tokens: all threads, 16 bytes at a time."""
    tokens, rows, threads, stage_columns = tiling.tokens, tiling.rows, tiling.threads, tiling.columns
    chunks, tile_columns = stage_columns // 8, rows // (2 if gated else 1)
    row_bytes, token_bytes = stage_columns * 2, tokens * stage_columns * 2
    swizzled = _swizzle(tiling)

    @device_function
    def copy_weight(weight, stage_at, first, k, thread, columns, depth):
        for i in range(-(-rows * chunks // threads)):
            item = i * threads + thread
            row, chunk = item // chunks, item % chunks
            if rows * chunks % threads == 0 or item < rows * chunks:
                place = uint32(token_bytes + row * row_bytes + swizzled(row, chunk))
                source = int64(row // tile_columns * columns + min(first + row % tile_columns, columns - 1)) * depth
                ptx.cp_async_cg_16(stage_at + place, weight, source + k * stage_columns + chunk * 8)

    @device_function
    def copy_tokens(x, stage_at, first, k, thread, count, depth):
        for i in range(-(-tokens * chunks // threads)):
            item = i * threads + thread
            row, chunk = item // chunks, item % chunks
            if tokens * chunks % threads == 0 or item < tokens * chunks:
                place = uint32(row * row_bytes + swizzled(row, chunk))
                source = int64(min(first + row, count - 1)) * depth + k * stage_columns + chunk * 8
                ptx.cp_async_cg_16(stage_at + place, x, source)

    return copy_weight, copy_tokens


def _products(dtype: str, tiling: Tiling, gated: bool) -> Callable[..., None]:
    """A function that adds a stage's products to a warp's sums: the operands of a step arrive beside the products of
    the step before, in two sets of registers."""
    blocks, fragments = tiling.tokens // tiling.down // 16, tiling.rows // tiling.across // 8
    parts = 2 if gated else 1
    own_fragments, tile_columns = fragments // parts, tiling.rows // parts
    row_bytes, steps = tiling.columns * 2, tiling.columns // 16
    a_words, b_words = blocks * 4, fragments * 2
    two_a, two_b = 2 * a_words, 2 * b_words
    mma = device.HALVES[dtype].mma

    @device_function
    def load(operands, buffer, a_at, b_at, step, a_chunk, b_chunk, swizzle):
        """Operands of a step of 16 columns to registers."""
        a, b = operands
        a_place = uint32(((step * 2 + a_chunk) ^ swizzle) * 16)
        b_place = uint32(((step * 2 + b_chunk) ^ swizzle) * 16)
        for m in range(blocks):
            got = ptx.ldmatrix_x4(a_at + uint32(m * 16 * row_bytes) + a_place)
            for j in range(4):
                a[buffer * a_words + m * 4 + j] = got[j]
        for f in range(fragments // 2):
            # Of two fragments; ups lie half a tile behind the gates.
            row = (2 * f) // own_fragments * tile_columns + (2 * f) % own_fragments * 8
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

    @device_function
    def multiply_stage(acc, a_at, b_at, a_chunk, b_chunk, swizzle):
        """a_at, b_at: where the lane's rows of the stage's tokens and weights begin."""
        a = cuda.local.array(two_a, uint32)
        b = cuda.local.array(two_b, uint32)
        load((a, b), 0, a_at, b_at, 0, a_chunk, b_chunk, swizzle)
        for step in range(steps):
            if step + 1 < steps:
                load((a, b), (step + 1) % 2, a_at, b_at, step + 1, a_chunk, b_chunk, swizzle)
            multiply(acc, a, b, step % 2)

    return multiply_stage
