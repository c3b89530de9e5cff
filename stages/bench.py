"""How fast a week's engine is: the standard suite that all weeks share, and what the week measures of its own.

A week without an engine, or a host without a GPU, has the same rows with status not_measured and no value. By hand,
profile=torch|nsys|ncu measures nothing and shows which kernels the time goes to (docs/profiling.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.throughput import LATE
from stages import decode, peers, prefill, throughput
from stages.host import read_host, use_gpu
from stages.metrics import COLUMNS, KNOBS, Rows, read
from stages.params import Gpu, Model, ParamsError, StagedModel, Week, Workload
from stages.profile import TOOLS, profile_week
from stages.stage import Run, stage
from stages.standard import (
    DECODE,
    NO_GPU,
    PREFILL,
    PROMPTS,
    Budget,
    TooSlow,
    add_latency,
    add_missing,
    limits,
    list_cases,
    measure_case,
    read_ceilings,
)

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.model.config import ModelConfig

NO_FORWARD = "no forward pass before w03"
TOKENIZER_BYTES = 1 << 16
VERSIONS = ("attention", "linear", "sampling", "kv_cache", "cuda_graph", "batching")


@dataclass
class Context:
    """One bench run: what is measured and where its rows go."""

    run: Run
    model: Model
    week: Week
    workload: Workload
    gpu: bool
    rows: Rows

    @cached_property
    def path(self) -> Path:
        return self.run.find_snapshot(self.model.name)

    @cached_property
    def config(self) -> ModelConfig:
        from engine.model.config import ModelConfig

        return ModelConfig.from_file(self.path)

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The week's EngineConfig fields on this host."""
        if self.week.engine is None:
            raise ParamsError(f"weeks.{self.week.name}.engine is null: this needs an engine")
        return self.week.engine.settings(self.gpu, self.config.max_position_embeddings)

    @property
    def knobs(self) -> dict[str, Any]:
        """What the week's engine ran with, for its rows."""
        versions = {name: self.settings[name] for name in VERSIONS}
        shared = {name: self.settings[name] for name in ("dtype", "backend")}
        return shared | {"tensor_parallel": 1, "kernel_versions": versions}

    @cached_property
    def llm(self) -> LLM:
        """The week's engine with the run's model."""
        from engine.llm import LLM, EngineConfig
        from stages.hf import set_threads

        set_threads(self.config.parameter_count())
        llm = LLM(self.path, EngineConfig(**self.settings))
        # Decoding to text is left out of the measurement, as in every other engine's rows.
        llm.tokenizer = None
        return llm


# --- w01: transformers ----------------------------------------------------------------------------------------------


def bench_baseline(context: Context) -> None:
    """The baseline stage's measurements of transformers, so that every week is one table."""
    frame: Any = read(context.run.find("reports/metrics/baseline.parquet"))
    kept = [name for name in COLUMNS if name not in context.rows.common]
    for record in frame[frame["suite"].isin([PREFILL, DECODE, PROMPTS, "utilisation"])].to_dict("records"):
        fields = {name: plain(record[name]) for name in kept}
        if fields["status"] == "not_measured":
            reason = fields["note"]
            names = ("suite", "case", "metric", "unit", "better", *KNOBS)
            context.rows.missing(reason=reason, **{name: fields[name] for name in names})
        else:
            context.rows.add(**fields)


def plain(value: Any) -> Any:
    """A cell of a metrics frame as Python has it: no NaN, NA or arrays."""
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | list):
        return [float(item) for item in value]
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


# --- w02: tokenizer, loading ----------------------------------------------------------------------------------------


def bench_tokenizer(context: Context) -> None:
    """MB/s of UTF-8 text encoded and decoded, one text at a time on one thread, by our tokenizer and transformers'."""
    from stages.hf import has_tokenizer, load_tokenizer
    from stages.timing import measure

    shared: dict[str, Any] = {"suite": "tokenizer", "unit": "MB/s", "better": "higher"}
    names = {"encode": "encode_throughput", "decode": "decode_throughput"}
    if not has_tokenizer(context.path):
        for case, metric in names.items():
            context.rows.missing(case=case, metric=metric, reason="random weights come without a tokenizer", **shared)
        return
    from engine.text.tokenizer import Tokenizer

    text = sample_text(context.workload.prompts)
    size = len(text.encode()) / 1e6
    ours, theirs = Tokenizer(context.path), load_tokenizer(context.path)
    ids = ours.encode(text)
    note = f"{size:.2f} MB, {len(ids)} tokens"
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("encode", "afs"): lambda: ours.encode(text),
        ("decode", "afs"): lambda: ours.decode(ids),
        ("encode", "transformers"): lambda: theirs(text)["input_ids"],
        ("decode", "transformers"): lambda: theirs.decode(ids),
    }
    for (case, backend), call in calls.items():
        samples = [size / (milliseconds / 1e3) for milliseconds in measure(call, 1, 5)]
        context.rows.add(
            case=case, metric=names[case], value=None, samples=samples, backend=backend, note=note, **shared
        )  # fmt: skip


def sample_text(prompts: tuple[str, ...]) -> str:
    """About TOKENIZER_BYTES of code, prose and difficult Unicode."""
    from stages.corpus import TEXTS

    block = "\n".join([*prompts, *(text for name, text in TEXTS.items() if name != "long run")]) + "\n"
    return block * (TOKENIZER_BYTES // len(block.encode()) + 1)


def evict(path: Path) -> None:
    """Asks the kernel to drop the file from its page cache, so that the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_through(paths: list[Path]) -> float:
    """Seconds to read the files from beginning to end into one buffer."""
    buffer = bytearray(16 << 20)
    begin = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def bench_load(context: Context) -> None:
    """Seconds from files to weights on the device, with the page cache dropped (cold) and filled (warm).

    The limit is the plain reading of the same files in the same state.
    """
    import torch

    from engine.model.weights import load_weights

    files = sorted(context.path.resolve().glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    dtype = context.config.dtype or "bfloat16"
    large = size > 2 << 30
    for case in ("cold", "warm"):
        seconds, plain_seconds = [], []
        for _ in range(1 if large else context.workload.repeats):
            for measured in (plain_seconds, seconds):
                if case == "cold":
                    for path in files:
                        evict(path)
                if measured is plain_seconds:
                    plain_seconds.append(read_through(files))
                else:
                    weights = load_weights(context.path, context.config, context.device, getattr(torch, dtype))
                    assert weights.statistics is not None
                    seconds.append(weights.statistics.seconds)
                    del weights
        least = min(plain_seconds)
        shared: dict[str, Any] = {
            "suite": "load",
            "case": case,
            "dtype": dtype,
            "note": f"{size} bytes on {context.device}",
        }
        shared |= {"limit_kind": f"reading the same files, {case} page cache"}
        context.rows.add(
            metric="load_seconds", value=None, samples=seconds, unit="s", better="lower", limit=least, **shared
        )  # fmt: skip
        context.rows.add(
            metric="load_gbs", value=None, samples=[size / 1e9 / s for s in seconds], unit="GB/s", better="higher",
            limit=size / 1e9 / least, **shared,
        )  # fmt: skip


# --- the standard suite ---------------------------------------------------------------------------------------------


def bench_standard(context: Context) -> None:
    """The standard suite's rows of this week: measured where the week's list says so and the host can."""
    suites = [suite for suite in (PREFILL, DECODE) if suite in context.week.bench]
    cases = list_cases(context.workload, context.config.max_position_embeddings)
    if context.week.engine is None:
        for case in cases:
            add_missing(context.rows, case, NO_FORWARD, backend="cuda", tensor_parallel=1)
        return
    knobs = context.knobs
    for case in cases:
        if case.suite not in suites:
            add_missing(context.rows, case, f"{context.week.name} does not measure {case.suite}", **knobs)
        if not context.gpu:
            add_missing(context.rows, case, NO_GPU, **knobs | {"backend": "cuda"})
    if suites:
        measure_standard(context, [case for case in cases if case.suite in suites])


def measure_standard(context: Context, cases: list[Any]) -> None:
    """Generation through `LLM`, greedy, from token ids."""
    from engine.sampling_params import SamplingParams
    from stages.timing import measurement_lock

    settings, knobs = context.settings, context.knobs
    ceilings = read_ceilings(context.run, context.gpu)
    with measurement_lock():
        llm = context.llm

        def generate(prompts: list[list[int]], new_tokens: int) -> list[float]:
            params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
            llm.core.forget()  # every repeat computes its prompts
            slowest = max(llm.generate(prompts, params), key=lambda done: done.e2e_ms)
            times = [slowest.ttft_ms]
            for gap in slowest.itl_ms:
                times.append(times[-1] + gap)
            return [milliseconds / 1e3 for milliseconds in times]

        budget = Budget.on(settings["device"])
        for case in cases:
            try:
                latency = measure_case(
                    generate, case, context.workload, context.config.vocab_size, settings["device"], budget
                )  # fmt: skip
            except TooSlow as reason:
                add_missing(context.rows, case, str(reason), **knobs)
                continue
            bounds = limits(case, context.config, settings["dtype"], ceilings)
            add_latency(context.rows, case, latency, bounds, None if context.gpu else NO_GPU, **knobs)
        for suite in dict.fromkeys(case.suite for case in cases):
            add_late(context, suite, vars(llm.stats()))


def add_late(context: Context, suite: str, counts: Mapping[str, float]) -> None:
    """What the engine compiled, loaded and captured while it was measured: nothing, if it was ready when it said so."""
    for metric in LATE:
        note = "the engine was not ready: times hold this" if counts[metric] else None
        context.rows.add(
            suite=suite, case="after the engine was ready", metric=metric, value=float(counts[metric]), unit="1",
            better="lower", note=note, **context.knobs,
        )  # fmt: skip


# --- prompts and the decode step --------------------------------------------------------------------------------------


def bench_steps(context: Context, suite: str) -> None:
    """One of the suites of `stages.prefill` or `stages.decode`, which need a GPU."""
    from stages.timing import measurement_lock

    module: Any = prefill if suite in prefill.SUITES else decode
    if not context.gpu:
        knobs: dict[str, Any] = context.knobs | {"backend": "cuda"}
        module.add_missing(context.rows, suite, NO_GPU, **knobs)
        return
    ceilings = read_ceilings(context.run, context.gpu)
    with measurement_lock():
        llm = context.llm
        llm.release()  # these take caches of their own
        chunk = (llm.engine.step_tokens,) if module is prefill else ()
        how = *chunk, llm.engine.captures
        module.bench(suite, context.rows, llm.model, context.workload, ceilings, *how, **context.knobs)


def bench_peers(context: Context) -> None:
    """`stages.peers`, which needs a GPU, on the weights that the week's engine has loaded."""
    from stages.timing import measurement_lock

    knobs: dict[str, Any] = {"dtype": context.settings["dtype"], "tensor_parallel": 1}
    if not context.gpu:
        peers.add_missing(context.rows, NO_GPU, **knobs)
        return
    ceilings = read_ceilings(context.run, context.gpu)
    with measurement_lock():
        context.llm.release()
        weights = context.llm.weights
        peers.bench(context.rows, context.path, context.config, weights, context.workload, ceilings, **knobs)


# --- many requests ----------------------------------------------------------------------------------------------------


def read_sizes(workload: Workload) -> throughput.Sizes:
    """What the suites of `stages.throughput` run."""
    from engine.bench.workloads import Mix

    many, shared = workload.requests, workload.shared_prefix
    return throughput.Sizes(
        Mix(many.count, *many.prompt_tokens, many.new_tokens, many.seed),
        Mix(shared.count, *shared.own_tokens, shared.new_tokens, many.seed, shared.prefix_tokens),
        workload.load.clients,
        workload.load.rates,
        workload.new_tokens,
        workload.repeats,
    )


def bench_requests(context: Context, suite: str) -> None:
    """One of the suites of `stages.throughput`; without a GPU what its backend would show is missing, but ours runs."""
    from stages.timing import measurement_lock

    sizes = read_sizes(context.workload)
    if not context.gpu:
        knobs: dict[str, Any] = context.knobs | {"backend": "cuda"}
        throughput.add_missing(context.rows, suite, sizes, NO_GPU, gpu=True, **knobs)
    ceilings = read_ceilings(context.run, context.gpu)
    with measurement_lock():
        throughput.bench(suite, context.rows, context.llm, sizes, ceilings, **context.knobs)
        if suite in (throughput.THROUGHPUT, throughput.PREFIX):
            add_late(context, suite, vars(context.llm.stats()))


def bench_server(context: Context) -> None:
    """The week's engine behind its server, a process of its own. It comes before the engine is loaded in this one: a
    GPU may not hold both."""
    from stages.timing import measurement_lock

    sizes = read_sizes(context.workload)
    if not context.gpu:
        knobs: dict[str, Any] = context.knobs | {"backend": "cuda"}
        throughput.add_missing(context.rows, throughput.SERVE, sizes, NO_GPU, gpu=True, **knobs)
    command = throughput.server_command(context.path, context.settings)
    with measurement_lock(), throughput.serving(command) as url:
        throughput.bench_server(
            context.rows, url, throughput.NAME, context.config.vocab_size, sizes, **context.knobs
        )  # fmt: skip
        add_late(context, throughput.SERVE, throughput.read_stats(url))


SUITES: dict[str, Callable[[Context], None]] = {
    "baseline": bench_baseline,
    "tokenizer": bench_tokenizer,
    "load": bench_load,
    throughput.SERVE: bench_server,
}


@stage(Gpu, StagedModel, Week, Workload, options={"profile": TOOLS})
def main(
    run: Run, gpu: Gpu, model: Model, week: Week, workload: Workload, profile: str | None = None
) -> None:  # fmt: skip
    known = [*SUITES, PREFILL, DECODE, *prefill.SUITES, *decode.SUITES, *throughput.SUITES, peers.PEERS]
    unknown = [name for name in week.bench if name not in known]
    if unknown:
        raise ParamsError(f"weeks.{week.name}.bench: no suite '{unknown[0]}'; there are: {', '.join(known)}")
    rows = Rows("bench", week.name, model.name, read_host())
    context = Context(run, model, week, workload, use_gpu(gpu), rows)
    if profile:
        profile_week(profile, week.name, model.name, context.path, context.settings, workload)
        return
    for name in week.bench:
        if name in SUITES:
            SUITES[name](context)
    bench_standard(context)
    for name in week.bench:
        if name in (*prefill.SUITES, *decode.SUITES):
            bench_steps(context, name)
        elif name in throughput.SUITES:
            bench_requests(context, name)
    if peers.PEERS in week.bench:
        bench_peers(context)
    rows.write(run.out(f"reports/metrics/bench_{week.name}.parquet"), headline=lambda row: row["metric"] != "itl_ms")


if __name__ == "__main__":
    main()
