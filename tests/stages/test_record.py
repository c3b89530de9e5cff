"""`make record`: one GPU's run, whole and passed, is kept under its own names."""

from pathlib import Path

import pytest

from stages import metrics
from stages.host import Device, Host
from stages.metrics import Rows
from stages.record import record
from stages.stage import StageError


def host(gpu: str | None) -> Host:
    gpus = (Device(gpu, "sm_90", 2**37),) if gpu else ()
    return Host(
        cpu="a CPU", cores=2, memory_gib=8, system="Linux x86_64", python="3.11", driver="580.1" if gpu else None,
        cuda="13.0" if gpu else None, gpus=gpus, packages={},
    )  # fmt: skip


def write(folder: Path, name: str, model: str, gpu: str | None = "NVIDIA H200") -> None:
    rows = Rows(name.partition("_")[0], "w01", model, host(gpu))
    rows.add(suite="s", case="c", metric="m", value=1.0, unit="ms", better="lower")
    rows.write(folder / f"{name}.parquet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "reports" / "metrics"
    folder.mkdir(parents=True)
    write(folder, "baseline", "olmo2_1b")
    write(folder, "parity_w03", "llama_shape")
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "host.json").write_text("{}")
    return folder


def test_keeps_the_files_under_the_gpu_and_the_baselines_model(run: Path, tmp_path: Path):
    recorded = tmp_path / "recorded"
    (recorded / "nvidia-h200" / "olmo2_1b").mkdir(parents=True)
    (recorded / "nvidia-h200" / "olmo2_1b" / "older.parquet").write_text("")
    kept = record(run, recorded)
    assert kept == recorded / "nvidia-h200" / "olmo2_1b"
    assert {file.name for file in kept.iterdir()} == {"baseline.parquet", "parity_w03.parquet", "host.json"}
    assert metrics.read(kept / "baseline.parquet")["value"].tolist() == [1.0]


def test_refuses_what_is_not_one_whole_passed_gpu_run(run: Path, tmp_path: Path):
    recorded = tmp_path / "recorded"
    write(run, "bench_w03", "olmo2_1b", "NVIDIA A100")
    with pytest.raises(StageError, match="as gpu: NVIDIA A100, NVIDIA H200"):
        record(run, recorded)
    (run / "bench_w03.parquet").rename(run / "bench_w03.failed.parquet")
    with pytest.raises(StageError, match="failed run is not recorded"):
        record(run, recorded)
    (run / "bench_w03.failed.parquet").unlink()
    (run / "baseline.parquet").unlink()
    with pytest.raises(StageError, match=r"baseline\.parquet is missing"):
        record(run, recorded)
    with pytest.raises(StageError, match="holds no Parquet"):
        record(tmp_path, recorded)
    write(run, "baseline", "olmo2_1b", None)
    (run / "parity_w03.parquet").unlink()
    with pytest.raises(StageError, match="as driver: none"):
        record(run, recorded)
    assert not recorded.exists()
