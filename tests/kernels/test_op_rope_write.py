import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, ints, poisoned, randn

from kernels import rms_norm, rope, rope_write

BF16 = torch.bfloat16


def angles(limit, width):
    turns = torch.arange(limit)[:, None] * 500000.0 ** (-torch.arange(0, width, 2) / width)[None]
    device = ints(0).device
    return turns.cos().float().to(device), turns.sin().float().to(device)


def reference(qkv, q_norm, k_norm, rounding, cos, sin, positions, heads, kv_heads):
    """q, k, v [T, heads, D] in qkv's dtype: norm, then rotation, as transformers computes them."""
    width = 2 * cos.shape[1]
    q, k, v = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    if q_norm is not None:
        q = rms_norm.reference(q, q_norm.to(q.dtype), 1e-6, rounding)
        k = rms_norm.reference(k, k_norm.to(k.dtype), 1e-6, rounding)
    q, k, v = (x.unflatten(1, (-1, width)) for x in (q, k, v))
    if qkv.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    return *(rope.reference(x, cos, sin, positions) for x in (q, k)), v


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "norm"),
    [(2, 1, 64, "once"), (3, 3, 128, "twice"), (2, 2, 64, None), (84, 2, 64, "once")],
)
def test_against_float64(half, heads, kv_heads, width, norm):
    count = 2 if heads > 3 else 3
    rounding = norm or "once"
    cos, sin = angles(40, width)
    qkv = randn(count, (heads + 2 * kv_heads) * width, dtype=half)
    q_norm, k_norm = (randn(n * width, dtype=half) if norm else None for n in (heads, kv_heads))
    k_cache, v_cache = (poisoned(3, 40, kv_heads, width, dtype=half) for _ in range(2))
    slots, positions = ints(2, 0, 2)[:count], ints(0, 39, 7)[:count]
    q = rope_write.rope_write(
        qkv, q_norm, k_norm, 1e-6, rounding, cos, sin, k_cache, v_cache, slots, positions,
        poisoned(count, heads, width, dtype=half),
    )  # fmt: skip
    theirs = reference(qkv, q_norm, k_norm, rounding, cos, sin, positions, heads, kv_heads)
    exact = reference(qkv.double(), q_norm, k_norm, "once", cos, sin, positions, heads, kv_heads)
    place = (slots.long(), positions.long())
    assert_as_good_as_torch(q, theirs[0], exact[0])
    assert_as_good_as_torch(k_cache[place], theirs[1], exact[1])
    assert_equal(v_cache[place], theirs[2])
    if norm is None:
        assert torch.equal(q, theirs[0]) and torch.equal(k_cache[place], theirs[1])
    for cache in (k_cache, v_cache):
        assert cache.isnan().sum() == cache.numel() - count * kv_heads * width


@pytest.mark.parametrize("page", [8, 16])
def test_pages_and_strides_change_no_bit(half, page):
    heads, kv_heads, width, capacity = 2, 2, 64, 48
    cos, sin = angles(capacity, width)
    wide = randn(4, 6 * width + 64, dtype=half)
    q_norm, k_norm = (randn(2 * width, dtype=half) for _ in range(2))
    slots, positions = ints(1, 0, 1, 1), ints(0, 47, 17, 40)

    def run(caches, qkv, q_out, at=slots, table=None):
        return rope_write.rope_write(
            qkv, q_norm, k_norm, 1e-6, "once", cos, sin, caches[0], caches[1], at, positions[: len(qkv)], q_out, table
        )

    flat = [poisoned(2, capacity, kv_heads, width, dtype=half) for _ in range(2)]
    q = run(flat, wide[:, 64:].contiguous(), poisoned(4, heads, width, dtype=half))
    # Head-major storage, rows of a wider tensor.
    turned = [poisoned(2, kv_heads, capacity, width, dtype=half).transpose(1, 2) for _ in range(2)]
    out = poisoned(4, 2 * heads, width, dtype=half)
    run(turned, wide[:, 64:], out[:, 1:3])
    assert torch.equal(out[:, 1:3], q) and out[:, 0].isnan().all()
    pages = capacity // page
    table = torch.randperm(2 * pages, device=q.device).view(2, pages).int()
    paged = [poisoned(2 * pages, page, kv_heads, width, dtype=half) for _ in range(2)]
    assert_equal(run(paged, wide[:, 64:], poisoned(4, heads, width, dtype=half), table=table), q)
    place = (slots.long(), positions.long())
    for one, other, third in zip(flat, turned, paged, strict=True):
        gathered = third[table.long()].flatten(1, 2)
        assert torch.equal(one[place], other[place]) and torch.equal(one[place], gathered[place])
    # A token's bits depend on that token alone.
    alone = run(flat, wide[:1, 64:], poisoned(1, heads, width, dtype=half), at=ints(0))
    assert torch.equal(alone, q[:1]) and torch.equal(flat[0][0, 0], flat[0][1, 0])


def test_refusals():
    cos, sin = angles(8, 64)
    good = {
        "qkv": randn(1, 4 * 64, dtype=BF16), "q_norm": None, "k_norm": None, "eps": 1e-6, "rounding": "once",
        "cos": cos, "sin": sin, "k_cache": randn(1, 8, 1, 64, dtype=BF16), "v_cache": randn(1, 8, 1, 64, dtype=BF16),
        "slots": ints(0), "positions": ints(0), "q_out": poisoned(1, 2, 64, dtype=BF16),
    }  # fmt: skip

    def refused(error, match, **changed):
        with pytest.raises(error, match=match):
            rope_write.rope_write(**(good | changed))

    refused(ValueError, "rounding is 'thrice'", rounding="thrice")
    refused(ValueError, r"qkv has shape \(1, 192\): \(1, 256\) needed", qkv=randn(1, 192, dtype=BF16))
    refused(TypeError, "qkv is torch.float32: torch.bfloat16 or torch.float16 needed", qkv=randn(1, 256))
    refused(TypeError, "k_cache is torch.bfloat16: torch.float16 needed", qkv=randn(1, 256, dtype=torch.float16))
    refused(ValueError, "k_norm is None and the other is not", q_norm=randn(128, dtype=BF16))
    refused(
        ValueError, r"k_norm has shape \(128,\): \(64,\) needed",
        q_norm=randn(128, dtype=BF16), k_norm=randn(128, dtype=BF16),
    )  # fmt: skip
    refused(ValueError, r"v_cache has shape \(1, 9, 1, 64\)", v_cache=randn(1, 9, 1, 64, dtype=BF16))
    apart = randn(1, 8, 2, 64, dtype=BF16)[:, :, :1]
    refused(ValueError, "v_cache has strides .* k_cache's", v_cache=apart)
    refused(ValueError, "k_cache has pages of 12", k_cache=randn(1, 12, 1, 64, dtype=BF16),
            v_cache=randn(1, 12, 1, 64, dtype=BF16), table=ints(0)[None])  # fmt: skip
    refused(TypeError, "table is torch.int64", table=ints(0, dtype=torch.int64)[None])
    refused(TypeError, "positions is torch.int64", positions=ints(0, dtype=torch.int64))
    refused(ValueError, r"q_out has shape \(2, 2, 64\): \(1, 2, 64\)", q_out=poisoned(2, 2, 64, dtype=BF16))
    refused(ValueError, "sin has shape", sin=sin[:4])
    refused(ValueError, r"qkv .*rows at multiples of 16 bytes", qkv=randn(1, 260, dtype=BF16)[:, 2:258])
