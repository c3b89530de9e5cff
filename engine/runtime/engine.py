"""Engine: requests in, tokens out, a step at a time, over a scheduler, its pages, the cache and a runner."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch

from engine.config import EngineConfig
from engine.model.cost import kv_bytes_per_token
from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.runtime.decode_loop import bucket
from engine.runtime.memory import free_bytes
from engine.runtime.request import FinishReason, Request
from engine.runtime.runner import Runner, StepResult
from engine.scheduler.page_pool import PagePool
from engine.scheduler.scheduler import Scheduler

# Share of the free memory that a paged cache takes where its size is not given: a CPU's is for others too.
MEMORY_SHARE = {"cuda": 0.9, "cpu": 0.5}


@dataclass
class EngineStats:
    """Counts since the engine's start, and what it holds now."""

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed, or found in the prefix cache; those of n completions once
    cached_tokens: int = 0  # found in the prefix cache
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish_reason
    kv_wasted_share: float = 0.0  # of the room on running requests' pages, what held no token; mean over steps
    late_kernels: int = 0  # compiled or loaded by this process because a launch needed them, after the engine was ready
    late_graphs: int = 0  # captured because a step needed them, after the engine was ready


class Engine:
    """Runs requests together. Its methods are for one thread.

    Args:
        model: The model.
        config: What is switched on.
        max_len: Tokens of a request, at most: prompt and generated.
    """

    def __init__(self, model: Model, config: EngineConfig, max_len: int) -> None:
        self.max_len = max_len
        most = config.max_batch
        # Idle rows of a decode loop's bucket need slots too; pages have a row for them.
        slots = bucket(most) if config.cuda_graph and config.kv_cache != "paged" else most
        cache: KVCache
        if config.kv_cache == "paged":
            pages = _pages(model, config, max_len)
            cache = model.new_paged_cache(pages=pages, slots=slots, capacity=max_len, page_size=config.page_size)
            pool = PagePool(pages, config.page_size, config.prefix_cache)
        else:
            _check_room(model, slots, max_len)
            cache = model.new_cache(slots, max_len)
            # A slot is a page that a sequence never outgrows; as many again for those that the scheduler holds back.
            pool = PagePool(2 * most, max_len, prefix_cache=False)
        self.pool = pool
        self.scheduler = Scheduler(
            pool, most, max(config.step_tokens, most), max_len,
            mixed=config.batching == "continuous", recompute=config.kv_cache == "none",
        )  # fmt: skip
        self.runner = Runner(model, cache, config.cuda_graph, config.captures)
        self.runner.capture()
        self._kernels_before = _late_kernels()
        # Steps that run while the next one is scheduled.
        self._ahead = 1 if config.batching == "continuous" and config.kv_cache != "none" else 0
        self._counts = EngineStats()
        self._finished: Counter[str] = Counter()
        self._room = self._unused = 0  # tokens on running requests' pages, added up over steps

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self.scheduler)

    def check(self, request: Request) -> None:
        """Raises ValueError where `add` would."""
        self.scheduler.check(request)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. Raises ValueError where it can never run; nothing has changed then."""
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * request.prompt_length
        self.scheduler.add(request)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request that has not ended: its pages are free for the next step."""
        self.scheduler.finish(request)
        self._end(request, reason, error)

    def step(self) -> list[Request]:
        """Enqueue the next step and take the results of the one before; requests that got a token or ended."""
        step = self.scheduler.schedule()
        touched: list[Request] = []
        for sequence in step.timed_out:
            request = cast(Request, sequence)
            self._end(request, "deadline")
            touched.append(request)
        self._counts.preemptions += len(step.preempted)
        for chunk in step.chunks:
            request = cast(Request, chunk.sequence)
            if not request.begun:
                request.begun = True
                if request.parent is None:
                    request.cached_tokens = chunk.begin
                    self._counts.prompt_tokens += request.prompt_length
                    self._counts.cached_tokens += chunk.begin
                else:  # its prompt is its parent's, which has counted it
                    request.cached_tokens = min(chunk.begin, cast(Request, request.parent).cached_tokens)
        if step.chunks:
            self.runner.enqueue(step)
            self._counts.steps += 1
            for sequence in self.scheduler.running:
                room = len(sequence.pages) * self.pool.page_size
                self._room += room
                self._unused += room - sequence.computed
        elif not self.runner.pending and len(self) and not touched:
            raise RuntimeError(f"nothing can run, and {len(self)} requests have not ended: a fault of the scheduler")
        while self.runner.pending > (self._ahead if step.chunks else 0):
            touched += self._collect()
        return touched

    def _collect(self) -> list[Request]:
        touched = []
        for result in self.runner.wait():
            request = result.request
            if request.finish_reason:
                continue  # it ended while this was on its way
            if result.tokens:
                self._accept(request, result)
            if result.nan_after is not None and request.finish_reason is None:
                self.end(request, "error", f"every logit after token {result.nan_after} of a request is NaN")
            touched.append(request)
        return touched

    def _accept(self, request: Request, result: StepResult) -> None:
        """Append the tokens that a step chose, up to one that ends the request."""
        if request.params.max_new_tokens == 0:
            self.end(request, "length")
            return
        count, reason = request.find_end(result.tokens)
        # Before the tokens: another thread that sees a token looks for what belongs to it.
        request.times += [time.perf_counter()] * count
        request.logprobs += result.logprobs[:count]
        self.scheduler.append(request, result.tokens[:count])
        self._counts.generated_tokens += count
        if reason:
            self.end(request, reason)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        request.finish_reason, request.error, request.counts = reason, error, None
        self._finished[reason] += 1

    def forget(self) -> None:
        """Empty the prefix cache of what nobody uses."""
        self.pool.forget()

    def stats(self) -> EngineStats:
        """Statistics as of now; for any thread, with counts that are a step apart at most."""
        counts, pool, scheduler = self._counts, self.pool, self.scheduler
        return EngineStats(
            len(scheduler.running), len(scheduler.waiting), pool.pages, pool.used, pool.cached, counts.preemptions,
            counts.steps, counts.prompt_tokens, counts.cached_tokens, counts.generated_tokens, dict(self._finished),
            self._unused / max(1, self._room), _late_kernels() - self._kernels_before, self.runner.late_graphs,
        )  # fmt: skip


def _late_kernels() -> int:
    """Kernels of this process that a launch has compiled or loaded; 0 where there is no such backend yet."""
    launch = sys.modules.get("kernels.launch")
    return len(launch.late_kernels()) if launch else 0


def _check_room(model: Model, slots: int, max_len: int) -> None:
    """Raises ValueError where the free memory has no room for a contiguous cache."""
    size = slots * max_len * kv_bytes_per_token(model.config, model.weights.dtype)
    free = free_bytes(model.weights.device)
    if size > free:
        raise ValueError(
            f"a contiguous cache of {slots} slots of {max_len} tokens is {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; lower max_batch or max_model_len, or use kv_cache = 'paged'"
        )


def _pages(model: Model, config: EngineConfig, max_len: int) -> int:
    """Pages of the cache: what is asked for, else what all that may run could fill, as far as memory goes.

    Raises ValueError where memory has no room for that, or for one request.
    """
    device = model.weights.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free = free_bytes(device)
    size = config.page_size * kv_bytes_per_token(model.config, model.weights.dtype)
    whose = "the GPU's memory" if device.type == "cuda" else "memory"
    if config.kv_tokens is not None:
        pages = -(-config.kv_tokens // config.page_size)
        if pages * size > free:
            raise ValueError(
                f"a KV cache of kv_tokens = {config.kv_tokens} takes {pages * size / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB of {whose} are free; lower kv_tokens or max_model_len"
            )
        return pages
    room = MEMORY_SHARE[device.type] * free - _pass_bytes(model, config)
    if room < size * -(-max_len // config.page_size):
        raise ValueError(
            f"{free / 1e9:.1f} GB of {whose} are free: no room for the KV cache of one request of {max_len} "
            "tokens beside a pass; lower max_model_len or max_step_tokens"
        )
    return min(config.max_batch * -(-max_len // config.page_size), int(room // size))


def _pass_bytes(model: Model, config: EngineConfig) -> int:
    """Bytes that a pass over step_tokens tokens takes beside weights and cache, about, with some to spare."""
    shape = model.config
    width = shape.q_size + 2 * shape.kv_size + 3 * shape.hidden_size + 3 * shape.intermediate_size
    rows = config.step_tokens * width + config.max_batch * 4 * shape.vocab_size
    return 2 * rows * model.weights.dtype.itemsize
