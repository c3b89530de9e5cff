"""Linear layers: a weight matrix, however it is stored.

Weights, operations, costs and benchmarks know a matrix as a `Linear`. A form of storing one is a class here with these
members. It stands for one number a weight, which `rows` gives and every product multiplies with: `ReferenceOps` takes
the rows of any form, `CudaOps` has a product for each form that it serves, chosen in its `_multiply`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from kernels import tiles


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


@dataclass(frozen=True, eq=False)
class TiledLinear:
    """A matrix stored as tiles of 8 rows and 64 columns, which arrive faster than rows (`kernels.tiles`).

    weight: bf16 or fp16 tiles; of gate and up those have four rows each.
    """

    form: ClassVar[str] = "tiles"
    weight: Tensor

    @property
    def out_features(self) -> int:
        return tiles.shape_of(self.weight)[0]

    @property
    def in_features(self) -> int:
        return tiles.shape_of(self.weight)[1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        count = (self.out_features if end is None else end) - begin
        return self._place(begin, count).reshape(count, -1) if count < self.out_features else tiles.to_rows(self.weight)

    def write(self, row: int, values: Tensor) -> None:
        """Take `values` [n, in_features] as the rows from `row` on, rounded to the matrix' dtype; both row and n
        multiples of 8."""
        place = self._place(row, len(values))
        place.copy_(values.view(place.shape))

    def _place(self, row: int, count: int) -> Tensor:
        """A view [count / r, r, in_features / 64, 64] of rows that begin and end with tiles and are of one part."""
        parts = tiles.parts_of(self.weight)
        part_rows, step = self.out_features // len(parts), parts[0].shape[1]
        first = row % part_rows
        if first % step or count % step or first + count > part_rows:
            raise ValueError(f"rows {row} to {row + count - 1} of {self.out_features} as tiles: whole tiles needed")
        return parts[row // part_rows][first // step : (first + count) // step]
