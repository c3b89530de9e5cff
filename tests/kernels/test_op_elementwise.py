"""embedding, residual, swiglu, rope, kv_write: against float64, each row alone, and what they refuse."""

import pytest
import torch
from kernel_numerics import DEVICE, assert_as_good_as_torch, assert_equal, ints, poisoned, randn

from kernels import embedding, kv_write, residual, rope, swiglu


@pytest.mark.parametrize("width", [1, 5, 130, 300])
def test_embedding_copies_rows(dtype, width):
    table = randn(7, width, dtype=dtype)
    tokens = ints(6, 0, 3, 3, 1)
    out = poisoned(5, width, dtype=dtype)
    assert embedding.embedding(tokens, table, out) is out
    assert_equal(out, embedding.reference(tokens, table))


def test_embedding_of_no_tokens(dtype):
    out = embedding.embedding(ints(), randn(4, 8, dtype=dtype), poisoned(0, 8, dtype=dtype))
    assert out.shape == (0, 8)


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


@pytest.mark.parametrize("fused", [False, True])
def test_kv_write_touches_its_places_only(dtype, fused):
    heads, width, capacity = 2, 48, 6
    qkv = randn(3, 3 * heads * width, dtype=dtype)
    _, k, v = (part.unflatten(1, (heads, width)) for part in qkv.split(heads * width, dim=1))
    if not fused:
        k, v = k.contiguous(), v.contiguous()
    slots, positions = ints(1, 0, 1), ints(5, 0, 0)
    k_cache, v_cache = randn(2, capacity, heads, width, dtype=dtype), randn(2, capacity, heads, width, dtype=dtype)
    expected = k_cache.clone(), v_cache.clone()
    kv_write.reference(k, v, *expected, slots, positions)
    kv_write.kv_write(k, v, k_cache, v_cache, slots, positions)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


def test_refusals_name_the_argument():
    x = randn(2, 4)
    with pytest.raises(
        TypeError, match=r"swiglu: gate_up is torch.float64: torch.bfloat16, torch.float16 or torch.float32 needed"
    ):
        swiglu.swiglu(x.double(), x)
    with pytest.raises(ValueError, match=r"residual.add: out has shape \(2, 3\): \(2, 4\) needed"):
        residual.add(x, x, randn(2, 3))
    with pytest.raises(ValueError, match=r"residual.add: y is not contiguous"):
        residual.add(x, randn(4, 2).T, x)
    with pytest.raises(TypeError, match=r"embedding: tokens is torch.int64: torch.int32 needed"):
        embedding.embedding(ints(1, dtype=torch.int64), x, randn(1, 4))
    with pytest.raises(ValueError, match=r"swiglu: gate_up has 3 columns: an even number"):
        swiglu.swiglu(randn(2, 3), randn(2, 1))
    with pytest.raises(ValueError, match=r"embedding: table has shape \(4,\): \[V, H\] needed"):
        embedding.embedding(ints(1), randn(4), randn(1, 4))
    cos, sin = angles(4, 4)
    q = randn(2, 4, 2).transpose(1, 2)
    with pytest.raises(ValueError, match=r"rope: a row of q is not contiguous"):
        rope.rope(q, q, cos, sin, ints(0, 1))
