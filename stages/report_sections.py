"""What the report says: rows of the metrics' table in, sections of tables, plots and paragraphs out.

Nothing here reads or writes a file.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.metrics import BUSY
from stages.report_figures import plot_heat, plot_weeks
from stages.report_kernels import find_ceilings, kernel_section, layer_section, roofline_section
from stages.report_parts import (
    BASELINE,
    DETAIL,
    LABELS,
    LOCAL,
    STANDARD,
    WITHOUT_WEEK,
    Block,
    Cell,
    Columns,
    Figure,
    Figures,
    Inputs,
    Row,
    Section,
    Table,
    Text,
    commit_of,
    drop_unmeasured,
    engine_of,
    host_of,
    knobs_of,
    limit_cell,
    list_rows,
    measured_section,
    median_interval,
    number,
    percent,
    provenance,
    run_title,
    share_of_limit,
    show,
    slug,
    span,
    times,
    value_cell,
)
from stages.report_weeks import compare_section, done_weeks, make_series, plan_section

PREFILL_SUITES = {
    "prompt_lengths": "prompts by length, beyond the model's positions with its RoPE scaled to them",
    "prompt_products": "a prompt's matrix products, and torch's (cuBLAS)",
    "prompt_attention": "a prompt's attention, by wgmma and portable, and torch's by cuDNN and FlashAttention-2",
}
DECODE_SUITES = {
    "decode_step": "decode steps",
    "kernels": "each kernel of a decode step by itself",
    "graphs": "CUDA graphs of a decode step",
    "peers": "what others take: cuBLAS through torch, transformers under torch.compile",
}
DETAILED_SUITES = (
    "prompt_products",
    "prompt_attention",
    "kernels",
    "graphs",
    "peers",
    "step_trace",
)  # their tables are folded
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
# --- at a glance ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glance:
    """A run's latest week in a line: prefill of the longest prompt, decode at batch 1 and the shortest context; and of
    the latest week that measured it, the output of many requests at once."""

    week: str
    ttft: Row | None
    tpot: Row | None
    output: Row | None
    many: Row | None

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
    mixes = (row for row in inputs.of(run, "bench") if (row.suite, row.metric) == ("throughput", "output_throughput"))
    many = max((row for row in mixes if row.status == "ok"), key=lambda row: row.week, default=None)
    return Glance(week, first, shortest.get("tpot_ms"), shortest.get("output_throughput"), many)


def against_baseline(inputs: Inputs, row: Row | None) -> float | None:
    """How many times as fast as Hugging Face in the same case on the same host; None where there is no such row, or
    one of a single run on a GPU: until the baseline's warm-up was a whole run that was one which was not warm."""
    same = ("suite", "case", "metric", "dtype", "batch", "prompt_tokens", "new_tokens", "tensor_parallel")
    same += ("gpu", "driver", "cuda")
    if row is None or row.week == BASELINE:
        return None
    for other in inputs.speed(row.run):
        if other.week == BASELINE and other.value and all(getattr(other, name) == getattr(row, name) for name in same):
            if other.gpu != "cpu" and other.samples is not None and len(other.samples) == 1:
                return None
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
        speeds.append(value_cell(found.many) if found.many else Cell("not measured", tone="mute"))
        ratio = times(against_baseline(inputs, found.tpot)) or "no comparable row"
        where = Cell(gpu, "this host" if run == LOCAL else "recorded")
        commits = ", ".join(sorted({commit_of(row) for row in (*found.rows, found.many) if row}))
        words = [where, Cell(inputs.model(run, first.model)), Cell(found.week, engine_of(first)), Cell(prompts)]
        lines.append([*words, *speeds, Cell(ratio, numeric=True), Cell(commits)])
    columns = [
        "GPU",
        "model",
        "week",
        "prompt",
        "TTFT",
        "TPOT",
        "output",
        "many at once",
        "decode against HF",
        "commit",
    ]
    note = (
        "Batch 1. Prompt: tokens, of TTFT / of TPOT and output. Many at once: output of the suite throughput in the "
        "latest week that has it. Under a figure: its share of the limit measured on that machine. HF: transformers on "
        "the same machine (w01)."
    )
    return Table(columns, lines, note=note) if lines else None


def first_screen(inputs: Inputs) -> dict[str, Any]:
    """The first screen, of the first run that has any figures: a sentence, these figures, and what they rest on."""
    found = next((found for run in inputs.runs if (found := find_glance(inputs, run))), None)
    if found is None:
        said = "No run has measured the standard suite yet: run `make repro`."
        return {"sentence": said, "cards": [], "facts": []}
    lead = found.rows[0]
    place = "a CPU, without a GPU" if lead.gpu == "cpu" else f"one {lead.gpu}"
    week = inputs.weeks.get(found.week)
    since = f"{found.week} ({week.title.lower()})" if week else found.week
    names = {"output_throughput": "at batch 1", "tpot_ms": "per output token", "ttft_ms": "to the first token"}
    cards = []
    for row in found.rows:
        share, ratio = share_of_limit(row), against_baseline(inputs, row)
        under = [f"{row.prompt_tokens}-token prompt"]
        under.append("limit not measured" if share is None else f"{percent(share)} of the limit")
        under += [] if ratio is None else [f"{times(ratio)} Hugging Face's speed"]
        text, name = show(row.value, row.unit), names[row.metric]
        if interval := median_interval(row):
            name += f" ({span(interval.low, interval.high, row.unit)})"
        cards.append({"value": text, "name": name, "under": under, "share": share, "source": row.source})
    if many := found.many:
        share = share_of_limit(many)
        under = [many.case, "limit not measured" if share is None else f"{percent(share)} of the limit", many.week]
        text, name = show(many.value, many.unit), f"with {many.batch} requests at once"
        cards.append({"value": text, "name": name, "under": under, "share": share, "source": many.source})
    model = inputs.model(lead.run, lead.model)
    sentence = f"{model} on {place} ({engine_of(lead)}), as of {since}"
    return {"sentence": sentence, "cards": cards, "facts": list_facts(inputs, found)}


def list_facts(inputs: Inputs, found: Glance) -> list[tuple[str, str]]:
    """Of the lead run: what the limit is, who it is compared with, what was checked, when and where it was measured."""
    lead = found.rows[0]
    facts = []
    version = json.loads(lead.packages or "{}").get("transformers", "")
    if any(against_baseline(inputs, row) for row in found.rows):
        facts.append(("Against", f"Hugging Face transformers {version} on the same machine, same checkpoint and dtype"))
    if ceilings := find_ceilings(inputs, lead.run):
        bandwidth, matrix = (show(row.value, row.unit) for row in ceilings)
        facts.append(("The limit", f"copy bandwidth {bandwidth}, bfloat16 matrix rate {matrix}: measured on this GPU"))
    checks = [row for row in inputs.of(lead.run, "parity") if row.week == found.week]
    gated = [row for row in checks if row.suite != "invariance" and (row.limit is not None or row.status == "failed")]
    if gated:
        held = sum(row.status == "ok" for row in gated)
        facts.append(("Parity", f"{held:,} of {len(gated):,} limits on the distance from Hugging Face hold"))
    if bits := [row for row in checks if row.suite == "invariance" and row.status != "not_measured"]:
        held = sum(row.status == "ok" for row in bits)
        facts.append(("Same bits", f"{held} of {len(bits)} other ways to compute a token's logits give the same bits"))
    days = sorted({inputs.dates.get(row.commit or "", "") for row in found.rows} - {""})
    day, commits = f"{days[-1]} " if days else "", ", ".join(sorted({commit_of(row) for row in found.rows}))
    facts.append(("Since", f"{found.week}, measured {day}at commit {commits}; {done_weeks(inputs)}"))
    return facts


def glance_section(inputs: Inputs) -> Section:
    table = glance_table(inputs, inputs.runs)
    blocks: list[Block] = [table or Text("No run has measured the standard suite yet.")]
    if all(run == LOCAL for run in inputs.runs):
        blocks.append(Text("No run on a named GPU has been recorded yet."))
    return Section("glance", "At a glance", blocks)


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
    blocks: list[Block] = []
    for run in inputs.runs:
        rows = [row for row in inputs.speed(run) if row.suite in STANDARD]
        if rows:
            blocks.append(standard_table(run, rows, folded=bool(blocks)))
    for run in inputs.runs:
        others = (*STANDARD, *PREFILL_SUITES, *DECODE_SUITES, *LOAD_SUITES)
        rows = [row for row in inputs.speed(run) if row.suite not in others]
        if rows:
            blocks.append(list_rows(f"{run_title(run)}: each week's own measurements", rows, DETAIL, folded=True))
    return measured_section(
        "results", "Results against limits", said, blocks, "no run has the baseline or bench stage."
    )


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
    return measured_section("decode", "The decode step", said, step_blocks(inputs, DECODE_SUITES), "no run has it.")


def step_blocks(inputs: Inputs, suites: Mapping[str, str]) -> list[Block]:
    """A table of each of these suites (by name their title) that a run has."""
    blocks: list[Block] = []
    for run in inputs.runs:
        for suite, title in suites.items():
            rows = [row for row in inputs.of(run, "bench") if row.suite == suite]
            if rows:
                folded = run != inputs.runs[0] or suite in DETAILED_SUITES
                table = step_table(f"{run_title(run)}: {title}", rows, folded)
                blocks.append(table if table.rows else Text(f"{table.title}. {table.note}"))
    return blocks


def prefill_section(inputs: Inputs) -> Section:
    """What prompts of several lengths take."""
    said = (
        "One prompt of random tokens at a time, until the logits of its last token are there. Under a figure: its "
        "share of the limit, the larger of the bytes over the copy bandwidth and the operations over the rate of a "
        "large matrix product of that machine, for products and attention the latter. Of gate and up the engine's "
        "kernel computes SwiGLU too. Causal attention counts the half of the scores that is used. Activations: the "
        "memory in use at most, without weights and cache."
    )
    return measured_section("prefill", "Prompts", said, step_blocks(inputs, PREFILL_SUITES), "no run has it.")


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
    blocks: list[Block] = []
    for run in inputs.runs:
        bench = [row for row in inputs.of(run, "bench") if row.suite in LOAD_SUITES]
        if figure := load_figure(run, bench):
            blocks.append(Figures([figure], run_title(run), provenance(bench)[0], folded=run != inputs.runs[0]))
        for suite, title in LOAD_SUITES.items():
            rows = [row for row in bench if row.suite == suite and row.metric in LOAD_LABELS]
            if rows:
                folded = run != inputs.runs[0] or suite in DETAILED_SUITES
                table = load_table(f"{run_title(run)}: {title}", rows, folded)
                blocks.append(table if table.rows else Text(f"{table.title}. {table.note}"))
        if phases := [row for row in bench if row.metric == "phase_s" and row.status == "ok"]:
            blocks.append(list_rows(f"{run_title(run)}: phases", phases, PHASES, folded=True))
    return measured_section("load", "Many requests at a time", said, blocks, "no run has these suites.")


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
        series.append(make_series(case, [row for row in rows if row.case == case]))
    weeks = sorted({row.week for row in rows})
    if not weeks:
        return None
    name = f"load-{slug(run)}"
    title = "output of many requests at once (tokens/s): higher is better"
    return Figure(name, plot_weeks(name, title, weeks, weeks, series), f"{title}, {run}, by week")


# --- memory ---------------------------------------------------------------------------------------------------------


def memory_section(inputs: Inputs) -> Section:
    """Peak memory of the GPU by case and week, beside the weights and the memory there is."""
    said = (
        "The most GPU memory in use at a time while a case runs. Under a figure, and as a bar: what is beyond the "
        "checkpoint's weights (cache, activations, and what the engine reserves), and the share of the GPU's memory."
    )
    blocks: list[Block] = []
    for run in inputs.runs:
        rows = [row for row in inputs.speed(run) if row.metric == "peak_memory_bytes" and row.status == "ok"]
        if not rows:
            continue
        weights = next(
            (row for row in inputs.of(run, "inventory") if (row.case, row.metric) == ("checkpoint", "weight_bytes")),
            None,
        )
        host = inputs.hosts.get(run)
        size = host.gpus[0].memory_bytes if host and host.gpus else None
        weeks = sorted({row.week for row in rows})
        found: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
        for row in sorted(rows, key=lambda row: (row.suite not in STANDARD, row.suite, row.prompt_tokens or 0)):
            found[row.suite, row.case][row.week] = row
        lines = [
            [Cell(case), *(memory_cell(of.get(week), weights, size) for week in weeks)]
            for (_, case), of in found.items()
        ]
        note = provenance(rows)[0]
        if weights is not None and weights.value:
            total = "" if size is None else f" of the GPU's {show(size, 'B')}"
            note = f"Weights: {show(weights.value, 'B')}{total}. {note}"
        folded = bool(blocks)
        blocks.append(Table(["case", *weeks], lines, f"{run_title(run)}: peak memory", note, folded))
    return measured_section("memory", "Memory", said, blocks, "no run has a GPU.")


def memory_cell(row: Row | None, weights: Row | None, size: float | None) -> Cell:
    if row is None:
        return Cell("–", numeric=True, tone="mute")
    more = row.value - weights.value if weights is not None and weights.value else None
    small = [] if more is None or more < 0 else [f"+ {show(more, 'B')}"]
    share = None if not size else row.value / size
    small += [] if share is None else [percent(share)]
    return Cell(show(row.value, row.unit), ", ".join(small), numeric=True, share=share, source=row.source)


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
    """A bf16 or fp16 activation that neither side computes with an error has no ratio: its error, 0, stands in."""
    exact = row.metric == "mean_abs_error" and row.dtype != "float32" and row.value == 0 and row.limit == 0
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


def heat_figure(run: str, rows: Sequence[Row]) -> Figure | None:
    """How much of the allowed error each activation uses: a line a week, engine and dtype, a column an activation."""
    found = {
        (row.week, engine_of(row), row.dtype, row.case): row.value / row.limit
        for row in rows
        if row.value is not None and row.limit
    }
    if not found:
        return None
    keys = sorted({(dtype, week, engine) for week, engine, dtype, _ in found})
    cases = sorted({case for *_, case in found}, key=layer_order)
    shares = [[found.get((week, engine, dtype, case)) for case in cases] for dtype, week, engine in keys]
    lines = [
        f"{week} {engine}: {percent(max(filter(None, line), default=0))}"
        for (_, week, engine), line in zip(keys, shares, strict=True)
    ]
    name, title = f"parity-{slug(run)}", "part of the allowed error that each activation uses, by layer, and the most"
    columns = [case.removeprefix("layers.").replace("embedding", "emb") for case in cases]
    svg = plot_heat(name, title, lines, columns, shares)
    return Figure(name, svg, f"{title}, {run}, by week and layer")


def gate_table(title: str, rows: Sequence[Row], folded: bool) -> Table:
    """A line a week: of its limits how many hold, and the worst errors of an activation or of the logits."""
    lines = []
    for week in sorted({row.week for row in rows}):
        of = [row for row in rows if row.week == week and row.suite != "invariance"]
        limited = [
            row for row in of if row.status != "not_measured" and (row.limit is not None or row.status == "failed")
        ]
        held = sum(row.status == "ok" for row in limited)
        said = Cell(f"{held:,} of {len(limited):,}", numeric=True, tone="good" if held == len(limited) else "bad")
        worst = [find_worst(of, metric, dtype) for metric, dtype in WORST.values()]
        lines.append([Cell(week), said if limited else Cell("–", tone="mute"), *map(error_cell, worst)])
    return Table(["week", "limits that hold", *WORST], lines, title, provenance(rows)[0], folded)


WORST = {
    "worst fp32 error": ("mean_abs_error", "float32"),
    "worst bf16 error / HF's": ("error_ratio", "bfloat16"),
    "worst fp16 error / HF's": ("error_ratio", "float16"),
}


def find_worst(rows: Sequence[Row], metric: str, dtype: str) -> Row | None:
    """The row of a layer's error that takes the largest part of what is allowed; None where there is none."""
    found = [row for row in rows if is_layer_row(row) and (row.metric, row.dtype) == (metric, dtype)]
    return max(
        (row for row in found if row.value is not None and row.limit),
        key=lambda row: row.value / row.limit,
        default=None,
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
        "fp32: the mean absolute difference from transformers in fp32. bf16, fp16: the engine's error against fp32 "
        "divided by transformers' own in that dtype, so that 1 is as good as transformers. The stronger a field's "
        "colour, the more of the allowed error is used; one beyond it is red."
    )
    blocks: list[Block] = []
    for run in inputs.runs:
        parity = inputs.of(run, "parity")
        layers = [row for row in map(name_exact, parity) if is_layer_row(row)]
        # The run's own model; the others are small random ones of another architecture or for the simulator.
        models = [row.model for row in inputs.of(run, "bench", "baseline") if row.model]
        own = [row for row in layers if row.suite == "layers" and row.model in models]
        if figure := heat_figure(run, own):
            blocks.append(
                Figures([figure], run_title(run), provenance(own)[0], wide=True, folded=run != inputs.runs[0])
            )
        if parity:
            blocks.append(gate_table(f"{run_title(run)}: limits", parity, folded=run != inputs.runs[0]))
        if failed := [row for row in parity if row.status == "failed"]:
            blocks.append(list_rows(f"{run_title(run)}: failed", failed, GATED))
        # The run's own model first.
        for _, suite, model in sorted({(row not in own, row.suite, row.model or "") for row in layers}):
            rows = [row for row in layers if (row.suite, row.model or "") == (suite, model)]
            under = ", through the CUDA kernels" if suite == "simulator" else ""
            blocks.append(layer_table(f"{run_title(run)}: {model}{under}", rows, folded=True))
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
    return measured_section("parity", "Parity with Hugging Face", said, blocks, "no run has the parity stage.")


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
    return Section("checkpoint", "Checkpoint", blocks or absent, page_only=True)


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
            blocks.append(list_rows(f"{run_title(run)}: ceilings and checks", rows, WITHOUT_WEEK, folded=True))
    lines = []
    for run in inputs.runs:
        for host, packages in sorted({(host_of(row), row.packages or "{}") for row in inputs.of(run)}):
            said = ", ".join(f"{name} {version}" for name, version in sorted(json.loads(packages).items()))
            lines.append([Cell(run), Cell(host), Cell(said or "not recorded")])
    blocks.append(Table(["run", "host", "packages"], lines, "Software"))
    if busy := list_busy(inputs):
        blocks.append(
            Table(["run", "measured", "other processes' share of the cores"], busy, "Measured on a busy machine")
        )
    return Section("host", "Hosts and ceilings", blocks)


def list_busy(inputs: Inputs) -> list[list[Cell]]:
    """What was measured while other processes were in its way: run, stage and week, their share of the cores."""
    found = {
        (run, f"{row.stage}@{row.week}" if row.week else row.stage): row.other_load
        for run in inputs.runs
        for row in inputs.of(run)
        if row.other_load is not None and row.other_load > BUSY
    }
    return [
        [Cell(run), Cell(measured), Cell(f"{share:.0%}", numeric=True, tone="warn")]
        for (run, measured), share in sorted(found.items())
    ]


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
    blocks: list[Block] = [table if lines else Text("Every row has a value.")]
    return Section("missing", "What could not be measured", blocks, page_only=True)


METHODS = (
    "Each figure is the median of repeats inside one stage, whose samples are in the Parquet; warm-up runs are not "
    "counted. On a GPU a call is timed by CUDA events or a synchronised clock, on a CPU by the wall clock. A lock "
    "keeps two measurements from sharing a host.",
    "The confidence interval of a median is that of order statistics: the innermost pair of the sorted samples that "
    "holds the true median with 95 %, as the number of samples below it is binomial (n, 1/2) whatever their "
    "distribution. No resampling, no seed. Fewer than six samples hold it with less: then the interval is their range, "
    "which holds 94 % of five, 88 % of four, 75 % of three, 50 % of two. It covers the repeats of one process on one "
    "day, not another day's or another machine's, and takes the repeats as independent. A change from week to week is "
    "named where the two intervals do not overlap.",
    "A call of the standard suite has B prompts of P random tokens and makes N tokens for each, the end-of-text token "
    "ignored. Tokenisation is outside the time, greedy sampling inside. TTFT: from the call to the first token. TPOT: "
    "(end to end − TTFT) / (N − 1). ITL: between two tokens. Output: B × N tokens over the end-to-end time; prompt + "
    "output: B × (P + N) over the same.",
    "The limit of a step is the larger of its weight and KV bytes over the copy bandwidth and its FLOPs over the "
    "matrix rate, both measured on that machine by the provision stage. The share of the limit is limit / value where "
    "lower is better, value / limit where higher is.",
    "A roofline's bytes are those that a kernel must move at least: each weight, key, value, input and output once. "
    "Its FLOPs are two for each parameter and token of a matrix product, and four for each query's width and key of "
    "attention (half of it where a prompt is causal), both from the sizes in the inventory's rows.",
    "Hugging Face (HF) is transformers on the same checkpoint, dtype and cases: w01. A ratio to it is of rows of equal "
    "batch, prompt and new tokens on the same host.",
    "On the page a number links to its row: the page of a Parquet file lists the rows that the report cites with their "
    "samples, limit, knobs, host and commit.",
    "This host's rows come from reports/metrics/, recorded ones from reports/recorded/<gpu>/<model>/. On the page they "
    "share a table only where each line says which it is.",
)


def methods_section(inputs: Inputs) -> Section:
    return Section("methods", "Methods", [Text(text) for text in METHODS])


SECTIONS: tuple[Callable[[Inputs], Section], ...] = (
    glance_section,
    plan_section,
    compare_section,
    results_section,
    roofline_section,
    layer_section,
    prefill_section,
    decode_section,
    load_section,
    memory_section,
    parity_section,
    invariance_section,
    kernel_section,
    checkpoint_section,
    host_section,
    missing_section,
    methods_section,
)
