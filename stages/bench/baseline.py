"""Week 1: the baseline stage's measurements of transformers, so that every week is one table."""

from __future__ import annotations

from typing import Any

from stages.bench.context import Context
from stages.bench.suite import Suite
from stages.metrics import COLUMNS, KNOBS, read
from stages.standard import DECODE, PREFILL, PROMPTS


def measure(context: Context) -> None:
    """Adds the baseline stage's rows as bench's."""
    frame: Any = read(context.run.find("reports/metrics/baseline.parquet"))
    kept = [name for name in COLUMNS if name not in context.rows.common]
    for record in frame[frame["suite"].isin([PREFILL, DECODE, PROMPTS, "utilisation"])].to_dict("records"):
        fields = {name: plain(record[name]) for name in kept}
        if fields["status"] == "not_measured":
            reason = fields["note"]
            names = ("suite", "case", "metric", "unit", "better", *KNOBS)
            context.rows.missing(reason=reason, **{name: fields[name] for name in names})
        else:
            context.rows.add(**fields)


def plain(value: Any) -> Any:
    """A cell of a metrics frame as Python has it: no NaN, NA or arrays."""
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | list):
        return [float(item) for item in value]
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


BASELINE = Suite("baseline", measure)
