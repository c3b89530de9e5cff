"""The prefill GEMM, version "tiled": many tokens against the weights, a tile of the output a block at a time.

| step | idea |
|---|---|
| mma.py | sm_80 and later: cp.async, ldmatrix and mma.sync; all warps copy and multiply, a tile a block |
| wgmma.py | sm_90a: a producer warp copies boxes by tensor maps (TMA) into a ring, warpgroups multiply out of it |
| persistent | blocks stay and take one tile after another: the next one's stages arrive during the epilogue |
| ping-pong | two groups of warpgroups take tiles in turn: one multiplies as the other writes |
| cluster | two blocks with tiles of the same weights: each copies its part for both, by multicast |
| measured | `stages.tune` times tilings, `tilings.csv` keeps the fastest of each shape |

What they gained: docs/decisions.md, "Prefill products: tiles chosen by a model of two constants" and behind it. Shares
of the limit, the sustained matrix rate: the report's kernel tables, `reports/REPORT.md`.

Tokens are the products' 16 or 64 rows and weight rows their columns: a thread holds neighbours of an output row. A tile
of `linear_swiglu` has the gate rows of its outputs and their up rows: a thread holds both of an output.

Order of summation: that of `kernels.linear.streamed`, whatever the tiling: K in order on one fp32 accumulator, or in
two segments, one after the other, that are added at the end; rounded once to the dtype. For `linear_swiglu` gate and up
stay fp32 until silu(gate) * up is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from kernels import check
from kernels.architectures import MULTIPROCESSORS
from kernels.launch import Kernel, machine_of
from kernels.linear.tiled.mma import warps
from kernels.linear.tiled.tiling import MEASURED, STEP, TOKENS, Tiling, is_faster, measured, tilings
from kernels.linear.tiled.wgmma import warpgroups
from kernels.tensor_maps import kept_tensor_map
from kernels.tiles import BOX, boxes_of, shape_of

__all__ = [
    "MEASURED", "STEP", "TOKENS", "Tiling", "catalogue", "is_faster", "launch", "linear", "linear_swiglu", "measured",
    "tilings", "warpgroups", "warps",
]  # fmt: skip


def _kernel(dtype: str, tiling: Tiling, gated: bool, arch: str) -> Kernel:
    return (warpgroups if tiling.multiply == "wgmma" else warps)(dtype, tiling, gated, arch)


def catalogue(
    dtype: str, rows: int, depth: int, gated: bool, tokens: Sequence[int] = range(64, 8193, 64)
) -> list[Kernel]:
    """The kernels for a weight [rows, depth] and these numbers of tokens, each once, as an architecture's usual GPU
    takes them."""
    kernels = {}
    for arch, multiprocessors in MULTIPROCESSORS.items():
        for count in tokens:
            kernel = _kernel(dtype, Tiling.choose(count, rows, depth, gated, arch, multiprocessors), gated, arch)
            kernels[kernel.name] = kernel
    return list(kernels.values())


@functools.cache
def _plan(
    dtype: str, tiling: Tiling, count: int, rows: int, gated: bool, arch: str, multiprocessors: int
) -> tuple[Kernel, tuple[int], int, tuple[int, int] | None]:
    """Kernel, grid, group and, where it reads by tensor maps, rows of the boxes of weights and tokens."""
    grid = (tiling.blocks(count, rows, multiprocessors),)
    boxes = (
        (tiling.rows // max(2 if gated else 1, tiling.cluster), tiling.tokens) if tiling.multiply == "wgmma" else None
    )
    return _kernel(dtype, tiling, gated, arch), grid, tiling.group(count, rows, multiprocessors), boxes


def launch(
    tiling: Tiling, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool, machine: tuple[str, int]
) -> None:
    """The product by one tiling; machine: architecture and multiprocessors. Tensors as those of `linear`, unchecked."""
    count, (rows, depth) = len(x), shape_of(weight)
    kernel, grid, group, boxes = _plan(check.HALVES[x.dtype], tiling, count, rows, gated, *machine)
    if boxes is None and weight.dim() != 2:
        raise ValueError(f"linear: weight {tuple(weight.shape)} is tiles: this GPU reads rows [N, K]")
    if boxes is None:
        kernel.launch(grid, weight, x, out, count, rows, depth, group)
    else:
        part_rows, tokens = boxes
        box = (1, part_rows // 4, 4, 1) if gated else (1, part_rows // 8, 8, 1)
        maps = kept_tensor_map(boxes_of(weight, gated), box), kept_tensor_map(x, (tokens,))
        kernel.launch(grid, *maps, out, count, rows, depth, group)


_choose = functools.cache(Tiling.choose)


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool) -> torch.Tensor:
    count, rows, depth = check.product(x, weight, out, BOX, gated)
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        check.aligned("linear_swiglu" if gated else "linear", name, tensor)
    if count:
        machine = machine_of(max(x.get_device(), 0))
        launch(_choose(count, rows, depth, gated, *machine), x, weight, out, gated, machine)
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = x @ weight.T, accumulated in fp32 in order of K (`segments_of`) and rounded once.

    x [T, K], weight [N, K], out [T, N], all bf16 or all fp16, contiguous; N a multiple of 8, K of 64. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    return _launch(x, weight, out, False)


def linear_swiglu(x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(x @ gate.T) * (x @ up.T), gate and up the halves of gate_up; in fp32, rounded once.

    x [T, K], gate_up [2 I, K], out [T, I], all bf16 or all fp16, contiguous; I a multiple of 8, K of 64. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    return _launch(x, gate_up, out, True)
