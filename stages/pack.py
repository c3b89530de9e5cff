"""Packs what a measuring run needs into one file, for a GPU host without network, git, DVC or Hydra.

    python -m stages.pack 'model=olmo2_7b model.weights=random' 'small: model=olmo2_1b workload=smoke' --arch sm_90a

Each argument is a set of Hydra overrides, composed here, with a name before a colon where the model's own will not do;
none: conf/ as it is. The file holds the tree as it is in the working directory (what git tracks, without reports/),
its commit, the sets, the compiled kernels that the cache has ($AFS_CACHE; `afs build` fills it), and with --wheels the
Python packages that the host lacks. On the host, stages/measure.py runs stages of it.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.arguments import positive
from stages.commit import CODE, COMMIT, read_commit
from stages.compose import as_dict, compose_conf, dump
from stages.exits import StageError, reported
from stages.measure import CACHE, PACK, PARAMS, WHEELS
from stages.params import ParamsError
from stages.stage import OUTPUTS
from stages.validate import check_params

TARGET = OUTPUTS / "afs-pack.tar.gz"
FOLDER = "afs-pack"
PIPELINE = Path("dvc.yaml")
# Figures and measurements of other runs, which no measuring stage reads.
LEFT_OUT = "reports/"
MIB = 2**20
SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """A file of the pack: its name there, what there is of it, and the part of the pack that its bytes count for."""

    name: str
    source: Path | bytes
    part: str


# --- what is packed ---------------------------------------------------------------------------------------------------


def compose_sets(texts: Sequence[str]) -> dict[str, tuple[list[str], Any]]:
    """Name → overrides and the composed configuration of each set. Raises ParamsError."""
    sets: dict[str, tuple[list[str], Any]] = {}
    for text in texts or [""]:
        named = re.match(r"\s*([\w.-]+):\s", f"{text} ")
        overrides = text[named.end() :].split() if named else text.split()
        composed = compose_conf(overrides)
        params = as_dict(composed)
        check_params(params)
        name = named[1] if named else params["model"]["name"]
        if name in sets:
            raise ParamsError(f"two sets are named '{name}': give one a name of its own, as 'other: {text}'")
        sets[name] = (overrides, composed)
    return sets


def plan_stages(pipeline: Mapping[str, Any], model: str) -> dict[str, dict[str, list[str]]]:
    """Plan of the stages that measure, by DVC's names: each one's command and what it makes."""

    def fill(text: str, week: str) -> str:
        return text.replace("${item.week}", week).replace("${model.name}", model)

    planned = {}
    for name, stage in pipeline["stages"].items():
        if stage.get("frozen") or name in ("code", "report"):
            continue
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
        paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
        for week in stage.get("matrix", {"week": [""]})["week"]:
            planned[f"{name}@{week}" if week else name] = {
                "command": shlex.split(fill(stage["cmd"], week)),
                "outs": [fill(path, week) for path in paths],
            }
    return planned


def list_tracked() -> list[str]:
    """The files that git tracks and the working directory has, but for LEFT_OUT. Raises StageError outside git."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        raise StageError(
            "git knows nothing of this folder: pack from a git checkout, as rows name its commit"
        ) from None
    names = [name for name in done.stdout.split("\0") if name and not name.startswith(LEFT_OUT)]
    return [name for name in names if Path(name).is_file()]


def list_untracked() -> list[str]:
    """Files of code that git neither tracks nor ignores: they stay behind."""
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE]
    return [
        name for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0") if name
    ]


def list_cubins(cache: Path, archs: Sequence[str]) -> list[Entry]:
    """The compiled kernels of `archs` that the cache has whole: a description and the cubin that it names."""
    entries = []
    for arch in archs:
        for described in sorted(cache.glob(f"*-{arch}-*.json")):
            try:
                cubin = cache / json.loads(described.read_bytes())["cubin"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the cache compiles such an entry anew, and so does the host
            if cubin.is_file():
                entries += [Entry(f"{CACHE}/{file.name}", file, f"cubins of {arch}") for file in (described, cubin)]
    return entries


def list_wheels(folder: Path | None) -> list[Entry]:
    """The wheels in a folder. Raises StageError where there are none, or two of one package, which pip refuses."""
    wheels = sorted(folder.glob("*.whl")) if folder else []
    if folder and not wheels:
        raise StageError(f"{folder} holds no wheels: should be a folder of .whl files, as `pip download -d` leaves")
    seen: dict[str, str] = {}
    for wheel in wheels:
        package = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        if package in seen:
            raise StageError(f"{folder} has {package} twice, {seen[package]} and {wheel.name}: keep one")
        seen[package] = wheel.name
    return [Entry(f"{WHEELS}/{wheel.name}", wheel, f"wheel of {wheel.name.partition('-')[0]}") for wheel in wheels]


def list_entries(sets: Mapping[str, tuple[list[str], Any]], archs: Sequence[str], wheels: Path | None) -> list[Entry]:
    """All files of the pack. Raises StageError."""
    from kernels.cubins import cache_directory

    tracked = list_tracked()
    commit = read_commit()
    pipeline = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    content = {
        "commit": commit,
        "sets": {
            name: {"overrides": overrides, "stages": plan_stages(pipeline, composed.model.name)}
            for name, (overrides, composed) in sets.items()
        },
        # So that rows measured with other code than this say so.
        "code": {
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in tracked
            if name.startswith(tuple(f"{folder}/" for folder in CODE))
        },
    }
    return [
        Entry(PACK, (json.dumps(content, indent=1) + "\n").encode(), "parameters"),
        Entry(str(COMMIT), f"{commit}\n".encode(), "parameters"),
        *(Entry(f"{PARAMS}/{name}.yaml", dump(sets[name][1]).encode(), "parameters") for name in sets),
        *(Entry(name, Path(name), f"{name.partition('/')[0]}/" if "/" in name else "files") for name in tracked),
        *list_cubins(cache_directory(), archs),
        *list_wheels(wheels),
    ]


# --- packing ----------------------------------------------------------------------------------------------------------


def write_pack(entries: Sequence[Entry], target: Path, most: float) -> Counter[str]:
    """Writes the pack whole or not at all; the bytes that each part takes of it.

    Raises StageError, naming the largest parts, where it has more than `most` bytes; `target` is as it was then.
    """
    sizes: Counter[str] = Counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as raw:
            with (
                gzip.GzipFile(filename="", fileobj=raw, mode="wb") as packed,
                tarfile.open(fileobj=packed, mode="w") as tar,
            ):
                for entry in entries:
                    before = raw.tell()
                    add(tar, entry)
                    sizes[entry.part] += raw.tell() - before
            # What the compressor held back belongs to what came last.
            sizes[entries[-1].part] += raw.tell() - sizes.total()
        if sizes.total() > most:
            largest = "\n".join(f"  {line}" for line in list_sizes(sizes)[:SHOWN])
            raise StageError(
                f"{target} would have {sizes.total() / MIB:.1f} MiB, --max-size is {most / MIB:g}. The largest parts:\n"
                f"{largest}\nless: --arch, fewer --wheels, or an AFS_CACHE that a single `afs build` has filled"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return sizes


def add(tar: tarfile.TarFile, entry: Entry) -> None:
    """Adds one file, nobody's in particular."""
    name = f"{FOLDER}/{entry.name}"
    if isinstance(entry.source, bytes):
        info = tarfile.TarInfo(name)
        info.size, info.mtime = len(entry.source), int(time.time())
        tar.addfile(info, io.BytesIO(entry.source))
        return
    info = tar.gettarinfo(entry.source, name)
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    with entry.source.open("rb") as file:
        tar.addfile(info, file)


def list_sizes(sizes: Counter[str]) -> list[str]:
    """A line a part, the largest first."""
    return [f"{size / MIB:6.1f} MiB  {part}" for part, size in sizes.most_common() if size >= MIB / 20]


# --- the command ------------------------------------------------------------------------------------------------------


def choose_archs(text: str | None) -> Sequence[str]:
    """The architectures that `text` names, or all. Raises ParamsError."""
    from kernels.launch import ARCHITECTURES

    chosen = text.split(",") if text else ARCHITECTURES
    for arch in chosen:
        if arch not in ARCHITECTURES:
            raise ParamsError(f"unknown architecture '{arch}'; there are: {', '.join(ARCHITECTURES)}")
    return chosen


def warn(untracked: Sequence[str], entries: Sequence[Entry]) -> Iterator[str]:
    """Warnings for a reader before the pack is carried away."""
    if (read_commit() or "").endswith("-dirty"):
        yield "code differs from its commit: rows will say -dirty, which `python -m stages.record` refuses"
    if untracked:
        more = f" and {len(untracked) - 1} more" if len(untracked) > 1 else ""
        yield f"{untracked[0]}{more} is left out: git does not track it"
    if not any(entry.name.startswith(f"{CACHE}/") for entry in entries):
        yield "no compiled kernels are in the cache: the host compiles what it needs (`afs build` fills the cache)"


def main(arguments: list[str]) -> int:
    """Prints what was packed and how to run it. Exit status: 0; 1 where it cannot be packed; 2 for wrong arguments."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m stages.pack", description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sets", nargs="*", metavar="'[NAME:] key=value …'", help="a set of parameters, as Hydra overrides"
    )
    parser.add_argument("--out", type=Path, default=TARGET, metavar="FILE", help=f"default: {TARGET}")
    parser.add_argument("--arch", metavar="sm_…,sm_…", help="the compiled kernels of these alone; default: of all")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="Python packages to install on the host")
    parser.add_argument("--max-size", type=positive, default=64.0, metavar="MIB", help="refuse more; default: 64")
    given = parser.parse_intermixed_args(arguments)
    try:
        archs = choose_archs(given.arch)
        sets = compose_sets(given.sets)
        entries = list_entries(sets, archs, given.wheels)
        sizes = write_pack(entries, given.out, given.max_size * MIB)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in warn(list_untracked(), entries):
        print(f"note: {line}", file=sys.stderr)
    print("\n".join([f"{given.out}: {sizes.total() / MIB:.1f} MiB, commit {read_commit()}", *list_sizes(sizes)]))
    jobs = f"'{next(iter(sets))}: provision download inventory baseline'"
    print(f"\non the host:\n  tar xf {given.out.name} && cd {FOLDER} && python3 -m stages.measure --limit 540 {jobs}")
    return 0


if __name__ == "__main__":
    with reported("pack"):
        sys.exit(main(sys.argv[1:]))
