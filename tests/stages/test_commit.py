"""Which commit the working directory is of: git's answer, or a pack's."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.commit import COMMIT, read_commit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory outside any repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    read_commit.cache_clear()
    yield tmp_path
    read_commit.cache_clear()


def make_repository() -> None:
    Path("stages").mkdir()
    Path("stages/a.py").write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True)


def test_it_is_unknown_outside_git():
    assert read_commit() is None


def test_changed_code_marks_it():
    make_repository()
    clean = read_commit()
    assert clean is not None and len(clean) == 40
    Path("report.md").write_text("not code")
    Path("stages/a.py").write_text("x = 1\n")
    read_commit.cache_clear()
    assert read_commit() == f"{clean}-dirty"


def test_a_pack_answers_before_a_repository_around_it():
    make_repository()
    COMMIT.write_text(f"{'a' * 40}-dirty\n")
    assert read_commit() == f"{'a' * 40}-dirty"
