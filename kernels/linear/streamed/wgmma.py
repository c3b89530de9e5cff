"""Consumers by wgmma (sm_90a): each warpgroup multiplies all weight rows of the block by 64 tokens."""

from __future__ import annotations

from collections.abc import Callable

from kernels import device, ptx
from kernels.cuda import cuda, device_function, float32, int32, int64, uint32, uint64
from kernels.linear.streamed.tiling import Tiling
from kernels.ring import ring


def consumer(dtype: str, tiling: Tiling, gated: bool) -> Callable[..., None]:
    """`consume(out, ring_at, taken, columns, depth, work, warp, lane)`: multiply what the ring brings, write out.

    Arguments as those of the producer.
    """
    pack, rounded = device.HALVES[dtype].pack, device.HALVES[dtype].rounded
    stages, stage_bytes, boxes, box_bytes = tiling.stages, tiling.stage_bytes, tiling.boxes, tiling.box_bytes
    token_bytes, own_boxes, segments = tiling.token_bytes, tiling.own_boxes, tiling.segments
    own_columns = tiling.columns(gated)
    wide = tiling.groups * 8  # weight rows of an instruction
    accumulators = wide // 2  # of a segment
    second_accumulators = accumulators if segments > 1 else 1
    multiply = device.HALVES[dtype].wgmma(wide)
    keep, keep_second = ptx.keep_f32(accumulators), ptx.keep_f32(second_accumulators)
    one_unfinished, none_unfinished = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)
    wait, release, advance, _ = ring(stages)

    @device_function
    def issue(acc, second, stage_at, token_place):
        """The products of a stage, as one group; `second`: of the second segment, where there is one."""
        ptx.wgmma_fence()
        for h in range(boxes):
            tokens_at = stage_at + token_place + uint32(h * token_bytes)
            a = ptx.wgmma_descriptor(tokens_at, uint32(16), uint32(1024))
            b = ptx.wgmma_descriptor(stage_at + uint32(h * box_bytes), uint32(16), uint32(1024))
            for i in range(4):
                if h < own_boxes:
                    multiply(acc, a + uint64(2 * i), b + uint64(2 * i), uint32(1))
                else:
                    multiply(second, a + uint64(2 * i), b + uint64(2 * i), uint32(1))
        ptx.wgmma_commit_group()

    @device_function
    def epilogue(acc, out, block, taken, columns, warp, lane):
        """taken: the pass's first token and how many there are."""
        first, here = taken
        for i in range(wide // 8):
            column = block * own_columns + (i * 4 + (lane & 3) if gated else i * 8 + (lane & 3) * 2)
            for upper in range(2):  # rows r and r + 8 of a warp's 16
                token = (warp >> 2) * 64 + (warp & 3) * 16 + upper * 8 + (lane >> 2)
                c = 4 * i + 2 * upper
                if column < columns and token < here:
                    place = int64(first + token) * columns + column
                    if gated:  # a thread has gate and up of an output
                        out[place] = rounded(ptx.mul_rn_f32(device.silu(acc[c]), acc[c + 1]))
                    else:
                        ptx.st_global_b32(out, place, pack(acc[c + 1], acc[c]))

    @device_function
    def consume(out, ring_at, taken, columns, depth, work, warp, lane):
        blocks, stage_count = work
        full = ring_at + uint32(stages * stage_bytes)
        empty = full + uint32(8 * stages)
        block = int32(cuda.blockIdx.x)
        acc = cuda.local.array(accumulators, float32)
        second = cuda.local.array(second_accumulators, float32)
        token_place = uint32(boxes * box_bytes + (warp >> 2) * 8192)
        stage, parity, previous = int32(0), uint32(0), int32(0)
        while block < blocks:
            for i in range(accumulators):
                acc[i] = float32(0.0)
            for i in range(second_accumulators):
                second[i] = float32(0.0)
            keep(acc)
            if segments > 1:
                keep_second(second)
            for k in range(stage_count):
                wait(full, stage, parity)
                issue(acc, second, ring_at + uint32(stage * stage_bytes), token_place)
                # While these multiply, those before them are done: their stage may be filled again.
                one_unfinished()
                if k > 0:
                    release(empty, previous, lane)
                previous = stage
                stage, parity = advance(stage, parity)
            none_unfinished()
            keep(acc)
            release(empty, previous, lane)
            if segments > 1:
                keep_second(second)
                for i in range(accumulators):
                    acc[i] = ptx.add_rn_f32(acc[i], second[i])
            epilogue(acc, out, block, taken, columns, warp, lane)
            block += int32(cuda.gridDim.x)

    return consume
