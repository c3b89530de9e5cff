"""Packing: what is in the file, its commit and size; and, slow, a pack of this tree measured on a bare host."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import metrics, pack, record
from stages.commit import read_commit
from stages.compose import compose_conf, dump

ROOT = Path(__file__).resolve().parents[2]


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


@pytest.fixture
def checkout(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A git repository with the project's conf/ and dvc.yaml, one file of code, a program and a report."""
    shutil.copy(ROOT / "dvc.yaml", workspace)
    for name, text in (("kernels/a.py", "x = 1\n"), ("setup/run.sh", "#!/bin/sh\n"), ("reports/REPORT.md", "big")):
        (workspace / name).parent.mkdir()
        (workspace / name).write_text(text)
    (workspace / "setup/run.sh").chmod(0o755)
    (workspace / ".gitignore").write_text("outputs\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "x")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    read_commit.cache_clear()
    yield workspace
    read_commit.cache_clear()


def unpack(folder: Path) -> Path:
    """The tree of the pack that was just made."""
    with tarfile.open(pack.TARGET) as tar:
        tar.extractall(folder, filter="data")
    assert [path.name for path in folder.iterdir()] == ["afs-pack"]
    return folder / "afs-pack"


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_tree_its_commit_and_the_sets(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["model=olmo2_7b model.weights=random", "small.1: gpu=cpu workload=smoke", "--arch", "sm_90a"]
    assert pack.main(arguments) == 0
    tree = unpack(tmp_path / "host")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    content = json.loads((tree / "pack.json").read_text())
    assert content["commit"] == commit and (tree / "COMMIT").read_text() == f"{commit}\n"
    overrides = {name: one["overrides"] for name, one in content["sets"].items()}
    assert overrides == {
        "olmo2_7b": ["model=olmo2_7b", "model.weights=random"],
        "small.1": ["gpu=cpu", "workload=smoke"],
    }
    for name, given in overrides.items():
        assert (tree / f"params/{name}.yaml").read_text() == dump(compose_conf(given))
    assert set(content["code"]) == {"kernels/a.py", *(str(path) for path in Path("conf").rglob("*.yaml"))}
    assert (tree / "kernels/a.py").read_text() == "x = 1\n" and not (tree / "reports").exists()
    assert os.access(tree / "setup/run.sh", os.X_OK) and not os.access(tree / "kernels/a.py", os.X_OK)
    shown = capsys.readouterr()
    assert f"{pack.TARGET}: 0.0 MiB, commit {commit}" in shown.out
    assert "tar xf afs-pack.tar.gz && cd afs-pack && python3 -m stages.measure --limit 540 'olmo2_7b: " in shown.out
    assert shown.err.splitlines() == [
        "note: no compiled kernels are in the cache: the host compiles what it needs (`afs build` fills the cache)"
    ]
    assert not list(pack.TARGET.parent.glob(".*"))


def test_without_sets_conf_is_packed_as_it_is(checkout: Path, tmp_path: Path):
    assert pack.main([]) == 0
    assert (unpack(tmp_path / "host") / "params/olmo2_tiny.yaml").read_text() == Path("params.yaml").read_text()


def test_changed_and_unknown_code_is_said(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Path("kernels/a.py").write_text("x = 2\n")
    Path("kernels/new.py").touch()
    git("rm", "-q", "--cached", "setup/run.sh")
    Path("reports/REPORT.md").unlink()
    assert pack.main([]) == 0
    tree = unpack(tmp_path / "host")
    assert (tree / "COMMIT").read_text().endswith("-dirty\n") and (tree / "kernels/a.py").read_text() == "x = 2\n"
    assert not (tree / "kernels/new.py").exists() and not (tree / "setup").exists()
    said = capsys.readouterr().err
    assert "rows will say -dirty" in said and "note: kernels/new.py is left out: git does not track it" in said


def test_every_stage_that_measures_is_planned_as_dvc_runs_it():
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    planned = pack.plan_stages(pipeline, "olmo2_1b")
    weeks = pipeline["stages"]["bench"]["matrix"]["week"]
    shared = ["provision", "download", "inventory", "baseline", "build"]
    assert list(planned) == [*shared, *(f"{name}@{week}" for name in ("parity", "bench") for week in weeks)]
    assert planned["bench@w05"] == {
        "command": ["python", "-m", "stages.bench", "week=w05"],
        "outs": [f"reports/metrics/bench_w05.{ending}" for ending in ("parquet", "json", "csv")],
    }
    assert "data/hf/olmo2_1b.manifest.json" in planned["download"]["outs"] and "$" not in json.dumps(planned)


def test_cubins_of_the_asked_architectures_that_are_whole(checkout: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("a-sm_90a-k1", "a_sm_90a-sm_80-k2", "b-sm_90a-k3", "c-sm_90a-k4", "d-sm_90a-k5"):
        (cache / f"{name}.json").write_text(json.dumps({"cubin": f"{name}-1.cubin"}))
        (cache / f"{name}-1.cubin").write_bytes(b"cubin")
    (cache / "b-sm_90a-k3-1.cubin").unlink()
    (cache / "c-sm_90a-k4.json").write_text("{")
    (cache / "d-sm_90a-k5.json").write_text("[]")
    (cache / "ceilings").mkdir()

    def packed(*arguments: str) -> set[str]:
        assert pack.main([*arguments]) == 0
        with tarfile.open(pack.TARGET) as tar:
            return {Path(name).name for name in tar.getnames() if name.startswith("afs-pack/cache/")}

    hopper = {"a-sm_90a-k1.json", "a-sm_90a-k1-1.cubin"}
    assert packed("--arch", "sm_90a") == hopper
    assert packed() == hopper | {"a_sm_90a-sm_80-k2.json", "a_sm_90a-sm_80-k2-1.cubin"}
    assert packed("--arch", "sm_100,sm_120") == set()


def test_wheels(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert pack.main(["--wheels", str(wheels)]) == 1
    assert "holds no wheels: should be a folder of .whl files" in capsys.readouterr().err
    (wheels / "hydra_core-1.3.8-py3-none-any.whl").touch()
    assert pack.main(["--wheels", str(wheels)]) == 0
    assert [path.name for path in (unpack(tmp_path / "host") / "wheels").iterdir()] == [
        "hydra_core-1.3.8-py3-none-any.whl"
    ]
    (wheels / "Hydra.Core-1.3.7-py3-none-any.whl").touch()
    capsys.readouterr()
    assert pack.main(["--wheels", str(wheels)]) == 1
    assert "has hydra-core twice" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_pack_that_is_too_large_is_refused_and_the_one_before_stays(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert pack.main([]) == 0
    before = pack.TARGET.read_bytes()
    Path("data").mkdir()
    Path("data/noise").write_bytes(os.urandom(300_000))
    git("add", "data")
    capsys.readouterr()
    assert pack.main(["--max-size", "0.25"]) == 1
    said = capsys.readouterr().err
    assert f"{pack.TARGET} would have 0.3 MiB, --max-size is 0.25. The largest parts:\n     0.3 MiB  data/" in said
    assert [path.name for path in pack.TARGET.parent.iterdir()] == ["afs-pack.tar.gz"]
    assert pack.TARGET.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=olmo9"], "unknown model 'olmo9'; there are: llama3_8b"),
        (["gpu"], "gpu"),
        (["model.seed=x"], "model.seed = 'x'"),
        (["gpu=cpu", "workload=standard"], "two sets are named 'olmo2_tiny': give one a name of its own, as 'other: "),
        (["--arch", "sm_90"], "unknown architecture 'sm_90'; there are: sm_80"),
    ],
)
def test_bad_arguments(checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str):
    assert pack.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not pack.TARGET.exists()


@pytest.mark.parametrize("size", ["0", "-1", "64M", "inf"])
def test_a_bad_size(checkout: Path, capsys: pytest.CaptureFixture[str], size: str):
    with pytest.raises(SystemExit) as exit:
        pack.main([f"--max-size={size}"])
    assert exit.value.code == 2 and "should be a number above 0" in capsys.readouterr().err


def test_outside_git(checkout: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(".git")
    assert pack.main([]) == 1
    assert "git knows nothing of this folder" in capsys.readouterr().err


# --- all of it --------------------------------------------------------------------------------------------------------

# What such a host lacks: importing it fails.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hydra", "omegaconf", "dvc"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.slow
def test_this_tree_on_a_host_without_git_dvc_and_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    read_commit.cache_clear()
    target = tmp_path / "pack.tar.gz"
    assert pack.main(["smoke: gpu=cpu", "--out", str(target)]) == 0
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/sitecustomize.py").write_text(BLOCK)
    subprocess.run(["tar", "xf", str(target)], cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "blocked"), "GIT_CEILING_DIRECTORIES": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stages.measure", *arguments]
        return subprocess.run(
            command, cwd=tmp_path / "afs-pack", env=environment, capture_output=True, text=True, check=False
        )

    # Parity of layers needs what baseline makes: it fails, and the rest goes on.
    done = run("--out", "../out", "smoke: provision download inventory parity@w03 baseline bench@w02")
    assert done.returncode == 1, done.stderr
    states = [line.split()[2] for line in done.stdout.splitlines()[-6:]]
    assert states == ["ran", "ran", "ran", "failed", "ran", "ran"], done.stdout
    assert "data/reference/olmo2_tiny is not here: run the stage that makes it first" in done.stdout
    tables = sorted((tmp_path / "out/smoke/reports/metrics").glob("*.parquet"))
    assert [table.stem for table in tables] == ["baseline", "bench_w02", "inventory", "provision"]
    for table in tables:
        rows: Any = metrics.read(table)
        assert set(rows["commit"]) == {read_commit()}
    assert record.main([str(tmp_path / "out/smoke/reports/metrics"), "--weeks", "w02"]) == 1
    assert "build.parquet is missing" in capsys.readouterr().err

    cut = run("--out", "../cut", "--limit", "3", "baseline build")
    assert cut.returncode == 1 and [line.split()[2] for line in cut.stdout.splitlines()[-2:]] == ["cut", "not"]
    left = sorted(path.stem for path in (tmp_path / "cut/smoke/reports/metrics").glob("*.parquet"))
    assert left == ["bench_w02", "inventory", "provision"]
