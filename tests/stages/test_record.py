"""`make record`: a GPU's run, whole, passed, of one commit and not noisy, is kept beside those recorded before."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny

from stages import metrics, record
from stages.exits import StageError
from stages.host import Device, Host
from stages.metrics import Rows

H200, COMMIT, OTHER = "NVIDIA H200", "a" * 40, "b" * 40
WEEKS = {
    "w01": tiny.make_week(),
    "w03": tiny.make_week(("layers",), ("standard_decode",)),
    "w04": tiny.make_week(("layers", "text"), ("standard_decode",)),
}
QUIET, NOISY = [10.0, 10.1, 10.2, 9.9, 10.0], [8.0, 9.0, 10.0, 11.0, 12.0]
KEPT = {"provision", "inventory", "baseline", "build", "parity_w01", "bench_w01", "parity_w03", "bench_w03"}


def host(gpu: str | None = H200, driver: str = "580.1") -> Host:
    gpus = (Device(gpu, "sm_90", 2**37),) if gpu else ()
    return Host(
        cpu="a CPU", cores=2, memory_gib=8, system="Linux x86_64", python="3.11", driver=driver if gpu else None,
        cuda="13.0" if gpu else None, gpus=gpus, packages={},
    )  # fmt: skip


def write(
    folder: Path, name: str, commit: str | None = COMMIT, on: Host | None = None, model: str = "olmo2_1b", **fields: Any
) -> None:
    """The file of a stage, with a row or, of parity_w01, none; `fields` change the row."""
    stage, _, week = name.removesuffix(".failed").partition("_")
    rows = Rows(stage, week or None, model, on or host())
    rows.common["commit"] = commit
    row: dict[str, Any] = {"suite": "s", "case": "c", "metric": "m", "unit": "1", "better": "higher", "value": 1.0}
    if stage == "provision":
        row |= {"suite": "gpu_group", "case": "h200", "metric": "matches_host"}
    elif stage in ("bench", "baseline"):
        row |= {"suite": "standard_decode", "case": "decode batch 1 context 128", "metric": "tpot_ms", "unit": "ms"}
        row |= {"better": "lower", "value": None, "samples": QUIET, "backend": "cuda", "batch": 1}
    if name != "parity_w01" or fields:
        row |= fields
        if reason := row.pop("reason", None):
            del row["value"]
            rows.missing(reason=reason, **row)
        else:
            rows.add(**row)
    rows.write(folder / f"{name}.parquet")


def make_run(root: Path, on: Host | None = None, weeks: tuple[str, ...] = ("w01", "w03"), **fields: Any) -> Path:
    """A whole run's reports/metrics."""
    folder = root / "reports" / "metrics"
    folder.mkdir(parents=True)
    (root / "data").mkdir()
    (root / "data" / "host.json").write_text((on or host()).as_json())
    for name in (*record.SHARED, *(f"{kind}_{week}" for week in weeks for kind in record.OF_WEEK)):
        write(folder, name, on=on, **fields)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return tmp_path / "recorded"


def keep(run: Path, recorded: Path, *weeks: str, reason: str | None = None) -> Path:
    return record.record(run, recorded, WEEKS, weeks or None, reason)


def refused(run: Path, recorded: Path, *weeks: str, reason: str | None = None) -> str:
    """Why the run is refused; nothing is written then."""
    before = {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}
    with pytest.raises(StageError) as error:
        keep(run, recorded, *weeks, reason=reason)
    assert {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()} == before
    return str(error.value)


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.parquet")}


def commits(folder: Path, name: str) -> list[str]:
    rows: Any = metrics.read(folder / f"{name}.parquet")
    return rows["commit"].tolist()


# --- a run that is as it should be ------------------------------------------------------------------------------------


def test_it_is_kept_under_the_gpu_and_the_baselines_model(run: Path, recorded: Path):
    write(run, "parity_w03", model="llama_shape")  # parity also has models of other shapes
    kept = keep(run, recorded)
    assert kept == recorded / "nvidia-h200" / "olmo2_1b"
    assert {file.name for file in kept.iterdir()} == {f"{name}.parquet" for name in KEPT} | {"host.json"}
    for name in KEPT:
        assert (kept / f"{name}.parquet").read_bytes() == (run / f"{name}.parquet").read_bytes()
    assert {path.name for path in recorded.iterdir()} == {"nvidia-h200", "commits.json"}


def test_again_replaces_what_has_the_same_name(run: Path, recorded: Path):
    kept = keep(run, recorded)
    for name in (*record.SHARED, "bench_w01", "parity_w03", "bench_w03"):
        write(run, name, OTHER)
    assert keep(run, recorded) == kept and commits(kept, "bench_w03") == [OTHER] and names(kept) == KEPT


def test_shared_measurements_may_be_older_but_build_may_not(run: Path, recorded: Path):
    for name in ("provision", "inventory", "baseline"):
        write(run, name, OTHER)
    keep(run, recorded)
    write(run, "build", OTHER)
    assert f"build.parquet: measured at {OTHER}; should be {COMMIT}, as bench_w01" in refused(run, recorded)


# --- weeks beside others ----------------------------------------------------------------------------------------------


def test_weeks_are_promoted_beside_others_of_the_same_machine(run: Path, recorded: Path, tmp_path: Path):
    kept = keep(run, recorded)
    before = {name: (kept / f"{name}.parquet").read_bytes() for name in KEPT}
    later = make_run(tmp_path / "later", weeks=("w03", "w04"))
    for name in (*record.SHARED, "parity_w03", "bench_w03", "parity_w04", "bench_w04"):
        write(later, name, OTHER)
    assert keep(later, recorded, "w04") == kept
    assert names(kept) == KEPT | {"parity_w04", "bench_w04"}
    changed = {name for name in KEPT if (kept / f"{name}.parquet").read_bytes() != before[name]}
    assert changed == {"build"} and commits(kept, "bench_w04") == commits(kept, "build") == [OTHER]


def test_a_run_without_a_week_leaves_that_week(run: Path, recorded: Path, tmp_path: Path):
    keep(run, recorded)
    kept = keep(make_run(tmp_path / "later", weeks=("w04",)), recorded)
    assert names(kept) == KEPT | {"parity_w04", "bench_w04"}


def test_the_first_weeks_bring_what_they_were_measured_with(run: Path, recorded: Path):
    assert names(keep(run, recorded, "w03")) == {*record.SHARED, "parity_w03", "bench_w03"}


@pytest.mark.parametrize("weeks", [(), ("w04",)])
def test_weeks_of_another_driver_are_not_mixed(run: Path, recorded: Path, tmp_path: Path, weeks: tuple[str, ...]):
    keep(run, recorded)
    later = make_run(tmp_path / "later", host(driver="590.2"), ("w04",))
    said = refused(later, recorded, *weeks, reason="never mind")
    assert "parity_w03.parquet: s, c, m: driver is '580.1'; should be '590.2', as in this run: it would stay" in said
    assert str(recorded / "nvidia-h200/olmo2_1b/parity_w03.parquet") in said


def test_what_is_wrong_with_other_weeks_does_not_matter(run: Path, recorded: Path):
    write(run, "bench_w03", OTHER, samples=NOISY)
    write(run, "parity_w04.failed", value=2.0, status="failed", note="2, 2 times the 1 allowed")
    assert names(keep(run, recorded, "w01")) == {*record.SHARED, "parity_w01", "bench_w01"}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_whole(run: Path, recorded: Path, tmp_path: Path):
    assert "holds no Parquet files: run the pipeline first" in refused(tmp_path, recorded)
    for name in ("baseline", "bench_w03", "parity_w03"):
        (run / f"{name}.parquet").unlink()
        assert f"{run / name}.parquet is missing: run the pipeline first" in refused(run, recorded)
        write(run, name)
    assert "bench_w04.parquet is missing" in refused(run, recorded, "w01", "w04").replace("parity", "bench")
    for name in ("parity_w01", "bench_w01", "parity_w03", "bench_w03"):
        (run / f"{name}.parquet").unlink()
    assert "holds no week" in refused(run, recorded)


def test_a_failed_check_of_parity(run: Path, recorded: Path):
    (run / "parity_w03.parquet").unlink()
    write(run, "parity_w03.failed", value=2.0, status="failed", note="2, 2 times the 1 allowed")
    said = refused(run, recorded, reason="never mind")
    assert "parity_w03.failed.parquet: a failed run is not recorded: s, c, m: 2, 2 times the 1 allowed" in said


@pytest.mark.parametrize("name", ["provision", "parity_w03", "bench_w03"])
def test_a_failed_row(run: Path, recorded: Path, name: str):
    write(run, name, status="failed", note="is sm_80, h200 is sm_90")
    said = refused(run, recorded, reason="never mind")
    assert f"  {name}.parquet: " in said and " failed: is sm_80, h200 is sm_90; should be ok" in said
    assert "--force REASON" not in said


def test_a_week_whose_checks_were_not_made(run: Path, recorded: Path):
    write(run, "parity_w03", reason="no tokenizer")
    said = refused(run, recorded, reason="never mind")
    assert "parity_w03.parquet: has no row that is ok; should have some of: layers" in said


def test_a_week_that_is_none(tmp_path: Path, recorded: Path):
    run = make_run(tmp_path / "run", weeks=("w99",))
    assert "bench_w99.parquet: is of week w99; should be one of params.yaml's: w01, w03, w04" in refused(run, recorded)


def test_rows_of_another_machine(run: Path, recorded: Path):
    write(run, "bench_w03", on=host("NVIDIA A100"))
    write(run, "build", on=host(driver="590.2"))
    said = refused(run, recorded, reason="never mind")
    row = "standard_decode, decode batch 1 context 128, tpot_ms (cuda, 1)"
    assert f"bench_w03.parquet: {row}: gpu is 'NVIDIA A100'; should be '{H200}', as host.json says" in said
    assert "build.parquet: s, c, m: driver is '590.2'; should be '580.1', as host.json says" in said


def test_hosts_that_are_none(tmp_path: Path, run: Path, recorded: Path):
    place = record.find_host(run)
    place.write_text("{}")
    assert "host.json is not a host description" in refused(run, recorded)
    place.unlink()
    assert f"{place} is missing: should be what `python -m stages.provision` writes" in refused(run, recorded)
    cpu = make_run(tmp_path / "cpu", host(None))
    assert "names no GPU; only runs of a named GPU" in refused(cpu, recorded, reason="never mind")


def test_the_gpu_group_is_the_gpu(run: Path, recorded: Path):
    write(run, "provision", case="auto")
    keep(run, recorded)
    write(run, "provision", case="cpu")
    assert "provision.parquet: gpu_group, cpu, matches_host: the run was of gpu=cpu; should be" in refused(
        run, recorded
    )
    write(run, "provision", reason="no usable GPU")
    assert "no usable GPU; should be a group that is this host's GPU" in refused(run, recorded)
    write(run, "provision", suite="ceilings")
    assert "provision.parquet: has no row of suite gpu_group" in refused(run, recorded)


def test_rows_of_another_model(run: Path, recorded: Path):
    write(run, "bench_w03", model="olmo2_7b")
    assert "model is olmo2_7b; should be baseline's olmo2_1b" in refused(run, recorded, reason="never mind")


def test_mixed_dirty_and_unknown_commits(run: Path, recorded: Path):
    write(run, "bench_w03", OTHER)
    said = refused(run, recorded)
    assert f"bench_w03.parquet: measured at {OTHER}; should be {COMMIT}, as bench_w01: `dvc repro --force`" in said
    assert said.endswith("--force REASON promotes it all the same and keeps the reason beside it")
    write(run, "bench_w03", f"{COMMIT}-dirty")
    said = refused(run, recorded, reason="it cannot be measured again")
    assert f"bench_w03.parquet: measured at {COMMIT}-dirty; should be a commit: commit, then" in said
    write(run, "bench_w03")
    write(run, "baseline", f"{OTHER}-dirty")
    assert f"baseline.parquet: measured at {OTHER}-dirty" in refused(run, recorded)
    write(run, "baseline", None)
    assert "baseline.parquet: a row names no commit" in refused(run, recorded)


def test_several_commits_in_one_file(run: Path, recorded: Path):
    rows = Rows("bench", "w03", "olmo2_1b", host())
    for commit in (COMMIT, OTHER):
        rows.common["commit"] = commit
        rows.add(suite="s", case=commit, metric="m", value=1.0, unit="1", better=None)
    rows.write(run / "bench_w03.parquet")
    assert f"bench_w03.parquet: measured at {COMMIT}, {OTHER}; should be one commit" in refused(run, recorded)


def test_a_busy_machine(run: Path, recorded: Path):
    write(run, "bench_w03", other_load=0.25)
    keep(run, recorded)
    write(run, "bench_w03", other_load=0.5)
    said = refused(run, recorded)
    assert "bench_w03.parquet: other processes kept 50% of the cores busy while it was measured; should be 25%" in said
    assert "--single-item bench@w03" in said
    keep(run, recorded, reason="it is always so")


def test_noise(run: Path, recorded: Path):
    write(run, "bench_w03", samples=NOISY)
    said = refused(run, recorded)
    row = "standard_decode, decode batch 1 context 128, tpot_ms (cuda, 1)"
    assert f"bench_w03.parquet: {row}: 5 samples spread by 14.8% of 10; should be 10% at most" in said
    assert "`dvc repro --force --single-item bench@w03`" in said
    write(run, "bench_w03")
    write(run, "baseline", samples=NOISY)
    assert "`dvc repro --force --single-item baseline`" in refused(run, recorded)


@pytest.mark.parametrize("change", [{"metric": "itl_ms"}, {"suite": "kernels"}, {"samples": NOISY[::4]}])
def test_noise_of_other_rows_and_of_two_samples_does_not_matter(run: Path, recorded: Path, change: dict[str, Any]):
    fields: dict[str, Any] = {"samples": NOISY} | change
    write(run, "bench_w03", **fields)
    keep(run, recorded)


def test_many_refusals_are_counted(run: Path, recorded: Path):
    for name in KEPT - {"parity_w01"}:
        write(run, name, f"{COMMIT}-dirty", on=host("NVIDIA A100"))
    said = refused(run, recorded)
    assert "… and 4 more" in said and "--force REASON" not in said  # another GPU cannot be forced


def test_the_day_of_each_commit_is_kept(run: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "find_day", {COMMIT: "2026-11-27"}.get)
    keep(run, recorded)
    assert json.loads((recorded / "commits.json").read_text()) == {COMMIT: "2026-11-27"}
    monkeypatch.setattr(record, "find_day", lambda commit: None)  # a clone without that commit
    keep(run, recorded)
    assert json.loads((recorded / "commits.json").read_text()) == {COMMIT: "2026-11-27"}


# --- force ------------------------------------------------------------------------------------------------------------


def test_a_reason_is_kept_until_the_file_is_replaced(run: Path, recorded: Path):
    write(run, "bench_w03", OTHER, samples=NOISY)
    kept = keep(run, recorded, reason="a shared machine")
    forced = json.loads((kept / "forced.json").read_text())
    assert list(forced) == ["bench_w03"] and forced["bench_w03"]["reason"] == "a shared machine"
    assert [text.partition(" ")[0] for text in forced["bench_w03"]["refused"]] == ["measured", "standard_decode,"]
    keep(run, recorded, "w01")
    assert json.loads((kept / "forced.json").read_text()) == forced
    write(run, "bench_w03")
    keep(run, recorded, reason="nothing to force")
    assert not (kept / "forced.json").exists()


# --- nothing half-written ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there(run: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch):
    kept = keep(run, recorded)
    copy = record.shutil.copyfile

    def fail(source: Path, target: Path) -> None:
        if source.name == "bench_w03.parquet":
            raise OSError(28, "No space left on device")
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(record.shutil, "copyfile", fail)
        with pytest.raises(OSError, match="No space"):
            keep(run, recorded)
    assert names(kept) == KEPT
    assert not list(recorded.glob("*/*/*.part")) and len(list(recorded.glob("*/*/*.parquet"))) == len(KEPT)
    keep(run, recorded)
    assert {path.name for path in recorded.iterdir()} == {"nvidia-h200", "commits.json"}


def test_a_rename_that_fails_puts_the_old_folder_back(run: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch):
    kept = keep(run, recorded)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="Input/output"):
            keep(run, recorded)
    assert names(kept) == KEPT


def test_a_kill_between_the_renames_is_made_good(run: Path, recorded: Path):
    kept = keep(run, recorded)
    kept.rename(record.part_of(recorded, kept).with_suffix(".old"))
    assert names(keep(run, recorded, "w01")) == KEPT  # w03 was only there


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(workspace: Path) -> Path:
    make_run(workspace / "run", weeks=("w01", "w03"))
    return workspace


def test_the_command_prints_where(here: Path, capsys: pytest.CaptureFixture[str]):
    assert record.main(["run/reports/metrics", "--where"]) == 0
    assert capsys.readouterr().out == "reports/recorded/nvidia-h200/olmo2_1b\n" and not Path("reports").exists()
    assert record.main(["run/reports/metrics", "--weeks", "w01", "w03"]) == 0
    assert capsys.readouterr().out == "reports/recorded/nvidia-h200/olmo2_1b\n"
    assert names(Path("reports/recorded/nvidia-h200/olmo2_1b")) == KEPT


def test_the_command_says_what_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]):
    assert record.main([]) == 1
    assert capsys.readouterr().err == "error: reports/metrics holds no Parquet files: run the pipeline first\n"
    assert record.main(["run/reports/metrics", "--weeks", "w99"]) == 2
    assert "unknown week 'w99'; there are: w01" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        record.main(["run/reports/metrics", "--force", " "])
    assert exit.value.code == 2 and "should say why" in capsys.readouterr().err
    write(Path("run/reports/metrics"), "bench_w03", samples=NOISY)
    assert record.main(["run/reports/metrics"]) == 1
    assert "is not recorded:\n  bench_w03.parquet: " in capsys.readouterr().err
    assert record.main(["run/reports/metrics", "--force", "a shared machine"]) == 0
    assert Path("reports/recorded/nvidia-h200/olmo2_1b/forced.json").exists()
    Path("run/reports/metrics/build.parquet").write_text("cut")
    assert record.main(["run/reports/metrics"]) == 1
    assert "build.parquet is not Parquet" in capsys.readouterr().err
