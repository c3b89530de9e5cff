"""The reference operations: right against fp64, and a row's bits independent of what it is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch

from engine.model.linear import DenseLinear
from engine.ops.reference import ReferenceOps

OPS = ReferenceOps()
BATCHES = (1, 2, 7, 16, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.where(torch.rand(shape, generator=generator) < 0.01, 30.0, 1.0)).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, ulps: float = 2.0) -> None:
    assert found.dtype == dtype
    scale = exact.abs().max()
    assert (found.double() - exact).abs().max() <= ulps * rounding(dtype) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(64, 96), (256, 704), (768, 256), (100, 10)])
def test_linear(k: int, n: int, dtype: torch.dtype, threads: int):
    x, weight = values(33, k, dtype=dtype), values(n, k, dtype=dtype, seed=1)
    matrix = DenseLinear(weight)
    whole = OPS.linear(x, matrix)
    close(whole, x.double() @ weight.double().t(), dtype, ulps=8)
    for count in BATCHES:
        assert torch.equal(OPS.linear(x[:count], matrix), whole[:count])
        assert torch.equal(OPS.linear(x[33 - count :], matrix), whole[33 - count :])
    out = torch.full((33, n), torch.nan, dtype=dtype)
    assert OPS.linear(x, matrix, out=out) is out and torch.equal(out, whole)


def test_linear_in_more_than_one_block_of_weight_rows():
    x, weight = values(3, 32), values(8192 + 5, 32, seed=1)
    close(OPS.linear(x, DenseLinear(weight)), x.double() @ weight.double().t(), torch.float32, ulps=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", ["once", "twice"])
def test_rms_norm(rounded: Literal["once", "twice"], dtype: torch.dtype, threads: int):
    for width in (64, 100, 2048):
        wide = values(33, width + 32, dtype=dtype)
        x, weight = wide[:, :width], values(width, dtype=dtype, seed=1)
        whole = OPS.rms_norm(x, weight, 1e-6, rounded)
        double = x.double()
        exact = double * torch.rsqrt(double.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
        close(whole, exact, dtype, ulps=3)
        for count in BATCHES:
            assert torch.equal(OPS.rms_norm(x[33 - count :], weight, 1e-6, rounded), whole[33 - count :])
        OPS.rms_norm(x, weight, 1e-6, rounded, out=x)  # in place, on a view with a row stride
        assert torch.equal(x, whole)


def test_rms_norm_rounds_as_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    x, weight = values(16, 256, dtype=torch.bfloat16), values(256, dtype=torch.bfloat16, seed=1)
    kinds: dict[Literal["once", "twice"], Any] = {"once": Olmo2RMSNorm, "twice": LlamaRMSNorm}
    for rounded, kind in kinds.items():
        module = kind(256, 1e-6).to(torch.bfloat16)
        module.weight.data.copy_(weight)
        assert torch.equal(OPS.rms_norm(x, weight, 1e-6, rounded), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: torch.dtype):
    angles = torch.rand(50, 16, dtype=torch.float64) * 6
    cos, sin = angles.cos().float(), angles.sin().float()
    qkv = values(9, (3 + 1) * 32, dtype=dtype)
    q, k = qkv[:, :96].view(9, 3, 32), qkv[:, 96:].view(9, 1, 32)
    positions = torch.tensor([0, 1, 49, 7, 7, 3, 2, 1, 0], dtype=torch.int32)
    before = qkv.clone()
    OPS.rope(q, k, cos, sin, positions)
    turn = torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(1)
    for x, old in ((q, before[:, :96].view(9, 3, 32)), (k, before[:, 96:].view(9, 1, 32))):
        pairs = torch.complex(old[..., :16].double(), old[..., 16:].double()) * turn
        close(x, torch.cat((pairs.real, pairs.imag), -1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype, threads: int):
    gate_up = values(33, 2 * 77, dtype=dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0  # exp overflows
    whole = OPS.swiglu(gate_up)
    gate, up = gate_up.double().chunk(2, -1)
    close(whole, torch.nn.functional.silu(gate) * up, dtype)
    assert whole.isfinite().all()
    for count in BATCHES:
        assert torch.equal(OPS.swiglu(gate_up[33 - count :]), whole[33 - count :])
    assert torch.equal(OPS.swiglu(gate_up, out=torch.empty(33, 77, dtype=dtype)), whole)


def test_add_and_embedding():
    x, y = values(5, 7, dtype=torch.bfloat16), values(5, 7, dtype=torch.bfloat16, seed=1)
    assert torch.equal(OPS.add(x, y), x + y)
    assert OPS.add(x, y, out=x) is x
    tokens = torch.tensor([4, 0, 4], dtype=torch.int32)
    assert torch.equal(OPS.embedding(tokens, y), y[[4, 0, 4]])


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """One whole sequence, textbook fashion, in the tensors' dtype: q [T, Hq, D], k and v [T, Hk, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    hidden = (distance < 0) | ((distance >= window) if window else torch.zeros_like(distance, dtype=torch.bool))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Sequence:
    """A sequence of 150 tokens whose keys and values lie in one slot of a cache that is otherwise NaN."""

    def __init__(self, dtype: torch.dtype, seed: int, length: int = 150) -> None:
        self.length = length
        self.q, self.k, self.v = (
            values(length, heads, 64, dtype=dtype, seed=seed + i) for i, heads in enumerate((4, 2, 2))
        )

    def rows(self, slot: int, which: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q[which.start : which.stop], torch.full((len(which),), slot, dtype=torch.int32), torch.tensor(
            list(which), dtype=torch.int32
        )  # fmt: skip


@pytest.mark.parametrize(
    ("window", "dtype", "threads"),
    [(window, dtype, 1) for window in (0, 1, 50, 64, 100) for dtype in DTYPES]
    + [(0, torch.bfloat16, 2), (50, torch.float32, 2)],
    indirect=["threads"],
)
def test_attention(window: int, dtype: torch.dtype, threads: int):
    sequences = [Sequence(dtype, seed) for seed in (0, 10, 20)]
    cache = torch.full((2, 5, 170, 2, 64), torch.nan, dtype=dtype)
    for slot, s in enumerate(sequences):
        OPS.kv_write(s.k, s.v, cache[0], cache[1], *s.rows(slot, range(150))[1:])
    assert torch.equal(cache[0, 1, :150], sequences[1].k) and cache[0, 1, 150:].isnan().all()

    whole = [
        OPS.attention(s.q, cache[0], cache[1], *s.rows(i, range(150))[1:], 0.125, window)
        for i, s in enumerate(sequences)
    ]
    for s, found in zip(sequences, whole, strict=True):
        exact = plain_attention(s.q.double(), s.k.double(), s.v.double(), 0.125, window)
        error, theirs = (
            (x.double() - exact).abs().max() for x in (found, plain_attention(s.q, s.k, s.v, 0.125, window))
        )
        assert error <= 2 * theirs + rounding(dtype) * exact.abs().max()

    def run(parts: list[tuple[int, range]]) -> None:
        q, slots, positions = (torch.cat(x) for x in zip(*(sequences[i].rows(i, r) for i, r in parts), strict=True))
        found = OPS.attention(q, cache[0], cache[1], slots, positions, 0.125, window)
        assert torch.equal(found, torch.cat([whole[i][r.start : r.stop] for i, r in parts]))

    run([(0, range(100, 101))])
    run([(2, range(149, 150)), (0, range(3, 4)), (1, range(64, 65))])
    run([(1, range(17, 90)), (0, range(149, 150)), (2, range(0, 33))])
    for size in (17, 64):
        for begin in range(0, 150, size):
            run([(0, range(begin, min(begin + size, 150)))])
    run([(0, range(i, i + 1)) for i in (140, 7, 63, 64, 65, 0)])  # in any order


def test_attention_does_not_see_what_follows():
    """Keys a slot still holds from a longer sequence before, NaN here, change nothing."""
    s = Sequence(torch.float32, 3, length=20)
    clean, stale = torch.zeros(2, 1, 128, 2, 64), torch.full((2, 1, 128, 2, 64), torch.nan)
    results = []
    for cache in (clean, stale):
        OPS.kv_write(s.k, s.v, cache[0], cache[1], *s.rows(0, range(20))[1:])
        results.append(OPS.attention(s.q, cache[0], cache[1], *s.rows(0, range(20))[1:], 0.125, 0))
    assert torch.equal(*results)
