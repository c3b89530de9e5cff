"""swiglu: against float64, each row alone, and what it refuses."""

import pytest
import torch
from kernel_numerics import DEVICE, assert_as_good_as_torch, assert_equal, poisoned, randn

from kernels import swiglu


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 129), (5, 64)])
def test_swiglu(dtype, count, width):
    gate_up = randn(count, 2 * width, dtype=dtype, scale=2.0)
    out = swiglu.swiglu(gate_up, poisoned(count, width, dtype=dtype))
    assert_as_good_as_torch(out, swiglu.reference(gate_up), swiglu.reference(gate_up.double()))


def test_swiglu_of_extreme_gates(dtype):
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, -88.5, 1.0, 1.0, 1.0, 1.0]], dtype=dtype, device=DEVICE)
    out = swiglu.swiglu(gate_up, poisoned(1, 4, dtype=dtype))
    assert torch.allclose(out.double(), swiglu.reference(gate_up.double()), rtol=1e-2, atol=1e-30)


def test_swiglu_rows_alone(dtype):
    gate_up = randn(4, 2 * 33, dtype=dtype)
    together = swiglu.swiglu(gate_up, poisoned(4, 33, dtype=dtype))
    for i in range(4):
        assert_equal(together[i : i + 1], swiglu.swiglu(gate_up[i : i + 1], poisoned(1, 33, dtype=dtype)))


def test_refusals_name_the_argument():
    x = randn(2, 4)
    with pytest.raises(
        TypeError, match=r"swiglu: gate_up is torch.float64: torch.bfloat16, torch.float16 or torch.float32 needed"
    ):
        swiglu.swiglu(x.double(), x)
    with pytest.raises(ValueError, match=r"swiglu: gate_up has 3 columns: an even number"):
        swiglu.swiglu(randn(2, 3), randn(2, 1))
