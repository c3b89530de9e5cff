"""A layer's time in a decode step, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict

from stages.report.figures import Bar, plot_bars
from stages.report.parts import (
    Block,
    Cell,
    Figure,
    Figures,
    Inputs,
    Row,
    Section,
    Table,
    engine_of,
    measured_section,
    number,
    percent,
    provenance,
    run_title,
    slug,
    value_cell,
)
from stages.report.roofline import find_shape

IN_A_LAYER = {"qkv": 1, "attention": 1, "o": 1, "add_norm": 2, "gate_up": 1, "down": 1}  # calls


def layer_section(inputs: Inputs) -> Section:
    """Time of one layer of a decode step, kernel by kernel, and how much of the step all layers are."""
    said = (
        "One layer of a decode step: the sum of its kernels, each timed by itself as the mean over all layers, which "
        "have the same shapes. Outside the layers: embedding, last norm, head, argmax, advance. The step is measured "
        "whole; what it takes beyond the sum is gaps between kernels and the host."
    )
    blocks: list[Block] = []
    for run in inputs.runs:
        rows = [row for row in inputs.of(run, "bench") if row.suite == "kernels" and row.status == "ok"]
        steps = {
            (row.week, row.batch, row.context): row
            for row in inputs.of(run, "bench")
            if (row.suite, row.metric, row.status) == ("decode_step", "step_ms", "ok")
        }
        shape = find_shape(inputs, run)
        calls: dict[tuple[str, int, int], dict[str, Row]] = defaultdict(dict)
        for row in rows:
            if row.metric == "call_us":
                calls[row.week, row.batch, row.context][row.case.partition(",")[0]] = row
        whole = {key: found for key, found in sorted(calls.items()) if set(IN_A_LAYER) <= set(found)}
        if not whole:
            continue
        bars, lines = [], []
        for key, found in whole.items():
            week, batch, context = key
            parts = {part: count * found[part].value for part, count in IN_A_LAYER.items()}
            layer = sum(parts.values())
            bars.append(Bar(f"{week}, batch {batch}\ncontext {context}", parts))
            cells = [Cell(f"batch {batch} context {context}"), Cell(week, engine_of(found["qkv"]))]
            outside = sum(row.value for part, row in found.items() if part not in IN_A_LAYER)
            total = None if shape is None else (layer * shape.layers + outside) / 1e3
            cells.append(Cell(f"{number(layer)} µs", numeric=True))
            cells.append(Cell(f"{number(outside)} µs", numeric=True))
            cells.append(Cell("" if total is None else f"{number(total)} ms", numeric=True))
            cells.append(value_cell(steps[key]) if key in steps else Cell("not measured", tone="mute"))
            for part, count in IN_A_LAYER.items():
                small = percent(parts[part] / layer) + (f", {count} calls" if count > 1 else "")
                cells.append(Cell(number(parts[part]), small, numeric=True, source=found[part].source))
            lines.append(cells)
        used = [row for found in whole.values() for row in found.values()]
        layers = "" if shape is None else f"{number(shape.layers)} layers. "
        name, title = f"layer-{slug(run)}", "one layer of a decode step (µs): lower is better"
        figure = Figure(name, plot_bars(name, title, bars), f"{title}, by kernel, {run}")
        blocks.append(Figures([figure], run_title(run), wide=True, folded=run != inputs.runs[0]))
        columns = ["case", "week", "layer", "outside", "all kernels", "step, measured", *IN_A_LAYER]
        note, folded = f"Kernels in µs. {layers}{provenance(used)[0]}", run != inputs.runs[0]
        blocks.append(Table(columns, lines, f"{run_title(run)}: kernel by kernel", note, folded))
    return measured_section(
        "layers",
        "A layer's time",
        said,
        blocks,
        "no run has timed the kernels of a step one by one, which needs a GPU.",
    )
