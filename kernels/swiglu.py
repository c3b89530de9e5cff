"""SwiGLU: silu(gate) * up, from the fused projection whose first half of columns is gate and second half up.

| version | what it does |
|---|---|
| naive | one thread an output element |

Measured shares of the limit: `reports/REPORT.md`.
"""

from __future__ import annotations

import torch

from kernels import check, device
from kernels.cuda import cuda, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 128


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in torch, in the dtype given: [T, 2I] to [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@kernel_factory
def naive(dtype: str) -> Kernel:
    """gate_up [T, 2I], out [T, I], I; grid (T, I / THREADS)."""
    load, store = device.load(dtype), device.store(dtype)

    def swiglu(gate_up, out, width):
        token = int64(cuda.blockIdx.x)
        i = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if i < width:
            gate = load(gate_up, token * 2 * width + i)
            up = load(gate_up, token * 2 * width + width + i)
            store(out, token * width + i, device.silu(gate) * up)

    return Kernel(f"swiglu_naive_{dtype}", swiglu, (f"{dtype}*", f"{dtype}*", "i32"), THREADS)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = gate / (1 + exp(-gate)) * up in fp32, rounded once.

    gate_up [T, 2I], out [T, I], bf16, fp16 or fp32, contiguous. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("swiglu", "gate_up", gate_up)
    count, twice = check.dimensions("swiglu", "gate_up", gate_up, "T, 2I")
    if twice % 2:
        raise ValueError(f"swiglu: gate_up has {twice} columns: an even number needed (gate, then up)")
    check.tensor("swiglu", "gate_up", gate_up, (count, twice), gate_up.dtype)
    check.tensor("swiglu", "out", out, (count, twice // 2), gate_up.dtype)
    if count and twice:
        naive(dtype).launch((count, -(-twice // 2 // THREADS)), gate_up, out, twice // 2)
    return out
