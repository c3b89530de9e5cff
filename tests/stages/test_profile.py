"""stages/profile.py: what `profile=` runs, its tables, and the programs it asks, which here are scripts."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_pipeline as tiny

from stages import bench, profile
from stages.exits import StageError
from stages.params import ParamsError, Week
from stages.profile import Kernel, Work, gather, list_works, parse_ncu, parse_nsys, profile_week
from stages.stage import Run, stage

WORKS = ["prompt 20", "decode batch 1 context 20", "decode batch 2 context 20"]
NSYS = """\
Generating SQLite file x.sqlite from x.nsys-rep
Processing [x.sqlite] with [/opt/reports/cuda_gpu_kern_sum.py]...

"Time (%)","Total Time (ns)","Instances","Avg (ns)","Med (ns)","Min (ns)","Max (ns)","StdDev (ns)","Name"
"75.0","3,000","2","1500.0","1500.0","1000","2000","0.0","linear<bf16, 4>"
"25.0","1000","4","250.0","250.0","250","250","0.0","norm|rope"
"""
NCU = f"""\
==PROF== Connected to process 1
"ID","Process ID","Kernel Name","{profile.MEMORY}","{profile.DURATION}","{profile.COMPUTE}"
"","","","%","{{unit}}","%"
"0","1","linear","80.00","3,000","10.00"
"1","1","norm","20.00","500","5.00"
"2","1","linear","40.00","1,000","30.00"
"""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A pipeline of its own, so that outputs/ is."""
    (tmp_path / "data").symlink_to(tiny.pipeline() / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile, "CUDA_BIN", tmp_path / "no-cuda")
    return tmp_path


def run(tool: str, week: Week | None = None) -> None:
    sections = tiny.GPU, tiny.MODEL, week or tiny.make_week(), tiny.WORKLOAD
    bench.main.__wrapped__(Run("bench", by_hand=True), *sections, profile=tool)  # type: ignore[attr-defined]


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, tool: str, script: str) -> None:
    """A program `tool` on PATH; what it is called with goes to called.txt."""
    path = folder / "bin" / tool
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/bash\necho "$@" >>"{folder}/called.txt"\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def read(path: Path) -> Any:
    """A table, which type checkers need not follow."""
    return pd.read_parquet(path)


def on_gpu() -> dict[str, Any]:
    return tiny.ENGINE.settings(gpu=True, max_positions=256)


def profile_fake(tool: str) -> Any:
    return profile_week(tool, "w04", "tiny", Path("data/hf/hf_snapshot/tiny"), on_gpu(), tiny.WORKLOAD)


# --- torch, on this CPU -----------------------------------------------------------------------------------------------


def test_torch_leaves_a_trace_of_each_work_and_a_table(here: Path, capsys: pytest.CaptureFixture[str]):
    run("torch")
    folder = here / "outputs/profile/w04/tiny/torch"
    table = read(folder / "kernels.parquet")
    assert list(dict.fromkeys(table["work"])) == WORKS
    assert (table["calls"] > 0).all() and (table["mean_us"] * table["calls"] - table["total_us"]).abs().max() < 1e-6
    assert table.groupby("work")["share"].sum().tolist() == pytest.approx([1.0] * 3)
    assert any("mm" in name for name in table["kernel"])
    steps = table[(table["work"] == WORKS[1]) & table["kernel"].str.contains("mm")]
    # Seven matrix products a layer or fewer, where some are one; and the head's.
    assert steps["calls"].sum() % profile.STEPS == 0 and steps["calls"].sum() >= profile.STEPS * (4 * 4 + 1)
    for work in WORKS:
        with gzip.open(folder / f"{work.replace(' ', '-')}.trace.json.gz") as file:
            assert len(json.load(file)["traceEvents"]) > 100
    text = (folder / "kernels.md").read_text()
    assert all(f"## {work}" in text for work in WORKS) and "w04, tiny, reference, bfloat16 on " in text
    assert text in capsys.readouterr().out
    assert not (here / "outputs/bench").exists()  # nothing was measured


def test_a_week_that_only_reads_prompts_has_no_decode_steps(here: Path):
    run("torch", tiny.make_week(engine=dataclasses.replace(tiny.ENGINE, kv_cache="none")))
    table = read(here / "outputs/profile/w04/tiny/torch/kernels.parquet")
    assert set(table["work"]) == {"prompt 20"}


def test_a_paged_engine_is_profiled_too(here: Path):
    engine = dataclasses.replace(tiny.ENGINE, kv_cache="paged", batching="continuous", prefix_cache=True)
    run("torch", tiny.make_week(engine=engine))
    table = read(here / "outputs/profile/w04/tiny/torch/kernels.parquet")
    assert list(dict.fromkeys(table["work"])) == WORKS


def test_weeks_without_an_engine_are_refused(here: Path):
    with pytest.raises(ParamsError, match=r"weeks\.w04\.engine is null"):
        run("torch", tiny.make_week(engine=None))


def test_the_longest_prompt_that_fits_is_taken():
    settings = on_gpu() | {"max_model_len": 20 + profile.STEPS}
    assert list_works(tiny.WORKLOAD, settings) == [Work(1, 20, 0), Work(1, 20, 8), Work(2, 20, 8)]
    assert list_works(tiny.WORKLOAD, settings | {"max_model_len": 27})[0] == Work(1, 8, 0)
    with pytest.raises(ParamsError, match=r"prompt_tokens = \[8, 20\]: one should be 7 at most"):
        list_works(tiny.WORKLOAD, settings | {"max_model_len": 15})


# --- nsys and ncu -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_an_absent_tool_is_said_in_one_line(here: Path, monkeypatch, capsys, tool):
    monkeypatch.setenv("PATH", str(here))
    run(tool)
    assert capsys.readouterr().out.startswith(f"skipped: {tool} is neither on PATH nor in {here}/no-cuda")
    assert not (here / "outputs").exists()


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_without_a_gpu_they_are_not_asked(here: Path, monkeypatch, capsys, tool):
    fake(here, monkeypatch, tool, "exit 1")
    run(tool)
    out = capsys.readouterr().out
    assert out.startswith("skipped: no GPU on this host") and out.count("\n") == 1
    assert not (here / "called.txt").exists()


def test_a_tool_beside_cuda_is_found(here: Path, monkeypatch):
    fake(here, monkeypatch, "ncu", "")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(profile, "CUDA_BIN", here / "bin")
    assert profile.find_tool("ncu") == str(here / "bin/ncu")


def test_nsys_profiles_each_work_and_its_table_is_read(here: Path, monkeypatch, capsys):
    fake(here, monkeypatch, "nsys", f"[ $1 = stats ] && cat <<'END' || echo Generated\n{NSYS}END")
    folder = profile_fake("nsys")
    assert folder == Path("outputs/profile/w04/tiny/nsys")
    table = read(folder / "kernels.parquet")
    assert table["kernel"].tolist() == ["linear<bf16, 4>", "norm|rope"] * 3
    assert table["total_us"].tolist() == [3.0, 1.0] * 3 and table["mean_us"].tolist() == [1.5, 0.25] * 3
    assert table["share"].tolist() == [0.75, 0.25] * 3 and table["memory_percent"].isna().all()
    assert "| norm\\|rope | 4 | 1.0 | 0.25 | 25.0% |" in capsys.readouterr().out
    calls = (here / "called.txt").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["profile", "stats"] * 3
    for work, name in zip(calls[::2], WORKS, strict=True):
        base = folder / name.replace(" ", "-")
        assert f"--output={base} {sys.executable} -m stages.profile data/hf/hf_snapshot/tiny " in work
        assert "--capture-range=cudaProfilerApi" in work and "--cuda-graph-trace=node" in work
    assert calls[1].endswith(f"--report cuda_gpu_kern_sum --format csv --force-export=true {folder}/prompt-20.nsys-rep")
    assert json.loads(calls[2][calls[2].rindex("{") :]) == {"batch": 1, "tokens": 20, "steps": 8}
    assert "Processing" in (folder / "prompt-20.log").read_text()


def test_ncu_profiles_one_step_and_its_counters_are_read(here: Path, monkeypatch):
    fake(here, monkeypatch, "ncu", f"[ $1 = --import ] && cat <<'END' || true\n{NCU.format(unit='ns')}END")
    folder = profile_fake("ncu")
    table = read(folder / "kernels.parquet")
    assert table["calls"].tolist() == [2, 1] * 3 and table["total_us"].tolist() == [4.0, 0.5] * 3
    assert table["memory_percent"].tolist() == [70.0, 20.0] * 3
    assert table["compute_percent"].tolist() == [15.0, 5.0] * 3
    assert "| linear | 2 | 4.0 | 2.00 | 88.9% | 70 % | 15 % |" in (folder / "kernels.md").read_text()
    calls = (here / "called.txt").read_text().splitlines()
    assert json.loads(calls[2][calls[2].rindex("{") :])["steps"] == 1
    assert calls[1] == f"--import {folder}/prompt-20.ncu-rep --csv --page raw"


def test_counters_that_may_not_be_read_are_said_in_one_line(here: Path, monkeypatch, capsys):
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    fake(here, monkeypatch, "ncu", f"echo '{said}'; exit 9")
    assert profile_fake("ncu") is None
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("skipped: the driver does not let ncu read the GPU's counters (ERR_NVGPUCTRPERM)")
    assert len((here / "called.txt").read_text().splitlines()) == 1
    assert not (here / "outputs/profile/w04/tiny/ncu/kernels.parquet").exists()


def test_a_tool_that_fails_is_an_error_with_its_words(here: Path, monkeypatch):
    fake(here, monkeypatch, "nsys", "echo one; echo no such device >&2; exit 3")
    with pytest.raises(StageError, match=r"nsys ended with status 3: one \| no such device \(all of it: .*prompt-20\."):
        profile_fake("nsys")


def test_a_run_replaces_the_earlier_one(here: Path, monkeypatch):
    old = here / "outputs/profile/w04/tiny/nsys/kernels.parquet"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    fake(here, monkeypatch, "nsys", "exit 3")
    with pytest.raises(StageError):
        profile_fake("nsys")
    assert not old.exists()


def test_what_the_tools_run_works_by_itself(here: Path):
    settings = json.dumps(tiny.ENGINE.settings(gpu=False, max_positions=256))
    for work in (Work(1, 8, 0), Work(2, 8, 1)):
        arguments = "data/hf/hf_snapshot/tiny", settings, json.dumps(dataclasses.asdict(work))
        command = [sys.executable, "-m", "stages.profile", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "SKIPPED: x.sqlite does not contain CUDA kernel data.\n", NSYS[: NSYS.index("75")]]
)
def test_a_table_that_is_not_there_is_an_error(text):
    with pytest.raises(StageError, match="nsys stats should write a table of kernels and wrote:"):
        parse_nsys(text)


def test_units_of_ncu_are_read():
    assert parse_ncu(NCU.format(unit="usecond"))[0].total_us == 4000
    with pytest.raises(StageError, match=r"ncu gives gpu__time_duration\.sum in 'cycle'; should be one of ns, nsecond"):
        parse_ncu(NCU.format(unit="cycle"))


def test_calls_of_a_kernel_are_gathered_the_longest_first():
    found = gather([Kernel("a", 1, 1.0), Kernel("b", 2, 5.0), Kernel("a", 3, 2.0)])
    assert found == [Kernel("b", 2, 5.0), Kernel("a", 4, 3.0)]


# --- the override -----------------------------------------------------------------------------------------------------


def call(arguments: list[str]) -> list[dict[str, str]]:
    given = []

    @stage(Week, options={"profile": profile.TOOLS})
    def main(run, week, **options):
        given.append(options)

    main(arguments)
    return given


def test_profile_is_an_option_by_hand(workspace):
    assert call(["week=w05"]) == [{}]
    assert call(["week=w05", "profile=nsys", "weeks.w05.title=x"]) == [{"profile": "nsys"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["profile=perf"], "profile = 'perf': should be one of torch, nsys, ncu"),
        (["profile"], "profile = '': should be one of torch, nsys, ncu"),
        (["profile=ncu", "profile=nsys"], "one profile at a time, not ncu, nsys"),
    ],
)
def test_other_values_are_refused(workspace, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        call(["week=w05", *arguments])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {words}\n"


def test_under_dvc_there_is_no_such_override(workspace, monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "bench@w05")
    with pytest.raises(SystemExit) as exit:
        call(["week=w05", "profile=torch"])
    assert exit.value.code == 2
    assert "'profile=torch' given to a stage run by DVC" in capsys.readouterr().err


def test_help_names_the_tools(workspace, capsys):
    bench.main(["--help"])
    assert "profile=torch|nsys|ncu" in capsys.readouterr().out
