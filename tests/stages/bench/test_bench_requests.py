"""stages/bench: many requests through an engine and through a server, as far as that runs without a GPU."""

import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.bench.throughput import LATE, Limit
from engine.bench.workloads import Outcome, failed
from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, Footprint, step_cost
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.reference import ReferenceOps
from engine.runtime.request import Completion
from stages.bench import decode_batches, requests, serve, step_trace
from stages.bench.prefix_cache import read_mix
from stages.bench.suites import SUITES
from stages.exits import StageError
from stages.host import read_host
from stages.metrics import Rows, check
from stages.params import Load, Requests, SharedPrefix, Workload
from stages.standard import TooSlow

CONFIG = ModelConfig.from_dict(tiny.ARCHITECTURE)
FOOTPRINT = Footprint.dense(CONFIG, torch.bfloat16)
CEILINGS = Ceilings(bandwidth=1e9, matrix_rate=1e12)
WORKLOAD = Workload(
    "w", ("x",), (1,), (8,), 4, 2, 1, Requests(5, (4, 9), 3, 0), SharedPrefix(4, 32, (3, 5), 2), Load((1, 3), (40.0,))
)
MANY = ("throughput", "prefix_cache", "decode_batches", "step_trace", "serve")
KNOBS = {"dtype": "bfloat16", "backend": "reference", "tensor_parallel": 1}


class FakeLLM:
    """Answers at once with made-up times, and keeps in its prefix cache all that it has seen, by 16 tokens."""

    def __init__(self, kv_cache: str = "paged") -> None:
        self.config, self.max_model_len = CONFIG, 256
        self.model = SimpleNamespace(footprint=FOOTPRINT)
        self.engine = SimpleNamespace(device="cpu", max_batch=4, kv_cache=kv_cache, page_size=16, prefix_cache=True)
        self.prompts: list[list[int]] = []
        self._known: set[tuple[int, ...]] = set()

    def generate(self, prompts: list[list[int]], params: list[Any]) -> list[Completion]:
        time.sleep(0.002)
        return [self._answer(prompt, each.max_new_tokens) for prompt, each in zip(prompts, params, strict=True)]

    def _answer(self, prompt: list[int], new: int) -> Completion:
        self.prompts.append(prompt)
        pages = [tuple(prompt[:end]) for end in range(16, len(prompt), 16)]
        found = [page for page in pages if page in self._known]
        self._known.update(pages)
        first = 8.0 / (1 + len(found))
        gaps = [1.0] * (new - 1)
        return Completion(
            prompt, [0] * new, "", "length", first, gaps, first + sum(gaps), cached_tokens=16 * len(found)
        )

    def stats(self) -> Any:
        return SimpleNamespace(preemptions=0, generated_tokens=0, kv_wasted_share=0.02, late_kernels=0, late_graphs=0)


def make_context(llm: Any = None, workload: Workload = WORKLOAD) -> Any:
    rows = Rows("bench", "w08", "tiny", read_host())
    return tiny.make_context(rows, llm, workload, ceilings=CEILINGS, config=CONFIG)


def lengths_of(workload: Workload = WORKLOAD) -> list[int]:
    return requests.read_requests(make_context(workload=workload)).lengths


def collect(name: str, llm: Any, workload: Workload = WORKLOAD) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, metric) -> row, all of which are as the schema wants them, and as the suite lists them."""
    context = make_context(llm, workload)
    SUITES[name].measure(context)
    return read_rows(context, name)


def read_rows(context: Any, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    check(context.rows.rows)
    found = {(row["case"], row["metric"]): row for row in context.rows.rows if row["metric"] not in LATE}
    listed = list(SUITES[name].rows(context, False))
    assert sorted(found) == sorted((row["case"], row["metric"]) for row in listed)
    for row in listed:
        assert {key: found[row["case"], row["metric"]][key] for key in row} == row
    return found


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("gpu", [True, False])
def test_rows_without_values_say_why(name: str, gpu: bool):
    context = make_context()
    listed = list(SUITES[name].rows(context, gpu))
    context.rows.add_missing(listed, "no GPU on this host", **KNOBS | {"backend": "cuda"})
    check(context.rows.rows)
    assert len(context.rows.rows) == len(listed) > 0
    assert {(row["status"], row["suite"]) for row in context.rows.rows} == {("not_measured", name)}


def test_throughput_beside_its_floor():
    found = collect("throughput", FakeLLM())
    name = "5 requests of 4 to 9 tokens, 3 new"
    output, whole = found[name, "output_throughput"], found[name, "duration_s"]
    assert len(output["samples"]) == 2 and output["value"] > 0
    assert output["samples"] == pytest.approx([15 / seconds for seconds in whole["samples"]])
    lengths = lengths_of()
    limit = Limit(FOOTPRINT, 4, CEILINGS)
    least = sum(
        part[0] or 0.0
        for part in (
            limit.prompts([(length, length) for length in lengths]),
            limit.decoding([(length + 1, length + 2) for length in lengths]),
        )
    )
    assert whole["limit"] == pytest.approx(least) and output["limit"] == pytest.approx(15 / least)
    assert "prompts: " in whole["limit_kind"] and "decode steps: " in whole["limit_kind"]
    total = found[name, "total_token_throughput"]
    assert total["limit"] == pytest.approx((15 + sum(lengths)) / least)
    # Ten requests, all with the same times.
    assert found[name, "ttft_ms"]["samples"] == [8.0] * 10 and found[name, "ttft_ms_p99"]["value"] == 8
    assert found[name, "itl_ms"]["value"] == 1 and found[name, "itl_ms"]["samples"] is None
    assert found[name, "e2e_ms_mean"]["value"] == 10 and found[name, "preemptions"]["value"] == 0
    assert found[name, "peak_memory_bytes"]["status"] == "not_measured"
    prompts, decode = (found[f"{name}: {phase}", "phase_s"] for phase in ("prompts", "decode"))
    assert prompts["value"] == pytest.approx(0.008) and prompts["limit"] is not None and decode["value"] is not None
    assert prompts["limit"] + decode["limit"] == pytest.approx(least)
    assert prompts["note"] == f"{sum(lengths)} prompt tokens, 5 new ones"


def test_no_run_knows_the_prompts_of_another():
    llm = FakeLLM()
    collect("throughput", llm)
    collect("prefix_cache", llm)
    long = [tuple(prompt[:16]) for prompt in llm.prompts if len(prompt) >= 32]
    shared = [prefix for prefix in set(long) if long.count(prefix) > 1]
    assert len(shared) == WORKLOAD.repeats + 2, "a prefix a run at once, one for those that come alone, and to warm up"


def test_a_shared_prefix_is_computed_once():
    found = collect("prefix_cache", FakeLLM())
    name = "4 requests of 32 shared and 3 to 5 tokens, 2 new"
    own = sum(read_mix(make_context()).lengths)
    assert found[f"{name}: first alone", "ttft_ms"]["value"] == 8
    rest = found[f"{name}: each of the rest alone", "ttft_ms"]
    assert rest["samples"] == pytest.approx([8 / 3] * 3) and rest["limit"] is not None
    assert rest["limit"] < found[f"{name}: first alone", "ttft_ms"]["limit"]
    assert found[f"{name}: each of the rest alone", "ttft_share"]["value"] == pytest.approx(1 / 3)
    computed = found[f"{name}: all at once", "computed_tokens"]
    assert computed["value"] == computed["limit"] == own + 32
    assert found[f"{name}: all at once", "cached_tokens"]["value"] == 3 * 32
    apart = found[f"{name}: all at once, nothing shared", "computed_tokens"]
    assert apart["value"] == apart["limit"] == own + 4 * 32


def test_what_the_engine_or_the_model_does_not_hold_is_rows_with_the_reason():
    found = collect("prefix_cache", FakeLLM("contiguous"))
    assert {row["note"] for row in found.values()} == {"this week's engine has no prefix cache"}
    long = dataclasses.replace(WORKLOAD, requests=Requests(2, (255, 260), 3, 0))
    found = collect("throughput", FakeLLM(), long)
    (note,) = {row["note"] for row in found.values()}
    assert note.startswith("a request of 2") and note.endswith("the model has 256")


def test_what_would_take_too_long_on_a_cpu_is_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "CPU_SECONDS", 1e-6)
    llm: Any = FakeLLM()
    with pytest.raises(TooSlow, match="one run would take about"):
        requests.check(llm, requests.read_requests(make_context()))
    found = collect("throughput", llm)
    assert {row["status"] for row in found.values()} == {"not_measured"}
    assert all(len(prompt) <= 8 for prompt in llm.prompts)


def test_a_run_with_failures_is_not_ok():
    rows = Rows("bench", "w11", "tiny", read_host())
    done = Outcome(4, 2, 0.0, 10.0, [2.0], 12.0)
    runs = [([done, failed(0.0, "HTTP 429", "busy")], 2.0), ([failed(0.0, "timeout", "")] * 2, 2.0)]
    requests.add_run(rows, "serve", "x", runs, (*requests.RUN, "failed"), note="as sent", **KNOBS)
    requests.add_run(rows, "serve", "y", runs[1:], (*requests.RUN, "failed"), **KNOBS)
    check(rows.rows)
    assert {row["status"] for row in rows.rows if row["case"] == "x"} == {"failed"}
    found = {(row["case"], row["metric"]): row for row in rows.rows}
    assert found["x", "failed"]["value"] == 3 and found["x", "output_throughput"]["samples"] == [1.0, 0.0]
    assert found["x", "ttft_ms"]["note"] == "3 of 4 requests failed: HTTP 429: busy; timeout: "
    assert found["y", "ttft_ms"]["status"] == "not_measured" and "2 of 2" in found["y", "failed"]["note"]


# --- decode steps -----------------------------------------------------------------------------------------------------


def engine(kv_cache: str) -> Any:
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps())
    settings = SimpleNamespace(device="cpu", kv_cache=kv_cache, page_size=16, captures=False)
    return SimpleNamespace(
        config=CONFIG, model=model, weights=model.weights, engine=settings, release=lambda: None
    )  # fmt: skip


@pytest.fixture
def one_thread():
    """Threads that take turns at microseconds of work spin in between, on cores that something else uses as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kv_cache", ["paged", "contiguous"])
def test_decode_steps_beside_their_limit(kv_cache: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_batches, "SMALL", ((3, 20), (2, 1000)))
    found = collect("decode_batches", engine(kv_cache))
    step, rate = (found["batch 3 context 20", metric] for metric in ("step_ms", "output_throughput"))
    limit = step_cost(FOOTPRINT, [1] * 3, [23] * 3).bytes / 1e9 * 1e3
    assert step["limit"] == pytest.approx(limit) and rate["limit"] == pytest.approx(3 / limit * 1e3)
    assert rate["samples"] == pytest.approx([3 / sample * 1e3 for sample in step["samples"]])
    assert step["value"] > 0 and (step["batch"], step["context"]) == (3, 20)
    assert found["batch 2 context 1000", "step_ms"]["note"] == "1004 positions; the model has 256"


def test_a_paged_cache_gives_each_sequence_pages_of_its_own():
    cache: Any = decode_batches.random_cache(engine("paged"), 3, 40)
    pages = cache.table[:3, :3].flatten().tolist()
    assert sorted(pages) == list(range(9)) and pages != sorted(pages)
    assert all(float(tensor.float().std()) > 0.5 for tensor in (*cache.k, *cache.v))


# --- a trace ----------------------------------------------------------------------------------------------------------


def test_idle_time_is_what_no_span_covers():
    spans = [step_trace.Span(*given) for given in (("b", 4.0, 6.0), ("a", 0.0, 3.0), ("a", 1.0, 2.0), ("c", 9.0, 10.0))]
    idle, shares = step_trace.summarize_trace(spans)
    assert idle == pytest.approx((1 + 3) / 10)
    assert shares == [("a", pytest.approx(4 / 7)), ("b", pytest.approx(2 / 7)), ("c", pytest.approx(1 / 7))]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=12))
def test_idle_time_by_counting(pairs: list[tuple[int, int]]):
    spans = [step_trace.Span("x", begin, begin + length) for begin, length in pairs]
    covered = {tick for begin, length in pairs for tick in range(begin, begin + length)}
    whole = max(covered) + 1 - min(covered)
    idle, shares = step_trace.summarize_trace(spans)
    assert idle == pytest.approx(1 - len(covered) / whole) and shares == [("x", 1.0)]


# --- a server ---------------------------------------------------------------------------------------------------------

SERVER = """
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

mode, port = sys.argv[1], int(sys.argv[2])
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never ready" else 200)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if mode == "ends":
            os._exit(7)
        if mode == "busy" and len(asked["prompt"]) > 6:
            self.send_response(429)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        for index in range(asked["max_tokens"]):
            last = index == asked["max_tokens"] - 1
            time.sleep(0.002)
            self.say({"choices": [{"text": "", "finish_reason": "length" if last else None}]})
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        self.say({"choices": [], "usage": usage})
    def say(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\\n\\n".encode())
        self.wfile.flush()
    def log_message(self, *_): pass

if mode == "broken":
    print("no such", "model", file=sys.stderr)
    sys.exit(3)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def command(mode: str = "good"):
    return lambda port: [sys.executable, "-c", SERVER, mode, str(port)]


def test_every_load_is_run_against_the_server():
    context = make_context()
    with serve.serving(command()) as url:
        serve.bench_server(context, url)
    found = read_rows(context, "serve")
    cases = dict.fromkeys(case for case, _ in found)
    assert list(cases) == ["1 clients", "3 clients", "40 requests/s", "5 requests of 4 to 9 tokens, 3 new, at once"]
    assert all(row["status"] == "ok" and row["value"] >= 0 for row in found.values())
    assert {found[case, "failed"]["value"] for case in cases} == {0} and found["3 clients", "ttft_ms"]["batch"] == 3
    assert len(found["1 clients", "ttft_ms"]["samples"]) == 5
    assert found["40 requests/s", "duration_s"]["value"] > 0.03


def test_refused_requests_are_failed_rows():
    context = make_context()
    with serve.serving(command("busy")) as url:
        serve.bench_server(context, url)
    rows = context.rows
    check(rows.rows)
    refused = sum(length > 6 for length in lengths_of())
    assert 0 < refused < 5 and {row["status"] for row in rows.rows} == {"failed"}
    assert {row["value"] for row in rows.rows if row["metric"] == "failed"} == {refused}


@pytest.mark.parametrize(
    ("mode", "seconds", "message"),
    [
        ("broken", 60.0, "the server ended with status 3: no such model"),
        ("never ready", 0.5, "was not ready after 0.5 s: it wrote"),
    ],
)
def test_a_server_that_does_not_start(mode: str, seconds: float, message: str):
    with pytest.raises(StageError, match=message), serve.serving(command(mode), ready_seconds=seconds):
        pytest.fail("there is no server")


def test_a_server_that_ends_is_an_error():
    with pytest.raises(StageError, match="the server ended with status 7"), serve.serving(command("ends")) as url:
        serve.bench_server(make_context(), url)


@pytest.mark.parametrize(("mode", "status"), [("good", -signal.SIGTERM), ("stubborn", -signal.SIGKILL)])
def test_the_server_is_stopped(mode: str, status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "STOP_SECONDS", 0.3)
    processes = []
    popen = serve.subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(serve.subprocess, "Popen", remember)
    with pytest.raises(KeyError), serve.serving(command(mode)):
        raise KeyError
    assert [process.returncode for process in processes] == [status]


def test_the_servers_command_names_the_checkpoint_and_the_engine():
    made = serve.server_command(Path("a/b"), {"max_batch": 8})(1234)
    assert made[1:4] == ["-m", "stages.bench.serve", "a/b"] and made[5:] == ["1234"]
    assert json.loads(made[4]) == {"max_batch": 8}
    assert math.isinf(serve.list_loads(make_context())[-1][2])
