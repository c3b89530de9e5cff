import pytest
import torch
from kernel_numerics import DEVICE, assert_as_good_as_torch, assert_equal, poisoned, randn

from kernels.linear import naive, reference


@pytest.mark.parametrize(("count", "columns", "depth"), [(1, 1, 1), (3, 20, 65), (2, 130, 33), (17, 5, 128)])
def test_against_float64(dtype, count, columns, depth):
    x, weight = randn(count, depth, dtype=dtype), randn(columns, depth, dtype=dtype)
    out = naive.linear(x, weight, poisoned(count, columns, dtype=dtype))
    exact = reference(x.double(), weight.double())
    assert_as_good_as_torch(out, reference(x, weight), exact)


def test_bf16_sums_in_eight_chains():
    x, weight = randn(2, 45, dtype=torch.bfloat16), randn(3, 45, dtype=torch.bfloat16)
    chains = torch.zeros(8, 2, 3)
    for k in range(45):
        # A product of two bf16 is exact in float32, so this rounds once, as a fused multiply-add does.
        chains[k % 8] += (x[:, k].float()[:, None] * weight[:, k].float()).cpu()
    halves = chains[:4] + chains[4:]
    expected = ((halves[0] + halves[2]) + (halves[1] + halves[3])).bfloat16()
    assert_equal(naive.linear(x, weight, poisoned(2, 3, dtype=torch.bfloat16)).cpu(), expected)


def test_f32_sums_in_float64():
    x, weight = randn(2, 45), randn(3, 45)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for k in range(45):
        total += (x[:, k].double()[:, None] * weight[:, k].double()).cpu()
    assert_equal(naive.linear(x, weight, poisoned(2, 3, dtype=torch.float32)).cpu(), total.float())


def test_rows_alone(dtype):
    x, weight = randn(5, 40, dtype=dtype), randn(9, 40, dtype=dtype)
    together = naive.linear(x, weight, poisoned(5, 9, dtype=dtype))
    for i in range(5):
        assert_equal(naive.linear(x[i : i + 1], weight, poisoned(1, 9, dtype=dtype)), together[i : i + 1])


def test_refusals():
    with pytest.raises(ValueError, match=r"linear: weight has shape \(3, 5\): \(3, 4\) needed"):
        naive.linear(randn(2, 4), randn(3, 5), randn(2, 3))


def test_chains_are_added_by_the_tree():
    # 2 ** 24 swallows a 1 that is added to it: chain 4 is added to chain 0, and chain 7 to chain 3, before these meet.
    x, weight = torch.ones(1, 8, dtype=torch.bfloat16, device=DEVICE), torch.zeros(2, 8, device=DEVICE).bfloat16()
    weight[:, 0], weight[:, 7] = 2.0**24, -(2.0**24)
    weight[0, 4] = weight[1, 1] = 1.0
    out = poisoned(1, 2, dtype=torch.bfloat16)
    assert naive.linear(x, weight, out).tolist() == [[0.0, 1.0]]
