"""Keeps a GPU's measurements in git: `make record` promotes a run to reports/recorded/<gpu>/<model>/.

    python -m stages.record [FOLDER] [--weeks w06 w08] [--force REASON]

FOLDER is another checkout's or a rented run's reports/metrics. The run's files take the place of files of the same
name; others, as weeks recorded before, stay beside them where they are of the same GPU, driver and CUDA. With --weeks
only those weeks' files and build's are promoted, with what is not there yet. A run is refused, and nothing is written,
unless

- it is complete: provision, inventory, baseline, build, and of every week parity and bench;
- it is of one machine: every row is of data/host.json's GPU, driver and CUDA, and the `gpu` group is that GPU;
- it is of one model: the baseline's;
- it passed: no row has failed, and where a week has checks of parity, one was made;
- it is of one commit: every row names one, none is dirty, and build's and the weeks' are the same. Provision, inventory
  and baseline may be older, as DVC runs them again when what they depend on changes;
- its noise is bounded: in no row of BOUNDED, of bench and baseline, do three or more samples spread by more
  than NOISE of the value, the spread being stages.compare's: 1.4826 × the median absolute deviation.

--force promotes a run that only the last two refuse, but none of a dirty tree, which nobody can measure again; the
reason and what was refused are kept beside, in forced.json.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.bench.throughput import LATE
from stages import metrics
from stages.commit import DAYS, find_day, read_days
from stages.compare import Row, spread
from stages.compose import read_params
from stages.exits import StageError, reported
from stages.host import Host
from stages.params import ParamsError, Week, Weeks, select
from stages.stage import write_whole

METRICS, RECORDED = Path("reports/metrics"), Path("reports/recorded")
HOST, FORCED, FAILED = "host.json", "forced.json", ".failed"
SHARED = ("provision", "inventory", "baseline", "build")
OF_WEEK = ("parity", "bench")
MACHINE = ("gpu", "driver", "cuda")
NOISE = 0.1
BOUNDED = {
    ("standard_prefill", "ttft_ms"), ("standard_decode", "ttft_ms"), ("standard_decode", "tpot_ms"),
    ("standard_decode", "output_throughput"), ("throughput", "output_throughput"),
}  # fmt: skip
SHOWN = 10


@dataclass(frozen=True)
class Refusal:
    """A fault of the file `name`.parquet; `forceable`: a reason promotes it all the same."""

    name: str
    text: str
    forceable: bool = False


@dataclass(frozen=True)
class Measured:
    """A run's files that are to be promoted: their rows by the file's name without its ending."""

    folder: Path
    host: Host
    tables: dict[str, list[Row]]

    @property
    def model(self) -> str:
        return str(self.tables["baseline"][0]["model"])

    @property
    def place(self) -> Path:
        """Where it is kept, under reports/recorded."""
        return Path(slug(self.host.gpu)) / self.model


def slug(name: str) -> str:
    """A GPU's name as a folder's: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def week_of(name: str) -> str | None:
    """ "w05" of "bench_w05"; None of a file that is no week's."""
    kind, _, week = name.partition("_")
    return week if kind in OF_WEEK and week else None


def again(name: str) -> str:
    """The command that measures a file anew."""
    week = week_of(name)
    return f"`dvc repro --force --single-item {f'bench@{week}' if week else name}`"


def find_host(folder: Path) -> Path:
    """A run's host.json, given its reports/metrics."""
    return folder.parent.parent / "data" / HOST


def say(row: Row) -> str:
    """Which row it is."""
    knobs = ", ".join(str(row[knob]) for knob in ("backend", "dtype", "batch") if row[knob] is not None)
    return f"{row['suite']}, {row['case']}, {row['metric']}{f' ({knobs})' if knobs else ''}"


# --- reading ----------------------------------------------------------------------------------------------------------


def read_measured(folder: Path, weeks: Sequence[str] | None) -> Measured:
    """A run's shared files and the files of `weeks`, or all. Raises StageError for what is missing or was failed."""
    files = {file.stem: file for file in sorted(folder.glob("*.parquet"))}
    if not files:
        raise StageError(f"{folder} holds no Parquet files: run the pipeline first")
    chosen = weeks or sorted({week for name in files if (week := week_of(name.removesuffix(FAILED)))})
    if not chosen:
        raise StageError(f"{folder} holds no week: should have parity and bench of one at least")
    failed = [name for name in files if name.endswith(FAILED)]
    for name in failed:
        if week_of(name.removesuffix(FAILED)) in (None, *chosen):
            rows = [row for row in metrics.read_table(files[name]).to_pylist() if row["status"] == "failed"]
            said = f": {say(rows[0])}: {rows[0]['note']}" if rows else ""
            raise StageError(f"{files[name]}: a failed run is not recorded{said}")
    wanted = [*SHARED, *(f"{kind}_{week}" for week in chosen for kind in OF_WEEK)]
    for name in wanted:
        if name not in files:
            raise StageError(f"{folder / name}.parquet is missing: run the pipeline first (`dvc repro`)")
    others = [name for name in files if weeks is None and name not in (*wanted, *failed)]
    place = find_host(folder)
    if not place.exists():
        raise StageError(f"{place} is missing: should be what `python -m stages.provision` writes beside the metrics")
    try:
        host = Host.from_file(place)
    except ValueError as error:
        raise StageError(str(error)) from None
    if not host.gpus:
        raise StageError(f"{place} names no GPU; only runs of a named GPU are recorded")
    tables = {name: metrics.read_table(files[name]).to_pylist() for name in (*wanted, *others)}
    if not tables["baseline"]:
        raise StageError(f"{folder / 'baseline.parquet'} has no rows; should name the run's model")
    return Measured(folder, host, tables)


def find_other(rows: Sequence[Row], host: Host) -> str | None:
    """Find the first row of another machine than `host`: say what it has, and what it should have."""
    for row in rows:
        for column in MACHINE:
            if row[column] != (value := getattr(host, column)):
                return f"{say(row)}: {column} is {row[column]!r}; should be {value!r}"
    return None


# --- checks -----------------------------------------------------------------------------------------------------------


def check_machine(run: Measured) -> Iterator[Refusal]:
    """Every row is of the host, which has the GPU that the `gpu` group names."""
    for name, rows in run.tables.items():
        if other := find_other(rows, run.host):
            yield Refusal(name, f"{other}, as {HOST} says")
    groups = [row for row in run.tables["provision"] if row["suite"] == "gpu_group"]
    if not groups:
        yield Refusal("provision", "has no row of suite gpu_group; should say that the gpu group is this host's GPU")
    for row in groups:
        if row["case"] == "cpu":
            yield Refusal("provision", f"{say(row)}: the run was of gpu=cpu; should be of this host's GPU or gpu=auto")
        elif row["status"] == "not_measured":
            yield Refusal("provision", f"{say(row)}: {row['note']}; should be a group that is this host's GPU")


def check_model(run: Measured) -> Iterator[Refusal]:
    """Inventory and bench are of the baseline's model; parity also has small ones of other shapes."""
    for name, rows in run.tables.items():
        if name in ("inventory", "baseline") or name.startswith("bench_"):
            wrong = [row for row in rows if row["model"] != run.model]
            if wrong:
                yield Refusal(name, f"{say(wrong[0])}: model is {wrong[0]['model']}; should be baseline's {run.model}")


def check_passed(run: Measured, weeks: Mapping[str, Week]) -> Iterator[Refusal]:
    """Nothing failed, and of every week that has checks some were made."""
    for name, rows in run.tables.items():
        failed = [row for row in rows if row["status"] == "failed"]
        if failed:
            more = f" (and {len(failed) - 1} more rows)" if len(failed) > 1 else ""
            yield Refusal(name, f"{say(failed[0])} failed: {failed[0]['note']}{more}; should be ok")
        week = week_of(name)
        if week is None:
            continue
        if week not in weeks:
            yield Refusal(name, f"is of week {week}; should be one of params.yaml's: {', '.join(weeks)}")
        elif name.startswith("parity_") and weeks[week].parity and not any(row["status"] == "ok" for row in rows):
            yield Refusal(name, f"has no row that is ok; should have some of: {', '.join(weeks[week].parity)}")


def check_ready(run: Measured) -> Iterator[Refusal]:
    """No engine compiled a kernel, or captured a graph, while it was measured."""
    for name, rows in run.tables.items():
        late = [row for row in rows if row["metric"] in LATE and row["value"]]
        if late:
            yield Refusal(name, f"{say(late[0])}: {late[0]['value']:.0f} while it was measured; should be 0")


def check_alone(run: Measured) -> Iterator[Refusal]:
    """Other processes left the machine to what was measured."""
    for name, rows in run.tables.items():
        busy = [row for row in rows if (row["other_load"] or 0) > metrics.BUSY]
        if busy:
            text = f"other processes kept {busy[0]['other_load']:.0%} of the cores busy while it was measured"
            text += f"; should be {metrics.BUSY:.0%} at most ({again(name)})"
            yield Refusal(name, text, True)


def check_commits(run: Measured) -> Iterator[Refusal]:
    """Rows name commits that git has whole; the weeks' and build's the same one."""
    measured: dict[str, set[str]] = {}
    for name, rows in run.tables.items():
        commits = {row["commit"] for row in rows}
        if None in commits:
            yield Refusal(name, "a row names no commit; should be measured within a git repository", True)
        dirty = sorted(commit for commit in commits if commit and commit.endswith("-dirty"))
        if dirty:
            yield Refusal(name, f"measured at {dirty[0]}; should be a commit: commit, then `dvc repro --force`")
        if len(commits) > 1:
            yield Refusal(name, f"measured at {', '.join(sorted(map(str, commits)))}; should be one commit", True)
        elif commits and (name == "build" or week_of(name)):
            measured.setdefault(str(*commits), set()).add(name)
    if len(measured) > 1:
        most = max(measured, key=lambda commit: len(measured[commit]))
        for commit in sorted(set(measured) - {most}):
            for name in sorted(measured[commit]):
                text = f"measured at {commit}; should be {most}, as {min(measured[most])}: `dvc repro --force`"
                yield Refusal(name, f"{text}, or promote weeks of one commit by --weeks", True)


def check_noise(run: Measured) -> Iterator[Refusal]:
    """The samples of no row of BOUNDED spread too far."""
    for name, rows in run.tables.items():
        if name != "baseline" and not name.startswith("bench_"):
            continue
        for row in rows:
            if (row["suite"], row["metric"]) not in BOUNDED or row["status"] != "ok":
                continue
            share = spread(row) / abs(row["value"]) if row["value"] else 0.0
            if share > NOISE:
                text = f"{say(row)}: {len(row['samples'])} samples spread by {share:.1%} of {row['value']:.4g}"
                text += f"; should be {NOISE:.0%} at most: measure again while nothing else runs"
                yield Refusal(name, f"{text} ({again(name)})", True)


def check_kept(run: Measured, kept: Mapping[str, Path]) -> Iterator[Refusal]:
    """Check that what stays beside is of the same machine."""
    for name, path in kept.items():
        if other := find_other(metrics.read_table(path).to_pylist(), run.host):
            yield Refusal(
                name, f"{other}, as in this run: it would stay beside; promote a run that has it, or remove {path}"
            )


# --- writing ----------------------------------------------------------------------------------------------------------


def record(
    source: Path,
    recorded: Path,
    params: Mapping[str, Week],
    weeks: Sequence[str] | None = None,
    reason: str | None = None,
) -> Path:
    """Promotes the run in `source` to `recorded`/<gpu>/<model>/ and returns that folder; `reason` forces it.

    Raises StageError where it is refused, with a line for each refusal; `recorded` is as it was then.
    """
    run = read_measured(source, weeks)
    target = recorded / run.place
    finish_replacing(recorded, target)
    there = {path.stem: path for path in sorted(target.glob("*.parquet"))}
    # Beside weeks recorded before, what these were measured with stays.
    staying = {name for name in SHARED if weeks is not None and name in there and name != "build"}
    promoted = replace(run, tables={name: rows for name, rows in run.tables.items() if name not in staying})
    kept = {name: path for name, path in there.items() if name not in promoted.tables}
    refusals = [
        *check_machine(run), *check_model(run), *check_passed(run, params), *check_ready(run),
        *check_commits(promoted), *check_alone(promoted),
        *check_noise(promoted), *check_kept(run, kept),
    ]  # fmt: skip
    stopping = [refusal for refusal in refusals if not (reason and refusal.forceable)]
    if stopping:
        lines = [f"  {refusal.name}.parquet: {refusal.text}" for refusal in stopping[:SHOWN]]
        lines += [f"  … and {len(stopping) - SHOWN} more"] if len(stopping) > SHOWN else []
        if all(refusal.forceable for refusal in stopping):
            lines.append("--force REASON promotes it all the same and keeps the reason beside it")
        raise StageError("\n".join([f"{source} is not recorded:", *lines]))
    replace_folder(recorded, target, write_part(promoted, recorded, target, kept, reason, refusals))
    write_days(recorded)
    return target


def write_days(recorded: Path) -> None:
    """Writes DAYS anew, of the commits of all rows that are recorded; a day that git does not know stays as it was."""
    known = read_days(recorded)
    tables = [metrics.read_table(file) for file in sorted(recorded.glob("*/*/*.parquet"))]
    commits = {commit for table in tables for commit in table["commit"].to_pylist() if commit}
    days = {commit: day for commit in sorted(commits) if (day := find_day(commit) or known.get(commit))}
    write_whole(recorded / DAYS, json.dumps(days, indent=2) + "\n")


def part_of(recorded: Path, target: Path) -> Path:
    """Where a folder is made before it takes its place: at a depth where nothing reads it."""
    return recorded / f".{'-'.join(target.relative_to(recorded).parts)}.part"


def write_part(
    run: Measured,
    recorded: Path,
    target: Path,
    kept: Mapping[str, Path],
    reason: str | None,
    refusals: Sequence[Refusal],
) -> Path:
    """The whole new folder, beside its place."""
    part = part_of(recorded, target)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in kept.values():
        shutil.copyfile(path, part / path.name)
    for name in run.tables:
        shutil.copyfile(run.folder / f"{name}.parquet", part / f"{name}.parquet")
    shutil.copyfile(find_host(run.folder), part / HOST)
    earlier = target / FORCED
    forced = json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
    forced = {name: said for name, said in forced.items() if name in kept}
    for refusal in refusals:
        entry = forced.setdefault(refusal.name, {"reason": reason, "refused": []})
        entry["refused"].append(refusal.text)
    if forced:
        (part / FORCED).write_text(json.dumps(forced, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    return part


def replace_folder(recorded: Path, target: Path, part: Path) -> None:
    """Renames `part` to `target`; what was there before is there again where that fails."""
    old = part_of(recorded, target).with_suffix(".old")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    try:
        part.rename(target)
    finally:
        finish_replacing(recorded, target)


def finish_replacing(recorded: Path, target: Path) -> None:
    """Puts back what a killed or failed `replace_folder` has moved away, and removes it where that had succeeded."""
    old = part_of(recorded, target).with_suffix(".old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# --- the command ------------------------------------------------------------------------------------------------------


def given_reason(text: str) -> str:
    """A reason that says something. Raises ArgumentTypeError."""
    if not text.strip():
        raise argparse.ArgumentTypeError("should say why, in words")
    return text.strip()


def main(arguments: list[str]) -> int:
    """Prints where the run is kept. Exit status: 0; 1 where it is refused; 2 for wrong arguments."""
    about, _, rule = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m stages.record", description=about, epilog=rule, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=METRICS, help=f"default: {METRICS}")
    parser.add_argument("--weeks", nargs="+", metavar="WEEK", help="only these, beside what is recorded")
    parser.add_argument("--force", type=given_reason, metavar="REASON", help="despite noise or mixed commits")
    parser.add_argument("--where", action="store_true", help="only print where it would be kept")
    given = parser.parse_args(arguments)
    try:
        params = select(Weeks, read_params(), None).weeks
        unknown = [week for week in given.weeks or [] if week not in params]
        if unknown:
            raise ParamsError(f"unknown week '{unknown[0]}'; there are: {', '.join(params)}")
        if given.where:
            print(RECORDED / read_measured(given.folder, given.weeks).place)
        else:
            print(record(given.folder, RECORDED, params, given.weeks, given.force))
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with reported("record"):
        sys.exit(main(sys.argv[1:]))
