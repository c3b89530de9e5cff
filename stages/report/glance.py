"""The first screen and the table of all runs: the latest week of each in a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.report.parts import (
    BASELINE,
    LOCAL,
    Block,
    Cell,
    Inputs,
    Row,
    Section,
    Table,
    Text,
    commit_of,
    engine_of,
    limited_by_copy,
    median_interval,
    percent,
    share_of_limit,
    show,
    span,
    times,
    value_cell,
)
from stages.report.roofline import find_ceilings
from stages.report.weeks import done_weeks


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
    if ceilings := find_ceilings(inputs, lead.run, found.rows):
        bandwidth, matrix = (f"{row.metric.replace('_', ' ')} {show(row.value, row.unit)}" for row in ceilings)
        facts.append(("The limit", f"{bandwidth}, bfloat16 {matrix}: measured on this GPU"))
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


RULER = (
    "Limits of what moves bytes are of the read bandwidth. They were of the copy bandwidth before, as those of {runs} "
    "still are: such shares are higher, and do not compare with others. It changed since a decode step only reads, and "
    "reading alone is 8 to 12 % faster on an H200: 4.6 to 4.7 TB/s by our own kernel, where a copy reads and writes "
    "4.0 to 4.3 together and torch's sum reads 4.35."
)


def list_limited_by_copy(inputs: Inputs) -> list[str]:
    """The runs with limits of the copy bandwidth, each with its weeks that have some: "nvidia-h200/m (w01, w03)"."""
    weeks = {run: sorted({row.week for row in inputs.of(run) if limited_by_copy(row)}) for run in inputs.runs}
    return [f"{run} ({', '.join(found)})" for run, found in weeks.items() if found]


def glance_section(inputs: Inputs) -> Section:
    table = glance_table(inputs, inputs.runs)
    blocks: list[Block] = [table or Text("No run has measured the standard suite yet.")]
    if all(run == LOCAL for run in inputs.runs):
        blocks.append(Text("No run on a named GPU has been recorded yet."))
    if earlier := list_limited_by_copy(inputs):
        blocks.append(Text(RULER.format(runs=", ".join(earlier))))
    return Section("glance", "At a glance", blocks)
