"""Linear layers whose weights are codes of 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.model.linear import DenseLinear, Linear
from engine.model.quant.int4 import Int4Matrix, joined


@dataclass(frozen=True, eq=False)
class Int4Linear:
    """A matrix of codes, multiplied with as what they stand for in `dtype`."""

    form: ClassVar[str] = "int4"
    matrix: Int4Matrix
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix.columns

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return self.matrix.tensors()

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        return self.matrix.rows(begin, end).dequantise(self.dtype)


@dataclass(frozen=True, eq=False)
class StackedLinear:
    """Matrices that read the same input and are stored in different ways, their rows one below the other."""

    form: ClassVar[str] = "stacked"
    parts: tuple[Linear, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.tensors().items()}

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        end, first, found = self.out_features if end is None else end, 0, []
        for part in self.parts:
            low, high = max(begin - first, 0), min(end - first, part.out_features)
            if low < high:
                found.append(part.rows(low, high))
            first += part.out_features
        return torch.cat(found)


def stacked(parts: Sequence[Int4Matrix | Tensor], dtype: torch.dtype) -> Linear:
    """The rows of all parts, codes or weights in `dtype`, as one matrix: in one form where they are alike."""
    codes = [part for part in parts if isinstance(part, Int4Matrix)]
    whole = joined(codes) if len(codes) == len(parts) else None
    if whole is not None:
        return Int4Linear(whole, dtype)
    return StackedLinear(
        tuple(Int4Linear(part, dtype) if isinstance(part, Int4Matrix) else DenseLinear(part) for part in parts)
    )
