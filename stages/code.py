"""Digests each stage's code: of every module it can import, without comments, docstrings and layout.

The stages depend on these files, `data/code/<stage>.json`, not on folders of sources: a comment repeats no measurement,
nor does a module that a stage never reaches. What differs between two of them names the modules that changed.

By hand, `python -m stages.code against=lock` compares them with dvc.lock and fails where the results that are committed
are of other code.
"""

from __future__ import annotations

import ast
import functools
import json
from hashlib import md5, sha256
from pathlib import Path

import yaml

from stages.exits import StageError
from stages.stage import Run, stage, write_whole

PACKAGES = ("stages", "engine", "kernels")
STAGES = ("inventory", "baseline", "build", "parity", "bench", "report")
FOLDER = Path("data/code")
DATA = ".csv"
"""Ending of files beside modules that decide what they do."""


def find_module(name: str) -> Path | None:
    """The file of one of our modules, relative to the root."""
    path = Path(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@functools.cache
def list_imports(source: str) -> frozenset[str]:
    """Our modules that a file of this text imports at any place, but for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                found.update([child.module, *(f"{child.module}.{alias.name}" for alias in child.names)])
            visit(child)

    visit(ast.parse(source))
    return frozenset(name for name in found if name.split(".")[0] in PACKAGES)


def list_files(module: str) -> list[Path]:
    """Every file of ours that importing and running `module` can load, sorted."""
    files: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = find_module(name)
        if file is None or file in files:
            continue
        files.add(file)
        parts = name.split(".")
        waiting += [".".join(parts[:length]) for length in range(1, len(parts))]
        waiting += list_imports(file.read_text(encoding="utf-8"))
    beside = {path for folder in {file.parent for file in files} for path in folder.glob(f"*{DATA}")}
    return sorted(files | beside)


def digest(file: Path) -> str:
    """Digest of a file's content: of a module its tokens, as Python 3.11 and 3.12 agree on them."""
    from kernels.identity import code_words

    content = "\n".join(code_words(str(file))).encode() if file.suffix == ".py" else file.read_bytes()
    return sha256(content).hexdigest()[:16]


def describe(name: str) -> str:
    """The text of a stage's file: its modules' digests as JSON."""
    return json.dumps({path.as_posix(): digest(path) for path in list_files(f"stages.{name}")}, indent=1) + "\n"


def find_stale(lock: Path = Path("dvc.lock")) -> list[str]:
    """The entries of `lock` whose results are of other code than what is here. Raises StageError without a lock."""
    if not lock.is_file():
        raise StageError(f"{lock} is not here: run from the repository's root, `dvc repro` writes it")
    sums = {name: md5(describe(name).encode()).hexdigest() for name in STAGES}
    entries = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    stale = []
    for entry, content in entries.items():
        name = entry.partition("@")[0]
        recorded = {dep["path"]: dep["md5"] for dep in content.get("deps", [])}
        if name in sums and recorded.get(f"{FOLDER}/{name}.json") != sums[name]:
            stale.append(entry)
    return stale + [name for name in STAGES if name not in {entry.partition("@")[0] for entry in entries}]


@stage(options={"against": ("lock",)})
def main(run: Run, against: str | None = None) -> None:
    if against is None:
        for name in STAGES:
            write_whole(run.out(FOLDER / f"{name}.json"), describe(name))
    elif stale := find_stale():
        raise StageError(f"dvc.lock holds results of other code: {', '.join(stale)}; run `dvc repro` and commit them")


if __name__ == "__main__":
    main()
