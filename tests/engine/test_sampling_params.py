"""Sampling: settings are checked, filters equal transformers', draws depend on (seed, position) alone."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.ops.reference import ReferenceOps, gumbel, philox
from engine.sampling_params import SamplingParams

OPS = ReferenceOps()


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("max_new_tokens", 0, "at least 1"), ("max_new_tokens", 1.5, "integer"), ("max_new_tokens", True, "integer"),
        ("temperature", -0.1, "0 or more"), ("temperature", math.nan, "finite"), ("temperature", math.inf, "finite"),
        ("temperature", 1e39, "up to 3.4e38"), ("repetition_penalty", 1e39, "3.4e38"),
        ("repetition_penalty", 1e-39, "from 1.2e-38"),
        ("temperature", "1", "number"), ("top_k", -1, "0 .off. or more"), ("top_k", 1.0, "integer"),
        ("top_p", 0.0, "above 0 and up to 1"), ("top_p", 1.01, "above 0 and up to 1"), ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"), ("repetition_penalty", 0.0, "above 0"), ("repetition_penalty", None, "above 0"),
        ("seed", -1, "2.63"), ("seed", 2**63, "2.63"), ("seed", 1.0, "integer"), ("stop", 5, "strings"),
        ("stop", ("",), "none of them empty"), ("stop", "", "none of them empty"), ("stop", [b"x"], "strings"),
        ("stop_token_ids", 5, "list of token ids"), ("stop_token_ids", ["5"], "token ids"),
        ("stop_token_ids", [-1], "at least 0"), ("ignore_eos", 1, "True or False"),
    ],
)  # fmt: skip
def test_settings_are_checked(field: str, value: Any, right: str):
    with pytest.raises(ValueError, match=rf"{field} = .*; it must be .*{right}") as caught:
        SamplingParams(**{field: value})
    assert repr(value).strip("[]()") in str(caught.value)


def test_settings():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[3], temperature=0, top_p=1)
    assert params.stop == ("a", "b") and params.stop_token_ids == (3,)
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(seed=7).draw_seed() == 7
    drawn = {SamplingParams().draw_seed() for _ in range(100)}
    assert len(drawn) == 100 and all(0 <= seed < 2**63 for seed in drawn)


def test_philox_known_answers():
    """The three vectors of Random123's kat_vectors for philox4x32-10."""
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, key, expected in vectors:
        words = philox(*(tuple(torch.tensor([word]) for word in words) for words in (counter, key)))  # type: ignore[arg-type]
        assert tuple(int(w) for w in words) == expected


def noise(seed: int, position: int, count: int) -> torch.Tensor:
    return gumbel(torch.tensor([seed]), torch.tensor([position], dtype=torch.int32), count)[0]


def test_gumbel_noise():
    drawn = noise(12345, 6, 200_000)
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert torch.equal(drawn[:1000], noise(12345, 6, 1000))
    assert not torch.equal(drawn[:1000], noise(12345, 7, 1000))
    assert not torch.equal(drawn[:1000], noise(12345 + 2**32, 6, 1000))
    both = gumbel(torch.tensor([12345, 2**63 - 1]), torch.tensor([6, 2**31 - 1], dtype=torch.int32), 1003)
    assert torch.equal(both[0], noise(12345, 6, 1003)) and torch.equal(both[1], noise(2**63 - 1, 2**31 - 1, 1003))


def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def sample(logits: torch.Tensor, seeds: list[int], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, position=0):
    n = len(logits)
    return OPS.sample(
        logits, column([temperature] * n, torch.float32), column([top_k] * n, torch.int32),
        column([top_p] * n, torch.float32), column([min_p] * n, torch.float32), column(seeds, torch.int64),
        column([position] * n, torch.int32),
    )  # fmt: skip


SETTINGS = [
    {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.7}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 10_000},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_equals_transformers(settings: dict[str, Any]):
    """4,000 draws fall only where transformers' warpers leave probability, and as often."""
    torch.manual_seed(0)
    logits = torch.randn(1, 40) * 2
    warpers: list[Any] = [TemperatureLogitsWarper(settings.get("temperature", 1.0))]
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    warpers += [kind(settings[name]) for name, kind in kinds.items() if name in settings]
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0]
    draws = sample(logits.expand(2000, -1), list(range(2000)), **settings)
    counts = torch.bincount(draws.long(), minlength=40) / len(draws)
    assert (counts[expected == 0] == 0).all()
    error = (expected * (1 - expected) / len(draws)).sqrt()
    assert ((counts - expected).abs() <= 5 * error + 1e-9).all()


def test_ties_are_kept():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]).expand(200, -1)
    assert set(sample(logits, list(range(200)), top_k=1).tolist()) == {1, 2, 3}
    assert set(sample(logits, list(range(200)), top_p=0.1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 3e-39, 1e-42, 2.0**-149])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
def test_tiny_temperatures_are_as_greedy_and_leave_ties_to_chance(temperature: float, settings: dict[str, Any]):
    torch.manual_seed(3)
    logits = torch.randn(50, 30) * torch.tensor([0.01, 1.0, 30.0, 1e4, 1e30]).repeat(10)[:, None]
    found = sample(logits, list(range(50)), temperature=temperature, **settings)
    assert torch.equal(found, OPS.argmax(logits))
    for row in ([5.0, 1.0, 5.0, 4.99], [-80.0, -81.0, -80.0, -1e4], [0.0, -1e-28, -0.0, -1.0]):
        tied = torch.tensor([row]).expand(400, -1)
        drawn = sample(tied, list(range(400)), temperature=temperature, **settings)
        assert 140 < int((drawn == 0).sum()) < 260 and set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 1}, {"top_p": 0.3}, {"min_p": 1.0}, {"temperature": 1e-40}], ids=str
)
def test_logits_of_infinity(settings: dict[str, Any]):
    """+inf is taken, each as often; where nothing but -inf is left, that is no NaN."""
    inf, nan = math.inf, math.nan
    row = torch.tensor([[1.0, inf, nan, inf, -inf, 9.0]])
    assert set(sample(row.expand(100, -1), list(range(100)), **settings).tolist()) == {1, 3}
    row = torch.tensor([[-inf, nan, -inf, nan]])
    assert set(sample(row.expand(100, -1), list(range(100)), **settings).tolist()) == {0, 2}
    assert OPS.argmax(torch.tensor([[1.0, inf, nan, inf]])).tolist() == [1]


def test_sampling_leaves_the_logits_alone():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(4, 20).to(dtype)
        before = logits.clone()
        sample(logits, [1, 2, 3, 4], temperature=0.5, top_k=3)
        OPS.argmax(logits)
        assert torch.equal(logits, before)


def test_greedy_and_unusable_logits():
    nan = math.nan
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [nan, -5.0, nan, -6.0], [nan] * 4, [-math.inf, nan, -math.inf, nan]])
    assert OPS.argmax(logits).tolist() == [1, 1, -1, 0] and OPS.argmax(logits).dtype == torch.int32
    assert sample(logits, [1, 2, 3, 4], temperature=0.0).tolist() == [1, 1, -1, 0]
    drawn = sample(logits, [1, 2, 3, 4], top_k=3, top_p=0.9, min_p=0.01).tolist()
    assert drawn[1] in (1, 3) and drawn[2] == -1
    out = torch.zeros(4, dtype=torch.int32)
    assert OPS.argmax(logits, out=out) is out and out.tolist() == [1, 1, -1, 0]


def test_a_draw_depends_on_its_row_seed_and_position_only():
    torch.manual_seed(1)
    logits = torch.randn(33, 300)
    seeds = list(range(33))
    together = sample(logits, seeds, temperature=1.3, top_p=0.95)
    for row in range(33):
        assert sample(logits[row : row + 1], seeds[row : row + 1], temperature=1.3, top_p=0.95) == together[row]
    assert torch.equal(sample(logits, seeds, temperature=1.3, top_p=0.95), together)
    assert not torch.equal(sample(logits, seeds, temperature=1.3, top_p=0.95, position=1), together)


def test_repetition_penalty_equals_transformers():
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 50), torch.randint(0, 50, (3, 12))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = torch.cat([cast(Any, RepetitionPenaltyLogitsProcessor(p))(ids[i : i + 1], logits[i : i + 1].clone())
                          for i, p in enumerate((1.0, 1.3, 0.7))])  # fmt: skip
    OPS.repetition_penalty(logits, seen, torch.tensor([1.0, 1.3, 0.7]))
    assert torch.equal(logits, expected)
