"""Decode steps that need nothing of the host: a step's tokens are the next step's input, on the device.

A step over B rows (running sequences) is one function of buffers that stay where they are: embedding, layers, norm,
head, choice of a token, and the buffers moved on. On a GPU it is captured as a CUDA graph, one for each number of rows
in BUCKETS, and replayed; without a graph, and on a CPU, the same function runs as it is, to the same bits. The tokens
land in the host's memory by the step's last kernel: no copy stands between one step and the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cuda_graph import capture, new_pool
from engine.kv_cache import KVCache
from engine.model import Model
from engine.sampling import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UNROLLED = 8  # steps in one graph where many follow each other: the host launches it once for all
AHEAD = 2  # steps enqueued and not waited for, at most


def bucket(rows: int) -> int:
    """Rows that a step over `rows` sequences has: the next of BUCKETS, beyond them the next multiple of the last."""
    return next((size for size in BUCKETS if rows <= size), -(-rows // BUCKETS[-1]) * BUCKETS[-1])


@dataclass(frozen=True)
class Row:
    """A sequence whose `token` at `position` is to be computed next; all earlier ones are in the cache at `slot`."""

    slot: int
    token: int
    position: int
    params: SamplingParams
    seed: int


_IDLE = SamplingParams(temperature=0.0)


class DecodeLoop:
    """Decode steps over one cache, for rows of any sequences in it.

    Rows that fill a bucket up decode a sequence of their own in an idle slot, which disturbs none.

    Args:
        model: The model; repetition penalties are left out.
        cache: Its cache; a contiguous one of as many slots as one of BUCKETS has rows.
        graph: Whether to capture and replay steps; else they run as they are.

    Raises:
        ValueError: A graph of a model that is not on a GPU.
    """

    def __init__(self, model: Model, cache: KVCache, graph: bool) -> None:
        device = model.weights.device
        self._on_gpu = device.type == "cuda"
        self._pool = new_pool(device) if graph else None
        self.model, self.cache, self.graph = model, cache, graph
        self.rows: list[Row] = []
        self.size = 0  # rows of a step, idle ones included
        self.logits: Tensor | None = None  # [bucket, V] of the step enqueued last
        rows = bucket(cache.slots)
        self._integers = torch.zeros((4, rows), dtype=torch.int32, device=device)
        self._tokens, self._slots, self._positions, self._top_k = self._integers
        self._floats = torch.zeros((3, rows), dtype=torch.float32, device=device)
        self._temperature, self._top_p, self._min_p = self._floats
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._chosen = torch.zeros(rows, dtype=torch.int32, device=device)
        self._history = torch.zeros((rows, cache.capacity + 1), dtype=torch.int32, pin_memory=self._on_gpu)
        self._first = np.zeros(0, np.int64)  # place in the history of each row's first token
        self._events = [torch.cuda.Event() for _ in range(AHEAD)] if self._on_gpu else []
        self._graphs: dict[tuple[int, bool, int], tuple[Any, Tensor]] = {}
        self._greedy = True
        self._enqueued = self._waited = self._steps = 0

    @torch.inference_mode()
    def start(self, rows: Sequence[Row]) -> None:
        """Decode `rows`, each in a slot of its own, from the next step on; what was enqueued and not read is dropped.

        Raises:
            ValueError: The cache has too few slots for the bucket of so many rows.
        """
        size, taken = bucket(len(rows)), {row.slot for row in rows}
        idle = self.cache.idle_slots(size - len(rows), taken)
        if len(rows) + len(idle) < size:
            raise ValueError(f"{len(rows)} rows decode as {size}, and the cache has {self.cache.slots} slots")
        self.rows, self.size = list(rows), size
        filled = [*rows, *(Row(slot, 0, 0, _IDLE, 0) for slot in idle)]
        integers = [[row.token, row.slot, row.position, row.params.top_k] for row in filled]
        floats = [[row.params.temperature, row.params.top_p, row.params.min_p] for row in filled]
        self._integers[:, :size] = torch.tensor(integers, dtype=torch.int32).t()
        self._floats[:, :size] = torch.tensor(floats, dtype=torch.float32).t()
        self._seeds[:size] = torch.tensor([row.seed for row in filled], dtype=torch.int64)
        self._greedy = all(row.params.temperature == 0 for row in rows)
        self._first = np.array([row.position + 1 for row in rows], np.int64)
        self._enqueued = self._waited = self._steps = 0

    @torch.inference_mode()
    def enqueue(self) -> None:
        """One step; `wait` gives its tokens. At most AHEAD steps before a `wait`."""
        assert self._enqueued - self._waited < AHEAD
        self._run(1)
        if self._on_gpu:
            self._events[self._enqueued % AHEAD].record()
        self._enqueued += 1

    def wait(self) -> list[int]:
        """The token that each row chose in the first step not waited for yet; -1 where every logit was NaN."""
        if self._on_gpu:
            self._events[self._waited % AHEAD].synchronize()
        tokens = self._history.numpy()[np.arange(len(self.rows)), self._first + self._waited].tolist()
        self._waited += 1
        return tokens

    @torch.inference_mode()
    def advance(self, steps: int) -> None:
        """Enqueue `steps` steps whose tokens nobody looks at before the last; `generated` gives them."""
        while steps:
            here = UNROLLED if self.graph and steps >= UNROLLED else 1
            self._run(here)
            steps -= here

    def generated(self) -> list[list[int]]:
        """Every token each row has chosen since `start`; waits for the steps that are enqueued."""
        if self._on_gpu:
            torch.cuda.synchronize(self.model.weights.device)
        lists = self._history[: len(self.rows)].tolist()
        return [tokens[first : first + self._steps] for first, tokens in zip(self._first, lists, strict=True)]

    @torch.inference_mode()
    def capture(self, steps: int = 1) -> None:
        """Capture `steps` steps of the present rows as a graph, as `enqueue` and `advance` do where none is there."""
        key = (self.size, self._greedy, steps)
        # Kernels load, and memory is taken, in a run of its own; the rows are then put back to where they were. What
        # it wrote to the cache is what the step will write again.
        before = self._integers.clone()
        self._step(self.size, self._greedy)
        self._integers.copy_(before)

        def run() -> Tensor:
            for _ in range(steps):
                logits = self._step(self.size, self._greedy)
            return logits

        self._graphs[key] = capture(run, self._pool)

    def _run(self, steps: int) -> None:
        self._steps += steps
        if not self.graph:
            self.logits = self._step(self.size, self._greedy)
            return
        key = (self.size, self._greedy, steps)
        if key not in self._graphs:
            self.capture(steps)
        graph, self.logits = self._graphs[key]
        graph.replay()

    def _step(self, size: int, greedy: bool) -> Tensor:
        """One step of the first `size` rows of the buffers; its logits."""
        ops, here = self.model.ops, slice(size)
        tokens, positions, chosen = self._tokens[here], self._positions[here], self._chosen[here]
        logits = self.model.forward(tokens, self._slots[here], positions, self.cache, single=True)
        if greedy:
            ops.argmax(logits, out=chosen)
        else:
            ops.sample(
                logits, self._temperature[here], self._top_k[here], self._top_p[here], self._min_p[here],
                self._seeds[here], positions + 1, out=chosen,
            )  # fmt: skip
        ops.advance(chosen, tokens, positions, self._history[here])
        return logits
