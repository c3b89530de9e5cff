"""Many requests at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from stages.report.figures import plot_weeks
from stages.report.parts import (
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
    drop_unmeasured,
    engine_of,
    list_rows,
    measured_section,
    percent,
    provenance,
    run_title,
    show,
    slug,
    times,
    value_cell,
)
from stages.report.suites import DETAILED_SUITES, LOAD_SUITES
from stages.report.weeks import make_series

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
