"""The decode GEMM, version "streamed": the weights flow once through a ring in shared memory; up to 128 tokens a pass.

| step | idea | what it gained, in docs/decisions.md |
|---|---|---|
| ring | a producer warp keeps 160 KB of weights on their way; K in order, one read for all tokens | |
| dependent launch | weights come before the kernel ahead ends | "… seven chained launches, not one persistent kernel" |
| tensor maps | tokens come as weights do, a bulk copy a box | "Tokens reach the decode product by tensor maps" |
| tiles | a stage is one copy of whole KB, no L2 promotion | "Decode's weights come as tiles, without promotion" |
| few rows | whole batches of steps a stage | "Stages are whole batches where a block owns few rows" |
| wgmma | sm_90a, from 32 tokens on: operands from shared memory | "From 32 tokens on the decode product uses wgmma" |

Shares of the limit, weight bytes over bandwidth: "Every kernel under the roofline" of the page,
`reports/site/index.html` (`make report`).

One warp of a block is the producer, the others consume. The block owns `groups` x 8 rows of the weight; a consumer warp
owns some of those groups for all tokens and walks K from 0 up. What it multiplies arrives in stages of `boxes` boxes of
64 columns, weight rows and token rows, both in the 128-byte swizzle.

    producer.py    copy "bulk": tensor maps and bulk copies (TMA), sm_90 and later: one lane asks for a whole box
                   copy "async": cp.async, sm_80 and later: a lane asks for 16 bytes
    mma.py         warps multiply from registers, by mma.sync
    wgmma.py       sm_90a, from 32 tokens on: warpgroups of 64 tokens multiply from shared memory

Order of summation: m16n8k16 or m64k16 over K in order on one fp32 accumulator, rounded once to the dtype; where a
weight has few rows (`segments_of`), each half of K on its own and the second added to the first. It depends on the
weight's shape alone: tiles, tokens of a pass, depth of the ring, the way of copying and the instruction change no bit.
For `linear_swiglu` gate and up stay fp32 until silu(gate) * up is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from kernels import check
from kernels.architectures import MULTIPROCESSORS
from kernels.launch import Kernel, machine_of
from kernels.linear.streamed.kernel import streamed
from kernels.linear.streamed.tiling import TOKENS, Tiling, segments_of, tokens_of_a_pass
from kernels.tensor_maps import kept_tensor_map
from kernels.tiles import BOX, boxes_of

__all__ = [
    "BOX", "TOKENS", "Tiling", "catalogue", "linear", "linear_swiglu", "maps", "segments_of", "streamed",
    "tokens_of_a_pass",
]  # fmt: skip


def catalogue(dtype: str, rows: int, depth: int, gated: bool, tokens: Sequence[int] = (1, TOKENS[-1])) -> list[Kernel]:
    """The kernels for a weight [rows, depth], one an architecture and number of tokens, as its usual GPU takes them."""
    return [
        streamed(dtype, Tiling.choose(count, rows, depth, gated, arch, multiprocessors), gated, arch)
        for arch, multiprocessors in MULTIPROCESSORS.items()
        for count in tokens
    ]


@functools.cache
def _plan(
    dtype: str, tokens: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int
) -> tuple[Tiling, Kernel, int]:
    """Tiling, kernel and blocks of the grid for a pass of `tokens` (one of TOKENS)."""
    tiling = Tiling.choose(tokens, rows, depth, gated, arch, multiprocessors)
    return tiling, streamed(dtype, tiling, gated, arch), min(-(-rows // (tiling.groups * 8)), multiprocessors)


def maps(tiling: Tiling, weight: torch.Tensor, x: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensor maps of weight and x for a tiling with copy "bulk"."""
    box = (tiling.own_boxes, tiling.groups, 4, 2) if gated else (tiling.own_boxes, tiling.groups, 8, 1)
    columns = x.view(len(x), -1, BOX).transpose(0, 1)
    return (
        kept_tensor_map(boxes_of(weight, gated), box, ahead=False),
        kept_tensor_map(columns, (tiling.own_boxes, tiling.tokens)),
    )


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool) -> torch.Tensor:
    count, rows, depth = check.product(x, weight, out, BOX, gated)
    if count:
        tiling, kernel, blocks = _plan(
            check.HALVES[x.dtype], tokens_of_a_pass(count), rows, depth, gated, *machine_of(max(x.get_device(), 0))
        )
        if tiling.copy == "async" and weight.dim() != 2:
            raise ValueError(f"linear: weight {tuple(weight.shape)} is tiles: this GPU reads rows [N, K]")
        sources = (weight, x) if tiling.copy == "async" else maps(tiling, weight, x, gated)
        kernel.launch((blocks, -(-count // tiling.tokens)), *sources, out, count, rows, depth)
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
