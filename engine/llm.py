"""Text in, text out: prompts become requests, the engine runs them together, and their tokens become text."""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from engine.config import EngineConfig, make_ops
from engine.errors import ContextLengthError, RequestError
from engine.model.config import ModelConfig
from engine.model.errors import ConfigError
from engine.model.hub import find_model
from engine.model.transformer import Model
from engine.model.weights import Weights, load_weights, stored_dtype
from engine.runtime.engine import Engine, EngineStats
from engine.runtime.request import Completion, Request, completion
from engine.runtime.startup import Preparation
from engine.sampling_params import SamplingParams
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "EngineConfig", "StreamingRequest", "make_ops"]

Prompts = str | Sequence[str] | Sequence[Sequence[int]]


class StreamingRequest:
    """A request that is on its way, with what turns its tokens into text."""

    def __init__(self, request: Request, text: Detokenizer) -> None:
        self.request, self.text = request, text
        self.pieces: deque[str] = deque()  # text that nobody has taken
        self.done = False  # whether its completion has been given out

    def take(self) -> bool:
        """Turn new tokens into text. True where that has ended the request, and the engine does not know it yet."""
        request, text = self.request, self.text
        piece = text.take(request.generated_from(text.count), last=request.finish_reason is not None)
        if piece:
            self.pieces.append(piece)
        return text.stop is not None and request.finish_reason is None


class LLM:
    """A model ready to generate: its kernels are compiled and loaded, and where its steps are CUDA graphs, captured.

    Args:
        model: A checkpoint folder (config.json, safetensors and, for text, tokenizer.json); where there is no folder of
            that name, OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub; or a configuration with weights, for
            which prompts are token ids.
        engine: What to switch on; default: the fastest for this machine, `EngineConfig.for_machine()`.
        tokenizer: Used instead of the folder's.

    Raises:
        HubError: There is no such folder, and the hub does not give such a model.
        ConfigError, CheckpointError, TokenizerError: The folder is not what it must be.
        ValueError: The engine configuration asks for what the model or this machine cannot do.
    """

    def __init__(
        self,
        model: str | Path | tuple[ModelConfig, Weights],
        engine: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if engine is None:
            own = {"device": model[1].device.type} if isinstance(model, tuple) else {}
            engine = EngineConfig.for_machine(**own)
        ops = make_ops(engine)
        if isinstance(model, tuple):
            self.config, self.weights = model
            engine = engine.for_dtype(self.weights.dtype)
            self.eos_ids = frozenset(self.config.eos_token_ids)
            self.max_model_len = _longest(engine, self.config)
            preparation = Preparation(self.config, engine, self.max_model_len)
        else:
            directory = find_model(model)
            self.config = ModelConfig.from_file(directory / "config.json")
            self.eos_ids = _eos_ids(directory, self.config)
            self.max_model_len = _longest(engine, self.config)
            if tokenizer is None and (directory / "tokenizer.json").exists():
                tokenizer = Tokenizer(directory)
            engine = engine.for_dtype(stored_dtype(directory, self.config))
            preparation = Preparation(self.config, engine, self.max_model_len)
            self.weights = load_weights(directory, self.config, engine.device, engine.torch_dtype, ops)
        if self.weights.dtype != engine.torch_dtype or self.weights.device.type != engine.device:
            raise ValueError(
                f"the weights are {self.weights.dtype} on {self.weights.device.type}; the engine is set to "
                f"{engine.dtype} on {engine.device}"
            )
        self.engine = engine.for_model(self.config, ops, self.max_model_len)
        self.tokenizer = tokenizer
        if tokenizer is not None:  # as in vLLM; a chat model's config.json may name only what ends a document
            self.eos_ids |= frozenset(tokenizer.eos_ids)
        self.model = Model(self.config, self.weights, ops, self.max_model_len)
        preparation.finish()
        self._core: Engine | None = None
        self._live: dict[Request, StreamingRequest] = {}  # of `generate` and `stream`
        self._numbers = itertools.count()
        if self.engine.captures:
            _ = self.core  # its graphs take seconds, which the first request should not wait for

    @property
    def core(self) -> Engine:
        """What runs the requests; its cache is taken when it is first asked for."""
        if self._core is None:
            self._core = Engine(self.model, self.engine, self.max_model_len)
        return self._core

    def release(self) -> None:
        """Give the cache and the graphs back; the next request takes them anew.

        Raises:
            RuntimeError: Requests are on their way.
        """
        if self._core is not None and len(self._core):
            raise RuntimeError(f"{len(self._core)} requests are on their way; release() is for when none is")
        self._core = None
        gc.collect()
        if self.weights.device.type == "cuda":
            torch.cuda.empty_cache()

    def stats(self) -> EngineStats:
        return self.core.stats()

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete each prompt; completions are in the prompts' order and do not depend on each other.

        Args:
            prompts: A text, texts, or lists of token ids, of any lengths.
            params: One for all (default SamplingParams()) or one a prompt. With n above 1 a prompt's completions are
                next to each other.

        Raises:
            ValueError: A prompt is empty, too long with its new tokens, or holds an id outside the vocabulary, or text
                is asked for without a tokenizer. Nothing has been computed then.
            ArithmeticError: Every logit is NaN.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = [params or SamplingParams()] * len(listed) if isinstance(params, SamplingParams | None) else params
        if len(settings) != len(listed):
            raise ValueError(f"{len(settings)} SamplingParams for {len(listed)} prompts; one for all or one each")
        encoded = [self.token_ids(prompt, f"prompt {index}") for index, prompt in enumerate(listed)]
        for index, (ids, setting) in enumerate(zip(encoded, settings, strict=True)):
            self.check(ids, setting, f"prompt {index}")
        lives = [live for ids, setting in zip(encoded, settings, strict=True) for live in self.requests(ids, setting)]
        try:
            self._start(lives)
            while any(live.request.finish_reason is None for live in lives):
                self._step()
        finally:
            self._leave(lives)
        return [self._completion(live) for live in lives]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of the completion's text as they become certain; the generator's return value is the Completion.

        Raises:
            ValueError: As for `generate`, before the first piece; or n is not 1.
        """
        params = params or SamplingParams()
        ids = self.token_ids(prompt, "prompt 0")
        self.check(ids, params, "prompt 0")
        if params.n != 1:
            raise ValueError(f"n = {params.n}; a stream is of one completion")
        return self._stream(self.requests(ids, params)[0])

    def _stream(self, live: StreamingRequest) -> Iterator[str]:
        try:
            self._start([live])
            while live.request.finish_reason is None or live.pieces:
                while live.pieces:
                    yield live.pieces.popleft()
                if live.request.finish_reason is None:
                    self._step()
        finally:
            self._leave([live])
        return self._completion(live)

    def _start(self, lives: Sequence[StreamingRequest]) -> None:
        for live in lives:
            self.core.add(live.request)
            self._live[live.request] = live

    def _step(self) -> None:
        for request in self.core.step():
            live = self._live[request]
            if live.take():
                self.core.end(request, "stop")

    def _leave(self, lives: Sequence[StreamingRequest]) -> None:
        for live in lives:
            if self._live.pop(live.request, None) and live.request.finish_reason is None:
                self.core.end(live.request, "abort")

    def _completion(self, live: StreamingRequest) -> Completion:
        done = completion(live.request, live.text)
        if done.finish_reason == "error":
            raise ArithmeticError(done.error)
        return done

    def token_ids(self, prompt: str | Sequence[int], name: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, or the ids themselves.

        Raises:
            ValueError: The prompt is something else, or ContextLengthError; the message begins with `name`.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, but this model has no tokenizer.json; give token ids")
            self.tokenizer.check_length(prompt, self.max_model_len, name)
            return self.tokenizer.encode(prompt, add_special_tokens)
        if not isinstance(prompt, Sequence) or not all(
            issubclass(kind, int) and kind is not bool for kind in set(map(type, prompt))
        ):
            raise ValueError(f"{name} = {prompt!r:.60}; it must be text or a list of token ids")
        return list(prompt)

    def check(self, ids: Sequence[int], params: SamplingParams, name: str) -> None:
        """Raises RequestError, of a prompt beginning with `name`, where the model cannot complete these tokens so."""
        if not ids:
            raise RequestError(f"{name} is empty; it must have at least one token", "prompt")
        self.check_ids(ids, f"{name} holds")
        if len(ids) + params.max_new_tokens > self.max_model_len:
            raise ContextLengthError(
                f"{name} has {len(ids)} tokens and max_new_tokens = {params.max_new_tokens}: "
                f"{len(ids) + params.max_new_tokens} is above the limit of {self.max_model_len}"
            )
        if params.stop and self.tokenizer is None:
            without = "needs a tokenizer, and this model has no tokenizer.json"
            raise RequestError(f"stop = {list(params.stop)!r} {without}", "stop")
        self.check_ids(params.logit_bias, "logit_bias is for", "logit_bias")

    def check_ids(self, ids: Collection[int], where: str, field: str = "prompt") -> None:
        """Raises RequestError, which begins with `where`, if one of `ids` is no token of the model."""
        vocabulary = self.config.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            token = next(token for token in ids if not 0 <= token < vocabulary)
            raise RequestError(f"{where} token id {token}; ids are 0 to {vocabulary - 1}", field)

    def requests(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        session: str | None = None,
    ) -> list[StreamingRequest]:
        """The requests of a prompt that `check` has passed, n of them; they are the engine's from `core.add` on.

        timeout: seconds from now after which they end unfinished. session: as a Sequence's.
        """
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        stop_ids = frozenset(token for token in stop_ids if token < self.config.vocab_size)
        name = next(self._numbers) if id is None else id
        # With a salt of its own every token of a prompt is computed.
        salt = b"" if params.prompt_logprobs is None else os.urandom(16)
        seed, entered = params.draw_seed(), time.perf_counter()
        lives: list[StreamingRequest] = []
        for index in range(params.n):
            request = Request(
                id=(name, index), tokens=list(ids), limit=len(ids) + max(1, params.max_new_tokens), priority=priority,
                deadline=None if timeout is None else time.monotonic() + timeout,
                parent=lives[0].request if lives else None, salt=salt, session=session, params=params,
                seed=(seed + index) % 2**63, stop_ids=stop_ids, entered=entered, index=index,
            )  # fmt: skip
            text = Detokenizer(None, params, stop_ids)
            if self.tokenizer:
                decoder = self.tokenizer.stream(skip_special_tokens=True, context=ids)
                text = Detokenizer(decoder, params, stop_ids, self.tokenizer.special_texts)
            lives.append(StreamingRequest(request, text))
        return lives


def _longest(engine: EngineConfig, config: ModelConfig) -> int:
    """Tokens of a request, at most, prompt and new: as many as the model has positions and the cache has room for.

    Raises:
        ValueError: The engine's max_model_len is above that.
    """
    allowed = config.max_position_embeddings
    room = engine.cache_tokens or allowed
    longest = engine.max_model_len or min(allowed, room)
    if longest > allowed:
        raise ValueError(f"max_model_len = {longest} is above the model's {allowed} positions")
    if longest > room:
        raise ValueError(
            f"kv_tokens = {engine.kv_tokens} is room for {room} tokens, and max_model_len = {longest}; "
            "raise kv_tokens or lower max_model_len"
        )
    return longest


def _eos_ids(directory: Path, config: ModelConfig) -> frozenset[int]:
    """generation_config.json's ids where it names some (chat models end turns with more than one), else the model's."""
    path = directory / "generation_config.json"
    if not path.exists():
        return frozenset(config.eos_token_ids)
    try:
        given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error})") from None
    if given is None:
        return frozenset(config.eos_token_ids)
    ids = given if isinstance(given, list) else [given]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.vocab_size:
            raise ConfigError(f"{path}: eos_token_id {token!r} is not a token of a vocabulary of {config.vocab_size}")
    return frozenset(ids)
