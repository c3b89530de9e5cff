"""Consumers by mma.sync: each warp multiplies some groups of 8 weight rows by some tokens, operands in registers."""

from __future__ import annotations

from collections.abc import Callable

from kernels import device, ptx
from kernels.cuda import cuda, device_function, float32, int32, int64, uint32
from kernels.linear.streamed.tiling import Tiling
from kernels.ring import ring
from kernels.tiles import BOX


def consumer(dtype: str, tiling: Tiling, gated: bool) -> Callable[..., None]:
    """`consume(out, ring_at, taken, columns, depth, work, warp, lane)`: multiply what the ring brings, write out.

    Arguments as those of the producer.
    """
    each, tiles, split, segments = tiling.each, tiling.tiles, tiling.split, tiling.segments
    stages, stage_bytes, boxes, box_bytes = tiling.stages, tiling.stage_bytes, tiling.boxes, tiling.box_bytes
    tokens, token_bytes, own_boxes, batch = tiling.tokens, tiling.token_bytes, tiling.own_boxes, tiling.batch
    segment_warps = tiling.warps // segments
    steps = own_boxes * 4  # of 16 columns, of a warp in a stage
    together = min(tiles, tiling.together)
    accumulators = each * tiles * 4
    weight_words, token_words = each * batch * 2, together * batch * (4 if tokens > 8 else 2)
    wait, _, advance, _ = ring(stages, tiling.copy == "bulk")
    load_weight, load_tokens = _loads(tiling, together)
    multiply, exchange = _products(dtype, tiling, together), _exchange(tiling, accumulators)
    epilogue = _epilogue(dtype, tiling, gated)

    @device_function
    def joined(seen, words, count):
        """Bits that depend on every load into the words: one of the four that an ldmatrix gives is enough."""
        for i in range(count // 4):
            seen |= words[4 * i]
        return seen

    @device_function
    def consume(out, ring_at, taken, columns, depth, work, warp, lane):
        blocks, stage_count = work
        full = ring_at + uint32(stages * stage_bytes)
        empty = full + uint32(8 * stages)
        block = int32(cuda.blockIdx.x)
        acc = cuda.local.array(accumulators, float32)
        w = cuda.local.array(weight_words, uint32)
        t = cuda.local.array(token_words, uint32)
        # Lane 8 i + r gives ldmatrix the address of row r of matrix i.
        r8, chunk = lane & 7, lane >> 3
        segment, member = warp // segment_warps, warp % segment_warps
        own_groups, own_tokens = member // split * each, member % split * tiles * 16
        first_row = uint32(segment * own_boxes * box_bytes + own_groups * 1024 + r8 * 128)
        if tokens > 8:
            token_row, token_chunk = own_tokens + r8 + (lane >> 3 & 1) * 8, lane >> 4
        else:
            token_row, token_chunk = r8, chunk
        token_place = uint32(boxes * box_bytes + segment * own_boxes * token_bytes + token_row * 128)
        swizzle = uint32(r8)
        passed = empty + uint32(8 * stages) + uint32(member * 512 + lane * 16)
        stage, parity = int32(0), uint32(0)
        zero = uint32(depth & (BOX - 1))  # which the compiler does not know
        while block < blocks:
            for i in range(accumulators):
                acc[i] = float32(0.0)
            for _ in range(stage_count):
                wait(full, stage, parity)
                at = ring_at + uint32(stage * stage_bytes)
                for b in range(steps // batch):
                    load_weight(w, at, b, first_row, swizzle, chunk)
                    for g in range(tiles // together):
                        load_tokens(t, at + token_place, b, g, swizzle, token_chunk)
                        if b == steps // batch - 1 and g == tiles // together - 1:
                            # The stage is in registers: it may be filled again. An arrival overtakes loads that are
                            # on their way (measured), so its address depends on what the last of them give.
                            seen = joined(joined(uint32(0), w, weight_words), t, token_words)
                            ptx.bar_warp_sync()
                            if lane == 0:
                                ptx.mbarrier_arrive(empty + uint32(8 * stage) + (seen & zero))
                        multiply(acc, w, t, g)
                stage, parity = advance(stage, parity)
            if segments > 1:
                exchange(acc, passed, segment)
            epilogue(acc, out, block, (segment, own_groups, own_tokens), taken, columns, lane)
            block += int32(cuda.gridDim.x)

    return consume


def _loads(tiling: Tiling, together: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that load the operands of one batch of steps to registers: of weights, of tokens."""
    each, batch, tokens = tiling.each, tiling.batch, tiling.tokens
    box_bytes, token_bytes = tiling.box_bytes, tiling.token_bytes

    @device_function
    def load_weight(w, stage_at, b, first_row, swizzle, chunk):
        for i in range(batch // 2):
            # One ldmatrix.x4 holds a group's rows of 32 columns: two steps.
            step = b * batch + 2 * i
            for e in range(each):
                column = uint32(step // 2 % 2 * 4 + chunk) ^ swizzle
                place = uint32(step // 4 * box_bytes + e * 1024) + (column << uint32(4))
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

    return load_weight, load_tokens


def _products(dtype: str, tiling: Tiling, together: int) -> Callable[..., None]:
    """A function that adds the products of one batch of steps with the g-th `together` tiles of tokens."""
    each, batch, tiles, tokens = tiling.each, tiling.batch, tiling.tiles, tiling.tokens
    mma = device.HALVES[dtype].mma

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

    return multiply


def _exchange(tiling: Tiling, accumulators: int) -> Callable[..., None]:
    """A function that adds the second segment's sums, which other warps have, to the first's."""
    warps = tiling.warps

    @device_function
    def exchange(acc, passed, segment):
        """passed: the lane's 16 bytes of the exchange buffer."""
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

    return exchange


def _epilogue(dtype: str, tiling: Tiling, gated: bool) -> Callable[..., None]:
    """A function that writes a warp's sums to out: silu(gate) * up where gated."""
    each, tiles, groups, tokens = tiling.each, tiling.tiles, tiling.groups, tiling.tokens
    own_columns = tiling.columns(gated)
    pack, rounded = device.HALVES[dtype].pack, device.HALVES[dtype].rounded

    @device_function
    def epilogue(acc, out, block, own, taken, columns, lane):
        """own: the warp's segment, first group and token. taken: the pass's first token and how many there are."""
        segment, own_groups, own_tokens = own
        first, here = taken
        for e in range(each):
            group = own_groups + e
            for m in range(tiles):
                for upper in range(2 if tokens > 8 else 1):  # rows r and r + 8 of a tile's 16
                    token = own_tokens + m * 16 + upper * 8 + (lane >> 2)
                    c = (e * tiles + m) * 4 + upper * 2
                    if gated:
                        column = block * own_columns + group * 4 + (lane & 3)
                        if group < groups and column < columns and token < here:
                            value = ptx.mul_rn_f32(device.silu(acc[c]), acc[c + 1])
                            out[int64(first + token) * columns + column] = rounded(value)
                    else:
                        column = block * own_columns + group * 8 + (lane & 3) * 2
                        if segment == 0 and group < groups and column < columns and token < here:
                            ptx.st_global_b32(out, int64(first + token) * columns + column, pack(acc[c + 1], acc[c]))

    return epilogue
