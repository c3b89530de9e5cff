"""Metrics files of a few rows, and a host for them."""

from pathlib import Path
from typing import Any

from stages.host import Device, Host
from stages.metrics import Rows


def host(gpu: str = "NVIDIA H200", **fields: Any) -> Host:
    return Host(
        "A CPU", 2, 24, "Linux x86_64", "3.11", fields.get("driver", "580.1"), "13.0", (Device(gpu, "sm_90", 2**37),),
        {"torch": "2.13"} | fields.get("packages", {}),
    )  # fmt: skip


def write(path: Path, *rows: dict[str, Any], week: str = "w05", on: Host | None = None) -> Path:
    """A metrics file of rows, a TPOT in ms unless they say otherwise; one with a `reason` was not measured."""
    collected = Rows("bench", week, "olmo2_1b", on or host())
    for row in rows:
        common: dict[str, Any] = {
            "suite": "decode", "case": "c", "metric": "tpot_ms", "unit": "ms", "better": "lower",
        } | row  # fmt: skip
        if "reason" in row:
            collected.missing(**common)
        else:
            collected.add(**{"value": None, **common})
    path.parent.mkdir(parents=True, exist_ok=True)
    collected.write_parquet(path)
    return path
