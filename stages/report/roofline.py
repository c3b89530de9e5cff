"""Every kernel under the roofline of its machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.report.figures import Point, plot_roofline
from stages.report.parts import (
    Block,
    Cell,
    Figure,
    Figures,
    Inputs,
    Row,
    Section,
    Table,
    limited_by_copy,
    measured_section,
    number,
    percent,
    provenance,
    run_title,
    share_of_limit,
    show,
    slug,
)

# Part of a decode step -> the inventory's roles whose parameters it multiplies.
PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "head": ("lm_head",),
}
WIDTH = 2  # bytes of a bfloat16


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


def find_ceilings(inputs: Inputs, run: str, rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """The GPU's bandwidth that the limits of `rows` are of and its bfloat16 matrix rate, where the run measured both.

    Limits are of a read bandwidth that says by which backend it was read; one of before, torch's sum's, does not.
    """
    found = {
        row.metric: row
        for row in inputs.of(run, "provision")
        if (row.suite, row.case, row.status) == ("ceilings", "gpu", "ok") and row.dtype in (None, "bfloat16")
    }
    by_copy = any(limited_by_copy(row) for row in rows)
    bandwidth, matrix = found.get("copy_bandwidth" if by_copy else "read_bandwidth"), found.get("matrix_rate")
    if bandwidth is None or matrix is None or not (by_copy or bandwidth.backend):
        return None
    return bandwidth, matrix


def roofline_section(inputs: Inputs) -> Section:
    said = (
        "Each kernel of the engine by itself, at the FLOPs it does for each byte that it must move at least (across) "
        "and the FLOP/s it reaches (up), under what that machine was measured to allow: its read bandwidth, the slope "
        "(where limits are of the copy bandwidth, that one), and its bfloat16 matrix rate, the flat line. A point on "
        "the line is at the limit. FLOPs are those of products and attention; a kernel of other operations stands at "
        "the left edge, where its distance from the slope is its share of that bandwidth."
    )
    blocks: list[Block] = []
    for run in inputs.runs:
        rows = [row for row in inputs.of(run, "bench") if row.backend == "cuda" and row.status == "ok"]
        kernels, shape = latest(rows, "kernels"), find_shape(inputs, run)
        ceilings = find_ceilings(inputs, run, kernels)
        if ceilings is None:
            continue
        bandwidth, matrix = (row.value for row in ceilings)
        places = [
            *place_decode(kernels, shape, bandwidth),
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
