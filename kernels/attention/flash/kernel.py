"""The decode kernel: one block of 128 threads walks over segments of a token's positions for one KV head."""

from __future__ import annotations

import math

from kernels import ptx
from kernels.attention.flash.combine import combiner, ender, record_of
from kernels.attention.flash.copy import copier, pages_of
from kernels.attention.flash.layout import THREADS, Layout
from kernels.attention.flash.prologue import prologue
from kernels.attention.flash.tile import scorer, value_products, weigher
from kernels.attention.softmax import SEGMENT, TILE
from kernels.cuda import cuda, device_function, float32, int64, uint8, uint32
from kernels.device import HALVES
from kernels.launch import Kernel, LaunchOptions, kernel_factory

# What `decode` reads before the kernels ahead are done: its docstring says why it may.
EARLY = ("q_norm", "k_norm", "cos", "sin", "k_cache", "v_cache", "slots", "positions", "table")


@kernel_factory
def flash(dtype: str, head_dim: int, group: int, source: str, paged: bool) -> Kernel:
    """x, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, positions, table, out, workspace, counters (the same
    memory), Hq, Hk, pages of a slot, log2 of a page, segments of a slot, strides of the cache (slot or page,
    position, head) and of x and out, factor, eps, window; grid (blocks that share a token's segments, Hk, T).

    dtype: "bf16" or "f16". source: what x is: "q" [T, Hq D], ready, with keys and values in the cache; or a projection
    of q, k and v [T, (Hq + 2 Hk) D] that is still to be rotated, "none", or normed with rounding "once" or "twice"
    before. paged: whether the cache is.
    """
    fused, normed = source != "q", source in ("once", "twice")
    layout = Layout(head_dim, group)
    chunks, row_bytes, tile_bytes, steps = layout.chunks, layout.row_bytes, layout.tile_bytes, layout.steps
    row_blocks, rows_at, sums_at = layout.row_blocks, layout.rows_at, layout.sums_at
    largest_at, zeros_at = layout.largest_at, layout.zeros_at
    # Elements of arrays in registers.
    weight_words, q_words, o_words = 2 * layout.rounds, 4 * steps, 4 * layout.columns
    all_but_one, all_landed = ptx.cp_async_wait_group(1), ptx.cp_async_wait_group(0)
    copy, record_size = copier(layout, paged), record_of(layout)
    load_weights, prepare = prologue(dtype, layout, normed, source == "twice")
    multiply_keys, mask, put_largest = scorer(dtype, layout)
    weigh, rescale, add_sums = weigher(dtype, layout)
    multiply_values, end_segment = value_products(dtype, layout), ender(dtype, layout)
    arrive_last, combine = combiner(dtype, layout)

    @device_function
    def places_of(memory):
        """Shared addresses of a tile of keys, one of values, the queries, what warps tell each other, and 16 zeros."""
        k_tile = ptx.shared_address(memory)
        v_tile = k_tile + uint32(tile_bytes)
        rows = k_tile + uint32(rows_at)
        largest_shared, sums_shared = k_tile + uint32(largest_at), k_tile + uint32(sums_at)
        zeros = k_tile + uint32(zeros_at)
        return k_tile, v_tile, rows, largest_shared, sums_shared, zeros

    @device_function
    def first_key(position, window):
        begin = int64(0)
        if window > 0:
            begin = max(begin, position - window + 1)
        return begin

    @device_function
    def place_in_pages(base, table, table_row, page_bits, position, page_stride, position_stride):
        """First element of a position; base: that of the KV head on page 0."""
        page = int64(table[table_row + (position >> page_bits)])
        return base + page * page_stride + (position & ((int64(1) << page_bits) - 1)) * position_stride

    @device_function
    def next_tile(tile, shares):
        """The block's tile after this one: the next of the segment, or the first of its next segment."""
        following = tile + 1
        if following % (SEGMENT // TILE) == 0:
            following += (shares - 1) * (SEGMENT // TILE)
        return following

    @device_function
    def set_to_zero(new_k, new_v):
        for e in range(4):
            new_k[e], new_v[e] = uint32(0), uint32(0)

    @device_function
    def begin_sums(o, online):
        largest, total, alpha = online
        for h in range(row_blocks):
            largest[h], total[h], alpha[h] = float32(-math.inf), float32(0.0), float32(1.0)
        for i in range(o_words):
            o[i] = float32(0.0)

    @device_function
    def put_new(place, new, tile, last_tile, thread):
        """The thread's chunk of the new token's key or value to its place in the last tile."""
        if fused and tile == last_tile and thread < chunks:
            ptx.st_shared_v4(place, new[0], new[1], new[2], new[3])

    @device_function
    def write_new(caches, own_at, new, tile, last_tile, thread):
        """The thread's chunks of the new token's key and value to the cache."""
        k_cache, v_cache = caches
        new_k, new_v = new
        if fused and tile == last_tile and thread < chunks:
            ptx.st_global_v4(k_cache, own_at + thread * 8, new_k[0], new_k[1], new_k[2], new_k[3])
            ptx.st_global_v4(v_cache, own_at + thread * 8, new_v[0], new_v[1], new_v[2], new_v[3])

    @device_function
    def copy_queries(x, first, rows, thread):
        """x[first]: the group's first element."""
        for i in range(-(-group * chunks // THREADS)):
            vector = i * THREADS + thread
            if vector < group * chunks:
                head, chunk = vector // chunks, vector % chunks
                place = uint32(head * row_bytes + ((chunk ^ (head & 7)) * 16))
                ptx.cp_async_cg_16(rows + place, x, first + vector * 8)

    @device_function
    def load_queries(q, rows, zeros, lane):
        """Queries as the operand of 16 rows. Rows beyond the group are 0: the tensor cores' work on them would cost
        power that the memory's clock needs."""
        r8, matrix = lane & 7, lane >> 3
        row16, chunk16 = r8 + (matrix & 1) * 8, matrix >> 1
        alive = row16 < group
        for s in range(steps):
            q_at = rows + uint32(row16 * row_bytes + (((2 * s + chunk16) ^ r8) * 16))
            got = ptx.ldmatrix_x4(q_at if alive else zeros)
            for e in range(4):
                q[4 * s + e] = got[e]

    def attention(
        x, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, positions, table, out, workspace, counters, q_heads,
        kv_heads, pages, page_bits, segments, slot_stride, position_stride, head_stride, x_stride, out_stride, factor,
        eps, window,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(0, uint8)
        thread = int64(cuda.threadIdx.x)
        k_tile, v_tile, rows, largest_shared, sums_shared, zeros = places_of(memory)
        warp, lane = thread >> 5, thread & 31
        r8, matrix = lane & 7, lane >> 3
        share, shares = int64(cuda.blockIdx.x), int64(cuda.gridDim.x)
        kv_head = int64(cuda.blockIdx.y)
        token = int64(cuda.blockIdx.z)
        row, out_row = token * x_stride, token * out_stride
        widths = (int64(q_heads) * head_dim, int64(kv_heads) * head_dim)
        if thread == 0:
            ptx.st_shared_v4(zeros, uint32(0), uint32(0), uint32(0), uint32(0))
        # What no kernel of the step writes may be read before the wait: the norm's weights.
        weights = cuda.local.array(weight_words, uint32)
        if normed:
            load_weights(weights, q_norm, k_norm, kv_head, thread)
        # Nor does one write positions, slots, table or earlier keys and values (`decode` asks for that): the first tile
        # is on its way while the kernel ahead still runs.
        if not fused:
            ptx.griddepcontrol_wait()
        position, slot = int64(positions[token]), int64(slots[token])
        begin = first_key(position, window)
        first_segment, last_segment = begin // SEGMENT, position // SEGMENT
        if share > 0 and first_segment + share > last_segment:
            if fused:
                ptx.griddepcontrol_wait()
            return

        last_tile = position // TILE
        tile = max(begin // TILE, (first_segment + share) * (SEGMENT // TILE))
        span = (begin, position, position) if fused else (begin, position + 1, int64(-1))
        base = kv_head * head_stride
        table_row = slot * pages
        page0, page1 = uint32(0), uint32(0)
        if paged:
            page0, page1 = pages_of(table, table_row, pages, page_bits, tile // 4, lane)
            own_at = place_in_pages(base, table, table_row, page_bits, position, slot_stride, position_stride)
        else:
            base += slot * slot_stride
            own_at = base + position * position_stride
        # The new token's row in a tile, and where its chunk of this thread lies.
        own_row = position % TILE
        own_place = uint32(own_row * row_bytes + ((thread ^ (own_row & 7)) * 16))
        if not fused:
            copy_queries(x, row + kv_head * group * head_dim, rows, thread)
        kv = (base, page0, page1, page_bits, slot_stride, position_stride)
        copy(k_tile, k_cache, kv, tile, span, thread)
        ptx.cp_async_commit_group()
        copy(v_tile, v_cache, kv, tile, span, thread)
        ptx.cp_async_commit_group()
        new_k = cuda.local.array(4, uint32)
        new_v = cuda.local.array(4, uint32)
        set_to_zero(new_k, new_v)
        if fused:
            prepare(
                weights, new_v, x, (cos, sin, position), (row, widths, kv_head, eps),
                (rows, k_tile, v_tile, largest_shared), (own_row, own_place, tile == last_tile), thread,
            )  # fmt: skip
        all_but_one()
        cuda.syncthreads()

        q = cuda.local.array(q_words, uint32)
        load_queries(q, rows, zeros, lane)
        if fused and thread < chunks:
            loaded = ptx.ld_shared_v4(rows + uint32(group * row_bytes + ((thread ^ (group & 7)) * 16)))
            for e in range(4):
                new_k[e] = loaded[e]
        score = cuda.local.array(16, float32)
        o = cuda.local.array(o_words, float32)
        largest = cuda.local.array(row_blocks, float32)
        total = cuda.local.array(row_blocks, float32)
        alpha = cuda.local.array(row_blocks, float32)
        online = (largest, total, alpha)
        begin_sums(o, online)
        k_lane = k_tile + uint32((warp * 32 + r8) * row_bytes)
        v_lane = v_tile + uint32((r8 + (matrix & 1) * 8) * row_bytes)
        record = token * record_size(q_heads, segments)
        running = True
        while running:
            multiply_keys(score, q, k_lane, lane)
            mask(score, begin, position, tile, warp, lane)
            put_largest(score, largest_shared, warp, lane)
            cuda.syncthreads()

            # Every warp is done with the K tile.
            following = next_tile(tile, shares)
            if following <= last_tile:
                if paged and following // 4 != tile // 4:
                    page0, page1 = pages_of(table, table_row, pages, page_bits, following // 4, lane)
                kv = (base, page0, page1, page_bits, slot_stride, position_stride)
                copy(k_tile, k_cache, kv, following, span, thread)
                put_new(k_tile + own_place, new_k, following, last_tile, thread)
            ptx.cp_async_commit_group()
            weigh(score, online, (rows, largest_shared, sums_shared), factor, warp, lane)
            rescale(o, alpha)
            all_but_one()
            cuda.syncthreads()

            # The V tile has landed and the weights are there.
            add_sums(online, sums_shared, lane)
            multiply_values(o, rows, zeros, v_lane, warp, lane)
            write_new((k_cache, v_cache), own_at, (new_k, new_v), tile, last_tile, thread)
            running = following <= last_tile
            if not running or following // 4 != tile // 4:
                places = (out_row, record, segments, tile // 4)
                whole = first_segment == last_segment
                end_segment(o, online, (out, workspace), places, whole, kv_head, warp, lane)
            if running:
                all_landed()
                cuda.syncthreads()
                # The K tile has landed, and every warp is done with the V tile.
                kv = (base, page0, page1, page_bits, slot_stride, position_stride)
                copy(v_tile, v_cache, kv, following, span, thread)
                put_new(v_tile + own_place, new_v, following, last_tile, thread)
                ptx.cp_async_commit_group()
            tile = following

        if first_segment < last_segment:
            used = last_segment - first_segment + 1
            counter = record + int64(q_heads) * segments * (head_dim + 4) + kv_head
            if arrive_last(counters, counter, uint32(min(used, shares) - 1), thread):
                combine(out, workspace, out_row, (record, segments, first_segment), used, kv_head, factor, thread)

    name = f"attention_flash_{source}_{'paged_' if paged else ''}d{head_dim}_g{group}{HALVES[dtype].suffix}"
    pointer = f"{dtype}*"
    kinds = (*(pointer,) * 3, "f32*", "f32*", pointer, pointer, *("i32*",) * 3, pointer, "f32*", "i32*")
    kinds += (*("i32",) * 5, "i32" if paged else "i64", *("i64",) * 4, "f32", "f32", "i32")
    return Kernel(
        name, attention, kinds, THREADS, dynamic_shared=layout.shared_bytes, blocks_per_sm=3,
        options=LaunchOptions(programmatic=True), early=EARLY if fused else (),
    )  # fmt: skip
