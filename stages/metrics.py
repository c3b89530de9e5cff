"""The one tidy table of measurements: a Parquet file a stage and week, and beside it the headlines that DVC reads.

Parquet is the source of truth; the headlines are derived from its rows.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stages import headlines
from stages.commit import read_commit
from stages.exits import StageError
from stages.host import Host, OtherLoad
from stages.stage import write_whole

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: dict[str, pa.DataType] = {
    "stage": pa.string(),
    "week": pa.string(),
    "suite": pa.string(),
    "case": pa.string(),
    "metric": pa.string(),
    "value": pa.float64(),
    "unit": pa.string(),
    "better": pa.string(),
    "status": pa.string(),
    "samples": pa.list_(pa.float64()),
    "limit": pa.float64(),
    "limit_kind": pa.string(),
    "model": pa.string(),
    "dtype": pa.string(),
    "quantization": pa.string(),
    "backend": pa.string(),
    "batch": pa.int64(),
    "prompt_tokens": pa.int64(),
    "new_tokens": pa.int64(),
    "context": pa.int64(),
    "tensor_parallel": pa.int64(),
    "kernel_versions": pa.string(),
    "gpu": pa.string(),
    "driver": pa.string(),
    "cuda": pa.string(),
    "packages": pa.string(),
    "commit": pa.string(),
    "other_load": pa.float64(),
    "note": pa.string(),
}
Listed = Mapping[str, Any]
"""A row before it is measured: suite, case, metric, unit, better, and the knobs of its case."""
REQUIRED = frozenset({"stage", "suite", "case", "metric", "unit", "status", "gpu"})
SCHEMA = pa.schema([pa.field(name, kind, nullable=name not in REQUIRED) for name, kind in COLUMNS.items()])
KNOBS = (
    "dtype", "quantization", "backend", "batch", "prompt_tokens", "new_tokens", "context", "tensor_parallel",
    "kernel_versions",
)  # fmt: skip
IDENTITY = ("stage", "week", "suite", "case", "metric", "model", "gpu", *KNOBS)
TIMED = ("baseline", "bench")
"""The stages whose rows other processes are in the way of."""
BUSY = 0.25
"""The share of a machine's cores, as `other_load` has it, from which other processes are in a measurement's way."""
STATUSES = ("ok", "not_measured", "failed")


class MetricsError(StageError):
    """A row or a file that breaks the schema."""


class Rows:
    """Collects the rows of one stage (and week) on one host for one model.

    `kernel_versions` may be given as a dict from operation to version; it is stored as JSON with sorted keys.
    """

    def __init__(self, stage: str, week: str | None, model: str | None, host: Host) -> None:
        self.rows: list[dict[str, Any]] = []
        self._load = OtherLoad()
        self.common = {
            "stage": stage,
            "week": week,
            "model": model,
            "gpu": host.gpu,
            "driver": host.driver,
            "cuda": host.cuda,
            "packages": json.dumps(host.packages, sort_keys=True),
            "commit": read_commit(),
        }

    def add(
        self,
        *,
        suite: str,
        case: str,
        metric: str,
        value: float | None,
        unit: str,
        better: str | None,
        samples: Sequence[float] | None = None,
        limit: float | None = None,
        limit_kind: str | None = None,
        status: Literal["ok", "failed"] = "ok",
        note: str | None = None,
        **knobs: Any,
    ) -> None:
        """Adds a measurement; `better` is "higher", "lower" or None; `value` is the samples' median where it is None.
        `failed` says in `note` what is wrong with it.

        Raises MetricsError for an unknown knob, a value that is not finite, a limit without its kind, a row that is
        already there.
        """
        if value is None and samples:
            value = statistics.median(samples)
        value = None if value is None else float(value)
        self._append(
            suite=suite, case=case, metric=metric, value=value, unit=unit, better=better, status=status,
            samples=None if samples is None else [float(sample) for sample in samples],
            limit=limit, limit_kind=limit_kind, note=note, **knobs,
        )  # fmt: skip

    def missing(
        self, *, suite: str, case: str, metric: str, unit: str, better: str | None, reason: str, **knobs: Any
    ) -> None:
        """Adds a row that says what could not be measured on this host, and why; its value is null, never zero."""
        self._append(
            suite=suite, case=case, metric=metric, value=None, unit=unit, better=better, status="not_measured",
            note=reason, **knobs,
        )  # fmt: skip

    def add_missing(self, listed: Iterable[Listed], reason: str, **knobs: Any) -> None:
        """Adds these rows without values, saying why; a row's own knobs come before those of all."""
        for row in listed:
            self.missing(reason=reason, **knobs | dict(row))

    def _append(self, **fields: Any) -> None:
        unknown = set(fields) - set(COLUMNS)
        if unknown:
            raise MetricsError(f"no such column: {', '.join(sorted(unknown))}")
        versions = fields.get("kernel_versions")
        if isinstance(versions, Mapping):
            fields["kernel_versions"] = json.dumps(versions, sort_keys=True)
        self.rows.append(dict.fromkeys(COLUMNS) | self.common | fields)

    def write(self, path: Path) -> None:
        """Writes the rows as Parquet at `path`, each file whole or not at all, and beside it what DVC reads of them:
        `.json` for `dvc metrics`, of stages that have headlines, and of bench `.csv` for `dvc plots`.

        Raises MetricsError where a row breaks the schema or two rows are the same measurement.
        """
        self.write_parquet(path)
        self.write_headlines(path)

    def write_headlines(self, path: Path) -> None:
        """Only what `write` leaves for DVC beside the Parquet at `path`."""
        if self.common["stage"] in headlines.STAGES:
            write_whole(path.with_suffix(".json"), headlines.as_json(self.rows))
        if self.common["stage"] == "bench":
            write_whole(path.with_suffix(".csv"), headlines.as_csv(self.rows))

    def write_parquet(self, path: Path) -> None:
        """Only `write`'s Parquet file; rows of the stages in TIMED get the `other_load` they were measured beside."""
        if self.common["stage"] in TIMED:
            share = self._load.share()
            for row in self.rows:
                if row["other_load"] is None:
                    row["other_load"] = share
        check(self.rows)
        write_table(path, self.rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of SCHEMA as one Parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], SCHEMA), sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())


def check(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises MetricsError for a row that breaks the schema's rules, naming the row."""
    seen = set()
    for row in rows:
        place = "/".join(str(row[key]) for key in ("stage", "week", "suite", "case", "metric"))
        empty = sorted(name for name in REQUIRED if row[name] in (None, ""))
        if empty:
            raise MetricsError(f"{place}: {', '.join(empty)} must be given")
        if row["status"] not in STATUSES:
            raise MetricsError(f"{place}: status '{row['status']}' is none of {', '.join(STATUSES)}")
        if row["better"] not in ("higher", "lower", None):
            raise MetricsError(f"{place}: better '{row['better']}' is neither higher nor lower")
        numbers = [row["value"], row["limit"], *(row["samples"] if row["samples"] is not None else [])]
        if any(number is not None and not math.isfinite(number) for number in numbers):
            raise MetricsError(f"{place}: a number is not finite")
        if row["status"] == "ok" and row["value"] is None:
            raise MetricsError(f"{place}: a measured row has a value")
        if row["status"] == "not_measured" and row["value"] is not None:
            raise MetricsError(f"{place}: what was not measured has no value")
        if row["status"] != "ok" and not row["note"]:
            raise MetricsError(f"{place}: status {row['status']} says why in `note`")
        if row["limit"] is not None and not row["limit_kind"]:
            raise MetricsError(f"{place}: a limit says in `limit_kind` why it is one")
        identity = tuple(row[name] for name in IDENTITY)
        if identity in seen:
            raise MetricsError(f"{place}: the same measurement twice; a knob or the case must tell them apart")
        seen.add(identity)


def read_table(path: str | Path) -> pa.Table:
    """A metrics file as an Arrow table of exactly `SCHEMA`. Raises MetricsError for any other file."""
    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowInvalid as error:
        raise MetricsError(f"{path} is not Parquet: {error}") from None
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise MetricsError(f"{path} does not have the columns of the metrics' schema: run the stage that writes it")
    return table


def read(path: str | Path) -> pd.DataFrame:
    """A metrics file as a frame with exactly `COLUMNS`, integers nullable. Raises MetricsError for another schema."""
    import pandas as pd

    integers = {pa.int64(): pd.Int64Dtype()}
    return read_table(path).to_pandas(types_mapper=integers.get)


def find_needed_knobs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first knobs, backend before all, that tell the rows apart; none for a single row."""
    needed: list[str] = []
    kinds = 1
    for knob in sorted(KNOBS, key=lambda knob: knob != "backend"):
        more = len({tuple(row[name] for name in (*needed, knob)) for row in rows})
        if more > kinds:
            needed.append(knob)
            kinds = more
    return needed
