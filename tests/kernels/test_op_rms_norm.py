import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, poisoned, randn

from kernels import rms_norm


@pytest.mark.parametrize("rounding", ["once", "twice"])
@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_against_float64(dtype, rounding, width):
    x, weight = randn(3, width, dtype=dtype), randn(width, dtype=dtype)
    out = rms_norm.rms_norm(x, weight, 1e-6, rounding, poisoned(3, width, dtype=dtype))
    exact = rms_norm.reference(x.double(), weight.double(), 1e-6)
    assert_as_good_as_torch(out, rms_norm.reference(x, weight, 1e-6, rounding), exact)


def test_rounding_twice_differs_from_once():
    x, weight = randn(2, 200, dtype=torch.bfloat16), randn(200, dtype=torch.bfloat16)
    once, twice = (
        rms_norm.rms_norm(x, weight, 1e-6, r, poisoned(2, 200, dtype=torch.bfloat16)) for r in ("once", "twice")
    )
    assert not torch.equal(once, twice)


@pytest.mark.usefixtures("races")
def test_rows_alone_and_in_place(dtype):
    x, weight = randn(4, 70, dtype=dtype), randn(70, dtype=dtype)
    together = rms_norm.rms_norm(x, weight, 1e-5, "once", poisoned(4, 70, dtype=dtype))
    for i in (0, 3):
        alone = rms_norm.rms_norm(x[i : i + 1], weight, 1e-5, "once", poisoned(1, 70, dtype=dtype))
        assert_equal(alone, together[i : i + 1])
    rms_norm.rms_norm(x, weight, 1e-5, "once", x)
    assert_equal(x, together)


def test_rows_of_a_fused_projection(dtype):
    fused, weight = randn(3, 150, dtype=dtype), randn(60, dtype=dtype)
    before = fused.clone()
    view = fused[:, 40:100]
    expected = rms_norm.rms_norm(view.contiguous(), weight, 1e-6, "once", poisoned(3, 60, dtype=dtype))
    rms_norm.rms_norm(view, weight, 1e-6, "once", view)
    assert_equal(view, expected)
    assert torch.equal(fused[:, :40], before[:, :40]) and torch.equal(fused[:, 100:], before[:, 100:])


def test_small_rows_lean_on_eps(dtype):
    x, weight = torch.zeros(1, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    x, weight = x.to(poisoned(1, dtype=dtype).device), weight.to(poisoned(1, dtype=dtype).device)
    assert_equal(rms_norm.rms_norm(x, weight, 1e-6, "once", poisoned(1, 8, dtype=dtype)), x)


def test_refusals():
    x, weight = randn(2, 8), randn(8)
    with pytest.raises(ValueError, match="rounding is 'thrice': 'once' or 'twice' needed"):
        rms_norm.rms_norm(x, weight, 1e-6, "thrice", x)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\): \(8,\) needed"):
        rms_norm.rms_norm(x, weight[:7], 1e-6, "once", x)
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16: torch.float32 needed"):
        rms_norm.rms_norm(x, weight.bfloat16(), 1e-6, "once", x)
    with pytest.raises(ValueError, match="a row of x is not contiguous"):
        rms_norm.rms_norm(randn(8, 2).T, weight, 1e-6, "once", x)
