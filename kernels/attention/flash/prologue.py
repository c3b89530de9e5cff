"""Prologue of fused decode: q/k norm and RoPE of one token, its queries and its new key and value in shared memory."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.attention.flash.layout import THREADS, Layout
from kernels.cuda import cuda, device_function, float32, uint32
from kernels.device import normalised
from kernels.rope_write import WORDS, load_batch, norm_scales, put_sums, rotated, sums_of_squares


def prologue(dtype: str, layout: Layout, normed: bool, twice: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that load the norm's weights, which no kernel of a step writes, and that do the rest once the
    projection is there."""
    pair_words, angle_words, chunks = 2 * layout.rounds, 4 * layout.rounds, layout.chunks
    load_weights, load_angles, load_rows = _loaders(layout, normed)
    sum_squares, scales_of = _scaler(dtype, normed)
    rotate_rows = _rotator(dtype, layout, normed, twice)

    @device_function
    def prepare(weights, new_v, x, angle, source, shared, own, thread):
        """Queries and the new key to their rows in shared memory, the new value to new_v; where the first tile is the
        new token's, both into it too.

        angle: cos, sin, position. source: the token's row of x, widths of q and of k, KV head, eps. shared: of rows, K
        tile, V tile, sums of squares. own: the new token's row in a tile, where the thread's chunk of it lies, whether
        the tile is the new token's.
        """
        cos, sin, position = angle
        row, widths, kv_head, eps = source
        rows, k_tile, v_tile, scratch = shared
        own_row, own_place, is_last = own
        pairs = cuda.local.array(pair_words, uint32)
        angles = cuda.local.array(angle_words, float32)
        q_words = cuda.local.array(WORDS, uint32)
        k_words = cuda.local.array(WORDS, uint32)
        for i in range(pair_words):
            pairs[i] = uint32(0)
        load_angles(angles, cos, sin, position, thread)
        ptx.griddepcontrol_wait()
        load_rows((q_words, k_words), pairs, new_v, x, widths, row, kv_head, thread)
        sum_squares((q_words, k_words), x, widths, row, scratch, thread)
        if is_last and thread < chunks:
            ptx.st_shared_v4(v_tile + own_place, new_v[0], new_v[1], new_v[2], new_v[3])
        scales = scales_of(scratch, widths, eps, thread)
        rotate_rows(pairs, weights, angles, scales, rows, (k_tile, own_row, is_last), thread)

    return load_weights, prepare


def _loaders(layout: Layout, normed: bool) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Functions that load what a thread rotates: the norm's weights, the angles, and rows of the projection."""
    head_dim, group, chunks = layout.head_dim, layout.group, layout.chunks
    units, rounds = layout.units, layout.rounds

    @device_function
    def load_weights(weights, q_norm, k_norm, kv_head, thread):
        for r in range(rounds):
            unit = r * THREADS + thread
            head, d = unit // units, unit % units * 2
            weights[2 * r], weights[2 * r + 1] = uint32(0), uint32(0)
            if head < group:
                weights[2 * r] = ptx.ld_global_b32(q_norm, (kv_head * group + head) * head_dim + d)
                weights[2 * r + 1] = ptx.ld_global_b32(q_norm, (kv_head * group + head) * head_dim + head_dim // 2 + d)
            elif head == group:
                weights[2 * r] = ptx.ld_global_b32(k_norm, kv_head * head_dim + d)
                weights[2 * r + 1] = ptx.ld_global_b32(k_norm, kv_head * head_dim + head_dim // 2 + d)

    @device_function
    def load_angles(angles, cos, sin, position, thread):
        for r in range(rounds):
            unit = r * THREADS + thread
            if unit < (group + 1) * units:
                angle = position * (head_dim // 2) + unit % units * 2
                angles[4 * r], angles[4 * r + 1] = cos[angle], sin[angle]
                angles[4 * r + 2], angles[4 * r + 3] = cos[angle + 1], sin[angle + 1]

    @device_function
    def load_rows(words, pairs, new_v, x, widths, row, kv_head, thread):
        """Load what this thread needs of the projection: for the sums of squares, to rotate, and of the new value."""
        q_words, k_words = words
        q_width, k_width = widths
        if normed:
            load_batch(q_words, x, row, q_width // 8, thread)
            load_batch(k_words, x, row + q_width, k_width // 8, thread)
        for r in range(rounds):
            unit = r * THREADS + thread
            head, d = unit // units, unit % units * 2
            if head <= group:
                place = row + (kv_head * group + head) * head_dim + d
                if head == group:
                    place = row + q_width + kv_head * head_dim + d
                pairs[2 * r] = ptx.ld_global_b32(x, place)
                pairs[2 * r + 1] = ptx.ld_global_b32(x, place + head_dim // 2)
        if thread < chunks:
            loaded = ptx.ld_global_v4(x, row + q_width + k_width + kv_head * head_dim + thread * 8)
            for e in range(4):
                new_v[e] = loaded[e]

    return load_weights, load_angles, load_rows


def _scaler(dtype: str, normed: bool) -> tuple[Callable[..., None], Callable[..., tuple[float, float]]]:
    """Functions that put a warp's sums of squares to shared memory, and that give the scales of q and of k."""
    squares = sums_of_squares(dtype)

    @device_function
    def sum_squares(words, x, widths, row, scratch, thread):
        q_words, k_words = words
        q_width, k_width = widths
        if normed:
            sums = squares(q_words, k_words, x, row, q_width // 8, row + q_width, k_width // 8, thread)
            put_sums(scratch, thread, sums[0], sums[1])

    @device_function
    def scales_of(scratch, widths, eps, thread):
        """After a barrier where there is a norm, else 1."""
        q_width, k_width = widths
        q_scale, k_scale = float32(1.0), float32(1.0)
        if normed:
            cuda.syncthreads()
            q_scale, k_scale = norm_scales(scratch, thread, q_width, k_width, eps)
        return q_scale, k_scale

    return sum_squares, scales_of


def _rotator(dtype: str, layout: Layout, normed: bool, twice: bool) -> Callable[..., None]:
    """`rotate_rows(pairs, weights, angles, scales, rows, new_key, thread)`: norm and RoPE, to the rows of queries and
    the new key in shared memory.

    new_key: the K tile, the new token's row in it, whether the tile is the new token's.
    """
    group, chunks, units = layout.group, layout.chunks, layout.units
    rounds, row_bytes = layout.rounds, layout.row_bytes
    normalise, rotate = normalised(dtype, twice), rotated(dtype)

    @device_function
    def rotate_rows(pairs, weights, angles, scales, rows, new_key, thread):
        q_scale, k_scale = scales
        k_tile, own_row, is_last = new_key
        for r in range(rounds):
            unit = r * THREADS + thread
            head, d = unit // units, unit % units * 2
            if head <= group:
                first, second = pairs[2 * r], pairs[2 * r + 1]
                if normed:
                    scale = k_scale if head == group else q_scale
                    first = normalise(first, weights[2 * r], scale)
                    second = normalise(second, weights[2 * r + 1], scale)
                result = rotate(first, second, angles[4 * r], angles[4 * r + 1], angles[4 * r + 2], angles[4 * r + 3])
                chunk, inside = d // 8, d % 8 * 2
                for h in range(2):
                    c = chunk + h * (chunks // 2)
                    place = uint32(head * row_bytes + ((c ^ (head & 7)) * 16) + inside)
                    ptx.st_shared_b32(rows + place, result[h])
                    if head == group and is_last:
                        place = uint32(own_row * row_bytes + ((c ^ (own_row & 7)) * 16) + inside)
                        ptx.st_shared_b32(k_tile + place, result[h])

    return rotate_rows
