"""How far from transformers the engine is, and what gives the same bits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.report.figures import plot_heat
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
    engine_of,
    knobs_of,
    limit_cell,
    list_rows,
    measured_section,
    number,
    percent,
    provenance,
    run_title,
    slug,
    value_cell,
)

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
    """Ways of computing that give the same bits: a line a way, a column a run, week and engine."""
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
