"""Graph step: one function of buffers that stay where they are, captured as CUDA graphs and replayed.

The function is a forward pass, the choice of a token for each row, and the buffers moved on to the next step. A graph
serves one size (a bucket of rows or of tokens) and one sampler; without a graph, and on a CPU, the same function runs
as it is, to the same bits. Chosen tokens land in a ring of columns in the host's memory by the step's last kernel: no
copy stands between one step and the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.runtime.cuda_graph import capture, new_pool

AHEAD = 2  # steps enqueued and not waited for, at most
SAMPLERS = ("greedy", "sample", "none")  # of a step's tokens; none: it ends with the logits


class RowBuffers(NamedTuple):
    """Buffers [B] of B rows, each of which chooses a token; int32 where nothing else is said."""

    tokens: Tensor  # computed by the step; then those chosen
    positions: Tensor  # of the tokens, or where the sampler draws; each step adds 1
    columns: Tensor  # of the history, where the step puts the tokens chosen
    top_k: Tensor
    temperature: Tensor  # fp32
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32
    seeds: Tensor  # int64
    chosen: Tensor  # -1 where every logit was NaN
    history: Tensor  # [B, columns]


class GraphStep(ABC):
    """Steps over one cache, captured and replayed. Subclasses say what a step reads and computes.

    Args:
        model: The model; repetition penalties are left out.
        cache: Its cache.
        graph: Whether to capture and replay steps; else they run as they are.
        inputs: Shape of the int32 buffer on the device that a step reads and may change.
        history: Rows and columns of the ring of chosen tokens.

    Raises:
        ValueError: A graph of a model that is not on a GPU.
    """

    def __init__(
        self, model: Model, cache: KVCache, graph: bool, inputs: tuple[int, ...], history: tuple[int, int]
    ) -> None:
        device = model.weights.device
        self._on_gpu = device.type == "cuda"
        self._pool = new_pool(device) if graph else None
        self.model, self.cache, self.graph = model, cache, graph
        self.logits: Tensor | None = None  # [rows, V] of the step enqueued last
        self._inputs = torch.zeros(inputs, dtype=torch.int32, device=device)
        self._history = torch.zeros(history, dtype=torch.int32, pin_memory=self._on_gpu)
        self._column = 0  # of the next step
        self._pending: deque[tuple[int, int, Any]] = deque()  # column, rows and event of steps not waited for
        self._events = deque(torch.cuda.Event() if self._on_gpu else None for _ in range(AHEAD))
        self._graphs: dict[tuple[int, str, int], tuple[Any, Tensor]] = {}
        self.late_graphs = 0  # captured by a step that needed one

    @abstractmethod
    def sizes(self) -> list[int]:
        """Every size that a step can have, the largest first: graphs of the others fit its memory."""

    @abstractmethod
    def _fill_idle(self, size: int) -> None:
        """Let the next step be of `size` and compute nothing that anybody needs."""

    @abstractmethod
    def _rows(self, size: int) -> RowBuffers:
        """Buffers of a step's rows."""

    @abstractmethod
    def _forward(self, size: int) -> Tensor:
        """Forward pass of a step: the rows' logits [rows, V]."""

    @abstractmethod
    def _sampled_positions(self, rows: RowBuffers) -> Tensor:
        """Positions [B] of the tokens that the rows are to choose."""

    def graphs(self) -> list[tuple[int, str]]:
        """Size and sampler of every graph that a step can need."""
        return [(size, sampler) for size in self.sizes() for sampler in SAMPLERS]

    @torch.inference_mode()
    def capture_idle(self, size: int, sampler: str) -> None:
        """Capture a step of idle rows, which serves any of its size."""
        self._fill_idle(size)
        self._capture(size, sampler, 1)

    def wait(self) -> list[list[int]]:
        """Tokens that each row chose in the first step not waited for yet; -1 where every logit was NaN."""
        column, rows, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return self._history.numpy()[:rows, column : column + 1].tolist()

    def _record(self, column: int, rows: int) -> None:
        """Enter the step enqueued last, whose `rows` put their tokens into `column`, into those to be waited for."""
        assert len(self._pending) < AHEAD
        event = self._events[0]
        self._events.rotate()
        if event is not None:
            event.record()
        self._pending.append((column, rows, event))

    def _move(self, steps: int) -> None:
        """Move the ring on by the columns of `steps` steps."""
        self._column = (self._column + steps) % self._history.shape[1]

    def _capture(self, size: int, sampler: str, steps: int) -> None:
        # Kernels load, and memory is taken, in a run of its own; the inputs are then put back. What it wrote to the
        # cache and to the history is what the step will write again.
        before = self._inputs.clone()
        self._step(size, sampler)
        self._inputs.copy_(before)

        def run() -> Tensor:
            for _ in range(steps):
                logits = self._step(size, sampler)
            return logits

        self._graphs[size, sampler, steps] = capture(run, self._pool)

    def _replay(self, size: int, sampler: str, steps: int = 1) -> Tensor:
        """Run `steps` steps, from a graph where there are graphs; the last one's logits."""
        if not self.graph:
            assert steps == 1
            self.logits = self._step(size, sampler)
            return self.logits
        if (size, sampler, steps) not in self._graphs:
            self._capture(size, sampler, steps)
            self.late_graphs += 1
        graph, self.logits = self._graphs[size, sampler, steps]
        graph.replay()
        return self.logits

    def _step(self, size: int, sampler: str) -> Tensor:
        """One step; its logits."""
        ops, logits = self.model.ops, self._forward(size)
        if sampler == "none":
            return logits
        rows = self._rows(size)
        if sampler == "greedy":
            ops.argmax(logits, out=rows.chosen)
        else:
            ops.sample(
                logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds,
                self._sampled_positions(rows), out=rows.chosen,
            )  # fmt: skip
        self._advance(rows)
        return logits

    def _advance(self, rows: RowBuffers) -> None:
        """Move the rows on to the tokens that they have chosen."""
        self.model.ops.advance(rows.chosen, rows.tokens, rows.positions, rows.columns, rows.history)
