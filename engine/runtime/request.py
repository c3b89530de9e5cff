"""Requests of the engine, updates and completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from torch import Tensor

from engine.sampling_params import SamplingParams
from engine.scheduler.sequence import Sequence
from engine.text.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model gives at one place, before any sampling setting."""

    token: int
    logprob: float
    rank: int  # of the token: 1 is the most likely
    top: list[tuple[int, float]]  # the most likely tokens, as many as were asked for


@dataclass(frozen=True)
class Completion:
    """Result of one prompt. Times are from the request's entry into the engine: tokenisation out, sampling in."""

    prompt_token_ids: list[int]
    token_ids: list[int]  # with the token that ended it, if one did
    text: str  # without what ended it and without special tokens; empty when the engine has no tokenizer
    finish_reason: FinishReason
    ttft_ms: float  # until the first token; until the end where there is none
    itl_ms: list[float]  # between one token and the next
    e2e_ms: float  # until the last token
    index: int = 0  # which of the prompt's n completions
    stop: str | int | None = None  # the stop string or token that ended it
    logprobs: list[TokenLogprobs] | None = None  # of token_ids, where asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of prompt_token_ids; None for the first one
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    error: str | None = None  # what went wrong, where finish_reason is "error"


@dataclass(frozen=True)
class Update:
    """Text and tokens that a completion got since the update before."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    completion: Completion | None  # in its last update


@dataclass(eq=False, kw_only=True)
class Request(Sequence):
    """A sequence with what its sampling and its end depend on. The fields below `index` are the engine's."""

    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]  # tokens that end it
    entered: float  # seconds of time.perf_counter
    index: int = 0

    times: list[float] = field(default_factory=list, init=False, repr=False)  # of the generated tokens
    logprobs: list[TokenLogprobs] = field(default_factory=list, init=False, repr=False)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list, init=False, repr=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: str | None = field(default=None, init=False)
    begun: bool = field(default=False, init=False)  # a step has had a part of it
    cached_tokens: int = field(default=0, init=False)
    # int32 [2, V], only where logits are adjusted: which tokens the prompt has, and how often each was generated
    counts: Tensor | None = field(default=None, init=False, repr=False)
    # Whether its tokens are chosen by temperature and filters alone, and nothing else is asked for about them.
    plain: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plain = not self.params.adjusts_logits and self.params.logprobs is None

    @property
    def generated(self) -> list[int]:
        return self.generated_from(0)

    def generated_from(self, begin: int) -> list[int]:
        """Generated tokens but for the first `begin`: no copy of those."""
        return self.tokens[self.prompt_length + begin :]

    def find_end(self, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """Number of the next `tokens` that belong to it, and why it ends with the last of these, if it does."""
        before = len(self.tokens) - self.prompt_length
        for count, token in enumerate(tokens, 1):
            if token in self.stop_ids and before + count >= self.params.min_tokens:
                return count, "stop"
            if before + count >= self.params.max_new_tokens:
                return count, "length"
        return len(tokens), None


def completion(request: Request, text: Detokenizer) -> Completion:
    """Completion of a request that has ended, as far as its text has taken its tokens."""
    count = text.count
    times = [request.entered, *request.times[:count]]
    if not count:
        times.append(time.perf_counter())
    gaps = [(after - before) * 1e3 for before, after in pairwise(times)]
    finish_reason = request.finish_reason if text.stop is None else "stop"
    assert finish_reason is not None
    return Completion(
        prompt_token_ids=request.tokens[: request.prompt_length],
        token_ids=request.generated[:count],
        text=text.emitted,
        finish_reason=finish_reason,
        ttft_ms=gaps[0],
        itl_ms=gaps[1:],
        e2e_ms=sum(gaps),
        index=request.index,
        stop=text.stop,
        logprobs=None if request.params.logprobs is None else request.logprobs[:count],
        prompt_logprobs=None if request.params.prompt_logprobs is None else request.prompt_logprobs,
        cached_tokens=request.cached_tokens,
        error=request.error,
    )
