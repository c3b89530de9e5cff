"""Linear layers: a weight matrix, however it is stored.

Weights, operations, costs and benchmarks know a matrix as a `Linear`. A form of storing one is a class here with these
members. It stands for one number a weight, which `rows` gives and every product multiplies with: `ReferenceOps` takes
the rows of any form, `CudaOps` has a product for each form that it serves, chosen in its `_multiply`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


class Linear(Protocol):
    """A matrix W [out_features, in_features], of which `Ops.linear` computes x @ W.T."""

    form: ClassVar[str]  # how it is stored, as errors and reports say it

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on its device: what a product reads of it."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What it is stored in, by name."""
        ...

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Weights of rows begin … end - 1, [n, in_features], in the dtype in which they are multiplied."""
        ...


@dataclass(frozen=True, eq=False)
class DenseLinear:
    """A matrix stored as it is.

    weight: bf16, fp16 or fp32 [out_features, in_features], row by row.
    """

    form: ClassVar[str] = "dense"
    weight: Tensor

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        return self.weight[begin:end]

    def write(self, row: int, values: Tensor) -> None:
        """Take `values` [n, in_features] as the rows from `row` on, rounded to the matrix' dtype."""
        self.weight[row : row + len(values)].copy_(values)
