"""Which kernels a week's time goes to: `python -m stages.bench week=w08 profile=torch|nsys|ncu`.

What is profiled is a prompt to its first token, and decode steps of each of the workload's batch sizes, after a run to
warm up. A trace of each, and one table of kernels, lie under outputs/profile/<week>/<model>/<tool>/. On a CPU, torch's
profiler shows operators instead of kernels. Profiled work is slower than it is alone: shares are to be read, and times
are the bench stage's to measure.

    python -m stages.profile <checkpoint> <EngineConfig's fields as JSON> <Work's fields as JSON>

is what nsys and ncu run: a process that profiles one of these between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.commit import read_commit
from stages.exits import StageError
from stages.host import read_host
from stages.params import ParamsError, Workload
from stages.stage import OUTPUTS, write_whole
from stages.standard import NO_GPU, PREFILL, Case, random_prompts

if TYPE_CHECKING:
    from engine.llm import LLM

STEPS = 8  # decode steps; one under ncu, which runs every kernel many times
WARM_UP = 3
SHOWN = 20  # kernels of a work in the Markdown table; Parquet has all
NAME_WIDTH = 90
CUDA_BIN = Path("/usr/local/cuda/bin")  # where a toolkit's programs are when PATH does not lead there
NO_COUNTERS = "ERR_NVGPUCTRPERM"
COUNTERS = "see https://developer.nvidia.com/ERR_NVGPUCTRPERM; profile=nsys and profile=torch need none"
DURATION = "gpu__time_duration.sum"
MEMORY = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MICROSECONDS = {
    "ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6,
}  # fmt: skip


class Skipped(RuntimeError):
    """The tool cannot profile on this host, and why."""


@dataclass(frozen=True)
class Work:
    """A prompt of `tokens` tokens to its first new one, or, with `steps`, as many decode steps of `batch` sequences
    that have `tokens` tokens each."""

    batch: int
    tokens: int
    steps: int

    @property
    def name(self) -> str:
        return f"decode batch {self.batch} context {self.tokens}" if self.steps else f"prompt {self.tokens}"

    @property
    def file(self) -> str:
        return self.name.replace(" ", "-")


@dataclass
class Kernel:
    """All calls of a kernel, a copy or, on a CPU, an operator in one work; percent of the GPU's peak where counted."""

    name: str
    calls: int
    total_us: float
    memory_percent: float | None = None
    compute_percent: float | None = None


# --- what is profiled -------------------------------------------------------------------------------------------------


def list_works(workload: Workload, settings: Mapping[str, Any]) -> list[Work]:
    """The longest prompt of the workload that fits the engine, and decode steps after as many tokens.

    Raises ParamsError where none fits.
    """
    limit = settings["max_model_len"]
    fitting = [tokens for tokens in workload.prompt_tokens if tokens + STEPS <= limit]
    if not fitting:
        raise ParamsError(
            f"workload.prompt_tokens = {list(workload.prompt_tokens)}: one should be {limit - STEPS} at most, as the "
            f"engine takes {limit} tokens and {STEPS} are new"
        )
    works = [Work(1, max(fitting), 0)]
    if settings["kv_cache"] != "none":
        works += [Work(batch, max(fitting), STEPS) for batch in dict.fromkeys(workload.batch_sizes)]
    return works


def load(checkpoint: Path, settings: Mapping[str, Any]) -> LLM:
    """The engine without its tokenizer."""
    from engine.llm import LLM, EngineConfig
    from engine.model.tensors import parameter_count
    from stages.hf import set_threads

    llm = LLM(checkpoint, EngineConfig(**settings))
    set_threads(parameter_count(llm.config))
    llm.tokenizer = None
    llm.release()  # what is profiled takes a cache of its own
    return llm


def prepare(llm: LLM, work: Work) -> Callable[[], Any]:
    """Make a function that runs the work once: its kernels are compiled and its graphs captured.

    Raises StageError for a cache that does not fit.
    """
    from engine.bench.latency import TooLarge, run_decode, start_decode
    from stages.bench.decode_batches import random_cache

    if not work.steps:
        from engine.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)
        case = Case(PREFILL, work.batch, work.tokens, 1)

        def run(seed: int) -> None:
            llm.core.forget()
            llm.generate(random_prompts(case, llm.config.vocab_size, seed), params)

        run(0)
        return lambda: run(1)
    from engine.runtime.decode_loop import DecodeLoop

    llm.release()  # the cache is our own
    try:
        loop = DecodeLoop(llm.model, random_cache(llm, work.batch, work.tokens + STEPS), llm.engine.captures)
    except TooLarge as error:
        raise StageError(f"{work.name}: {error}; say workload.batch_sizes=[1]") from None
    start_decode(loop, work.batch, work.tokens)
    run_decode(loop, WARM_UP)
    start_decode(loop, work.batch, work.tokens)
    return lambda: run_decode(loop, work.steps)


def synchronize(llm: LLM) -> None:
    if llm.engine.device == "cuda":
        import torch

        torch.cuda.synchronize()


# --- the tools --------------------------------------------------------------------------------------------------------


def profile_torch(llm: LLM, work: Work, base: Path) -> list[Kernel]:
    """By torch's profiler, in this process; the trace is for chrome://tracing and https://ui.perfetto.dev."""
    from torch.profiler import ProfilerActivity, profile

    gpu = llm.engine.device == "cuda"
    run = prepare(llm, work)
    synchronize(llm)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        run()
        synchronize(llm)
    # Compressed whole: torch would write it line by line, which takes ten times as long.
    trace = Path(f"{base}.trace.json")
    profiler.export_chrome_trace(str(trace))
    trace.with_suffix(".json.gz").write_bytes(gzip.compress(trace.read_bytes(), 6))
    trace.unlink()
    # A GPU's events follow each other; an operator's time is its own, without that of operators it calls.
    return gather(
        Kernel(event.name, 1, event.time_range.elapsed_us() if gpu else event.self_cpu_time_total)
        for event in profiler.events() or []
        if event.device_type.name == ("CUDA" if gpu else "CPU")
    )


def profile_nsys(nsys: str, command: Sequence[str], base: Path) -> list[Kernel]:
    """By Nsight Systems, which also sees the kernels within CUDA graphs."""
    call(
        [
            nsys, "profile", "--trace=cuda", "--sample=none", "--cpuctxsw=none", "--cuda-graph-trace=node",
            "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true",
            f"--output={base}", *command,
        ],
        base,
    )  # fmt: skip
    stats = ["stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", "--force-export=true", f"{base}.nsys-rep"]
    return parse_nsys(call([nsys, *stats], base))


def profile_ncu(ncu: str, command: Sequence[str], base: Path) -> list[Kernel]:
    """By Nsight Compute, which runs each kernel several times to read the GPU's counters."""
    call(
        [
            ncu, "--set", "basic", "--metrics", f"{DURATION},{MEMORY},{COMPUTE}", "--profile-from-start", "off",
            "--force-overwrite", "--export", str(base), *command,
        ],
        base,
    )  # fmt: skip
    return parse_ncu(call([ncu, "--import", f"{base}.ncu-rep", "--csv", "--page", "raw"], base))


NSIGHT: dict[str, Callable[[str, Sequence[str], Path], list[Kernel]]] = {"nsys": profile_nsys, "ncu": profile_ncu}
TOOLS = ("torch", *NSIGHT)


def find_tool(tool: str) -> str:
    """The program's path. Raises Skipped."""
    found = shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), str(CUDA_BIN)]))
    if found is None:
        raise Skipped(f"{tool} is neither on PATH nor in {CUDA_BIN}; profile=torch needs no other program")
    return found


def call(command: Sequence[str], base: Path) -> str:
    """Run a command and give what it writes, which is also added to `base`.log.

    Raises Skipped where the driver does not let it read counters, StageError where it fails.
    """
    print(f"+ {shlex.join(command)}", flush=True)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    log = Path(f"{base}.log")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"+ {shlex.join(command)}\n{done.stdout}\n")
    tool = Path(command[0]).name
    if NO_COUNTERS in done.stdout:
        raise Skipped(f"the driver does not let {tool} read the GPU's counters ({NO_COUNTERS}): {COUNTERS}")
    if done.returncode:
        said = " | ".join(done.stdout.strip().splitlines()[-3:]) or "it wrote nothing"
        raise StageError(f"{tool} ended with status {done.returncode}: {said} (all of it: {log})")
    return done.stdout


def parse_nsys(text: str) -> list[Kernel]:
    """The kernels in what `nsys stats --report cuda_gpu_kern_sum --format csv` writes. Raises StageError."""
    lines = read_csv(text, "Time (%)", "nsys stats")
    return gather(
        Kernel(line["Name"], int(number(line["Instances"])), number(line["Total Time (ns)"]) / 1e3) for line in lines
    )


def parse_ncu(text: str) -> list[Kernel]:
    """The kernels in what `ncu --csv --page raw` writes, a line a call after one of units. Raises StageError."""
    units, *lines = read_csv(text, "ID", "ncu")
    unit = units.get(DURATION)
    if unit not in MICROSECONDS:
        raise StageError(f"ncu gives {DURATION} in {unit!r}; should be one of {', '.join(MICROSECONDS)}")
    return gather(
        Kernel(
            line["Kernel Name"], 1, number(line[DURATION]) * MICROSECONDS[unit], number(line[MEMORY]),
            number(line[COMPUTE]),
        )
        for line in lines
    )  # fmt: skip


def read_csv(text: str, first: str, tool: str) -> list[dict[str, str]]:
    """The lines under the header whose first column is `first`, without what is written before and after.

    Raises StageError where there is no such header, or nothing under it.
    """
    lines = text.splitlines()
    begins = [index for index, line in enumerate(lines) if line.startswith((f'"{first}"', f"{first},"))]
    found = list(csv.DictReader(lines[begins[0] :])) if begins else []
    found = [line for line in found if None not in line.values()]
    if not found:
        said = " | ".join(lines[-3:]) or "nothing"
        raise StageError(f"{tool} should write a table of kernels and wrote: {said}")
    return found


def number(text: str) -> float:
    """Read the number in a cell that may have commas between thousands."""
    return float(text.replace(",", ""))


def gather(calls: Iterable[Kernel]) -> list[Kernel]:
    """One entry a name, the longest first; percents are means by time."""
    found: dict[str, Kernel] = {}
    for each in calls:
        if each.name not in found:
            found[each.name] = replace(each)
            continue
        kernel = found[each.name]
        total = kernel.total_us + each.total_us
        for name in ("memory_percent", "compute_percent"):
            mine, theirs = getattr(kernel, name), getattr(each, name)
            if mine is not None and theirs is not None and total:
                setattr(kernel, name, (mine * kernel.total_us + theirs * each.total_us) / total)
        kernel.calls, kernel.total_us = kernel.calls + each.calls, total
    return sorted(found.values(), key=lambda kernel: -kernel.total_us)


# --- a week's profile -------------------------------------------------------------------------------------------------


def profile_week(
    tool: str, week: str, model: str, checkpoint: Path, settings: Mapping[str, Any], workload: Workload
) -> Path | None:
    """Writes traces and the table of kernels, prints the table and returns their folder; None where `tool` cannot
    profile here, which is said in one line. Raises ParamsError, StageError."""
    from stages.timing import measurement_lock

    works = list_works(workload, settings)
    folder = OUTPUTS / "profile" / week / model / tool
    try:
        program = "" if tool == "torch" else find_tool(tool)
        if program and settings["device"] != "cuda":
            raise Skipped(f"{NO_GPU}, and {tool} shows kernels on one; profile=torch shows a CPU's operators")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with measurement_lock():
            found = measure(tool, program, checkpoint, settings, works, folder)
    except Skipped as reason:
        print(f"skipped: {reason}")
        return None
    empty = [name for name, kernels in found.items() if not kernels]
    if empty:
        raise StageError(f"{tool} saw no kernel in: {', '.join(empty)}")
    host = read_host()
    device = host.gpu if settings["device"] == "cuda" else host.cpu
    table = tabulate(found)
    table.to_parquet(folder / "kernels.parquet", index=False)
    title = f"{week}, {model}, {settings['backend']}, {settings['dtype']} on {device} by {tool}"
    text = render(title, f"commit {read_commit() or 'unknown'}", table)
    write_whole(folder / "kernels.md", text)
    print(f"{text}\n{folder}")
    return folder


def measure(
    tool: str, program: str, checkpoint: Path, settings: Mapping[str, Any], works: Sequence[Work], folder: Path
) -> dict[str, list[Kernel]]:
    """Work -> its kernels."""
    if tool == "torch":
        llm = load(checkpoint, settings)
        return {work.name: profile_torch(llm, work, folder / work.file) for work in works}
    found = {}
    for work in works:
        once = replace(work, steps=min(work.steps, 1)) if tool == "ncu" else work
        command = [
            sys.executable, "-m", "stages.profile", str(checkpoint), json.dumps(dict(settings)),
            json.dumps(asdict(once)),
        ]  # fmt: skip
        found[work.name] = NSIGHT[tool](program, command, folder / work.file)
    return found


def tabulate(found: Mapping[str, Sequence[Kernel]]) -> Any:
    """A frame with a line a kernel and work: calls, total and mean microseconds, the share of the work's."""
    import pandas as pd

    lines = []
    for work, kernels in found.items():
        total = sum(kernel.total_us for kernel in kernels) or 1.0
        for kernel in kernels:
            lines.append({
                "work": work, "kernel": kernel.name, "calls": kernel.calls, "total_us": kernel.total_us,
                "mean_us": kernel.total_us / kernel.calls, "share": kernel.total_us / total,
                "memory_percent": kernel.memory_percent, "compute_percent": kernel.compute_percent,
            })  # fmt: skip
    return pd.DataFrame(lines).astype({"memory_percent": "float64", "compute_percent": "float64"})


def render(title: str, about: str, table: Any) -> str:
    """The table as Markdown, SHOWN kernels a work."""
    counted = table["memory_percent"].notna().any()
    heads = ["kernel", "calls", "total µs", "mean µs", "share", *(["memory", "compute"] if counted else [])]
    parts = [f"# {title}", about]
    for work, lines in table.groupby("work", sort=False):
        rows = [f"| {' | '.join(heads)} |", f"| --- |{' --: |' * (len(heads) - 1)}"]
        for line in lines.head(SHOWN).itertuples():
            cells = [
                shorten(line.kernel), f"{line.calls}", f"{line.total_us:,.1f}", f"{line.mean_us:,.2f}",
                f"{line.share:.1%}",
            ]  # fmt: skip
            cells += [f"{line.memory_percent:.0f} %", f"{line.compute_percent:.0f} %"] if counted else []
            rows.append(f"| {' | '.join(cells)} |")
        if len(lines) > SHOWN:
            rows.append(f"\n… and {len(lines) - SHOWN} more, {lines['share'][SHOWN:].sum():.1%} of the time.")
        parts += [f"## {work}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def shorten(name: str) -> str:
    """A kernel's name for a cell of Markdown."""
    name = name.replace("|", "\\|")
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def main(arguments: Sequence[str]) -> None:
    import torch

    checkpoint, settings, work = arguments
    llm = load(Path(checkpoint), json.loads(settings))
    run = prepare(llm, Work(**json.loads(work)))
    synchronize(llm)
    with torch.cuda.profiler.profile() if llm.engine.device == "cuda" else contextlib.nullcontext():
        run()
        synchronize(llm)


if __name__ == "__main__":
    main(sys.argv[1:])
