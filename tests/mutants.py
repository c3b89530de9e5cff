"""Whether the tests notice faults: `make mutants`, or `python -m tests.mutants [WORDS]` for those whose text has WORDS.

mutmut and cosmic-ray make every mutant they can think of, thousands a kernel, of which a test takes seconds each and
most change nothing that matters. These are chosen: tests/mutants.toml. Each is put into a copy of the code of its own.
Exit status 1 where one is not noticed without a reason, is noticed despite one, or no longer fits the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("engine", "kernels", "stages", "tests", "pyproject.toml")
LIMIT = 300  # seconds after which a mutant hangs, and is noticed by that


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which stands once in `file`, becomes `new`. tests: a file, and perhaps -k. survives: why no test
    can notice it."""

    file: str
    old: str
    tests: str
    new: str = ""
    survives: str = ""

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {before} → {after or 'nothing'}"

    def text(self, root: Path) -> str:
        """The file with the fault. Raises ValueError where `old` does not stand once in it."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times, 1 needed:\n{self.old}")
        return text.replace(self.old, self.new)

    @property
    def arguments(self) -> list[str]:
        """Words for pytest: the file, and -k with all that follows it as one."""
        file, k, expression = self.tests.partition(" -k ")
        return [file, *(["-k", expression] if k else [])]


def read() -> list[Mutant]:
    """The mutants of tests/mutants.toml."""
    return [Mutant(**entry) for entry in tomllib.loads((ROOT / "tests/mutants.toml").read_text())["mutant"]]


def is_noticed(mutant: Mutant) -> bool:
    """Whether its tests fail. Raises RuntimeError where they do not run."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        (root / mutant.file).write_text(mutant.text(ROOT))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
        command += ["-m", "not gpu and not slow", *mutant.arguments]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return True
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant}: pytest {mutant.tests} ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main(words: list[str]) -> int:
    mutants = [mutant for mutant in read() if all(word in str(mutant) for word in words)]
    wrong = 0

    def attempt(mutant: Mutant) -> None:
        nonlocal wrong
        begun = time.monotonic()
        try:
            noticed = is_noticed(mutant)
        except (ValueError, RuntimeError) as error:
            wrong += 1
            print(f"broken   {mutant}\n{error}", flush=True)
            return
        wrong += noticed == bool(mutant.survives)
        said = "noticed " if noticed else "survives"
        why = f"\n         {mutant.survives}" if mutant.survives else ""
        print(f"{said} {time.monotonic() - begun:4.0f} s  {mutant}{why}", flush=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(attempt, mutants))
    print(f"{len(mutants)} mutants, {wrong} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
