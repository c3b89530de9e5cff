"""Provision: measures once a host, compares the `gpu` group, writes the same bytes again."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from stages import fit, metrics, provision
from stages.host import Device, Host
from stages.provision import CEILINGS, HOST, METRICS, check_kernel, compare
from stages.stage import Run

CPU_HOST = Host("A CPU", 2, 24, "Linux x86_64", "3.11")
H200_HOST = Host(
    "A CPU", 16, 128, "Linux x86_64", "3.12", "580.95", "13.0", (Device("NVIDIA H200", "sm_90", 150_754_820_096),)
)
ROOT = Path(__file__).resolve().parents[2]
FILES = (HOST, CEILINGS, METRICS, METRICS.with_suffix(".json"))


@pytest.fixture
def host(workspace, monkeypatch):
    """A host whose description a test sets, and a count of its measurements."""
    state = {"host": CPU_HOST, "measured": 0}
    (workspace / "data/models").mkdir(parents=True)
    (workspace / "data/models/olmo2-tiny").symlink_to(ROOT / "data/models/olmo2-tiny")
    monkeypatch.setattr(provision, "read_host", lambda: state["host"])
    monkeypatch.setattr(provision, "gpu_available", lambda: bool(state["host"].gpus))
    monkeypatch.setattr(provision, "use_gpu", lambda gpu: bool(state["host"].gpus))
    monkeypatch.setattr(fit, "free_gpu_bytes", lambda: state["host"].gpus[0].memory_bytes)
    monkeypatch.setattr(provision, "check_kernel", lambda: {"value": 0.0, "status": "ok"})
    monkeypatch.delenv("AFS_REMEASURE", raising=False)

    def measure(device, **_):
        state["measured"] += 1
        backend = "cuda" if device == "cuda" else "reference"
        yield "read_bandwidth", {"samples": [4.0e12, 4.2e12, 4.1e12], "backend": backend, "note": f"of {device}"}
        yield "copy_bandwidth", {"samples": [4.0e12]}
        yield "matrix_rate", {"samples": [7.0e14], "dtype": "bfloat16" if device == "cuda" else "float32"}

    monkeypatch.setattr(provision, "measure_device", measure)
    return state


def group(name: str):
    from stages.compose import as_dict, compose_conf
    from stages.params import Gpu, select

    return select(Gpu, as_dict(compose_conf([f"gpu={name}"])), None)


def rows(path=METRICS, **where):
    """The rows of a metrics file, as (case, metric) → row."""
    frame: Any = metrics.read(Path("outputs/provision") / path)
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return {(row["case"], row["metric"]): row for row in frame.to_dict("records")}


def content() -> list[bytes]:
    return [(Path("outputs/provision") / file).read_bytes() for file in FILES]


def test_a_cpu_host(host, capsys):
    provision.main([])
    measured = rows(CEILINGS, suite="ceilings")
    assert measured["cpu", "read_bandwidth"]["value"] == 4.1e12
    assert list(measured["cpu", "read_bandwidth"]["samples"]) == [4.0e12, 4.2e12, 4.1e12]
    assert measured["cpu", "read_bandwidth"]["backend"] == "reference"
    assert measured["cpu", "read_bandwidth"]["note"] == "of cpu"
    assert measured["cpu", "matrix_rate"]["dtype"] == "float32"
    for metric in ("read_bandwidth", "copy_bandwidth", "matrix_rate"):
        assert measured["gpu", metric]["status"] == "not_measured"
    assert rows(suite="gpu_group")["auto", "matches_host"]["value"] == 1
    assert "GB of disk free" in capsys.readouterr().out


def test_the_second_run_measures_nothing_and_writes_the_same_bytes(host):
    provision.main([])
    before = content()
    provision.main([])
    assert host["measured"] == 1
    assert content() == before


def test_another_host_is_measured_and_going_back_restores(host):
    provision.main([])
    before = content()
    host["host"] = H200_HOST
    provision.main([])
    assert host["measured"] == 3
    assert rows(CEILINGS)["gpu", "matrix_rate"]["dtype"] == "bfloat16"
    host["host"] = CPU_HOST
    provision.main([])
    assert host["measured"] == 3
    assert content() == before


def test_remeasure(host, monkeypatch):
    provision.main([])
    monkeypatch.setenv("AFS_REMEASURE", "1")
    provision.main([])
    assert host["measured"] == 2


def test_ceilings_of_another_ruler_are_measured_again(host, monkeypatch):
    provision.main([])
    monkeypatch.setattr(provision, "RULER", "another")
    provision.main([])
    assert host["measured"] == 2


def test_damaged_memory_is_measured_again(host, tmp_path):
    provision.main([])
    (kept,) = (tmp_path / "cache/ceilings").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    provision.main([])
    assert host["measured"] == 2


def test_the_wanted_gpu_gives_datasheet_limits(host):
    host["host"] = H200_HOST
    provision.main(["gpu=h200"])
    found = rows(suite="ceilings")
    assert (found["gpu", "copy_bandwidth"]["limit"], found["gpu", "matrix_rate"]["limit"]) == (4.8e12, 989.4e12)
    assert found["gpu", "copy_bandwidth"]["limit_kind"] == "datasheet of h200"
    assert found["cpu", "copy_bandwidth"]["limit"] != found["cpu", "copy_bandwidth"]["limit"]
    assert rows(suite="gpu_group")["h200", "matches_host"]["value"] == 1


def test_another_gpu_is_a_row_not_an_error(host):
    host["host"] = H200_HOST
    provision.main(["gpu=rtx5090"])
    row = rows(suite="gpu_group")["rtx5090", "matches_host"]
    assert (row["status"], row["value"]) == ("failed", 0)
    assert "NVIDIA H200 is sm_90, rtx5090 is sm_120" in row["note"] and "built for sm_120" in row["note"]
    ceiling = rows(suite="ceilings")["gpu", "copy_bandwidth"]
    assert ceiling["status"] == "ok" and ceiling["limit"] != ceiling["limit"]


def test_no_gpu_where_one_is_wanted_is_a_row_not_an_error(host):
    provision.main(["gpu=rtx5090"])
    row = rows(suite="gpu_group")["rtx5090", "matches_host"]
    assert row["status"] == "not_measured" and row["value"] != row["value"]
    assert "built for sm_120" in row["note"]


def test_comparison(workspace):
    assert (
        compare(H200_HOST, group("h200")) == compare(H200_HOST, group("auto")) == compare(CPU_HOST, group("cpu")) == []
    )
    assert compare(H200_HOST, group("h100")) == ["NVIDIA H200 has 151 GB, h100 has 80"]
    a100 = compare(H200_HOST, group("a100_80g"))
    assert a100[0] == "NVIDIA H200 is sm_90, a100_80g is sm_80" and len(a100) == 2


def test_under_dvc_the_pipeline_s_paths_are_written(host, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "provision")
    provision.main([])
    assert all(path.exists() for path in FILES)
    assert not Path("outputs").exists()


def test_a_kernel_that_fails_is_a_row(monkeypatch):
    broken = ModuleType("kernels.residual")
    broken.add = lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel image\nfor this device"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels.residual", broken)
    monkeypatch.setattr("kernels.residual", broken, raising=False)
    row = check_kernel()
    assert row["status"] == "failed" and row["value"] is None and row["note"]


def refused(capsys, *overrides: str) -> tuple[int, str]:
    """The exit status and the one line of a run that is to change nothing."""
    with pytest.raises(SystemExit) as exit:
        provision.main(list(overrides))
    assert not Path("outputs").exists() and not HOST.exists()
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return int(str(exit.value.code)), err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("workload.repeats=0", "workload.repeats = 0: input should be greater than or equal to 1"),
        (
            "weeks.w05.engine.attention=flahs",
            "weeks.w05.engine.attention = 'flahs': input should be 'naive' or 'flash'",
        ),
        (
            "weeks.w05.bench=[kernels,pears]",
            "weeks.w05.bench.1 = 'pears': unknown suite; there are: baseline, tokenizer",
        ),
        ("model.path=/no/such", "model.path = '/no/such': should be a folder"),
        ("+foo=1", "foo = 1: unknown key; there are gpu, model, workload, weeks"),
    ],
)
def test_by_hand_it_refuses_before_it_measures(host, capsys, override, words):
    assert words in refused(capsys, override)[1]
    assert host["measured"] == 0


def test_under_dvc_it_refuses_what_params_yaml_says(host, capsys, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "provision")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["weeks"]["w08"]["engine"]["linear"] = "fast"
    params["workload"]["repeats"] = "abc"
    params["foo"] = 1
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    status, line = refused(capsys)
    assert status == 2
    assert all(key in line for key in ("foo = 1", "weeks.w08.engine.linear = 'fast'", "workload.repeats = 'abc'"))


def test_a_model_too_large_is_refused_and_what_fits_is_said_in_a_line(host, capsys, monkeypatch):
    monkeypatch.setattr(fit, "free_host_bytes", lambda: 23 * 10**9)
    status, line = refused(capsys, "model=llama3_8b", "model.weights=random")
    assert status == 1 and "llama3_8b does not fit this machine: 32.1 GB of memory" in line
    provision.main([])
    assert "olmo2_tiny from bundled needs 0.0 kB of disk (" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_refused(host, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFS_CACHE", str(tmp_path / "file"))
    assert refused(capsys) == (1, f"error: provision: {tmp_path}/file/ceilings cannot be written (Not a directory): "
                                  "set AFS_CACHE to a folder that can be\n")  # fmt: skip


@pytest.mark.gpu
def test_a_kernel_runs_on_this_gpu():
    assert check_kernel() == {"value": 0.0, "status": "ok"}


@pytest.mark.gpu
def test_ceilings_of_this_gpu_are_plausible():
    found = dict(provision.measure_device("cuda", 1024, 4096, 5))
    assert all(min(found[metric]["samples"]) > 1e11 for metric in ("read_bandwidth", "copy_bandwidth"))
    assert min(found["matrix_rate"]["samples"]) > 1e13
    assert (found["read_bandwidth"]["backend"], found["read_bandwidth"]["note"]) == ("cuda", "read by kernels.read")


def test_measuring_a_cpu():
    found = dict(provision.measure_device("cpu", 4, 64, 2))
    assert set(found) == {"read_bandwidth", "copy_bandwidth", "matrix_rate"}
    assert all(len(fields["samples"]) == 2 and min(fields["samples"]) > 0 for fields in found.values())
    read = found["read_bandwidth"]
    assert (read["backend"], read["note"]) == ("reference", "read by torch's sum")


def test_a_read_that_fails_is_a_row(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr("engine.bench.ceilings.measure_read", fail)
    (metric, fields), *_ = provision.measure_device("cpu", 4, 64, 2)
    rows = metrics.Rows("provision", None, None, CPU_HOST)
    provision.add_ceiling(rows, "cpu", metric, fields)
    (row,) = rows.rows
    assert (row["status"], row["value"], row["note"]) == ("failed", None, "RuntimeError: no kernel image")


def test_by_hand_and_pipeline_do_not_mix(host):
    provision.main([])
    assert Run("bench", by_hand=True).find(HOST) == Path("outputs/provision") / HOST
    assert not HOST.exists()
