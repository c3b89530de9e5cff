"""Short prompts as CUDA graphs: one sequence's tokens, filled up to a bucket, in one launch of the host.

A prompt of a hundred tokens is computed sooner than the host can launch its kernels one by one. The tokens that fill a
bucket up come after the prompt's: no token of it looks at them, and what they leave in the cache lies at positions that
are written again before anything reads them. (On a paged cache's spare page, that is by the pass that reads them.)
The choice of the next token is part of the graph, which writes it to the host's memory as a decode step does. Without a
graph, and on a CPU, the same function runs as it is, to the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.ops.batch import Batch, TokenSpan
from engine.runtime.cuda_graph import capture, new_pool
from engine.runtime.decode_loop import CHOICES
from engine.sampling_params import SamplingParams

BUCKETS = (16, 32, 64, 128, 256)
HEAD = 16  # 32-bit words that a pass is told ahead of its tokens
# Row of the last token, position and column of the token to choose, top_k; temperature, top_p, min_p; slot, seed.
_HEAD = Struct("4i3f4x2q")
AHEAD = 2  # passes enqueued and not waited for, at most
_GREEDY = SamplingParams(temperature=0.0)


class PromptLoop:
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
        device = model.weights.device
        self._on_gpu = device.type == "cuda"
        self._pool = new_pool(device) if graph else None
        self.model, self.cache, self.graph = model, cache, graph
        self.logits: Tensor | None = None  # [1, V] of the pass enqueued last
        # One copy from the host: the head, then the tokens, their slots and their positions.
        self._sent = torch.zeros(HEAD + 3 * BUCKETS[-1], dtype=torch.int32, device=device)
        self._last, self._position, self._column_at, self._top_k = self._sent[:4].split(1)
        self._temperature, self._top_p, self._min_p = self._sent[4:7].view(torch.float32).split(1)
        self._slot, self._seed = self._sent[8:12].view(torch.int64).split(1)
        if tokens_of_slots is None:
            tokens_of_slots = torch.zeros(cache.slots, dtype=torch.int32, device=device)
        self._tokens_of_slots = tokens_of_slots
        self._chosen, self._token = torch.zeros((2, 1), dtype=torch.int32, device=device)
        self._history = torch.zeros((1, AHEAD), dtype=torch.int32, pin_memory=self._on_gpu)  # passes in turn
        self._column = 0  # of the next pass
        self._pending: deque[tuple[int, Any]] = deque()  # column and event of passes not waited for
        self._plans: dict[int, Any] = {}
        self._graphs: dict[tuple[int, str], tuple[Any, Tensor]] = {}
        self.late_graphs = 0  # captured by a pass that needed one

    def graphs(self) -> list[tuple[int, str]]:
        """Tokens and choice of every graph that a pass can need, the largest first."""
        sizes = [size for size in reversed(BUCKETS) if size <= self.cache.capacity]
        return [(size, choice) for size in sizes for choice in CHOICES]

    @torch.inference_mode()
    def capture_idle(self, size: int, choice: str) -> None:
        """Capture a pass over `size` tokens of a sequence that is not there, which serves any."""
        (slot,) = self.cache.idle_slots(1, ())
        self._send([0] * size, TokenSpan(size, slot, 0), _GREEDY, 0)
        self._capture(size, choice)

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
        return self._run(self._send(tokens, span, _GREEDY, 0), "none")

    @torch.inference_mode()
    def enqueue(self, tokens: Sequence[int], span: TokenSpan, params: SamplingParams, seed: int) -> None:
        """The same, and the choice of the token after them; `wait` gives it. At most AHEAD passes before a `wait`.

        Raises:
            ValueError: As `forward`.
        """
        assert len(self._pending) < AHEAD
        size = self._send(tokens, span, params, seed)
        self.logits = self._run(size, "greedy" if params.temperature == 0 else "sample")
        event = torch.cuda.current_stream().record_event() if self._on_gpu else None
        self._pending.append((self._column, event))
        self._column = (self._column + 1) % AHEAD

    def wait(self) -> list[int]:
        """The token that the first pass not waited for yet has chosen; -1 where every logit was NaN."""
        column, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return self._history.numpy()[:, column].tolist()

    def _send(self, tokens: Sequence[int], span: TokenSpan, params: SamplingParams, seed: int) -> int:
        """Let the device know what the next pass is about; the bucket's size."""
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
        self._sent[: len(words)].copy_(sent, non_blocking=True)
        if size not in self._plans:
            # Its memory serves runs at all positions.
            self._plans[size] = self.model.plan([TokenSpan(size, span.slot, self.cache.capacity - size)])
        self._plans[size] = self.model.plan([span._replace(count=size)], into=self._plans[size])
        return size

    def _run(self, size: int, choice: str) -> Tensor:
        if not self.graph:
            return self._pass(size, choice)
        if (size, choice) not in self._graphs:
            self._capture(size, choice)
            self.late_graphs += 1
        graph, logits = self._graphs[size, choice]
        graph.replay()
        return logits

    def _capture(self, size: int, choice: str) -> None:
        # Memory is taken in a run of its own; what the graph was told is then put back.
        before = self._sent.clone()
        self._pass(size, choice)
        self._sent.copy_(before)
        self._graphs[size, choice] = capture(lambda: self._pass(size, choice), self._pool)

    def _pass(self, size: int, choice: str) -> Tensor:
        """One pass over a bucket of `size` tokens; its logits. choice: "none" ends with them."""
        ops = self.model.ops
        packed = self._sent[HEAD : HEAD + 3 * size].view(3, size)
        batch = Batch(*packed, logits_at=self._last, plan=self._plans[size])
        logits = self.model.forward(batch, self.cache)
        if choice == "none":
            return logits
        if choice == "greedy":
            ops.argmax(logits, out=self._chosen)
        else:
            ops.sample(
                logits, self._temperature, self._top_k, self._top_p, self._min_p, self._seed, self._position,
                out=self._chosen,
            )  # fmt: skip
        ops.advance(self._chosen, self._token, self._position, self._column_at, self._history)
        self._tokens_of_slots.index_copy_(0, self._slot, self._token)
        return logits
