"""Reading memory once, as fast as it comes: the ceiling of what only reads, as decode steps do.

| version | what it does |
|---|---|
| vectors | every thread loads 16 bytes at a time, several under way |
| bulk | sm_90 and later: a producer keeps a ring of bulk copies under way in each multiprocessor |

On an H200 the ring reads 4.6 to 4.7 TB/s where `torch.sum` reads 4.35 and a copy, which writes half of it, 4.0 to 4.3.
What was read is summed by exclusive or, so that it can be compared.
"""

from __future__ import annotations

import torch

from kernels import check, ptx
from kernels.cuda import cuda, device_function, int32, int64, uint8, uint32
from kernels.launch import Kernel, kernel_factory, machine_of
from kernels.ring import ring

WARPS = 4  # that add what has arrived
UNROLLED = 8  # loads of a thread that are under way
STAGES = 12
STAGE = 16 << 10  # bytes
SHARING = 8  # blocks of `vectors` in a multiprocessor, which hide each other's waiting


def reference(source: torch.Tensor) -> torch.Tensor:
    """int32 [4]: the exclusive or of all 16-byte words of source, on the CPU."""
    words = source.cpu().reshape(-1).view(torch.int32).view(-1, 4)
    while len(words) > 1:
        half = len(words) // 2
        words = torch.cat([words[:half] ^ words[half : 2 * half], words[2 * half :]])
    return words[0]


@device_function
def fold(sums, loaded):
    for i in range(4):
        sums[i] ^= loaded[i]


@kernel_factory
def vectors() -> Kernel:
    """source of 16-byte words, out int32 [blocks, 128, 4], the number of words; grid (any,)."""
    threads = 32 * WARPS

    def read(source, out, count):
        sums = cuda.local.array(4, uint32)
        for i in range(4):
            sums[i] = uint32(0)
        step = int64(cuda.gridDim.x) * threads
        own = int64(cuda.blockIdx.x) * threads + cuda.threadIdx.x
        at = own
        while at + (UNROLLED - 1) * step < count:
            for u in range(UNROLLED):
                fold(sums, ptx.ld_global_v4(source, (at + u * step) * 4))
            at += UNROLLED * step
        while at < count:
            fold(sums, ptx.ld_global_v4(source, at * 4))
            at += step
        ptx.st_global_v4(out, own * 4, sums[0], sums[1], sums[2], sums[3])

    return Kernel("read_vectors", read, ("i32*", "i32*", "i64"), threads)


@kernel_factory
def bulk(stages: int = STAGES, stage_bytes: int = STAGE) -> Kernel:
    """source, out int32 [blocks, 128, 4], the number of whole stages in source; grid (any,)."""
    wait, release, advance, _ = ring(stages)
    words = stage_bytes // (16 * 32 * WARPS)  # of a thread in a stage

    def read(source, out, count):
        memory = cuda.shared.array(0, uint8)
        ring_at = (ptx.shared_address(memory) + uint32(127)) & uint32(0xFFFFFF80)
        full = ring_at + uint32(stages * stage_bytes)
        empty = full + uint32(8 * stages)
        thread = int32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        if thread == 0:
            for s in range(stages):
                ptx.mbarrier_init(full + uint32(8 * s), uint32(1))
                ptx.mbarrier_init(empty + uint32(8 * s), uint32(WARPS))
            ptx.fence_mbarrier_init()
        cuda.syncthreads()
        piece = int64(cuda.blockIdx.x)
        stage = int32(0)
        if warp == WARPS:
            parity = uint32(1)
            while piece < count and lane == 0:
                wait(empty, stage, parity)
                barrier = full + uint32(8 * stage)
                ptx.mbarrier_arrive_expect_tx(barrier, uint32(stage_bytes))
                place = ring_at + uint32(stage * stage_bytes)
                ptx.cp_async_bulk(place, source, piece * (stage_bytes // 4), uint32(stage_bytes), barrier)
                stage, parity = advance(stage, parity)
                piece += cuda.gridDim.x
            ptx.bar_warp_sync()
        else:
            parity = uint32(0)
            sums = cuda.local.array(4, uint32)
            for i in range(4):
                sums[i] = uint32(0)
            while piece < count:
                wait(full, stage, parity)
                place = ring_at + uint32(stage * stage_bytes + thread * 16)
                for w in range(words):
                    fold(sums, ptx.ld_shared_v4(place + uint32(w * 512 * WARPS)))
                ptx.bar_warp_sync()
                release(empty, stage, lane)
                stage, parity = advance(stage, parity)
                piece += cuda.gridDim.x
            own = int64(cuda.blockIdx.x) * (32 * WARPS) + thread
            ptx.st_global_v4(out, own * 4, sums[0], sums[1], sums[2], sums[3])

    return Kernel(
        f"read_bulk_s{stages}x{stage_bytes}", read, ("i32*", "i32*", "i64"), 32 * (WARPS + 1),
        dynamic_shared=128 + stages * (stage_bytes + 16), blocks_per_sm=1, architectures=("sm_90a", "sm_100"),
    )  # fmt: skip


def blocks(device: int) -> int:
    """As many as read a GPU's memory fastest: a ring has a multiprocessor of its own, loads by vectors share it."""
    arch, multiprocessors = machine_of(device)
    return multiprocessors if arch in bulk().architectures else SHARING * multiprocessors


def read(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Read source once, by as many blocks as out has; `reference` of out is then that of source.

    source int32 [n], contiguous, a multiple of 16 KB; out int32 [blocks, 128, 4]. Returns out.
    Raises TypeError or ValueError where something does not fit.
    """
    check.tensor("read", "source", source, (source.numel(),), torch.int32)
    check.tensor("read", "out", out, (len(out), 32 * WARPS, 4), torch.int32)
    check.aligned("read", "source", source)
    if source.numel() % (STAGE // 4):
        raise ValueError(f"read: source has {source.numel() * 4} bytes: a multiple of {STAGE} needed")
    arch, _ = machine_of(max(source.get_device(), 0))
    if arch in bulk().architectures:
        bulk().launch((len(out),), source, out, source.numel() * 4 // STAGE)
    else:
        vectors().launch((len(out),), source, out, source.numel() // 4)
    return out
