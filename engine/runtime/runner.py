"""Runner: the scheduler's steps on the device, without a wait for it: a step's tokens are asked for when the next one
is on its way.

Steps that are nothing but decoding run in the decode loop, one short prompt alone in the prompt loop, and all others as
one forward pass over a packed list of tokens. The token that each slot chose last stays on the device, where
the next step takes it from.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from engine.model.kv_cache import KVCache, PagedCache
from engine.model.transformer import Model
from engine.ops.batch import Batch, TokenSpan
from engine.runtime.decode_loop import DecodeLoop, DecodeRow
from engine.runtime.progress import progress
from engine.runtime.prompt_loop import PromptLoop
from engine.runtime.request import Request, TokenLogprobs
from engine.runtime.sampler import PendingLogprobs, sample, send_logprobs, to_device, to_host
from engine.scheduler.sequence import ScheduledChunk, Sequence, Step

Observe = Callable[[list[Request], Tensor], None]


class StepResult(NamedTuple):
    """Tokens that a step chose for a request, one or more unless logits were NaN."""

    request: Request
    tokens: list[int]  # in order
    logprobs: list[TokenLogprobs]  # of each of them, where asked for
    nan_after: int | None = None  # so many of its tokens the logits followed that were all NaN


@dataclass
class _PendingStep:
    """Step on its way, and where its results will be."""

    requests: list[Request]  # that choose tokens
    wait: Callable[[], list[list[int]]] = list  # those they have chosen, once the step has ended; -1 for NaN
    logprobs: PendingLogprobs | None = None
    reported: list[int] = field(default_factory=list)  # which of the requests asked for them
    prompt: PendingLogprobs | None = None  # log probabilities of prompts' tokens
    prompt_places: list[tuple[Request, int]] = field(default_factory=list)  # their requests and positions


class Runner:
    """Steps over one cache.

    Args:
        model: The model.
        cache: Its cache, with a slot for each that the scheduler may give, and those that the decode loop needs beside.
        loops: Whether to use the decode loop and the prompt loop.
        graph: Whether these capture CUDA graphs.

    `observe`, where it is set, is called with the requests that a step chooses tokens for and the logits [n, V] that it
    chooses them by, which are good until the next step.
    """

    def __init__(self, model: Model, cache: KVCache, loops: bool, graph: bool) -> None:
        device = model.weights.device
        self.model, self.cache = model, cache
        self.observe: Observe | None = None
        self._tokens = torch.zeros(cache.slots + 1, dtype=torch.int32, device=device)  # that slots chose last
        self._decode_loop = DecodeLoop(model, cache, graph) if loops else None
        self._prompt_loop = PromptLoop(model, cache, graph, self._tokens) if loops else None
        self._decoding: list[Request] = []  # requests in the current decode batch, as its rows are
        self._batch: list[Sequence] = []  # the same, in the order of the steps
        # Slot → sequence whose pages its row of the table holds, since which preemption, and how many.
        self._assigned: dict[int, tuple[Sequence, int, int]] = {}
        self._pending: deque[_PendingStep] = deque()

    def capture(self) -> None:
        """Capture every graph that a step can need, which is shown; the slots of the cache must be idle."""
        loops = [loop for loop in (self._decode_loop, self._prompt_loop) if loop and loop.graph]
        graphs = [(loop, *graph) for loop in loops for graph in loop.graphs()]
        if not graphs:
            return
        with progress("capturing CUDA graphs", len(graphs)) as show:
            for loop, size, sampler in graphs:
                loop.capture_idle(size, sampler)
                show(f"{size} rows, {sampler}" if loop is self._decode_loop else f"prompt of {size}, {sampler}")

    @property
    def late_graphs(self) -> int:
        """Graphs captured by a step that needed one, which `capture` should have captured."""
        return sum(loop.late_graphs for loop in (self._decode_loop, self._prompt_loop) if loop)

    @property
    def pending(self) -> int:
        """Steps that are enqueued and not waited for."""
        return len(self._pending)

    @torch.inference_mode()
    def enqueue(self, step: Step) -> None:
        """Let the device compute `step`, after all earlier ones."""
        if isinstance(self.cache, PagedCache):
            if step.copies:
                self.cache.copy_pages(step.copies)
            self._assign(self.cache, step.chunks)
        if self._decode_loop and step.decodes == len(step.chunks):
            self._pending.append(self._decode(self._decode_loop, step.chunks))
        else:
            self._leave_decode_loop()
            self._pending.append(self._prompt(step) or self._pass(step))

    def wait(self) -> list[StepResult]:
        """Results of the first step that is not waited for, when it has ended."""
        pending = self._pending.popleft()
        chosen = pending.wait()
        unusable = []
        for row, (request, place) in enumerate(pending.prompt_places):
            assert pending.prompt is not None
            most = request.params.prompt_logprobs
            scored = pending.prompt.of(row, request.tokens[place], most or 0)
            request.prompt_logprobs[place] = scored
            if math.isnan(scored.logprob):
                unusable.append(StepResult(request, [], [], nan_after=place))
        results = []
        for request, tokens in zip(pending.requests, chosen, strict=True):
            nan_after = None
            if tokens[-1] < 0:
                tokens = tokens[:-1]
                nan_after = len(request.tokens) + len(tokens)
            results.append(StepResult(request, tokens, [], nan_after))
        for row, index in enumerate(pending.reported):
            assert pending.logprobs is not None
            request, tokens, logprobs, _ = results[index]
            most = request.params.logprobs
            logprobs += [pending.logprobs.of(row, token, most or 0) for token in tokens]
        return unusable + results

    def _assign(self, cache: PagedCache, chunks: list[ScheduledChunk]) -> None:
        """Let the table hold the pages of the chunks' sequences."""
        changed = {}
        for sequence, *_ in chunks:
            held = sequence, sequence.preemptions, len(sequence.pages)
            if self._assigned.get(sequence.slot) != held:
                self._assigned[sequence.slot] = held
                changed[sequence.slot] = sequence.pages
        if changed:
            cache.assign(changed)

    def _leave_decode_loop(self) -> None:
        """Keep the decode loop's tokens for the sequences that go on."""
        if self._decode_loop and any(request.finish_reason is None for request in self._decoding):
            self._decode_loop.keep_tokens(self._tokens)
        self._decoding, self._batch = [], []

    def _decode(self, loop: DecodeLoop, chunks: list[ScheduledChunk]) -> _PendingStep:
        """One step of the decode loop."""
        batch = [chunk.sequence for chunk in chunks]
        if batch != self._batch:
            self._leave_decode_loop()
            # The longest first: their attention takes longest, and no block should be the last one at work.
            chunks = sorted(chunks, key=lambda chunk: -chunk.begin)
            requests = [cast(Request, chunk.sequence) for chunk in chunks]
            pairs = zip(requests, chunks, strict=True)
            rows = [DecodeRow(r.slot, None, chunk.begin, r.params, r.seed) for r, chunk in pairs]
            loop.start(rows, self._tokens)
            self._decoding, self._batch = requests, batch
        pending = _PendingStep(self._decoding, loop.wait)
        if all(request.plain for request in pending.requests):
            loop.enqueue()
            self._show(pending.requests, loop.logits)
        else:
            loop.enqueue(lambda logits, out: self._sample(pending, logits, out))
        return pending

    def _show(self, requests: list[Request], logits: Tensor | None) -> None:
        if self.observe is not None and logits is not None:
            self.observe(requests, logits[: len(requests)])

    def _sample(self, pending: _PendingStep, logits: Tensor, out: Tensor) -> None:
        """Choose the requests' tokens by their logits [n, V] into `out`, and send what was asked for about them."""
        self._show(pending.requests, logits)
        sample(self.model.ops, pending.requests, logits, out)
        asked = [r.params.logprobs for r in pending.requests]
        pending.reported = [index for index, count in enumerate(asked) if count is not None]
        if pending.reported:
            rows = to_device(pending.reported, logits, torch.int64)
            most = max(count for count in asked if count is not None)
            pending.logprobs = send_logprobs(logits.index_select(0, rows), out.index_select(0, rows), most)

    def _prompt(self, step: Step) -> _PendingStep | None:
        """One short prompt, or the end of one, alone, in the prompt loop; None where the step is something else."""
        loop, (sequence, begin, count, samples) = self._prompt_loop, step.chunks[0]
        request, span = cast(Request, sequence), TokenSpan(count, sequence.slot, begin)
        if not (loop and len(step.chunks) == 1 and samples and loop.takes(span)):
            return None
        if request.params.prompt_logprobs is not None:
            return None
        tokens = request.tokens[begin : begin + count]
        if request.plain:
            loop.enqueue(tokens, span, request.params, request.seed)
            self._show([request], loop.logits)
            return _PendingStep([request], loop.wait)
        pending = _PendingStep([request])
        self._take(pending, loop.forward(tokens, span))
        return pending

    def _pass(self, step: Step) -> _PendingStep:
        """One forward pass over all of the step's tokens."""
        pending = _PendingStep([])
        packed, ready, scored = self._pack(step, pending)
        sent = packed.to(self._tokens.device, non_blocking=True)
        if step.decodes:
            sent[0, : step.decodes] = self._tokens.index_select(0, sent[1, : step.decodes])
        rows = to_device([*ready, *scored], self._tokens, torch.int32)
        spans = [TokenSpan(count, sequence.slot, begin) for sequence, begin, count, _ in step.chunks]
        batch = Batch(*sent, logits_at=rows, spans=spans, decodes=step.decodes)
        logits = self.model.forward(batch, self.cache)
        if scored:
            known = to_device([r.tokens[place] for r, place in pending.prompt_places], logits, torch.int32)
            most = max(r.params.prompt_logprobs or 0 for r, _ in pending.prompt_places)
            pending.prompt = send_logprobs(logits[len(ready) :], known, most)
        self._take(pending, logits[: len(ready)])
        return pending

    def _pack(self, step: Step, pending: _PendingStep) -> tuple[Tensor, list[int], list[int]]:
        """Tokens, slots and positions of the step, int32 [3, T], and the rows of these whose logits are wanted: the
        last one of each request that chooses a token, and those that say how likely a prompt's next token was."""
        ready: list[int] = []
        scored: list[int] = []
        packed = torch.zeros((3, step.tokens), dtype=torch.int32, pin_memory=self._tokens.is_cuda)
        tokens, slots, positions = packed.numpy()
        # Tokens that decode are taken from the device: the host may not know them yet.
        slots[: step.decodes] = [chunk.sequence.slot for chunk in step.chunks[: step.decodes]]
        positions[: step.decodes] = [chunk.begin for chunk in step.chunks[: step.decodes]]
        end = 0
        for number, (sequence, begin, count, samples) in enumerate(step.chunks):
            request, first, end = cast(Request, sequence), end, end + count
            if number >= step.decodes:
                tokens[first:end] = request.tokens[begin : begin + count]
                slots[first:end] = request.slot
                positions[first:end] = np.arange(begin, begin + count)
                if request.params.prompt_logprobs is not None:
                    for place in range(begin + 1, min(begin + count + 1, request.prompt_length)):
                        scored.append(first + place - 1 - begin)
                        pending.prompt_places.append((request, place))
            if samples:
                pending.requests.append(request)
                ready.append(end - 1)
        return packed, ready, scored

    def _take(self, pending: _PendingStep, logits: Tensor) -> None:
        """Choose the requests' tokens by their logits [n, V], keep them for the next step, and send them to the host
        as the last thing of the step."""
        chosen = torch.zeros(len(pending.requests), dtype=torch.int32, device=logits.device)
        if pending.requests:
            self._sample(pending, logits, chosen)
            places = to_device([request.slot for request in pending.requests], self._tokens, torch.int64)
            self._tokens[places] = chosen.clamp(min=0)
        tokens = to_host(chosen)
        event = torch.cuda.current_stream().record_event() if chosen.is_cuda else None

        def wait() -> list[list[int]]:
            if event is not None:
                event.synchronize()
            return tokens[:, None].tolist()

        pending.wait = wait
