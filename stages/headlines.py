"""The headlines: the few figures of a run that `dvc metrics`, `dvc exp show` and `dvc plots` show.

Parquet keeps every row, and `python -m stages.compare` compares them all beyond their noise. DVC prints all that it is
given, a line or a column a figure, so it is given BUDGET figures at most. A figure is named week.case.metric, or
what.metric where it is no week's, and has four significant digits. It is of the backend that this host could measure;
what was not measured is not there. Lengths are in the name, so that figures of other workloads are never compared.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

BUDGET = 40
"""The most figures of a pipeline: what fits a screen."""
COLUMNS = 24
"""The most columns of `dvc exp show` as `make experiments` calls it."""
CONTEXT, PROMPT, CLIENTS = 128, 1024, 8
"""The case that stands for a suite: the nearest to these that the workload has, at batch 1 where there is a batch."""
PLOTTED = ("ttft_ms", "tpot_ms", "output_throughput")
PLOTTED_SUITES = ("standard_prefill", "standard_decode", "workload_prompts", "throughput")

Row = Mapping[str, Any]
Figures = dict[str, float]


def list_headlines(rows: Sequence[Row]) -> Figures:
    """Name → figure, of the rows of one stage and week; empty for a stage that has none."""
    stages = {row["stage"] for row in rows}
    return STAGES[stages.pop()](rows) if len(stages) == 1 and stages <= set(STAGES) else {}


def as_json(rows: Sequence[Row]) -> str:
    """The headlines of one stage and week, nested by the dots of their names, for `dvc metrics`."""
    nested: dict[str, Any] = {}
    for name, value in list_headlines(rows).items():
        *places, metric = name.split(".")
        inner = nested
        for place in places:
            inner = inner.setdefault(place, {})
        inner[metric] = shorten(value)
    return json.dumps(nested, indent=2) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line a measured case of the suites that all weeks share, for `dvc plots`; the columns are always the same."""
    cases: dict[str, dict[str, float]] = {}
    for row in measured(rows):
        if row["suite"] in PLOTTED_SUITES and row["metric"] in PLOTTED:
            cases.setdefault(row["case"], {})[row["metric"]] = shorten(row["value"])
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, ("case", *PLOTTED), lineterminator="\n")
    writer.writeheader()
    writer.writerows({"case": case} | found for case, found in cases.items())
    return text.getvalue()


def shorten(value: float) -> float:
    """`value` to four significant digits; whole numbers as they are."""
    return int(value) if value == int(value) else float(f"{value:.4g}")


def measured(rows: Iterable[Row], suite: str | None = None, metric: str | None = None) -> list[Row]:
    """The rows with a value that is as it should be, of this suite and metric where they are given."""
    return [
        row
        for row in rows
        if row["status"] == "ok" and suite in (None, row["suite"]) and metric in (None, row["metric"])
    ]


def nearest(rows: Sequence[Row], **wanted: int) -> Row | None:
    """The row whose knobs are nearest to those wanted, the first of them before all; None where none has them."""
    known = [row for row in rows if all(row[knob] is not None for knob in wanted)]
    return min(known, key=lambda row: [abs(row[knob] - value) for knob, value in wanted.items()], default=None)


def list_bench(rows: Sequence[Row]) -> Figures:
    """A week's speed: a prompt, a decode step, many requests, a server under load, loading, the tokenizer."""
    week, found = rows[0]["week"], {}

    def add(case: str, row: Row | None) -> None:
        if row is not None:
            found[f"{week}.{case}.{row['metric']}"] = row["value"]

    prompts = measured(rows, "standard_prefill", "ttft_ms")
    if row := nearest(prompts, prompt_tokens=PROMPT):
        add(f"prefill_{row['prompt_tokens']}", row)
    steps = measured(rows, "standard_decode", "tpot_ms")
    if row := nearest(steps, batch=1, context=CONTEXT):
        add(f"decode_b{row['batch']}_ctx{row['context']}", row)
    if row := nearest(measured(rows, "throughput", "output_throughput"), batch=1):
        add(f"requests_{row['batch']}", row)
    loads = [row for row in measured(rows, "serve", "ttft_ms_p99") if row["case"] == f"{row['batch']} clients"]
    if row := nearest(loads, batch=CLIENTS):
        add(f"serve_{row['batch']}_clients", row)
    for row in measured(rows, "tokenizer", "encode_throughput"):
        if row["backend"] == "afs":
            add("tokenizer", row)
    for row in measured(rows, "load", "load_gbs"):
        if row["case"] == "warm":
            add("load_warm", row)
    return found


def list_parity(rows: Sequence[Row]) -> Figures:
    """Checks that failed; and the largest error of an activation or of the logits, as a ratio to transformers' own."""
    week = rows[0]["week"]
    ratios = [row["value"] for row in rows if row["metric"] == "error_ratio" and row["value"] is not None]
    worst = {f"{week}.parity.worst_ratio": max(ratios)} if ratios else {}
    return worst | {f"{week}.parity.checks_failed": float(sum(row["status"] == "failed" for row in rows))}


def list_build(rows: Sequence[Row]) -> Figures:
    """Kernels that spill registers, each architecture's by itself; and the seconds of compiling what was not kept."""
    spills = sum(row["metric"] == "spill_bytes" and bool(row["value"]) for row in rows)
    return {"build.spills": float(spills)} | {
        f"build.{row['metric']}": row["value"] for row in measured(rows, "compilation", "seconds")
    }


def list_provision(rows: Sequence[Row]) -> Figures:
    """What limits everything on this host: the GPU's memory and matrix rate, or the CPU's where there is no GPU."""
    ceilings = measured(rows, "ceilings")
    case = "gpu" if any(row["case"] == "gpu" for row in ceilings) else "cpu"
    found = {row["metric"]: row["value"] for row in ceilings if row["case"] == case}
    scaled = (
        ("read_bandwidth", "read_gb_per_s", 1e9),
        ("copy_bandwidth", "copy_gb_per_s", 1e9),
        ("matrix_rate", "matrix_tflops", 1e12),
    )
    return {f"host.{name}": found[metric] / unit for metric, name, unit in scaled if metric in found}


def list_inventory(rows: Sequence[Row]) -> Figures:
    """The checkpoint's size."""
    sizes = measured(rows, metric="parameters")
    return {f"checkpoint.{row['metric']}": row["value"] for row in sizes if row["case"] == "checkpoint"}


STAGES: dict[str, Callable[[Sequence[Row]], Figures]] = {
    "provision": list_provision,
    "inventory": list_inventory,
    "build": list_build,
    "parity": list_parity,
    "bench": list_bench,
}
"""The stages that have headlines. The baseline's are those of bench@w01, which has its rows."""
