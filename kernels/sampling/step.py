"""The step between two steps: a chosen token becomes the next input."""

from __future__ import annotations

import torch

from kernels import check, ptx
from kernels.cuda import cuda, int32, int64
from kernels.launch import Kernel, kernel_factory
from kernels.sampling.blocks import PROGRAMMATIC, SPLIT_THREADS


@kernel_factory
def step_advance() -> Kernel:
    """chosen, tokens, positions, places i32[B], history i32[B, C], B, C; grid (B / SPLIT_THREADS,)."""

    def advance(chosen, tokens, positions, places, history, count, columns):
        ptx.griddepcontrol_launch_dependents()
        row = int64(cuda.blockIdx.x) * SPLIT_THREADS + int64(cuda.threadIdx.x)
        ptx.griddepcontrol_wait()
        if row < count:
            token, place = chosen[row], places[row]
            positions[row] += int32(1)
            tokens[row] = max(token, int32(0))
            history[row * columns + place] = token
            place += int32(1)
            places[row] = int32(0) if place == columns else place

    kinds = (*("i32*",) * 5, "i32", "i32")
    return Kernel("advance_i32", advance, kinds, SPLIT_THREADS, options=PROGRAMMATIC)


def advance(
    chosen: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, places: torch.Tensor, history: torch.Tensor
) -> None:
    """The token that a row has chosen becomes its next step's input: one launch between two steps of a CUDA graph.

    positions[b] += 1, tokens[b] = chosen[b] (0 where that is -1), history[b, places[b]] = chosen[b], places[b] moves
    to the next of the C columns, after the last to the first. chosen, tokens, positions, places i32[B], history
    i32[B, C], contiguous; 0 <= places < C (not checked); history may lie in pinned memory of the host, which can then
    read it without a copy. Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    (count,) = check.dimensions("advance", "chosen", chosen, "B")
    _, columns = check.dimensions("advance", "history", history, "B, C")
    check.tensor("advance", "chosen", chosen, (count,), torch.int32)
    check.tensor("advance", "tokens", tokens, (count,), torch.int32)
    check.tensor("advance", "positions", positions, (count,), torch.int32)
    check.tensor("advance", "places", places, (count,), torch.int32)
    check.tensor("advance", "history", history, (count, columns), torch.int32)
    if count:
        grid = (-(-count // SPLIT_THREADS),)
        step_advance().launch(grid, chosen, tokens, positions, places, history, count, columns)
