"""Memory of the GPU that a case takes."""

from __future__ import annotations

from collections import defaultdict

from stages.report.parts import (
    STANDARD,
    Block,
    Cell,
    Inputs,
    Row,
    Section,
    Table,
    measured_section,
    percent,
    provenance,
    run_title,
    show,
)


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
