"""Responses made of what the engine yields: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.async_llm import EngineDead, Stream
from engine.runtime.request import Completion, TokenLogprobs, Update
from engine.server.protocol import ApiError
from engine.server.tokens import TokenTexts
from engine.text.tokenizer import StreamDecoder, Tokenizer

log = logging.getLogger(__name__)
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
DEAD = "the engine has failed; the server's log says how"
DONE = b"data: [DONE]\n\n"
_NEVER = -9999.0  # in place of minus infinity, which JSON cannot say; vLLM writes the same


@dataclass(frozen=True)
class Prompt:
    """A prompt as text (None where token ids were given) and as token ids."""

    text: str | None
    ids: list[int]
    added: tuple[int, int] = (0, 0)  # of the ids, how many at the beginning and at the end are not of the text


@dataclass
class Job:
    """A request on its way: what the engine was asked, and how the response is to look."""

    id: str
    chat: bool
    created: int
    model: str
    n: int
    prompts: list[Prompt]
    streams: list[Stream]  # one a prompt
    stack: AsyncExitStack  # leaving it aborts what the streams have left
    tokenizer: Tokenizer | None
    texts: TokenTexts | None
    observe: Callable[[Completion], None]  # told of each completion
    echo: bool = False
    logprobs: bool = False
    token_ids: bool = False  # in each choice
    tokens_as_ids: bool = False  # in logprobs
    usage_at_end: bool = False
    usage_always: bool = False
    completions: dict[int, Completion] = field(default_factory=dict)  # by index of choice

    def usage(self, generated: int) -> dict[str, Any]:
        """OpenAI's usage, for `generated` tokens so far."""
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        # A prompt's completions share its tokens: what one of them found in the cache is counted, once.
        cached = sum(
            max((self.completions[i].cached_tokens for i in group if i in self.completions), default=0)
            for group in (range(k * self.n, (k + 1) * self.n) for k in range(len(self.prompts)))
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def take(self, prompt: int, update: Update) -> int:
        """Note an update of a prompt's stream; its choice's index.

        Raises:
            ApiError: The completion has ended otherwise than by its own rules.
        """
        choice = prompt * self.n + update.index
        done = update.completion
        if done is not None:
            self.completions[choice] = done
            self.observe(done)
            if done.finish_reason == "error":
                raise ApiError(500, f"the engine failed: {done.error}")
            if done.finish_reason == "deadline":
                raise ApiError(504, f"not complete after {done.e2e_ms / 1e3:.1f} s, the most that a request may take")
            if done.finish_reason == "abort":
                raise ApiError(503, "the server is shutting down")
        return choice

    def echoed(self, choice: int) -> str:
        """The prompt's text, where it is to come before the completion's."""
        if not self.echo:
            return ""
        prompt = self.prompts[choice // self.n]
        if prompt.text is not None:
            return prompt.text
        # Without a character that its end has begun: the completion's text begins with that.
        return self.tokenizer.stream().push(prompt.ids) if self.tokenizer else ""


async def whole(job: Job) -> dict[str, Any]:
    """The response in one piece. Raises ApiError where a completion fails."""
    async with job.stack:
        for index, stream in enumerate(job.streams):
            async for update in stream:
                job.take(index, update)
    choices = []
    for index, done in sorted(job.completions.items()):
        logprobs = _Logprobs(job, index)
        entries = logprobs.of_prompt(done) + logprobs.of_tokens(done.token_ids, done.logprobs)
        ended = {"finish_reason": done.finish_reason, "stop_reason": done.stop}
        ids = {"token_ids": done.token_ids} if job.token_ids else {}
        if job.chat:
            message = {"role": "assistant", "content": done.text, "refusal": None}
            choices.append({"index": index, "message": message, "logprobs": logprobs.write(entries), **ended, **ids})
        else:
            if job.token_ids:
                ids["prompt_token_ids"] = job.prompts[index // job.n].ids
            text = job.echoed(index) + done.text
            choices.append({"index": index, "text": text, "logprobs": logprobs.write(entries), **ended, **ids})
    generated = sum(len(done.token_ids) for done in job.completions.values())
    response = {
        "id": job.id,
        "object": "chat.completion" if job.chat else "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": job.usage(generated),
    }
    return response | ({"prompt_token_ids": job.prompts[0].ids} if job.chat and job.token_ids else {})


class EventStream(StreamingResponse):
    """The response as server-sent events. Whatever ends it, a client that has gone too, ends the job."""

    def __init__(self, job: Job) -> None:
        super().__init__(
            _events(job),
            media_type="text/event-stream",
            # Proxies must not hold events back.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not inside the generator: it may be cancelled before its first step.
        async with self._job.stack, aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


async def _events(job: Job) -> AsyncGenerator[bytes, None]:
    head = {
        "id": job.id,
        "object": "chat.completion.chunk" if job.chat else "text_completion",
        "created": job.created,
        "model": job.model,
    }
    before = f'data: {encode(head)[:-1]},"choices":['.encode()
    after = b'],"usage":null}\n\n' if job.usage_at_end else b"]}\n\n"
    choices: dict[int, _Choice] = {}
    generated = 0
    try:
        async with aclosing(_merged(job.streams)) as updates:
            async for prompt, update in updates:
                index = job.take(prompt, update)
                generated += len(update.token_ids)
                choice = choices.get(index)
                if choice is None:
                    choice = choices[index] = _Choice(job, index)
                if job.usage_always:
                    after = f'],"usage":{encode(job.usage(generated))}}}\n\n'.encode()
                for piece in choice.pieces(update):
                    yield before + encode(piece).encode() + after
    except ApiError as error:
        yield _error(error)
    except EngineDead:  # the server logs that, once, and ends
        yield _error(ApiError(500, DEAD))
    except Exception:
        log.exception("stream failed", extra={"id": job.id})
        yield _error(ApiError(500, "the server failed; its log says how"))
    else:
        if job.usage_at_end:
            yield before + f'],"usage":{encode(job.usage(generated))}}}\n\n'.encode()
    yield DONE


def _error(error: ApiError) -> bytes:
    return b"data: " + encode(error.body).encode() + b"\n\n"


class _Choice:
    """One choice of a stream: what has been sent of it."""

    def __init__(self, job: Job, index: int) -> None:
        self._job, self._index = job, index
        self._logprobs = _Logprobs(job, index)
        self._begun = False
        # The prompt's log probabilities come with the completion, so all that would come after them waits for it.
        self._waits = job.echo and job.logprobs

    def pieces(self, update: Update) -> Iterable[dict[str, Any]]:
        """The choices of the chunks that `update` leads to."""
        done = update.completion
        if self._waits:
            if done is None:
                return
            update = Update(update.index, done.text, done.token_ids, done.logprobs, done)
        ended = {"finish_reason": done.finish_reason, "stop_reason": done.stop} if done else {"finish_reason": None}
        first, self._begun = not self._begun, True
        job = self._job
        ids: dict[str, Any] = {"token_ids": update.token_ids} if job.token_ids else {}
        # Without a tokenizer there is no text, and a chunk is what says that there was a token.
        something = bool(update.text or (update.token_ids and (job.logprobs or job.token_ids or not job.tokenizer)))
        if job.chat:
            if first:
                delta = {"role": "assistant", "content": ""}
                yield {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
            if something:
                logprobs = self._logprobs.write(self._logprobs.of_tokens(update.token_ids, update.logprobs))
                yield {
                    "index": self._index,
                    "delta": {"content": update.text},
                    "logprobs": logprobs,
                    "finish_reason": None,
                    **ids,
                }
            if done:
                yield {"index": self._index, "delta": {}, "logprobs": None, **ended}
            return
        text = update.text
        if first:
            text = job.echoed(self._index) + text
            if job.token_ids:
                ids["prompt_token_ids"] = job.prompts[self._index // job.n].ids
        if something or text or done:
            entries = self._logprobs.of_prompt(done) if self._waits and done else []
            logprobs = self._logprobs.write(entries + self._logprobs.of_tokens(update.token_ids, update.logprobs))
            yield {"index": self._index, "text": text, "logprobs": logprobs, **ended, **ids}


# A token, where in the choice's text it begins, and None where nothing is before it that could predict it.
_Entry = tuple[int, int, TokenLogprobs | None]


class _Logprobs:
    """Log probabilities of one choice in the form of its endpoint; tokens are given in order."""

    def __init__(self, job: Job, choice: int) -> None:
        self._job, self._prompt = job, job.prompts[choice // job.n]
        self._echoed = job.echoed(choice) if job.logprobs else ""
        self._decoder: StreamDecoder | None = None
        if job.tokenizer and job.logprobs:
            self._decoder = job.tokenizer.stream(skip_special_tokens=True, context=self._prompt.ids)

    def of_prompt(self, done: Completion) -> list[_Entry]:
        if not (self._job.echo and self._job.logprobs and done.prompt_logprobs is not None):
            return []
        offsets = self._offsets_of_prompt(done.prompt_token_ids)
        return list(zip(done.prompt_token_ids, offsets, done.prompt_logprobs, strict=True))

    def _offsets_of_prompt(self, ids: list[int]) -> list[int]:
        """Special tokens show in an echo, but for those that the tokenizer has put around the text."""
        if self._job.tokenizer is None:
            return [0] * len(ids)
        decoder, end = self._job.tokenizer.stream(), len(ids) - self._prompt.added[1]
        offsets, length = [], 0
        for place, token in enumerate(ids):
            if self._prompt.added[0] <= place < end:
                length += len(decoder.push([token]))
                offsets.append(min(decoder.start, len(self._echoed)))
            else:
                offsets.append(min(length, len(self._echoed)))
        return offsets

    def of_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> list[_Entry]:
        if not self._job.logprobs or logprobs is None:
            return []
        return [(token, self._advance(token), entry) for token, entry in zip(tokens, logprobs, strict=True)]

    def write(self, entries: list[_Entry]) -> dict[str, Any] | None:
        """The endpoint's `logprobs`; None where they were not asked for."""
        if not self._job.logprobs:
            return None
        if self._job.chat:
            return {"content": [self._chat(entry) for _, _, entry in entries if entry is not None], "refusal": None}
        return {
            "tokens": [self._text(token) for token, _, _ in entries],
            "token_logprobs": [None if e is None else _finite(e.logprob) for _, _, e in entries],
            "top_logprobs": [None if e is None else self._top(e) for _, _, e in entries],
            "text_offset": [offset for _, offset, _ in entries],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """By text, the most likely ones and the token itself; the likelier one of two tokens of the same text."""
        found: dict[str, float] = {}
        for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
            found.setdefault(self._text(token), _finite(logprob))
        return found

    def _chat(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in entry.top]
        return self._one(entry.token, entry.logprob) | {"top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._job.texts.bytes(token) if self._job.texts else []
        return {"token": self._text(token), "logprob": _finite(logprob), "bytes": data}

    def _text(self, token: int) -> str:
        if self._job.texts is None or self._job.tokens_as_ids:
            return f"token_id:{token}"
        return self._job.texts.text(token)

    def _advance(self, token: int) -> int:
        """Where in the choice's text that of a generated token begins."""
        if self._decoder is None:
            return 0
        self._decoder.push([token])
        return len(self._echoed) + self._decoder.start


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER)


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Update], None]:
    """The updates of all streams as they come, each with its stream's place."""
    if len(streams) == 1:
        async for update in streams[0]:
            yield 0, update
        return
    # Bounded: what a slow client does not take stays with the engine.
    queue: asyncio.Queue[tuple[int, Update | Exception | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(place: int, stream: Stream) -> None:
        try:
            async for update in stream:
                await queue.put((place, update))
            await queue.put((place, None))
        except Exception as error:
            await queue.put((place, error))

    tasks = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            place, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
