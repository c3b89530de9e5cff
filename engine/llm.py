"""Text in, text out: requests are batched, run through the model step by step, sampled and decoded.

A step takes every running request's tokens that the model has not seen (a prompt, a part of one, or the token sampled
last), packs them into one list without padding, and samples a token for each request whose list is complete. With
`cuda_graph`, steps that are nothing but decoding run in `engine.decode_loop`, one ahead of the host, and those that are
one short prompt in `engine.prompt_loop`.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.config import DTYPES, ConfigError, ModelConfig
from engine.decode_loop import DecodeLoop, Row, bucket
from engine.kv_cache import ContiguousCache
from engine.model import Model
from engine.ops import Ops, ReferenceOps, Run
from engine.prompt_loop import PromptLoop
from engine.sampling import SamplingParams
from engine.tokenizer import StreamDecoder, Tokenizer
from engine.weights import Weights, load_weights

Prompts = str | Sequence[str] | Sequence[Sequence[int]]
_CHOICES = {
    "backend": ("reference", "cuda"),
    "device": ("cpu", "cuda"),
    "dtype": ("bfloat16", "float32"),
    "attention": ("naive", "flash"),
    "linear": ("naive", "streamed", "tiled"),
    "sampling": ("naive", "split"),
    "kv_cache": ("none", "contiguous"),
    "cuda_graph": (False, True),
}


@dataclass(frozen=True)
class EngineConfig:
    """What the engine switches on. `attention`, `linear`, `sampling` name the versions that the cuda backend runs.

    Raises:
        ValueError: A field has a value that does not exist; names the field, the value and the choices.
    """

    backend: Literal["reference", "cuda"] = "reference"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["naive", "flash"] = "naive"
    linear: Literal["naive", "streamed", "tiled"] = "naive"
    sampling: Literal["naive", "split"] = "naive"
    kv_cache: Literal["none", "contiguous"] = "contiguous"  # none: every step computes the whole prefix again
    cuda_graph: bool = False  # decode steps by engine.decode_loop, captured where the cuda backend runs on a GPU
    max_batch: int = 8  # requests that run together
    max_model_len: int | None = None  # prompt and new tokens; None = what the model allows
    max_step_tokens: int = 2048  # tokens of one forward pass: longer prompts are taken in chunks

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(map(str, choices))}")
        if self.cuda_graph and self.kv_cache == "none":
            raise ValueError("cuda_graph = True with kv_cache = 'none'; it needs kv_cache = 'contiguous'")
        for name in ("max_batch", "max_model_len", "max_step_tokens"):
            value = getattr(self, name)
            if name == "max_model_len" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}; it must be an integer of at least 1")

    @property
    def captures(self) -> bool:
        """Whether decode steps are CUDA graphs: other backends run the same steps without one."""
        return self.cuda_graph and self.backend == "cuda" and self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        assert self.dtype in DTYPES
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Completion:
    """What one prompt led to. Times are from the request's entry into the engine: tokenisation out, sampling in."""

    prompt_token_ids: list[int]
    token_ids: list[int]  # with the token that ended it, if one did
    text: str  # without what ended it and without special tokens; empty when the engine has no tokenizer
    finish_reason: Literal["stop", "length"]
    ttft_ms: float  # until the first token
    itl_ms: list[float]  # between one token and the next
    e2e_ms: float  # until the last token


@dataclass
class _Text:
    """Decoded text with stop strings watched for across token boundaries."""

    decoder: StreamDecoder
    stop: tuple[str, ...]
    emitted: str = ""
    held: str = ""  # may be the beginning of a stop string
    stopped: bool = False

    def push(self, piece: str, last: bool = False) -> str:
        """Take decoded text; what may be shown of it. Sets `stopped` when a stop string is complete."""
        self.held += piece
        found = [place for text in self.stop if (place := self.held.find(text)) >= 0]
        if found:
            shown, self.stopped = self.held[: min(found)], True
            self.held = ""
        else:
            keep = 0 if last else max((_overlap(self.held, text) for text in self.stop), default=0)
            shown = self.held[: len(self.held) - keep]
            self.held = self.held[len(self.held) - keep :]
        self.emitted += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with (less than all of it)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


@dataclass
class _Request:
    """One prompt on its way."""

    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    text: _Text | None
    arrival: float
    seed: int
    slot: int = -1
    computed: int = 0  # tokens whose keys and values are in the cache
    tokens: list[int] = field(default_factory=list)  # prompt and generated
    times: list[float] = field(default_factory=list)  # of the generated ones
    seen: Tensor | None = None  # bool [V], only under a repetition penalty
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    def accept(self, token: int) -> str:
        """Append a sampled token; the text that may be shown now."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        shown = ""
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.text:
            shown = self.text.push(self.text.decoder.push([token]))
            if self.text.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.times) == self.params.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason and self.text and not self.text.stopped:
            shown += self.text.push(self.text.decoder.finish(), last=True)
            if self.text.stopped:
                self.finish_reason = "stop"
        return shown

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        times = [self.arrival, *self.times]
        gaps = [(after - before) * 1e3 for before, after in pairwise(times)]
        return Completion(
            prompt_token_ids=self.prompt,
            token_ids=self.tokens[len(self.prompt) :],
            text=self.text.emitted if self.text else "",
            finish_reason=self.finish_reason,
            ttft_ms=gaps[0],
            itl_ms=gaps[1:],
            e2e_ms=(times[-1] - times[0]) * 1e3,
        )


class LLM:
    """A model ready to generate.

    Args:
        model: A checkpoint folder (config.json, safetensors and, for text, tokenizer.json), or a configuration with
            weights, for which prompts are token ids.
        engine: What to switch on.
        tokenizer: Used instead of the folder's.

    Raises:
        ConfigError, CheckpointError, TokenizerError: The folder is not what it must be.
        ValueError: The engine configuration asks for what the model or this machine cannot do.
    """

    def __init__(
        self,
        model: str | Path | tuple[ModelConfig, Weights],
        engine: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.engine = engine = engine or EngineConfig()
        ops = make_ops(engine)
        if isinstance(model, tuple):
            self.config, self.weights = model
            self.eos_ids = frozenset(self.config.eos_token_ids)
        else:
            directory = Path(model)
            self.config = ModelConfig.from_file(directory / "config.json")
            self.eos_ids = _eos_ids(directory, self.config)
            if tokenizer is None and (directory / "tokenizer.json").exists():
                tokenizer = Tokenizer(directory)
            self.weights = load_weights(directory, self.config, engine.device, engine.torch_dtype)
        if self.weights.dtype != engine.torch_dtype or self.weights.device.type != engine.device:
            raise ValueError(
                f"the weights are {self.weights.dtype} on {self.weights.device.type}; the engine is set to "
                f"{engine.dtype} on {engine.device}"
            )
        allowed = self.config.max_position_embeddings
        self.max_model_len = engine.max_model_len or allowed
        if self.max_model_len > allowed:
            raise ValueError(f"max_model_len = {self.max_model_len} is above the model's {allowed} positions")
        self.tokenizer = tokenizer
        self.model = Model(self.config, self.weights, ops, self.max_model_len)
        self._cache: ContiguousCache | None = None
        self._loop: DecodeLoop | None = None
        self._prompts: PromptLoop | None = None

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete each prompt; completions are in the prompts' order and do not depend on each other.

        Args:
            prompts: A text, texts, or lists of token ids, of any lengths.
            params: One for all (default SamplingParams()) or one a prompt.

        Raises:
            ValueError: A prompt is empty, too long with its new tokens, or holds an id outside the vocabulary, or text
                is asked for without a tokenizer. Nothing has been computed then.
        """
        requests = self._requests(prompts, params)
        for _ in self._run(requests):
            pass
        return [request.completion() for request in requests]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of the completion's text as they become certain; the generator's return value is the Completion.

        Raises:
            ValueError: As for `generate`, before the first piece.
        """
        (request,) = self._requests(prompt if isinstance(prompt, str) else [prompt], params)
        return self._stream(request)

    def _stream(self, request: _Request) -> Iterator[str]:
        for _, piece in self._run([request]):
            if piece:
                yield piece
        return request.completion()

    def _requests(self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None) -> list[_Request]:
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = [params or SamplingParams()] * len(listed) if isinstance(params, SamplingParams | None) else params
        if len(settings) != len(listed):
            raise ValueError(f"{len(settings)} SamplingParams for {len(listed)} prompts; one for all or one each")
        encoded = [self._token_ids(index, prompt) for index, prompt in enumerate(listed)]
        for index, (ids, setting) in enumerate(zip(encoded, settings, strict=True)):
            self._check(index, ids, setting)
        arrival = time.perf_counter()
        return [self._request(ids, setting, arrival) for ids, setting in zip(encoded, settings, strict=True)]

    def _token_ids(self, index: int, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompt {index} is text, but this model has no tokenizer.json; give token ids")
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
            raise ValueError(f"prompt {index} = {prompt!r:.60}; it must be text or a list of token ids")
        return list(prompt)

    def _check(self, index: int, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise ValueError(f"prompt {index} is empty; it must have at least one token")
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"prompt {index} holds token id {token}; ids are 0 to {self.config.vocab_size - 1}")
        if len(ids) + params.max_new_tokens > self.max_model_len:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and max_new_tokens = {params.max_new_tokens}: "
                f"{len(ids) + params.max_new_tokens} is above the limit of {self.max_model_len}"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop = {list(params.stop)!r} needs a tokenizer, and this model has no tokenizer.json")

    def _request(self, ids: list[int], params: SamplingParams, arrival: float) -> _Request:
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        text = _Text(self.tokenizer.stream(skip_special_tokens=True), tuple(params.stop)) if self.tokenizer else None
        request = _Request(ids, params, stop_ids, text, arrival, params.draw_seed(), tokens=list(ids))
        if params.repetition_penalty != 1:
            request.seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.engine.device)
            request.seen[torch.tensor(ids, device=self.engine.device)] = True
        return request

    def _run(self, requests: list[_Request]) -> Iterator[tuple[_Request, str]]:
        """Run requests to their ends, first come first served; yields each request that got a token, and its text."""
        if not requests:
            return
        slots = min(self.engine.max_batch, len(requests))
        capacity = max(len(r.prompt) + r.params.max_new_tokens for r in requests)
        # Idle rows of a decode loop's bucket need slots too.
        cache = self._take_cache(bucket(slots) if self.engine.cuda_graph else slots, capacity)
        loop, prompts = self._loop, self._prompts
        self._loop = self._prompts = None
        if self.engine.cuda_graph and (loop is None or loop.cache is not cache):
            loop = DecodeLoop(self.model, cache, self.engine.captures)
            prompts = PromptLoop(self.model, cache, self.engine.captures)
        waiting, running, free = requests[::-1], [], list(range(slots))[::-1]
        try:
            while waiting or running:
                while waiting and free:
                    request = waiting.pop()
                    request.slot = free.pop()
                    running.append(request)
                if loop and all(r.pending == 1 and r.seen is None for r in running):
                    produced = self._decode(list(running), loop)
                else:
                    produced = self._step(running, cache, prompts)
                for request, token in produced:
                    if token < 0:
                        raise ArithmeticError(f"every logit after token {len(request.tokens)} of a request is NaN")
                    piece = request.accept(token)
                    if request.seen is not None:
                        request.seen[token] = True
                    if self.engine.kv_cache == "none":
                        request.computed = 0
                    if request.finish_reason:
                        running.remove(request)
                        free.append(request.slot)
                    yield request, piece
        finally:
            self._cache, self._loop, self._prompts = cache, loop, prompts

    def _decode(self, running: list[_Request], loop: DecodeLoop) -> Iterator[tuple[_Request, int]]:
        """Decode until a request has ended: (request, new token), for the caller to accept before it takes the next.

        A step is enqueued before the tokens of the one ahead of it are looked at; a request that these end drops its
        part of it.
        """
        loop.start([Row(r.slot, r.tokens[-1], r.computed, r.params, r.seed) for r in running])
        steps = min(r.params.max_new_tokens - len(r.times) for r in running)
        loop.enqueue()
        enqueued, done = 1, 0
        while done < enqueued:
            if enqueued < steps and not any(r.finish_reason for r in running):
                loop.enqueue()
                enqueued += 1
            for request, token in zip(running, loop.wait(), strict=True):
                if request.finish_reason is None:
                    request.computed += 1
                    yield request, token
            done += 1

    @torch.inference_mode()
    def _step(
        self, running: list[_Request], cache: ContiguousCache, prompts: PromptLoop | None
    ) -> list[tuple[_Request, int]]:
        """One forward pass over as many pending tokens as fit; (request, new token) for those that are complete."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        runs: list[Run] = []
        ready: list[tuple[_Request, int]] = []  # and the row of its last token
        for request in running:
            count = min(request.pending, self.engine.max_step_tokens - len(tokens))
            begin, end = request.computed, request.computed + count
            tokens += request.tokens[begin:end]
            slots += [request.slot] * count
            positions += range(begin, end)
            if count:
                runs.append(Run(count, request.slot, begin))
            request.computed = end
            if count and not request.pending:
                ready.append((request, len(tokens) - 1))
        if prompts and ready and len(runs) == 1 and prompts.takes(runs[0]):
            logits = prompts.forward(tokens, runs[0])
        else:
            packed = torch.tensor([tokens, slots, positions], dtype=torch.int32).to(self.engine.device)
            rows = torch.tensor([row for _, row in ready], dtype=torch.int32).to(self.engine.device)
            logits = self.model.forward(packed[0], packed[1], packed[2], cache, logits_at=rows, runs=runs)
        chosen = self._sample([request for request, _ in ready], logits)
        return [(request, token) for (request, _), token in zip(ready, chosen, strict=True)]

    def _sample(self, requests: list[_Request], logits: Tensor) -> list[int]:
        if not requests:
            return []
        penalised = [request.seen is not None for request in requests]
        if any(penalised) and not all(penalised):
            # Apart: the fp32 logits of a penalty would have its neighbours sampled by another kernel than alone.
            chosen = [-1] * len(requests)
            for kind in (False, True):
                rows = [row for row, is_penalised in enumerate(penalised) if is_penalised is kind]
                for row, token in zip(rows, self._sample([requests[row] for row in rows], logits[rows]), strict=True):
                    chosen[row] = token
            return chosen
        ops, params = self.model.ops, [request.params for request in requests]

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(logits.device)

        seen = [request.seen for request in requests if request.seen is not None]
        if seen:
            logits = logits.float()
            ops.repetition_penalty(
                logits, torch.stack(seen), column([p.repetition_penalty for p in params], torch.float32)
            )
        if all(p.temperature == 0 for p in params):
            return ops.argmax(logits).tolist()
        chosen = ops.sample(
            logits,
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int32),
            top_p=column([p.top_p for p in params], torch.float32),
            min_p=column([p.min_p for p in params], torch.float32),
            seed=column([request.seed for request in requests], torch.int64),
            position=column([len(request.tokens) for request in requests], torch.int32),
        )
        return chosen.tolist()

    def _take_cache(self, slots: int, capacity: int) -> ContiguousCache:
        """A cache at least this large for the caller alone: the one at hand, or a new one."""
        cache, self._cache = self._cache, None
        if cache is None or cache.slots < slots or cache.capacity < capacity:
            slots = max(slots, cache.slots if cache else 0)
            capacity = max(min(-(-capacity // 256) * 256, self.max_model_len), cache.capacity if cache else 0)
            cache = self._loop = self._prompts = None  # their memory is free before the next is taken
            cache = self.model.new_cache(slots, capacity)
        return cache


def make_ops(engine: EngineConfig) -> Ops:
    """The operations that `engine` names.

    Raises:
        ValueError: The device or the backend is not there on this machine.
    """
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds no CUDA GPU on this machine; use device = 'cpu'")
    if engine.backend == "reference":
        return ReferenceOps(engine.device)
    from engine.cuda_ops import CudaOps  # it imports numba, which takes a second

    return CudaOps(engine.device, attention=engine.attention, linear=engine.linear, sampling=engine.sampling)


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
