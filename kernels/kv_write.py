"""Put the keys and values of new tokens into the cache.

| version | what it does |
|---|---|
| naive | one block a token, its threads copy side by side |

Measured shares of the limit: `reports/REPORT.md`.
"""

from __future__ import annotations

import torch

from kernels import check
from kernels.cuda import cuda, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 128


def reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """The same in torch, in place: cache[slots[t], positions[t]] = k[t], v[t]."""
    k_cache[slots.long(), positions.long()] = k
    v_cache[slots.long(), positions.long()] = v


@kernel_factory
def naive(dtype: str) -> Kernel:
    """k, v, k_cache, v_cache, slots, positions, C, Hk * D, token strides of k and v; grid (T,)."""

    def kv_write(k, v, k_cache, v_cache, slots, positions, capacity, width, k_stride, v_stride):
        token = int64(cuda.blockIdx.x)
        target = (int64(slots[token]) * capacity + positions[token]) * width
        i = cuda.threadIdx.x
        while i < width:
            k_cache[target + i] = k[token * k_stride + i]
            v_cache[target + i] = v[token * v_stride + i]
            i += THREADS

    kinds = (*(f"{dtype}*",) * 4, "i32*", "i32*", "i32", "i32", "i64", "i64")
    return Kernel(f"kv_write_naive_{dtype}", kv_write, kinds, THREADS)


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """cache[slots[t], positions[t]] = k[t], v[t], in place.

    k, v [T, Hk, D], heads contiguous, any token stride; k_cache, v_cache [S, C, Hk, D] contiguous; bf16, fp16 or fp32.
    slots, positions i32[T] with 0 <= slot < S and 0 <= position < C (not checked); no (slot, position) twice.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("kv_write", "k", k)
    count, heads, width = check.dimensions("kv_write", "k", k, "T, Hk, D")
    slot_count, capacity, _, _ = check.dimensions("kv_write", "k_cache", k_cache, "S, C, Hk, D")
    k_stride = check.rows("kv_write", "k", k, (count, heads, width), k.dtype)
    v_stride = check.rows("kv_write", "v", v, (count, heads, width), k.dtype)
    check.tensor("kv_write", "k_cache", k_cache, (slot_count, capacity, heads, width), k.dtype)
    check.tensor("kv_write", "v_cache", v_cache, (slot_count, capacity, heads, width), k.dtype)
    check.tensor("kv_write", "slots", slots, (count,), torch.int32)
    check.tensor("kv_write", "positions", positions, (count,), torch.int32)
    if count:
        kernel = naive(dtype)
        kernel.launch((count,), k, v, k_cache, v_cache, slots, positions, capacity, heads * width, k_stride, v_stride)
