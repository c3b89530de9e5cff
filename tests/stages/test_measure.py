"""Running a pack's stages: past failures, up to the limit, and only what is whole is brought back."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from test_record import COMMIT, KEPT, WEEKS, make_run

from stages import measure, record

ROOT = Path(__file__).resolve().parents[2]
WRITE = """
import os, sys
from pathlib import Path
Path('reports/metrics').mkdir(parents=True, exist_ok=True)
stage = os.environ['DVC_STAGE'].replace('@', '_')
Path(f'reports/metrics/{stage}.parquet').write_text(os.environ['DVC_STAGE'])
"""
# It has written its file, and started a process, when the limit comes.
HANG = f"""{WRITE}
import subprocess, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
Path(os.environ['PIDS']).write_text(f'{{os.getpid()}} {{child.pid}}')
print('begins', flush=True)
time.sleep(60)
"""
STAGES = {
    "provision": f"{WRITE}\nPath('data/host.json').write_text('the host')",
    "baseline": f"{WRITE}\nPath('data/reference').mkdir()",
    "parity@w05": f"{WRITE}\nPath('reports/.x.parquet.tmp').touch()\nprint('error: parity: far off\\n')\nsys.exit(1)",
    "bench@w05": HANG,
    "bench@w06": f"{WRITE}\nos.kill(os.getpid(), 9)",
    "bench@w08": f"{WRITE}\nsys.exit(os.path.exists('runs-fails'))",
    "env": (
        "import os, json; from pathlib import Path; Path('reports').mkdir(exist_ok=True)\n"
        "Path('reports/env.json').write_text(json.dumps(dict(os.environ)))"
    ),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked pack of two sets with stand-ins for stages; the working directory is elsewhere."""
    folder = tmp_path / "afs-pack"
    for name in ("conf", "data/models", "params", "cache", "kernels", "stages"):
        (folder / name).mkdir(parents=True)
    (folder / "kernels/a.py").write_text("x = 1\n")
    stages = {
        name: {
            "command": ["python", "-c", code],
            "outs": [f"reports/metrics/{name.replace('@', '_')}.parquet", "data/reference"],
        }
        for name, code in STAGES.items()
    }
    sets = {name: {"overrides": [f"model={name}"], "stages": stages} for name in ("a", "b")}
    for name in sets:
        (folder / f"params/{name}.yaml").write_text(f"model: {name}\n")
    code = {"kernels/a.py": sha256(b"x = 1\n").hexdigest()}
    (folder / "pack.json").write_text(json.dumps({"commit": COMMIT, "sets": sets, "code": code}))
    for name in ("__init__", "arguments", "commit", "measure"):
        (folder / f"stages/{name}.py").write_bytes((ROOT / f"stages/{name}.py").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return folder


def run(root: Path, *arguments: str) -> int:
    return measure.main([*arguments], root)


def statuses(out: Path) -> dict[str, str]:
    """ "set stage" → how it ended and what it said, times left out."""
    lines = (out / "summary.txt").read_text().splitlines()[2:]
    return {
        f"{line[:16].strip()} {line[17:29].strip()}": f"{line[30:42].strip()} {line[55:]}".strip() for line in lines
    }


def brought(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError(what)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody reaps does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_are_gone() -> None:
    wait_for(lambda: not any(alive(int(pid)) for pid in Path("pids").read_text().split()), "a process was left behind")


# --- how stages end ---------------------------------------------------------------------------------------------------


def test_it_goes_on_past_failed_stages(root: Path, capsys: pytest.CaptureFixture[str]):
    assert run(root, "a: provision parity@w05 bench@w06 baseline", "b: provision", "--out", "out") == 1
    assert statuses(Path("out")) == {
        "a provision": "ran",
        "a parity@w05": "failed error: parity: far off",
        "a bench@w06": "failed killed by SIGKILL",
        "a baseline": "ran",
        "b provision": "ran",
    }
    metrics = {f"{name}.parquet" for name in ("a/reports/metrics/provision", "a/reports/metrics/baseline")}
    logs = {f"a/logs/{name}.log" for name in ("provision", "parity_w05", "bench_w06", "baseline")}
    assert brought(Path("out")) == {
        *metrics, *logs, "a/data/host.json", "b/reports/metrics/provision.parquet", "b/data/host.json",
        "b/logs/provision.log", "summary.txt",
    }  # fmt: skip
    assert (Path("out/a/logs/parity_w05.log")).read_text() == "error: parity: far off\n\n"
    shown = capsys.readouterr().out
    assert Path("out/summary.txt").read_text() in shown and COMMIT in shown


def test_all_ran(root: Path):
    assert run(root, "provision baseline") == 0
    assert statuses(Path("results")) == dict.fromkeys(("a provision", "a baseline", "b provision", "b baseline"), "ran")


def test_the_limit_cuts(root: Path):
    start = time.monotonic()
    assert run(root, "a: provision bench@w05 baseline", "b: provision", "--limit", "1.5") == 1
    assert time.monotonic() - start < 10
    assert statuses(Path("results")) == {
        "a provision": "ran", "a bench@w05": "cut", "a baseline": "not started", "b provision": "not started",
    }  # fmt: skip
    all_are_gone()
    assert Path("results/a/logs/bench_w05.log").read_text() == "begins\n"
    for folder in (Path("results/a"), root / "runs/a"):
        assert [path.name for path in (folder / "reports/metrics").iterdir()] == ["provision.parquet"]


def test_nothing_a_stage_started_stays(root: Path):
    pack = json.loads((root / "pack.json").read_text())
    code = HANG.replace("time.sleep(60)\n", "")
    pack["sets"]["a"]["stages"]["baseline"]["command"] = ["python", "-c", code]
    (root / "pack.json").write_text(json.dumps(pack))
    assert run(root, "a: baseline") == 0
    all_are_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_stage_behind_and_nothing_half(root: Path, number: int):
    command = [sys.executable, "-m", "stages.measure", "a: provision bench@w05", "--out", "../out"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(command, cwd=root, env=environment)
    try:
        wait_for(lambda: Path("pids").exists() and len(Path("pids").read_text().split()) == 2, "the stage began")
        process.send_signal(number)
        assert process.wait(timeout=20) == (128 + number if number == signal.SIGTERM else -number)
    finally:
        process.kill()
    stage = int(Path("pids").read_text().split()[0])
    wait_for(lambda: not alive(stage), "the stage was left behind")
    assert [path.name for path in Path("out/a/reports/metrics").iterdir()] == ["provision.parquet"]
    if number == signal.SIGTERM:
        all_are_gone()
        assert statuses(Path("out"))["a bench@w05"] == "cut interrupted"
    else:
        os.kill(int(Path("pids").read_text().split()[1]), signal.SIGKILL)


# --- where they run ---------------------------------------------------------------------------------------------------


def test_a_stage_runs_as_under_dvc_in_what_looks_like_a_checkout(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    assert run(root, "b: env") == 0
    seen = json.loads(Path("results/b/reports/env.json").read_text())
    assert seen["DVC_STAGE"] == "env" and seen["AFS_CACHE"] == str(root / "cache")
    assert seen["PYTHONPATH"].split(":") == [str(root), "/theirs"]
    folder = root / "runs/b"
    assert (folder / "params.yaml").read_text() == "model: b\n" and (folder / "COMMIT").read_text() == f"{COMMIT}\n"
    assert (folder / "conf").resolve() == root / "conf" and (folder / "data/models").resolve() == root / "data/models"


def test_a_later_call_goes_on_and_brings_all(root: Path, capsys: pytest.CaptureFixture[str]):
    assert run(root, "a: provision", "--out", "first") == 0
    assert run(root, "a: baseline", "--out", "first") == 2
    assert f"{Path('first/a')} is there already" in capsys.readouterr().err
    assert run(root, "a: baseline", "--out", "second") == 0
    assert {path.name for path in Path("second/a/reports/metrics").iterdir()} == {
        "provision.parquet",
        "baseline.parquet",
    }


def test_a_stage_that_fails_the_second_time_takes_its_first_result_away(root: Path):
    assert run(root, "a: bench@w08", "--out", "first") == 0
    (root / "runs/a/runs-fails").touch()
    assert run(root, "a: bench@w08", "--out", "second") == 1
    assert not any(path.endswith("parquet") for path in brought(Path("second")))


def test_code_changed_on_the_host_makes_the_commit_dirty(root: Path, capsys: pytest.CaptureFixture[str]):
    assert run(root, "a: provision", "--out", "first") == 0
    (root / "kernels/a.py").write_text("x = 2\n")
    assert run(root, "a: baseline", "--out", "second") == 0
    assert (root / "runs/a/COMMIT").read_text() == f"{COMMIT}-dirty\n"
    said = capsys.readouterr().out
    assert "kernels/a.py: not as packed" in said and f"{COMMIT}-dirty, without a limit" in said
    # What the packed code measured does not stay beside.
    assert [path.name for path in Path("second/a/reports/metrics").iterdir()] == ["baseline.parquet"]


def test_other_parameters_begin_anew(root: Path):
    assert run(root, "a: provision", "--out", "first") == 0
    (root / "params/a.yaml").write_text("model: other\n")
    assert run(root, "a: baseline", "--out", "second") == 0
    assert [path.name for path in Path("second/a/reports/metrics").iterdir()] == ["baseline.parquet"]
    assert (root / "conf").is_dir() and (root / "data/models").is_dir()


def test_one_call_at_a_time(root: Path, capsys: pytest.CaptureFixture[str]):
    with measure.only_one(root / "runs"):
        assert run(root, "a: provision") == 2
    assert "another `stages.measure` runs in" in capsys.readouterr().err
    assert run(root, "a: provision") == 0


def test_it_needs_nothing_but_the_standard_library(root: Path):
    command = [sys.executable, "-S", "-m", "stages.measure"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [f"commit {COMMIT}", "a: model=a"] and "bench@w05" in done.stdout


# --- wheels -----------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, tag: str) -> None:
    """A wheel of one module, needing a package that there is not."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"brought-1.0-{tag}.whl", "w") as wheel:
        wheel.writestr("brought.py", "here = 1\n")
        metadata = "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\nRequires-Dist: not-there-at-all\n"
        wheel.writestr("brought-1.0.dist-info/METADATA", metadata)
        wheel.writestr("brought-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr("brought-1.0.dist-info/RECORD", "")


def test_wheels_are_installed_once_and_found_by_stages(root: Path, capsys: pytest.CaptureFixture[str]):
    write_wheel(root / "wheels", "py3-none-any")
    pack = json.loads((root / "pack.json").read_text())
    pack["sets"]["a"]["stages"]["baseline"]["command"] = ["python", "-c", "import brought"]
    (root / "pack.json").write_text(json.dumps(pack))
    assert run(root, "a: baseline", "--out", "first") == 0
    assert "installs 1 wheels" in capsys.readouterr().out
    assert run(root, "a: baseline", "--out", "second") == 0
    assert "installs" not in capsys.readouterr().out


def test_wheels_of_another_python_are_refused(root: Path, capsys: pytest.CaptureFixture[str]):
    write_wheel(root / "wheels", "cp27-cp27mu-win32")
    assert run(root, "a: provision") == 2
    assert "the wheels cannot be installed: ERROR: brought-1.0-cp27-cp27mu-win32.whl is not a supported" in (
        capsys.readouterr().err
    )
    assert not Path("results").exists() and not list(root.glob("site-*"))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["c: provision"], "no set 'c' was packed; there are: a, b"),
        (["a: provision bench@w99"], "no stage 'bench@w99'; there are: provision, baseline"),
        (["a:"], "'a:' names no stage: should be 'SET: STAGE …'"),
        ([" "], "names no stage"),
    ],
)
def test_bad_jobs_are_refused_before_anything_runs(root: Path, capsys: pytest.CaptureFixture[str], arguments, words):
    assert run(root, "a: provision", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not Path("results").exists() and not (root / "runs").exists()


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "nan"])
def test_a_bad_limit_is_refused(root: Path, capsys: pytest.CaptureFixture[str], limit: str):
    with pytest.raises(SystemExit) as exit:
        run(root, "a: provision", f"--limit={limit}")
    assert exit.value.code == 2 and "should be a number above 0" in capsys.readouterr().err


def test_a_checkout_is_no_pack(capsys: pytest.CaptureFixture[str]):
    assert measure.main(["provision"]) == 2
    assert "holds no pack.json, as an unpacked pack does: `python -m stages.pack` makes one" in capsys.readouterr().err


# --- and then ---------------------------------------------------------------------------------------------------------


def test_what_is_brought_back_can_be_recorded(root: Path, tmp_path: Path):
    measured = make_run(tmp_path / "measured").parents[1]
    pack = json.loads((root / "pack.json").read_text())
    copy = f"import shutil; [shutil.copytree(f'{measured}/{{n}}', n, dirs_exist_ok=True) for n in ('reports', 'data')]"
    pack["sets"]["a"]["stages"]["baseline"]["command"] = ["python", "-c", copy]
    (root / "pack.json").write_text(json.dumps(pack))
    assert run(root, "a: baseline") == 0
    kept = record.record(Path("results/a/reports/metrics"), tmp_path / "recorded", WEEKS)
    assert {path.stem for path in kept.glob("*.parquet")} == KEPT
