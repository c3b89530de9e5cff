import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, ints, poisoned, randn

from kernels.attention import naive, reference


def run(q, k_cache, v_cache, slots, positions, scale=0.3, window=0):
    out = poisoned(*q.shape, dtype=q.dtype)
    return naive.attention(q, k_cache, v_cache, slots, positions, scale, window, out)


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (2, 2, 70)])
def test_against_float64(dtype, heads, kv_heads, width, window):
    slots, positions = ints(0, 2, 1, 1), ints(0, 130, 63, 64)
    q = randn(4, heads, width, dtype=dtype)
    k_cache, v_cache = (randn(3, 131, kv_heads, width, dtype=dtype) for _ in range(2))
    arguments = (k_cache, v_cache, slots, positions, width**-0.5, window)
    exact = reference(q.double(), k_cache.double(), v_cache.double(), *arguments[2:])
    assert_as_good_as_torch(run(q, *arguments), reference(q, *arguments), exact)


def test_what_lies_beyond_is_never_read(dtype):
    q = randn(2, 1, 8, dtype=dtype)
    k_cache, v_cache = (randn(2, 90, 1, 8, dtype=dtype) for _ in range(2))
    slots, positions = ints(1, 1), ints(70, 12)
    expected = run(q, k_cache, v_cache, slots, positions, window=20)
    for cache in (k_cache, v_cache):
        cache[0] = float("nan")
        cache[1, 71:] = float("nan")
    assert_equal(run(q, k_cache, v_cache, slots, positions, window=20), expected)
    for cache in (k_cache, v_cache):
        cache[1, 13:51] = float("nan")
    assert_equal(run(q, k_cache, v_cache, slots, positions, window=20), expected)


def test_prefill_chunks_and_decode_have_the_same_bits(dtype):
    length = 67
    q = randn(length, 2, 8, dtype=dtype)
    k_cache, v_cache = (randn(2, 80, 1, 8, dtype=dtype) for _ in range(2))
    positions = torch.arange(length, dtype=torch.int32, device=q.device)
    slots = torch.zeros_like(positions)
    chosen = torch.tensor([0, 1, 63, 64, 66], device=q.device)
    whole = run(q[chosen], k_cache, v_cache, slots[chosen], positions[chosen])
    for i, token in enumerate(chosen.tolist()):
        one = slice(token, token + 1)
        assert_equal(run(q[one], k_cache, v_cache, slots[one], positions[one]), whole[i : i + 1])


def test_strided_queries_and_outputs(dtype):
    fused = randn(3, 5 * 8, dtype=dtype)
    q = fused[:, 8:24].unflatten(1, (2, 8))
    k_cache, v_cache = (randn(1, 9, 2, 8, dtype=dtype) for _ in range(2))
    slots, positions = ints(0, 0, 0), ints(8, 3, 0)
    out = poisoned(3, 4, 8, dtype=dtype)
    naive.attention(q, k_cache, v_cache, slots, positions, 0.3, 0, out[:, 1:3])
    assert_equal(out[:, 1:3], run(q.contiguous(), k_cache, v_cache, slots, positions))
    assert out[:, 0].isnan().all() and out[:, 3].isnan().all()


def test_large_scores_do_not_overflow(dtype):
    q = torch.full((1, 1, 4), 100.0, dtype=dtype)
    k = torch.zeros(1, 70, 1, 4, dtype=dtype)
    k[0, 66] = 100.0
    v = torch.arange(70, dtype=dtype).view(1, 70, 1, 1).expand(1, 70, 1, 4).contiguous()
    device = ints(0).device
    out = run(q.to(device), k.to(device), v.to(device), ints(0), ints(69))
    assert_equal(out, torch.full_like(out, 66.0))


def test_refusals():
    q, cache = randn(1, 3, 8), randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="q has 3 heads and the cache 2: a multiple"):
        run(q, cache, cache, ints(0), ints(0))
    q = randn(1, 2, 8)
    with pytest.raises(ValueError, match="window is -1"):
        run(q, cache, cache, ints(0), ints(0), window=-1)
    with pytest.raises(ValueError, match="scale is 0"):
        run(q, cache, cache, ints(0), ints(0), scale=0)
    with pytest.raises(ValueError, match=r"v_cache has shape \(1, 4, 1, 8\): \(1, 4, 2, 8\) needed"):
        run(q, cache, randn(1, 4, 1, 8), ints(0), ints(0))
    with pytest.raises(TypeError, match=r"slots is torch.int64"):
        run(q, cache, cache, ints(0, dtype=torch.int64), ints(0))
