"""The decorator: where parameters come from, what is refused, where a stage writes."""

import dataclasses
import errno
import os
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml

from stages import stage as stage_module
from stages.exits import StageError, reported
from stages.params import Gpu, Model, ParamsError, StagedModel, Week, Weeks, Workload, list_choices
from stages.stage import Run, cache_folder, stage, write_whole


def call(arguments, *sections):
    """Runs a stage that records what it is given."""
    given = []

    @stage(*sections)
    def main(run, *values):
        given.extend([run, *values])

    main(arguments)
    return given


def refused(capsys, arguments, *sections) -> str:
    """The one line that a refused call prints, after exit status 2."""
    with pytest.raises(SystemExit) as exit:
        call(arguments, *sections)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def change_params(**changes):
    """Writes dotted keys into params.yaml; None removes the key."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        place = params
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[key]
        else:
            place[key] = value
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def test_by_hand_composes_conf_with_overrides(workspace):
    run, gpu, model, week = call(["gpu=rtx5090", "model=olmo2_7b", "model.seed=7", "week=w03"], Gpu, Model, Week)
    assert run == Run("test_stage", by_hand=True)
    assert (gpu.name, gpu.sm) == ("rtx5090", "sm_120")
    assert (model.name, model.seed, model.architecture["hidden_size"]) == ("olmo2_7b", 7, 4096)
    assert (week.name, week.engine.kv_cache) == ("w03", "none")


def test_by_hand_leaves_nothing_behind(workspace):
    before = sorted(workspace.rglob("*"))
    call([], Gpu)
    assert Path.cwd() == workspace
    assert sorted(workspace.rglob("*")) == before


def test_under_dvc_reads_params_yaml(workspace, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "bench@w03")
    change_params(gpu__name="h200", weeks__w03__title="changed")
    run, gpu, week = call(["week=w03"], Gpu, Week)
    assert run == Run("test_stage", by_hand=False)
    assert gpu.name == "h200"
    assert week.title == "changed"


def test_under_dvc_refuses_overrides(workspace, monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "bench@w03")
    assert "'gpu=h200'" in refused(capsys, ["week=w03", "gpu=h200"], Gpu, Week)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu=rtx6090"], ["unknown gpu 'rtx6090'", "rtx5090"]),
        (["model=olmo3_7b"], ["unknown model 'olmo3_7b'", "olmo2_7b"]),
        (["workload=huge"], ["unknown workload 'huge'", "smoke"]),
        (["week=w99"], ["unknown week 'w99'", "w01, w02, w03, w04"]),
        ([], ["which week?", "w01"]),
        (["week=w01", "week=w02"], ["one week at a time"]),
        (["week=w01", "model.sed=1"], ["model.sed"]),
        (["week=w01", "+model.sed=1"], ["model.sed: unknown key"]),
        (["week=w01", "model.seed=x"], ["model.seed = 'x'"]),
        (["week=w01", "model.seed=-1"], ["model.seed = -1"]),
        (["week=w01", "model.weights=magic"], ["model.weights = 'magic'", "random"]),
        (["week=w01", "model.revision=main"], ["model.revision = 'main'"]),
        (["week=w01", "workload.batch_sizes=[0]"], ["workload.batch_sizes.0 = 0"]),
        (["week=w01", "workload.prompts=[]"], ["workload.prompts"]),
        (["week=w03", "weeks.w03.engine.backend=cud"], ["weeks.w03.engine.backend = 'cud'"]),
        (["week=w03", "~weeks.w03.engine.dtype"], ["weeks.w03.engine.dtype is missing"]),
        (["week=w03", "gpu.name=h200"], ["'gpu.name=h200' would rename", "say gpu=h200"]),
        (["week=w03", "+foo=1"], ["foo = 1: unknown key; there are gpu, model, workload, weeks"]),
        (["week=w03", "weeks.w04.title=x"], ["'weeks.w04.title=x' changes nothing here: this is week w03"]),
        (["week=w01", "gpu"], ["'gpu' is not an override"]),
    ],
)
def test_bad_arguments(workspace, capsys, arguments, words):
    error = refused(capsys, arguments, Gpu, Model, Week, Workload)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "override", ["model.weights=random", "model.path=/x", "++model.seed=3", "+model.architecture.mlp_bias=false"]
)
def test_a_stage_that_reads_what_is_staged_refuses_to_be_told_from_where(workspace, capsys, override):
    error = refused(capsys, [override], Gpu, StagedModel)
    assert f"'{override}' changes nothing here" in error and "to stages.download" in error
    assert call(["model=olmo2_7b"], StagedModel)[1].name == "olmo2_7b"


@pytest.mark.parametrize(
    "override", ["model=olmo2_7b", "workload.repeats=3", "weeks.w03.title=x", "week@weeks.w03=w04"]
)
def test_an_override_of_what_a_stage_does_not_read_is_refused(workspace, capsys, override):
    error = refused(capsys, [override], Gpu)
    assert "changes nothing here: this stage reads gpu" in error or "weeks" in error


def test_all_wrong_sections_are_told_at_once(workspace, capsys):
    error = refused(capsys, ["gpu.count=-1", "workload.repeats=0"], Gpu, Workload)
    assert "gpu.count = -1" in error and "workload.repeats = 0" in error


def test_another_working_directory_is_named(workspace, capsys, monkeypatch):
    monkeypatch.chdir(workspace / "conf")
    assert "conf/config.yaml is not here: run from the repository's root" in refused(capsys, ["gpu=cpu"], Gpu)


def test_a_stage_without_weeks_takes_none(workspace, capsys):
    assert "takes no week" in refused(capsys, ["week=w01"], Gpu)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu__name": None}, "gpu.name is missing"),
        ({"gpu__name": "rtx6090"}, "unknown gpu 'rtx6090'; there are: a100_80g"),
        ({"gpu__color": "green"}, "gpu.color: unknown key"),
        ({"gpu__count": True}, "gpu.count = True"),
        ({"gpu": None}, "gpu is missing from the parameters"),
        ({"weeks__w01__name": "w02"}, "weeks.w01.name = 'w02': should be 'w01'"),
    ],
)
def test_bad_params_yaml(workspace, monkeypatch, capsys, changes, words):
    monkeypatch.setenv("DVC_STAGE", "x")
    change_params(**changes)
    assert words in refused(capsys, [], Gpu, Weeks)


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [\n", None])
def test_params_yaml_that_is_none(workspace, monkeypatch, capsys, content):
    monkeypatch.setenv("DVC_STAGE", "x")
    Path("params.yaml").unlink()
    if content is not None:
        Path("params.yaml").write_text(content)
    assert "params.yaml" in refused(capsys, [], Gpu)


@pytest.mark.parametrize(
    ("content", "words"),
    [("sm: null\n", "gpu/cpu.yaml has no `name:`"), ("name: auto\n", "says `name: auto`; it should be `cpu`")],
)
def test_a_group_file_says_its_own_name(workspace, capsys, content, words):
    Path("conf/gpu/cpu.yaml").write_text(content)
    assert words in refused(capsys, ["gpu=cpu"], Gpu)


def test_sections_are_read_only(workspace):
    _, model, workload = call([], Model, Workload)
    assert isinstance(model.architecture, MappingProxyType)
    assert isinstance(workload.prompts, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.seed = 1


def test_all_weeks_in_order(workspace):
    (_, weeks) = call([], Weeks)
    assert list(weeks.weeks) == list_choices("week")


def test_engine_settings_follow_the_host(workspace):
    (_, week) = call(["week=w04"], Week)
    assert week.engine.settings(gpu=True, max_positions=2048) | {"attention": "naive"} == {
        "backend": "cuda", "device": "cuda", "dtype": "bfloat16", "attention": "naive", "linear": "naive",
        "sampling": "naive", "kv_cache": "contiguous", "page_size": 16, "kv_tokens": None, "prefix_cache": False,
        "cuda_graph": False, "batching": "inflight", "max_batch": 8, "max_step_tokens": 2048, "max_model_len": 2048,
    }  # fmt: skip
    assert week.engine.settings(gpu=False, max_positions=64)["backend"] == "reference"


def test_a_failing_stage_says_one_line(workspace, capsys):
    @stage(Gpu)
    def main(run, gpu):
        raise StageError("layer 3 is off by 2.0")

    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 1
    assert capsys.readouterr().err == "error: test_stage: layer 3 is off by 2.0\n"


class SafetensorError(Exception):
    """As a library has it that hides the system's number in its words."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "error: bench: interrupted\n"),
        (OSError(errno.ENOSPC, "x", "/a/b"), 1, "error: bench: the disk is full (/a/b): make room and run again\n"),
        (OSError(errno.EDQUOT, "x"), 1, "error: bench: the disk is full: make room and run again\n"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            1,
            "error: bench: the disk is full: make",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 1, "error: bench: /a: Permission denied\n"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 1, "error: bench: /a: Read-only file system\n"),
        (StageError("no rows"), 1, "error: bench: no rows\n"),
        (ParamsError("gpu.count = x"), 2, "error: gpu.count = x\n"),
    ],
)
def test_what_is_no_fault_of_the_code_ends_in_a_line(capsys, error, status, line):
    with pytest.raises(SystemExit) as exit, reported("bench"):
        raise error
    assert exit.value.code == status
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), KeyError("x")])
def test_what_is_one_keeps_its_traceback(error):
    with pytest.raises(type(error)), reported("bench"):
        raise error


def test_a_cache_that_cannot_be_written_is_named(workspace, monkeypatch, tmp_path):
    assert cache_folder("ceilings") == tmp_path / "cache/ceilings"
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFS_CACHE", str(tmp_path / "file"))
    with pytest.raises(StageError, match=r"file/hub cannot be written \(Not a directory\): set AFS_CACHE to a folder"):
        cache_folder("hub")


def test_help_names_the_choices(workspace, capsys):
    call(["--help"], Gpu)
    assert "gpu=a100_80g|auto|cpu" in capsys.readouterr().out


def test_outputs_by_hand_and_under_dvc(workspace):
    assert Run("bench", by_hand=True).out("reports/x.json") == Path("outputs/bench/reports/x.json")
    assert Run("bench").out("reports/x.json") == Path("reports/x.json")
    assert Path("outputs/bench/reports").is_dir() and Path("reports").is_dir()


def test_inputs_by_hand_are_the_newest(workspace, capsys):
    Path("data").mkdir()
    Path("data/host.json").write_text("pipeline")
    by_hand = Run("provision", by_hand=True).out("data/host.json")
    by_hand.write_text("by hand")
    os.utime("data/host.json", (1, 1))
    assert Run("bench", by_hand=True).find("data/host.json") == by_hand
    assert str(by_hand) in capsys.readouterr().out
    assert Run("bench").find("data/host.json") == Path("data/host.json")
    os.utime(by_hand, (0, 0))
    assert Run("bench", by_hand=True).find("data/host.json") == Path("data/host.json")


def test_a_missing_input_is_named(workspace):
    with pytest.raises(StageError, match=r"data/host\.json is not here"):
        Run("bench").find("data/host.json")


def test_a_folder_is_not_whole_without_what_is_written_last(workspace):
    folder, manifest = Path("data/hf/hf_snapshot/tiny"), Path("data/hf/tiny.manifest.json")
    folder.mkdir(parents=True)
    with pytest.raises(StageError, match="data/hf/hf_snapshot/tiny is not whole: run the stage that makes it"):
        Run("bench").find_snapshot("tiny")
    manifest.touch()
    newer = Run("download", by_hand=True).out(folder)
    newer.mkdir()
    assert Run("bench", by_hand=True).find_snapshot("tiny") == folder
    Run("download", by_hand=True).out(manifest).touch()
    os.utime(manifest, (1, 1))
    assert Run("bench", by_hand=True).find_snapshot("tiny") == newer


def test_write_whole_keeps_the_old_file_when_it_fails(workspace, monkeypatch):
    path = Path("report.md")
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage_module.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert [entry.name for entry in Path().iterdir() if entry.name.startswith(".")] == []
