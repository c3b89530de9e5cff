"""Queries ready for attention and keys and values in the cache: q/k norm, RoPE and the cache write in one pass.

| version | what it does |
|---|---|
| fast | one block of 128 threads a token, all of it in vectors of 16 bytes |

The decode kernel of `kernels/attention/flash` does the same to its one token with the functions of this file.

Arithmetic, bf16 or fp16 in and out, for every version:
1. Where there is a norm, it is over the whole projection width of q and of k, each by itself. Thread i of 128 takes the
   16-byte vectors i, i + 128, … and adds the squares of their elements in order, one chain of fp32 fused multiply-adds
   from 0; within a warp the sums are added by xor shuffles of 16, 8, 4, 2, 1; then over the warps,
   ((w0 + w1) + w2) + w3.
2. scale = 1 / sqrt(sum / width + eps); y = x * scale (rounded to the dtype where rounding is "twice") * weight,
   rounded to the dtype. Every operation is rounded to fp32 by itself.
3. The rotation of `kernels/rope.py`, in fp32, rounded once to the dtype. v is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kernels import check, ptx
from kernels.cuda import cuda, device_function, float32, int32, int64, uint8, uint32
from kernels.device import HALVES, add_squares, inverse_rms, normalised
from kernels.launch import Kernel, LaunchOptions, kernel_factory

THREADS = 128
# Vectors of a row that a thread asks for at once: all of them up to a width of 5120.
BATCH = 5
WORDS = 4 * BATCH
PAGES = (8, 16, 32, 64, 128)


@device_function
def load_batch(words, x, start, vectors, thread):
    """The thread's first BATCH 16-byte vectors of the row at x[start]; anything where the row has fewer.

    words: local array of WORDS uint32. vectors: of the row.
    """
    # Without branches: the loads leave one after another, then the first is waited for.
    last = int32(vectors - 1)
    for b in range(BATCH):
        loaded = ptx.ld_global_v4(x, start + int64(min(int32(thread + b * THREADS), last)) * 8)
        for e in range(4):
            words[4 * b + e] = loaded[e]


@functools.cache
def sums_of_squares(dtype: str) -> Callable[..., Any]:
    """`sums_of_squares(dtype)(q_words, k_words, x, q_start, q_vectors, k_start, k_vectors, thread)`: the warp's sums of
    the squares of two rows of "bf16" or "f16"; `load_batch` has put the first BATCH vectors into the words."""
    squares = add_squares(dtype)

    @device_function
    def sums_of_squares(q_words, k_words, x, q_start, q_vectors, k_start, k_vectors, thread):
        q_sum, k_sum = float32(0.0), float32(0.0)
        for b in range(BATCH):
            q_more, k_more = q_sum, k_sum
            for e in range(4):
                q_more, k_more = squares(q_more, q_words[4 * b + e]), squares(k_more, k_words[4 * b + e])
            place = int32(thread + b * THREADS)
            q_sum = q_more if place < int32(q_vectors) else q_sum
            k_sum = k_more if place < int32(k_vectors) else k_sum
        vector = thread + BATCH * THREADS
        while vector < q_vectors or vector < k_vectors:
            if vector < q_vectors:
                loaded = ptx.ld_global_v4(x, q_start + vector * 8)
                for e in range(4):
                    q_sum = squares(q_sum, loaded[e])
            if vector < k_vectors:
                loaded = ptx.ld_global_v4(x, k_start + vector * 8)
                for e in range(4):
                    k_sum = squares(k_sum, loaded[e])
            vector += THREADS
        for step in range(5):
            lanes = uint32(16 >> step)
            q_sum = ptx.add_rn_f32(q_sum, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, q_sum, lanes))
            k_sum = ptx.add_rn_f32(k_sum, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, k_sum, lanes))
        return q_sum, k_sum

    return sums_of_squares


@device_function
def put_sums(scratch, thread, q_sum, k_sum):
    """Each warp's two sums to the 32 bytes at the shared address `scratch`, a multiple of 16. A barrier is needed."""
    if thread & 31 == 0:
        ptx.st_shared_b32(scratch + uint32(thread >> 3), ptx.bits_from_f32(q_sum))
        ptx.st_shared_b32(scratch + uint32(16 + (thread >> 3)), ptx.bits_from_f32(k_sum))


@device_function
def norm_scales(scratch, thread, q_width, k_width, eps):
    """1 / sqrt(mean of squares + eps) of q and of k, rows of so many elements, from what `put_sums` left.

    Even lanes work out q's, odd lanes k's.
    """
    odd = thread & 1
    sums = ptx.ld_shared_v4(scratch + uint32(16 * odd))
    total = ptx.add_rn_f32(ptx.f32_from_bits(sums[0]), ptx.f32_from_bits(sums[1]))
    total = ptx.add_rn_f32(total, ptx.f32_from_bits(sums[2]))
    total = ptx.add_rn_f32(total, ptx.f32_from_bits(sums[3]))
    scale = inverse_rms(total, int32(k_width if odd == 1 else q_width), eps)
    return (
        ptx.shfl_sync_idx_f32(ptx.FULL_MASK, scale, uint32(0)),
        ptx.shfl_sync_idx_f32(ptx.FULL_MASK, scale, uint32(1)),
    )


@device_function
def rotated_element(a, b, cosine, sine):
    """a * cosine - b * sine, each operation rounded to fp32."""
    return ptx.add_rn_f32(ptx.mul_rn_f32(a, cosine), -ptx.mul_rn_f32(b, sine))


@functools.cache
def rotated(dtype: str) -> Callable[..., Any]:
    """`rotated(dtype)(first, second, cos0, sin0, cos1, sin1)`: two pairs of "bf16" or "f16", elements d, d + 1 and
    D/2 + d, D/2 + d + 1 of a head, rotated by the angles of d and d + 1."""
    low, high, pack = HALVES[dtype].low, HALVES[dtype].high, HALVES[dtype].pack

    @device_function
    def rotated(first, second, cos0, sin0, cos1, sin1):
        a0, a1, b0, b1 = low(first), high(first), low(second), high(second)
        return (
            pack(rotated_element(a1, b1, cos1, sin1), rotated_element(a0, b0, cos0, sin0)),
            pack(rotated_element(b1, a1, cos1, -sin1), rotated_element(b0, a0, cos0, -sin0)),
        )

    return rotated


class Cache(NamedTuple):
    """Where a KV cache's positions lie. capacity: positions of a slot. kv_heads: Hk. slot_stride (paged: of a page),
    position_stride, head_stride: elements. pages: of a slot, page_bits: log2 of a page's positions (contiguous: 0)."""

    capacity: int
    kv_heads: int
    slot_stride: int
    position_stride: int
    head_stride: int
    pages: int
    page_bits: int


def cache_of(
    operation: str,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    head_dim: int,
    table: torch.Tensor | None,
    dtype: torch.dtype,
) -> Cache:
    """How the cache lies, checked: k_cache, v_cache [S, C, Hk, D] or, with table i32[S, pages], [P, page, Hk, D].

    Raises TypeError or ValueError naming the argument.
    """
    shape = check.dimensions(operation, "k_cache", k_cache, "P, page, Hk, D" if table is not None else "S, C, Hk, D")
    if shape[3] != head_dim:
        raise ValueError(f"{operation}: k_cache has head dimension {shape[3]}: {head_dim} needed")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != dtype:
            raise TypeError(f"{operation}: {name} is {cache.dtype}: {dtype} needed")
        if cache.shape != shape:
            raise ValueError(f"{operation}: {name} has shape {tuple(cache.shape)}: {tuple(shape)} needed")
        if cache.stride(3) != 1:
            raise ValueError(f"{operation}: a head of {name} is not contiguous (strides {cache.stride()})")
        check.aligned(operation, name, cache)
    if v_cache.stride() != k_cache.stride():
        raise ValueError(f"{operation}: v_cache has strides {v_cache.stride()}: k_cache's {k_cache.stride()} needed")
    strides = k_cache.stride()
    if table is None:
        return Cache(shape[1], shape[2], strides[0], strides[1], strides[2], 1, 0)
    page = shape[1]
    if page not in PAGES:
        raise ValueError(f"{operation}: k_cache has pages of {page} positions: one of {PAGES} needed")
    slots, pages = check.dimensions(operation, "table", table, "S, pages")
    check.tensor(operation, "table", table, (slots, pages), torch.int32)
    return Cache(pages * page, shape[2], strides[0], strides[1], strides[2], pages, page.bit_length() - 1)


def check_projection(
    operation: str,
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    rounding: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> int:
    """The head dimension; checks qkv bf16 or fp16 [T, (Hq + 2 Hk) D], the norms, rounding and the tables of angles.

    Raises TypeError or ValueError naming the argument.
    """
    if rounding not in ("once", "twice"):
        raise ValueError(f"{operation}: rounding is {rounding!r}: 'once' or 'twice' needed")
    limit, half = check.dimensions(operation, "cos", cos, "P, D/2")
    width = 2 * half
    if width not in (64, 128):
        raise ValueError(f"{operation}: cos has shape {tuple(cos.shape)}: [P, 32] or [P, 64] needed")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"{operation}: {heads} query heads and k_cache has {kv_heads}: a multiple of its heads needed")
    count, _ = check.dimensions(operation, "qkv", qkv, "T, (Hq + 2 Hk) D")
    check.rows(operation, "qkv", qkv, (count, (heads + 2 * kv_heads) * width), qkv.dtype)
    check.aligned(operation, "qkv", qkv)
    check.tensor(operation, "cos", cos, (limit, half), torch.float32)
    check.tensor(operation, "sin", sin, (limit, half), torch.float32)
    check.aligned(operation, "cos", cos)
    check.aligned(operation, "sin", sin)
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{operation}: {'q_norm' if q_norm is None else 'k_norm'} is None and the other is not")
    if q_norm is not None and k_norm is not None:
        for name, norm, norm_heads in (("q_norm", q_norm, heads), ("k_norm", k_norm, kv_heads)):
            check.tensor(operation, name, norm, (norm_heads * width,), qkv.dtype)
            check.aligned(operation, name, norm)
    return width


def norm_kind(q_norm: torch.Tensor | None, rounding: str) -> str:
    """Kind of norm before the rotation: "none", "once" or "twice"."""
    return "none" if q_norm is None else rounding


@kernel_factory
def fast(dtype: str, head_dim: int, norm: str, paged: bool) -> Kernel:
    """qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, positions, table, q_out, Hq, Hk, pages of a slot, log2 of
    a page, strides of the cache (slot or page, position, head) and of qkv and q_out, eps; grid (T,).

    dtype: "bf16" or "f16".
    """
    units = head_dim // 16  # of a head: eight pairs of elements each
    chunks = head_dim // 8
    normed = norm != "none"
    squares, normalise, rotate = sums_of_squares(dtype), normalised(dtype, norm == "twice"), rotated(dtype)

    def rope_write(
        qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, positions, table, q_out, q_heads, kv_heads, pages,
        page_bits, slot_stride, position_stride, head_stride, x_stride, out_stride, eps,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(32, uint8)
        scratch = ptx.shared_address(memory)
        thread = int64(cuda.threadIdx.x)
        token = int64(cuda.blockIdx.x)
        row = token * x_stride
        q_width, k_width = int64(q_heads) * head_dim, int64(kv_heads) * head_dim
        ptx.griddepcontrol_wait()
        position = int64(positions[token])
        slot = int64(slots[token])
        q_scale, k_scale = float32(1.0), float32(1.0)
        if normed:
            q_words = cuda.local.array(WORDS, uint32)
            k_words = cuda.local.array(WORDS, uint32)
            load_batch(q_words, qkv, row, q_width // 8, thread)
            load_batch(k_words, qkv, row + q_width, k_width // 8, thread)
            sums = squares(q_words, k_words, qkv, row, q_width // 8, row + q_width, k_width // 8, thread)
            put_sums(scratch, thread, sums[0], sums[1])
            cuda.syncthreads()
            q_scale, k_scale = norm_scales(scratch, thread, q_width, k_width, eps)
        target = slot * slot_stride + position * position_stride
        if paged:
            page = int64(table[slot * pages + (position >> page_bits)])
            inside = position & ((int64(1) << page_bits) - 1)
            target = page * slot_stride + inside * position_stride
        angle = position * (head_dim // 2)
        angles = cuda.local.array(16, float32)
        words = cuda.local.array(8, uint32)
        unit = thread
        while unit < (q_heads + kv_heads) * units:
            head, d = unit // units, unit % units * 8
            first = ptx.ld_global_v4(qkv, row + head * head_dim + d)
            second = ptx.ld_global_v4(qkv, row + head * head_dim + head_dim // 2 + d)
            for half in range(2):
                cosines = ptx.ld_global_v4(cos, angle + d + 4 * half)
                sines = ptx.ld_global_v4(sin, angle + d + 4 * half)
                for e in range(4):
                    angles[8 * half + 2 * e] = ptx.f32_from_bits(cosines[e])
                    angles[8 * half + 2 * e + 1] = ptx.f32_from_bits(sines[e])
            scale = q_scale if head < q_heads else k_scale
            if normed:
                if head < q_heads:
                    w_first = ptx.ld_global_v4(q_norm, head * head_dim + d)
                    w_second = ptx.ld_global_v4(q_norm, head * head_dim + head_dim // 2 + d)
                else:
                    w_first = ptx.ld_global_v4(k_norm, (head - q_heads) * head_dim + d)
                    w_second = ptx.ld_global_v4(k_norm, (head - q_heads) * head_dim + head_dim // 2 + d)
            for e in range(4):
                a, b = first[e], second[e]
                if normed:
                    a = normalise(a, w_first[e], scale)
                    b = normalise(b, w_second[e], scale)
                result = rotate(a, b, angles[4 * e], angles[4 * e + 1], angles[4 * e + 2], angles[4 * e + 3])
                words[e], words[4 + e] = result[0], result[1]
            if head < q_heads:
                place = token * out_stride + head * head_dim + d
                ptx.st_global_v4(q_out, place, words[0], words[1], words[2], words[3])
                ptx.st_global_v4(q_out, place + head_dim // 2, words[4], words[5], words[6], words[7])
            else:
                place = target + (head - q_heads) * head_stride + d
                ptx.st_global_v4(k_cache, place, words[0], words[1], words[2], words[3])
                ptx.st_global_v4(k_cache, place + head_dim // 2, words[4], words[5], words[6], words[7])
            unit += THREADS
        vector = thread
        while vector < kv_heads * chunks:
            head, chunk = vector // chunks, vector % chunks
            words = ptx.ld_global_v4(qkv, row + q_width + k_width + vector * 8)
            ptx.st_global_v4(
                v_cache, target + head * head_stride + chunk * 8, words[0], words[1], words[2], words[3]
            )  # fmt: skip
            vector += THREADS

    kind = f"{'' if norm == 'none' else f'norm_{norm}_'}{'paged_' if paged else ''}"
    name = f"rope_write_{kind}d{head_dim}{HALVES[dtype].suffix}"
    pointer = f"{dtype}*"
    kinds = (*(pointer,) * 3, "f32*", "f32*", pointer, pointer, *("i32*",) * 3, pointer)
    kinds += (*("i32",) * 4, *("i64",) * 5, "f32")
    return Kernel(name, rope_write, kinds, THREADS, options=LaunchOptions(programmatic=True))


def rope_write(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rounding: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    q_out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """For any list of tokens: q of the projection, normed and rotated, to q_out; k so, and v, to the cache.

    qkv [T, (Hq + 2 Hk) D], rows contiguous; q_norm [Hq D], k_norm [Hk D] or both None (no norm), with eps and rounding
    ("once" or "twice") as `kernels.rms_norm`; cos, sin fp32 [P, D/2]; q_out [T, Hq, D], heads contiguous; all but the
    angles bf16, or all fp16; D is 64 or 128. k_cache, v_cache [S, C, Hk, D] of the same strides, the last one 1; with
    table i32[S, pages] they are [P, page, Hk, D] and position p of slot s is place p % page of page table[s, p //
    page], page a power of two from 8 to 128. slots, positions i32[T] with 0 <= slot < S and 0 <= position < C, P (not
    checked); no (slot, position) twice. All rows at multiples of 16 bytes. Returns q_out.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, heads, _ = check.dimensions("rope_write", "q_out", q_out, "T, Hq, D")
    dtype = check.half_name("rope_write", "qkv", qkv)
    cache = cache_of("rope_write", k_cache, v_cache, k_cache.shape[-1], table, qkv.dtype)
    width = check_projection("rope_write", qkv, q_norm, k_norm, rounding, cos, sin, heads, cache.kv_heads)
    check_tokens("rope_write", len(qkv), width, k_cache, slots, positions)
    out_stride = check.rows("rope_write", "q_out", q_out, (len(qkv), heads, width), qkv.dtype)
    check.aligned("rope_write", "q_out", q_out)
    if count:
        fast(dtype, width, norm_kind(q_norm, rounding), table is not None).launch(
            (count,), qkv, _or(q_norm, qkv), _or(k_norm, qkv), cos, sin, k_cache, v_cache, slots, positions,
            _or(table, slots), q_out, heads, cache.kv_heads, cache.pages, cache.page_bits, cache.slot_stride,
            cache.position_stride, cache.head_stride, qkv.stride(0), out_stride, eps,
        )  # fmt: skip
    return q_out


def check_tokens(
    operation: str, count: int, width: int, k_cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> None:
    """One slot and position a token, and heads of the cache as wide as the angles say. Raises as `rope_write`."""
    if k_cache.shape[3] != width:
        raise ValueError(f"{operation}: k_cache has head dimension {k_cache.shape[3]}: {width} needed, as of cos")
    check.tensor(operation, "slots", slots, (count,), torch.int32)
    check.tensor(operation, "positions", positions, (count,), torch.int32)


def _or(given: Any, other: torch.Tensor) -> torch.Tensor:
    """The tensor, or one that a kernel that has no use for it may be given."""
    return other if given is None else given
