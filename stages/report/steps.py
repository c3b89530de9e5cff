"""What prompts and decode steps take, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from stages.report.parts import (
    Block,
    Cell,
    Inputs,
    Row,
    Section,
    Table,
    Text,
    drop_unmeasured,
    engine_of,
    measured_section,
    percent,
    provenance,
    run_title,
    value_cell,
)
from stages.report.suites import DECODE_SUITES, DETAILED_SUITES, PREFILL_SUITES

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
        "the limit, which for a step is its weight and KV bytes over the read bandwidth, and for a kernel the bytes "
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
        "share of the limit, the larger of the bytes over the read bandwidth and the operations over the rate of a "
        "large matrix product of that machine, for products and attention the latter. Of gate and up the engine's "
        "kernel computes SwiGLU too. Causal attention counts the half of the scores that is used. Activations: the "
        "memory in use at most, without weights and cache."
    )
    return measured_section("prefill", "Prompts", said, step_blocks(inputs, PREFILL_SUITES), "no run has it.")
