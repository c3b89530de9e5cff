"""Matrix product, version streamed: the weights flow once through a ring in shared memory; up to 128 tokens a pass.

One warp of a block copies, the others multiply. The block owns `groups` x 8 rows of the weight; a consumer warp owns
some of those groups for all tokens and walks K from 0 up. What it multiplies arrives in stages of `boxes` boxes of 64
columns, weight rows and token rows, both in the 128-byte swizzle.

    copy "bulk"    tensor maps and bulk copies, sm_90 and later: one lane asks for a whole box
    copy "async"   cp.async, sm_80 and later: a lane asks for 16 bytes
    wgmma          sm_90a, from 32 tokens on: warpgroups of 64 tokens multiply from shared memory; else warps multiply
                   from registers

In a chain of programmatic launches the ring fills with weights while the kernel ahead still runs: only the tokens wait.

Order of summation: m16n8k16 or m64k16 over K in order on one fp32 accumulator, rounded once to the dtype; where a
weight has few rows (`segments_of`), each half of K on its own and the second added to the first. It depends on the
weight's shape alone: tiles, tokens of a pass, depth of the ring, the way of copying and the instruction change no bit.
For `linear_swiglu` gate and up stay fp32 until silu(gate) * up is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels import check, device, ptx
from kernels.architectures import LIMITS, MULTIPROCESSORS, has_dependent_launch
from kernels.cuda import cuda, device_function, float32, int32, int64, uint8, uint32, uint64
from kernels.launch import Kernel, LaunchOptions, kernel_factory, machine_of
from kernels.tensor_maps import kept_tensor_map

BOX = 64  # columns of a box: 128 bytes
TOKENS = (8, 16, 32, 64, 128)
# Bytes of a block at most, so that the small kernels of a chain run beside it.
RING = 160 << 10
# Of wgmma with many tokens and few weight rows; what runs beside it waits for a free multiprocessor.
WIDE_RING = 208 << 10
# Bytes a stage should have at most: smaller ones cost more barriers, larger ones leave fewer in flight.
STAGE = 26 << 10
FEW_STAGE = 32 << 10


# Rows below which the chain of a block's dependent products takes longer than its weights take to arrive, and columns
# from which that matters.
FEW_ROWS, DEEP = 2304, 4096


def segments_of(rows: int, depth: int, gated: bool) -> int:
    """Parts of K, 1 or 2 halves, that the products with a weight [rows, depth] are summed in before these are added."""
    return 2 if not gated and rows <= FEW_ROWS and depth >= DEEP and depth % (2 * BOX) == 0 else 1


def tokens_of_a_pass(count: int) -> int:
    """The one of TOKENS that so many tokens are taken as; more than the last take several passes."""
    return next((size for size in TOKENS if count <= size), TOKENS[-1])


@dataclass(frozen=True)
class Tiling:
    """How a block works. tokens: of a pass. groups: of 8 weight rows a block owns at a time. each: groups a warp owns.
    split: warps that share a group's tokens. boxes: of 64 columns in a stage. stages: of the ring. batch, together:
    steps of 16 columns and tiles of 16 tokens whose operands a warp loads together. copy: "bulk" or "async". wgmma:
    whether warpgroups multiply, each all groups for 64 tokens; each, split, batch and together say nothing then.
    segments: parts of K that are summed apart, the boxes of a stage divided among them; each has warps of its own, or
    accumulators of a warpgroup's."""

    tokens: int
    groups: int
    each: int
    split: int
    boxes: int
    stages: int
    batch: int
    together: int
    copy: str
    wgmma: bool = False
    segments: int = 1

    @property
    def tiles(self) -> int:
        """Of 16 tokens that a warp owns."""
        return max(1, self.tokens // 16 // self.split)

    @property
    def warps(self) -> int:
        """That multiply; one more copies."""
        if self.wgmma:
            return 4 * -(-self.tokens // 64)
        return -(-self.groups // self.each) * self.split * self.segments

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    @property
    def box_bytes(self) -> int:
        """Of the weight rows of one box, at a multiple of 1024; gate and up rows are two halves, each at one."""
        return -(-self.groups * 1024 // 2048) * 2048

    @property
    def stage_bytes(self) -> int:
        return self.boxes * (self.box_bytes + self.tokens * 128)

    @property
    def shared(self) -> int:
        """Bytes of a block: the ring from a multiple of 1024 on, then two barriers a stage, then what the warps of the
        second half of K pass on; wgmma reads 64 tokens."""
        beyond = max(0, 64 - self.tokens) * 128 if self.wgmma else self.passed_bytes
        return 1024 + self.stages * (self.stage_bytes + 16) + beyond

    @property
    def passed_bytes(self) -> int:
        """Of a fragment of each warp of the second half."""
        return (self.segments - 1) * self.warps // self.segments * 512

    @staticmethod
    def choose(tokens: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int) -> Tiling:
        """For a pass of `tokens` tokens over a weight [rows, depth] on a GPU of so many multiprocessors.

        One pass of all blocks over the rows where a block can own its share, else the fewest equal passes.
        """
        bucket = tokens_of_a_pass(tokens)
        share = -(-rows // 8 // multiprocessors)
        passes = -(-share // (21 if bucket == 128 and arch != "sm_90a" else 28))
        groups = max(1, -(-rows // 8 // (multiprocessors * passes)))
        few, wgmma = groups <= 8, arch == "sm_90a" and (bucket >= 64 or (bucket == 32 and groups <= 16))
        # All measured on an H200. Of warps: one with more groups and tokens reads less of each, as far as registers go;
        # with few groups it takes several a group to keep up, and large stages, as each is a wait in the chain of sums.
        each, split, batch, stage, ring = 1, 1, 8, STAGE, RING
        if wgmma:
            # Tokens outweigh few weights: a deeper ring keeps enough of these on their way.
            stage = (2 if few else 1) * (groups * 1024 + bucket * 128 + 1024)
            ring = WIDE_RING if few and bucket > 64 else RING
        elif few:
            each, split = {8: (1, 1), 16: (1, 1), 32: (1, 2)}.get(bucket, (2, 2) if groups > 2 else (1, 4))
            batch, stage = {8: 32, 16: 32, 32: 8}.get(bucket, 4), FEW_STAGE if bucket <= 16 else STAGE // 2
        elif bucket > 16:
            wide = groups > 16
            each, split = (1 + wide, 1) if bucket == 32 else (3, 1 if wide else 2)
            batch = 4
        each = min(each, groups)
        budget = min(ring, LIMITS[arch].shared_block - 2048)
        copy = "bulk" if has_dependent_launch(arch) else "async"
        segments = segments_of(rows, depth, gated)
        tilings = [
            Tiling(bucket, groups, each, split, boxes, 0, min(boxes * 4 // segments, batch), 2, copy, wgmma, segments)
            for boxes in (8, 4, 2, 1)
            if depth % (boxes * BOX) == 0 and boxes % segments == 0
        ]
        if not tilings:
            raise ValueError(f"linear: a weight [{rows}, {depth}]: columns of {BOX} needed")
        tiling = next((tiling for tiling in tilings if tiling.stage_bytes <= stage), tilings[-1])
        stages = min(16, (budget - tiling.passed_bytes) // (tiling.stage_bytes + 16))
        if stages < 2:
            raise ValueError(f"linear: a weight [{rows}, {depth}] has no tiling for {tokens} tokens on {arch}")
        return replace(tiling, stages=stages)


@kernel_factory
def streamed(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    """weight [N, K] and x [T, K] (bulk: their tensor maps), out [T, N or N/2], T, N, K; grid (n, ceil(T / tokens)).

    dtype: "bf16" or "f16". gated: rows i and N/2 + i of the weight are gate and up of output i.
    """
    pack, rounded, mma = device.HALVES[dtype].pack, device.HALVES[dtype].rounded, device.HALVES[dtype].mma
    tokens, groups, each, boxes = tiling.tokens, tiling.groups, tiling.each, tiling.boxes
    stages, batch, warps, bulk = tiling.stages, tiling.batch, tiling.warps, tiling.copy == "bulk"
    box_bytes, stage_bytes, token_bytes = tiling.box_bytes, tiling.stage_bytes, tokens * 128
    split, tiles = tiling.split, tiling.tiles
    # Rows of a box's half: with gates a box is gate rows, then up rows.
    halves = 2 if gated else 1
    half_rows = groups * 8 // halves
    half_bytes = box_bytes // 2 if gated else box_bytes
    columns = boxes * BOX
    segments, own_boxes = tiling.segments, boxes // tiling.segments  # boxes of a stage that a segment has
    segment_warps = warps // segments
    steps = own_boxes * 4  # of a warp in a stage
    each_bytes = 512 if gated else 1024
    together = min(tiles, tiling.together)
    accumulators = each * tiles * 4
    weight_words, token_words = each * batch * 2, together * batch * (4 if tokens > 8 else 2)
    waits = ptx.mbarrier_try_wait if bulk else ptx.mbarrier_test_wait
    # Of wgmma: weight rows of an instruction, its accumulators, and those of gate and up.
    wide = -(-half_rows // 8) * 8
    part_accumulators = wide // 2
    warpgroups = tiling.wgmma
    second_accumulators = part_accumulators if segments > 1 else 1
    keep_second = ptx.keep_f32(second_accumulators)
    wgmma = device.HALVES[dtype].wgmma(min(wide, 256))
    keep = ptx.keep_f32(part_accumulators)
    one_unfinished, none_unfinished = ptx.wgmma_wait_group(1), ptx.wgmma_wait_group(0)

    @device_function
    def column_of(k, h, depth):
        """First column of box h of stage k: a segment's boxes of all stages are neighbours."""
        return int32(h // own_boxes * (depth >> 1) + k * (own_boxes * BOX) + h % own_boxes * BOX)

    @device_function
    def copy_weight(weight, target, barrier, block, k, lane, half, depth):
        if bulk:
            if lane == 0:
                ptx.mbarrier_arrive_expect_tx(barrier, uint32(boxes * (halves * half_rows * 128 + token_bytes)))
                for h in range(boxes):
                    for part in range(halves):
                        ptx.cp_async_bulk_tensor_2d(
                            target + uint32(h * box_bytes + part * half_bytes), weight, 0, barrier,
                            column_of(k, h, depth), int32(part * half + block * half_rows), uint64(ptx.EVICT_FIRST),
                        )  # fmt: skip
        else:
            for h in range(boxes):
                for part in range(halves):
                    for i in range(lane, half_rows * 8, 32):
                        row, chunk = i >> 3, i & 7
                        source = int64(part * half + min(block * half_rows + row, half - 1)) * depth
                        place = uint32(h * box_bytes + part * half_bytes + row * 128 + ((chunk ^ (row & 7)) * 16))
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

    # Operands of one batch of steps, from shared memory to registers.
    @device_function
    def load_weight(w, stage_at, b, first_row, swizzle, chunk):
        for i in range(batch // 2):
            # One ldmatrix.x4 holds a group's rows of 32 columns: two steps.
            step = b * batch + 2 * i
            for e in range(each):
                # Four rows on the swizzle differs in its third bit.
                column = uint32(step // 2 % 2 * 4 + chunk) ^ swizzle ^ uint32(e % 2 * 4 if gated else 0)
                place = uint32(step // 4 * box_bytes + e * each_bytes) + (column << uint32(4))
                got = ptx.ldmatrix_x4(stage_at + first_row + place)
                for j in range(4):
                    w[(e * batch + 2 * i) * 2 + j] = got[j]

    @device_function
    def load_tokens(t, tokens_at, b, g, swizzle, chunk):
        if tokens > 8:
            for i in range(batch):
                step = b * batch + i
                column = (uint32(step % 4 * 2 + chunk) ^ swizzle) << uint32(4)
                for m in range(together):
                    place = uint32(step // 4 * token_bytes + (g * together + m) * 2048)
                    got = ptx.ldmatrix_x4(tokens_at + place + column)
                    for j in range(4):
                        t[(m * batch + i) * 4 + j] = got[j]
        else:
            for i in range(batch // 2):
                step = b * batch + 2 * i
                column = (uint32(step // 2 % 2 * 4 + chunk) ^ swizzle) << uint32(4)
                got = ptx.ldmatrix_x4(tokens_at + uint32(step // 4 * token_bytes) + column)
                for j in range(4):
                    t[i * 4 + j] = got[j]

    @device_function
    def joined(seen, words, count):
        """Bits that depend on every load into the words: one of the four that an ldmatrix gives is enough."""
        for i in range(count // 4):
            seen |= words[4 * i]
        return seen

    @device_function
    def multiply(acc, w, t, g):
        zero = uint32(0)
        for i in range(batch):
            for m in range(together):
                for e in range(each):
                    c = (e * tiles + g * together + m) * 4
                    b0, b1 = w[(e * batch + i) * 2], w[(e * batch + i) * 2 + 1]
                    if tokens > 8:
                        a = (m * batch + i) * 4
                        d = mma(t[a], t[a + 1], t[a + 2], t[a + 3], b0, b1, acc[c], acc[c + 1], acc[c + 2], acc[c + 3])
                    else:
                        d = mma(t[2 * i], zero, t[2 * i + 1], zero, b0, b1, acc[c], acc[c + 1], acc[c + 2], acc[c + 3])
                    acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = d[0], d[1], d[2], d[3]

    @device_function
    def following(stage, parity):
        """The stage after this one, and the parity of its phase."""
        last = stage == stages - 1
        return (int32(0) if last else stage + int32(1)), (parity ^ uint32(1) if last else parity)

    def linear(weight, x, out, count, rows, depth):
        memory = cuda.shared.array(0, uint8)
        ring = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        full = ring + uint32(stages * stage_bytes)
        empty = full + uint32(8 * stages)
        passed = empty + uint32(8 * stages)
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
        half = rows // halves
        blocks = (half + half_rows - 1) // half_rows
        stage_count = depth // columns
        block = int32(cuda.blockIdx.x)

        if warp == warps:
            # The first stages of weights need nothing of the kernels ahead.
            early = min(stage_count, int32(stages))
            for k in range(early):
                copy_weight(weight, ring + uint32(k * stage_bytes), full + uint32(8 * k), block, k, lane, half, depth)
            ptx.griddepcontrol_wait()
            for k in range(early):
                copy_tokens(x, ring + uint32(k * stage_bytes), full + uint32(8 * k), first, k, lane, here, depth)
            stage, parity = early, uint32(1)
            if stage == stages:
                stage, parity = int32(0), uint32(0)
            begin = early
            while block < blocks:
                for k in range(begin, stage_count):
                    while waits(empty + uint32(8 * stage), parity) == 0:
                        pass
                    target = ring + uint32(stage * stage_bytes)
                    barrier = full + uint32(8 * stage)
                    copy_weight(weight, target, barrier, block, k, lane, half, depth)
                    copy_tokens(x, target, barrier, first, k, lane, here, depth)
                    stage, parity = following(stage, parity)
                begin = int32(0)
                block += int32(cuda.gridDim.x)
        elif warpgroups:
            acc = cuda.local.array(part_accumulators, float32)
            up = cuda.local.array(part_accumulators, float32)
            second = cuda.local.array(second_accumulators, float32)
            own = warp >> 2
            token_place = uint32(boxes * box_bytes + own * 8192)
            stage, parity, previous = int32(0), uint32(0), int32(0)
            while block < blocks:
                for i in range(part_accumulators):
                    acc[i], up[i] = float32(0.0), float32(0.0)
                for i in range(second_accumulators):
                    second[i] = float32(0.0)
                keep(acc)
                if gated:
                    keep(up)
                if segments > 1:
                    keep_second(second)
                for k in range(stage_count):
                    while waits(full + uint32(8 * stage), parity) == 0:
                        pass
                    at = ring + uint32(stage * stage_bytes)
                    ptx.wgmma_fence()
                    for h in range(boxes):
                        tokens_at = at + token_place + uint32(h * token_bytes)
                        a = ptx.wgmma_descriptor(tokens_at, uint32(16), uint32(1024))
                        b = ptx.wgmma_descriptor(at + uint32(h * box_bytes), uint32(16), uint32(1024))
                        for i in range(4):
                            if h < own_boxes:
                                wgmma(acc, a + uint64(2 * i), b + uint64(2 * i), uint32(1))
                            else:
                                wgmma(second, a + uint64(2 * i), b + uint64(2 * i), uint32(1))
                            if gated:
                                wgmma(up, a + uint64(2 * i), b + uint64(half_bytes // 16 + 2 * i), uint32(1))
                    ptx.wgmma_commit_group()
                    one_unfinished()
                    if k > 0 and lane == 0:
                        ptx.mbarrier_arrive(empty + uint32(8 * previous))
                    previous = stage
                    stage, parity = following(stage, parity)
                none_unfinished()
                keep(acc)
                if gated:
                    keep(up)
                if lane == 0:
                    ptx.mbarrier_arrive(empty + uint32(8 * previous))
                if segments > 1:
                    keep_second(second)
                    for i in range(part_accumulators):
                        acc[i] = ptx.add_rn_f32(acc[i], second[i])
                for i in range(wide // 8):
                    column = block * half_rows + i * 8 + (lane & 3) * 2
                    for part in range(2):
                        token = own * 64 + (warp & 3) * 16 + part * 8 + (lane >> 2)
                        c = 4 * i + 2 * part
                        low, high = acc[c], acc[c + 1]
                        if gated:
                            low = ptx.mul_rn_f32(device.silu(low), up[c])
                            high = ptx.mul_rn_f32(device.silu(high), up[c + 1])
                        if i * 8 + (lane & 3) * 2 < half_rows and column < half and token < here:
                            ptx.st_global_b32(out, int64(first + token) * half + column, pack(high, low))
                block += int32(cuda.gridDim.x)
        else:
            acc = cuda.local.array(accumulators, float32)
            w = cuda.local.array(weight_words, uint32)
            t = cuda.local.array(token_words, uint32)
            # Lane 8 i + r gives ldmatrix the address of row r of matrix i.
            r8, chunk = lane & 7, lane >> 3
            segment, member = warp // segment_warps, warp % segment_warps
            own_groups, own_tokens = member // split * each, member % split * tiles * 16
            row = own_groups * 4 + (r8 >> 1) if gated else own_groups * 8 + r8
            first_row = uint32(segment * own_boxes * box_bytes + ((r8 & 1) * half_bytes if gated else 0) + row * 128)
            swizzle = uint32(row & 7)
            if tokens > 8:
                token_row, token_chunk = own_tokens + r8 + (lane >> 3 & 1) * 8, lane >> 4
            else:
                token_row, token_chunk = r8, chunk
            token_place = uint32(boxes * box_bytes + segment * own_boxes * token_bytes + token_row * 128)
            token_swizzle = uint32(r8)
            passed += uint32(member * 512 + lane * 16)
            stage, parity = int32(0), uint32(0)
            zero = uint32(depth & (BOX - 1))  # which the compiler does not know
            while block < blocks:
                for i in range(accumulators):
                    acc[i] = float32(0.0)
                for _ in range(stage_count):
                    while waits(full + uint32(8 * stage), parity) == 0:
                        pass
                    at = ring + uint32(stage * stage_bytes)
                    for b in range(steps // batch):
                        load_weight(w, at, b, first_row, swizzle, chunk)
                        for g in range(tiles // together):
                            load_tokens(t, at + token_place, b, g, token_swizzle, token_chunk)
                            if b == steps // batch - 1 and g == tiles // together - 1:
                                # The stage is in registers: it may be filled again. An arrival overtakes loads that are
                                # on their way (measured), so its address depends on what the last of them give.
                                seen = joined(joined(uint32(0), w, weight_words), t, token_words)
                                ptx.bar_warp_sync()
                                if lane == 0:
                                    ptx.mbarrier_arrive(empty + uint32(8 * stage) + (seen & zero))
                            multiply(acc, w, t, g)
                    stage, parity = following(stage, parity)
                if segments > 1:
                    for i in range(accumulators // 4):
                        if segment > 0:
                            ptx.st_shared_v4(
                                passed, ptx.bits_from_f32(acc[4 * i]), ptx.bits_from_f32(acc[4 * i + 1]),
                                ptx.bits_from_f32(acc[4 * i + 2]), ptx.bits_from_f32(acc[4 * i + 3]),
                            )  # fmt: skip
                        ptx.bar_sync(uint32(1), uint32(32 * warps))
                        if segment == 0:
                            held = ptx.ld_shared_v4(passed)
                            for j in range(4):
                                acc[4 * i + j] = ptx.add_rn_f32(acc[4 * i + j], ptx.f32_from_bits(held[j]))
                        ptx.bar_sync(uint32(1), uint32(32 * warps))
                for e in range(each):
                    group = own_groups + e
                    for m in range(tiles):
                        for part in range(2 if tokens > 8 else 1):
                            token = own_tokens + m * 16 + part * 8 + (lane >> 2)
                            c = (e * tiles + m) * 4 + part * 2
                            if gated:
                                column = block * half_rows + group * 4 + (lane & 3)
                                if group < groups and column < half and token < here:
                                    value = ptx.mul_rn_f32(device.silu(acc[c]), acc[c + 1])
                                    out[int64(first + token) * half + column] = rounded(value)
                            else:
                                column = block * half_rows + group * 8 + (lane & 3) * 2
                                if segment == 0 and group < groups and column < rows and token < here:
                                    ptx.st_global_b32(
                                        out,
                                        int64(first + token) * rows + column,
                                        pack(acc[c + 1], acc[c]),
                                    )
                block += int32(cuda.gridDim.x)

    kind = f"{'swiglu_' if gated else ''}streamed_{tiling.copy}"
    way = f"wgmma_b{boxes}" if tiling.wgmma else f"x{each}x{split}_b{boxes}x{batch}x{together}"
    way += f"_k{segments}" * (segments > 1)
    name = f"linear_{kind}_t{tokens}_g{groups}_{way}_s{stages}{device.HALVES[dtype].suffix}_{arch}"
    pointer = f"{dtype}*"
    kinds = ("u8*" if bulk else pointer, "u8*" if bulk else pointer, pointer, "i32", "i32", "i32")
    return Kernel(
        name, linear, kinds, tiling.threads, dynamic_shared=tiling.shared, blocks_per_sm=1,
        options=LaunchOptions(programmatic=True), early=("weight",),
        architectures=(arch,),
    )  # fmt: skip


def catalogue(dtype: str, rows: int, depth: int, gated: bool, tokens: Sequence[int] = (1, TOKENS[-1])) -> list[Kernel]:
    """The kernels for a weight [rows, depth], one an architecture and number of tokens, as its usual GPU takes them."""
    return [
        streamed(dtype, Tiling.choose(count, rows, depth, gated, arch, multiprocessors), gated, arch)
        for arch, multiprocessors in MULTIPROCESSORS.items()
        for count in tokens
    ]


@functools.cache
def _plan(
    dtype: str, tokens: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int
) -> tuple[Tiling, Kernel, int]:
    """Tiling, kernel and blocks of the grid for a pass of `tokens` (one of TOKENS)."""
    tiling = Tiling.choose(tokens, rows, depth, gated, arch, multiprocessors)
    return tiling, streamed(dtype, tiling, gated, arch), min(-(-rows // (tiling.groups * 8)), multiprocessors)


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool) -> torch.Tensor:
    count, rows, depth = check.product(x, weight, out, BOX, gated)
    if count:
        tiling, kernel, blocks = _plan(
            check.HALVES[x.dtype], tokens_of_a_pass(count), rows, depth, gated, *machine_of(max(x.get_device(), 0))
        )
        weight_source, x_source = weight, x
        if tiling.copy == "bulk":
            weight_source, x_source = (
                kept_tensor_map(weight, tiling.groups * (4 if gated else 8)),
                kept_tensor_map(x, tiling.tokens),
            )
        kernel.launch((blocks, -(-count // tiling.tokens)), weight_source, x_source, out, count, rows, depth)
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
