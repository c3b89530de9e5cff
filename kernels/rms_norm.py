"""RMS normalisation of rows: x / sqrt(mean(x²) + eps) * weight.

| version | what it does |
|---|---|
| naive | one block a row; a fixed tree over the block's threads |

Measured shares of the limit: `reports/REPORT.md`.

Order of summation, for every version: thread i of 128 sums the squares of elements i, i + 128, i + 256, … with fp32
fused multiply-adds in that order; the 128 sums are added by a tree, the upper half onto the lower (64, 32, … 1). It
depends on the row's width alone.
"""

from __future__ import annotations

import torch

from kernels import check, device, ptx
from kernels.cuda import cuda, float32, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 128


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str = "once") -> torch.Tensor:
    """The normalisation as transformers computes it. x [T, H], weight [H]; rounding "once" (OLMo-2) or "twice" (Llama).

    Computed in fp32 (fp64 where x is float64) and returned in x's dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "twice":
        return weight * normalised.to(x.dtype)
    return (weight * normalised).to(x.dtype)


@kernel_factory
def naive(dtype: str, twice: bool) -> Kernel:
    """x [T, H], weight [H], out [T, H], H, row strides of x and out, eps; grid (T,)."""
    load, store, rounded = device.load(dtype), device.store(dtype), device.rounding(dtype)

    def rms_norm(x, weight, out, width, x_stride, out_stride, eps):
        shared = cuda.shared.array(THREADS, float32)
        thread = cuda.threadIdx.x
        source = int64(cuda.blockIdx.x) * x_stride
        target = int64(cuda.blockIdx.x) * out_stride
        squares = float32(0.0)
        i = thread
        while i < width:
            value = load(x, source + i)
            squares = ptx.fma_rn_f32(value, value, squares)
            i += THREADS
        total = device.block_sum(shared, thread, squares, THREADS)
        scale = device.inverse_rms(total, width, eps)
        i = thread
        while i < width:
            normalised = load(x, source + i) * scale
            if twice:
                normalised = rounded(normalised)
            store(out, target + i, normalised * load(weight, i))
            i += THREADS

    name = f"rms_norm_{'twice_' if twice else ''}naive_{dtype}"
    pointer = f"{dtype}*"
    return Kernel(name, rms_norm, (pointer, pointer, pointer, "i32", "i64", "i64", "f32"), THREADS)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str, out: torch.Tensor) -> torch.Tensor:
    """out = x * (1 / sqrt(mean(x²) + eps)) * weight, computed in fp32.

    x, out [T, H] (rows contiguous, any row stride; out may be x), weight [H], bf16, fp16 or fp32. rounding: "once"
    rounds the product to the dtype (OLMo-2), "twice" rounds before multiplying with weight too (Llama). Returns out.
    Raises TypeError or ValueError where shapes, dtypes, strides or rounding do not fit.
    """
    if rounding not in ("once", "twice"):
        raise ValueError(f"rms_norm: rounding is {rounding!r}: 'once' or 'twice' needed")
    dtype = check.dtype_name("rms_norm", "x", x)
    count, width = check.dimensions("rms_norm", "x", x, "T, H")
    x_stride = check.rows("rms_norm", "x", x, (count, width), x.dtype)
    check.tensor("rms_norm", "weight", weight, (width,), x.dtype)
    out_stride = check.rows("rms_norm", "out", out, (count, width), x.dtype)
    if count and width:
        naive(dtype, rounding == "twice").launch((count,), x, weight, out, width, x_stride, out_stride, eps)
    return out
