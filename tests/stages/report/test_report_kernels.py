"""Roofline, a layer's time, memory and the heat map, from rows whose numbers are easy to follow."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest

from stages import metrics
from stages.host import Device, Host
from stages.report.figures import EDGE, Point, plot_heat, plot_roofline
from stages.report.layers import layer_section
from stages.report.memory import memory_section
from stages.report.parity import heat_figure
from stages.report.parts import Figures, Inputs, Row, Section, Table, Text
from stages.report.roofline import find_shape, place_prompts, roofline_section

CPU = Host("a CPU", 2, 24, "Linux x86_64", "3.12")
H200 = dataclasses.replace(CPU, driver="580.1", cuda="13.0", gpus=(Device("NVIDIA H200", "sm_90", 40_000_000),))
RUN = "nvidia-h200/m"
LAYERS, HIDDEN, KV, INNER, VOCABULARY = 4, 64, 32, 128, 320
PARAMETERS = {
    "embedding": VOCABULARY * HIDDEN, "lm_head": VOCABULARY * HIDDEN, "final_norm": HIDDEN,
    "post_attention_layernorm": LAYERS * HIDDEN, "self_attn.q_proj": LAYERS * HIDDEN * HIDDEN,
    "self_attn.k_proj": LAYERS * KV * HIDDEN, "self_attn.v_proj": LAYERS * KV * HIDDEN,
    "self_attn.o_proj": LAYERS * HIDDEN * HIDDEN, "mlp.gate_proj": LAYERS * INNER * HIDDEN,
    "mlp.up_proj": LAYERS * INNER * HIDDEN, "mlp.down_proj": LAYERS * HIDDEN * INNER,
}  # fmt: skip
BANDWIDTH, MATRIX = 4e12, 8e14
MICROSECONDS = {"qkv": 20.0, "attention": 5.0, "o": 10.0, "add_norm": 1.0, "gate_up": 40.0, "down": 25.0, "head": 200.0}


def as_rows(rows: metrics.Rows) -> list[Row]:
    return [Row(**row, run=RUN, source=f"{RUN}/x.parquet, row {at}") for at, row in enumerate(rows.rows)]


def list_inventory(parameters: Mapping[str, float] = PARAMETERS) -> list[Row]:
    rows = metrics.Rows("inventory", None, "m", H200)
    for role, count in parameters.items():
        rows.add(suite="inventory", case=role, metric="parameters", value=count, unit="1", better=None)
    rows.add(suite="inventory", case="checkpoint", metric="weight_bytes", value=1e7, unit="B", better=None)
    return as_rows(rows)


def list_ceilings(read_by: str | None = "cuda") -> list[Row]:
    rows = metrics.Rows("provision", None, None, H200)
    shared: dict[str, Any] = {"suite": "ceilings", "case": "gpu", "better": "higher"}
    rows.add(metric="read_bandwidth", value=BANDWIDTH, unit="B/s", backend=read_by, **shared)
    rows.add(metric="copy_bandwidth", value=0.9 * BANDWIDTH, unit="B/s", **shared)
    rows.add(metric="matrix_rate", value=MATRIX, unit="FLOP/s", dtype="bfloat16", **shared)
    return as_rows(rows)


def list_kernels(share: float = 0.8, limit: str = "read bandwidth") -> list[Row]:
    """A decode step's kernels of batch 2, each at `share` of the limit."""
    rows = metrics.Rows("bench", "w06", "m", H200)
    knobs: dict[str, Any] = {"backend": "cuda", "dtype": "bfloat16", "batch": 2, "context": 99}
    for part, took in MICROSECONDS.items():
        case = f"{part}, batch 2 context 99"
        rows.add(
            suite="kernels", case=case, metric="call_us", value=took, unit="µs", better="lower", limit=took * share,
            limit_kind=limit, **knobs,
        )  # fmt: skip
        rows.add(suite="kernels", case=case, metric="bytes", value=1e6, unit="B", better=None, **knobs)
    rows.add(
        suite="decode_step", case="batch 2 context 99", metric="step_ms", value=0.7, unit="ms", better="lower", **knobs
    )
    return as_rows(rows)


def find_table(section: Section) -> Table:
    return next(block for block in section.blocks if isinstance(block, Table))


def test_each_kernel_stands_under_its_roof() -> None:
    section = roofline_section(Inputs([*list_inventory(), *list_ceilings(), *list_kernels()], {}))
    table = find_table(section)
    found = {line[0].text: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    assert set(found) == set(MICROSECONDS)
    assert all(line["of the roof"].text == "80 %" and line["of the roof"].source for line in found.values())
    # 2 FLOPs a parameter and sequence; of attention 4 a query's width, key and layer.
    assert found["down"]["FLOP a byte"].text == f"{2 * 2 * LAYERS * HIDDEN * INNER / 1e6:.3f}"
    assert found["attention"]["FLOP a byte"].text == f"{4 * 2 * 100 * HIDDEN * LAYERS / 1e6:.3f}"
    assert found["add_norm"]["FLOP a byte"].text == "not counted"
    assert found["add_norm"]["reached"].text == "3.20 TB/s"
    (figure,) = [block for block in section.blocks if isinstance(block, Figures)]
    assert figure.figures[0].name == "roofline-nvidia-h200-m"


def test_the_slope_is_what_the_limits_are_of() -> None:
    kernels = list_kernels(limit="copy bandwidth over the bytes moved")
    table = find_table(roofline_section(Inputs([*list_ceilings(None), *kernels], {})))
    reached = {line[0].text: line[3].text for line in table.rows}
    assert reached["add_norm"] == "2.88 TB/s"
    # A read bandwidth of before is torch's sum's, of which no limits are.
    (absent,) = roofline_section(Inputs([*list_ceilings(None), *list_kernels()], {})).blocks
    assert isinstance(absent, Text) and absent.text.startswith("Not measured")


def test_the_matrix_rate_is_the_roof_of_prompts() -> None:
    rows = metrics.Rows("bench", "w06", "m", H200)
    for suite, case in (("prompt_products", "down, 4096 tokens"), ("prompt_attention", "1 x 4096 tokens")):
        rows.add(
            suite=suite, case=case, metric="compute_rate", value=6e14, unit="FLOP/s", better="higher", limit=MATRIX,
            limit_kind="rate", backend="cuda", dtype="bfloat16", batch=1, prompt_tokens=4096,
        )  # fmt: skip
    shape = find_shape(Inputs(list_inventory(), {}), RUN)
    down, attention = place_prompts(as_rows(rows), shape)
    values = HIDDEN * INNER + 4096 * (HIDDEN + INNER)
    assert down.intensity == pytest.approx(2 * 4096 * HIDDEN * INNER / (2 * values))
    assert down.intensity and down.bytes * down.intensity == pytest.approx(6e14)
    assert attention.intensity == pytest.approx(2 * HIDDEN * 4096 * 4097 / (2 * 2 * 4096 * (HIDDEN + KV)))


def test_without_sizes_bytes_alone_are_shown() -> None:
    section = roofline_section(Inputs([*list_ceilings(), *list_kernels()], {}))
    assert all(line[5].text == "not counted" for line in find_table(section).rows)


def test_without_a_gpu_nothing_is_drawn() -> None:
    for make in (roofline_section, layer_section, memory_section):
        (absent,) = make(Inputs(list_inventory(), {})).blocks
        assert isinstance(absent, Text) and absent.text.startswith("Not measured")


def test_points_and_roof_of_the_plot() -> None:
    points = [Point("qkv", "batch 1", 1.0, 1e12), Point("norm", "batch 1", None, 1e12)]
    svg = plot_roofline("r", "t", points, BANDWIDTH, MATRIX)
    assert "800 TFLOP/s" in svg and "4.00 TB/s" in svg and "qkv" in svg and EDGE < 1
    assert svg == plot_roofline("r", "t", points, BANDWIDTH, MATRIX)


def test_a_layer_is_the_sum_of_its_kernels() -> None:
    section = layer_section(Inputs([*list_inventory(), *list_kernels()], {}))
    (line,) = find_table(section).rows
    found = dict(zip(find_table(section).columns, line, strict=True))
    assert found["layer"].text == "102 µs" and found["outside"].text == "200 µs"  # two add_norm
    assert found["all kernels"].text == "0.608 ms" and found["step, measured"].text == "0.700 ms"
    assert (found["add_norm"].text, found["add_norm"].small) == ("2", "2.0 %, 2 calls")


def test_a_step_that_lacks_a_kernel_makes_no_layer() -> None:
    rows = [row for row in list_kernels() if not row.case.startswith("attention")]
    assert len(layer_section(Inputs([*list_inventory(), *rows], {})).blocks) == 1


def test_memory_beyond_the_weights_and_of_the_gpu() -> None:
    rows = metrics.Rows("bench", "w06", "m", H200)
    rows.add(
        suite="standard_prefill", case="prefill 128", metric="peak_memory_bytes", value=1.2e7, unit="B",
        better="lower", batch=1, prompt_tokens=128,
    )  # fmt: skip
    inputs = Inputs([*list_inventory(), *as_rows(rows)], {}, hosts={RUN: H200})
    ((case, peak),) = find_table(memory_section(inputs)).rows
    assert case.text == "prefill 128"
    assert (peak.text, peak.small, peak.share) == ("12 MB", "+ 2 MB, 30 %", 0.3)


def test_the_heat_map_has_a_field_an_activation_and_marks_what_is_beyond() -> None:
    shares = [[0.5, 1.2, None], [0.1, 0.2, 0.3]]
    svg = plot_heat("h", "t", ["w03", "w04"], ["emb", "0", "logits"], shares)
    assert len(re.findall(r"fill: var\(--s5\)", svg)) == 4 and len(re.findall(r"fill: var\(--bad\)", svg)) == 1


def test_the_heat_map_names_the_most_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = metrics.Rows("parity", "w03", "m", H200)
    for case, value in (("embedding", 0.0), ("layers.0", 0.5), ("layers.1", 1.0)):
        rows.add(
            suite="layers", case=case, metric="error_ratio", value=value, unit="1", better="lower", limit=1.25,
            limit_kind="1.25 x", dtype="bfloat16", backend="cuda",
        )  # fmt: skip
    figure = heat_figure(RUN, as_rows(rows))
    assert figure and "w03 cuda, bfloat16: 80 %" in figure.svg
    assert heat_figure(RUN, []) is None
