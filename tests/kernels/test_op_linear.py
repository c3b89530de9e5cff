import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, poisoned, randn

from kernels.linear import naive, reference


@pytest.mark.parametrize(("count", "columns", "depth"), [(1, 1, 1), (3, 20, 65), (2, 130, 33), (17, 5, 128)])
def test_against_float64(dtype, count, columns, depth):
    x, weight = randn(count, depth, dtype=dtype), randn(columns, depth, dtype=dtype)
    out = naive.linear(x, weight, poisoned(count, columns, dtype=dtype))
    exact = reference(x.double(), weight.double())
    if dtype == torch.float32:
        # One accumulator in order rounds more often than torch's blocks do: hold it to the bound of its own order.
        bound = reference(x.double().abs(), weight.double().abs()) * depth * 2.0**-24
        assert ((out.double() - exact).abs() <= bound).all()
    else:
        assert_as_good_as_torch(out, reference(x, weight), exact)


def test_sums_in_order(dtype):
    # 2**k, then ones that are lost one by one, then -2**k: only the order given leaves exactly 0.
    x = torch.ones(1, 6, dtype=dtype)
    weight = torch.tensor([[2.0**30, 1, 1, 1, 1, -(2.0**30)]], dtype=dtype)
    out = poisoned(1, 1, dtype=dtype)
    naive.linear(x.to(out.device), weight.to(out.device), out)
    assert out.item() == 0


def test_rows_alone(dtype):
    x, weight = randn(5, 40, dtype=dtype), randn(9, 40, dtype=dtype)
    together = naive.linear(x, weight, poisoned(5, 9, dtype=dtype))
    for i in range(5):
        assert torch.equal(naive.linear(x[i : i + 1], weight, poisoned(1, 9, dtype=dtype)), together[i : i + 1])


def test_refusals():
    with pytest.raises(ValueError, match=r"linear: weight has shape \(3, 5\): \(3, 4\) needed"):
        naive.linear(randn(2, 4), randn(3, 5), randn(2, 3))
