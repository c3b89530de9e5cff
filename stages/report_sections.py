"""What the report says: rows of the metrics' table in, sections of tables, plots and paragraphs out.

Nothing here reads or writes a file. A table shows rows of one run; where these come from more than one host or commit
its note says so and every line names its own.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stages.host import Host
from stages.metrics import COLUMNS
from stages.params import Week
from stages.report_figures import Series, plot_layers, plot_weeks

LOCAL = "this host"
BASELINE = "w01"
PLANNED_WEEKS = 12
SPEED_STAGES = ("provision", "baseline", "bench")  # where a limit is a ceiling of the machine and not a gate
STANDARD = ("standard_prefill", "standard_decode", "workload_prompts")
PREFILL_SUITES = {
    "prompt_lengths": "prompts by length",
    "prompt_products": "a prompt's matrix products, and torch's (cuBLAS)",
    "prompt_attention": "a prompt's attention, and torch's by cuDNN and FlashAttention-2",
}
DECODE_SUITES = {
    "decode_step": "decode steps",
    "kernels": "each kernel of a decode step by itself",
    "graphs": "CUDA graphs of a decode step",
    "peers": "what others take: cuBLAS through torch, transformers under torch.compile",
}
# Each has tables of its own in the section on many requests.
LOAD_SUITES = {
    "throughput": "requests that come at once",
    "prefix_cache": "requests that begin with the same tokens",
    "decode_batches": "decode steps of large batches",
    "step_trace": "what the GPU does while it decodes",
    "serve": "the server, from clients",
}
LOAD_LABELS = {
    "output_throughput": "output",
    "total_token_throughput": "prompt + output",
    "request_throughput": "requests",
    "duration_s": "all of it",
    "step_ms": "step",
    "ttft_ms": "TTFT p50",
    "ttft_ms_p99": "TTFT p99",
    "ttft_share": "TTFT of the first's",
    "tpot_ms": "TPOT p50",
    "tpot_ms_p99": "TPOT p99",
    "itl_ms_p99": "ITL p99",
    "e2e_ms": "end to end p50",
    "e2e_ms_p99": "end to end p99",
    "computed_tokens": "prompt tokens computed",
    "cached_tokens": "found in the cache",
    "gpu_idle_share": "GPU idle",
    "gpu_time_share": "share of its time",
    "preemptions": "preemptions",
    "kv_wasted_share": "KV wasted",
    "failed": "failed",
    "peak_memory_bytes": "peak memory",
}
STEP_LABELS = {
    "ttft_ms": "TTFT",
    "prompt_throughput": "prompt",
    "compute_rate": "computed",
    "activation_bytes": "activations at most",
    "step_ms": "step",
    "output_throughput": "output",
    "call_us": "a call",
    "bytes": "bytes a step",
    "step_share": "share of the step",
    "host_us_per_token": "host, a token",
    "capture_ms": "capture",
}
LABELS = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2e_ms": "end to end",
    "output_throughput": "output",
    "total_token_throughput": "prompt + output",
    "peak_memory_bytes": "peak memory",
}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Row = namedtuple("Row", [*COLUMNS, "run", "source"])
"""A row of the metrics, None where it is empty; `run` is LOCAL or "<gpu>/<model>", `source` its file and place."""


@dataclass(frozen=True)
class Cell:
    """One place of a table. `small` stands under the text; `share` (0 to 1) draws a bar, `heat` (0 to 1) a background;
    `tone` is good, warn, bad or mute; `source` the row of Parquet."""

    text: str
    small: str = ""
    numeric: bool = False
    share: float | None = None
    heat: float | None = None
    tone: str = ""
    source: str = ""


@dataclass(frozen=True)
class Table:
    """`note` says whose rows these are; a `folded` one opens on request in the page."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """An <svg> element; `name` is its file in reports/figures/ without the ending."""

    name: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room; `wide` ones below each other."""

    figures: Sequence[Figure]
    title: str = ""
    note: str = ""
    wide: bool = False
    kind: str = "figures"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


Block = Table | Figures | Text


@dataclass(frozen=True)
class Section:
    """A part of the report; `anchor` is its id in the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Inputs:
    """All a report is made of.

    dates: commit -> the day it was made, of the commits that git knows. architecture: property -> value, of the
    checkpoint that this host ran. hosts: run -> the machine, where its host.json is there.
    """

    rows: Sequence[Row]
    weeks: Mapping[str, Week]
    dates: Mapping[str, str] = field(default_factory=dict)
    architecture: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)

    @property
    def runs(self) -> list[str]:
        """Recorded runs, largest decode step first (most bytes a token), then this host."""
        sizes = {row.run: 0.0 for row in self.rows}
        for row in self.rows:
            if row.metric == "tpot_ms" and row.limit is not None:
                sizes[row.run] = max(sizes[row.run], row.limit)
        return sorted(sizes, key=lambda run: (run == LOCAL, -sizes[run], run))

    def of(self, run: str, *stages: str) -> list[Row]:
        """The rows of one run, of the named stages or of all."""
        return [row for row in self.rows if row.run == run and (not stages or row.stage in stages)]

    def model(self, run: str, name: str) -> str:
        """The model's name, and that its weights are random where a row of the run says so."""
        random = any("random weights" in (row.note or "") for row in self.of(run))
        return f"{name} (random weights)" if random else name

    def speed(self, run: str) -> list[Row]:
        """The rows of bench, and those of baseline that bench@w01 has not repeated."""
        bench = self.of(run, "bench")
        repeated = {row.suite for row in bench if row.week == BASELINE}
        return bench + [row for row in self.of(run, "baseline") if row.suite not in repeated]


# --- values as text -------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits; whole numbers and thousands in full."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.1e}"


def show(value: float, unit: str) -> str:
    """`value` with its unit: "12.3 ms", "4.20 GB", "1,204 tokens/s"."""
    if unit in ("B", "B/s", "FLOP/s"):
        size, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0]), (1.0, ""))
        return f"{number(value / size)} {prefix}{unit}"
    return number(value) if unit == "1" else f"{number(value)} {unit}"


def percent(share: float) -> str:
    if share < 0.001:
        return "< 0.1 %"
    return f"{share * 100:.{1 if share < 0.0995 else 0}f} %"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{number(ratio)} ×"


def share_of_limit(row: Row) -> float | None:
    """How near a measured speed is to the most the machine allows, 0 to 1; None without a limit."""
    if row.stage not in SPEED_STAGES or not row.value or not row.limit or not row.better:
        return None
    return row.value / row.limit if row.better == "higher" else row.limit / row.value


def value_cell(row: Row) -> Cell:
    """The value with its share of the limit, or why there is none: never a zero in its place."""
    if row.status == "not_measured":
        return Cell(f"not measured: {row.note}", tone="mute", source=row.source)
    if row.status == "failed":
        value = "" if row.value is None else f"{show(row.value, row.unit)}: "
        return Cell(f"failed: {value}{row.note}", tone="bad", source=row.source)
    share = share_of_limit(row)
    small = "" if share is None else percent(share)
    return Cell(show(row.value, row.unit), small, numeric=True, share=share, source=row.source)


def range_cell(row: Row) -> Cell:
    """The least and the greatest sample, and how many there are."""
    if not row.samples or len(row.samples) < 2:
        return Cell("")
    low, high = show(min(row.samples), row.unit), show(max(row.samples), row.unit)
    return Cell(f"{low} to {high}, n = {len(row.samples)}", numeric=True)


def limit_cell(row: Row) -> Cell:
    return Cell("" if row.limit is None else f"{show(row.limit, row.unit)}: {row.limit_kind}")


def engine_of(row: Row) -> str:
    return ", ".join(filter(None, (row.backend, row.dtype, row.quantization)))


def knobs_of(row: Row) -> str:
    """What was run: "cuda, bfloat16, batch 1, 128+32 tokens"."""
    tokens = "+".join(str(count) for count in (row.prompt_tokens, row.new_tokens) if count is not None)
    batch = f"batch {row.batch}" if row.batch else ""
    return ", ".join(filter(None, (engine_of(row), batch, tokens and f"{tokens} tokens")))


def host_of(row: Row) -> str:
    if row.gpu == "cpu":
        return "a CPU without a GPU"
    pairs = (("driver", row.driver), ("CUDA", row.cuda))
    return row.gpu + "".join(f", {name} {value}" for name, value in pairs if value)


def commit_of(row: Row) -> str:
    """The commit's first ten digits, and `-dirty` where the code differed from it."""
    if not row.commit:
        return "commit not recorded"
    commit, dirty, _ = row.commit.partition("-dirty")
    return commit[:10] + dirty


def run_title(run: str) -> str:
    return "This host" if run == LOCAL else f"Recorded, {run}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- tables ---------------------------------------------------------------------------------------------------------

Columns = Mapping[str, Callable[[Row], Cell | str | None]]


def provenance(rows: Sequence[Row]) -> tuple[str, bool]:
    """Whose rows these are, for a table's note, and whether they are of more than one host or commit."""
    counts = sorted(Counter((host_of(row), commit_of(row)) for row in rows).items())
    if len(counts) == 1:
        (host, commit), _ = counts[0]
        return f"Measured on {host}; commit {commit}.", False
    said = "; ".join(f"{host}, commit {commit}: {count} rows" for (host, commit), count in counts)
    return f"Mixed: not one run but {len(counts)} hosts or commits. {said}.", True


def list_rows(title: str, rows: Sequence[Row], columns: Columns, folded: bool = False) -> Table:
    """A line a row; host and commit become columns where they differ. A column that is empty throughout is left out."""
    note, mixed = provenance(rows)
    columns = dict(columns) | ({"host": host_of, "commit": commit_of} if mixed else {})
    lines = [[as_cell(column(row)) for column in columns.values()] for row in rows]
    kept = [at for at in range(len(columns)) if any(line[at].text for line in lines)]
    names = list(columns)
    return Table([names[at] for at in kept], [[line[at] for at in kept] for line in lines], title, note, folded)


def as_cell(value: Cell | str | None) -> Cell:
    return value if isinstance(value, Cell) else Cell(value or "")


DETAIL: Columns = {
    "week": lambda row: row.week,
    "suite": lambda row: row.suite,
    "case": lambda row: row.case,
    "metric": lambda row: row.metric,
    "value": value_cell,
    "samples": range_cell,
    "limit": limit_cell,
    "run with": knobs_of,
}
WITHOUT_WEEK: Columns = {name: column for name, column in DETAIL.items() if name != "week"}


def drop_unmeasured(table: Table, first: int) -> Table:
    """`table` without the lines and columns (from `first` on) that have nothing but one reason; its note says which."""
    said: dict[str, set[str]] = defaultdict(set)
    lines = []
    for line in table.rows:
        reason = only_reason([cell.text for cell in line[first:]])
        if reason:
            said[reason].add(f"{line[1].text} ({line[1].small})")
        else:
            lines.append(line)
    kept = list(range(first))
    for at in range(first, len(table.columns)):
        reason = only_reason([line[at].text for line in lines])
        if reason:
            said[reason].add(table.columns[at])
        elif any(line[at].text for line in lines):
            kept.append(at)
    notes = [f"{'; '.join(sorted(names))}: {reason}." for reason, names in sorted(said.items())]
    columns = [table.columns[at] for at in kept]
    return replace(
        table,
        columns=columns,
        rows=[[line[at] for at in kept] for line in lines],
        note=" ".join([table.note, *notes]),
    )


def only_reason(texts: Sequence[str]) -> str | None:
    """The reason that all texts but the empty ones give for not being measured; None where they do not agree."""
    found = {text for text in texts if text}
    reason = found.pop() if len(found) == 1 else ""
    return reason if reason.startswith("not measured: ") else None


# --- at a glance ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glance:
    """A run's latest week in a line: prefill of the longest prompt, decode at batch 1 and the shortest context."""

    week: str
    ttft: Row | None
    tpot: Row | None
    output: Row | None

    @property
    def rows(self) -> list[Row]:
        return [row for row in (self.output, self.tpot, self.ttft) if row]


def find_glance(inputs: Inputs, run: str) -> Glance | None:
    """The latest week in which the run decoded, or at least prefilled; None where it did neither."""
    rows = [row for row in inputs.speed(run) if row.status == "ok" and row.batch == 1]
    prefill = [row for row in rows if (row.suite, row.metric) == ("standard_prefill", "ttft_ms")]
    decode = [row for row in rows if row.suite == "standard_decode" and row.metric in ("tpot_ms", "output_throughput")]
    week = max((row.week for row in decode or prefill), default=None)
    if week is None:
        return None
    first = max((row for row in prefill if row.week == week), key=lambda row: row.prompt_tokens, default=None)
    steps = sorted((row for row in decode if row.week == week), key=lambda row: -row.prompt_tokens)
    shortest = {row.metric: row for row in steps}
    return Glance(week, first, shortest.get("tpot_ms"), shortest.get("output_throughput"))


def against_baseline(inputs: Inputs, row: Row | None) -> float | None:
    """How many times as fast as Hugging Face in the same case on the same host; None where there is no such row."""
    same = ("suite", "case", "metric", "dtype", "batch", "prompt_tokens", "new_tokens", "tensor_parallel")
    same += ("gpu", "driver", "cuda")
    if row is None or row.week == BASELINE:
        return None
    for other in inputs.speed(row.run):
        if other.week == BASELINE and other.value and all(getattr(other, name) == getattr(row, name) for name in same):
            return row.value / other.value if row.better == "higher" else other.value / row.value
    return None


def glance_table(inputs: Inputs, runs: Sequence[str]) -> Table | None:
    """A line a run: the latest week's figures at batch 1; None where no run has any."""
    lines = []
    for run in runs:
        found = find_glance(inputs, run)
        if found is None:
            continue
        first = found.rows[0]
        gpu = "none (CPU)" if first.gpu == "cpu" else first.gpu
        prompts = " / ".join(str(row.prompt_tokens) if row else "–" for row in (found.ttft, found.tpot))
        speeds = [value_cell(row) if row else Cell("not in this week", tone="mute") for row in (found.ttft, found.tpot)]
        speeds.append(value_cell(found.output) if found.output else Cell("not in this week", tone="mute"))
        ratio = times(against_baseline(inputs, found.tpot)) or "no comparable row"
        where = Cell(gpu, "this host" if run == LOCAL else "recorded")
        commits = ", ".join(sorted({commit_of(row) for row in found.rows}))
        words = [where, Cell(inputs.model(run, first.model)), Cell(found.week, engine_of(first)), Cell(prompts)]
        lines.append([*words, *speeds, Cell(ratio, numeric=True), Cell(commits)])
    columns = ["GPU", "model", "week", "prompt", "TTFT", "TPOT", "output", "decode against HF", "commit"]
    note = (
        "Batch 1. Prompt: tokens, of TTFT / of TPOT and output. Under a figure: its share of the limit measured on "
        "that machine. HF: transformers on the same machine (w01)."
    )
    return Table(columns, lines, note=note) if lines else None


def headline(inputs: Inputs) -> dict[str, Any]:
    """The first screen: a sentence and a few figures, of the first run that has any."""
    found = next((found for run in inputs.runs if (found := find_glance(inputs, run))), None)
    if found is None:
        return {"sentence": "No run has measured the standard suite yet: run `make repro`.", "cards": []}
    lead = found.rows[0]
    place = "a CPU, without a GPU" if lead.gpu == "cpu" else lead.gpu
    week = inputs.weeks.get(found.week)
    since = f"{found.week} ({week.title.lower()})" if week else found.week
    names = {"output_throughput": "at batch 1", "tpot_ms": "per output token", "ttft_ms": "to the first token"}
    cards = []
    for row in found.rows:
        share, ratio = share_of_limit(row), against_baseline(inputs, row)
        under = [f"{row.prompt_tokens}-token prompt"]
        under.append("limit not measured" if share is None else f"{percent(share)} of the limit")
        under += [] if ratio is None else [f"{times(ratio)} Hugging Face's speed"]
        text = show(row.value, row.unit)
        cards.append({"value": text, "name": names[row.metric], "under": under, "share": share, "source": row.source})
    model = inputs.model(lead.run, lead.model)
    return {"sentence": f"{model} on {place} ({engine_of(lead)}), as of {since}", "cards": cards}


def glance_section(inputs: Inputs) -> Section:
    table = glance_table(inputs, inputs.runs)
    blocks: list[Block] = [table or Text("No run has measured the standard suite yet.")]
    if all(run == LOCAL for run in inputs.runs):
        blocks.append(Text("No run on a named GPU has been recorded yet."))
    return Section("glance", "At a glance", blocks)


# --- weeks ----------------------------------------------------------------------------------------------------------


def state_cell(rows: Sequence[Row]) -> Cell:
    """Whether a week was run on a host, and how it went."""
    states = Counter(row.status for row in rows)
    if states["failed"]:
        return Cell(f"failed: {states['failed']} rows", tone="bad")
    if states["ok"]:
        return Cell("done", tone="good")
    return Cell("not measured" if rows else "not run", tone="mute")


def week_section(inputs: Inputs) -> Section:
    """Each week's state on each host, and the commit that measured it."""
    hosts = sorted({row.run.split("/")[0] for row in inputs.rows}, key=lambda host: (host != LOCAL, host))
    lines, done = [], 0
    for name, week in inputs.weeks.items():
        rows = [row for row in inputs.rows if row.week == name]
        states = [state_cell([row for row in rows if row.run.split("/")[0] == host]) for host in hosts]
        tones = {state.tone for state in states}
        done += "good" in tones and "bad" not in tones
        commits = sorted({(inputs.dates.get(row.commit, ""), commit_of(row)) for row in rows if row.status == "ok"})
        measured = ", ".join(f"{day} {commit}".strip() for day, commit in commits)
        lines.append([Cell(name), Cell(week.title), Cell(week.milestone), *states, Cell(measured or "–")])
    table = Table(["week", "title", "what it must show", *hosts, "measured at"], lines)
    said = f"{done} of {PLANNED_WEEKS} weeks done. Every week is a configuration of the same code and still runs."
    return Section("weeks", "Weeks", [Text(said), table])


# --- speed ----------------------------------------------------------------------------------------------------------


def standard_table(run: str, rows: Sequence[Row], folded: bool) -> Table:
    """A line a case, week and engine; a column a metric."""
    lines: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        size = (STANDARD.index(row.suite), row.prompt_tokens or 0, row.batch or 0)
        lines[*size, row.case, row.week, engine_of(row)][row.metric] = row
    note, mixed = provenance(rows)
    names = [name for name in LABELS if any(row.metric == name for row in rows)]
    table = []
    for (*_, case, week, engine), found in sorted(lines.items()):
        cells = [value_cell(found[name]) if name in found else Cell("") for name in names]
        place = next(iter(found.values()))
        extra = [Cell(f"{host_of(place)}, commit {commit_of(place)}")] if mixed else []
        table.append([Cell(case), Cell(week, engine), *extra, *cells])
    columns = ["case", "week", *(["host, commit"] if mixed else []), *(LABELS[name] for name in names)]
    return drop_unmeasured(Table(columns, table, run_title(run), note, folded), first=3 if mixed else 2)


def results_section(inputs: Inputs) -> Section:
    said = (
        "Under a figure, and as a bar: its share of the limit, which is what the ceilings measured on that machine "
        "allow for the bytes and FLOPs of the case."
    )
    blocks: list[Block] = [Text(said)]
    for run in inputs.runs:
        rows = [row for row in inputs.speed(run) if row.suite in STANDARD]
        if rows:
            blocks.append(standard_table(run, rows, folded=len(blocks) > 1))
    for run in inputs.runs:
        others = (*STANDARD, *PREFILL_SUITES, *DECODE_SUITES, *LOAD_SUITES)
        rows = [row for row in inputs.speed(run) if row.suite not in others]
        if rows:
            blocks.append(list_rows(f"{run_title(run)}: each week's own measurements", rows, DETAIL, folded=True))
    if len(blocks) == 1:
        blocks = [Text("Not measured: no run has the baseline or bench stage.")]
    return Section("results", "Results against limits", blocks)


def step_table(title: str, rows: Sequence[Row], folded: bool) -> Table:
    """A line a case, week and engine, as they were measured; a column a metric."""
    lines: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        lines[row.case, row.week, engine_of(row)][row.metric] = row
    names = [name for name in STEP_LABELS if any(row.metric == name for row in rows)]
    table = [
        [Cell(case), Cell(week, engine), *(step_cell(found.get(name)) for name in names)]
        for (case, week, engine), found in sorted(lines.items(), key=lambda item: item[0][1])
    ]
    columns = ["case", "week", *(STEP_LABELS[name] for name in names)]
    return drop_unmeasured(Table(columns, table, title, provenance(rows)[0], folded), first=2)


def step_cell(row: Row | None) -> Cell:
    if row is None:
        return Cell("")
    if row.metric == "step_share" and row.value is not None:
        return Cell(percent(row.value), numeric=True, source=row.source)
    return value_cell(row)


def decode_section(inputs: Inputs) -> Section:
    """What a decode step takes, kernel by kernel, and what the host does meanwhile."""
    said = (
        "One token a sequence and step, chosen greedily, on a cache of random numbers. Under a figure: its share of "
        "the limit, which for a step is its weight and KV bytes over the copy bandwidth, and for a kernel the bytes "
        "that it moves. Kernels are timed over all layers in a row, so that no weight is still in the L2 cache; the "
        "share of the step is of their sum. Host time, single steps (graph): to enqueue a step and to take over its "
        "tokens once they are there, a token; many steps: to enqueue a run of them, a token."
    )
    return Section("decode", "The decode step", step_blocks(inputs, said, DECODE_SUITES))


def step_blocks(inputs: Inputs, said: str, suites: Mapping[str, str]) -> list[Block]:
    """What is said of these suites (by name their title), then a table of each that a run has."""
    blocks: list[Block] = [Text(said)]
    for run in inputs.runs:
        for suite, title in suites.items():
            rows = [row for row in inputs.of(run, "bench") if row.suite == suite]
            if rows:
                table = step_table(f"{run_title(run)}: {title}", rows, folded=run != inputs.runs[0])
                blocks.append(table if table.rows else Text(f"{table.title}. {table.note}"))
    return blocks if len(blocks) > 1 else [Text("Not measured: no run has it.")]


def prefill_section(inputs: Inputs) -> Section:
    """What prompts of several lengths take."""
    said = (
        "One prompt of random tokens at a time, until the logits of its last token are there. Under a figure: its "
        "share of the limit, the larger of the bytes over the copy bandwidth and the operations over the rate of a "
        "large matrix product of that machine, for products and attention the latter. Of gate and up the engine's "
        "kernel computes SwiGLU too. Causal attention counts the half of the scores that is used. Activations: the "
        "memory in use at most, without weights and cache."
    )
    return Section("prefill", "Prompts", step_blocks(inputs, said, PREFILL_SUITES))


# --- many requests --------------------------------------------------------------------------------------------------


def load_section(inputs: Inputs) -> Section:
    """Many requests at a time: throughput week over week against its floor, phases, prefix cache, batches, server."""
    said = (
        "Greedy, to the number of tokens asked for, prompts of random tokens; TTFT counts from a request's entry, so "
        "waiting for others is in it. Under a figure, and as a bar: its share of the floor, the least time that the "
        "machine's ceilings allow for the prompts' operations and then for the decode steps' weights, keys and values. "
        "Phases: until the last prompt's first token, with what was decoded meanwhile, and the rest. Against the week "
        "before: output tokens a second over those of the same case on the same host. Clients of the server send the "
        "next request when one is done; at a rate, requests come whether or not others are done (Poisson)."
    )
    blocks: list[Block] = [Text(said)]
    for run in inputs.runs:
        bench = [row for row in inputs.of(run, "bench") if row.suite in LOAD_SUITES]
        if figure := load_figure(run, bench):
            blocks.append(Figures([figure], run_title(run), provenance(bench)[0]))
        for suite, title in LOAD_SUITES.items():
            rows = [row for row in bench if row.suite == suite and row.metric in LOAD_LABELS]
            if rows:
                table = load_table(f"{run_title(run)}: {title}", rows, folded=run != inputs.runs[0])
                blocks.append(table if table.rows else Text(f"{table.title}. {table.note}"))
        if phases := [row for row in bench if row.metric == "phase_s" and row.status == "ok"]:
            blocks.append(list_rows(f"{run_title(run)}: phases", phases, PHASES, folded=run != inputs.runs[0]))
    if len(blocks) == 1:
        blocks = [Text("Not measured: no run has these suites.")]
    return Section("load", "Many requests at a time", blocks)


def floor_cell(row: Row) -> Cell:
    return Cell("" if row.limit is None else show(row.limit, row.unit), numeric=True)


PHASES: Columns = {
    "week": lambda row: row.week,
    "phase": lambda row: row.case,
    "took": value_cell,
    "at least": floor_cell,
    "why at least": lambda row: row.limit_kind,
    "what": lambda row: row.note,
    "run with": engine_of,
}


def load_table(title: str, rows: Sequence[Row], folded: bool) -> Table:
    """A line a case, week and engine, as they were measured; a column a metric, and output against the week before."""
    lines: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        lines[row.case, row.week, engine_of(row)][row.metric] = row
    names = [name for name in LOAD_LABELS if any(row.metric == name for row in rows)]
    cases = list(dict.fromkeys(row.case for row in rows))
    table = []
    for (case, week, engine), found in sorted(lines.items(), key=lambda item: (cases.index(item[0][0]), item[0][1:])):
        ratio = against_week_before(found.get("output_throughput"), rows)
        cells = [load_cell(found.get(name)) for name in names]
        table.append([Cell(case), Cell(week, engine), Cell(times(ratio), numeric=True), *cells])
    columns = ["case", "week", "against the week before", *(LOAD_LABELS[name] for name in names)]
    return drop_unmeasured(Table(columns, table, title, provenance(rows)[0], folded), first=2)


def load_cell(row: Row | None) -> Cell:
    if row is None:
        return Cell("")
    if row.metric.endswith("_share") and row.value is not None and row.status == "ok":
        return Cell(percent(row.value), numeric=True, source=row.source)
    return value_cell(row)


def against_week_before(row: Row | None, rows: Sequence[Row]) -> float | None:
    """How many times the output of the last week before that ran the same case on the same host and backend."""
    if row is None or not row.value:
        return None
    same = ("suite", "case", "metric", "backend", "dtype", "quantization", "tensor_parallel", "gpu", "driver", "cuda")
    before = [
        other
        for other in rows
        if other.week < row.week and other.value and all(getattr(other, name) == getattr(row, name) for name in same)
    ]
    last = max(before, key=lambda other: other.week, default=None)
    return None if last is None else row.value / last.value


def load_figure(run: str, rows: Sequence[Row]) -> Figure | None:
    """Output tokens/s of requests that come at once by week, a line a case, beside what the floor allows."""
    rows = [row for row in rows if (row.suite, row.metric, row.status) == ("throughput", "output_throughput", "ok")]
    series = []
    for case in dict.fromkeys(row.case for row in rows):
        line = sorted((row for row in rows if row.case == case), key=lambda row: row.week)
        series.append(
            Series(
                label=case,
                x=[row.week for row in line],
                y=[row.value for row in line],
                low=[min(row.samples or [row.value]) for row in line],
                high=[max(row.samples or [row.value]) for row in line],
                limit=[row.limit for row in line],
            )
        )
    weeks = sorted({row.week for row in rows})
    if not weeks:
        return None
    name = f"load-{slug(run)}"
    title = "output of many requests at once (tokens/s): higher is better"
    return Figure(name, plot_weeks(name, title, weeks, weeks, series), f"{title}, {run}, by week")


def week_figures(inputs: Inputs, run: str) -> Figures | None:
    """TTFT, TPOT and output tokens/s by week, a line a case, with the range of the samples and the limit."""
    wanted = (("standard_prefill", "ttft_ms"), ("standard_decode", "tpot_ms"), ("standard_decode", "output_throughput"))
    figures, used = [], []
    for suite, metric in wanted:
        rows = [row for row in inputs.speed(run) if (row.suite, row.metric, row.status) == (suite, metric, "ok")]
        if not rows:
            continue
        used += rows
        series = []
        for batch, prompt in sorted({(row.batch, row.prompt_tokens) for row in rows}):
            line = [row for row in rows if (row.batch, row.prompt_tokens) == (batch, prompt)]
            line.sort(key=lambda row: row.week)
            samples = [row.samples or [row.value] for row in line]
            series.append(
                Series(
                    label=f"prompt {prompt}" if suite == "standard_prefill" else f"batch {batch}, context {prompt}",
                    x=[row.week for row in line],
                    y=[row.value for row in line],
                    low=[min(values) for values in samples],
                    high=[max(values) for values in samples],
                    limit=[row.limit for row in line],
                )
            )
        weeks = sorted({row.week for row in rows})
        labels = [f"{week}\nHugging Face" if week == BASELINE else week for week in weeks]
        name = f"weeks-{slug(run)}-{slug(metric)}"
        title = f"{LABELS[metric]} ({rows[0].unit}): {rows[0].better} is better"
        figures.append(Figure(name, plot_weeks(name, title, weeks, labels, series), f"{title}, {run}, by week"))
    return Figures(figures, run_title(run), provenance(used)[0]) if figures else None


def progress_section(inputs: Inputs) -> Section:
    found = [figures for run in inputs.runs if (figures := week_figures(inputs, run))]
    said = (
        "Points are medians, thick bars the range of the samples, short dashes the limit; the scale is logarithmic. "
        "w01 is transformers' own code on the same machine. A week that does not measure a case has no point."
    )
    blocks: list[Block] = [Text(said), *found]
    return Section(
        "progress", "Week over week", blocks if found else [Text("Not measured: no run has the standard suite.")]
    )


# --- parity ---------------------------------------------------------------------------------------------------------

LAYER = re.compile(r"embedding|layers\.\d+|norm|logits")
LAYER_SUITES = ("layers", "simulator")
LAYER_METRICS = {"error_ratio": "error / HF's", "mean_abs_error": "mean error"}


def layer_order(case: str) -> tuple[int, int]:
    kind, _, index = case.partition(".")
    return ("embedding", "layers", "norm", "logits").index(kind), int(index or 0)


def is_layer_row(row: Row) -> bool:
    """Whether the row is the one figure per activation that the tables by layer show."""
    if row.suite not in LAYER_SUITES or not LAYER.fullmatch(row.case) or row.backend == "transformers":
        return False
    return row.metric == ("mean_abs_error" if row.dtype == "float32" else "error_ratio")


def name_exact(row: Row) -> Row:
    """A bf16 activation that neither side computes with an error has no ratio: its error, 0, stands in for it."""
    exact = row.metric == "mean_abs_error" and row.dtype == "bfloat16" and row.value == 0 and row.limit == 0
    return row._replace(metric="error_ratio", limit=None) if exact else row


def error_cell(row: Row | None) -> Cell:
    """An error, with the part of what is allowed that it takes as its background."""
    if row is None:
        return Cell("")
    if row.value is None:
        return value_cell(row)
    used = row.value / row.limit if row.limit else None
    tone = "bad" if row.status == "failed" or (used or 0) > 1 else ""
    return Cell(
        number(row.value), numeric=True, heat=None if used is None else min(used, 1), tone=tone, source=row.source
    )


def layer_table(title: str, rows: Sequence[Row], folded: bool) -> Table:
    """A line an activation; a column a week, engine and dtype."""
    keys = sorted({(row.week, engine_of(row), row.metric) for row in rows})
    found = {(row.case, row.week, engine_of(row), row.metric): row for row in rows}
    cases = sorted({row.case for row in rows}, key=layer_order)
    lines = [[Cell(case), *(error_cell(found.get((case, *key))) for key in keys)] for case in cases]
    columns = ["activation", *(f"{week} {engine}: {LAYER_METRICS[metric]}" for week, engine, metric in keys)]
    return Table(columns, lines, title, provenance(rows)[0], folded)


def layer_figure(run: str, rows: Sequence[Row]) -> Figure | None:
    """The bf16 error of each layer relative to transformers' own, by week."""
    rows = [row for row in rows if row.metric == "error_ratio" and row.case.startswith("layers.") and row.value]
    if not rows:
        return None
    series = []
    for week, engine in sorted({(row.week, engine_of(row)) for row in rows}):
        line = [row for row in rows if (row.week, engine_of(row)) == (week, engine)]
        line.sort(key=lambda row: layer_order(row.case))
        series.append(
            Series(f"{week} {engine}", [layer_order(row.case)[1] for row in line], [row.value for row in line])
        )
    gates = {row.limit for row in rows}
    title = "bf16 error against fp32, relative to transformers' own bf16 error"
    name = f"parity-{slug(run)}"
    return Figure(
        name, plot_layers(name, title, "ratio", series, gates.pop() if len(gates) == 1 else None), f"{title}, {run}"
    )


GATED: Columns = {
    "week": lambda row: row.week,
    "suite": lambda row: row.suite,
    "model": lambda row: row.model,
    "case": lambda row: row.case,
    "metric": lambda row: row.metric,
    "value": value_cell,
    "allowed": limit_cell,
    "run with": knobs_of,
    "note": lambda row: row.note if row.status == "ok" else None,
}


def parity_section(inputs: Inputs) -> Section:
    said = (
        "fp32: the mean absolute difference from transformers in fp32. bf16: the engine's error against fp32 divided "
        "by transformers' own bf16 error, so that 1 is as good as transformers. The background is the part of the "
        "allowed error that is used."
    )
    blocks: list[Block] = [Text(said)]
    for run in inputs.runs:
        parity = inputs.of(run, "parity")
        layers = [row for row in map(name_exact, parity) if is_layer_row(row)]
        # The run's own model; the others are small random ones of another architecture or for the simulator.
        models = [row.model for row in inputs.of(run, "bench", "baseline") if row.model]
        own = [row for row in layers if row.suite == "layers" and row.model in models]
        if figure := layer_figure(run, own):
            blocks.append(Figures([figure], run_title(run), provenance(own)[0], wide=True))
        # The run's own model first.
        for _, suite, model in sorted({(row not in own, row.suite, row.model or "") for row in layers}):
            rows = [row for row in layers if (row.suite, row.model or "") == (suite, model)]
            under = ", through the CUDA kernels" if suite == "simulator" else ""
            first = rows[0] in own and run == inputs.runs[0]
            blocks.append(layer_table(f"{run_title(run)}: {model}{under}", rows, folded=not first))
        rest = [row for row in parity if row not in layers and row.suite not in ("invariance", "tensors")]
        rest = [
            row for row in rest if not (row.suite in LAYER_SUITES and LAYER.fullmatch(row.case) and row.status == "ok")
        ]
        tensors = [row for row in parity if row.suite == "tensors"]
        if tensors:
            equal = sum(row.status == "ok" for row in tensors)
            blocks.append(
                Text(f"{run_title(run)}: {equal} of {len(tensors)} tensors are equal to those transformers loads.")
            )
        if rest:
            blocks.append(list_rows(f"{run_title(run)}: tokens, cache and text", rest, GATED, folded=True))
    if len(blocks) == 1:
        blocks = [Text("Not measured: no run has the parity stage.")]
    return Section("parity", "Parity with Hugging Face", blocks)


def invariance_section(inputs: Inputs) -> Section:
    """What gives the same bits: a line for each way of computing them, a column a run, week and engine."""
    said = (
        "A token's logits are the same bits whatever the batch, its neighbours, its place and the pieces of its "
        "prefill: each line is another way to compute what one pass over the prompt alone gives. Compared bit by bit, "
        "without a tolerance; the small figure is what was counted."
    )
    rows = [row for row in inputs.rows if (row.stage, row.suite) == ("parity", "invariance")]
    if not rows:
        return Section("invariance", "One reduction order", [Text(said), Text("Not measured: no run has this check.")])
    found = {(row.case, row.run, row.week, engine_of(row)): row for row in rows}
    keys = sorted({key[1:] for key in found}, key=lambda key: (inputs.runs.index(key[0]), *key[1:]))
    cases = list(dict.fromkeys(row.case for row in rows))
    lines = [[Cell(case), *(held_cell(found.get((case, *key))) for key in keys)] for case in cases]
    notes = [
        f"{run_title(run)}: {provenance(of)[0]}" for run in inputs.runs if (of := [r for r in rows if r.run == run])
    ]
    columns = ["the same as alone in one pass", *(f"{run}: {week} {engine}" for run, week, engine in keys)]
    return Section("invariance", "One reduction order", [Text(said), Table(columns, lines, note=" ".join(notes))])


def held_cell(row: Row | None) -> Cell:
    if row is None:
        return Cell("–")
    if row.status == "not_measured":
        return value_cell(row)
    counted = "" if row.value is None else f"{number(row.value)} {row.metric.replace('_', ' ')}"
    state, tone = ("holds", "good") if row.status == "ok" else ("does not hold", "bad")
    return Cell(state, counted, tone=tone, source=row.source)


# --- kernels --------------------------------------------------------------------------------------------------------

MIX_ARCH = "sm_90a"
MIX_TOP = 8


def kernel_section(inputs: Inputs) -> Section:
    """Registers, spills, shared memory, occupancy and instructions by architecture: this host's, whose code is the
    report's, else those of the first run that has them."""
    run = next((run for run in [LOCAL, *inputs.runs] if inputs.of(run, "build")), None)
    if run is None:
        return Section("kernels", "Kernels by architecture", [Text("Not measured: no run has the build stage.")])
    rows = inputs.of(run, "build")
    found: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        kernel, _, arch = row.case.rpartition(" ")
        found[kernel, arch][row.metric] = row
    kernels = sorted({kernel for kernel, _ in found})
    archs = sorted({arch for _, arch in found}, key=lambda arch: int(re.sub(r"\D", "", arch) or 0))
    note = f"{run_title(run)}. {provenance(rows)[0]}"
    lines = [[Cell(kernel), *(resource_cell(found.get((kernel, arch), {})) for arch in archs)] for kernel in kernels]
    summary = Table(["kernel", *archs], lines, "Registers a thread · theoretical occupancy", note)
    metrics = list(dict.fromkeys(row.metric for row in rows if row.suite != "instructions"))
    detail = [
        [Cell(kernel), Cell(arch), *(value_cell(of[name]) if name in of else Cell("") for name in metrics)]
        for (kernel, arch), of in sorted(found.items(), key=lambda item: (item[0][0], archs.index(item[0][1])))
    ]
    resources = Table(["kernel", "architecture", *metrics], detail, "All resources", note, folded=True)
    arch = MIX_ARCH if MIX_ARCH in archs else archs[-1]
    mix = [[Cell(kernel), *mix_cells(found.get((kernel, arch), {}))] for kernel in kernels]
    mixed = Table(["kernel", "instructions", "most frequent"], mix, f"PTX instruction mix, {arch}", note, folded=True)
    said = (
        "ptxas' own figures, which need no GPU. Spilled bytes are named where there are any. Instructions are counted "
        "in the code, not as executed."
    )
    return Section("kernels", "Kernels by architecture", [Text(said), summary, resources, mixed])


def resource_cell(found: Mapping[str, Row]) -> Cell:
    """ "40 · 67 %", and the spilled bytes; a dash where the kernel is not for the architecture."""
    if not found:
        return Cell("–")
    parts = []
    if "registers" in found and found["registers"].value is not None:
        parts.append(number(found["registers"].value))
    if "theoretical_occupancy" in found and found["theoretical_occupancy"].value is not None:
        parts.append(f"{found['theoretical_occupancy'].value * 100:.0f} %")
    spilled = found["spill_bytes"].value if "spill_bytes" in found else None
    text = " · ".join(parts) + (f", spills {number(spilled)} B" if spilled else "")
    return Cell(text or "not measured", numeric=bool(text), tone="warn" if spilled else "")


def mix_cells(found: Mapping[str, Row]) -> list[Cell]:
    counts = [
        (name.partition(".")[2], row.value) for name, row in found.items() if row.suite == "instructions" and row.value
    ]
    counts.sort(key=lambda pair: (-pair[1], pair[0]))
    total = number(sum(count for _, count in counts)) if counts else "not measured"
    return [Cell(total, numeric=True), Cell(", ".join(f"{name} {number(count)}" for name, count in counts[:MIX_TOP]))]


# --- checkpoint, host, what is missing, methods -----------------------------------------------------------------------


def checkpoint_section(inputs: Inputs) -> Section:
    blocks: list[Block] = []
    if inputs.architecture:
        lines = [[Cell(name), Cell(value, numeric=True)] for name, value in inputs.architecture.items()]
        blocks.append(Table(["property", "value"], lines, "This host: architecture"))
    for run in inputs.runs:
        rows = inputs.of(run, "download", "inventory")
        if rows:
            blocks.append(list_rows(f"{run_title(run)}: inventory", rows, WITHOUT_WEEK, folded=True))
    absent = [Text("Not measured: no run has the download and inventory stages.")]
    return Section("checkpoint", "Checkpoint", blocks or absent)


def host_section(inputs: Inputs) -> Section:
    blocks: list[Block] = []
    machines = []
    for run in inputs.runs:
        if host := inputs.hosts.get(run):
            gpus = ", ".join(f"{gpu.name} ({gpu.sm}, {show(gpu.memory_bytes, 'B')})" for gpu in host.gpus) or "none"
            words = (
                run,
                gpus,
                host.driver or "–",
                host.cuda or "–",
                host.cpu,
                f"{host.cores}",
                f"{host.memory_gib} GiB",
            )
            machines.append([Cell(word) for word in (*words, f"{host.system}, Python {host.python}")])
    if machines:
        columns = ("run", "GPU", "driver", "CUDA", "CPU", "cores", "memory", "system")
        blocks.append(Table(columns, machines, "Machines"))
    for run in inputs.runs:
        rows = inputs.of(run, "provision")
        if rows:
            folded = run != inputs.runs[0]
            blocks.append(list_rows(f"{run_title(run)}: ceilings and checks", rows, WITHOUT_WEEK, folded))
    lines = []
    for run in inputs.runs:
        for host, packages in sorted({(host_of(row), row.packages or "{}") for row in inputs.of(run)}):
            said = ", ".join(f"{name} {version}" for name, version in sorted(json.loads(packages).items()))
            lines.append([Cell(run), Cell(host), Cell(said or "not recorded")])
    return Section("host", "Hosts and ceilings", [*blocks, Table(["run", "host", "packages"], lines, "Software")])


def missing_section(inputs: Inputs) -> Section:
    """Everything that has no value or has failed, by reason."""
    lines = []
    for run in inputs.runs:
        groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
        for row in inputs.of(run):
            if row.status != "ok":
                groups[row.status, row.stage, row.week or "", row.note or ""].append(row)
        for (status, name, week, note), rows in sorted(groups.items()):
            state = Cell("failed", tone="bad") if status == "failed" else Cell("not measured", tone="mute")
            metrics = ", ".join(sorted({row.metric for row in rows}))
            lines.append(
                [Cell(run), Cell(f"{name} {week}".strip()), state, Cell(note), Cell(f"{len(rows)} rows: {metrics}")]
            )
    table = Table(["run", "stage", "state", "why", "what"], lines)
    return Section("missing", "What could not be measured", [table if lines else Text("Every row has a value.")])


METHODS = (
    "Each figure is the median of repeats inside one stage, whose samples are in the Parquet; warm-up runs are not "
    "counted. On a GPU a call is timed by CUDA events or a synchronised clock, on a CPU by the wall clock. A lock "
    "keeps two measurements from sharing a host.",
    "A call of the standard suite has B prompts of P random tokens and makes N tokens for each, the end-of-text token "
    "ignored. Tokenisation is outside the time, greedy sampling inside. TTFT: from the call to the first token. TPOT: "
    "(end to end − TTFT) / (N − 1). ITL: between two tokens. Output: B × N tokens over the end-to-end time; prompt + "
    "output: B × (P + N) over the same.",
    "The limit of a step is the larger of its weight and KV bytes over the copy bandwidth and its FLOPs over the "
    "matrix rate, both measured on that machine by the provision stage. The share of the limit is limit / value where "
    "lower is better, value / limit where higher is.",
    "Hugging Face (HF) is transformers on the same checkpoint, dtype and cases: w01. A ratio to it is of rows of equal "
    "batch, prompt and new tokens on the same host.",
    "This host's rows come from reports/metrics/, recorded ones from reports/recorded/<gpu>/<model>/. They share a "
    "table only where each line says which it is.",
)


def methods_section(inputs: Inputs) -> Section:
    return Section("methods", "Methods", [Text(text) for text in METHODS])


SECTIONS: tuple[Callable[[Inputs], Section], ...] = (
    glance_section,
    week_section,
    results_section,
    prefill_section,
    decode_section,
    load_section,
    progress_section,
    parity_section,
    invariance_section,
    kernel_section,
    checkpoint_section,
    host_section,
    missing_section,
    methods_section,
)
