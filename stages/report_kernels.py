"""The report's kernels: under the roofline of their machine, a layer's time, and what they need by architecture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.report_figures import Bar, Point, plot_bars, plot_roofline
from stages.report_parts import (
    LOCAL,
    Block,
    Cell,
    Figure,
    Figures,
    Inputs,
    Row,
    Section,
    Table,
    Text,
    engine_of,
    measured_section,
    number,
    percent,
    provenance,
    run_title,
    share_of_limit,
    show,
    slug,
    value_cell,
)

# --- roofline -------------------------------------------------------------------------------------------------------

# Part of a decode step -> the inventory's roles whose parameters it multiplies.
PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "head": ("lm_head",),
}
WIDTH = 2  # bytes of a bfloat16
IN_A_LAYER = {"qkv": 1, "attention": 1, "o": 1, "add_norm": 2, "gate_up": 1, "down": 1}  # calls


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as the inventory's rows have them."""

    hidden: float
    layers: float
    parameters: Mapping[str, float]
    """Role -> parameters of all layers."""

    def width(self, role: str) -> float:
        """Of one layer's projection from the hidden size, the rows."""
        return self.parameters[role] / self.layers / self.hidden


def find_shape(inputs: Inputs, run: str) -> Shape | None:
    """None where the run has no inventory, or one of another architecture than Llama's and OLMo-2's."""
    rows = [row for row in inputs.of(run, "inventory") if row.metric == "parameters" and row.value]
    found = {row.case: row.value for row in rows}
    found.setdefault("lm_head", found.get("embedding", 0))
    norm = found.get("post_attention_layernorm")
    needed = {role for roles in PRODUCTS.values() for role in roles} | {"final_norm"}
    if norm is None or needed - set(found):
        return None
    return Shape(found["final_norm"], norm / found["final_norm"], found)


@dataclass(frozen=True)
class Place:
    """A kernel under the roofline. intensity: FLOPs for each byte it has to move; None where nothing counts FLOPs."""

    kernel: str
    case: str
    row: Row
    intensity: float | None
    bytes: float
    """A second, of those it has to move."""


def count_flops(shape: Shape | None, kernel: str, row: Row) -> float | None:
    """Of all layers' calls of a decode step's kernel; None for the kernels whose few operations nothing counts."""
    if shape is None:
        return None
    if kernel in PRODUCTS:
        return 2 * row.batch * sum(shape.parameters[role] for role in PRODUCTS[kernel])
    if kernel == "attention":
        return 4 * row.batch * (row.context + 1) * shape.width("self_attn.q_proj") * shape.layers
    return None


def place_decode(rows: Sequence[Row], shape: Shape | None, bandwidth: float) -> list[Place]:
    """The decode step's kernels: bytes are in the rows, FLOPs follow from the model's sizes, time from the limit."""
    moved = {row.case: row.value for row in rows if row.metric == "bytes" and row.value}
    places = []
    for row in rows:
        share = share_of_limit(row) if row.metric == "call_us" else None
        if share is None or row.case not in moved:
            continue
        kernel, _, case = row.case.partition(", ")
        flops = count_flops(shape, kernel, row)
        intensity = None if flops is None else flops / moved[row.case]
        places.append(Place(kernel, f"decode, {case}", row, intensity, share * bandwidth))
    return places


def place_prompts(rows: Sequence[Row], shape: Shape | None) -> list[Place]:
    """A prompt's matrix products and attention: FLOP/s are in the rows, bytes follow from the model's sizes."""
    places = []
    for row in rows:
        if row.metric != "compute_rate" or not row.value or shape is None:
            continue
        tokens, q, kv = row.prompt_tokens, shape.width("self_attn.q_proj"), shape.width("self_attn.k_proj")
        kernel = row.case.partition(",")[0]
        if row.suite == "prompt_attention":
            kernel = "attention"
            flops, values = 2 * row.batch * q * tokens * (tokens + 1), 2 * row.batch * tokens * (q + kv)
        else:
            weights = sum(shape.parameters[role] for role in PRODUCTS[kernel]) / shape.layers
            depth = {"o": q, "down": weights / shape.hidden}.get(kernel, shape.hidden)
            # Gate and up become one through SwiGLU in the same kernel.
            out = weights / depth / (2 if kernel == "gate_up" else 1)
            flops, values = 2 * tokens * weights, weights + tokens * (depth + out)
        intensity = flops / (values * WIDTH)
        places.append(Place(kernel, f"prompt, {row.case.rpartition(', ')[2]}", row, intensity, row.value / intensity))
    return places


def find_ceilings(inputs: Inputs, run: str) -> tuple[Row, Row] | None:
    """The GPU's copy bandwidth and bfloat16 matrix rate, where the run measured both."""
    found = {
        row.metric: row
        for row in inputs.of(run, "provision")
        if (row.suite, row.case, row.status) == ("ceilings", "gpu", "ok") and row.dtype in (None, "bfloat16")
    }
    if not {"copy_bandwidth", "matrix_rate"} <= set(found):
        return None
    return found["copy_bandwidth"], found["matrix_rate"]


def roofline_section(inputs: Inputs) -> Section:
    said = (
        "Each kernel of the engine by itself, at the FLOPs it does for each byte that it must move at least (across) "
        "and the FLOP/s it reaches (up), under what that machine was measured to allow: its copy bandwidth, the slope, "
        "and its bfloat16 matrix rate, the flat line. A point on the line is at the limit. FLOPs are those of products "
        "and attention; a kernel of other operations stands at the left edge, where its distance from the slope is its "
        "share of the copy bandwidth."
    )
    blocks: list[Block] = []
    for run in inputs.runs:
        ceilings, shape = find_ceilings(inputs, run), find_shape(inputs, run)
        rows = [row for row in inputs.of(run, "bench") if row.backend == "cuda" and row.status == "ok"]
        if ceilings is None:
            continue
        bandwidth, matrix = (row.value for row in ceilings)
        places = [
            *place_decode(latest(rows, "kernels"), shape, bandwidth),
            *place_prompts(latest(rows, "prompt_products") + latest(rows, "prompt_attention"), shape),
        ]
        if not places:
            continue
        used = [place.row for place in places]
        name, title = f"roofline-{slug(run)}", f"roofline, {run.partition('/')[0]}"
        points = [
            Point(place.kernel, place.case.split(",")[0] + f", batch {place.row.batch}" * bool(place.row.batch),
                  place.intensity, place.bytes)
            for place in places
        ]  # fmt: skip
        figure = Figure(name, plot_roofline(name, title, points, bandwidth, matrix), f"{title}, every kernel, {run}")
        note = provenance([*used, *ceilings])[0]
        blocks.append(Figures([figure], run_title(run), note, wide=True, folded=run != inputs.runs[0]))
        lines = [place_line(place, bandwidth, matrix) for place in places]
        columns = ["kernel", "case", "of the roof", "reached", "the roof there", "FLOP a byte", "week"]
        blocks.append(Table(columns, lines, f"{run_title(run)}: the points", provenance(used)[0], folded=True))
    return measured_section(
        "roofline",
        "Every kernel under the roofline",
        said,
        blocks,
        "no run has a GPU's ceilings and its kernels one by one.",
    )


def latest(rows: Sequence[Row], suite: str) -> list[Row]:
    """The suite's rows of the last week that has any."""
    rows = [row for row in rows if row.suite == suite]
    week = max((row.week for row in rows), default=None)
    return [row for row in rows if row.week == week]


def place_line(place: Place, bandwidth: float, matrix: float) -> list[Cell]:
    if place.intensity is None:
        reached, roof, unit = place.bytes, bandwidth, "B/s"
    else:
        reached, roof, unit = place.bytes * place.intensity, min(place.intensity * bandwidth, matrix), "FLOP/s"
    intensity = "not counted" if place.intensity is None else number(place.intensity)
    return [
        Cell(place.kernel), Cell(place.case),
        Cell(percent(reached / roof), numeric=True, share=reached / roof, source=place.row.source),
        Cell(show(reached, unit), numeric=True, source=place.row.source), Cell(show(roof, unit), numeric=True),
        Cell(intensity, numeric=True), Cell(place.row.week),
    ]  # fmt: skip


# --- a layer's time -------------------------------------------------------------------------------------------------


def layer_section(inputs: Inputs) -> Section:
    """What one layer of a decode step takes, kernel by kernel, and how much of the step all layers are."""
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


# --- kernels --------------------------------------------------------------------------------------------------------

MIX_ARCH = "sm_90a"
MIX_TOP = 8


def kernel_section(inputs: Inputs) -> Section:
    """Registers, spills, shared memory, occupancy and instructions by architecture: this host's, whose code is the
    report's, else those of the first run that has them."""
    run = next((run for run in [LOCAL, *inputs.runs] if inputs.of(run, "build")), None)
    if run is None:
        absent = [Text("Not measured: no run has the build stage.")]
        return Section("kernels", "Kernels by architecture", absent, page_only=True)
    rows = [row for row in inputs.of(run, "build") if row.suite in ("resources", "instructions")]
    found: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        kernel, _, arch = row.case.rpartition(" ")
        # A version for one architecture says so at the end of its name, too.
        found[kernel.removesuffix(f"_{arch}"), arch][row.metric] = row
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
    return Section("kernels", "Kernels by architecture", [Text(said), summary, resources, mixed], page_only=True)


def resource_cell(found: Mapping[str, Row]) -> Cell:
    """ "40 · 67 %", and the spilled bytes; a dash where the kernel is not for the architecture."""
    if not found:
        return Cell("–", numeric=True, tone="mute")
    parts = []
    if "registers" in found and found["registers"].value is not None:
        parts.append(number(found["registers"].value))
    if "theoretical_occupancy" in found and found["theoretical_occupancy"].value is not None:
        parts.append(f"{found['theoretical_occupancy'].value * 100:.0f} %")
    spilled = found["spill_bytes"].value if "spill_bytes" in found else None
    text = " · ".join(parts) + (f", spills {number(spilled)} B" if spilled else "")
    source = found["registers"].source if "registers" in found else ""
    return Cell(text or "not measured", numeric=bool(text), tone="warn" if spilled else "", source=source)


def mix_cells(found: Mapping[str, Row]) -> list[Cell]:
    counts = [
        (name.partition(".")[2], row.value) for name, row in found.items() if row.suite == "instructions" and row.value
    ]
    counts.sort(key=lambda pair: (-pair[1], pair[0]))
    total = number(sum(count for _, count in counts)) if counts else "not measured"
    return [Cell(total, numeric=True), Cell(", ".join(f"{name} {number(count)}" for name, count in counts[:MIX_TOP]))]
