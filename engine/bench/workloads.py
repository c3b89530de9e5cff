"""Requests of a benchmark and what came of them: lists with arrival times, and the figures of their ends.

Pure data: the same arguments give the same requests, and no clock is read here.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

ARRIVALS = ("poisson", "fixed")
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
STATISTICS = ("mean", "p50", "p90", "p99")
# vLLM's names for what a goodput may bound, and ours.
OBJECTIVES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2e_ms"}
FORMATS = ("table", "json", "csv", "markdown")


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleRequest:
    """One prompt, by its token ids and, where there is one, its text; `arrival` is in seconds from the beginning."""

    prompt: list[int]
    new_tokens: int
    arrival: float = 0.0
    text: str | None = None


@dataclass(frozen=True)
class Mix:
    """Requests of random tokens. Their lengths are `random.Random(seed).randint(low, high)`, one after another.

    With `prefix_tokens` all prompts begin with the same so many tokens, and the drawn length is what each has of its
    own after them.

    Raises:
        ValueError: A count is below 1 (prefix_tokens, seed: below 0), or `low` above `high`.
    """

    count: int
    low: int
    high: int
    new_tokens: int
    seed: int = 1
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("count", 1),
            ("low", 1),
            ("high", 1),
            ("new_tokens", 1),
            ("seed", 0),
            ("prefix_tokens", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} = {value!r}; it must be an integer of at least {least}")
        if self.low > self.high:
            raise ValueError(f"prompt lengths from {self.low} to {self.high}; the first must not be above the second")

    @property
    def lengths(self) -> list[int]:
        """Tokens that each prompt has of its own."""
        drawn = random.Random(self.seed)
        return [drawn.randint(self.low, self.high) for _ in range(self.count)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with what is generated after it."""
        return self.prefix_tokens + max(self.lengths) + self.new_tokens

    def requests(self, vocab_size: int, run: int = 0) -> list[SampleRequest]:
        """The requests, all at once. Another run, or another mix, has other tokens: no prefix cache knows them."""
        drawn = random.Random(f"{self} {run}")
        ids = range(vocab_size)
        prefix = drawn.choices(ids, k=self.prefix_tokens)
        return [SampleRequest(prefix + drawn.choices(ids, k=length), self.new_tokens) for length in self.lengths]


def parse_range(name: str, text: str) -> tuple[int, int]:
    """ "512" as (512, 512), "32-1024" as (32, 1024). Raises ValueError naming `name` for anything else."""
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text.strip(), re.ASCII)
    if found is None:
        raise ValueError(f"{name} = {text!r}; it must be a number of tokens, as 512, or a range of them, as 32-1024")
    return int(found[1]), int(found[2] or found[1])


def read_sharegpt(
    path: str | Path,
    tokenizer: Tokenizer,
    count: int,
    seed: int = 0,
    new_tokens: int | None = None,
    max_prompt: int = 1024,
    max_total: int = 2048,
) -> list[SampleRequest]:
    """`count` requests from a file in ShareGPT's format, a JSON list of {"conversations": [{"value": text}, …]}.

    As vLLM's benchmark takes them: the first turn is the prompt, the second one's length says how many tokens to
    generate (unless `new_tokens` does), the order is shuffled by `seed`, and what is too short (under 4 tokens) or too
    long (a prompt over max_prompt, both together over max_total) is left out, as are conversations of one turn.

    Raises:
        ValueError: The file is not of that format (names the entry), or has fewer than `count` usable conversations.
        OSError: There is no such file.
    """
    pairs = list(_read_turns(Path(path)))
    random.Random(seed).shuffle(pairs)
    requests: list[SampleRequest] = []
    for prompt, answer in pairs:
        if len(requests) == count:
            break
        ids = tokenizer.encode(prompt)
        asked = new_tokens or len(tokenizer.encode(answer, add_special_tokens=False))
        long_enough = len(ids) >= 4 and (new_tokens is not None or asked >= 4)
        if long_enough and len(ids) <= max_prompt and len(ids) + asked <= max_total:
            requests.append(SampleRequest(ids, asked, text=prompt))
    if len(requests) < count:
        raise ValueError(
            f"{path}: {len(requests)} of its conversations have a prompt of 4 to {max_prompt} tokens and at most "
            f"{max_total} with the answer; {count} requests were asked for"
        )
    return requests


@functools.lru_cache(maxsize=1)
def _read_turns(path: Path) -> Sequence[tuple[str, str]]:
    """The first two turns of every conversation that has two; a sweep of runs reads the file once."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a JSON {type(entries).__name__}; ShareGPT's format is a list of conversations")
    pairs = []
    for index, entry in enumerate(entries):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise ValueError(f'{path}: entry {index} has no list "conversations"')
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
        for turn, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f'{path}: entry {index}, turn {turn} has no text "value"')
        if len(texts) >= 2:
            pairs.append((texts[0], texts[1]))
    return pairs


def make_source(
    mix: Mix, vocab_size: int, tokenizer: Tokenizer | None, sharegpt: Path | None = None, **limits: Any
) -> Callable[[int], list[SampleRequest]]:
    """Make a function that gives the requests of run 0, 1, …, each run's in another order.

    They are the mix's, or as many of a file in ShareGPT's format (`read_sharegpt` with `limits`).

    Raises:
        ValueError: A file without a tokenizer; later, what `read_sharegpt` raises.
    """
    if sharegpt is None:
        return lambda run: mix.requests(vocab_size, run)
    if tokenizer is None:
        raise ValueError(f"{sharegpt} holds text: a tokenizer is needed for it")
    return lambda run: read_sharegpt(sharegpt, tokenizer, mix.count, mix.seed + run, **limits)


def with_text(requests: Sequence[SampleRequest], tokenizer: Tokenizer) -> list[SampleRequest]:
    """The requests with their prompts as text too. Random tokens do not always encode to themselves again."""
    return [
        request if request.text else replace(request, text=tokenizer.decode(request.prompt)) for request in requests
    ]


def parse_rate(text: str) -> float:
    """Requests a second; "inf" is all at once. Raises ValueError for anything else."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ValueError(f"request rate {text.strip()!r}; it must be requests a second above 0, or inf for all at once")
    return rate


Arrive = Callable[[Sequence[SampleRequest]], list[SampleRequest]]


def parse_schedules(rates: str, kind: str, seed: int) -> list[tuple[str, Arrive]]:
    """ "2,4,inf" as (name, what gives requests their arrivals) of each rate. Raises ValueError as `draw_arrivals`."""
    found: list[tuple[str, Arrive]] = []
    for text in rates.split(","):
        rate = parse_rate(text)
        draw_arrivals(1, rate, kind)
        name = "all at once" if math.isinf(rate) else f"{rate:g} requests/s"
        found.append((name, functools.partial(arrive, rate=rate, kind=kind, seed=seed)))
    return found


def draw_arrivals(count: int, rate: float, kind: str = "poisson", seed: int = 0) -> list[float]:
    """`count` times in seconds, not falling, the first one 0: gaps of 1 / rate, or exponential ones of that mean.

    Raises:
        ValueError: `kind` is not one of ARRIVALS, or `rate` is not above 0.
    """
    if kind not in ARRIVALS:
        raise ValueError(f"arrivals = {kind!r}; they must be {' or '.join(ARRIVALS)}")
    if not rate > 0:
        raise ValueError(f"request rate {rate!r}; it must be above 0 (inf: all at once)")
    if math.isinf(rate):
        return [0.0] * count
    if kind == "fixed":
        return [index / rate for index in range(count)]
    drawn = random.Random(seed)
    return list(accumulate(chain([0.0], (drawn.expovariate(rate) for _ in range(count - 1)))))[:count]


def arrive(requests: Sequence[SampleRequest], rate: float, kind: str = "poisson", seed: int = 0) -> list[SampleRequest]:
    """The requests with `draw_arrivals`' times. Raises ValueError as it does."""
    times = draw_arrivals(len(requests), rate, kind, seed)
    return [replace(request, arrival=time) for request, time in zip(requests, times, strict=True)]


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A request's end. Times are from its entry into the engine, or from when the client sent it."""

    prompt_tokens: int
    new_tokens: int
    begin: float  # seconds from the beginning of the run
    ttft_ms: float
    itl_ms: list[float]
    e2e_ms: float
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    error: str | None = None  # its kind: the request has no times then
    detail: str = ""  # what was said about the error

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds a token after the first; None where there is no other."""
        return (self.e2e_ms - self.ttft_ms) / (self.new_tokens - 1) if self.new_tokens > 1 else None


def failed(begin: float, kind: str, detail: str) -> Outcome:
    """The outcome of a request that was not answered."""
    return Outcome(0, 0, begin, 0.0, [], 0.0, error=kind, detail=" ".join(detail.split())[:300])


def samples(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """Every value of one of LATENCIES: one a completed request, of itl_ms one a token after the first."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    if metric == "itl_ms":
        return [gap for outcome in done for gap in outcome.itl_ms]
    return [value for outcome in done if (value := getattr(outcome, metric)) is not None]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, between two of them in proportion, as numpy has it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def describe(values: Sequence[float]) -> dict[str, float | None]:
    """STATISTICS of the values; None for each where there are none."""
    if not values:
        return dict.fromkeys(STATISTICS)
    shares = {name: percentile(values, int(name[1:]) / 100) for name in STATISTICS[1:]}
    return {"mean": statistics.fmean(values), **shares}


def summarize(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of a run of `seconds`, by the names of the pipeline's metrics: <latency>_<statistic> in ms.

    output_throughput counts generated tokens a second, total_token_throughput those and the prompts' (found in a
    prefix cache or computed). Only completed requests count; `errors` is how many others there were, by kind.
    """
    done = [outcome for outcome in outcomes if outcome.error is None]
    prompts, new = sum(outcome.prompt_tokens for outcome in done), sum(outcome.new_tokens for outcome in done)
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "errors": dict(sorted(Counter(outcome.error for outcome in outcomes if outcome.error).items())),
        "duration_s": seconds,
        "prompt_tokens": prompts,
        "cached_tokens": sum(outcome.cached_tokens for outcome in done),
        "new_tokens": new,
        "request_throughput": len(done) / seconds,
        "output_throughput": new / seconds,
        "total_token_throughput": (prompts + new) / seconds,
    }
    for latency in LATENCIES:
        found = describe(samples(outcomes, latency))
        figures |= {f"{latency}_{name}": value for name, value in found.items()}
    return figures


def parse_goodput(text: str) -> dict[str, float]:
    """ "ttft_ms:500 tpot_ms:50" as {"ttft_ms": 500.0, "tpot_ms": 50.0}; vLLM's ttft, tpot and e2el are the same in ms.

    Raises:
        ValueError: An objective is none of these, given twice, or without a number of at least 0.
    """
    found: dict[str, float] = {}
    for part in re.split(r"[\s,]+", text.strip()):
        name, _, number = part.partition(":")
        name = OBJECTIVES.get(name, name)
        if name not in OBJECTIVES.values():
            raise ValueError(
                f"goodput {part!r}; an objective is one of {', '.join(OBJECTIVES.values())}, as ttft_ms:500"
            )
        if name in found:
            raise ValueError(f"goodput names {name} twice")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not 0 <= found[name] < math.inf:
            raise ValueError(f"goodput {part!r}; a number of milliseconds is needed, as {name}:500")
    return found


def goodput(outcomes: Sequence[Outcome], objectives: Mapping[str, float], seconds: float) -> float:
    """Requests a second that were completed within every objective (a single token has a TPOT of 0)."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    met = [all((getattr(outcome, name) or 0.0) <= most for name, most in objectives.items()) for outcome in done]
    return sum(met) / seconds


# --- how it is shown --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells as text; columns named in LEFT stand left, the others are numbers."""

    title: str
    columns: list[str]
    lines: list[list[str]]


LEFT = ("run", "of", "phase", "why at least")
Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
SPEED: Columns = {
    "run": lambda record: str(record["run"]),
    "done": lambda record: str(record["completed"]),
    "failed": lambda record: _failed(record),
    "seconds": lambda record: _number(record["duration_s"]),
    "requests/s": lambda record: _number(record["request_throughput"]),
    "output tokens/s": lambda record: _number(record["output_throughput"]),
    "prompt + output tokens/s": lambda record: _number(record["total_token_throughput"]),
    "good requests/s": lambda record: _number(record.get("goodput")),
    "preemptions": lambda record: _number(record.get("preemptions")),
    "of the floor": lambda record: _share(record.get("floor_share")),
}
LATENCY: Columns = {
    "run": lambda line: line["run"],
    "of": lambda line: line["of"],
    **{name: lambda line, name=name: _number(line[name]) for name in STATISTICS},
}
PHASES: Columns = {
    "run": lambda line: line["run"],
    "phase": lambda line: line["phase"],
    "seconds": lambda line: _number(line["seconds"]),
    "prompt tokens": lambda line: _number(line["prompt_tokens"]),
    "new tokens": lambda line: _number(line["new_tokens"]),
    "at least": lambda line: _number(line["floor_s"]),
    "of the floor": lambda line: _share(line["floor_share"]),
    "why at least": lambda line: line["floor_kind"] or "",
}


def tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Tables of the runs for a person to read: throughput, latency, and phases where the records have them.

    A record is `summarize`'s figures with `run`, its name, and perhaps goodput, preemptions, floor_share, phases.
    """
    latencies = [
        {"run": record["run"], "of": metric.removesuffix("_ms").upper()}
        | {name: record[f"{metric}_{name}"] for name in STATISTICS}
        for record in records
        for metric in LATENCIES
    ]
    phases = [{"run": record["run"]} | phase for record in records for phase in record.get("phases") or ()]
    made = [("throughput", records, SPEED), ("latency, ms", latencies, LATENCY), ("phases", phases, PHASES)]
    return [_table(*parts) for parts in made if parts[1]]


def _table(title: str, lines: Sequence[Mapping[str, Any]], columns: Columns) -> Table:
    """A column that is empty throughout is left out."""
    cells = {name: [show(line) for line in lines] for name, show in columns.items()}
    kept = [name for name, texts in cells.items() if any(texts)]
    return Table(title, kept, [list(line) for line in zip(*(cells[name] for name in kept), strict=True)])


def _failed(record: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in record["errors"].items())
    return f"{record['failed']} ({kinds})" if kinds else "0"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    digits = 0 if isinstance(value, int) else max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 3)}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def render(records: Sequence[Mapping[str, Any]], form: str) -> str:
    """The records as "json" (everything), "csv" (a line a record, nested values as JSON) or "markdown" (`tables`)."""
    if form == "json":
        return json.dumps(records, indent=2)
    if form == "markdown":
        return "\n\n".join(_markdown(table) for table in tables(records))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(chain(*records))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in record.items()}
        for record in records
    )
    return out.getvalue().rstrip("\n")


def _markdown(table: Table) -> str:
    rule = ["---" if name in LEFT else "---:" for name in table.columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in [table.columns, rule, *table.lines])


def print_tables(records: Sequence[Mapping[str, Any]], title: str, width: int | None = None) -> None:
    """`title` and `tables` on stdout; width: None is the terminal's."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=width)
    console.print(title, highlight=False)
    for table in tables(records):
        drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in table.columns:
            drawn.add_column(column, justify="left" if column in LEFT else "right")
        for line in table.lines:
            drawn.add_row(*line)
        console.print(drawn)
