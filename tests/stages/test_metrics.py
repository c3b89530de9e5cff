"""The metrics table: its schema, what is refused, and what DVC reads of it."""

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import metrics
from stages.host import Device, Host
from stages.metrics import COLUMNS, MetricsError, Rows

H200 = Device("NVIDIA H200", "sm_90", 150_000_000_000)
HOST = Host("A CPU", 2, 24, "Linux x86_64", "3.11", "580.1", "13.0", (H200,), {"torch": "2"})
ROW: dict[str, Any] = {"suite": "decode", "case": "batch 1", "metric": "tpot_ms", "unit": "ms", "better": "lower"}


@pytest.fixture
def rows() -> Rows:
    return Rows("bench", "w04", "olmo2_tiny", HOST)


def test_columns_are_the_design_s():
    assert list(COLUMNS) == [
        "stage", "week", "suite", "case", "metric", "value", "unit", "better", "status", "samples", "limit",
        "limit_kind", "model", "dtype", "quantization", "backend", "batch", "prompt_tokens", "new_tokens", "context",
        "tensor_parallel", "kernel_versions", "gpu", "driver", "cuda", "packages", "commit", "other_load", "note",
    ]  # fmt: skip


def test_round_trip(rows, tmp_path):
    rows.add(**ROW, value=None, samples=[3, 1, 2], limit=0.5, limit_kind="read bandwidth", batch=1, dtype="bfloat16",
             kernel_versions={"linear": "naive", "attention": "naive"})  # fmt: skip
    rows.missing(**ROW, reason="no GPU", batch=8)
    rows.write(tmp_path / "bench.parquet")
    frame = metrics.read(tmp_path / "bench.parquet")
    assert list(frame.columns) == list(COLUMNS)
    first, second = frame.to_dict("records")
    assert (first["value"], list(first["samples"]), first["status"]) == (2.0, [3.0, 1.0, 2.0], "ok")
    assert (first["stage"], first["week"], first["model"], first["batch"]) == ("bench", "w04", "olmo2_tiny", 1)
    assert (first["gpu"], first["driver"], first["cuda"], first["packages"]) == (
        "NVIDIA H200", "580.1", "13.0", '{"torch": "2"}',
    )  # fmt: skip
    assert first["kernel_versions"] == '{"attention": "naive", "linear": "naive"}'
    assert math.isnan(second["value"]) and second["status"] == "not_measured" and second["note"] == "no GPU"
    assert pd.isna(second["prompt_tokens"])


def test_the_same_rows_are_the_same_bytes(rows, tmp_path):
    rows.add(**ROW, value=1.5)
    for name in ("a.parquet", "b.parquet"):
        rows.write(tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize("stage", ["baseline", "bench"])
def test_what_was_timed_says_what_others_took(stage, tmp_path, monkeypatch):
    rows = Rows(stage, None, None, HOST)
    rows.add(**ROW, value=1)
    monkeypatch.setattr(rows, "_load", SimpleNamespace(share=lambda: 0.4))
    rows.write(tmp_path / "rows.parquet")
    monkeypatch.setattr(rows, "_load", SimpleNamespace(share=lambda: 0.8))
    rows.write(tmp_path / "rows.parquet")
    assert metrics.read(tmp_path / "rows.parquet")["other_load"].tolist() == [0.4]


def test_a_cpu_host_says_so():
    rows = Rows("bench", None, None, Host("A CPU", 2, 24, "Linux x86_64", "3.11"))
    rows.add(**ROW, value=1)
    assert rows.rows[0]["gpu"] == "cpu"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": float("nan")}, "not finite"),
        ({"value": 1.0, "samples": [1.0, math.inf]}, "not finite"),
        ({"value": None}, "a measured row has a value"),
        ({"value": 1.0, "better": "more"}, "better 'more'"),
        ({"value": 1.0, "status": "failed"}, "says why"),
        ({"value": 1.0, "status": "fine"}, "status 'fine'"),
        ({"value": 1.0, "limit": 2.0}, "limit_kind"),
        ({"value": 1.0, "unit": ""}, "unit must be given"),
    ],
)
def test_bad_rows(rows, tmp_path, change, words):
    rows.add(**(ROW | change))
    with pytest.raises(MetricsError, match=words):
        rows.write(tmp_path / "bench.parquet")
    assert list(tmp_path.iterdir()) == []


def test_unknown_columns_are_refused(rows):
    with pytest.raises(MetricsError, match="no such column: batches"):
        rows.add(**ROW, value=1.0, batches=2)


def test_the_same_measurement_twice_is_refused(rows, tmp_path):
    rows.add(**ROW, value=1.0, batch=1)
    rows.add(**ROW, value=2.0, batch=1)
    with pytest.raises(MetricsError, match=r"bench/w04/decode/batch 1/tpot_ms: the same measurement twice"):
        rows.write(tmp_path / "bench.parquet")


def test_values_of_the_wrong_type_are_refused(rows, tmp_path):
    rows.add(**ROW, value=1.0, batch="one")
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        rows.write(tmp_path / "bench.parquet")
    assert list(tmp_path.iterdir()) == []


def test_what_dvc_reads_is_there_for_stages_that_have_headlines(tmp_path):
    read = {"bench": {".json", ".csv"}, "parity": {".json"}, "baseline": set()}
    for stage, endings in read.items():
        rows = Rows(stage, "w04", "olmo2_tiny", HOST)
        rows.add(**ROW, value=2.5)
        (tmp_path / stage).mkdir()
        rows.write(tmp_path / stage / "rows.parquet")
        assert {path.suffix for path in (tmp_path / stage).iterdir()} == endings | {".parquet"}


def test_no_rows_are_a_file_all_the_same(rows, tmp_path):
    rows.write(tmp_path / "parity.parquet")
    assert len(metrics.read(tmp_path / "parity.parquet")) == 0
    assert (tmp_path / "parity.json").read_text() == "{}\n"


def test_other_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"metric": ["ttft_ms"]}), tmp_path / "other.parquet")
    with pytest.raises(MetricsError, match="does not have the columns"):
        metrics.read(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(MetricsError, match="is not Parquet"):
        metrics.read(tmp_path / "cut.parquet")
