"""Prompt loop: short prompts as CUDA graphs, filled up to a bucket of tokens, in one launch of the host.

A prompt of a hundred tokens is computed sooner than the host can launch its kernels one by one. A pass is a graph step
of one row: one sequence's next tokens. Those that fill a bucket up come after the prompt's: no token of it looks at
them, and what they leave in the cache lies at positions that are written again before anything reads them. (On a paged
cache's spare page, that is by the pass that reads them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.ops.batch import Batch, TokenSpan
from engine.runtime.graph_step import AHEAD, GraphStep, RowBuffers
from engine.sampling_params import SamplingParams

BUCKETS = (16, 32, 64, 128, 256)
HEAD = 16  # 32-bit words that a pass is told ahead of its tokens
# Row of the last token, position and column of the token to choose, top_k; temperature, top_p, min_p; slot, seed.
_HEAD = Struct("4i3f4x2q")
_GREEDY = SamplingParams(temperature=0.0)


class PromptLoop(GraphStep):
    """Forward passes over one sequence's next tokens in one cache.

    Args:
        model: The model; repetition penalties are left out.
        cache: Its cache.
        graph: Whether to capture and replay passes; else they run as they are.
        tokens_of_slots: int32 [slots or more] on the device, where the token that a pass chooses is written to the
            place of its slot; None: nowhere that anybody sees.

    Raises:
        ValueError: A graph of a model that is not on a GPU.
    """

    def __init__(self, model: Model, cache: KVCache, graph: bool, tokens_of_slots: Tensor | None = None) -> None:
        # One copy from the host: the head, then the tokens, their slots and their positions.
        super().__init__(model, cache, graph, inputs=(HEAD + 3 * BUCKETS[-1],), history=(1, AHEAD))
        device = model.weights.device
        self._last, position, column, top_k = self._inputs[:4].split(1)
        temperature, top_p, min_p = self._inputs[4:7].view(torch.float32).split(1)
        self._slot, seed = self._inputs[8:12].view(torch.int64).split(1)
        if tokens_of_slots is None:
            tokens_of_slots = torch.zeros(cache.slots, dtype=torch.int32, device=device)
        self._tokens_of_slots = tokens_of_slots
        chosen, token = torch.zeros((2, 1), dtype=torch.int32, device=device)
        self._row = RowBuffers(token, position, column, top_k, temperature, top_p, min_p, seed, chosen, self._history)
        self._plans: dict[int, Any] = {}

    def sizes(self) -> list[int]:
        return [size for size in reversed(BUCKETS) if size <= self.cache.capacity]

    def _fill_idle(self, size: int) -> None:
        (slot,) = self.cache.idle_slots(1, ())
        self._send([0] * size, TokenSpan(size, slot, 0), _GREEDY, 0)

    def takes(self, span: TokenSpan) -> bool:
        """Whether the span fits a bucket that ends within the cache."""
        size = self._bucket(span.count)
        return size is not None and span.position + size <= self.cache.capacity

    @staticmethod
    def _bucket(count: int) -> int | None:
        return next((size for size in BUCKETS if 0 < count <= size), None)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], span: TokenSpan) -> Tensor:
        """Logits [1, V] after the last of `tokens`, which `span` describes; good until the next call.

        Raises:
            ValueError: A span that `takes` refuses, or another number of tokens.
        """
        return self._replay(self._send(tokens, span, _GREEDY, 0), "none")

    @torch.inference_mode()
    def enqueue(self, tokens: Sequence[int], span: TokenSpan, params: SamplingParams, seed: int) -> None:
        """Enqueue the same and the choice of the token after them, which `wait` gives; at most AHEAD before a `wait`.

        Raises:
            ValueError: As `forward`.
        """
        size = self._send(tokens, span, params, seed)
        self._replay(size, "greedy" if params.temperature == 0 else "sample")
        self._record(self._column, rows=1)
        self._move(1)

    def _send(self, tokens: Sequence[int], span: TokenSpan, params: SamplingParams, seed: int) -> int:
        """Send what the next pass reads to the device; the bucket's size."""
        size = self._bucket(span.count)
        if size is None or not self.takes(span) or len(tokens) != span.count:
            raise ValueError(
                f"{len(tokens)} tokens as {span}; 1 to {BUCKETS[-1]} within {self.cache.capacity} positions"
            )
        # From pinned memory, which torch keeps until it is copied, the copy does not wait for passes on their way.
        sent = torch.zeros(HEAD + 3 * size, dtype=torch.int32, pin_memory=self._on_gpu)
        words = sent.numpy()
        _HEAD.pack_into(
            words.data, 0, span.count - 1, span.position + span.count, self._column, params.top_k, params.temperature,
            params.top_p, params.min_p, span.slot, seed,
        )  # fmt: skip
        words[HEAD : HEAD + span.count] = tokens
        words[HEAD + size : HEAD + 2 * size] = span.slot
        words[HEAD + 2 * size :] = np.arange(span.position, span.position + size)
        self._inputs[: len(words)].copy_(sent, non_blocking=True)
        if size not in self._plans:
            # Its memory serves runs at all positions.
            self._plans[size] = self.model.plan([TokenSpan(size, span.slot, self.cache.capacity - size)])
        self._plans[size] = self.model.plan([span._replace(count=size)], into=self._plans[size])
        return size

    def _forward(self, size: int) -> Tensor:
        packed = self._inputs[HEAD : HEAD + 3 * size].view(3, size)
        batch = Batch(*packed, logits_at=self._last, plan=self._plans[size])
        return self.model.forward(batch, self.cache)

    def _rows(self, size: int) -> RowBuffers:
        return self._row

    def _sampled_positions(self, rows: RowBuffers) -> Tensor:
        return rows.positions

    def _advance(self, rows: RowBuffers) -> None:
        super()._advance(rows)
        self._tokens_of_slots.index_copy_(0, self._slot, rows.tokens)
