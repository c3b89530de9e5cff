import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, ints, poisoned, randn

from kernels.attention import flash, reference
from kernels.rope_write import rope_write

BF16, F16 = torch.bfloat16, torch.float16


def workspace_of(count, heads, width, capacity):
    size = flash.workspace_size(count, heads, width, capacity)
    return torch.zeros(size, device=ints(0).device)


def assert_counters_are_zero(workspace, count, heads, kv_heads, width, capacity):
    records = workspace.view(count, -1)
    first = heads * -(-capacity // flash.SEGMENT) * (width + 4)
    assert not records[:, first : first + kv_heads].any()


def run(q, k_cache, v_cache, slots, positions, scale=0.3, window=0, table=None, workspace=None):
    count, heads, width = q.shape
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if workspace is None:
        workspace = workspace_of(count, heads, width, capacity)
    out = poisoned(*q.shape, dtype=q.dtype)
    flash.attention(q, k_cache, v_cache, slots, positions, scale, window, out, workspace, table)
    assert_counters_are_zero(workspace, count, heads, k_cache.shape[2], width, capacity)
    return out


def caches(*shape, dtype=BF16):
    """k_cache and v_cache."""
    return randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)


def assert_as_good(attention, q, k_cache, v_cache, slots, positions, scale, window):
    """Against torch in the same dtype and in float64; returns the result."""
    others = (slots, positions, scale, window)
    out = attention(q, k_cache, v_cache, *others)
    exact = reference(q.double(), k_cache.double(), v_cache.double(), *others)
    assert_as_good_as_torch(out, reference(q, k_cache, v_cache, *others), exact)
    return out


def paged(cache, page, order):
    """The contiguous cache [S, C, Hk, D] in pages of a pool, in the order given, and the pool's other pages NaN."""
    slots, capacity, heads, width = cache.shape
    pool = poisoned(slots * capacity // page + 3, page, heads, width, dtype=cache.dtype)
    pool[order] = cache.reshape(-1, page, heads, width)
    return pool


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window", "at", "dtype"),
    [
        (2, 1, 64, 0, (0, 127, 140), BF16),
        (2, 2, 128, 70, (150,), BF16),
        (9, 1, 64, 0, (130,), BF16),
        (5, 1, 128, 3, (2, 40), BF16),
        (2, 1, 64, 0, (0, 127, 140), F16),
        (5, 1, 128, 3, (2, 40), F16),
    ],
)
def test_against_float64(heads, kv_heads, width, window, at, dtype):
    slots, positions = ints(0, 2, 1)[: len(at)], ints(*at)
    q, cache = randn(len(at), heads, width, dtype=dtype), caches(3, 160, kv_heads, width, dtype=dtype)
    assert_as_good(run, q, *cache, slots, positions, width**-0.5, window)


def test_segments_are_combined_in_order_whoever_computes_them(monkeypatch):
    q, (k_cache, v_cache) = randn(1, 1, 64, dtype=BF16), caches(1, 600, 1, 64)
    spread = assert_as_good(run, q, k_cache, v_cache, ints(0), ints(519), 0.125, 0)
    monkeypatch.setattr(flash, "BLOCKS", 1)
    assert_equal(run(q, k_cache, v_cache, ints(0), ints(519), 0.125, 0), spread)
    # A window over the border of the segments: two tiles only.
    assert_as_good(run, q, k_cache, v_cache, ints(0), ints(519), 0.125, 12)


def test_what_lies_beyond_is_never_used():
    q = randn(2, 2, 64, dtype=BF16)
    k_cache, v_cache = caches(2, 150, 1, 64)
    slots, positions = ints(1, 1), ints(138, 12)
    expected = run(q, k_cache, v_cache, slots, positions, window=100)
    for cache in (k_cache, v_cache):
        cache[0] = float("nan")
        cache[1, 139:] = float("nan")
        cache[1, 13:39] = float("nan")
    assert_equal(run(q, k_cache, v_cache, slots, positions, window=100), expected)


@pytest.mark.parametrize("page", [8, 16, 128])
def test_pages_strides_slots_and_neighbours_change_no_bit(page):
    q = randn(3, 2, 64, dtype=BF16)
    k_cache, v_cache = caches(2, 256, 2, 64)
    slots, positions = ints(1, 0, 1), ints(13, 130, 5)
    expected = run(q, k_cache, v_cache, slots, positions)
    order = torch.randperm(512 // page, device=q.device) + 3
    k_pool, v_pool = paged(k_cache, page, order), paged(v_cache, page, order)
    assert_equal(run(q, k_pool, v_pool, slots, positions, table=order.view(2, -1).int()), expected)
    if page == 16:
        k_turned, v_turned = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache))
        wide = randn(3, 4, 64, dtype=BF16)
        wide[:, 1:3] = q
        assert_equal(run(wide[:, 1:3], k_turned, v_turned, slots, positions), expected)
        k_moved, v_moved = (torch.cat([cache[1:], cache]) for cache in (k_cache, v_cache))
        assert_equal(run(q[:1], k_moved, v_moved, ints(0), positions[:1]), expected[:1])


def test_more_tokens_than_the_workspace_holds(monkeypatch):
    q = randn(3, 1, 64, dtype=BF16)
    k_cache, v_cache = caches(1, 32, 1, 64)
    slots, positions = ints(0, 0, 0), ints(0, 1, 2)
    expected = run(q, k_cache, v_cache, slots, positions)
    monkeypatch.setattr(flash, "TOKENS", 2)
    out, workspace = poisoned(3, 1, 64, dtype=BF16), workspace_of(3, 1, 64, 32)
    flash.attention(q, k_cache, v_cache, slots, positions, 0.3, 0, out, workspace)
    assert_equal(out, expected)


class Step:
    """Random inputs of a decode step, run fused or in two kernels."""

    def __init__(self, heads, kv_heads, width, positions, capacity, norm="once", stale=float("nan"), dtype=BF16):
        device, self.dtype = ints(0).device, dtype
        self.heads, self.kv_heads, self.width, self.capacity = heads, kv_heads, width, capacity
        count = len(positions)
        self.qkv = randn(count, (heads + 2 * kv_heads) * width, dtype=dtype)
        self.q_norm, self.k_norm = (randn(n * width, dtype=dtype) if norm else None for n in (heads, kv_heads))
        self.rounding = norm or "once"
        turns = torch.rand(capacity, width // 2, device=device) * 6.3
        self.cos, self.sin = turns.cos(), turns.sin()
        self.positions = ints(*positions)
        self.slots = torch.arange(count, 0, -1, dtype=torch.int32, device=device)
        self.caches = caches(count + 1, capacity, kv_heads, width, dtype=dtype)
        for cache in self.caches:
            for slot, position in zip(self.slots.tolist(), positions, strict=True):
                cache[slot, position:] = stale

    def workspace(self, count):
        return workspace_of(count, self.heads, self.width, self.capacity)

    def fused(self, tokens=slice(None), window=0, table=None, pools=None):
        """out [T, Hq D], and the caches after the step."""
        k_cache, v_cache = (cache.clone() for cache in pools or self.caches)
        qkv = self.qkv[tokens]
        out, workspace = poisoned(len(qkv), self.heads * self.width, dtype=self.dtype), self.workspace(len(qkv))
        self.decode(qkv, k_cache, v_cache, self.slots[tokens], self.positions[tokens], window, out, workspace, table)
        assert_counters_are_zero(workspace, len(qkv), self.heads, self.kv_heads, self.width, self.capacity)
        return out, k_cache, v_cache

    def decode(self, qkv, k_cache, v_cache, slots, positions, window, out, workspace, table=None):
        flash.decode(
            qkv, self.q_norm, self.k_norm, 1e-6, self.rounding, self.cos, self.sin, k_cache, v_cache, slots, positions,
            0.125, window, out, workspace, table,
        )  # fmt: skip

    def in_two(self, window=0):
        k_cache, v_cache = (cache.clone() for cache in self.caches)
        q = poisoned(len(self.qkv), self.heads, self.width, dtype=self.dtype)
        rope_write(
            self.qkv, self.q_norm, self.k_norm, 1e-6, self.rounding, self.cos, self.sin, k_cache, v_cache, self.slots,
            self.positions, q,
        )  # fmt: skip
        out, workspace = poisoned(*q.shape, dtype=self.dtype), self.workspace(len(q))
        flash.attention(q, k_cache, v_cache, self.slots, self.positions, 0.125, window, out, workspace)
        return out.flatten(1), k_cache, v_cache


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert_equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert one[0].isfinite().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "norm", "window", "positions", "dtype"),
    [
        (2, 2, 64, "once", 0, (0, 129), BF16),
        (1, 1, 128, "twice", 0, (128,), BF16),
        (4, 1, 64, None, 60, (127, 130), BF16),
        (9, 1, 128, "once", 0, (17,), BF16),
        (24, 4, 64, "once", 4, (3,), BF16),
        (4, 1, 64, None, 60, (127, 130), F16),
        (9, 1, 128, "once", 0, (17,), F16),
    ],
)
def test_decode_is_rope_write_and_attention(heads, kv_heads, width, norm, window, positions, dtype):
    step = Step(heads, kv_heads, width, positions, 136, norm, dtype=dtype)
    assert_same(step.fused(window=window), step.in_two(window))


@pytest.mark.usefixtures("races")
def test_decode_over_segments():
    step = Step(1, 1, 64, (513, 9), 520)
    assert_same(step.fused(), step.in_two())


def test_decode_alone_paged_and_again(half):
    step = Step(2, 1, 64, (140, 9, 16), 160, dtype=half)
    expected = step.fused()
    assert_same(step.fused(), expected)
    one = step.fused(slice(1, 2))
    assert torch.equal(one[0], expected[0][1:2]) and torch.equal(one[1][2, 9], expected[1][2, 9])
    order = torch.randperm(40, device=step.qkv.device)
    pools = [paged(cache, 16, order) for cache in step.caches]
    out, *pools = step.fused(table=order.view(4, -1).int(), pools=pools)
    gathered = [pool[order].reshape(cache.shape) for pool, cache in zip(pools, step.caches, strict=True)]
    assert_same((out, *gathered), expected)


def test_refusals():
    q, (k_cache, v_cache) = randn(1, 2, 64, dtype=BF16), caches(1, 8, 1, 64)
    good = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "slots": ints(0), "positions": ints(0), "scale": 0.1,
        "window": 0, "out": poisoned(1, 2, 64, dtype=BF16), "workspace": workspace_of(1, 2, 64, 8),
    }  # fmt: skip

    def refused(error, match, call=flash.attention, **changed):
        with pytest.raises(error, match=match):
            call(**(given | changed))

    given = good
    refused(ValueError, "q has head dimension 32: 64 or 128", q=randn(1, 2, 32, dtype=BF16))
    refused(TypeError, "q is torch.float32: torch.bfloat16 or torch.float16 needed", q=randn(1, 2, 64))
    refused(TypeError, "out is torch.bfloat16: torch.float16 needed", q=randn(1, 2, 64, dtype=F16))
    refused(TypeError, "v_cache is torch.float32", v_cache=randn(1, 8, 1, 64))
    refused(ValueError, "k_cache has head dimension 128: 64", k_cache=caches(1, 8, 1, 128)[0])
    many = randn(1, 17, 64, dtype=BF16)
    refused(ValueError, "at most 16 times", q=many, out=many, workspace=workspace_of(1, 17, 64, 8))
    three = caches(1, 8, 3, 64)
    refused(ValueError, "q has 2 heads and k_cache 3", k_cache=three[0], v_cache=three[1])
    refused(ValueError, "scale is 0", scale=0)
    refused(ValueError, "window is -1", window=-1)
    refused(TypeError, "slots is torch.int64", slots=ints(0, dtype=torch.int64))
    refused(ValueError, r"positions has shape \(2,\)", positions=ints(0, 0))
    refused(ValueError, r"out has shape \(1, 3, 64\)", out=poisoned(1, 3, 64, dtype=BF16))
    refused(TypeError, "workspace is torch.bfloat16", workspace=q)
    refused(ValueError, "workspace has 8 elements: ", workspace=workspace_of(1, 2, 64, 8)[:8])
    refused(ValueError, "table has shape", table=ints(0))
    turns = torch.zeros(8, 32, device=q.device)
    given = {name: good[name] for name in good if name != "q"} | {
        "qkv": randn(1, 256, dtype=BF16), "q_norm": None, "k_norm": None, "eps": 1e-6, "rounding": "once",
        "cos": turns, "sin": turns, "out": poisoned(1, 128, dtype=BF16),
    }  # fmt: skip
    refused(ValueError, r"qkv has shape \(1, 320\): \(1, 256\)", flash.decode, qkv=randn(1, 320, dtype=BF16))
    refused(ValueError, "q_norm is None and the other is not", flash.decode, k_norm=randn(64, dtype=BF16))
    refused(ValueError, "k_cache has head dimension 64: 128", flash.decode, cos=torch.zeros(8, 64, device=q.device),
            sin=torch.zeros(8, 64, device=q.device), qkv=randn(1, 384, dtype=BF16))  # fmt: skip
    refused(ValueError, "out has shape", flash.decode, out=poisoned(1, 130, dtype=BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 8, 32])
def test_large_shapes(half, kv_heads):
    step = Step(32, kv_heads, 128, (4000, 127, 1535), 4096, "once", 0.0, half)
    order = torch.randperm(4 * 256, device=step.qkv.device)
    pools = [paged(cache, 16, order) for cache in step.caches]
    for window in (0, 1000):
        fused = step.fused(window=window)
        assert_same(fused, step.in_two(window))
        for _ in range(50):
            assert_same(step.fused(window=window), fused)
        for token in range(3):
            assert_equal(step.fused(slice(token, token + 1), window)[0], fused[0][token : token + 1])
        out, *_ = step.fused(window=window, table=order.view(4, -1).int(), pools=pools)
        assert_equal(out, fused[0])
    q, (k_cache, v_cache) = randn(400, 32, 128, dtype=half), caches(2, 1000, kv_heads, 128, dtype=half)
    positions = torch.arange(400, dtype=torch.int32, device=q.device) + 300
    slots = torch.ones_like(positions)
    out = assert_as_good(run_unchecked, q, k_cache, v_cache, slots, positions, 128**-0.5, 0)
    for i in (0, 212, 399):
        one = slice(i, i + 1)
        alone = run_unchecked(q[one], k_cache, v_cache, slots[one], positions[one], 128**-0.5, 0)
        assert_equal(alone, out[one])


def run_unchecked(q, k_cache, v_cache, slots, positions, scale, window):
    """More tokens than the workspace has counters for."""
    count, heads, width = q.shape
    out, workspace = poisoned(*q.shape, dtype=q.dtype), workspace_of(count, heads, width, k_cache.shape[1])
    return flash.attention(q, k_cache, v_cache, slots, positions, scale, window, out, workspace)


@pytest.mark.gpu
def test_a_graph_replays():
    step = Step(32, 32, 128, (4000,), 4096, "once", 0.0)
    expected = step.fused()
    k_cache, v_cache = (cache.clone() for cache in step.caches)
    workspace = step.workspace(1)
    outs = [poisoned(1, 4096, dtype=BF16) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            step.decode(step.qkv, k_cache, v_cache, step.slots, step.positions, 0, out, workspace)
    for _ in range(100):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for out in outs:
            assert_same((out, k_cache, v_cache), expected)
