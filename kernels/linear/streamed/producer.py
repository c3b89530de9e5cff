"""The producer warp: weight rows and token rows to the stages of the ring, in the 128-byte swizzle."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.cuda import cuda, device_function, int32, int64, uint32, uint64
from kernels.linear.streamed.tiling import BOX, Tiling
from kernels.ring import ring


def producer(tiling: Tiling, gated: bool) -> Callable[..., None]:
    """`produce(weight, x, ring_at, taken, columns, depth, work, lane)`: fill the ring for all that the block owns.

    weight, x: tensor maps, or with copy "async" the tensors. ring_at: shared address of the first stage. taken: the
    pass's first token and how many there are. columns: of out. work: how many blocks own the weight, stages of K.
    """
    stages, stage_bytes, bulk = tiling.stages, tiling.stage_bytes, tiling.copy == "bulk"
    boxes, own_boxes = tiling.boxes, tiling.own_boxes
    box_bytes, token_bytes = tiling.box_bytes, tiling.token_bytes
    parts, part_rows, part_bytes = tiling.parts(gated)
    wait, _, advance, after = ring(stages, bulk)

    @device_function
    def column_of(k, h, depth):
        """First column of box h of stage k: a segment's boxes of all stages are neighbours."""
        return int32(h // own_boxes * (depth >> 1) + k * (own_boxes * BOX) + h % own_boxes * BOX)

    @device_function
    def copy_weight(weight, target, barrier, block, k, lane, columns, depth):
        if bulk:
            if lane == 0:
                ptx.mbarrier_arrive_expect_tx(barrier, uint32(boxes * (parts * part_rows * 128 + token_bytes)))
                for h in range(boxes):
                    for part in range(parts):
                        ptx.cp_async_bulk_tensor_2d(
                            target + uint32(h * box_bytes + part * part_bytes), weight, 0, barrier,
                            column_of(k, h, depth), int32(part * columns + block * part_rows), uint64(ptx.EVICT_FIRST),
                        )  # fmt: skip
        else:
            for h in range(boxes):
                for part in range(parts):
                    for i in range(lane, part_rows * 8, 32):
                        row, chunk = i >> 3, i & 7
                        source = int64(part * columns + min(block * part_rows + row, columns - 1)) * depth
                        place = uint32(h * box_bytes + part * part_bytes + row * 128 + ((chunk ^ (row & 7)) * 16))
                        ptx.cp_async_cg_16(target + place, weight, source + column_of(k, h, depth) + chunk * 8)

    @device_function
    def copy_tokens(x, target, barrier, first, k, lane, here, depth):
        if bulk:
            if lane == 0:
                for h in range(boxes):
                    ptx.cp_async_bulk_tensor_2d(
                        target + uint32(boxes * box_bytes + h * token_bytes), x, 0, barrier,
                        column_of(k, h, depth), int32(first), uint64(ptx.EVICT_LAST),
                    )  # fmt: skip
        else:
            for h in range(boxes):
                for i in range(lane, here * 8, 32):
                    row, chunk = i >> 3, i & 7
                    place = uint32(boxes * box_bytes + h * token_bytes + row * 128 + ((chunk ^ (row & 7)) * 16))
                    source = int64(first + row) * depth + column_of(k, h, depth)
                    ptx.cp_async_cg_16(target + place, x, source + chunk * 8)
            ptx.cp_async_mbarrier_arrive(barrier)

    @device_function
    def produce(weight, x, ring_at, taken, columns, depth, work, lane):
        first, here = taken
        blocks, stage_count = work
        full = ring_at + uint32(stages * stage_bytes)
        empty = full + uint32(8 * stages)
        block = int32(cuda.blockIdx.x)
        # The first stages of weights need nothing of the kernels ahead.
        early = min(stage_count, int32(stages))
        for k in range(early):
            target, barrier = ring_at + uint32(k * stage_bytes), full + uint32(8 * k)
            copy_weight(weight, target, barrier, block, k, lane, columns, depth)
        ptx.griddepcontrol_wait()
        for k in range(early):
            target, barrier = ring_at + uint32(k * stage_bytes), full + uint32(8 * k)
            copy_tokens(x, target, barrier, first, k, lane, here, depth)
        stage, parity = after(early)
        begin = early
        while block < blocks:
            for k in range(begin, stage_count):
                wait(empty, stage, parity)
                target, barrier = ring_at + uint32(stage * stage_bytes), full + uint32(8 * stage)
                copy_weight(weight, target, barrier, block, k, lane, columns, depth)
                copy_tokens(x, target, barrier, first, k, lane, here, depth)
                stage, parity = advance(stage, parity)
            begin = int32(0)
            block += int32(cuda.gridDim.x)

    return produce
