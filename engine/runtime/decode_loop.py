"""Decode loop: steps that need nothing of the host, as a step's tokens are the next step's input, on the device.

A step over B rows (running sequences) is a graph step of one token a row, in buckets of rows. Other rows may start at
any time, without a wait for the steps that are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.ops.batch import Batch
from engine.runtime.graph_step import GraphStep, RowBuffers
from engine.sampling_params import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UNROLLED = 8  # steps in one graph where many follow each other: the host launches it once for all
# Fills the second tensor, int32 [B], with the tokens that the rows choose by their logits [B, V].
Sample = Callable[[Tensor, Tensor], None]


def bucket(rows: int) -> int:
    """Rows that a step over `rows` sequences has: the next of BUCKETS, beyond them the next multiple of the last."""
    return next((size for size in BUCKETS if rows <= size), -(-rows // BUCKETS[-1]) * BUCKETS[-1])


@dataclass(frozen=True)
class DecodeRow:
    """Sequence whose `token` at `position` is to be computed next; all earlier ones are in the cache at `slot`. None
    is a token that is on the device alone."""

    slot: int
    token: int | None
    position: int
    params: SamplingParams
    seed: int


_IDLE = SamplingParams(temperature=0.0)


class DecodeLoop(GraphStep):
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
        rows = bucket(cache.slots)
        super().__init__(model, cache, graph, inputs=(10, rows), history=(rows, cache.capacity + 1))
        self.rows: list[DecodeRow] = []
        self.size = 0  # rows of a step, idle ones included
        self._tokens, self._slots, self._positions, self._columns, self._top_k = self._inputs[:5]
        self._temperature, self._top_p, self._min_p = self._inputs[5:8].view(torch.float32)
        self._seeds = self._inputs[8:].view(-1).view(torch.int64)
        self._chosen = torch.zeros(rows, dtype=torch.int32, device=model.weights.device)
        self._buffers: dict[int, RowBuffers] = {}  # by size
        self._sampler = "greedy"  # of the rows
        self._first = 0  # column of the first step since `start`
        self._steps = 0  # since `start`

    @torch.inference_mode()
    def start(self, rows: Sequence[DecodeRow], tokens_of_slots: Tensor | None = None) -> None:
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

    def _fill(self, rows: Sequence[DecodeRow], size: int) -> None:
        """Let the next steps be of `size` rows, idle ones after those given."""
        taken = {row.slot for row in rows}
        idle = self.cache.idle_slots(size - len(rows), taken)
        if len(rows) + len(idle) < size:
            raise ValueError(f"{len(rows)} rows decode as {size}, and the cache has {self.cache.slots} slots")
        self.rows, self.size = list(rows), size
        filled = [*rows, *(DecodeRow(slot, 0, 0, _IDLE, 0) for slot in idle)]
        # One copy, which from pinned memory does not wait for the steps on their way.
        sent = torch.zeros(self._inputs.shape, dtype=torch.int32, pin_memory=self._on_gpu)
        integers, floats, seeds = sent[:5].numpy(), sent[5:8].view(torch.float32).numpy(), sent[8:].view(-1)
        fields = [(row.token or 0, row.slot, row.position, self._column, row.params.top_k) for row in filled]
        integers[:, :size] = np.array(fields, np.int32).T
        shares = [(row.params.temperature, row.params.top_p, row.params.min_p) for row in filled]
        floats[:, :size] = np.array(shares, np.float32).T
        seeds.view(torch.int64)[:size] = torch.tensor([row.seed for row in filled])
        self._inputs.copy_(sent, non_blocking=True)
        self._sampler = "greedy" if all(row.params.temperature == 0 for row in rows) else "sample"
        self._first, self._steps = self._column, 0

    @torch.inference_mode()
    def keep_tokens(self, tokens_of_slots: Tensor) -> None:
        """Write the token that each row chose last to the place of its slot, int32 [slots or more] on the device."""
        count = len(self.rows)
        tokens_of_slots[self._slots[:count]] = self._tokens[:count]

    @torch.inference_mode()
    def enqueue(self, sample: Sample | None = None) -> None:
        """Enqueue a step, whose tokens `wait` gives; at most AHEAD of them before a `wait`.

        sample: chooses the tokens in place of the rows' own settings, for the rows alone, without the idle ones.
        """
        column = self._column
        if sample is None:
            self._run(1)
        else:
            self._run_to_logits(sample)
        self._record(column, len(self.rows))

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
        self._capture(self.size, self._sampler, steps)

    def sizes(self) -> list[int]:
        most = bucket(self.cache.slots)
        return sorted({bucket(rows) for rows in range(1, most + 1)}, reverse=True)

    def _fill_idle(self, size: int) -> None:
        self._fill((), size)

    def _run(self, steps: int) -> None:
        self._steps += steps
        self._move(steps)
        self._replay(self.size, self._sampler, steps)

    def _run_to_logits(self, sample: Sample) -> None:
        """Graph up to the logits, eager sampler, graph-safe advance."""
        logits = self._replay(self.size, "none")
        count = len(self.rows)
        sample(logits[:count], self._chosen[:count])
        self._advance(self._rows(self.size))
        self._steps += 1
        self._move(1)

    def _forward(self, size: int) -> Tensor:
        rows = self._rows(size)
        batch = Batch(rows.tokens, self._slots[:size], rows.positions, one_token_per_slot=True)
        return self.model.forward(batch, self.cache)

    def _rows(self, size: int) -> RowBuffers:
        if size not in self._buffers:
            whole = RowBuffers(
                self._tokens, self._positions, self._columns, self._top_k, self._temperature, self._top_p, self._min_p,
                self._seeds, self._chosen, self._history,
            )  # fmt: skip
            self._buffers[size] = RowBuffers(*(buffer[:size] for buffer in whole))
        return self._buffers[size]

    def _sampled_positions(self, rows: RowBuffers) -> Tensor:
        return rows.positions + 1
