"""Version split of argmax and sampling against naive and the definition; what a CUDA graph of decode steps leans on."""

import math

import pytest
import torch
from kernel_numerics import DEVICE, assert_equal, floats, ints, randn
from test_op_sampling import FILTERS, WEIRD_FILTERS, draws_that_tell, seed_that_draws, weird_cases, winner

from kernels import sampling

BF16, F16 = torch.bfloat16, torch.float16
VOCABULARY = 100352


@pytest.fixture(scope="module")
def workspace():
    """One for all tests: what a launch leaves behind, the next one meets."""
    return torch.zeros(sampling.sample_workspace_size(64), dtype=torch.int32, device=DEVICE)


def assert_clean(workspace):
    """All that must be zero between launches is."""
    rows = workspace.view(-1, sampling.ROW)
    assert not rows[:, sampling.ARRIVED].any() and not rows[:, sampling.HEAD :].any()


def argmax(logits):
    workspace = torch.zeros(sampling.argmax_workspace_size(len(logits)), dtype=torch.int32, device=DEVICE)
    out = torch.full((len(logits),), -7, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        assert sampling.argmax_split(logits, out, workspace) is out
        assert not workspace.view(-1, sampling.HEAD)[:, sampling.ARRIVED].any()
    return out.tolist()


def arguments(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None):
    """What sampling takes between logits and out; a filter is a number for all rows or a list."""
    rows = [value if isinstance(value, list) else [value] * count for value in (temperature, top_k, top_p, min_p)]
    seeds = ints(*(range(count) if seeds is None else seeds), dtype=torch.int64)
    positions = ints(*([0] * count if positions is None else positions))
    return floats(*rows[0]), ints(*rows[1]), floats(*rows[2]), floats(*rows[3]), seeds, positions


def draw(logits, workspace, **filters):
    """Tokens drawn by version split."""
    out = torch.full((len(logits),), -7, dtype=torch.int32, device=DEVICE)
    assert sampling.sample_split(logits, *arguments(len(logits), **filters), out, workspace) is out
    assert_clean(workspace)
    return out.tolist()


def naive_draw(logits, **filters):
    out = torch.full((len(logits),), -7, dtype=torch.int32, device=DEVICE)
    return sampling.sample(logits, *arguments(len(logits), **filters), out).tolist()


@pytest.mark.parametrize("width", [8, 2056])
def test_argmax(half, width):
    logits = randn(3, width, dtype=half)
    assert argmax(logits) == logits.float().argmax(-1).tolist()


def test_argmax_of_ties_nan_and_infinities(half, workspace):
    nan, inf = math.nan, math.inf
    rows = [[1, 3, 3, 2], [nan, -1, nan, -2], [nan] * 4, [nan, -inf, -inf, nan], [0, nan, inf, inf], [-0.0, 0, 0, -1]]
    logits = torch.tensor(rows, dtype=half, device=DEVICE).repeat(1, 2)
    expected = [1, 1, -1, 1, 2, 0]
    assert argmax(logits) == expected
    assert draw(logits, workspace, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5) == expected


def test_ties_across_threads_warps_and_blocks_go_to_the_lowest_token():
    logits = torch.full((4, 4096), -1.0, dtype=BF16, device=DEVICE)
    for row, places in enumerate(([5, 6], [9, 4000], [700, 2100, 4095], [2047, 2048])):
        logits[row, places] = 1.0
    assert argmax(logits) == [5, 9, 700, 2047]


def test_draws_are_the_definitions(half, workspace):
    logits = randn(3, 40, dtype=half)
    seeds, positions = [-5, 2**40 + 3, 2**63 - 1], [5, 2**31 - 1, 3]
    drawn = draw(logits, workspace, temperature=0.8, seeds=seeds, positions=positions)
    for row, token, seed, position in zip(logits, drawn, seeds, positions, strict=True):
        assert token == winner(sampling.reference_filter(row.double().cpu(), 0.8), seed, position)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(half, filters, workspace):
    temperature = 20.0
    rows, seeds, kept = draws_that_tell(half, temperature, filters)
    drawn = draw(rows, workspace, temperature=temperature, seeds=seeds, **filters)
    assert drawn == [winner(kept, seed, 0) for seed in seeds]


MIXED = {
    "temperature": [1.0, 0.0, 0.7, 2.0, 5.0],
    "top_k": [0, 5, 20, 10**6, 50],
    "top_p": [1.0, 0.5, 1.0, 0.9, 0.99],
    "min_p": [0.0, 0.5, 0.1, 0.0, 0.001],
}


def test_rows_with_filters_of_their_own(half, workspace):
    """As naive draws them, twice the same, and each row alone as in the batch."""
    logits, positions = randn(5, 104, dtype=half, scale=3.0), list(range(5))
    expected = naive_draw(logits, positions=positions, **MIXED)
    for _ in range(2):
        assert draw(logits, workspace, positions=positions, **MIXED) == expected
    for i in (2, 4):
        alone = {name: values[i : i + 1] for name, values in MIXED.items()}
        assert draw(logits[i : i + 1], workspace, seeds=[i], positions=[i], **alone) == expected[i : i + 1]


@pytest.mark.usefixtures("races")
def test_ties_at_the_floor_are_kept(half, workspace):
    row = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -1.0])
    kept = torch.where(row >= 1, row / 50, -math.inf)
    seeds = [seed_that_draws(token, kept) for token in range(4)]
    rows = row.to(half).to(DEVICE).expand(4, 8).contiguous()
    assert draw(rows, workspace, temperature=50.0, top_k=2, seeds=seeds) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("filters", "dtype"),
    [({}, BF16), ({"top_k": 5}, BF16), ({"top_p": 0.9}, BF16), ({"min_p": 0.1}, BF16), ({"top_p": 0.9}, F16)],
    ids=str,
)
def test_nan_and_infinities(filters, dtype, workspace):
    nan, inf = math.nan, math.inf
    row = torch.tensor([nan, 0.0, -inf, 0.0, nan, 0.0, -inf, -inf], dtype=dtype, device=DEVICE)
    assert set(draw(row.expand(5, 8).contiguous(), workspace, temperature=2.0, **filters)) <= {1, 3, 5}
    rows = [[nan] * 8, [nan, nan, *[-inf] * 6], [0.0, inf, 1.0, inf, *[nan] * 4]]
    logits = torch.tensor(rows, dtype=dtype, device=DEVICE)
    drawn = draw(logits, workspace, **filters)
    assert drawn == naive_draw(logits, **filters)
    assert drawn[0] == -1 and drawn[1] in range(2, 8) and drawn[2] in (1, 3)


def test_temperatures_that_overflow_and_underflow(workspace):
    logits = torch.tensor([[1e30, 1e25, -3.0, 0.0, 7.0, 1e20, -1e30, 2.0]], dtype=BF16, device=DEVICE)
    filters = {
        "temperature": [1e-44, 1e-20, 1e38, 1e-44, 1e-20, 1e38],
        "top_k": [2, 4, 2, 0, 0, 6],
        "top_p": [0.6, 1.0, 0.5, 0.6, 0.5, 0.6],
        "min_p": [0.0, 0.3, 0.0, 0.3, 0.0, 0.3],
    }
    rows = logits.expand(6, 8).contiguous()
    assert draw(rows, workspace, **filters) == naive_draw(rows, **filters)


@pytest.mark.parametrize("index", range(len(WEIRD_FILTERS)))
def test_tiny_temperatures_and_infinite_logits(index, workspace):
    logits, settings, expected = weird_cases((BF16, F16)[index % 2], index, 37)
    drawn = []
    for begin in range(0, len(logits), 64):
        here = slice(begin, begin + 64)
        own = {name: value[here] if isinstance(value, list) else value for name, value in settings.items()}
        drawn += draw(logits[here].contiguous(), workspace, **own)
    assert drawn == expected


def test_zero_and_minus_zero_are_equal(half, workspace):
    row = torch.tensor([-0.0, -1.0, 0.0, -0.0, *[-2.0] * 4])
    seeds = [seed_that_draws(token, torch.where(row == 0, 0.0, -math.inf)) for token in (0, 2, 3)] * 2
    rows = row.to(half).to(DEVICE).expand(6, 8).contiguous()
    drawn = draw(rows, workspace, temperature=0.1, top_k=[1] * 3 + [0] * 3, top_p=[1.0] * 3 + [0.2] * 3, seeds=seeds)
    assert drawn == [0, 2, 3] * 2


def test_advance():
    tokens, positions, places = ints(9, 9, 9), ints(0, 4, 2), ints(0, 5, 3)
    history = torch.full((3, 6), -9, dtype=torch.int32, device=DEVICE)
    sampling.advance(ints(11, 12, -1), tokens, positions, places, history)
    assert tokens.tolist() == [11, 12, 0] and positions.tolist() == [1, 5, 3] and places.tolist() == [1, 0, 4]
    expected = torch.full((3, 6), -9, dtype=torch.int32)
    expected[0, 0], expected[1, 5], expected[2, 3] = 11, 12, -1
    assert_equal(history.cpu(), expected)


def test_advance_of_many_rows():
    count = 300
    chosen = torch.arange(count, dtype=torch.int32, device=DEVICE)
    tokens, positions, places = torch.zeros_like(chosen), chosen % 3, chosen % 4
    history = torch.zeros((count, 4), dtype=torch.int32, device=DEVICE)
    sampling.advance(chosen, tokens, positions, places, history)
    assert torch.equal(tokens, chosen) and torch.equal(positions, chosen % 3 + 1)
    assert_equal(places, (chosen + 1) % 4)
    assert_equal(history.gather(1, (chosen % 4).long()[:, None])[:, 0], chosen)
    assert history.sum() == chosen.sum()


def test_refusals(workspace):
    logits, out = randn(2, 16, dtype=BF16), ints(0, 0)
    with pytest.raises(
        TypeError, match=r"argmax_split: logits is torch.float32: torch.bfloat16 or torch.float16 needed"
    ):
        sampling.argmax_split(logits.float(), out, workspace)
    with pytest.raises(ValueError, match="argmax_split: logits has rows of 12: a multiple of 8 needed"):
        sampling.argmax_split(randn(2, 12, dtype=BF16), out, workspace)
    with pytest.raises(ValueError, match="argmax_split: logits does not begin at a multiple of 16 bytes"):
        sampling.argmax_split(randn(33, dtype=BF16)[1:].view(2, 16), out, workspace)
    with pytest.raises(ValueError, match="argmax_split: workspace has 100 elements: at least 264 needed"):
        sampling.argmax_split(logits, out, workspace[:100])
    with pytest.raises(TypeError, match=r"sample_split: workspace is torch.float32: torch.int32 needed"):
        sampling.sample_split(logits, *arguments(2), out, workspace.float())
    with pytest.raises(ValueError, match=r"sample_split: top_k has shape \(1,\): \(2,\) needed"):
        given = arguments(2)
        sampling.sample_split(logits, given[0], given[1][:1], *given[2:], out, workspace)
    with pytest.raises(ValueError, match=r"advance: history has shape \(2,\): \[B, C\] needed"):
        sampling.advance(out, out, out, out, out)
    with pytest.raises(TypeError, match=r"advance: tokens is torch.int64: torch.int32 needed"):
        sampling.advance(out, out.long(), out, out, out[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8, 64])
def test_real_vocabulary(half, count, workspace):
    logits = (torch.randn(count, VOCABULARY, device=DEVICE) * 3).to(half)
    logits[:, 100278:] = -math.inf
    logits[0, :1000] = math.nan
    assert argmax(logits) == sampling.argmax(logits, ints(*[-7] * count)).tolist()
    # Without top_p the definition of what is kept is exact.
    for filters in ({}, {"top_k": 1}, {"top_k": 50}, {"top_k": 40000}, {"min_p": 0.05}, {"temperature": 0.0}):
        assert draw(logits, workspace, **filters) == naive_draw(logits, **filters)
    for filters in ({"top_p": 0.5}, {"top_p": 0.9, "top_k": 100}, {"top_p": 0.999, "temperature": 3.0}):
        drawn = draw(logits, workspace, **filters)
        assert drawn == draw(logits, workspace, **filters)
        alone = [draw(logits[i : i + 1], workspace, seeds=[i], **filters)[0] for i in (0, count // 2, count - 1)]
        assert alone == [drawn[0], drawn[count // 2], drawn[count - 1]]
        # A token at the very edge of the mass may be kept by one and dropped by the other.
        seen = naive_draw(logits, **filters)
        assert sum(a != b for a, b in zip(drawn, seen, strict=True)) <= max(1, count // 32)
    mixed = {name: (values * 13)[:count] for name, values in MIXED.items()}
    assert draw(logits, workspace, **mixed) == draw(logits, workspace, **mixed)


@pytest.mark.gpu
def test_equal_logits_and_masked_rows(workspace):
    """Rows that all blocks count in the same place, and rows with next to nothing in them."""
    logits = torch.zeros(3, VOCABULARY, dtype=BF16, device=DEVICE)
    logits[1] = -math.inf
    logits[1, [77, 90000]] = torch.tensor([1.0, 2.0], dtype=BF16, device=DEVICE)
    logits[2, 5000:] = math.nan
    for filters in ({"top_k": 10}, {"top_p": 0.3}, {"min_p": 0.9}):
        assert draw(logits, workspace, **filters) == naive_draw(logits, **filters)
        assert draw(logits, workspace, **filters)[1] in (77, 90000)


@pytest.mark.gpu
def test_graph_of_steps(workspace):
    """Sampling and advance, captured once and replayed: the same tokens as step by step."""
    logits = (torch.randn(4, VOCABULARY, device=DEVICE) * 3).to(BF16)
    filters = {"temperature": [0.0, 1.0, 1.0, 2.0], "top_k": [0, 0, 40, 0], "top_p": [1.0, 1.0, 0.9, 0.95]}
    temperature, top_k, top_p, min_p, seeds, positions = arguments(4, **filters)
    tokens, chosen, places = ints(0, 0, 0, 0), ints(0, 0, 0, 0), ints(0, 0, 0, 0)
    history = torch.zeros((4, 12), dtype=torch.int32, device=DEVICE)

    def step():
        sampling.sample_split(logits, temperature, top_k, top_p, min_p, seeds, positions, chosen, workspace)
        sampling.advance(chosen, tokens, positions, places, history)

    for _ in range(10):
        step()
    expected = history.clone()
    positions.zero_()
    places.zero_()
    history.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(10):
        graph.replay()
    assert torch.equal(history, expected) and positions.tolist() == [10] * 4
    assert_clean(workspace)
