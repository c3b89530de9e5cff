"""Embedding: a row of the table for each token.

| version | what it does |
|---|---|
| naive | one block a token, its threads copy the row side by side |
| vectors | 16 bytes a load, four loads of a thread under way at once; rows of a multiple of 16 bytes |

Both may be launched while the kernel that writes the tokens still runs (programmatic dependent launch).

Measured shares of the limit: `reports/REPORT.md`.
"""

from __future__ import annotations

import torch

from kernels import check, ptx
from kernels.cuda import cuda, int64, uint32
from kernels.launch import Kernel, LaunchOptions, kernel_factory

THREADS = 128
# Loads of a thread that are under way at once.
BATCH = 4
WORDS = 4 * BATCH


def reference(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """table[tokens] in torch: [T] and [V, H] to [T, H]."""
    return table[tokens.long()]


@kernel_factory
def naive(dtype: str) -> Kernel:
    """tokens i32[T], table [V, H], out [T, H], H; grid (T,)."""

    def embedding(tokens, table, out, width):
        ptx.griddepcontrol_wait()
        # Not before the wait: kernels further on count on all that was written before the step began.
        ptx.griddepcontrol_launch_dependents()
        token = cuda.blockIdx.x
        source = int64(tokens[token]) * width
        target = int64(token) * width
        i = cuda.threadIdx.x
        while i < width:
            out[target + i] = table[source + i]
            i += THREADS

    kinds = ("i32*", f"{dtype}*", f"{dtype}*", "i32")
    return Kernel(f"embedding_naive_{dtype}", embedding, kinds, THREADS, options=LaunchOptions(programmatic=True))


@kernel_factory
def vectors(dtype: str) -> Kernel:
    """tokens i32[T], table [V, H], out [T, H], H, a multiple of 16 bytes; grid (T,)."""
    elements = {"bf16": 8, "f16": 8, "f32": 4}[dtype]

    def embedding(tokens, table, out, width):
        words = cuda.local.array(WORDS, uint32)
        count = int64(width) // elements
        target = int64(cuda.blockIdx.x) * width
        first = int64(cuda.threadIdx.x)
        ptx.griddepcontrol_wait()
        # Not before the wait: kernels further on count on all that was written before the step began.
        ptx.griddepcontrol_launch_dependents()
        source = int64(tokens[cuda.blockIdx.x]) * width
        while first < count:
            for b in range(BATCH):
                vector = first + b * THREADS
                if vector < count:
                    loaded = ptx.ld_global_v4(table, source + vector * elements)
                    for e in range(4):
                        words[4 * b + e] = loaded[e]
            for b in range(BATCH):
                vector = first + b * THREADS
                if vector < count:
                    i = 4 * b
                    place = target + vector * elements
                    ptx.st_global_v4(out, place, words[i], words[i + 1], words[i + 2], words[i + 3])
            first += BATCH * THREADS

    kinds = ("i32*", f"{dtype}*", f"{dtype}*", "i32")
    return Kernel(f"embedding_vectors_{dtype}", embedding, kinds, THREADS, options=LaunchOptions(programmatic=True))


def embedding(tokens: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = table[tokens[t]]: tokens i32[T], 0 <= token < V (not checked), table [V, H] and out [T, H] of one dtype.

    bf16, fp16 or fp32, contiguous. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("embedding", "table", table)
    vocabulary, width = check.dimensions("embedding", "table", table, "V, H")
    (count,) = check.dimensions("embedding", "tokens", tokens, "T")
    check.tensor("embedding", "tokens", tokens, (count,), torch.int32)
    check.tensor("embedding", "table", table, (vocabulary, width), table.dtype)
    check.tensor("embedding", "out", out, (count, width), table.dtype)
    if count:
        wide = width * table.element_size() % 16 == 0 and table.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
        version = vectors if wide else naive
        version(dtype).launch((count,), tokens, table, out, width)
    return out
