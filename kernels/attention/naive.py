"""Attention, version naive: one block a head of a token, over the KV cache in chunks of 64 positions.

Order of operations, all in fp32, for the token at position p that attends to positions begin … p:
1. The chunks are positions 64 c … 64 c + 63 for c = begin // 64 … p // 64, in that order; of a chunk only the positions
   from begin to p take part.
2. score_j = q · k_j, the eight chains of `device.dot`; factor = scale * log2 e in fp32.
3. For a chunk, by itself: m_c = the largest score * factor; w_j = 2 ** fma(score_j, factor, -m_c) (ex2.approx); l_c =
   the sum of w_j and o_c[d] = the chain of fused multiply-adds of w_j and v_j[d], both over j in order from 0.
4. Combined into m, l, o (which start as -inf, 0, 0): m' = max(m, m_c), a = 2 ** (m - m'), b = 2 ** (m_c - m'),
   l = fma(l, a, l_c * b), o[d] = fma(o[d], a, o_c[d] * b), m = m'.
5. out[d] = o[d] / l, rounded once to the dtype.
A chunk's m_c, l_c, o_c depend on its positions alone, so any version may compute chunks elsewhere and combine in order.
"""

from __future__ import annotations

import math

import torch

from kernels import check, device, ptx
from kernels.cuda import cuda, float32, int64
from kernels.launch import Kernel, kernel_factory

CHUNK = 64
THREADS = 64


@kernel_factory
def naive(dtype: str, head_dim: int) -> Kernel:
    """q, k_cache, v_cache, slots, positions, out, query heads a KV head, Hk, C, token strides of q and out, factor,
    window; grid (T, Hq)."""
    load, store, dot = device.load(dtype), device.store(dtype), device.dot("f32", dtype)
    owned = -(-head_dim // THREADS)

    def attention(
        q, k_cache, v_cache, slots, positions, out, group, kv_heads, capacity, q_stride, out_stride, factor, window
    ):
        query = cuda.shared.array(head_dim, float32)
        scores = cuda.shared.array(CHUNK, float32)
        weights = cuda.shared.array(CHUNK, float32)
        mine = cuda.local.array(owned, float32)
        token = int64(cuda.blockIdx.x)
        head = int64(cuda.blockIdx.y)
        thread = cuda.threadIdx.x

        d = thread
        while d < head_dim:
            query[d] = load(q, token * q_stride + head * head_dim + d)
            d += THREADS
        for e in range(owned):
            mine[e] = float32(0.0)
        cuda.syncthreads()

        position = int64(positions[token])
        begin = int64(0)
        if window > 0 and position >= window:
            begin = position - window + 1
        # Element 0 of this head at position 0 of the slot, and the distance from one position to the next.
        step = int64(kv_heads) * head_dim
        base = int64(slots[token]) * capacity * step + head // group * head_dim
        largest = float32(-math.inf)
        total = float32(0.0)
        chunk = begin // CHUNK * CHUNK
        while chunk <= position:
            low = max(begin, chunk)
            high = min(position + 1, chunk + CHUNK)
            j = chunk + thread
            if low <= j < high:
                scores[thread] = dot(query, 0, k_cache, base + j * step, head_dim)
            cuda.syncthreads()

            chunk_largest = float32(-math.inf)
            for i in range(low - chunk, high - chunk):
                chunk_largest = max(chunk_largest, scores[i])
            chunk_largest = ptx.mul_rn_f32(chunk_largest, factor)
            if low <= j < high:
                weights[thread] = ptx.ex2_approx_f32(ptx.fma_rn_f32(scores[thread], factor, -chunk_largest))
            cuda.syncthreads()

            new_largest = max(largest, chunk_largest)
            old_scale = ptx.ex2_approx_f32(largest - new_largest)
            new_scale = ptx.ex2_approx_f32(chunk_largest - new_largest)
            chunk_total = float32(0.0)
            for i in range(low - chunk, high - chunk):
                chunk_total = chunk_total + weights[i]
            total = ptx.fma_rn_f32(total, old_scale, ptx.mul_rn_f32(chunk_total, new_scale))
            for e in range(owned):
                d = e * THREADS + thread
                if d < head_dim:
                    value = float32(0.0)
                    for i in range(low - chunk, high - chunk):
                        value = ptx.fma_rn_f32(weights[i], load(v_cache, base + (chunk + i) * step + d), value)
                    mine[e] = ptx.fma_rn_f32(mine[e], old_scale, ptx.mul_rn_f32(value, new_scale))
            largest = new_largest
            chunk += CHUNK

        for e in range(owned):
            d = e * THREADS + thread
            if d < head_dim:
                store(out, token * out_stride + head * head_dim + d, ptx.div_rn_f32(mine[e], total))

    pointer = f"{dtype}*"
    kinds = (pointer, pointer, pointer, "i32*", "i32*", pointer, "i32", "i32", "i32", "i64", "i64", "f32", "i32")
    return Kernel(f"attention_naive_{dtype}_d{head_dim}", attention, kinds, THREADS)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of a packed list of tokens over the cache: prefill, decode and mixtures of them.

    q, out [T, Hq, D] (heads contiguous, any token stride), k_cache, v_cache [S, C, Hk, D] contiguous, bf16, fp16 or
    fp32; Hk divides Hq. Token t reads cache[slots[t], max(0, positions[t] - window + 1) … positions[t]]; window 0 is no
    window. slots, positions i32[T] with 0 <= slot < S and 0 <= position < C (not checked). Returns out.
    Raises TypeError or ValueError where shapes, dtypes, strides, scale or window do not fit.
    """
    dtype = check.dtype_name("attention", "q", q)
    count, heads, width = check.dimensions("attention", "q", q, "T, Hq, D")
    slot_count, capacity, kv_heads, _ = check.dimensions("attention", "k_cache", k_cache, "S, C, Hk, D")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: q has {heads} heads and the cache {kv_heads}: a multiple of the cache's needed")
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}: a positive number needed")
    if window < 0:
        raise ValueError(f"attention: window is {window}: 0 (none) or a number of positions needed")
    q_stride = check.rows("attention", "q", q, (count, heads, width), q.dtype)
    out_stride = check.rows("attention", "out", out, (count, heads, width), q.dtype)
    check.tensor("attention", "k_cache", k_cache, (slot_count, capacity, kv_heads, width), q.dtype)
    check.tensor("attention", "v_cache", v_cache, (slot_count, capacity, kv_heads, width), q.dtype)
    check.tensor("attention", "slots", slots, (count,), torch.int32)
    check.tensor("attention", "positions", positions, (count,), torch.int32)
    if count:
        naive(dtype, width).launch(
            (count, heads),
            q,
            k_cache,
            v_cache,
            slots,
            positions,
            out,
            heads // kv_heads,
            kv_heads,
            capacity,
            q_stride,
            out_stride,
            scale * math.log2(math.e),
            window,
        )
    return out
