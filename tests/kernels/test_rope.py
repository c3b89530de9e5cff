"""rope: torch's bits, nothing but q and k touched, and what it refuses."""

import pytest
import torch
from kernel_numerics import DEVICE, assert_equal, ints, randn

from kernels import rope


def angles(positions, width):
    inverse = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turns = torch.arange(positions).double()[:, None] * inverse
    return turns.cos().float().to(DEVICE), turns.sin().float().to(DEVICE)


@pytest.mark.parametrize("width", [2, 16, 80])
@pytest.mark.parametrize("fused", [False, True])
def test_rope_has_torchs_bits(dtype, width, fused):
    cos, sin = angles(50, width)
    positions = ints(0, 49, 7, 7)
    qkv = randn(4, (3 + 2 + 2) * width, dtype=dtype)
    q, k, v = qkv.split([3 * width, 2 * width, 2 * width], dim=1)
    q, k = q.unflatten(1, (3, width)), k.unflatten(1, (2, width))
    untouched = v.clone()
    if not fused:
        q, k = q.contiguous(), k.contiguous()
    expected = rope.reference(q, cos, sin, positions), rope.reference(k, cos, sin, positions)
    rope.rope(q, k, cos, sin, positions)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert_equal(v, untouched)


def test_refusals_name_the_argument():
    cos, sin = angles(4, 4)
    q = randn(2, 4, 2).transpose(1, 2)
    with pytest.raises(ValueError, match=r"rope: a row of q is not contiguous"):
        rope.rope(q, q, cos, sin, ints(0, 1))
