"""The producer warp: weight rows and token rows to the stages of the ring, in the 128-byte swizzle."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.cuda import cuda, device_function, int32, int64, uint32, uint64
from kernels.linear.streamed.tiling import Tiling
from kernels.ring import ring
from kernels.tiles import BOX


def producer(tiling: Tiling, gated: bool) -> Callable[..., None]:
    """`produce(weight, x, ring_at, taken, columns, depth, work, lane)`: fill the ring for all that the block owns.

    weight, x: tensor maps, or with copy "async" the tensors. ring_at: shared address of the first stage. taken: the
    pass's first token and how many there are. columns: of out. work: how many blocks own the weight, stages of K.
    """
    stages, stage_bytes, bulk = tiling.stages, tiling.stage_bytes, tiling.copy == "bulk"
    boxes, own_boxes = tiling.boxes, tiling.own_boxes
    box_bytes, token_bytes, groups = tiling.box_bytes, tiling.token_bytes, tiling.groups
    parts, segments = 2 if gated else 1, tiling.segments
    wait, _, advance, after = ring(stages, bulk)

    @device_function
    def box_of(segment, k, depth):
        """First box of a segment in stage k: a segment's boxes of all stages are neighbours."""
        return int32(segment * (depth // (2 * BOX)) + k * own_boxes)

    @device_function
    def copy_weight(weight, target, barrier, block, k, lane, columns, depth):
        if bulk:
            if lane == 0:
                ptx.mbarrier_arrive_expect_tx(barrier, uint32(stage_bytes))
                for s in range(segments):
                    ptx.cp_async_bulk_weight(
                        target + uint32(s * own_boxes * box_bytes), weight, 0, barrier, int32(0),
                        int32(block * groups), box_of(s, k, depth), uint64(ptx.EVICT_FIRST),
                    )  # fmt: skip
        else:
            for h in range(boxes):
                box = box_of(h // own_boxes, k, depth) + h % own_boxes
                for i in range(lane, groups * 64, 32):
                    row, chunk = i >> 3, i & 7
                    # As `boxes_of` has them: gate and up of an output are neighbours.
                    part, output = row % parts, min((block * groups * 8 + row) // parts, columns - 1)
                    source = int64(part * columns + output) * depth + box * BOX
                    place = uint32(h * box_bytes + row * 128 + ((chunk ^ (row & 7)) * 16))
                    ptx.cp_async_cg_16(target + place, weight, source + chunk * 8)

    @device_function
    def copy_tokens(x, target, barrier, first, k, lane, here, depth):
        if bulk:
            if lane == 0:
                for s in range(segments):
                    ptx.cp_async_bulk_tensor_3d(
                        target + uint32(boxes * box_bytes + s * own_boxes * token_bytes), x, 0, barrier,
                        int32(0), int32(first), box_of(s, k, depth), uint64(ptx.EVICT_LAST),
                    )  # fmt: skip
        else:
            for h in range(boxes):
                for i in range(lane, here * 8, 32):
                    row, chunk = i >> 3, i & 7
                    place = uint32(boxes * box_bytes + h * token_bytes + row * 128 + ((chunk ^ (row & 7)) * 16))
                    source = int64(first + row) * depth + (box_of(h // own_boxes, k, depth) + h % own_boxes) * BOX
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
