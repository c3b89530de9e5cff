"""stages/build.py: rows of builds, and spills that fail the stage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipeline as tiny

from kernels.cubins import Build
from stages import build
from stages.exits import StageError
from stages.stage import Run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_build(arch: str) -> Build:
    return Build(
        kernel="residual_naive_f32", arch=arch, registers=10, spill_stores=0, spill_loads=0, stack=0, static_shared=0,
        dynamic_shared=0, threads=128, blocks_per_sm=16, occupancy=1.0, instructions={"ld.global": 2, "st.global": 1},
        assembler="ptxas 13.0.88", cubin=b"",
    )  # fmt: skip


@pytest.fixture
def compiled() -> list[Build]:
    return [make_build(arch) for arch in ("sm_80", "sm_120")]


def run_stage(monkeypatch: pytest.MonkeyPatch, builds: list[Build]) -> None:
    monkeypatch.setattr("engine.runtime.progress.compile_kernels", lambda _kernels, _archs: builds)
    build.main.__wrapped__(Run("build"), tiny.GPU)  # type: ignore[attr-defined]


def test_a_row_for_each_resource_and_instruction(here: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Build]):
    run_stage(monkeypatch, compiled)
    frame = tiny.read("reports/metrics/build.parquet")
    name = compiled[0].kernel
    assert set(frame.case) == {f"{name} sm_80", f"{name} sm_120", "all kernels"} and set(frame.status) == {"ok"}
    values = frame[frame.case == f"{name} sm_80"].set_index("metric").value
    assert values["registers"] == compiled[0].registers > 0
    assert values["spill_bytes"] == 0 and 0 < values["theoretical_occupancy"] <= 1
    assert values["instructions.ld.global"] == compiled[0].instructions["ld.global"] > 0
    assert values["shared_bytes_static"] == 0 and values["threads"] == compiled[0].threads
    manifest = json.loads(Path("reports/metrics/engine_manifest.json").read_text())
    assert "residual_naive_bf16" in manifest["kernels"] and "sm_90a" in manifest["architectures"]


def test_spills_fail_the_stage_unless_explained(here: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Build]):
    spilling = [replace(compiled[0], spill_stores=8, spill_loads=16), compiled[1]]
    with pytest.raises(StageError, match=rf"{compiled[0].kernel} sm_80 spills 24 bytes"):
        run_stage(monkeypatch, spilling)
    assert not Path("reports/metrics/build.parquet").exists()
    frame = tiny.read("reports/metrics/build.failed.parquet")
    assert list(frame[frame.status == "failed"].metric) == ["spill_bytes"]
    assert json.loads(Path("reports/metrics/build.json").read_text())["build"]["spills"] == 1
    monkeypatch.setitem(build.EXPLAINED_SPILLS, compiled[0].kernel, "two bytes an hour")
    run_stage(monkeypatch, spilling)
    assert not Path("reports/metrics/build.failed.parquet").exists()
    frame = tiny.read("reports/metrics/build.parquet")
    assert set(frame[frame.value == 24].note) == {"two bytes an hour"}
