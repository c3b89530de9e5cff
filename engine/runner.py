"""Runs the scheduler's steps on the device, without waiting for it: a step's tokens are asked for when the next one is
on its way.

Steps that are nothing but decoding run in `engine.decode_loop`, one short prompt alone in `engine.prompt_loop`, and all
others as one forward pass over a packed list of tokens. The token that each slot chose last stays on the device, where
the next step takes it from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from engine.choice import Sent, choose, send_logprobs, to_device, to_host
from engine.decode_loop import DecodeLoop, Row
from engine.kv_cache import KVCache, PagedCache
from engine.model import Model
from engine.ops import Run
from engine.prompt_loop import PromptLoop
from engine.requests import Request, TokenLogprobs
from engine.scheduler import Step, Work


class Result(NamedTuple):
    """What a request's part of a step led to."""

    request: Request
    token: int  # chosen; -1 where every logit was NaN
    logprobs: TokenLogprobs | None


@dataclass
class _Pending:
    """A step on its way, and where its results will be."""

    requests: list[Request]  # that choose a token
    tokens: Tensor | None = None  # int32 [n] in the host's memory; None: the decode loop's
    event: torch.cuda.Event | None = None
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
        self._loop = DecodeLoop(model, cache, graph) if loops else None
        self._prompts = PromptLoop(model, cache, graph) if loops else None
        self._decoding: list[Request] = []  # whose steps the decode loop is in the middle of
        self._tokens = torch.zeros(cache.slots + 1, dtype=torch.int32, device=device)  # that slots chose last
        # Of each slot, whose pages the table holds, since which preemption, and how many.
        self._assigned: dict[int, tuple[Request, int, int]] = {}
        self._pending: deque[_Pending] = deque()

    @property
    def pending(self) -> int:
        """Steps that are enqueued and not waited for."""
        return len(self._pending)

    @torch.inference_mode()
    def enqueue(self, step: Step) -> None:
        """Let the device compute `step`, after all earlier ones."""
        if isinstance(self.cache, PagedCache):
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
        if pending.tokens is None:
            assert self._loop
            tokens = self._loop.wait()
        else:
            if pending.event:
                pending.event.synchronize()
            tokens = pending.tokens.tolist()
        for row, (request, place) in enumerate(pending.prompt_places):
            assert pending.prompt is not None
            most = request.params.prompt_logprobs
            request.prompt_logprobs[place] = pending.prompt.of(row, request.tokens[place], most or 0)
        results = [Result(request, token, None) for request, token in zip(pending.requests, tokens, strict=True)]
        for row, index in enumerate(pending.reported):
            assert pending.logprobs is not None
            request, token, _ = results[index]
            if token >= 0:
                logprobs = pending.logprobs.of(row, token, request.params.logprobs or 0)
                results[index] = Result(request, token, logprobs)
        return results

    def _assign(self, cache: PagedCache, work: Sequence[Work]) -> None:
        changed = {}
        for part in work:
            request = cast(Request, part.sequence)
            held = request, request.preemptions, len(request.pages)
            if self._assigned.get(request.slot) != held:
                self._assigned[request.slot] = held
                changed[request.slot] = request.pages
        if changed:
            cache.assign(changed)

    def _leave_loop(self) -> None:
        if self._loop and self._decoding:
            self._loop.keep_tokens(self._tokens)
            self._decoding = []

    def _decode(self, loop: DecodeLoop, work: Sequence[Work]) -> _Pending:
        # The longest first: their attention takes longest, and no block should be the last one at work.
        work = sorted(work, key=lambda part: -part.begin)
        requests = [cast(Request, part.sequence) for part in work]
        if requests != self._decoding:
            self._leave_loop()
            rows = [Row(r.slot, None, part.begin, r.params, r.seed) for r, part in zip(requests, work, strict=True)]
            loop.start(rows, self._tokens)
            self._decoding = requests
        pending = _Pending(requests)
        if any(r.params.adjusts_logits or r.params.logprobs is not None for r in requests):
            loop.enqueue(lambda logits, out: self._choose(pending, logits, out))
        else:
            loop.enqueue()
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
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        runs: list[Run] = []
        ready: list[int] = []  # the row of the last token of each request that chooses one
        pending = _Pending([])
        scored: list[int] = []  # rows whose logits say how likely a prompt's next token was
        for number, (sequence, begin, count, samples) in enumerate(step.work):
            request = cast(Request, sequence)
            # Tokens that decode are taken from the device: the host may not know them yet.
            tokens += [0] if number < step.decodes else request.tokens[begin : begin + count]
            if request.params.prompt_logprobs is not None and number >= step.decodes:
                for place in range(begin + 1, min(begin + count + 1, request.prompt_length)):
                    scored.append(len(slots) + place - 1 - begin)
                    pending.prompt_places.append((request, place))
            slots += [request.slot] * count
            positions += range(begin, begin + count)
            runs.append(Run(count, request.slot, begin))
            if samples:
                pending.requests.append(request)
                ready.append(len(slots) - 1)
        if self._prompts and ready and not scored and len(runs) == 1 and self._prompts.takes(runs[0]):
            logits = self._prompts.forward(tokens, runs[0])
        else:
            packed = to_device([tokens, slots, positions], self._tokens, torch.int32)
            if step.decodes:
                own = packed[1, : step.decodes]
                packed[0, : step.decodes] = self._tokens.index_select(0, own)
            rows = to_device([*ready, *scored], self._tokens, torch.int32)
            logits = self.model.forward(
                packed[0], packed[1], packed[2], self.cache, logits_at=rows, runs=runs, decodes=step.decodes
            )
        chosen = torch.zeros(len(ready), dtype=torch.int32, device=logits.device)
        if ready:
            self._choose(pending, logits[: len(ready)], chosen)
            places = to_device([request.slot for request in pending.requests], self._tokens, torch.int64)
            self._tokens[places] = chosen.clamp(min=0)
        if scored:
            known = to_device([r.tokens[place] for r, place in pending.prompt_places], logits, torch.int32)
            most = max(r.params.prompt_logprobs or 0 for r, _ in pending.prompt_places)
            pending.prompt = send_logprobs(logits[len(ready) :], known, most)
        pending.tokens = to_host(chosen)
        if chosen.is_cuda:
            event = pending.event = torch.cuda.Event()
            event.record()
        return pending
