"""Requests, arrivals, and the figures of what came of them."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engine_checkpoints import Reference
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bench.workloads import (
    LATENCIES,
    STATISTICS,
    Mix,
    Outcome,
    SampleRequest,
    arrive,
    describe,
    draw_arrivals,
    failed,
    goodput,
    make_source,
    parse_goodput,
    parse_range,
    parse_rate,
    parse_schedules,
    percentile,
    print_tables,
    read_sharegpt,
    render,
    samples,
    summarize,
    tables,
    with_text,
)
from engine.text.tokenizer import Tokenizer


def done(
    prompt: int = 4, new: int = 3, ttft: float = 10.0, gaps: Sequence[float] = (2.0, 4.0), cached: int = 0
) -> Outcome:
    return Outcome(prompt, new, 0.0, ttft, list(gaps), ttft + sum(gaps), cached)


# --- requests ---------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_stated_expression():
    mix = Mix(count=256, low=32, high=1024, new_tokens=128, seed=1)
    r = random.Random(1)
    assert mix.lengths == [r.randint(32, 1024) for _ in range(256)] and sum(mix.lengths) == 144_420
    requests = mix.requests(1000)
    assert [len(request.prompt) for request in requests] == mix.lengths
    assert {request.new_tokens for request in requests} == {128} and {request.arrival for request in requests} == {0.0}
    assert mix.longest == max(mix.lengths) + 128


def test_tokens_are_repeatable_and_other_in_another_run():
    mix = Mix(8, 5, 5, 2)
    assert mix.requests(50) == mix.requests(50) != mix.requests(50, run=1)
    prompts = [request.prompt for request in mix.requests(50)]
    assert len({tuple(prompt) for prompt in prompts}) == 8 and {len(prompt) for prompt in prompts} == {5}
    assert set().union(*(r.prompt for r in Mix(50, 20, 20, 1).requests(3))) == {0, 1, 2}


def test_a_shared_prefix_is_the_same_in_every_prompt_and_no_other_run():
    mix = Mix(6, 2, 4, 1, prefix_tokens=100)
    first, second = mix.requests(1000), mix.requests(1000, run=1)
    assert len({tuple(request.prompt[:100]) for request in first}) == 1
    assert len({tuple(request.prompt) for request in first}) == 6
    assert [len(request.prompt) for request in first] == [100 + own for own in mix.lengths]
    assert first[0].prompt[:100] != second[0].prompt[:100]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count = 0; it must be an integer of at least 1"),
        ({"low": 9, "high": 3}, "from 9 to 3"),
        ({"new_tokens": 2.5}, "new_tokens = 2.5"),
        ({"prefix_tokens": -1}, "prefix_tokens = -1; it must be an integer of at least 0"),
        ({"seed": True}, "seed = True"),
    ],
)
def test_wrong_mixes(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Mix(**{"count": 1, "low": 1, "high": 1, "new_tokens": 1} | fields)


def test_ranges():
    assert parse_range("n", "512") == (512, 512) and parse_range("n", " 32-1024 ") == (32, 1024)


@given(st.text(alphabet="0123456789- ax.", max_size=8))
def test_a_range_is_read_as_written_or_refused(text: str):
    try:
        low, high = parse_range("prompt-tokens", text)
    except ValueError as error:
        assert str(error).startswith(f"prompt-tokens = {text!r}; it must be ")
    else:
        assert text.strip() in (f"{low}-{high}", f"{low}") and low >= 1


# --- ShareGPT ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(olmo2: Reference) -> Tokenizer:
    return Tokenizer(olmo2.path)


def write(path: Path, *conversations: Sequence[str]) -> Path:
    turns = [{"conversations": [{"from": "x", "value": text} for text in texts]} for texts in conversations]
    path.write_text(json.dumps(turns))
    return path


def test_sharegpt_is_filtered_as_vllm_does(tokenizer: Tokenizer, tmp_path: Path):
    # Letters that are no merges: one token each (the test's tokenizer is one of bytes).
    size = {text: len(tokenizer.encode(text)) for text in ("q" * 4, "q" * 3, "z" * 30, "z" * 31)}
    assert size["q" * 4] == 4 and size["z" * 30] == 30
    path = write(
        tmp_path / "share.json",
        ("q" * 4, "z" * 4),
        ("q" * 3, "z" * 9),  # the prompt is too short
        ("z" * 9, "q" * 3),  # the answer is
        ("z" * 31, "q" * 4),  # the prompt is too long
        ("z" * 30, "q" * 11),  # both together are
        ("z" * 30, "q" * 10, "a third turn, which nobody looks at"),
        ("one turn alone",),
    )
    found = read_sharegpt(path, tokenizer, 2, max_prompt=30, max_total=40)
    assert sorted((len(request.prompt), request.new_tokens) for request in found) == [(4, 4), (30, 10)]
    assert all(request.text and request.prompt == tokenizer.encode(request.text) for request in found)
    # With a fixed length the answers' own does not matter.
    fixed = read_sharegpt(path, tokenizer, 4, new_tokens=2, max_prompt=30, max_total=40)
    assert sorted(len(request.prompt) for request in fixed) == [4, 9, 30, 30]
    with pytest.raises(ValueError, match=r"2 of its conversations .* 4 to 30 tokens .* 3 requests were asked for"):
        read_sharegpt(path, tokenizer, 3, max_prompt=30, max_total=40)


def test_sharegpt_is_shuffled_by_the_seed(tokenizer: Tokenizer, tmp_path: Path):
    path = write(tmp_path / "share.json", *((f"prompt {index}", "an answer") for index in range(40)))
    texts = [[request.text for request in read_sharegpt(path, tokenizer, 40, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2] and sorted(map(str, texts[0])) == sorted(map(str, texts[2]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "a JSON dict; ShareGPT's format is a list"),
        ('[{"conversations": []}, {"turns": []}]', 'entry 1 has no list "conversations"'),
        ("[3]", "entry 0 has no list"),
        ('[{"conversations": [{"value": "a"}, {"text": "b"}]}]', 'entry 0, turn 1 has no text "value"'),
        ('[{"conversations": [{"value": 5}]}]', 'entry 0, turn 0 has no text "value"'),
    ],
)
def test_a_wrong_file_is_refused(tokenizer: Tokenizer, tmp_path: Path, content: str, message: str):
    path = tmp_path / "share.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_sharegpt(path, tokenizer, 1)
    assert str(raised.value).startswith(str(path))


def test_sources(tokenizer: Tokenizer, tmp_path: Path):
    mix = Mix(2, 3, 4, 5)
    random_ones = make_source(mix, 300, None)
    assert random_ones(1) == mix.requests(300, 1) != random_ones(0)
    path = write(tmp_path / "share.json", *((f"prompt {index}", "an answer") for index in range(9)))
    turns = make_source(mix, 300, tokenizer, path, new_tokens=7)
    assert turns(0) == read_sharegpt(path, tokenizer, 2, seed=mix.seed, new_tokens=7) != turns(1)
    with pytest.raises(ValueError, match=r"share\.json holds text: a tokenizer is needed"):
        make_source(mix, 300, None, path)


def test_text_is_added_where_there_is_none(tokenizer: Tokenizer):
    ids = tokenizer.encode("the quick")
    given, made = with_text([SampleRequest([1], 1, text="as it is"), SampleRequest(ids, 1)], tokenizer)
    assert given.text == "as it is" and made.text == "the quick" and made.prompt == ids


# --- arrivals ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 60), st.floats(0.01, 1e4), st.sampled_from(["poisson", "fixed"]), st.integers(0, 2**40)
)  # fmt: skip
def test_arrivals_do_not_fall_and_are_repeatable(count: int, rate: float, kind: str, seed: int):
    times = draw_arrivals(count, rate, kind, seed)
    assert len(times) == count and times[0] == 0 and all(a <= b for a, b in pairwise(times))
    assert times == draw_arrivals(count, rate, kind, seed)
    if kind == "fixed":
        assert times == pytest.approx([index / rate for index in range(count)])


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 3.0, 200.0]))
def test_poisson_gaps_have_their_mean_and_spread(seed: int, rate: float):
    gaps = np.diff(draw_arrivals(20_000, rate, "poisson", seed))
    assert np.mean(gaps) == pytest.approx(1 / rate, rel=0.05) and np.std(gaps) == pytest.approx(1 / rate, rel=0.08)


def test_all_at_once():
    requests = [SampleRequest([1], 1), SampleRequest([2], 1)]
    assert arrive(requests, math.inf) == requests
    assert [request.arrival for request in arrive(requests, 2.0, "fixed")] == [0.0, 0.5]
    assert parse_rate("inf") == math.inf and parse_rate(" 2.5") == 2.5


@pytest.mark.parametrize("text", ["0", "-1", "nan", "", "fast"])
def test_wrong_rates(text: str):
    with pytest.raises(ValueError, match=r"request rate .*; it must be requests a second above 0, or inf"):
        parse_rate(text)


def test_schedules():
    requests = [SampleRequest([index], 1) for index in range(4)]
    found = parse_schedules("2, 0.5,inf", "fixed", 7)
    assert [name for name, _ in found] == ["2 requests/s", "0.5 requests/s", "all at once"]
    assert [given(requests)[1].arrival for _, given in found] == [0.5, 2.0, 0.0]
    assert parse_schedules("3", "poisson", 7)[0][1](requests) == arrive(requests, 3.0, "poisson", 7)
    for rates, kind, message in (("1,x", "fixed", "request rate 'x'"), ("inf", "burst", "arrivals = 'burst'")):
        with pytest.raises(ValueError, match=message):
            parse_schedules(rates, kind, 0)


def test_wrong_arrivals():
    with pytest.raises(ValueError, match="arrivals = 'burst'; they must be poisson or fixed"):
        draw_arrivals(1, 1.0, "burst")
    with pytest.raises(ValueError, match="must be above 0"):
        draw_arrivals(1, math.nan)


# --- figures ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float):
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)), rel=1e-9, abs=1e-6)


def test_figures_follow_their_definitions():
    outcomes = [
        done(prompt=10, new=3, ttft=10.0, gaps=(2.0, 4.0), cached=8),
        done(prompt=20, new=1, ttft=30.0, gaps=()),
        failed(0.1, "timeout", "not  done\nafter 5 s"),
        failed(0.2, "HTTP 429", ""),
        failed(0.2, "timeout", ""),
    ]
    assert outcomes[2].detail == "not done after 5 s"
    found = summarize(outcomes, 2.0)
    assert (found["completed"], found["failed"], found["errors"]) == (2, 3, {"HTTP 429": 1, "timeout": 2})
    assert (found["prompt_tokens"], found["cached_tokens"], found["new_tokens"]) == (30, 8, 4)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1, 2, 17)
    assert samples(outcomes, "ttft_ms") == [10, 30] and samples(outcomes, "itl_ms") == [2, 4]
    assert samples(outcomes, "tpot_ms") == [3.0]  # a single token has none
    assert found["ttft_ms_mean"] == 20 and found["ttft_ms_p50"] == 20 and found["ttft_ms_p90"] == pytest.approx(28)
    assert found["e2e_ms_p99"] == pytest.approx(16 + 0.99 * 14)
    nothing = summarize([failed(0.0, "timeout", "")], 1.0)
    assert nothing["output_throughput"] == 0 and nothing["tpot_ms_p99"] is None
    assert describe([]) == dict.fromkeys(STATISTICS)


def test_goodput_counts_what_meets_every_objective():
    outcomes = [done(ttft=10.0), done(ttft=90.0), done(gaps=(50.0, 60.0)), failed(0.0, "timeout", ""), done(new=1)]
    assert goodput(outcomes, {"ttft_ms": 50.0, "tpot_ms": 10.0}, 4.0) == 2 / 4
    assert goodput(outcomes, {"e2e_ms": 1e9}, 4.0) == 1.0


def test_goodput_as_vllm_writes_it():
    assert parse_goodput("ttft:500 tpot_ms:50,e2el:1e4") == {"ttft_ms": 500, "tpot_ms": 50, "e2e_ms": 1e4}
    for text, message in {
        "itl:5": "one of ttft_ms, tpot_ms, e2e_ms",
        "": "one of",
        "ttft": "as ttft_ms:500",
        "ttft:x": "a number of milliseconds",
        "ttft:nan": "a number",
        "ttft:-1": "a number",
        "ttft:1 ttft_ms:2": "names ttft_ms twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_goodput(text)


# --- shown ------------------------------------------------------------------------------------------------------------

PHASE = {"phase": "prompts", "seconds": 1.5, "prompt_tokens": 1200, "new_tokens": 3, "floor_s": 0.75,
         "floor_share": 0.5, "floor_kind": "matrix rate"}  # fmt: skip


def test_forms(capsys: pytest.CaptureFixture[str]):
    plain = {"run": "inf"} | summarize([done(), failed(0.0, "timeout", "")], 2.0)
    rich = {"run": "4/s", "goodput": 0.5, "preemptions": 0, "floor_share": 0.25} | summarize([done()], 1.0)
    records = [plain | {"phases": [PHASE]}, rich]
    assert json.loads(render(records, "json")) == records
    lines = list(csv.DictReader(io.StringIO(render(records, "csv"))))
    assert [line["run"] for line in lines] == ["inf", "4/s"] and json.loads(lines[0]["phases"]) == [PHASE]
    assert float(lines[1]["ttft_ms_p99"]) == 10 and lines[0]["goodput"] == "" and lines[1]["goodput"] == "0.5"

    speed, latency, phases = tables(records)
    assert speed.columns[-3:] == ["good requests/s", "preemptions", "of the floor"]
    assert speed.lines[0][:3] == ["inf", "1", "1 (1 timeout)"] and speed.lines[1][-3:] == ["0.500", "0", "25.0%"]
    assert len(latency.lines) == 2 * len(LATENCIES) and latency.lines[0][:3] == ["inf", "TTFT", "10.0"]
    assert phases.lines == [["inf", "prompts", "1.50", "1,200", "3", "0.750", "50.0%", "matrix rate"]]
    (only, _) = tables([plain])
    assert "of the floor" not in only.columns and "preemptions" not in only.columns

    markdown = render(records, "markdown").splitlines()
    assert markdown[0].startswith("| run | done |") and markdown[1].startswith("| --- | ---: |")
    assert "| inf | prompts | 1.50 | 1,200 |" in render(records, "markdown")
    print_tables(records, "a title", width=200)
    shown = capsys.readouterr().out
    assert shown.startswith("a title") and "1 (1 timeout)" in shown and "matrix rate" in shown
