"""Linear layers: what a form is asked for, and which backend multiplies with which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from engine.model.linear import DenseLinear, Linear
from engine.ops.reference import ReferenceOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, eq=False)
class Bytes:
    """A form of its own: int8 codes with a scale a row."""

    form: ClassVar[str] = "int8"
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        return vars(self)

    def rows(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        return (self.codes[begin:end].float() * self.scales[begin:end, None]).bfloat16()


def coded(rows: int, columns: int) -> Bytes:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    return Bytes(codes.to(DEVICE), torch.rand(rows, generator=generator).to(DEVICE))


def test_dense():
    matrix: Any = DenseLinear(torch.zeros(6, 4, dtype=torch.bfloat16))
    assert (matrix.form, matrix.out_features, matrix.in_features, matrix.nbytes) == ("dense", 6, 4, 48)
    values = torch.tensor([[1.0, 2.0, 3.0, 1 / 3]] * 2)
    matrix.write(3, values)
    assert (
        torch.equal(matrix.rows(3, 5), values.bfloat16()) and not matrix.rows(0, 3).any() and not matrix.rows(5).any()
    )
    assert torch.equal(matrix.rows(), matrix.tensors()["weight"])


@pytest.mark.parametrize("rows", [64, 9000])
def test_the_reference_multiplies_with_the_rows_of_any_form(rows: int):
    matrix: Linear = coded(rows, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    ops, dense = ReferenceOps(DEVICE), DenseLinear(matrix.rows())
    assert torch.equal(ops.linear(x, matrix), ops.linear(x, dense))
    assert torch.equal(ops.linear_swiglu(x, matrix), ops.linear_swiglu(x, dense))


def test_a_form_that_the_cuda_backend_does_not_serve_is_refused():
    from engine.ops.cuda import CudaOps

    matrix, x = coded(64, 64), torch.zeros(1, 64, dtype=torch.bfloat16, device=DEVICE)
    for multiply in (CudaOps(DEVICE).linear, CudaOps(DEVICE, linear="tiled").linear_swiglu):
        with pytest.raises(ValueError, match="stored as 'int8', and backend = 'cuda' multiplies with 'dense'"):
            multiply(x, matrix)
