"""Compares two runs' measurements: what got worse or better by more than the noise, as Markdown.

    python -m stages.compare OLD NEW [--floor 0.05] [--spread 3]

OLD and NEW are metrics files or folders of them, as reports/metrics and reports/recorded/<gpu>/<model>. Rows are joined
on their identity: what was measured, of which model, with which knobs, on which GPU. A value that has a better
direction has changed when it moved by more than the noise band, which is the larger of

- `--floor` times the old value, and
- `--spread` times the root of s_old² + s_new², s being 1.4826 × the median absolute deviation of a row's samples (0 for
  fewer than three): the spread of single samples, not of their median, as two runs differ by more than repeats do.

A row that was measured and now has failed or could not be measured is worse, whatever its numbers.
Exit status: 0; 1 where something is worse; 2 where nothing is comparable. `stages.kept` compares with what earlier runs
have left.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages import metrics
from stages.arguments import not_negative
from stages.exits import reported
from stages.metrics import IDENTITY

Row = Mapping[str, Any]
CASE = ("stage", "week", "suite", "case", "metric", "model")
SHOWN = 50
"""Rows of a table; a comment on GitHub holds 65,536 characters."""


@dataclass(frozen=True)
class Change:
    """A row of both runs that is worse or better."""

    old: Row
    new: Row
    worse: bool
    band: float
    knobs: Sequence[str] = ()
    """Those that tell the row apart from others of its case."""

    @property
    def size(self) -> float:
        """How far it moved, in noise bands; what has no number comes first."""
        if None in (self.old["value"], self.new["value"]) or not self.band:
            return math.inf
        return abs(self.new["value"] - self.old["value"]) / self.band


@dataclass(frozen=True)
class Comparison:
    """Two runs compared: how many rows are worse and better, and all of it as Markdown."""

    worse: int
    better: int
    text: str


Run = Mapping[tuple[Any, ...], Row]
"""The rows of a run by their identity."""


def read_run(path: Path) -> dict[tuple[Any, ...], Row]:
    """The rows of a file or folder by their identity; a failed check's rows take the place of the passed one's.

    Raises MetricsError where there are none.
    """
    files = (
        sorted(path.glob("*.parquet"), key=lambda file: (".failed." in file.name, file.name))
        if path.is_dir()
        else [path]
    )
    if not files or not all(file.exists() for file in files):
        raise metrics.MetricsError(f"{path}: no metrics there; should be a Parquet file or a folder of them")
    return {
        tuple(row[name] for name in IDENTITY): row for file in files for row in metrics.read_table(file).to_pylist()
    }


def spread(row: Row) -> float:
    """The standard deviation of a row's samples, by their median absolute deviation."""
    samples = row["samples"] or []
    if len(samples) < 3:
        return 0.0
    middle = statistics.median(samples)
    return 1.4826 * statistics.median(abs(sample - middle) for sample in samples)


def judge(old: Row, new: Row, floor: float, width: float) -> Change | None:
    """The change from `old` to `new`; None where nothing did that can be called worse or better."""
    if old["status"] != new["status"] or new["status"] != "ok":
        was, now = old["status"] == "ok", new["status"] == "ok"
        if was != now or (now, old["status"], new["status"]) == (False, "not_measured", "failed"):
            return Change(old, new, worse=not now, band=0.0)
        return None
    if new["better"] is None:
        return None
    band = max(floor * abs(old["value"]), width * math.hypot(spread(old), spread(new)))
    moved = new["value"] - old["value"]
    if abs(moved) <= band:
        return None
    return Change(old, new, worse=(moved > 0) == (new["better"] == "lower"), band=band)


def compare(before: Run, after: Run, floor: float, width: float) -> Comparison | None:
    """Changes from one run to another beyond the noise; None where they have no row in common."""
    common = [identity for identity in after if identity in before]
    if not common:
        return None
    found = [change for key in common if (change := judge(before[key], after[key], floor, width))]
    found = name_knobs(found, after.values())
    found.sort(key=lambda change: -change.size)
    worse, better = ([change for change in found if change.worse is which] for which in (True, False))
    parts = [f"## {len(worse)} worse, {len(better)} better, {len(common) - len(found)} others"]
    parts += list_differences(before.values(), after.values())
    parts += [f"### Worse\n\n{tabulate(worse)}"] if worse else []
    parts += [f"<details><summary>{len(better)} better</summary>\n\n{tabulate(better)}\n\n</details>"] if better else []
    parts.append(
        f"Only in the old run: {len(before) - len(common)} rows; only in the new one: {len(after) - len(common)}. "
        f"Noise: {floor:.0%} of the old value, or {width:g} times the spread of both runs' samples if that is more."
    )
    return Comparison(len(worse), len(better), "\n\n".join(parts) + "\n")


def name_knobs(changes: Iterable[Change], rows: Iterable[Row]) -> list[Change]:
    """The changes, each with the knobs that tell its row apart from `rows` of the same case and metric."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return [
        replace(change, knobs=metrics.find_needed_knobs(cases[tuple(change.new[name] for name in CASE)]))
        for change in changes
    ]


def list_differences(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """A table of what else differs between the runs: GPU, driver, CUDA, packages, commit; none where nothing does."""
    sides = [describe(rows) for rows in (before, after)]
    names = [name for name in dict.fromkeys([*sides[0], *sides[1]]) if sides[0].get(name) != sides[1].get(name)]
    if not names:
        return []
    return [
        "\n".join(
            ["| | old | new |", "| --- | --- | --- |"]
            + [f"| {name} | {sides[0].get(name, '–')} | {sides[1].get(name, '–')} |" for name in names]
        )
    ]


def describe(rows: Iterable[Row]) -> dict[str, str]:
    """Facts that a run's rows have of their host and code: all values of a column that has several."""
    seen: dict[str, dict[str, None]] = {}
    for row in rows:
        packages = json.loads(row["packages"] or "{}")
        for name, value in [*((name, row[name]) for name in ("gpu", "driver", "cuda", "commit")), *packages.items()]:
            if value is not None:
                seen.setdefault(name, {})[value] = None
    return {name: ", ".join(sorted(values)) for name, values in seen.items()}


def tabulate(changes: Sequence[Change]) -> str:
    """The changes as a Markdown table, the largest first."""
    lines = [
        "| week | suite | case | metric | old | new | change | noise |",
        "| --- | --- | --- | --- | --: | --: | --: | --: |",
    ]
    for change in changes[:SHOWN]:
        old, new = change.old, change.new
        knobs = ", ".join(f"{name} {new[name]}" for name in change.knobs if new[name] is not None)
        cells = [
            new["week"] or new["stage"], new["suite"], f"{new['case']} ({knobs})" if knobs else new["case"],
            f"{new['metric']} [{new['unit']}]", value(old), value(new), moved(change),
            f"± {change.band:.3g}" if change.band else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    if len(changes) > SHOWN:
        lines.append(f"\n… and {len(changes) - SHOWN} more.")
    return "\n".join(lines)


def value(row: Row) -> str:
    """A row's value, or why it has none."""
    return f"{row['value']:.4g}" if row["status"] == "ok" else f"{row['status'].replace('_', ' ')}: {row['note']}"


def moved(change: Change) -> str:
    """The change as a percentage of the old value, where there is one."""
    if change.band == 0 and change.old["status"] != change.new["status"]:
        return ""
    before = change.old["value"]
    return f"{(change.new['value'] - before) / abs(before):+.1%}" if before else "from 0"


def main(arguments: list[str]) -> int:
    """Prints the comparison; the exit status says whether anything is worse."""
    about, _, rule = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m stages.compare", description=about, epilog=rule, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    add_noise(parser)
    given = parser.parse_args(arguments)
    try:
        before, after = read_run(given.old), read_run(given.new)
    except metrics.MetricsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = compare(before, after, given.floor, given.spread)
    if found is None:
        gpus = [", ".join(sorted({row["gpu"] for row in rows.values()})) for rows in (before, after)]
        both = f"{given.old} ({gpus[0]}) and {given.new} ({gpus[1]})"
        print(f"error: {both} have no measurement in common", file=sys.stderr)
        return 2
    print(found.text, end="")
    return int(found.worse > 0)


def add_noise(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options that say what is noise."""
    parser.add_argument(
        "--floor", type=not_negative, default=0.05, help="share of the old value that is noise (default: 0.05)"
    )
    parser.add_argument(
        "--spread", type=not_negative, default=3.0, help="times the samples' spread that is noise (default: 3)"
    )


if __name__ == "__main__":
    with reported("compare"):
        sys.exit(main(sys.argv[1:]))
