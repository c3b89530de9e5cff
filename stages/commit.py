"""Which commit the code of the working directory is of, as every row of the metrics says.

Git answers. Where a pack was unpacked (stages/pack.py) there is no git, and the file COMMIT answers.
"""

import functools
import subprocess
from pathlib import Path

COMMIT = Path("COMMIT")
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


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
