"""Runs the scheduler's steps on the device, without waiting for it: a step's tokens are asked for when the next one is
on its way.

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
from engine.runtime.decode_loop import DecodeLoop, Row
from engine.runtime.progress import progress
from engine.runtime.prompt_loop import PromptLoop
from engine.runtime.request import Request, TokenLogprobs
from engine.runtime.sampler import Sent, choose, send_logprobs, to_device, to_host
from engine.scheduler.scheduler import Sequence, Step, Work


class Result(NamedTuple):
    """What a request's part of a step led to."""

    request: Request
    token: int  # chosen; -1 where every logit was NaN, be it one that a token of the prompt was to be scored by
    logprobs: TokenLogprobs | None
    after: int  # how many of its tokens those logits followed


@dataclass
class _Pending:
    """A step on its way, and where its results will be."""

    requests: list[Request]  # that choose a token
    wait: Callable[[], list[int]] = list  # what they have chosen, once the step has ended
    logprobs: Sent | None = None
    reported: list[int] = field(default_factory=list)  # which of the requests asked for them
    prompt: Sent | None = None  # log probabilities of prompts' tokens
    prompt_places: list[tuple[Request, int]] = field(default_factory=list)  # and whose they are


class Runner:
    """Steps over one cache.

    Args:
        model: The model.
        cache: Its cache, with a slot for each that the scheduler may give, and those that the decode loop needs beside.
        loops: Whether to use the decode loop and the prompt loop.
        graph: Whether these capture CUDA graphs.
    """

    def __init__(self, model: Model, cache: KVCache, loops: bool, graph: bool) -> None:
        device = model.weights.device
        self.model, self.cache = model, cache
        self._tokens = torch.zeros(cache.slots + 1, dtype=torch.int32, device=device)  # that slots chose last
        self._loop = DecodeLoop(model, cache, graph) if loops else None
        self._prompts = PromptLoop(model, cache, graph, self._tokens) if loops else None
        # Whose steps the decode loop is in the middle of: as its rows are, and as steps name them.
        self._decoding: list[Request] = []
        self._stepped: list[Sequence] = []
        # Of each slot, whose pages the table holds, since which preemption, and how many.
        self._assigned: dict[int, tuple[Sequence, int, int]] = {}
        self._pending: deque[_Pending] = deque()

    def capture(self) -> None:
        """Capture every graph that a step can need, which is shown; the slots of the cache must be idle."""
        loops = [loop for loop in (self._loop, self._prompts) if loop and loop.graph]
        graphs = [(loop, *graph) for loop in loops for graph in loop.graphs()]
        if not graphs:
            return
        with progress("capturing CUDA graphs", len(graphs)) as show:
            for loop, size, choice in graphs:
                loop.capture_idle(size, choice)
                show(f"{size} rows, {choice}" if loop is self._loop else f"prompt of {size}, {choice}")

    @property
    def late_graphs(self) -> int:
        """Graphs captured by a step that needed one, which `capture` should have captured."""
        return sum(loop.late_graphs for loop in (self._loop, self._prompts) if loop)

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
            self._assign(self.cache, step.work)
        if self._loop and step.decodes == len(step.work):
            self._pending.append(self._decode(self._loop, step.work))
        else:
            self._leave_loop()
            self._pending.append(self._pass(step))

    def wait(self) -> list[Result]:
        """What the first step that is not waited for has led to, when it has ended."""
        pending = self._pending.popleft()
        tokens = pending.wait()
        unusable = []
        for row, (request, place) in enumerate(pending.prompt_places):
            assert pending.prompt is not None
            most = request.params.prompt_logprobs
            scored = pending.prompt.of(row, request.tokens[place], most or 0)
            request.prompt_logprobs[place] = scored
            if math.isnan(scored.logprob):
                unusable.append(Result(request, -1, None, place))
        pairs = zip(pending.requests, tokens, strict=True)
        results = [Result(request, token, None, len(request.tokens)) for request, token in pairs]
        for row, index in enumerate(pending.reported):
            assert pending.logprobs is not None
            result = results[index]
            if result.token >= 0:
                logprobs = pending.logprobs.of(row, result.token, result.request.params.logprobs or 0)
                results[index] = result._replace(logprobs=logprobs)
        return unusable + results

    def _assign(self, cache: PagedCache, work: list[Work]) -> None:
        changed = {}
        for sequence, *_ in work:
            held = sequence, sequence.preemptions, len(sequence.pages)
            if self._assigned.get(sequence.slot) != held:
                self._assigned[sequence.slot] = held
                changed[sequence.slot] = sequence.pages
        if changed:
            cache.assign(changed)

    def _leave_loop(self) -> None:
        """Keep the decode loop's tokens for the sequences that go on."""
        if self._loop and any(request.finish_reason is None for request in self._decoding):
            self._loop.keep_tokens(self._tokens)
        self._decoding, self._stepped = [], []

    def _decode(self, loop: DecodeLoop, work: list[Work]) -> _Pending:
        stepped = [part.sequence for part in work]
        if stepped != self._stepped:
            self._leave_loop()
            # The longest first: their attention takes longest, and no block should be the last one at work.
            work = sorted(work, key=lambda part: -part.begin)
            requests = [cast(Request, part.sequence) for part in work]
            rows = [Row(r.slot, None, part.begin, r.params, r.seed) for r, part in zip(requests, work, strict=True)]
            loop.start(rows, self._tokens)
            self._decoding, self._stepped = requests, stepped
        pending = _Pending(self._decoding, loop.wait)
        if all(request.plain for request in pending.requests):
            loop.enqueue()
        else:
            loop.enqueue(lambda logits, out: self._choose(pending, logits, out))
        return pending

    def _choose(self, pending: _Pending, logits: Tensor, out: Tensor) -> None:
        """Choose the requests' tokens by their logits [n, V] into `out`, and send what was asked for about them."""
        choose(self.model.ops, pending.requests, logits, out)
        asked = [r.params.logprobs for r in pending.requests]
        pending.reported = [index for index, count in enumerate(asked) if count is not None]
        if pending.reported:
            rows = to_device(pending.reported, logits, torch.int64)
            most = max(count for count in asked if count is not None)
            pending.logprobs = send_logprobs(logits.index_select(0, rows), out.index_select(0, rows), most)

    def _pass(self, step: Step) -> _Pending:
        """One forward pass over all of the step's tokens."""
        spans = [TokenSpan(count, sequence.slot, begin) for sequence, begin, count, _ in step.work]
        if self._prompts and len(spans) == 1 and step.work[0].samples and self._prompts.takes(spans[0]):
            request = cast(Request, step.work[0].sequence)
            if request.params.prompt_logprobs is None:
                return self._prompt(self._prompts, request, spans[0])
        pending = _Pending([])
        ready: list[int] = []  # the row of the last token of each request that chooses one
        scored: list[int] = []  # rows whose logits say how likely a prompt's next token was
        packed = torch.zeros((3, step.tokens), dtype=torch.int32, pin_memory=self._tokens.is_cuda)
        tokens, slots, positions = packed.numpy()
        # Tokens that decode are taken from the device: the host may not know them yet.
        slots[: step.decodes] = [span.slot for span in spans[: step.decodes]]
        positions[: step.decodes] = [span.position for span in spans[: step.decodes]]
        end = 0
        for number, (sequence, begin, count, samples) in enumerate(step.work):
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
        sent = packed.to(self._tokens.device, non_blocking=True)
        if step.decodes:
            sent[0, : step.decodes] = self._tokens.index_select(0, sent[1, : step.decodes])
        rows = to_device([*ready, *scored], self._tokens, torch.int32)
        batch = Batch(*sent, logits_at=rows, spans=spans, decodes=step.decodes)
        logits = self.model.forward(batch, self.cache)
        if scored:
            known = to_device([r.tokens[place] for r, place in pending.prompt_places], logits, torch.int32)
            most = max(r.params.prompt_logprobs or 0 for r, _ in pending.prompt_places)
            pending.prompt = send_logprobs(logits[len(ready) :], known, most)
        self._take(pending, logits[: len(ready)])
        return pending

    def _prompt(self, loop: PromptLoop, request: Request, span: TokenSpan) -> _Pending:
        """One short prompt, or the end of one, alone."""
        tokens = request.tokens[span.position : span.position + span.count]
        if request.plain:
            loop.enqueue(tokens, span, request.params, request.seed)
            return _Pending([request], loop.wait)
        pending = _Pending([request])
        self._take(pending, loop.forward(tokens, span))
        return pending

    def _take(self, pending: _Pending, logits: Tensor) -> None:
        """Choose the requests' tokens by their logits [n, V], keep them for the next step, and send them to the host
        as the last thing of the step."""
        chosen = torch.zeros(len(pending.requests), dtype=torch.int32, device=logits.device)
        if pending.requests:
            self._choose(pending, logits, chosen)
            places = to_device([request.slot for request in pending.requests], self._tokens, torch.int64)
            self._tokens[places] = chosen.clamp(min=0)
        tokens = to_host(chosen)
        event = torch.cuda.current_stream().record_event() if chosen.is_cuda else None

        def wait() -> list[int]:
            if event is not None:
                event.synchronize()
            return tokens.tolist()

        pending.wait = wait
