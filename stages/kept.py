"""Compares a run with what earlier runs on machines of its kind have left, and decides whether it is left in turn.

    python -m stages.kept key                                       what kind of machine this is
    python -m stages.kept judge KEPT reports/metrics --run 123 --summary comparison.md --keep

KEPT is a folder that is handed from run to run (the workflows' cache):

    KEPT/runs/<run>.parquet      the last two runs that were not worse
    KEPT/anchor/<run>.parquet    the rows that were first measured in this run, and are never replaced

A run is compared with the last one, which shows a step, and with the anchor, which shows a drift that is noise every
single night. `--anchor` takes another one, a recorded run. With `--keep` a run in which nothing is worse, or that has
nothing to be compared with, becomes the last one, and what it measures for the first time joins the anchor. One that is
worse changes nothing, so that the next is compared with the same again. `--accept` forgets all that was kept and begins
with this run. The same run again, another attempt, is not compared with itself.

Prints `worse=`, `changed=` and `kept=`, each true or false; what is accepted is not worse. Exit status: 0; 2 where the
run's own measurements cannot be read.
"""

import argparse
import contextlib
import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from stages import metrics
from stages.compare import Comparison, Run, add_noise, compare, read_run
from stages.exits import reported
from stages.host import Host, read_host
from stages.stage import write_whole

RUNS, ANCHOR = "runs", "anchor"
LEFT = 2  # runs: the last one, and the one before for another attempt at the last


@dataclass(frozen=True)
class Verdict:
    """Verdict on a run, beside those before it."""

    worse: bool
    changed: bool
    text: str
    """The comparisons, as Markdown."""


def host_key(host: Host) -> str:
    """Key that runs must have in common to be compared: the Python, and a sum of CPU, cores and GPU."""
    kind = "\n".join([host.cpu, str(host.cores), host.gpu])
    return f"{host.python}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def read_kept(folder: Path, run: int) -> dict[int, Run]:
    """The runs in a folder of KEPT by number, the newest first, without `run` itself.

    A file that cannot be read, as one of an older schema, is none.
    """
    found: dict[int, Run] = {}
    for path in sorted(folder.glob("*.parquet"), key=lambda path: -int(path.stem)):
        if int(path.stem) != run:
            with contextlib.suppress(metrics.MetricsError):
                found[int(path.stem)] = read_run(path)
    return found


def judge(kept: Path, new: Run, run: int, anchor: Run | None, floor: float, width: float) -> Verdict:
    """Compares `new`, of number `run`, with the last run kept before it and with the anchor; None: `kept`'s own."""
    last = next(iter(read_kept(kept / RUNS, run).values()), {})
    if anchor is None:
        anchor = {identity: row for rows in read_kept(kept / ANCHOR, run).values() for identity, row in rows.items()}
    found: list[Comparison] = []
    parts = []
    for title, before in (("the last run", last), ("the anchor", anchor)):
        compared = compare(before, new, floor, width)
        if compared:
            found.append(compared)
        said = compared.text if compared else "Nothing there is comparable with this run.\n"
        parts.append(f"# Beside {title}\n\n{said}")
    return Verdict(
        worse=any(one.worse for one in found),
        changed=any(one.worse or one.better for one in found),
        text="\n".join(parts),
    )


def keep(kept: Path, new: Run, run: int) -> None:
    """Leaves `new` as the last run, and what the anchor lacks in it."""
    anchor = read_kept(kept / ANCHOR, run)
    known = {identity for rows in anchor.values() for identity in rows}
    write(kept / ANCHOR / f"{run}.parquet", {key: row for key, row in new.items() if key not in known})
    write(kept / RUNS / f"{run}.parquet", new)
    wanted = {RUNS: [run, *read_kept(kept / RUNS, run)][:LEFT], ANCHOR: [run, *anchor]}
    for name, runs in wanted.items():
        for path in (kept / name).glob("*.parquet"):
            if int(path.stem) not in runs:
                path.unlink()


def write(path: Path, run: Run) -> None:
    """Writes a run's rows as one Parquet file, whole or not at all; none where there are no rows."""
    path.unlink(missing_ok=True)
    if run:
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_table(path, list(run.values()))


def main(arguments: list[str]) -> int:
    """Prints the key, or the verdict, and leaves the run where it is to be left."""
    about, _, rule = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m stages.kept", description=about, epilog=rule, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("key", help="print what kind of machine this is")
    judging = commands.add_parser("judge", help="compare a run with those before it")
    judging.add_argument("kept", type=Path, help="the folder that is handed from run to run; need not be there")
    judging.add_argument("new", type=Path, help="the metrics of this run: a file, or a folder of them")
    judging.add_argument("--run", type=int, required=True, help="the run's number, the same in each attempt at it")
    judging.add_argument("--anchor", type=Path, help="a recorded run to compare with, in place of the first ones kept")
    judging.add_argument("--summary", type=Path, required=True, help="where to write the comparisons")
    leaving = judging.add_mutually_exclusive_group()
    leaving.add_argument("--keep", action="store_true", help="leave this run for the next ones, if nothing is worse")
    leaving.add_argument("--accept", action="store_true", help="leave this run in any case, and nothing from before it")
    add_noise(judging)
    given = parser.parse_args(arguments)
    if given.command == "key":
        print(host_key(read_host()))
        return 0
    try:
        new = read_run(given.new)
    except metrics.MetricsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    anchor: Run | None = None
    if given.anchor:
        anchor = {}
        with contextlib.suppress(metrics.MetricsError):  # never recorded, or with other columns
            anchor = read_run(given.anchor)
    verdict = judge(given.kept, new, given.run, anchor, given.floor, given.spread)
    leaves = given.accept or (given.keep and not verdict.worse)
    if given.accept:
        shutil.rmtree(given.kept, ignore_errors=True)
    if leaves:
        keep(given.kept, new, given.run)
    write_whole(given.summary, verdict.text)
    for name, value in (("worse", verdict.worse and not given.accept), ("changed", verdict.changed), ("kept", leaves)):
        print(f"{name}={str(value).lower()}")
    return 0


if __name__ == "__main__":
    with reported("kept"):
        sys.exit(main(sys.argv[1:]))
