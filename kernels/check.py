"""Checks of a launcher's arguments: each costs about a microsecond and says what would have been right."""

from __future__ import annotations

import torch

# torch dtypes a kernel computes in, with the name kernels use for them.
HALVES = {torch.bfloat16: "bf16", torch.float16: "f16"}
FLOATS = HALVES | {torch.float32: "f32"}


def dtype_name(operation: str, name: str, tensor: torch.Tensor) -> str:
    """ "bf16", "f16" or "f32". Raises TypeError for any other dtype."""
    known = FLOATS.get(tensor.dtype)
    if known is None:
        raise TypeError(f"{operation}: {name} is {tensor.dtype}: torch.bfloat16, torch.float16 or torch.float32 needed")
    return known


def half_name(operation: str, name: str, tensor: torch.Tensor) -> str:
    """ "bf16" or "f16". Raises TypeError for any other dtype."""
    known = HALVES.get(tensor.dtype)
    if known is None:
        raise TypeError(f"{operation}: {name} is {tensor.dtype}: torch.bfloat16 or torch.float16 needed")
    return known


def tensor(operation: str, name: str, given: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shape and dtype as given, and contiguous. Raises TypeError or ValueError naming the argument."""
    if given.dtype != dtype:
        raise TypeError(f"{operation}: {name} is {given.dtype}: {dtype} needed")
    if given.shape != shape:
        raise ValueError(f"{operation}: {name} has shape {tuple(given.shape)}: {shape} needed")
    if not given.is_contiguous():
        raise ValueError(f"{operation}: {name} is not contiguous (strides {given.stride()})")


def rows(operation: str, name: str, given: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """As `tensor`, but rows (dimension 0) may lie apart. Returns the elements from one row to the next."""
    if given.dtype != dtype:
        raise TypeError(f"{operation}: {name} is {given.dtype}: {dtype} needed")
    if given.shape != shape:
        raise ValueError(f"{operation}: {name} has shape {tuple(given.shape)}: {shape} needed")
    if not given.is_contiguous() and len(given) and not given[0].is_contiguous():
        raise ValueError(f"{operation}: a row of {name} is not contiguous (strides {given.stride()})")
    return given.stride(0)


def dimensions(operation: str, name: str, given: torch.Tensor, meaning: str) -> torch.Size:
    """The shape, of as many dimensions as `meaning` ("T, H") names. Raises ValueError."""
    if given.dim() != meaning.count(",") + 1:
        raise ValueError(f"{operation}: {name} has shape {tuple(given.shape)}: [{meaning}] needed")
    return given.shape


def aligned(operation: str, name: str, given: torch.Tensor) -> None:
    """16-byte access to every row: raises ValueError naming the argument where one does not begin at a multiple."""
    if given.data_ptr() % 16 or any(stride % 8 for stride in given.stride()[:-1]):
        raise ValueError(f"{operation}: {name} (strides {given.stride()}): rows at multiples of 16 bytes needed")


def product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, columns: int, gated: bool
) -> tuple[int, int, int]:
    """T, N and K of x [T, K], weight [N, K] or its tiles (`kernels.tiles`) and out [T, N], or gated [T, N / 2],
    of one 16-bit dtype; N a multiple of 8 (gated: of 16) and K of `columns`. Raises TypeError or ValueError naming the
    argument."""
    operation, multiple = ("linear_swiglu", 16) if gated else ("linear", 8)
    half_name(operation, "x", x)
    count, depth = dimensions(operation, "x", x, "T, K")
    tile = () if weight.dim() == 2 else (4, 2, 64) if gated else (8, 64)
    if tile and weight.shape[2:] != tile:
        raise ValueError(f"{operation}: weight has shape {tuple(weight.shape)}: [N, K] or tiles of {list(tile)} needed")
    rows = weight.shape[0] * (8 if tile else 1)
    if depth % columns or rows % multiple:
        raise ValueError(
            f"{operation}: weight is {tuple(weight.shape)}: rows of {multiple} and columns of {columns} needed"
        )
    tensor(operation, "x", x, (count, depth), x.dtype)
    tensor(operation, "weight", weight, (rows // 8, depth // 64, *tile) if tile else (rows, depth), x.dtype)
    tensor(operation, "out", out, (count, rows // 2 if gated else rows), x.dtype)
    return count, rows, depth
