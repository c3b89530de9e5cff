"""stages/build.py: rows of real builds, and spills that fail the stage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipeline as tiny

from kernels import residual
from kernels.launch import Build
from stages import build
from stages.params import Weeks
from stages.stage import Run, StageError

WEEKS = Weeks({"w01": tiny.make_week(engine=None), "w04": tiny.make_week()})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def compiled() -> list[Build]:
    with pytest.MonkeyPatch.context() as patch:
        # The compiling processes start anew; this one may have the simulator on.
        patch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
        return build.build_kernels([residual.naive("f32")], ["sm_80", "sm_120"])


def run_stage(monkeypatch: pytest.MonkeyPatch, builds: list[Build]) -> None:
    monkeypatch.setattr(build, "build_kernels", lambda _kernels, _archs: builds)
    build.main.__wrapped__(Run("build"), tiny.GPU, WEEKS)  # type: ignore[attr-defined]


def test_a_row_for_each_resource_and_instruction(here: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Build]):
    run_stage(monkeypatch, compiled)
    frame = tiny.read("reports/metrics/build.parquet")
    name = compiled[0].kernel
    assert set(frame.case) == {f"{name} sm_80", f"{name} sm_120"} and set(frame.status) == {"ok"}
    values = frame[frame.case == f"{name} sm_80"].set_index("metric").value
    assert values["registers"] == compiled[0].registers > 0
    assert values["spill_bytes"] == 0 and 0 < values["theoretical_occupancy"] <= 1
    assert values["instructions.ld.global"] == compiled[0].instructions["ld.global"] > 0
    assert values["shared_bytes_static"] == 0 and values["threads"] == compiled[0].threads
    manifest = json.loads(Path("reports/metrics/engine_manifest.json").read_text())
    assert manifest["weeks"]["w01"] is None and manifest["weeks"]["w04"]["attention"] == "naive"
    assert name in manifest["kernels"]


def test_spills_fail_the_stage_unless_explained(here: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Build]):
    spilling = [replace(compiled[0], spill_stores=8, spill_loads=16), compiled[1]]
    with pytest.raises(StageError, match=rf"{compiled[0].kernel} sm_80 spills 24 bytes"):
        run_stage(monkeypatch, spilling)
    assert not Path("reports/metrics/build.parquet").exists()
    frame = tiny.read("reports/metrics/build.failed.parquet")
    assert list(frame[frame.status == "failed"].metric) == ["spill_bytes"]
    monkeypatch.setitem(build.EXPLAINED_SPILLS, compiled[0].kernel, "two bytes an hour")
    run_stage(monkeypatch, spilling)
    assert not Path("reports/metrics/build.failed.parquet").exists()
    frame = tiny.read("reports/metrics/build.parquet")
    assert set(frame[frame.value == 24].note) == {"two bytes an hour"}
