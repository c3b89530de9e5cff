"""The decode GEMM's kernel: one producer warp, consumers by warps or warpgroups."""

from __future__ import annotations

from kernels import device, ptx
from kernels.cuda import cuda, int32, uint8, uint32
from kernels.launch import Kernel, LaunchOptions, kernel_factory
from kernels.linear.streamed import mma, wgmma
from kernels.linear.streamed.producer import producer
from kernels.linear.streamed.tiling import Tiling
from kernels.tiles import BOX


@kernel_factory
def streamed(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """weight [N, K] and x [T, K] (bulk: their tensor maps), out [T, N or N/2], T, N, K; grid (n, ceil(T / tokens)).

    dtype: "bf16" or "f16". gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    tokens, stages, stage_bytes, warps = tiling.tokens, tiling.stages, tiling.stage_bytes, tiling.warps
    bulk = tiling.copy == "bulk"
    parts, own_columns = 2 if gated else 1, tiling.columns(gated)
    stage_columns = tiling.boxes * BOX
    produce = producer(tiling, gated)
    consume = (wgmma if tiling.wgmma else mma).consumer(dtype, tiling, gated)

    def linear(weight, x, out, count, rows, depth):
        memory = cuda.shared.array(0, uint8)
        ring_at = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        full = ring_at + uint32(stages * stage_bytes)
        empty = full + uint32(8 * stages)
        thread = int32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        if thread == 0:
            for s in range(stages):
                ptx.mbarrier_init(full + uint32(8 * s), uint32(1 if bulk else 32))
                ptx.mbarrier_init(empty + uint32(8 * s), uint32(warps))
            if bulk:
                ptx.fence_mbarrier_init()
        cuda.syncthreads()
        ptx.griddepcontrol_launch_dependents()
        first = int32(cuda.blockIdx.y) * tokens
        here = min(count - first, int32(tokens))
        columns = rows // parts
        work = (columns + own_columns - 1) // own_columns, depth // stage_columns
        if warp == warps:
            produce(weight, x, ring_at, (first, here), columns, depth, work, lane)
        else:
            consume(out, ring_at, (first, here), columns, depth, work, warp, lane)

    kind = f"{'swiglu_' if gated else ''}streamed_{tiling.copy}"
    name = f"linear_{kind}_{tiling.name}{device.HALVES[dtype].suffix}_{arch}"
    pointer = f"{dtype}*"
    source = "u8*" if bulk else pointer
    return Kernel(
        name, linear, (source, source, pointer, "i32", "i32", "i32"), tiling.threads, dynamic_shared=tiling.shared,
        blocks_per_sm=1, options=LaunchOptions(programmatic=True), architectures=(arch,), early=("weight",),
    )  # fmt: skip
