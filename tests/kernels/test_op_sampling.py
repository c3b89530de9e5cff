import itertools
import math
from typing import Any

import pytest
import torch
from kernel_numerics import DEVICE, assert_equal, floats, ints, randn

from kernels import sampling


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None):
    """Tokens drawn from each row of logits; the filters are the same for all rows, temperatures may differ."""
    count = len(logits)
    temperatures = temperature if isinstance(temperature, list) else [temperature] * count
    seeds = range(count) if seeds is None else seeds
    positions = [0] * count if positions is None else positions
    return sampling.sample(
        logits,
        floats(*temperatures),
        ints(*[top_k] * count),
        floats(*[top_p] * count),
        floats(*[min_p] * count),
        ints(*seeds, dtype=torch.int64),
        ints(*positions),
        torch.full((count,), -7, dtype=torch.int32, device=DEVICE),
    )


def expected_draw(logits, seed, position, **filters):
    """The token the definition gives for one row, in float64."""
    return winner(sampling.reference_filter(logits.double().cpu(), **filters), seed, position)


def winner(kept, seed, position):
    """The largest of filtered logits plus noise."""
    noisy = []
    for token, value in enumerate(kept.tolist()):
        word = sampling.philox((token, 0, position, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]
        noisy.append(value - math.log(-math.log1p(-(word + 0.5) / 2**32)))
    return max(range(len(noisy)), key=noisy.__getitem__)


def seed_that_draws(token, kept):
    """A seed for which `token` wins among filtered logits, at position 0."""
    return next(seed for seed in range(10000) if winner(kept, seed, 0) == token)


@pytest.mark.parametrize("width", [1, 31, 32, 100])
def test_argmax(dtype, width):
    logits = randn(3, width, dtype=dtype)
    out = sampling.argmax(logits, ints(-7, -7, -7))
    assert out.tolist() == logits.float().argmax(-1).tolist()


def test_argmax_of_ties_nan_and_infinities(dtype):
    nan, inf = math.nan, math.inf
    rows = [[1, 3, 3, 2], [nan, -1, nan, -2], [nan, nan, nan, nan], [-inf, -inf, nan, -inf], [0, nan, inf, inf]]
    logits = torch.tensor(rows, dtype=dtype, device=DEVICE)
    expected = [1, 1, -1, 0, 2]
    assert sampling.argmax(logits, ints(*[-7] * 5)).tolist() == expected
    assert draw(logits, temperature=0.0).tolist() == expected


def test_ties_across_threads_go_to_the_lowest_token(dtype):
    logits = torch.zeros(1, 200, dtype=dtype, device=DEVICE)
    logits[0, [37, 69, 150]] = 1.0
    assert sampling.argmax(logits, ints(-7)).item() == 37


def test_philox_known_answers():
    """Vectors published with Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    assert sampling.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert sampling.philox((ones, ones, ones, ones), (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert sampling.philox(counter, key) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_draws_are_the_definitions(dtype):
    logits = randn(6, 40, dtype=dtype)
    seeds = [0, 1, -5, 2**40 + 3, 7, 2**63 - 1]
    positions = [0, 5, 5, 100, 2**31 - 1, 3]
    drawn = draw(logits, temperature=0.8, seeds=seeds, positions=positions).tolist()
    pairs = zip(logits, seeds, positions, strict=True)
    assert drawn == [expected_draw(row, seed, position, temperature=0.8) for row, seed, position in pairs]


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 39},
    {"top_k": 500},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_p": 1e-6},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.05},
]


def draws_that_tell(dtype, temperature, filters):
    """One row of logits, once for each of two seeds that tell what is kept: one whose winner is the least of the tokens
    to keep, one that the greatest of the tokens to drop would win if it were kept. (rows, seeds, the filtered row)"""
    logits = (torch.randn(40) * 10).to(dtype)
    scaled = (logits.double() - logits.max().double()) / temperature
    kept = sampling.reference_filter(logits, temperature, **filters)
    dropped = scaled.masked_fill(kept.isfinite(), -math.inf)
    seeds = [seed_that_draws(scaled.masked_fill(~kept.isfinite(), math.inf).argmin().item(), kept)]
    if dropped.isfinite().any():
        tempted = kept.clone()
        tempted[dropped.argmax()] = dropped.max()
        seeds.append(seed_that_draws(dropped.argmax().item(), tempted))
    rows = logits.to(DEVICE).expand(len(seeds), 40).contiguous()
    return rows, seeds, kept


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(dtype, filters):
    temperature = 20.0
    rows, seeds, kept = draws_that_tell(dtype, temperature, filters)
    assert draw(rows, temperature, seeds=seeds, **filters).tolist() == [winner(kept, seed, 0) for seed in seeds]


def test_ties_at_the_floor_are_kept():
    row = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    kept = torch.where(row >= 1, row / 50, -math.inf)
    seeds = [seed_that_draws(token, kept) for token in range(4)]
    rows = row.to(DEVICE).expand(4, 6).contiguous()
    assert draw(rows, temperature=50.0, top_k=2, seeds=seeds).tolist() == [0, 1, 2, 3]


def test_nan_and_minus_infinity_are_never_drawn():
    row = torch.tensor([math.nan, 0.0, -math.inf, 0.0], device=DEVICE)
    drawn = draw(row.expand(20, 4).contiguous(), temperature=2.0).tolist()
    assert set(drawn) == {1, 3}
    assert draw(torch.full((1, 4), math.nan, device=DEVICE)).tolist() == [-1]


WEIRD_TEMPERATURES = [1e-37, 1e-38, 2e-39, 1e-41, 2.0**-149, 3.4e38]
WEIRD_ROWS = [
    [3.0, 9.0, -2.0, 8.9375, 0.0, 9.0, -50.0, 1.0],
    [-3.0, -9.0, -2.0, -8.0, -2.0, -60.0, -2.015625, -1e4],
    [6e4, -6e4, 5.9e4, 0.0, 6e4, 1.0, -1.0, 6e4],
    [0.0, -0.0, -1e-7, -1.0, 0.0, -0.0, -1e-7, -3.0],
    [math.nan, 2.0, -math.inf, 1.0, math.nan, 1.9921875, 2.0, -math.inf],
    [math.inf, 5.0, -math.inf, math.inf, math.nan, -5.0, math.inf, 0.0],
    [-math.inf, math.nan, -math.inf, -math.inf, math.nan, -math.inf, -math.inf, -math.inf],
    [math.nan] * 8,
]
WEIRD_FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.5},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
]


def weird_cases(dtype, index, stride):
    """Every row at every temperature with three seeds; the simulator is slow, and takes one in `stride` of them, others
    for each of WEIRD_FILTERS: logits, the settings of each row, the tokens the definition gives."""
    filters = WEIRD_FILTERS[index]
    cases = list(itertools.product(torch.tensor(WEIRD_ROWS).to(dtype), WEIRD_TEMPERATURES, (1, 77, 12345)))
    cases = cases if DEVICE.type == "cuda" else cases[index::stride]
    expected = []
    for row, temperature, seed in cases:
        usable = ~row.isnan()
        kept = torch.full((8,), -math.inf, dtype=torch.float64)
        if usable.any():
            exact = torch.tensor(temperature, dtype=torch.float32).item()
            scores = sampling.reference_filter(row[usable], exact)
            least = scores[sampling.reference_filter(row[usable], exact, **filters) > -math.inf]
            # transformers drops some of equal logits; here those equal to the last kept stay.
            kept[usable] = scores.masked_fill(scores < least.min(), -math.inf) if len(least) else scores
        expected.append(winner(kept, seed, 0) if usable.any() else -1)
    settings: dict[str, Any] = {
        "temperature": [t for _, t, _ in cases],
        "seeds": [seed for *_, seed in cases],
        **filters,
    }
    return torch.stack([row for row, *_ in cases]).to(DEVICE), settings, expected


@pytest.mark.parametrize("index", range(len(WEIRD_FILTERS)))
def test_tiny_temperatures_and_infinite_logits(dtype, index):
    """The limit of small temperatures: one of the largest, each as likely as the others, and never a NaN."""
    logits, settings, expected = weird_cases(dtype, index, 7)
    assert draw(logits, **settings).tolist() == expected


def test_infinite_logits_share_the_draws(dtype):
    row = torch.tensor([math.inf, 5.0, -math.inf, math.inf, math.nan, -5.0, math.inf, 0.0], dtype=dtype, device=DEVICE)
    assert set(draw(row.expand(30, 8).contiguous(), temperature=2.0).tolist()) == {0, 3, 6}


def test_zero_and_minus_zero_are_equal(dtype):
    row = torch.tensor([-0.0, -1.0, 0.0, -0.0], dtype=dtype, device=DEVICE)
    several: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.2}]
    for filters in several:
        assert set(draw(row.expand(30, 4).contiguous(), temperature=0.1, **filters).tolist()) == {0, 2, 3}


def test_a_draw_depends_on_its_row_alone(dtype):
    logits = randn(4, 33, dtype=dtype)
    seeds, positions = [9, 9, 1, 2], [0, 1, 2, 3]
    filters = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    together = draw(logits, seeds=seeds, positions=positions, **filters).tolist()
    assert together == draw(logits, seeds=seeds, positions=positions, **filters).tolist()
    for i in range(4):
        alone = draw(logits[i : i + 1], seeds=seeds[i : i + 1], positions=positions[i : i + 1], **filters)
        assert alone.tolist() == together[i : i + 1]


def test_draws_follow_the_distribution():
    """Chi-square of the definition's draws, by the plain Python generator: 3000 of them over 5 tokens."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    counts = [0] * 5
    for position in range(3000):
        counts[expected_draw(logits, 12345, position, temperature=1.0)] += 1
    expected = (logits.double().softmax(-1) * 3000).tolist()
    chi_square = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    assert chi_square < 18.5  # 0.1 % of the chi-square distribution with 4 degrees of freedom


def test_repetition_penalty(dtype):
    logits = randn(3, 150, dtype=dtype)
    seen = torch.rand(3, 150, device=DEVICE) < 0.3
    penalty = floats(1.0, 1.3, 0.5)
    wide = logits.double()
    scaled = torch.where(wide < 0, wide * penalty.double()[:, None], wide / penalty.double()[:, None])
    expected = torch.where(seen, scaled, wide)
    given = logits.clone()
    assert sampling.repetition_penalty(given, seen, penalty) is given
    assert torch.equal(given[0], logits[0]) and torch.equal(given[~seen], logits[~seen])
    assert torch.allclose(given.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    again = sampling.repetition_penalty(logits.clone(), seen.to(torch.uint8), penalty)
    assert_equal(again, given)


def test_refusals():
    logits = randn(2, 8)
    with pytest.raises(ValueError, match=r"argmax: out has shape \(3,\): \(2,\) needed"):
        sampling.argmax(logits, ints(0, 0, 0))
    with pytest.raises(TypeError, match=r"seen is torch.float32: torch.uint8 or torch.bool needed"):
        sampling.repetition_penalty(logits, logits, floats(1, 1))
    with pytest.raises(ValueError, match="logits is not contiguous"):
        sampling.argmax(randn(8, 2).T, ints(0, 0))
