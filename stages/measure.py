"""Runs stages of an unpacked pack on this host within a time limit, and leaves what they measured to bring back.

    tar xf afs-pack.tar.gz && cd afs-pack
    python3 -m stages.measure --limit 540 --out results 'olmo2_7b: provision download inventory baseline bench@w05'

A job is `SET: STAGE …`, or `STAGE …` for every set of parameters that was packed (stages/pack.py); no job lists them.
Jobs run one after another, and go on past a failed stage. At the limit the stage that runs is killed with all its
processes, and no other is started. Each set has a working directory, runs/SET, in which later calls go on.

results/SET/ is all that SET has measured, without what a failed or killed stage made: reports/metrics/, which `python
-m stages.record` takes, data/host.json, and logs/ of this call. results/summary.txt says how each stage ended.
"""

# Nothing but the standard library: this runs before a pack's wheels are installed.
import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.arguments import positive
from stages.commit import COMMIT

ROOT = Path(__file__).resolve().parents[1]
# What a pack holds beside the tree, and what is made beside it here.
PACK, PARAMS, CACHE, WHEELS, RUNS = "pack.json", "params", "cache", "wheels", "runs"
# What a stage reads of the tree by a path; its code comes by PYTHONPATH.
LINKED = ("conf", "data/models")
HOST = "data/host.json"


class MeasureError(ValueError):
    """A request for what is not in this pack, or cannot be done on this host: one line, exit status 2."""


@dataclass
class Job:
    """One stage of one set, and how it went: `status` is "ran", "failed", "cut" or "not started"."""

    name: str
    stage: str
    status: str = "not started"
    seconds: float = 0.0
    said: str = ""
    """The last line of a failed stage."""

    def __str__(self) -> str:
        took = f"{self.seconds:9.1f} s" if self.status != "not started" else " " * 11
        return f"{self.name:<16} {self.stage:<12} {self.status:<12}{took}  {self.said}".rstrip()


# --- what to do -------------------------------------------------------------------------------------------------------


def read_pack(root: Path) -> dict[str, Any]:
    """pack.json of an unpacked pack. Raises MeasureError where `root` is none."""
    try:
        return json.loads((root / PACK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MeasureError(
            f"{root} holds no {PACK}, as an unpacked pack does: `python -m stages.pack` makes one"
        ) from None


def parse_jobs(texts: Sequence[str], sets: Mapping[str, Any]) -> list[Job]:
    """The jobs of the command line. Raises MeasureError for a set or a stage that was not packed."""
    jobs = []
    for text in texts:
        name, colon, rest = text.partition(":")
        names, stages = ([name.strip()], rest.split()) if colon else (list(sets), text.split())
        if not stages:
            raise MeasureError(f"'{text}' names no stage: should be 'SET: STAGE …' or 'STAGE …'")
        for name in names:
            if name not in sets:
                raise MeasureError(f"'{text}': no set '{name}' was packed; there are: {', '.join(sets)}")
            for stage in stages:
                if stage not in sets[name]["stages"]:
                    raise MeasureError(f"'{text}': no stage '{stage}'; there are: {', '.join(sets[name]['stages'])}")
                jobs.append(Job(name, stage))
    return jobs


def find_changed(root: Path, pack: Mapping[str, Any]) -> list[str]:
    """The files of code that are not as they were packed."""

    def digest(path: Path) -> str | None:
        with contextlib.suppress(OSError):
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return None

    return [name for name, packed in pack["code"].items() if digest(root / name) != packed]


def describe(pack: Mapping[str, Any]) -> str:
    """Describe a pack for a reader."""
    lines = [f"commit {pack['commit']}"]
    for name, content in pack["sets"].items():
        lines.append(f"{name}: {' '.join(content['overrides']) or 'as params.yaml'}")
        lines.append(f"    {' '.join(content['stages'])}")
    return "\n".join(lines)


# --- where it is done -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_one(runs: Path) -> Iterator[None]:
    """Keeps another call out of the same working directories. Raises MeasureError where one is in them."""
    runs.mkdir(exist_ok=True)
    with (runs / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MeasureError(f"another `stages.measure` runs in {runs}: wait for it") from None
        yield


def make_workspace(root: Path, name: str, commit: str) -> Path:
    """The working directory of a set, as a checkout looks to a stage. One of another commit or other parameters is made
    anew: what was measured there is not of this pack.
    """
    folder = root / RUNS / name
    params = (root / PARAMS / f"{name}.yaml").read_bytes()
    wanted = {"params.yaml": params, str(COMMIT): f"{commit}\n".encode()}
    if folder.exists() and any(not (folder / f).exists() or (folder / f).read_bytes() != wanted[f] for f in wanted):
        print(f"{RUNS}/{name} is of another commit or other parameters: begins anew", flush=True)
        shutil.rmtree(folder)
    for link in LINKED:
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(root / link)
    for file, content in wanted.items():
        (folder / file).write_bytes(content)
    return folder


def install_wheels(root: Path, timeout: float | None) -> Path | None:
    """The folder that a pack's wheels are installed in, now or by an earlier call; None of a pack without any.

    Raises MeasureError, with pip's last line, where they do not fit this Python.
    """
    wheels = sorted((root / WHEELS).glob("*.whl"))
    if not wheels:
        return None
    names = "\n".join(wheel.name for wheel in wheels)
    site = root / f"site-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    if site.exists():
        return site
    part = site.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    print(f"installs {len(wheels)} wheels into {site.name}", flush=True)
    # Without their dependencies: pip would look for those in the target alone, not among this host's packages.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    try:
        done = subprocess.run(
            [*pip, "--disable-pip-version-check", "--target", str(part), *map(str, wheels)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MeasureError(f"the {len(wheels)} wheels were not installed within the time limit") from None
    if done.returncode:
        raise MeasureError(f"the wheels cannot be installed: {last_line(done.stdout)}")
    part.rename(site)
    return site


def make_environment(root: Path, site: Path | None) -> dict[str, str]:
    """Environment that stages run with, but for DVC_STAGE: the pack's code, wheels and cubins."""
    paths = [str(root), *([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Unbuffered, so that the log of a killed stage says how far it came.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "AFS_CACHE": str(root / CACHE),
    }  # fmt: skip


# --- doing it ---------------------------------------------------------------------------------------------------------


def run_stage(job: Job, plan: Mapping[str, Any], folder: Path, log: Path, env: Mapping[str, str], end: float) -> None:
    """Runs a stage as DVC does, until the clock shows `end` at most, and notes in `job` how it went.

    What it makes is removed before, and after where it did not run to its end.
    """
    command = [sys.executable if word == "python" else word for word in plan["command"]]
    start = time.monotonic()
    remove(folder, plan["outs"])
    log.parent.mkdir(parents=True, exist_ok=True)
    job.status = "failed"
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=folder, env={**env, "DVC_STAGE": job.stage}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            try:
                process.wait(max(end - time.monotonic(), 0) if end < float("inf") else None)
                job.status = "failed" if process.returncode else "ran"
            except subprocess.TimeoutExpired:
                job.status = "cut"
            finally:
                # Whatever happened, nothing of it stays: not the stage itself, nor what it started.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if job.status == "failed":
            job.said = last_line(log.read_text(encoding="utf-8", errors="replace"))
            if process.returncode < 0:
                job.said = f"killed by {signal.Signals(-process.returncode).name}; {job.said}".removesuffix("; ")
    except BaseException:
        job.status, job.said = "cut", "interrupted"
        raise
    finally:
        job.seconds = time.monotonic() - start
        if job.status != "ran":
            remove(folder, plan["outs"])


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent is killed, which cannot do it then."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def remove(folder: Path, names: Sequence[str]) -> None:
    """Removes files and folders, there or not."""
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def bring(folder: Path, out: Path) -> None:
    """Makes `out` hold just what `folder` has measured: each file copied beside its place and renamed."""
    # A killed write leaves a file that begins with a dot.
    found = [path for path in (folder / "reports").rglob("*") if path.is_file() and not path.name.startswith(".")]
    found += [path for path in (folder / HOST,) if path.exists()]
    wanted = {out / path.relative_to(folder): path for path in found}
    for old in (*(out / "reports").rglob("*"), out / HOST):
        if old.is_file() and old not in wanted:
            old.unlink()
    for target, source in wanted.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)


def write_summary(out: Path, heading: str, jobs: Sequence[Job]) -> None:
    """summary.txt as far as it goes, so that it is there whenever this process ends."""
    part = out / ".summary.txt.part"
    part.write_text("\n".join([heading, "", *map(str, jobs)]) + "\n", encoding="utf-8")
    part.replace(out / "summary.txt")


def measure(root: Path, pack: Mapping[str, Any], jobs: Sequence[Job], out: Path, limit: float) -> None:
    """Runs the jobs in `limit` seconds and brings what they measured to `out`, after each of them.

    Raises MeasureError where `out` has a set already, or the wheels do not fit.
    """
    end = time.monotonic() + limit
    names = list(dict.fromkeys(job.name for job in jobs))
    for name in names:
        if (out / name).exists():
            raise MeasureError(f"{out / name} is there already: name another --out (it gets what {RUNS}/ holds too)")
    changed = find_changed(root, pack)
    commit = pack["commit"]
    if changed:
        print(f"{', '.join(changed[:3])}{' …' if len(changed) > 3 else ''}: not as packed; rows say -dirty", flush=True)
        commit = f"{commit.removesuffix('-dirty')}-dirty"
    with only_one(root / RUNS):
        folders = {name: make_workspace(root, name, commit) for name in names}
        env = make_environment(root, install_wheels(root, None if limit == float("inf") else limit))
        out.mkdir(parents=True, exist_ok=True)
        within = f"within {limit:g} s" if limit < float("inf") else "without a limit"
        heading = f"commit {commit}, {within}, began {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
        try:
            for name in names:
                bring(folders[name], out / name)
            for job in jobs:
                if time.monotonic() >= end:
                    break
                print(f"{job.name:<16} {job.stage}", flush=True)
                log = out / job.name / "logs" / f"{job.stage.replace('@', '_')}.log"
                run_stage(job, pack["sets"][job.name]["stages"][job.stage], folders[job.name], log, env, end)
                bring(folders[job.name], out / job.name)
                write_summary(out, heading, jobs)
        finally:
            write_summary(out, heading, jobs)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Runs the jobs and prints how each ended. Exit status: 0; 1 where one did not run; 2 for wrong arguments."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python3 -m stages.measure",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("jobs", nargs="*", metavar="'SET: STAGE …'", help="what to run; nothing: list what was packed")
    parser.add_argument("--limit", type=positive, default=math.inf, metavar="SECONDS", help="for all; default: none")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER", help="default: results")
    given = parser.parse_args(arguments)
    try:
        pack = read_pack(root)
        if not given.jobs:
            print(describe(pack))
            return 0
        jobs = parse_jobs(given.jobs, pack["sets"])
        measure(root, pack, jobs, given.out, given.limit)
    except MeasureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((given.out / "summary.txt").read_text(encoding="utf-8"), end="")
    return 0 if all(job.status == "ran" for job in jobs) else 1


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
