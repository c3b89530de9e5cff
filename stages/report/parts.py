"""What the report's sections are made of: rows, cells, tables, figures, and numbers as text.

Nothing here reads or writes a file. A table shows rows of one run; where these come from more than one host or commit
its note says so and every line names its own.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stages.host import Host
from stages.metrics import COLUMNS
from stages.params import Week

LOCAL = "this host"
BASELINE = "w01"
SPEED_STAGES = ("provision", "baseline", "bench")  # where a limit is a ceiling of the machine and not a gate
STANDARD = ("standard_prefill", "standard_decode", "workload_prompts")
LABELS = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2e_ms": "end to end",
    "output_throughput": "output",
    "total_token_throughput": "prompt + output",
    "peak_memory_bytes": "peak memory",
}
SCALED = ("B", "B/s", "FLOP/s")
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Row = namedtuple("Row", [*COLUMNS, "run", "source"])
"""A row of the metrics, None where it is empty; `run` is LOCAL or "<gpu>/<model>", `source` its file and place."""


@dataclass(frozen=True)
class Cell:
    """One place of a table. `small` stands under the text; `share` (0 to 1) draws a bar, `heat` (0 to 1) a background;
    `tone` is good, warn, bad or mute; `source` the row of Parquet."""

    text: str
    small: str = ""
    numeric: bool = False
    share: float | None = None
    heat: float | None = None
    tone: str = ""
    source: str = ""


@dataclass(frozen=True)
class Table:
    """`note` says whose rows these are; a `folded` one opens on request in the page and is not in REPORT.md."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """An <svg> element; `name` is its file in reports/figures/ without the ending."""

    name: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room; `wide` ones below each other. `folded` ones are not in REPORT.md."""

    figures: Sequence[Figure]
    title: str = ""
    note: str = ""
    wide: bool = False
    folded: bool = False
    kind: str = "figures"


@dataclass(frozen=True)
class Text:
    """A paragraph; `share` (0 to 1) draws a bar under it."""

    text: str
    share: float | None = None
    kind: str = "text"


Block = Table | Figures | Text


@dataclass(frozen=True)
class Section:
    """A part of the report; `anchor` is its id in the page. With `page_only` it is not in REPORT.md."""

    anchor: str
    title: str
    blocks: Sequence[Block]
    page_only: bool = False


def measured_section(anchor: str, title: str, said: str, blocks: Sequence[Block], missing: str) -> Section:
    """What `said` explains; where no run has any of it, why."""
    return Section(anchor, title, [Text(said), *blocks] if blocks else [Text(f"Not measured: {missing}")])


@dataclass(frozen=True)
class Planned:
    """A week of the plan, whether it is built yet or not; `target` is a day, "2026-11-27"."""

    title: str
    target: str


@dataclass(frozen=True)
class Inputs:
    """All a report is made of.

    dates: commit -> the day it was made, of the commits that git knows. architecture: property -> value, of the
    checkpoint that this host ran. hosts: run -> the machine, where its host.json is there. plan: week -> what was
    planned.
    """

    rows: Sequence[Row]
    weeks: Mapping[str, Week]
    dates: Mapping[str, str] = field(default_factory=dict)
    architecture: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)
    plan: Mapping[str, Planned] = field(default_factory=dict)

    @property
    def runs(self) -> list[str]:
        """Recorded runs, largest decode step first (most bytes a token), then this host."""
        sizes = {row.run: 0.0 for row in self.rows}
        for row in self.rows:
            if row.metric == "tpot_ms" and row.limit is not None:
                sizes[row.run] = max(sizes[row.run], row.limit)
        return sorted(sizes, key=lambda run: (run == LOCAL, -sizes[run], run))

    def of(self, run: str, *stages: str) -> list[Row]:
        """The rows of one run, of the named stages or of all."""
        return [row for row in self.rows if row.run == run and (not stages or row.stage in stages)]

    def model(self, run: str, name: str) -> str:
        """The model's name, and that its weights are random where a row of the run says so."""
        random = any("random weights" in (row.note or "") for row in self.of(run))
        return f"{name} (random weights)" if random else name

    def speed(self, run: str) -> list[Row]:
        """The rows of bench, and those of baseline that bench@w01 has not repeated."""
        bench = self.of(run, "bench")
        repeated = {row.suite for row in bench if row.week == BASELINE}
        return bench + [row for row in self.of(run, "baseline") if row.suite not in repeated]


# --- values as text -------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits; whole numbers and thousands in full."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.1e}"


def show(value: float, unit: str) -> str:
    """`value` with its unit: "12.3 ms", "4.20 GB", "1,204 tokens/s"."""
    if unit in SCALED:
        size, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0]), (1.0, ""))
        return f"{number(value / size)} {prefix}{unit}"
    return number(value) if unit == "1" else f"{number(value)} {unit}"


def percent(share: float) -> str:
    if share < 0.001:
        return "< 0.1 %"
    return f"{share * 100:.{1 if share < 0.0995 else 0}f} %"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{number(ratio)} ×"


def share_of_limit(row: Row) -> float | None:
    """How near a measured speed is to the most the machine allows, 0 to 1; None without a limit."""
    if row.stage not in SPEED_STAGES or not row.value or not row.limit or not row.better:
        return None
    return row.value / row.limit if row.better == "higher" else row.limit / row.value


def limited_by_copy(row: Row) -> bool:
    """Whether the row's limit is of the copy bandwidth, as limits were before they were of the read bandwidth."""
    return "copy bandwidth" in (row.limit_kind or "")


def value_cell(row: Row) -> Cell:
    """The value with its share of the limit, or why there is none: never a zero in its place."""
    if row.status == "not_measured":
        return Cell(f"not measured: {row.note}", tone="mute", source=row.source)
    if row.status == "failed":
        value = "" if row.value is None else f"{show(row.value, row.unit)}: "
        return Cell(f"failed: {value}{row.note}", tone="bad", source=row.source)
    share = share_of_limit(row)
    small = "" if share is None else percent(share)
    return Cell(show(row.value, row.unit), small, numeric=True, share=share, source=row.source)


@dataclass(frozen=True)
class Interval:
    """Where the median that `n` samples estimate lies, with probability `coverage`."""

    low: float
    high: float
    coverage: float
    n: int


def median_interval(row: Row, level: float = 0.95) -> Interval | None:
    """The confidence interval of a row's median: the innermost two of its sorted samples that hold it at `level`.

    The number of samples under the true median is binomial (n, 1/2) whatever their distribution. Fewer than six samples
    reach no 95 %: their range is taken, and `coverage` says what it holds. None for fewer than two samples, and where
    the row's value is not their median.
    """
    samples = sorted(row.samples or [])
    n = len(samples)
    if n < 2 or row.value is None or not math.isclose(row.value, statistics.median(samples), rel_tol=1e-9):
        return None
    outside, cut, coverage = 0.0, 0, 0.0
    for place in range((n + 1) // 2):
        outside += 2 * math.comb(n, place) / 2**n
        if place and 1 - outside < level:
            break
        cut, coverage = place, 1 - outside
    return Interval(samples[cut], samples[-1 - cut], coverage, n)


def span(low: float, high: float, unit: str) -> str:
    """ "9.91 to 10.3": with a unit where that has a prefix."""
    return " to ".join(show(value, unit if unit in SCALED else "1") for value in (low, high))


def interval_cell(row: Row) -> Cell:
    """The median's interval, and from how many samples; the range where the value is no median."""
    if not row.samples or len(row.samples) < 2:
        return Cell("")
    found, n = median_interval(row), len(row.samples)
    if found is None:
        return Cell(span(min(row.samples), max(row.samples), row.unit), f"range, n = {n}", numeric=True)
    return Cell(span(found.low, found.high, row.unit), f"{percent(found.coverage)}, n = {n}", numeric=True)


def limit_cell(row: Row) -> Cell:
    return Cell("" if row.limit is None else f"{show(row.limit, row.unit)}: {row.limit_kind}")


def engine_of(row: Row) -> str:
    return ", ".join(filter(None, (row.backend, row.dtype, row.quantization)))


def knobs_of(row: Row) -> str:
    """What was run: "cuda, bfloat16, batch 1, 128+32 tokens"."""
    tokens = "+".join(str(count) for count in (row.prompt_tokens, row.new_tokens) if count is not None)
    batch = f"batch {row.batch}" if row.batch else ""
    return ", ".join(filter(None, (engine_of(row), batch, tokens and f"{tokens} tokens")))


def host_of(row: Row) -> str:
    if row.gpu == "cpu":
        return "a CPU without a GPU"
    pairs = (("driver", row.driver), ("CUDA", row.cuda))
    return row.gpu + "".join(f", {name} {value}" for name, value in pairs if value)


def commit_of(row: Row) -> str:
    """The commit's first ten digits, and `-dirty` where the code differed from it."""
    if not row.commit:
        return "commit not recorded"
    commit, dirty, _ = row.commit.partition("-dirty")
    return commit[:10] + dirty


def same_host(row: Row, other: Row) -> bool:
    return (row.gpu, row.driver, row.cuda) == (other.gpu, other.driver, other.cuda)


def run_title(run: str) -> str:
    return "This host" if run == LOCAL else f"Recorded, {run}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- tables ---------------------------------------------------------------------------------------------------------

Columns = Mapping[str, Callable[[Row], Cell | str | None]]


def provenance(rows: Sequence[Row]) -> tuple[str, bool]:
    """Whose rows these are, for a table's note, and whether they are of more than one host or commit."""
    counts = sorted(Counter((host_of(row), commit_of(row)) for row in rows).items())
    if len(counts) == 1:
        (host, commit), _ = counts[0]
        return f"Measured on {host}; commit {commit}.", False
    said = "; ".join(f"{host}, commit {commit}: {count} rows" for (host, commit), count in counts)
    return f"Mixed: not one run but {len(counts)} hosts or commits. {said}.", True


def list_rows(title: str, rows: Sequence[Row], columns: Columns, folded: bool = False) -> Table:
    """A line a row; host and commit become columns where they differ. A column that is empty throughout is left out."""
    note, mixed = provenance(rows)
    columns = dict(columns) | ({"host": host_of, "commit": commit_of} if mixed else {})
    lines = [[as_cell(column(row)) for column in columns.values()] for row in rows]
    kept = [at for at in range(len(columns)) if any(line[at].text for line in lines)]
    names = list(columns)
    return Table([names[at] for at in kept], [[line[at] for at in kept] for line in lines], title, note, folded)


def as_cell(value: Cell | str | None) -> Cell:
    return value if isinstance(value, Cell) else Cell(value or "")


DETAIL: Columns = {
    "week": lambda row: row.week,
    "suite": lambda row: row.suite,
    "case": lambda row: row.case,
    "metric": lambda row: row.metric,
    "value": value_cell,
    "interval": interval_cell,
    "limit": limit_cell,
    "run with": knobs_of,
}
WITHOUT_WEEK: Columns = {name: column for name, column in DETAIL.items() if name != "week"}


def drop_unmeasured(table: Table, first: int) -> Table:
    """`table` without the lines and columns (from `first` on) that have nothing but one reason; its note says which."""
    said: dict[str, set[str]] = defaultdict(set)
    lines = []
    for line in table.rows:
        reason = only_reason([cell.text for cell in line[first:]])
        if reason:
            said[reason].add(f"{line[1].text} ({line[1].small})")
        else:
            lines.append(line)
    kept = list(range(first))
    for at in range(first, len(table.columns)):
        reason = only_reason([line[at].text for line in lines])
        if reason:
            said[reason].add(table.columns[at])
        elif any(line[at].text for line in lines):
            kept.append(at)
    notes = [f"{'; '.join(sorted(names))}: {reason}." for reason, names in sorted(said.items())]
    columns = [table.columns[at] for at in kept]
    return replace(
        table,
        columns=columns,
        rows=[[line[at] for at in kept] for line in lines],
        note=" ".join([table.note, *notes]),
    )


def only_reason(texts: Sequence[str]) -> str | None:
    """The reason that all texts but the empty ones give for not being measured; None where they do not agree."""
    found = {text for text in texts if text}
    reason = found.pop() if len(found) == 1 else ""
    return reason if reason.startswith("not measured: ") else None
