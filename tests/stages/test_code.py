"""stages/code.py: what belongs to a stage's code, what changes its digest, and results that are of other code."""

import linecache
from hashlib import md5
from pathlib import Path

import pytest
import yaml

from stages import code
from stages.exits import StageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two stages, one of which imports a module of the engine in a function."""
    files = {
        "stages/__init__.py": "",
        "stages/build.py": "def main():\n    from engine import fast\n    return fast.run()\n",
        "stages/report.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engine.fast\nx = 1\n",
        "engine/__init__.py": "",
        "engine/fast.py": 'def run():\n    """Runs."""\n    return "a" + f"{1 + 1}"\n',
        "engine/other.py": "y = 1\n",
        "engine/table.csv": "1,2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code, "STAGES", ("build", "report"))
    forget()
    return tmp_path


def forget() -> None:
    """A process reads a file of one name once; here it is another in each test."""
    from kernels.identity import _tokens

    _tokens.cache_clear()
    linecache.clearcache()


def describe(name: str) -> str:
    forget()
    return code.describe(name)


def names(module: str) -> list[str]:
    return [path.as_posix() for path in code.list_files(module)]


def test_files_are_what_can_be_imported_and_tables_beside_them(here: Path):
    build = ["engine/__init__.py", "engine/fast.py", "engine/table.csv", "stages/__init__.py", "stages/build.py"]
    assert names("stages.build") == build
    assert names("stages.report") == ["stages/__init__.py", "stages/report.py"]


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("engine/fast.py", '    """Runs."""\n', '    """Runs it."""  # now\n\n', True),
        ("engine/fast.py", '"a"', '"b"', False),
        ("engine/fast.py", "1 + 1", "1 + 2", False),
        ("engine/table.csv", "2", "3", False),
        ("engine/other.py", "1", "2", True),
    ],
)
def test_digests_change_with_code_that_is_reached_and_not_with_comments(
    here: Path, file: str, old: str, new: str, same: bool
):
    before = describe("build")
    path = here / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert (describe("build") == before) == same


def test_the_stage_writes_a_file_a_stage(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_STAGE", "code")
    code.main([])
    assert sorted(path.name for path in Path("data/code").iterdir()) == ["build.json", "report.json"]
    assert Path("data/code/build.json").read_text() == describe("build")


def write_lock(here: Path, build: str) -> None:
    entries = {
        name: {"deps": [{"path": f"data/code/{name.split('@')[0]}.json", "md5": md5(text.encode()).hexdigest()}]}
        for name, text in {"build@w01": build, "report": describe("report")}.items()
    }
    (here / "dvc.lock").write_text(yaml.safe_dump({"stages": entries}))


def test_a_lock_of_other_code_is_refused_by_the_stages_name(here: Path, capsys: pytest.CaptureFixture[str]):
    write_lock(here, describe("build"))
    code.main(["against=lock"])
    write_lock(here, "{}")
    with pytest.raises(SystemExit) as stopped:
        code.main(["against=lock"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "error: code: dvc.lock holds results of other code: build@w01; run `dvc repro` and commit them\n"
    )


def test_no_lock_and_a_stage_that_it_does_not_know(here: Path):
    with pytest.raises(StageError, match=r"dvc\.lock is not here"):
        code.find_stale()
    (here / "dvc.lock").write_text("stages: {}\n")
    assert code.find_stale() == ["build", "report"]


def test_every_stage_of_the_pipeline_reaches_what_it_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    bench = names("stages.bench")
    assert {"engine/llm.py", "engine/server/app.py", "kernels/linear/tilings.csv"} <= set(bench)
    assert {"stages/bench/serve.py", "stages/bench/peers.py", "stages/profile.py"} <= set(bench)
    assert not any(name.startswith("stages/parity") for name in bench)
    assert "kernels/linear/tiled/wgmma.py" in names("stages.build") and "engine/llm.py" not in names("stages.build")
    assert not any(name.startswith("kernels/linear") for name in names("stages.report"))
