"""CUDA kernels written in Python: one file (or folder) an operation, from its reference to its fastest version.

Launchers take tensors and write into tensors the caller allocated. `catalogue` lists the kernels to build beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.launch import Kernel

__all__ = ["catalogue"]


def catalogue(dtypes: Sequence[str] = ("bf16", "f32"), head_dims: Sequence[int] = (128,)) -> list[Kernel]:
    """Every kernel of these dtypes ("bf16", "f32") and attention head dimensions, each once."""
    from kernels import embedding, kv_write, residual, rms_norm, rope, sampling, swiglu
    from kernels.attention import naive as attention
    from kernels.linear import naive as linear

    kernels: list[Kernel] = []
    for dtype in dtypes:
        kernels += [
            embedding.naive(dtype),
            rms_norm.naive(dtype, False),
            rms_norm.naive(dtype, True),
            rope.naive(dtype),
            linear.naive(dtype),
            swiglu.naive(dtype),
            residual.naive(dtype),
            kv_write.naive(dtype),
            *(attention.naive(dtype, head_dim) for head_dim in head_dims),
            sampling.naive_argmax(dtype),
            sampling.naive_sample(dtype),
            sampling.naive_repetition_penalty(dtype),
        ]
    return kernels
