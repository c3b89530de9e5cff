"""A matrix of 4-bit codes, whichever checkpoint it came from, and the one value that each code stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.model.quant.nibbles import pack_bytes, unpack_bytes

MIDDLE = 8  # the zero point of a symmetric matrix
# Quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al., "QLoRA", 2023, appendix E), as fp32.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Int4Matrix:
    """A weight of N rows and K columns (outputs and inputs of a linear layer) whose elements are codes of 4 bits.

    codes: uint8 [N, ceil(K / 2)], column 2 j the low half of byte j.
    scales: [N, G], fp16, bf16 or fp32, of any sign; of NF4 the absolute maxima, fp32.
    zeros: uint8 [N, G], 0 … 15: the code of 0; None: 8 everywhere, or NF4.
    columns: K.
    group_size: columns that share a scale; the last group of a row may be shorter.
    g_idx: int32 [K], each column's group, where groups are not columns in a row.
    nf4: whether a code stands for one of NF4_LEVELS, not for itself less the zero.

    Raises:
        ValueError: A tensor has not the shape or dtype that follows from the others.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    group_size: int
    g_idx: Tensor | None = None
    nf4: bool = False

    def __post_init__(self) -> None:
        rows, groups = self.codes.shape[0], self.scales.shape[1]
        expected = {
            "codes": (self.codes, torch.uint8, (rows, -(-self.columns // 2))),
            "scales": (self.scales, self.scales.dtype, (rows, groups)),
            "zeros": (self.zeros, torch.uint8, (rows, groups)),
            "g_idx": (self.g_idx, torch.int32, (self.columns,)),
        }
        for name, (tensor, dtype, shape) in expected.items():
            if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; {dtype} {list(shape)} was expected "
                    f"of {self.columns} columns"
                )
        if self.g_idx is None and groups != -(-self.columns // self.group_size):
            raise ValueError(f"{groups} groups of {self.group_size} columns are not a row of {self.columns}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> Int4Matrix:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def rows(self, begin: int, end: int | None) -> Int4Matrix:
        """Rows begin … end - 1, on the same memory."""
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return replace(self, codes=self.codes[begin:end], scales=self.scales[begin:end], zeros=zeros)

    def unpacked(self) -> Tensor:
        """Codes, uint8 [N, K]."""
        return unpack_bytes(self.codes, self.columns)

    def group_of(self) -> Tensor:
        """Each column's group, int64 [K]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.columns, device=self.device) // self.group_size

    def zero_points(self) -> Tensor:
        """The code of 0 of each group, uint8 [N, G]; not of NF4."""
        if self.zeros is None:
            return torch.full(self.scales.shape, MIDDLE, dtype=torch.uint8, device=self.device)
        return self.zeros

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The value [N, K] of each code: (code - zero) · scale, or NF4's level · absmax, rounded once to `dtype`.

        The product is fp32's, which is exact for scales of 16 bits. It is in every bit what AutoAWQ, GPTQModel and
        compressed-tensors compute where `dtype` is the scales', and bitsandbytes' `dequantize_4bit`.
        """
        codes = self.unpacked()
        if self.nf4:
            values = torch.tensor(NF4_LEVELS, device=self.device)[codes.int()]
        elif self.zeros is None:
            values = codes.float() - MIDDLE
        else:
            values = codes.float() - self._spread(self.zeros)
        return (values * self._spread(self.scales.float())).to(dtype)

    def _spread(self, values: Tensor) -> Tensor:
        """What each column's group has, [N, K] of [N, G]."""
        if self.g_idx is not None:
            return values[:, self.g_idx.long()]
        return values.repeat_interleave(self.group_size, 1)[:, : self.columns]

    def overflows(self, dtype: torch.dtype) -> bool:
        """Whether a value is NaN or Inf as `dtype`. All are looked at only where a scale is that large."""
        if not torch.isfinite(self.scales).all():
            return True
        limit = torch.finfo(dtype).max / (1 if self.nf4 else 16)
        return bool((self.scales.abs() > limit).any()) and not bool(torch.isfinite(self.dequantise(dtype)).all())


def make_int4(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, g_idx: Tensor | None = None,
    nf4: bool = False,
) -> Int4Matrix:  # fmt: skip
    """A matrix of codes uint8 [N, K], one a byte."""
    return Int4Matrix(pack_bytes(codes), scales, zeros, codes.shape[1], group_size, g_idx, nf4)


def in_a_row(g_idx: Tensor | None, group_size: int) -> bool:
    """Whether each group's columns follow each other, so that nothing need be told of them."""
    return g_idx is None or torch.equal(g_idx.long(), torch.arange(len(g_idx), device=g_idx.device) // group_size)


def joined(parts: Sequence[Int4Matrix]) -> Int4Matrix | None:
    """The rows of all parts as one matrix; None where they differ in their groups or in what their codes stand for.

    Of symmetric and asymmetric parts it is asymmetric, which changes no value.
    """
    first = parts[0]
    for part in parts[1:]:
        alike = (part.columns, part.group_size, part.nf4, part.scales.dtype, part.scales.shape[1])
        if alike != (first.columns, first.group_size, first.nf4, first.scales.dtype, first.scales.shape[1]):
            return None
        if (part.g_idx is None) != (first.g_idx is None):
            return None
        if part.g_idx is not None and first.g_idx is not None and not torch.equal(part.g_idx, first.g_idx):
            return None
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([part.zero_points() for part in parts])
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=zeros,
    )


def aligned_blocks(absmax: Tensor, rows: int, columns: int, block: int) -> tuple[Tensor, int]:
    """Scales [rows, G] and group size of a matrix whose flat elements, row after row, share `absmax` in blocks.

    A block that reaches into the next row is cut into equal parts, each with the block's own scale.
    """
    part = math.gcd(block, columns)
    of_part = absmax.repeat_interleave(block // part)[: rows * (columns // part)]
    return of_part.view(rows, columns // part), part
