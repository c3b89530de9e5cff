"""Short prompts as CUDA graphs: one sequence's tokens, filled up to a bucket, in one launch of the host.

A prompt of a hundred tokens is computed sooner than the host can launch its kernels one by one. The tokens that fill a
bucket up come after the prompt's: no token of it looks at them, and what they leave in the cache lies at positions that
are written again before anything reads them. (On a paged cache's spare page, that is by the pass that reads them.)
Without a graph, and on a CPU, the same function runs as it is, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.cuda_graph import capture, new_pool
from engine.kv_cache import KVCache
from engine.model import Model
from engine.ops import Run

BUCKETS = (16, 32, 64, 128, 256)


class PromptLoop:
    """Forward passes over one sequence's next tokens in one cache.

    Args:
        model: The model.
        cache: Its cache.
        graph: Whether to capture and replay passes; else they run as they are.

    Raises:
        ValueError: A graph of a model that is not on a GPU.
    """

    def __init__(self, model: Model, cache: KVCache, graph: bool) -> None:
        device = model.weights.device
        self._pool = new_pool(device) if graph else None
        self.model, self.cache, self.graph = model, cache, graph
        # Tokens, slots, positions, and in the first place of the last row the index of the token whose logits count.
        self._integers = torch.zeros((4, BUCKETS[-1]), dtype=torch.int32, device=device)
        self._plans: dict[int, Any] = {}
        self._graphs: dict[int, tuple[Any, Tensor]] = {}

    def takes(self, run: Run) -> bool:
        """Whether the run is of several tokens and fits a bucket that ends within the cache."""
        size = self._bucket(run.count)
        return run.count > 1 and size is not None and run.position + size <= self.cache.capacity

    @staticmethod
    def _bucket(count: int) -> int | None:
        return next((size for size in BUCKETS if count <= size), None)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], run: Run) -> Tensor:
        """Logits [1, V] after the last of `tokens`, which `run` describes; good until the next call.

        Raises:
            ValueError: A run that `takes` refuses, or another number of tokens.
        """
        size = self._bucket(run.count)
        if size is None or not self.takes(run) or len(tokens) != run.count:
            raise ValueError(
                f"{len(tokens)} tokens as {run}; 2 to {BUCKETS[-1]} within {self.cache.capacity} positions"
            )
        filled = [*tokens, *[0] * (size - run.count)]
        rows = [filled, [run.slot] * size, list(range(run.position, run.position + size)), [run.count - 1] * size]
        sent = torch.tensor(rows, dtype=torch.int32, pin_memory=self._integers.is_cuda)
        self._integers[:, :size].copy_(sent, non_blocking=True)
        plan = self.model.plan([run._replace(count=size)])
        kept = self._plans.setdefault(size, plan)
        if kept is not plan:
            kept.tiles.copy_(plan.tiles)
        if not self.graph:
            return self._pass(size)
        if size not in self._graphs:
            self._pass(size)  # kernels load, and memory is taken, in a run of its own
            self._graphs[size] = capture(lambda: self._pass(size), self._pool)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def _pass(self, size: int) -> Tensor:
        tokens, slots, positions, last = self._integers[:, :size]
        return self.model.forward(
            tokens, slots, positions, self.cache, logits_at=last[:1], plan=self._plans[size]
        )  # fmt: skip
