"""residual: the sum rounded once, into its input too, and what it refuses."""

import pytest
from kernel_numerics import assert_equal, poisoned, randn

from kernels import residual


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (2, 128), (5, 77)])
def test_residual_is_the_rounded_sum(dtype, shape):
    x, y = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    out = residual.add(x, y, poisoned(*shape, dtype=dtype))
    assert_equal(out, residual.reference(x, y))


def test_residual_into_its_input(dtype):
    x, y = randn(3, 40, dtype=dtype), randn(3, 40, dtype=dtype)
    expected = x + y
    residual.add(x, y, x)
    assert_equal(x, expected)


def test_refusals_name_the_argument():
    x = randn(2, 4)
    with pytest.raises(ValueError, match=r"residual.add: out has shape \(2, 3\): \(2, 4\) needed"):
        residual.add(x, x, randn(2, 3))
    with pytest.raises(ValueError, match=r"residual.add: y is not contiguous"):
        residual.add(x, randn(4, 2).T, x)
