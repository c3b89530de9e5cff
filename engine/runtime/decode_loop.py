"""Decode steps that need nothing of the host: a step's tokens are the next step's input, on the device.

A step over B rows (running sequences) is one function of buffers that stay where they are: embedding, layers, norm,
head, choice of a token, and the buffers moved on. On a GPU it is captured as a CUDA graph, one for each number of rows
in BUCKETS and way of choosing, and replayed; without a graph, and on a CPU, the same function runs as it is, to the
same bits. The tokens land in the host's memory by the step's last kernel: no copy stands between one step and the next.
Other rows may start at any time, without a wait for the steps that are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.ops.batch import Batch
from engine.runtime.cuda_graph import capture, new_pool
from engine.sampling_params import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UNROLLED = 8  # steps in one graph where many follow each other: the host launches it once for all
AHEAD = 2  # steps enqueued and not waited for, at most
CHOICES = ("greedy", "sample", "none")  # of a step's tokens; none: it ends with the logits
# Fills the second tensor, int32 [B], with the tokens that the rows choose by their logits [B, V].
Choose = Callable[[Tensor, Tensor], None]


def bucket(rows: int) -> int:
    """Rows that a step over `rows` sequences has: the next of BUCKETS, beyond them the next multiple of the last."""
    return next((size for size in BUCKETS if rows <= size), -(-rows // BUCKETS[-1]) * BUCKETS[-1])


@dataclass(frozen=True)
class Row:
    """A sequence whose `token` at `position` is to be computed next; all earlier ones are in the cache at `slot`. None
    is a token that is on the device alone."""

    slot: int
    token: int | None
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
        self._settings = torch.zeros((10, rows), dtype=torch.int32, device=device)
        self._tokens, self._slots, self._positions, self._places, self._top_k = self._settings[:5]
        self._temperature, self._top_p, self._min_p = self._settings[5:8].view(torch.float32)
        self._seeds = self._settings[8:].view(-1).view(torch.int64)
        self._chosen = torch.zeros(rows, dtype=torch.int32, device=device)
        # A step fills a column, the next step the next one, and after the last the first.
        self._history = torch.zeros((rows, cache.capacity + 1), dtype=torch.int32, pin_memory=self._on_gpu)
        self._column = 0  # of the next step
        self._first = 0  # column of the first step since `start`
        self._pending: deque[tuple[int, int, Any]] = deque()  # column, rows and event of steps not waited for
        self._events = deque(torch.cuda.Event() if self._on_gpu else None for _ in range(AHEAD))
        self._graphs: dict[tuple[int, str, int], tuple[Any, Tensor]] = {}
        self.late_graphs = 0  # captured by a step that needed one
        self._choice = "greedy"
        self._steps = 0  # since `start`

    @torch.inference_mode()
    def start(self, rows: Sequence[Row], tokens_of_slots: Tensor | None = None) -> None:
        """Decode `rows`, each in a slot of its own, from the next step on. Steps on their way can still be waited for.

        tokens_of_slots: int32 [slots or more] on the device; rows without a token take theirs from their slot's place.

        Raises:
            ValueError: The cache has too few slots for the bucket of so many rows.
        """
        self._fill(rows, bucket(len(rows)))
        if tokens_of_slots is not None and any(row.token is None for row in rows):
            own = tokens_of_slots.index_select(0, self._slots[: len(rows)])
            known = torch.tensor([row.token is not None for row in rows], pin_memory=self._on_gpu)
            known = known.to(own.device, non_blocking=True)
            self._tokens[: len(rows)] = torch.where(known, self._tokens[: len(rows)], own)

    def _fill(self, rows: Sequence[Row], size: int) -> None:
        """Let the next steps be of `size` rows, idle ones after those given."""
        taken = {row.slot for row in rows}
        idle = self.cache.idle_slots(size - len(rows), taken)
        if len(rows) + len(idle) < size:
            raise ValueError(f"{len(rows)} rows decode as {size}, and the cache has {self.cache.slots} slots")
        self.rows, self.size = list(rows), size
        filled = [*rows, *(Row(slot, 0, 0, _IDLE, 0) for slot in idle)]
        # One copy, which from pinned memory does not wait for the steps on their way.
        sent = torch.zeros(self._settings.shape, dtype=torch.int32, pin_memory=self._on_gpu)
        integers, floats, seeds = sent[:5].numpy(), sent[5:8].view(torch.float32).numpy(), sent[8:].view(-1)
        columns = [(row.token or 0, row.slot, row.position, self._column, row.params.top_k) for row in filled]
        integers[:, :size] = np.array(columns, np.int32).T
        shares = [(row.params.temperature, row.params.top_p, row.params.min_p) for row in filled]
        floats[:, :size] = np.array(shares, np.float32).T
        seeds.view(torch.int64)[:size] = torch.tensor([row.seed for row in filled])
        self._settings.copy_(sent, non_blocking=True)
        self._choice = "greedy" if all(row.params.temperature == 0 for row in rows) else "sample"
        self._first, self._steps = self._column, 0

    @torch.inference_mode()
    def keep_tokens(self, tokens_of_slots: Tensor) -> None:
        """Write the token that each row chose last to the place of its slot, int32 [slots or more] on the device."""
        count = len(self.rows)
        tokens_of_slots[self._slots[:count]] = self._tokens[:count]

    @torch.inference_mode()
    def enqueue(self, choose: Choose | None = None) -> None:
        """One step; `wait` gives its tokens. At most AHEAD steps before a `wait`. choose: in place of the rows' own
        settings; for the rows alone, without the idle ones."""
        assert len(self._pending) < AHEAD
        column = self._column
        if choose is None:
            self._run(1)
        else:
            self._run_to_logits(choose)
        event = self._events[0]
        self._events.rotate()
        if event is not None:
            event.record()
        self._pending.append((column, len(self.rows), event))

    def wait(self) -> list[int]:
        """The token that each row chose in the first step not waited for yet; -1 where every logit was NaN."""
        column, count, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return self._history.numpy()[:count, column].tolist()

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
        columns = (self._first + np.arange(self._steps)) % self._history.shape[1]
        return self._history.numpy()[: len(self.rows), columns].tolist()

    @torch.inference_mode()
    def capture(self, steps: int = 1) -> None:
        """Capture `steps` steps of the present rows as a graph, as `enqueue` and `advance` do where none is there."""
        self._capture(self._choice, steps)

    def graphs(self) -> list[tuple[int, str]]:
        """Rows and choice of every graph that a step can need, the largest first: the others fit its memory."""
        most = bucket(self.cache.slots)
        sizes = sorted({bucket(rows) for rows in range(1, most + 1)}, reverse=True)
        return [(size, choice) for size in sizes for choice in CHOICES]

    @torch.inference_mode()
    def capture_idle(self, size: int, choice: str) -> None:
        """Capture a step of `size` idle rows, which serves any."""
        self._fill((), size)
        self._capture(choice, 1)

    def _capture(self, choice: str, steps: int) -> None:
        # Kernels load, and memory is taken, in a run of its own; the rows are then put back to where they were. What
        # it wrote to the cache is what the step will write again, and to the history likewise.
        before = self._settings.clone()
        self._step(self.size, choice)
        self._settings.copy_(before)

        def run() -> Tensor:
            for _ in range(steps):
                logits = self._step(self.size, choice)
            return logits

        self._graphs[self.size, choice, steps] = capture(run, self._pool)

    def _run(self, steps: int) -> None:
        self._steps += steps
        self._column = (self._column + steps) % self._history.shape[1]
        self._replay(self._choice, steps)

    def _run_to_logits(self, choose: Choose) -> None:
        """A step whose tokens `choose` chooses: it runs as it is, between two parts."""
        self._replay("none", 1)
        assert self.logits is not None
        count = len(self.rows)
        choose(self.logits[:count], self._chosen[:count])
        self._advance(self.size)
        self._steps += 1
        self._column = (self._column + 1) % self._history.shape[1]

    def _replay(self, choice: str, steps: int) -> None:
        if not self.graph:
            assert steps == 1
            self.logits = self._step(self.size, choice)
            return
        if (self.size, choice, steps) not in self._graphs:
            self._capture(choice, steps)
            self.late_graphs += 1
        graph, self.logits = self._graphs[self.size, choice, steps]
        graph.replay()

    def _advance(self, size: int) -> None:
        here = slice(size)
        self.model.ops.advance(
            self._chosen[here], self._tokens[here], self._positions[here], self._places[here], self._history[here]
        )

    def _step(self, size: int, choice: str) -> Tensor:
        """One step of the first `size` rows of the buffers; its logits. choice: "none" ends with them."""
        ops, here = self.model.ops, slice(size)
        tokens, positions, chosen = self._tokens[here], self._positions[here], self._chosen[here]
        batch = Batch(tokens, self._slots[here], positions, one_token_per_slot=True)
        logits = self.model.forward(batch, self.cache)
        if choice == "none":
            return logits
        if choice == "greedy":
            ops.argmax(logits, out=chosen)
        else:
            ops.sample(
                logits, self._temperature[here], self._top_k[here], self._top_p[here], self._min_p[here],
                self._seeds[here], positions + 1, out=chosen,
            )  # fmt: skip
        self._advance(size)
        return logits
