"""How the next token is chosen."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import RequestError

TOP_K_MAX = 2**31 - 1
MOST_COMPLETIONS = 128
MOST_LOGPROBS = 20
# Kernels compute in float32: what is zero or infinite there would be another setting, or none.
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def _number(name: str, value: object, right: str, low: float, high: float, open_low: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (low < value <= high if open_low else low <= value <= high):  # type: ignore[operator]
        raise RequestError(f"{name} = {value!r}; it must be {right}", name.partition("[")[0])


def _integer(name: str, value: object, right: str, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} = {value!r}; it must be {right}", name)


@dataclass(frozen=True)
class SamplingParams:
    """One request's settings. Filters apply in this order: logit_bias, min_tokens, repetition penalty, frequency and
    presence penalty, temperature, top-k, top-p, min-p.

    temperature 0 takes the most likely token. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch that filter
    off. A seed makes the request repeatable whatever it is batched with; None draws a fresh one. Generation ends at
    an end-of-sequence token of the model (unless ignore_eos), at one of stop_token_ids, before any of the stop
    strings, or after max_new_tokens, but with none of these tokens before min_tokens are there.

    n: completions of the prompt; the i-th one is drawn with seed + i. logprobs: how many of the most likely tokens are
    reported with each generated one (0: that one alone), prompt_logprobs: with each one of the prompt; None: nothing.
    repetition_penalty divides or multiplies the logits of tokens in prompt and text; frequency_penalty is taken from a
    logit for each time the token was generated, presence_penalty once; logit_bias is added to the logits of its tokens.
    max_new_tokens 0 generates nothing, which asks for prompt_logprobs alone.

    Raises:
        RequestError: A value is of the wrong type or outside its range; names the field, the value and the range.
    """

    max_new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        right = f"an integer of at least {least}" + ("" if least else " (1 without prompt_logprobs)")
        _integer("max_new_tokens", self.max_new_tokens, right, least, TOP_K_MAX)
        _number("temperature", self.temperature, "a finite number, 0 or more, up to 3.4e38", 0.0, _MOST)
        _integer("top_k", self.top_k, "an integer, 0 (off) or more", 0, TOP_K_MAX)
        _number("top_p", self.top_p, "a number above 0 and up to 1", 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, "a number from 0 to 1", 0.0, 1.0)
        right = "a finite number above 0, from 1.2e-38 to 3.4e38"
        _number("repetition_penalty", self.repetition_penalty, right, _LEAST, _MOST)
        if self.seed is not None:
            _integer("seed", self.seed, "None or an integer from 0 to 2^63 - 1", 0, 2**63 - 1)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(
                f"stop = {self.stop!r}; it must be a string or a list of strings, none of them empty", "stop"
            )
        if not isinstance(self.stop_token_ids, (list, tuple)):
            raise RequestError(
                f"stop_token_ids = {self.stop_token_ids!r}; it must be a list of token ids", "stop_token_ids"
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, "a list of token ids, integers of at least 0", 0, TOP_K_MAX)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos = {self.ignore_eos!r}; it must be True or False", "ignore_eos")
        _integer("n", self.n, f"an integer from 1 to {MOST_COMPLETIONS}", 1, MOST_COMPLETIONS)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), f"None or an integer from 0 to {MOST_LOGPROBS}", 0, MOST_LOGPROBS)
        _integer("min_tokens", self.min_tokens, "an integer from 0 to max_new_tokens", 0, self.max_new_tokens)
        for name in ("frequency_penalty", "presence_penalty"):
            _number(name, getattr(self, name), "a number from -2 to 2", -2.0, 2.0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias = {self.logit_bias!r}; it must map token ids to numbers", "logit_bias")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, "of token ids, integers of at least 0", 0, TOP_K_MAX)
            _number(f"logit_bias[{token}]", bias, "a number from -100 to 100", -100.0, 100.0)
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalties or bool(self.logit_bias) or self.min_tokens > 0

    def draw_seed(self) -> int:
        """The seed, or a fresh one from the operating system."""
        return int.from_bytes(os.urandom(8), "little") >> 1 if self.seed is None else self.seed
