"""stages/headlines.py: few figures, named for people, of whole runs as they are in the repository."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_dvc import paths, pipeline, read_hidden

from stages import headlines, metrics
from stages.compose import as_dict, compose_conf
from stages.host import Device, Host

ROOT = Path(__file__).resolve().parents[2]
H200 = Device("NVIDIA H200", "sm_90", 150_000_000_000)
HOST = Host("A CPU", 2, 24, "Linux x86_64", "3.11", "580.1", "13.0", (H200,), {"torch": "2"})
RECORDED = sorted(path for path in (ROOT / "reports/recorded").glob("*/*") if path.is_dir())


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def flatten(value: Any, place: str = "") -> dict[str, Any]:
    """As DVC does: "a.b" → leaf."""
    if not isinstance(value, dict):
        return {place: value}
    return {
        name: leaf for key, inner in value.items() for name, leaf in flatten(inner, f"{place}.{key}".strip(".")).items()
    }


def read_committed() -> dict[str, float]:
    """All that `dvc metrics show` prints of the run that is committed; no name twice."""
    written = [path for path in ROOT.glob("reports/metrics/*.json") if path.name != "engine_manifest.json"]
    files = [flatten(json.loads(path.read_text())) for path in sorted(written)]
    found = {name: value for file in files for name, value in file.items()}
    assert len(found) == sum(map(len, files)), "DVC puts the file before a name that is there twice"
    return found


def read_recorded(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*.parquet")):
        found |= headlines.list_headlines(metrics.read_table(path).to_pylist())
    return found


def test_the_committed_run_fits_a_screen():
    found = read_committed()
    assert 25 <= len(found) <= headlines.BUDGET
    assert {"w06.decode_b1_ctx128.tpot_ms", "w06.parity.worst_ratio", "w06.parity.checks_failed"} <= set(found)
    assert {"build.spills", "build.seconds", "host.matrix_tflops", "w02.load_warm.load_gbs"} <= set(found)
    assert all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+){1,2}", name) for name in found)
    assert all(isinstance(value, int | float) for value in found.values())


@pytest.mark.parametrize("folder", RECORDED, ids=lambda path: "-".join(path.parts[-2:]))
def test_recorded_runs_fit_a_screen_and_have_the_same_names(folder: Path):
    found = read_recorded(folder)
    assert 10 <= len(found) <= headlines.BUDGET
    week = min(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.parquet"))
    assert {"host.read_gb_per_s", f"{week}.decode_b1_ctx128.tpot_ms", f"{week}.prefill_1024.ttft_ms"} <= set(found)


def test_exp_show_has_few_columns():
    """The columns that `make experiments` leaves where an experiment took another GPU, model and number of tokens."""
    before, after = (
        flatten(as_dict(compose_conf(overrides)))
        for overrides in ([], ["gpu=rtx5090", "model=olmo2_7b", "model.weights=random", "workload.new_tokens=64"])
    )
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    deps = {dep for stage in pipeline().values() for dep in paths(stage, "deps")} - {"stages", "engine", "kernels"}
    columns = [
        "Experiment",
        "Created",
        "State",
        "Executor",
        *timed(read_committed()),
        "checkpoint.parameters",
        *changed,
        *sorted(deps),
    ]
    shown = [name for name in columns if not re.match(read_hidden(), name)]
    assert len(shown) <= headlines.COLUMNS, shown
    assert {"gpu.name", "model.name", "model.weights", "workload.new_tokens", "w06.decode_b1_ctx128.tpot_ms"} <= set(
        shown
    )


def timed(found: dict[str, float]) -> list[str]:
    """The headlines that no two runs have equal."""
    return [name for name in found if not re.search(r"parity\.|spills|host\.|checkpoint\.", name)]


def make_rows(stage: str = "bench", week: str | None = "w06") -> metrics.Rows:
    return metrics.Rows(stage, week, "olmo2_tiny", HOST)


def add(rows: metrics.Rows, suite: str, case: str, metric: str, value: float | None = 1.0, **fields: Any) -> None:
    shared: dict[str, Any] = {"suite": suite, "case": case, "metric": metric, "unit": "1", "better": "lower"}
    if value is None:
        rows.missing(**shared, reason="no GPU", **fields)
    else:
        rows.add(**shared, value=value, **fields)


def test_a_case_stands_for_its_suite_and_is_named():
    rows = make_rows()
    for batch, context, value in ((8, 128, 9.0), (1, 1024, 8.0), (1, 200, 1.23456), (1, 16, 7.0)):
        add(rows, "standard_decode", f"{batch} {context}", "tpot_ms", value, batch=batch, context=context)
    for prompt in (128, 900):
        add(rows, "standard_prefill", f"{prompt}", "ttft_ms", float(prompt), prompt_tokens=prompt)
    for clients in (4, 32):
        for metric in ("output_throughput", "ttft_ms_p99"):
            add(rows, "serve", f"{clients} clients", metric, 0.5, batch=clients)
    add(rows, "serve", "8 requests/s", "output_throughput", 0.5)
    assert json.loads(headlines.as_json(rows.rows)) == {
        "w06": {
            "prefill_900": {"ttft_ms": 900},
            "decode_b1_ctx200": {"tpot_ms": 1.235},
            "serve_4_clients": {"ttft_ms_p99": 0.5},
        }
    }


def test_what_was_not_measured_is_not_there():
    rows = make_rows()
    add(rows, "standard_decode", "a", "tpot_ms", None, batch=1, context=128, backend="cuda")
    assert (
        headlines.as_json(rows.rows) == "{}\n"
        and headlines.as_csv(rows.rows) == "case,ttft_ms,tpot_ms,output_throughput\n"
    )
    add(rows, "standard_decode", "a", "tpot_ms", 2.0, batch=1, context=128, backend="reference")
    assert headlines.list_headlines(rows.rows) == {"w06.decode_b1_ctx128.tpot_ms": 2.0}
    assert headlines.as_json([]) == "{}\n"


def test_parity_says_how_many_checks_failed_and_the_worst_ratio():
    rows = make_rows("parity")
    for case, ratio in (("layers.0", 0.9), ("logits", 1.1)):
        add(rows, "layers", case, "error_ratio", ratio)
    add(rows, "text", "prompt 0", "first_divergence_margin", 3.0, status="failed", note="3 times the 1 allowed")
    assert headlines.list_headlines(rows.rows) == {"w06.parity.worst_ratio": 1.1, "w06.parity.checks_failed": 1}


def test_build_says_how_many_kernels_spill():
    rows = make_rows("build", None)
    for case, spilled in (("a sm_80", 0), ("a sm_90a", 16), ("b sm_80", 8)):
        add(rows, "resources", case, "spill_bytes", spilled)
    add(rows, "compilation", "all kernels", "seconds", 12.34567)
    assert json.loads(headlines.as_json(rows.rows)) == {"build": {"spills": 2, "seconds": 12.35}}


@pytest.mark.parametrize(("gpu", "expected"), [(4.8e12, 4800), (None, 31.8)])
def test_the_host_is_its_gpu_or_its_cpu(gpu: float | None, expected: float):
    rows = make_rows("provision", None)
    for metric in ("copy_bandwidth", "read_bandwidth"):
        add(rows, "ceilings", "cpu", metric, 3.18e10)
        add(rows, "ceilings", "gpu", metric, gpu)
    assert json.loads(headlines.as_json(rows.rows)) == {"host": {"read_gb_per_s": expected, "copy_gb_per_s": expected}}


def test_plots_have_a_line_a_measured_case_and_always_the_same_columns():
    rows = make_rows()
    add(rows, "standard_decode", "decode, batch 1", "tpot_ms", 2.5)
    add(rows, "standard_decode", "decode, batch 1", "ttft_ms", 7.0)
    add(rows, "standard_decode", "decode, batch 1", "e2e_ms", 70.0)
    add(rows, "kernels", "qkv", "output_throughput", 1.0)
    assert headlines.as_csv(rows.rows) == ('case,ttft_ms,tpot_ms,output_throughput\n"decode, batch 1",7,2.5,\n')
