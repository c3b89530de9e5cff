"""The standard suite against its limits, and each week's own measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from stages.report.parts import (
    DETAIL,
    LABELS,
    STANDARD,
    Block,
    Cell,
    Inputs,
    Row,
    Section,
    Table,
    commit_of,
    drop_unmeasured,
    engine_of,
    host_of,
    list_rows,
    measured_section,
    provenance,
    run_title,
    value_cell,
)
from stages.report.suites import DECODE_SUITES, LOAD_SUITES, PREFILL_SUITES


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
