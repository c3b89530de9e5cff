"""CUDA kernels written in Python: one file (or folder) an operation, from its reference to its fastest version.

Launchers take tensors and write into tensors the caller allocated. `catalogue` lists the kernels to build beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.launch import Kernel

__all__ = ["catalogue"]


def catalogue(dtypes: Sequence[str] = ("bf16", "f16", "f32"), head_dims: Sequence[int] = (128,)) -> list[Kernel]:
    """Every kernel of these dtypes ("bf16", "f16", "f32") and attention head dimensions, each once.

    Of kernels made for a shape those of OLMo-2 7B, and some of 1B. Of "f16" one of each fast operation: they differ
    from those of "bf16" in nothing but conversions and the products' type.
    """
    from kernels import add_norm, embedding, kv_write, read, residual, rms_norm, rope, rope_write, sampling, swiglu
    from kernels.attention import flash, prefill
    from kernels.attention import naive as attention
    from kernels.linear import naive as linear
    from kernels.linear import streamed, tiled

    kernels: list[Kernel] = []
    for dtype in (dtype for dtype in dtypes if dtype != "f16"):
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
    if "bf16" in dtypes:
        kernels += [
            embedding.vectors("bf16"),
            *streamed.catalogue("bf16", 12288, 4096, gated=False),
            *streamed.catalogue("bf16", 22016, 4096, gated=True),
            *tiled.catalogue("bf16", 12288, 4096, gated=False, tokens=(2048,)),
            *tiled.catalogue("bf16", 22016, 4096, gated=True, tokens=(2048,)),
            # Of OLMo-2 1B what sums K in two halves.
            *streamed.catalogue("bf16", 2048, 8192, gated=False, tokens=(1,)),
            *tiled.catalogue("bf16", 2048, 8192, gated=False, tokens=(2048,)),
            *(add_norm.fused("bf16", 2, kind, False) for kind in ("post", "pre", "norm")),
            *(rope_write.fast("bf16", head_dim, "once", False) for head_dim in head_dims),
            *(flash.flash("bf16", head_dim, 1, "once", paged) for head_dim in head_dims for paged in (False, True)),
            *prefill.catalogue("bf16", head_dims),
            sampling.split_argmax("bf16"),
            sampling.split_floor("bf16"),
            sampling.split_sample("bf16"),
            sampling.step_advance(),
            read.bulk(),
            read.vectors(),
        ]
    if "f16" in dtypes:
        kernels += [
            embedding.vectors("f16"),
            *streamed.catalogue("f16", 12288, 4096, gated=False, tokens=(1,)),
            *tiled.catalogue("f16", 22016, 4096, gated=True, tokens=(2048,)),
            add_norm.fused("f16", 2, "post", False),
            *(rope_write.fast("f16", head_dim, "once", False) for head_dim in head_dims),
            *(flash.flash("f16", head_dim, 1, "once", True) for head_dim in head_dims),
            *prefill.catalogue("f16", head_dims, paged=(True,)),
            sampling.split_argmax("f16"),
            sampling.split_floor("f16"),
            sampling.split_sample("f16"),
        ]
    return kernels
