"""Launchers of version split."""

from __future__ import annotations

import torch

from kernels import check
from kernels.cuda import SIMULATED
from kernels.sampling.blocks import HEAD, PARTIALS, ROW, SPLIT_THREADS
from kernels.sampling.draw import split_sample
from kernels.sampling.floor import split_floor
from kernels.sampling.greedy import split_argmax
from kernels.sampling.settings import check_settings


def argmax_workspace_size(count: int) -> int:
    """Elements of the i32 workspace `argmax_split` needs for up to `count` rows."""
    return count * HEAD


def sample_workspace_size(count: int) -> int:
    """Elements of the i32 workspace `sample_split` needs for up to `count` rows: 258 KB each."""
    return count * ROW


def chunks_of(count: int, vocabulary: int) -> int:
    """Blocks that share a row: enough of them to fill a GPU, none without a vector for each thread."""
    # Every block costs the simulator much, and small rows are to be shared too.
    if SIMULATED:
        return min(3, -(-vocabulary // 64))
    return min(-(-vocabulary // (8 * SPLIT_THREADS)), PARTIALS, max(8, 2048 // count))


def check_split(operation: str, logits: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
    """B and V. Raises TypeError or ValueError naming the argument."""
    check.half_name(operation, "logits", logits)
    count, vocabulary = check.dimensions(operation, "logits", logits, "B, V")
    check.tensor(operation, "logits", logits, (count, vocabulary), logits.dtype)
    check.tensor(operation, "out", out, (count,), torch.int32)
    if vocabulary % 8 or vocabulary == 0:
        raise ValueError(f"{operation}: logits has rows of {vocabulary}: a multiple of 8 needed")
    if logits.data_ptr() % 16:
        raise ValueError(f"{operation}: logits does not begin at a multiple of 16 bytes")
    if count > 65535:
        raise ValueError(f"{operation}: logits has {count} rows: at most 65535 at a time")
    return count, vocabulary


def check_workspace(operation: str, workspace: torch.Tensor, size: int) -> None:
    check.dimensions(operation, "workspace", workspace, "N")
    check.tensor(operation, "workspace", workspace, tuple(workspace.shape), torch.int32)
    if len(workspace) < size:
        raise ValueError(f"{operation}: workspace has {len(workspace)} elements: at least {size} needed")
    if workspace.data_ptr() % 16:
        raise ValueError(f"{operation}: workspace does not begin at a multiple of 16 bytes")


def argmax_split(logits: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
    """`argmax`, by many blocks a row.

    logits [B, V] bf16 or fp16, contiguous, at a multiple of 16 bytes, V a multiple of 8; out i32[B]. workspace: i32 of
    at least argmax_workspace_size(B), zero before its first use and of no other function's; what must be zero is so
    again afterwards. Returns out. Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, vocabulary = check_split("argmax_split", logits, out)
    check_workspace("argmax_split", workspace, argmax_workspace_size(count))
    if count:
        split_argmax(check.HALVES[logits.dtype]).launch(
            (chunks_of(count, vocabulary), count), logits, out, workspace, vocabulary
        )
    return out


def sample_split(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """`sample`, by many blocks a row: the same tokens, but for top_p where fp32 sums of the mass miss its threshold.

    Arguments as of `sample`, but logits [B, V] bf16 or fp16, at a multiple of 16 bytes, V a multiple of 8. workspace:
    i32 of at least sample_workspace_size(B), zero before its first use and of no other function's; what must be zero is
    so again afterwards. Returns out. Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, vocabulary = check_split("sample_split", logits, out)
    check_settings("sample_split", count, temperature, top_k, top_p, min_p, seed, position)
    check_workspace("sample_split", workspace, sample_workspace_size(count))
    if count:
        grid = (chunks_of(count, vocabulary), count)
        dtype = check.HALVES[logits.dtype]
        split_floor(dtype).launch(grid, logits, temperature, top_k, top_p, workspace, vocabulary)
        split_sample(dtype).launch(grid, logits, temperature, min_p, seed, position, out, workspace, vocabulary)
    return out
