"""Requests of the engine, their text, and completions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from torch import Tensor

from engine.sampling_params import SamplingParams
from engine.scheduler.sequence import Sequence
from engine.text.tokenizer import StreamDecoder

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


class Text:
    """The text of one completion: decoded token by token, with stop strings watched for across token boundaries.

    A stop string may hold the text of special tokens, which the completion's text does not show.

    Args:
        decoder: Of the tokens; None where there is no tokenizer, and no text.
        params: The request's.
        stop_ids: Tokens that end it, which give no text.
        special_texts: Of the tokens that the decoder skips, by id.
    """

    def __init__(
        self,
        decoder: StreamDecoder | None,
        params: SamplingParams,
        stop_ids: frozenset[int],
        special_texts: Mapping[int, str] | None = None,
    ) -> None:
        self._decoder, self._params, self._stop_ids = decoder, params, stop_ids
        self.count = 0  # tokens taken
        self.stop: str | int | None = None  # what has ended it
        self._emitted: list[str] = []
        special = (special_texts or {}).items() if params.stop else ()
        self._hidden = {token: text for token, text in special if any(text in stop for stop in params.stop)}
        self._watches = [_Watch(stop, any(text in stop for text in self._hidden.values())) for stop in params.stop]
        self._firsts = frozenset(stop[0] for stop in params.stop)
        self._open = False  # whether a stop string has begun
        self._seen = 0  # characters, with those of hidden tokens
        self._held: deque[tuple[int, str]] = deque()  # those that may begin a stop string and show, and their places

    @property
    def emitted(self) -> str:
        """All that was shown so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    def take(self, tokens: list[int], last: bool = False) -> str:
        """Take tokens, as far as no stop string is complete; what may be shown now. last: none come after these."""
        shown = []
        for token in tokens:
            self.count += 1
            enough = self.count >= self._params.min_tokens
            if token in self._stop_ids and enough:
                self.stop = token
            elif self._decoder:
                shown.append(self.push(self._decoder.push([token]), enough))
                if token in self._hidden and self.stop is None:
                    shown.append(self.push(self._hidden[token], enough, shows=False))
            if self.stop is not None:
                break
        if last and self._decoder and not isinstance(self.stop, str):
            shown.append(self.push(self._decoder.finish(), enough=self.stop is None, last=True))
        return "".join(shown)

    def push(self, piece: str, enough: bool = True, last: bool = False, shows: bool = True) -> str:
        """Take decoded text; what may be shown of it.

        The stop string that is complete first ends the text, the longest where several are.

        Args:
            enough: Whether a stop string may end it.
            last: Whether no text comes after this.
            shows: Whether this is to be shown at all.
        """
        shown = self._watch(piece, enough, shows) if self._watches else [piece]
        if last:
            shown += [char for _, char in self._held]
            self._held.clear()
        self._emitted += shown
        return "".join(shown)

    def _watch(self, piece: str, enough: bool, shows: bool) -> list[str]:
        if not self._open and self._firsts.isdisjoint(piece):
            self._seen += len(piece)
            return [piece] if shows else []
        shown = []
        for char in piece:
            self._seen += 1
            if shows:
                self._held.append((self._seen, char))
            complete = [watch for watch in self._watches if (shows or watch.hidden) and watch.advance(char)]
            found = max(complete, key=lambda watch: len(watch.stop)) if complete and enough else None
            # What a stop string may need: so many characters that show, or so many with hidden ones.
            need = [(w.hidden, len(w.stop) if found else w.matched) for w in ([found] if found else self._watches)]
            showing = max((length for hidden, length in need if not hidden), default=0)
            begin = self._seen - max((length for hidden, length in need if hidden), default=0)
            while len(self._held) > showing and self._held[0][0] <= begin:
                shown.append(self._held.popleft()[1])
            if found:
                self.stop = found.stop
                self._held.clear()
                break
        self._open = any(watch.matched for watch in self._watches)
        return shown


class _Watch:
    """How much of a stop string the text so far ends with: Knuth, Morris and Pratt's, a step a character on average.

    hidden: whether it looks at special tokens too, which do not show.
    """

    def __init__(self, stop: str, hidden: bool) -> None:
        self.stop, self.hidden = stop, hidden
        self.matched = 0  # characters, less than all
        # By length: of a beginning of the stop string, the longest that it also ends with. As far as was needed.
        self._borders = [0, 0]

    def advance(self, char: str) -> bool:
        """Take a character of the text; whether the stop string is complete with it."""
        self.matched = self._next(self.matched, char)
        if self.matched < len(self.stop):
            return False
        self.matched = self._border(self.matched)
        return True

    def _next(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._border(matched)
        return matched + (self.stop[matched] == char)

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            self._borders.append(self._next(self._borders[-1], self.stop[len(self._borders) - 1]))
        return self._borders[length]


def completion(request: Request, text: Text) -> Completion:
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
