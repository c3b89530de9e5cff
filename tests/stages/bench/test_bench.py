"""stages/bench/ and stages/standard.py: what is measured, what is not, and the limits beside it."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch

from engine.bench.throughput import LATE
from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, Footprint, step_cost
from stages import bench, metrics
from stages.bench import serve, standard, suite
from stages.bench.context import Context
from stages.bench.suites import SUITES
from stages.host import read_host
from stages.params import ParamsError, Workload
from stages.stage import Run
from stages.standard import (
    DECODE,
    PREFILL,
    Budget,
    Case,
    Latency,
    TooSlow,
    limits,
    list_cases,
    measure_case,
    random_prompts,
    read_ceilings,
)

CONFIG = ModelConfig.from_dict(tiny.ARCHITECTURE)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tiny.pipeline()
    monkeypatch.chdir(directory)
    return directory


def run_bench(week) -> None:
    bench.main.__wrapped__(Run("bench"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]


def test_cases_fit_the_model_and_grow():
    workload = Workload("w", ("x",), (1, 8), (128, 32, 255), 16, 1, 0, *tiny.MANY)
    cases = list_cases(workload, 256)
    assert [case.prompt_tokens for case in cases if case.suite == PREFILL] == [32, 128, 255]
    decode = [(case.batch, case.prompt_tokens) for case in cases if case.suite == DECODE]
    assert decode == [(1, 32), (1, 128), (8, 32), (8, 128)]


def test_prompts_are_random_repeatable_and_of_the_stated_length():
    case = Case(DECODE, 3, 50, 4)
    prompts = random_prompts(case, 320, 1)
    assert [len(prompt) for prompt in prompts] == [50, 50, 50] and len({tuple(prompt) for prompt in prompts}) == 3
    assert prompts == random_prompts(case, 320, 1) != random_prompts(case, 320, 2)


def test_latency_follows_its_definitions():
    latency = Latency()
    latency.record(Case(DECODE, 2, 10, 4), [0.1, 0.15, 0.2, 0.4])
    assert latency.ttft_ms == [pytest.approx(100)] and latency.e2e_ms == [pytest.approx(400)]
    assert latency.tpot_ms == [pytest.approx(100)] and latency.itl_ms == pytest.approx([50, 50, 200])
    assert latency.output_throughput == [pytest.approx(2 * 4 / 0.4)]
    assert latency.total_token_throughput == [pytest.approx(2 * 14 / 0.4)]
    with pytest.raises(ValueError, match="3 token times where 4"):
        latency.record(Case(DECODE, 2, 10, 4), [0.1, 0.2, 0.3])


def test_limits_are_the_slower_of_memory_and_matrix_rate():
    case = Case(DECODE, 2, 8, 5)
    ceilings, model = Ceilings(bandwidth=1e9, matrix_rate=1e18), Footprint.dense(CONFIG, torch.bfloat16)
    found = limits(case, model, ceilings)
    step = step_cost(model, [1, 1], [10, 10])
    first = step_cost(model, [8, 8], [8, 8])
    assert found["tpot_ms"][0] == pytest.approx((step.weight_bytes + step.kv_bytes) / 1e9 * 1e3)
    assert found["tpot_ms"][1] == "read bandwidth over weight + KV bytes"
    whole = first.bytes / 1e9 + 4 * step.bytes / 1e9
    assert found["e2e_ms"][0] == pytest.approx(whole * 1e3)
    assert found["output_throughput"][0] == pytest.approx(10 / whole)
    assert found["total_token_throughput"][0] == pytest.approx(26 / whole)
    slow = limits(case, model, Ceilings(bandwidth=1e18, matrix_rate=1e9))
    assert slow["ttft_ms"][0] == pytest.approx(first.flops / 1e9 * 1e3)
    assert slow["ttft_ms"][1] == "bfloat16 matrix rate over the step's FLOPs"
    assert limits(case, model, Ceilings()) == {"ttft_ms": (None, None)}


def test_ceilings_are_read_from_provision(here: Path):
    assert read_ceilings(Run("bench"), gpu=False) == Ceilings(tiny.BANDWIDTH, tiny.MATRIX_RATE, "float32")
    assert read_ceilings(Run("bench"), gpu=True) == Ceilings()


def test_repeats_stop_at_the_budget_and_slow_cases_are_not_run(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("stages.standard.time.perf_counter", lambda: clock[0])
    calls = []

    def generate(prompts, new_tokens):
        calls.append((len(prompts), len(prompts[0]), new_tokens))
        clock[0] += 0.1 * len(prompts) * len(prompts[0]) + 0.1 * (new_tokens - 1)
        return [0.1 * len(prompts) * len(prompts[0]) + 0.1 * index for index in range(new_tokens)]

    workload = Workload("w", ("x",), (1,), (10,), 11, 5, 1, *tiny.MANY)
    budget = Budget(case_seconds=5.5, ceiling_seconds=30)
    latency = measure_case(generate, Case(DECODE, 1, 10, 11), workload, 320, "cpu", budget)
    assert calls[0] == (1, 10, 2) and set(calls[1:]) == {(1, 10, 11)}
    assert len(latency.e2e_ms) == 2 and latency.tpot_ms == pytest.approx([100, 100])
    with pytest.raises(TooSlow, match="about 81 s"):
        measure_case(generate, Case(DECODE, 8, 100, 11), workload, 320, "cpu", budget)
    assert len(calls) == 3
    calls.clear()
    latency = measure_case(generate, Case(DECODE, 1, 10, 11), workload, 320, "cpu", budget, rehearse=True)
    assert set(calls) == {(1, 10, 11)} and len(calls) == 3 and len(latency.e2e_ms) == 2


def test_weeks_without_a_forward_pass_have_rows_without_values(here: Path):
    run_bench(tiny.make_week(bench=("baseline",), engine=None))
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    standard = frame[frame.suite.isin([PREFILL, DECODE])]
    ours = standard[standard.backend == "cuda"]
    assert len(ours) and ours.value.isna().all() and set(ours.status) == {"not_measured"}
    assert set(ours.note) == {suite.NO_FORWARD}
    theirs = standard[(standard.backend == "transformers") & (standard.metric == "tpot_ms")]
    baseline = tiny.read("reports/metrics/baseline.parquet")
    baseline = baseline[(baseline.suite == DECODE) & (baseline.metric == "tpot_ms")]
    assert list(theirs.value) == list(baseline.value) and list(theirs.limit) == list(baseline.limit)
    assert set(theirs.stage) == {"bench"} and [list(s) for s in theirs.samples] == [list(s) for s in baseline.samples]


def test_a_cpu_measures_the_reference_backend_and_no_other(here: Path):
    run_bench(tiny.make_week(bench=(PREFILL, DECODE)))
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.backend == "reference"]
    late = ours.metric.isin(LATE)
    assert (ours[late].value == 0).all() and set(ours[late].suite) == {PREFILL, DECODE}
    ours = ours[~late]
    measured = ours[ours.metric != "peak_memory_bytes"]
    assert set(measured.status) == {"ok"} and (measured.value > 0).all() and (measured.limit > 0).all()
    tpot = measured[measured.metric == "tpot_ms"]
    assert sorted(zip(tpot.batch, tpot.context, strict=True)) == [(1, 8), (1, 20), (2, 8), (2, 20)]
    assert list(tpot.value) == pytest.approx([sum(samples) / 2 for samples in tpot.samples])
    cuda = frame[frame.backend == "cuda"]
    assert len(cuda) == len(ours) and cuda.value.isna().all() and set(cuda.note) == {"no GPU on this host"}


def test_a_suite_the_week_does_not_list_is_not_measured(here: Path):
    run_bench(tiny.make_week(bench=(PREFILL,)))
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    decode = frame[(frame.suite == DECODE) & (frame.backend == "reference")]
    assert len(decode) and decode.value.isna().all() and set(decode.note) == {"w04 does not measure standard_decode"}


def test_tokenizer_and_loading_are_measured(here: Path):
    run_bench(tiny.make_week(bench=("tokenizer", "load"), engine=None))
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    tokenizer = frame[frame.suite == "tokenizer"]
    assert set(zip(tokenizer.case, tokenizer.backend, strict=True)) == {
        (case, backend) for case in ("encode", "decode") for backend in ("afs", "transformers")
    }
    load = frame[frame.suite == "load"]
    assert set(load.case) == {"cold", "warm"} and set(load.metric) == {"load_seconds", "load_gbs"}
    assert (tokenizer.value > 0).all() and (load.value > 0).all() and (load.limit > 0).all()


MANY = ("throughput", "prefix_cache", "decode_batches", "step_trace")


def test_many_requests_run_here_beside_rows_of_what_needs_a_gpu(here: Path):
    engine = dataclasses.replace(tiny.ENGINE, kv_cache="paged", prefix_cache=True, batching="continuous")
    run_bench(tiny.make_week(bench=MANY, engine=engine))
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite.isin(MANY)]
    missing, run = ours[ours.backend == "cuda"], ours[ours.backend == "reference"]
    context = tiny.make_context(metrics.Rows("bench", "w04", tiny.NAME, read_host()), None)
    assert set(missing.status) == {"not_measured"} and set(missing.note) == {"no GPU on this host"}
    assert len(missing) == sum(len(list(SUITES[name].rows(context, True))) for name in MANY)
    late = run.metric.isin(LATE)
    assert (run[late].value == 0).all() and set(run[late].suite) == {"throughput", "prefix_cache"}
    run = run[~late]
    assert len(run) == sum(len(list(SUITES[name].rows(context, False))) for name in MANY if SUITES[name].needs != "gpu")
    assert set(run[run.status != "ok"].metric) == {"peak_memory_bytes"}
    computed = run[(run.metric == "computed_tokens") & run.case.str.endswith("all at once")]
    assert (computed.value == computed.limit).all() and len(computed) == 1


def test_the_server_is_loaded_before_the_engine(here: Path, monkeypatch: pytest.MonkeyPatch):
    called: list[Any] = []

    @contextlib.contextmanager
    def serving(command):
        called.append(command(7)[-1])
        yield "http://x"

    monkeypatch.setattr(serve, "serving", serving)
    monkeypatch.setattr(serve, "bench_server", lambda context, url: called.append((url, context.knobs["backend"])))
    monkeypatch.setattr(serve, "read_stats", lambda url: {"late_kernels": 0, "late_graphs": 2})
    monkeypatch.setattr(Context, "llm", property(lambda _: pytest.fail("the engine is loaded")))
    run_bench(tiny.make_week(bench=("serve",)))
    assert called == ["7", ("http://x", "reference")]
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite == "serve"]
    late = ours[ours.metric.isin(LATE)].set_index("metric")
    assert late.value.to_dict() == {"late_kernels": 0, "late_graphs": 2}
    assert late.note["late_graphs"] == "the engine was not ready: times hold this"
    ours = ours[~ours.metric.isin(LATE)]
    assert set(ours.status) == {"not_measured"} and set(ours.backend) == {"cuda"} and len(ours) > 20


def test_suites_run_where_a_gpu_holds_them():
    """The server before an engine is loaded, the peers' model after all others."""
    names = list(SUITES)
    engines = [name for name in names if SUITES[name].needs_engine]
    assert engines[0] == "serve" and engines[-1] == "peers"


def test_an_unknown_suite_is_refused(here: Path):
    with pytest.raises(ParamsError, match=r"no suite 'standard_prefil'; there are: .*standard_prefill"):
        run_bench(tiny.make_week(bench=("standard_prefil",)))


def test_a_killed_bench_leaves_no_file(here: Path, monkeypatch: pytest.MonkeyPatch):
    target = Path("reports/metrics/bench_w04.parquet")
    target.unlink(missing_ok=True)

    def killed(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(standard, "measure_case", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(tiny.make_week(bench=(PREFILL, DECODE)))
    assert not target.exists()
