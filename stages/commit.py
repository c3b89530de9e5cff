"""Which commit the code of the working directory is of, as every row of the metrics says; and of which day it is.

Git answers. Where a pack was unpacked (stages/pack.py) there is no git, and the file COMMIT answers.
"""

import functools
import json
import subprocess
from pathlib import Path

COMMIT = Path("COMMIT")
DAYS = "commits.json"
"""Beside recorded runs: the day of each commit that their rows are of, so that the report needs no git to say it."""
CODE = ("stages", "engine", "kernels", "conf")


@functools.cache
def read_commit() -> str | None:
    """The commit, with `-dirty` where code differs from it; None outside a git repository and a pack."""
    try:
        # First: a pack may lie unpacked within another repository.
        return COMMIT.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        pass
    try:
        head = _git("rev-parse", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if dirty else head


def find_day(commit: str) -> str | None:
    """The day a commit was made, "2026-11-27", as git says; None where it does not know the commit."""
    try:
        return _git("show", "--no-patch", "--format=%cs", commit.removesuffix("-dirty"), "--") or None
    except (OSError, subprocess.CalledProcessError):
        return None


def read_days(recorded: Path) -> dict[str, str]:
    """Commit -> its day, as it is kept beside the recorded runs."""
    path = recorded / DAYS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
