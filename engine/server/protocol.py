"""Requests and responses: OpenAI's fields, vLLM's beside them, and errors in OpenAI's shape.

A field that only OpenAI or vLLM serve is refused by name if it would change the response (`REFUSED`), and otherwise
ignored, as is a field that nobody knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WrapValidator

from engine.errors import ContextLengthError, RequestError
from engine.sampling_params import MOST_COMPLETIONS, MOST_LOGPROBS, SamplingParams
from engine.text.tokenizer import TokenizerError

RETRY = {"Retry-After": "1"}  # s, at the least; clients wait longer by themselves where that is not enough
# What an error of a status is called where nothing more is known: OpenAI's type, and a code.
_KINDS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "too_many_requests"),
    431: ("invalid_request_error", "request_too_large"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "deadline_exceeded"),
    505: ("invalid_request_error", "http_version_not_supported"),
}


class ApiError(Exception):
    """A response other than the one asked for: a status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind, usual = _KINDS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


# Fields that would change the response, with the values (beside null) that would not.
_REFUSED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "completion": {**_REFUSED_EVERYWHERE, "suffix": ("",)},
    "chat": {
        **_REFUSED_EVERYWHERE,
        "audio": (),
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "thinking": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
    "message": {"audio": (), "function_call": (), "tool_call_id": (), "tool_calls": ([],)},
}

T = TypeVar("T")
# Of a wrong list the first wrong item is named. All of them, as pydantic names them by itself, would take minutes and
# gigabytes for a body of 8 MiB, in which nothing else is answered.
Listed = Annotated[list[T], Field(fail_fast=True)]
NonEmptyList = Annotated[list[T], Field(min_length=1, fail_fast=True)]


def _piece_by_piece(value: Any, validate: Callable[[Any], Any]) -> Any:
    """A mapping's entries, a few at a time: the first wrong ones are named, not all of them."""
    if not isinstance(value, dict):
        return validate(value)
    entries, found = iter(value.items()), {}
    while some := dict(islice(entries, 64)):
        found |= validate(some)
    return found


Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Biases = Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Bias], WrapValidator(_piece_by_piece)]
NonEmpty = Annotated[str, Field(min_length=1)]
Prompts = str | NonEmptyList[str] | NonEmptyList[TokenId] | NonEmptyList[NonEmptyList[TokenId]]
# What is right, for fields whose own validation names each alternative by itself.
ALTERNATIVES = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty",
    "stop": "a string or a list of at most 64 strings, none of them empty",
    "content": "a string or a list of parts of type text",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage in every chunk


class Request(BaseModel):
    """Fields that the two endpoints that generate have in common."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(None, description="One of /v1/models; the served model when absent.")
    n: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 or -1: all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = Field(None, description="By token id, -100 to 100.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(None, description="-1: a fresh one.")
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=64, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=8192, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    best_of: int | None = Field(None, description="Refused where it is not n.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="The session, where neither the header nor the field below names it.")
    prompt_cache_key: str | None = Field(None, description="The session: its pages stay in the prefix cache together.")
    priority: Count | None = Field(None, description="0, the default, is served first.")
    return_token_ids: bool | None = Field(None, description="Add token_ids to each choice.")
    return_tokens_as_token_ids: bool | None = Field(None, description="Write tokens in logprobs as token_id:N.")

    def common_params(self) -> dict[str, Any]:
        """Arguments of SamplingParams, where the request gives them.

        Raises:
            ApiError: A field asks for what is not served.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, f"best_of = {self.best_of} is not served; it must be n = {self.n or 1}", "best_of")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is given, but stream is not true", "stream_options")
        given = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": None if self.logit_bias is None else {int(k): v for k, v in self.logit_bias.items()},
            # Engines count seeds from 0; a negative one is as good as any other.
            "seed": None if self.seed is None or self.seed == -1 else self.seed % 2**63,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}


class CompletionRequest(Request):
    prompt: Prompts
    max_tokens: Count | None = Field(None, description="Default 16. 0 with echo and logprobs: only score the prompt.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Default true: what the tokenizer puts around a text.")

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one: all texts or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def params(self, max_new_tokens: int) -> SamplingParams:
        """Raises ApiError or ValueError, naming the field."""
        refuse(self, "completion")
        scored = self.logprobs if self.echo else None
        if max_new_tokens == 0 and scored is None:  # nothing to compute, but the engine wants something to do
            scored = 0
        return SamplingParams(
            max_new_tokens=max_new_tokens, logprobs=self.logprobs, prompt_logprobs=scored, **self.common_params()
        )


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Listed[Part] | None = None
    name: str | None = None

    def for_template(self, index: int) -> dict[str, str]:
        """As chat templates read it: one text as content.

        Raises:
            ApiError: The content is absent or not text, or there are tool calls.
        """
        refuse(self, "message", f"messages[{index}].")
        where = f"messages[{index}].content"
        if self.content is None and self.role != "assistant":
            raise ApiError(400, f"{where} is missing; it must be {ALTERNATIVES['content']}", where)
        pieces = [self.content or ""] if not isinstance(self.content, list) else []
        for part in self.content if isinstance(self.content, list) else ():
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"{where} holds a part of type {part.type!r}; only text parts are served", where)
            pieces.append(part.text)
        # Templates know the older name only, and drop what they do not know without a word.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(pieces)} | ({"name": self.name} if self.name else {})


class ChatTemplateInput(BaseModel):
    """Input of a chat template."""

    messages: NonEmptyList[Message]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")

    def template_input(self) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Messages, and the template's variables.

        Raises:
            ApiError: A message holds what is not served, or a variable would replace what the server sets.
        """
        variables = dict(self.chat_template_kwargs or {})
        for name in variables:
            if name in ("messages", "add_generation_prompt", "tools", "documents", "self") or name.endswith("_token"):
                where = f"chat_template_kwargs.{name}"
                raise ApiError(400, f"{where} is not served: it is not a variable of one's own", where)
        if self.add_generation_prompt is not None:
            variables["add_generation_prompt"] = self.add_generation_prompt
        return [message.for_template(index) for index, message in enumerate(self.messages)], variables


class ChatRequest(Request, ChatTemplateInput):
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(None, description="Default: what is left.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_special_tokens: bool | None = Field(None, description="Default false: the template adds its own.")

    def params(self, max_new_tokens: int) -> SamplingParams:
        """Raises ApiError or ValueError, naming the field."""
        refuse(self, "chat")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, f"top_logprobs = {self.top_logprobs} needs logprobs = true", "top_logprobs")
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(max_new_tokens=max_new_tokens, logprobs=wanted, **self.common_params())


class TokenizeRequest(BaseModel):
    """A text, or a conversation for the chat template."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: NonEmptyList[Message] | None = None
    add_special_tokens: bool | None = Field(None, description="Default true for a prompt, false for messages.")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: Listed[TokenId]


def refusal(error: ValueError, body: BaseModel | None = None) -> ApiError:
    """Say in the words of the API what the engine or the tokenizer finds wrong with a request."""
    names = {
        "prompt": "messages" if getattr(body, "messages", None) is not None else "prompt",
        "max_new_tokens": "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens",
        "prompt_logprobs": "logprobs",
    }
    message = re.sub("max_new_tokens|prompt_logprobs", lambda found: names[found[0]], str(error))
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_value"
        return ApiError(400, message, names.get(error.field, error.field), code)
    return ApiError(400, message, names["prompt"] if body and isinstance(error, TokenizerError) else None)


def too_long(prompt: int, most: int | None, limit: int) -> ContextLengthError:
    """The error of a prompt that leaves no room for `most` tokens (None: for one), in words that clients look for:
    they shorten the prompt and ask again.
    """
    wanted = "at least 1 token" if most is None else f"{most} tokens"
    return ContextLengthError(
        f"This model's maximum context length is {limit} tokens. However, the prompt has {prompt} tokens and {wanted} "
        f"are to follow, which is {prompt + (most or 1)} together: the prompt is too long for that"
    )


def refuse(model: BaseModel, kind: str, where: str = "") -> None:
    """Raise ApiError if `model` was given a field of REFUSED[kind] with a value that would change the response."""
    extra = model.model_extra or {}
    for name, harmless in REFUSED[kind].items():
        if (value := extra.get(name)) is not None and value not in harmless:
            allowed = f"; leave it out, or give {harmless[0]!r}" if harmless else "; leave it out"
            raise ApiError(400, f"{where}{name} is not served{allowed}", f"{where}{name}", "unsupported_parameter")


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str | None]:
    """One line about the first thing that pydantic found wrong with a body: (message, field, code)."""
    first = errors[0]
    place = first["loc"][1:]  # without "body"
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at {first['loc'][-1]}", None, None
    if not place:
        return "the body must be a JSON object, sent with Content-Type: application/json", None, None
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        if part == "[key]":  # pydantic's way to say that the key is at fault, not its value
            break
        path += f".{part:.80}" if path else str(part)
        if part in ALTERNATIVES and first["type"] != "missing":
            return f"{path} must be {ALTERNATIVES[part]}", path, "invalid_value"
    if first["type"] == "missing":
        return f"{path} is missing", path, "missing_required_parameter"
    value = first["input"]
    shown = str(value) if isinstance(value, float) and not math.isfinite(value) else f"{value!r:.80}"
    return f"{path} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]}", path, "invalid_value"


# The responses, for the OpenAPI document: they are written by responses.py without these models, which would cost time.


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorObject


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class ResponseMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str
