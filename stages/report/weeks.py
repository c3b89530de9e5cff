"""The report's weeks: how far the plan is, and each week's speed beside the one before, with confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stages.report.figures import Series, plot_weeks
from stages.report.parts import (
    BASELINE,
    LABELS,
    LOCAL,
    Block,
    Cell,
    Figure,
    Figures,
    Inputs,
    Planned,
    Row,
    Section,
    Table,
    Text,
    commit_of,
    engine_of,
    measured_section,
    median_interval,
    provenance,
    run_title,
    same_host,
    show,
    slug,
    span,
    times,
    value_cell,
)

# --- the plan -------------------------------------------------------------------------------------------------------


def state_cell(rows: Sequence[Row]) -> Cell:
    """Whether a week was run on a host, and how it went."""
    states = Counter(row.status for row in rows)
    if states["failed"]:
        return Cell(f"failed: {states['failed']} rows", tone="bad")
    if states["ok"]:
        return Cell("done", tone="good")
    return Cell("not measured" if rows else "not run", tone="mute")


def done_day(inputs: Inputs, name: str) -> str | None:
    """The first day at which a whole run of the week without a failure was measured, of those that the report has.

    A run is whole where it has rows of all that the week checks and measures; its day is its latest commit's. "" where
    git does not know the commits; None where no run is whole, or one has failed.
    """
    week = inputs.weeks[name]
    runs: dict[str, list[Row]] = {}
    for row in inputs.rows:
        if row.week == name:
            runs.setdefault(row.run, []).append(row)
    days = []
    for rows in runs.values():
        state, stages = state_cell(rows).tone, {row.stage for row in rows if row.status == "ok"}
        if state == "bad":
            return None
        if ("parity" in stages or not week.parity) and (stages & {"bench", "baseline"} or not week.bench):
            dates = [inputs.dates.get(row.commit or "", "") for row in rows]
            days.append(max(dates) if all(dates) else "")
    return min(filter(None, days), default="") if days else None


def done_weeks(inputs: Inputs) -> str:
    """ "6 of 12 weeks done: 50 %"."""
    done = sum(done_day(inputs, name) is not None for name in inputs.weeks)
    planned = len({*inputs.weeks, *inputs.plan})
    return f"{done} of {planned} weeks done: {done / planned * 100:.0f} %"


def done_cell(day: str | None, target: str) -> Cell:
    if day is None:
        return Cell("no", numeric=True, tone="mute")
    late = bool(target) and day > target
    return Cell(day or "day not known", "late" if late else "", numeric=True, tone="warn" if late else "good")


def plan_section(inputs: Inputs) -> Section:
    """Each planned week: its target day, the day it was done, its state on each host, the commits that measured it."""
    hosts = sorted({row.run.split("/")[0] for row in inputs.rows}, key=lambda host: (host != LOCAL, host))
    plan = {name: Planned(week.title, "") for name, week in inputs.weeks.items()} | dict(inputs.plan)
    lines, done = [], 0
    for name, planned in sorted(plan.items()):
        rows, target = [row for row in inputs.rows if row.week == name], Cell(planned.target or "–", numeric=True)
        if name not in inputs.weeks:
            said, title = Cell("not built", numeric=True, tone="mute"), Cell(planned.title)
            states = [Cell("–")] * len(hosts)
        else:
            day, title = done_day(inputs, name), Cell(inputs.weeks[name].title, inputs.weeks[name].milestone)
            said = done_cell(day, planned.target)
            done += day is not None
            states = [state_cell([row for row in rows if row.run.split("/")[0] == host]) for host in hosts]
        commits = sorted({(inputs.dates.get(row.commit, ""), commit_of(row)) for row in rows if row.status == "ok"})
        measured = ", ".join(f"{day} {commit}".strip() for day, commit in commits)
        lines.append([Cell(name), target, said, title, *states, Cell(measured or "–")])
    columns = ["week", "target", "done", "what it must show", *hosts, "measured at"]
    how = (
        "Done: a run of all that the week checks and measures is here and no row of it failed. The day is that of the "
        "commit that measured it, of the earliest such run that is kept. Every week is a configuration of the same "
        "code and still runs, so a run may be newer than the week's work. Targets: stages/report/templates/plan.yaml."
    )
    return Section(
        "progress",
        "Progress",
        [Text(f"{done_weeks(inputs)}.", share=done / len(plan)), Table(columns, lines, note=how)],
    )


# --- week over week -------------------------------------------------------------------------------------------------

COMPARED = (
    ("standard_prefill", "ttft_ms"),
    ("standard_decode", "tpot_ms"),
    ("standard_decode", "output_throughput"),
    ("throughput", "output_throughput"),
)
SAME = ("suite", "case", "metric", "dtype", "batch", "prompt_tokens", "new_tokens", "tensor_parallel")


def change_text(row: Row, before: Row | None) -> str:
    """How many times as fast as the week before, or that their intervals overlap; "" where they do not compare."""
    if before is None or not row.value or not before.value or not same_host(row, before):
        return ""
    ratio = row.value / before.value if row.better == "higher" else before.value / row.value
    ours, theirs = median_interval(row), median_interval(before)
    if ours and theirs and ours.low <= theirs.high and theirs.low <= ours.high:
        return f"within the noise of {before.week}"
    doubt = "" if ours and theirs else ", one sample"
    return f"{times(ratio)} {before.week}{doubt}"


def speed_cell(row: Row | None, before: Row | None) -> Cell:
    """A value, below it the interval of its median and the change."""
    if row is None:
        return Cell("–", numeric=True, tone="mute")
    if row.status != "ok":
        return value_cell(row)
    found = median_interval(row)
    interval = "" if found is None else span(found.low, found.high, row.unit)
    small = "; ".join(filter(None, (interval, change_text(row, before))))
    return Cell(show(row.value, row.unit), small, numeric=True, source=row.source)


def compare_table(inputs: Inputs, run: str, folded: bool) -> Table | None:
    """A line a case and metric, a column a week; None where the run has measured none of them."""
    order = {pair: place for place, pair in enumerate(COMPARED)}
    rows = [row for row in inputs.speed(run) if (row.suite, row.metric) in order and row.status == "ok"]
    if not rows:
        return None
    weeks = sorted({row.week for row in rows})
    lines: dict[tuple, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (order[row.suite, row.metric], row.prompt_tokens or 0, row.batch or 0)):
        lines.setdefault(tuple(getattr(row, name) for name in SAME), {})[row.week] = row
    table = []
    for found in lines.values():
        first, before = next(iter(found.values())), None
        cells = [Cell(first.case), Cell(LABELS[first.metric])]
        for week in weeks:
            cells.append(speed_cell(found.get(week), before))
            before = found.get(week, before)
        table.append(cells)
    names = []
    for week in weeks:
        of = [row for row in rows if row.week == week]
        engines = sorted({engine_of(row) for row in of})
        names.append(f"{week}: {'; '.join(engines)}, commit {', '.join(sorted({commit_of(row) for row in of}))}")
    return Table(["case", "metric", *names], table, run_title(run), provenance(rows)[0], folded)


def make_series(label: str, rows: Sequence[Row]) -> Series:
    """A plot's line by week, with the intervals of the medians."""
    rows = sorted(rows, key=lambda row: row.week)
    found = [median_interval(row) for row in rows]
    return Series(
        label,
        x=[row.week for row in rows],
        y=[row.value for row in rows],
        low=[row.value if of is None else of.low for row, of in zip(rows, found, strict=True)],
        high=[row.value if of is None else of.high for row, of in zip(rows, found, strict=True)],
        limit=[row.limit for row in rows],
    )


def week_figures(inputs: Inputs, run: str) -> Figures | None:
    """TTFT, TPOT and output tokens/s by week, a line a case, with the interval of the median and the limit."""
    figures, used = [], []
    for suite, metric in COMPARED[:3]:
        rows = [row for row in inputs.speed(run) if (row.suite, row.metric, row.status) == (suite, metric, "ok")]
        if not rows:
            continue
        used += rows
        series = []
        for batch, prompt in sorted({(row.batch, row.prompt_tokens) for row in rows}):
            label = f"prompt {prompt}" if suite == "standard_prefill" else f"batch {batch}, context {prompt}"
            series.append(
                make_series(label, [row for row in rows if (row.batch, row.prompt_tokens) == (batch, prompt)])
            )
        weeks = sorted({row.week for row in rows})
        labels = [f"{week}\nHugging Face" if week == BASELINE else week for week in weeks]
        name = f"weeks-{slug(run)}-{slug(metric)}"
        title = f"{LABELS[metric]} ({rows[0].unit}): {rows[0].better} is better"
        figures.append(Figure(name, plot_weeks(name, title, weeks, labels, series), f"{title}, {run}, by week"))
    return Figures(figures, run_title(run), provenance(used)[0], folded=run != inputs.runs[0]) if figures else None


def compare_section(inputs: Inputs) -> Section:
    said = (
        "Points are medians, thick bars their confidence intervals, short dashes the limit; the scale is logarithmic. "
        "w01 is transformers' own code on the same machine. A week that does not measure a case has no point. In the "
        "table, under a median: its confidence interval (95 %; of fewer than six samples their range, see Methods) and "
        "how many times as fast as the week before that measured the case on the same host, where the two intervals do "
        "not overlap."
    )
    blocks: list[Block] = []
    for run in inputs.runs:
        if figures := week_figures(inputs, run):
            blocks.append(figures)
        if table := compare_table(inputs, run, folded=run != inputs.runs[0]):
            blocks.append(table)
    return measured_section("weeks", "Week over week", said, blocks, "no run has the standard suite.")
