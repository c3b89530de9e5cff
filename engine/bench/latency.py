"""How long prompts and decode steps take, beside what the machine allows at best: `afs bench latency` and the pipeline.

A test is named as llama-bench names it: pp512 is a prompt of 512 tokens, tg128 is 128 generated tokens, "@ d1024" that
1024 tokens are in the cache before. Those are random numbers, so that nothing has to be computed first.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from engine.model.cost import Ceilings, Footprint, StepCost, kv_bytes_per_token, step_cost
from engine.model.kv_cache import ContiguousCache
from engine.model.transformer import Model
from engine.ops.batch import Batch, TokenSpan
from engine.runtime.decode_loop import DecodeLoop, DecodeRow, bucket
from engine.runtime.prompt_loop import PromptLoop
from engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
PAGE = 256  # positions by which a cache's capacity grows


class TooLarge(ValueError):
    """A case that the model's positions or the device's memory do not hold."""


@dataclass(frozen=True)
class Case:
    """`prompt` tokens of each sequence in one pass, or `new` tokens made one by one, after `depth` tokens."""

    prompt: int
    new: int
    depth: int

    @classmethod
    def parse(cls, name: str) -> Case:
        """Raises ValueError for anything but pp512, tg128 or one of these with "@ d1024" behind it."""
        found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?: ?@ ?d(\d+))?", name.strip())
        if found is None:
            raise ValueError(f"test {name!r}; a test is named like pp512, tg128 or tg128@d1024")
        count, depth = int(found[2]), int(found[3] or 0)
        return cls(count, 0, depth) if found[1] == "pp" else cls(0, count, depth)

    @property
    def name(self) -> str:
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.new}"
        return f"{what} @ d{self.depth}" if self.depth else what


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time `run` and all it enqueues, by a synchronised clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def random_cache(model: Model, batch: int, positions: int) -> ContiguousCache:
    """A cache of random numbers for `batch` sequences and their bucket's idle rows, `positions` long at least.

    Raises:
        TooLarge: The model has fewer positions, or the GPU less free memory.
    """
    config, weights = model.config, model.weights
    if positions > model.max_positions:
        raise TooLarge(f"{positions} positions; the model has {model.max_positions}")
    capacity = min(-(-positions // PAGE) * PAGE, model.max_positions)
    size = bucket(batch) * capacity * kv_bytes_per_token(config, weights.dtype)
    if weights.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(weights.device)[0]
        if size > 0.9 * free:
            raise TooLarge(f"a cache of {size / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free")
    cache = model.new_cache(bucket(batch), capacity)
    generator = torch.Generator(weights.device).manual_seed(0)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(generator=generator)
    return cache


def start_decode(loop: DecodeLoop, batch: int, depth: int) -> None:
    """`batch` sequences go on from a random token after `depth` cached ones, greedily."""
    generator = torch.Generator().manual_seed(batch * 65_537 + depth)
    tokens = torch.randint(0, loop.model.config.vocab_size, (batch,), generator=generator).tolist()
    loop.start([DecodeRow(slot, token, depth, GREEDY, 0) for slot, token in enumerate(tokens)])


def run_decode(loop: DecodeLoop, steps: int) -> None:
    """`steps` steps as `LLM` runs them: the next one is enqueued before a step's tokens are read."""
    loop.enqueue()
    for _ in range(steps - 1):
        loop.enqueue()
        loop.wait()
    loop.wait()


def measure_decode(model: Model, batch: int, steps: int, depth: int, repeats: int, graph: bool) -> list[float]:
    """Seconds of each of `repeats` runs of `steps` decode steps. Raises TooLarge."""
    loop = DecodeLoop(model, random_cache(model, batch, depth + steps), graph)
    samples = []
    for repeat in range(repeats + 1):
        start_decode(loop, batch, depth)
        if repeat == 0:
            run_decode(loop, min(steps, 3))
        else:
            samples.append(seconds(lambda: run_decode(loop, steps), model.weights.device))
    return samples


@torch.inference_mode()
def measure_prompt(
    model: Model, batch: int, prompt: int, depth: int, repeats: int, chunk: int, graph: bool = False
) -> list[float]:  # fmt: skip
    """Seconds of each of `repeats` passes over `batch` prompts of `prompt` tokens, in pieces of `chunk` tokens at most,
    until the logits of each last one are there. graph: whether short ones are CUDA graphs. Raises TooLarge."""
    device = model.weights.device
    cache = random_cache(model, batch, depth + prompt)
    total = batch * prompt
    tokens = torch.randint(0, model.config.vocab_size, (total,), generator=torch.Generator().manual_seed(0))
    ids, tokens = tokens.tolist(), tokens.to(device, torch.int32)
    loop = PromptLoop(model, cache, graph) if graph else None
    places = torch.arange(total, device=device)
    slots = (places // prompt).int()
    positions = (places % prompt + depth).int()
    pieces = []
    for begin in range(0, total, chunk):
        end = min(begin + chunk, total)
        last = [place - begin for place in range(begin, end) if (place + 1) % prompt == 0]
        edges = [begin, *range(-(-(begin + 1) // prompt) * prompt, end, prompt), end]
        spans = [TokenSpan(b - a, a // prompt, a % prompt + depth) for a, b in pairwise(edges)]
        here = slice(begin, end)
        wanted = torch.tensor(last, dtype=torch.int32, device=device)
        pieces.append((here, Batch(tokens[here], slots[here], positions[here], logits_at=wanted, spans=spans)))

    def run() -> None:
        for here, piece in pieces:
            spans = piece.spans or ()
            if loop and len(spans) == 1 and loop.takes(spans[0]):
                loop.forward(ids[here], spans[0])
            else:
                model.forward(piece, cache)

    run()
    return [seconds(run, device) for _ in range(repeats)]


def case_cost(model: Footprint, case: Case, batch: int) -> tuple[StepCost, int]:
    """Cost of one pass of a test (decode: of the mean one), and how many passes it has."""
    if case.prompt:
        return step_cost(model, [case.prompt] * batch, [case.depth + case.prompt] * batch), 1
    middle = case.depth + 1 + case.new // 2
    return step_cost(model, [1] * batch, [middle] * batch), case.new


@dataclass(frozen=True)
class LatencyResult:
    """A test's runs."""

    case: Case
    batch: int
    samples: list[float]  # seconds a run
    steps: int  # passes a run
    limit: float | None  # seconds a pass at least
    limit_kind: str | None

    @property
    def rates(self) -> list[float]:
        """Tokens a second, of all sequences together."""
        return [self.batch * (self.case.prompt + self.case.new) / sample for sample in self.samples]

    @property
    def step_ms(self) -> float:
        return statistics.median(self.samples) / self.steps * 1e3

    @property
    def share(self) -> float | None:
        """How near the median pass comes to the limit: 1 is all that the machine allows."""
        return None if self.limit is None else self.limit * 1e3 / self.step_ms


def measure(
    model: Model, case: Case, batch: int, repeats: int, graph: bool, chunk: int, ceilings: Ceilings
) -> LatencyResult:  # fmt: skip
    """Run one case. Raises TooLarge."""
    if case.prompt:
        samples = measure_prompt(model, batch, case.prompt, case.depth, repeats, chunk, graph)
    else:
        samples = measure_decode(model, batch, case.new, case.depth, repeats, graph)
    cost, steps = case_cost(model.footprint, case, batch)
    limit, kind = ceilings.milliseconds(cost)
    return LatencyResult(case, batch, samples, steps, None if limit is None else limit / 1e3, kind)


def records(results: Sequence[LatencyResult], **shared: Any) -> list[dict[str, Any]]:
    """One flat record a result, named as llama-bench's JSON names them where it has the field."""
    return [
        {
            **shared,
            "n_prompt": result.case.prompt,
            "n_gen": result.case.new,
            "n_depth": result.case.depth,
            "batch": result.batch,
            "test": result.case.name,
            "avg_ns": round(statistics.mean(result.samples) * 1e9),
            "stddev_ns": round(_deviation(result.samples) * 1e9),
            "avg_ts": statistics.mean(result.rates),
            "stddev_ts": _deviation(result.rates),
            "samples_ns": [round(sample * 1e9) for sample in result.samples],
            "samples_ts": result.rates,
            "ms_per_step": result.step_ms,
            "limit_ms_per_step": None if result.limit is None else result.limit * 1e3,
            "limit_share": result.share,
            "limit_kind": result.limit_kind,
        }
        for result in results
    ]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


COLUMNS = ("model", "size", "params", "backend", "n_batch", "batch", "test", "t/s", "ms/step", "of limit")


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """llama-bench's table, with the time of a step and its share of the limit: the cells under COLUMNS."""
    return [
        [
            str(row["model_type"]),
            f"{row['model_size'] / 2**30:.2f} GiB",
            f"{row['model_n_params'] / 1e9:.2f} B",
            str(row["backends"]),
            str(row["n_batch"]),
            str(row["batch"]),
            str(row["test"]),
            f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            f"{row['ms_per_step']:.3f}",
            "" if row["limit_share"] is None else f"{row['limit_share']:.1%}",
        ]
        for row in rows
    ]


def render(rows: Sequence[dict[str, Any]], form: str) -> str:
    """The records as "json", "csv" or "markdown"."""
    if form == "json":
        return json.dumps(rows, indent=2)
    if form == "markdown":
        table = [list(COLUMNS), ["---"] * len(COLUMNS), *lines(rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in table)
    out = io.StringIO()
    names = [name for name in rows[0] if not name.startswith("samples")] if rows else []
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
