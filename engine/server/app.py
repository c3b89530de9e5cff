"""The routes: OpenAI's API, vLLM's tokenizer endpoints, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import TemplateSyntaxError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from engine import __version__
from engine.async_llm import AsyncLLM, Encoder, EngineDead, QueueFull
from engine.server import protocol, responses
from engine.server.metrics import Metrics
from engine.server.middleware import ClientGone, Limits, RequestMiddleware
from engine.server.protocol import RETRY, ApiError, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from engine.server.responses import EventStream, Job, Prompt
from engine.server.tokens import TokenTexts

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.sampling_params import SamplingParams
    from engine.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
PAGE = Path(__file__).with_name("page.html")
MAX_SESSION = 512  # characters of a session's name, which is kept as long as its pages


@dataclass(frozen=True)
class Settings:
    """How the server answers.

    Raises:
        ValueError: A value is outside its range; names it and what would be right.
    """

    models: tuple[str, ...]  # served names, of which the first is the one that responses bear
    api_key: str | None = None  # asked of every request that generates
    max_waiting: int = 1024  # requests that may wait for the engine; more are answered 429
    max_body: int = 8 * 2**20  # bytes
    request_timeout: float | None = None  # s that a request may take in the engine; more are answered 504
    cors_origins: tuple[str, ...] = ()  # other sites whose pages may ask
    # names under which the server may be asked, as Host headers have them; *.example.com: all below it; none: any
    allowed_hosts: tuple[str, ...] = ()
    # s that a connection stays open without a request: longer than those of load balancers (60), which must close first
    keep_alive: float = 75.0
    log_prompts: bool = False  # write prompts to the log

    def __post_init__(self) -> None:
        if not self.models or not all(self.models):
            raise ValueError(f"models = {self.models!r}; it must hold at least one name, none of them empty")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("api_key must be printable ASCII characters without spaces, at least one")
        for host in self.allowed_hosts:
            if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?", host):
                raise ValueError(f"allowed_hosts holds {host!r}; it must hold names as example.com or *.example.com")
        for name in ("max_waiting", "max_body"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if not self.keep_alive > 0:
            raise ValueError(f"keep_alive = {self.keep_alive}; it must be above 0")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ValueError(f"request_timeout = {self.request_timeout}; it must be above 0")


def create_app(engine: AsyncLLM, llm: LLM, settings: Settings) -> FastAPI:
    """The application over an engine, which it starts with its own start and stops with its end.

    `app.state.service.draining = True` makes it refuse new work with 503.
    """
    service = Service(engine, llm, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield
        service.encoder.shutdown()

    app = FastAPI(
        title="Attention-From-Scratch",
        version=__version__,
        description="OpenAI's API over a from-scratch LLM inference engine.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    _add_errors(app)
    _add_routes(app, service)
    app.add_middleware(
        RequestMiddleware,  # type: ignore[arg-type]
        limits=Limits(settings.api_key, settings.allowed_hosts, settings.max_body, max_active(llm, settings)),
        answered=service.answered,
        closing=lambda: service.draining,
    )
    if settings.cors_origins:  # around the other, so that a page may read what that refuses
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return app


def max_active(llm: LLM, settings: Settings) -> int:
    """Requests answered at a time: those that wait, those that run, and those whose bodies are being read."""
    return settings.max_waiting + llm.engine.max_batch + 256


class Service:
    """State that the routes share: the engine, its metrics, and how requests are made of bodies."""

    def __init__(self, engine: AsyncLLM, llm: LLM, settings: Settings) -> None:
        self.engine, self.llm, self.settings = engine, llm, settings
        self.texts = TokenTexts(llm.tokenizer) if llm.tokenizer else None
        pages = llm.engine.page_size if llm.engine.kv_cache == "paged" else None
        self.metrics = Metrics(engine.stats, settings.models[0], llm.max_model_len, pages)
        self.created = int(time.time())
        self.encoder = Encoder()
        self.draining = False
        _check_template(llm.tokenizer)

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        self.metrics.responses.labels(path, str(status)).inc()

    def tokenizer(self) -> Tokenizer:
        if self.llm.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer, so it takes token ids and gives none of this")
        return self.llm.tokenizer

    def unavailable(self) -> ApiError:
        why = "the server is shutting down" if self.draining else "the engine has failed; the server's log says how"
        return ApiError(503, why, headers=RETRY)

    def check_model(self, name: str | None) -> str:
        """The name to answer with; ApiError 404 where it is not served."""
        models = self.settings.models
        if name is not None and name not in models:
            served = ", ".join(models)
            raise ApiError(404, f"the model {name!r:.200} does not exist; served: {served}", "model", "model_not_found")
        return name or models[0]

    async def encode(self, text: str, add_special_tokens: bool, limited: bool = True) -> Prompt:
        """A text as a prompt. limited: what is too long for the model whatever its tokens are is refused first."""
        tokenizer = self.tokenizer()

        def encode() -> list[int]:
            if limited:
                tokenizer.check_length(text, self.llm.max_model_len)
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

        before, after = tokenizer.added_ids if add_special_tokens else ([], [])
        return Prompt(text, await self.encoder.run(len(text), encode), (len(before), len(after)))

    def render(self, body: protocol.ChatTemplateInput) -> str:
        """A conversation's prompt."""
        messages, variables = body.template_input()
        try:
            return self.tokenizer().apply_chat_template(messages, **variables)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # a variable of the wrong kind
            raise ApiError(400, f"chat template: {error}", "chat_template_kwargs") from None

    async def completion(self, body: CompletionRequest, request: Request) -> Job:
        """Submit what /v1/completions was asked for."""
        given = body.prompts()
        if len(given) * (body.n or 1) > self.settings.max_waiting:  # there would never be room
            asked = f"{len(given)} prompts of n = {body.n or 1}"
            raise ApiError(400, f"{asked}; at most {self.settings.max_waiting} completions can wait", "prompt")
        special = True if body.add_special_tokens is None else body.add_special_tokens

        prompts = [await self.encode(p, special) if isinstance(p, str) else Prompt(None, p) for p in given]
        return await self._submit(
            body,
            request,
            prompts,
            most=body.max_tokens,
            usual=16,
            chat=False,
            echo=bool(body.echo),
            logprobs=body.logprobs is not None,
        )

    async def chat(self, body: ChatRequest, request: Request) -> Job:
        """Submit what /v1/chat/completions was asked for."""
        text = await asyncio.to_thread(self.render, body)
        return await self._submit(
            body,
            request,
            [await self.encode(text, bool(body.add_special_tokens))],
            most=body.max_completion_tokens or body.max_tokens,
            usual=None,
            chat=True,
            logprobs=bool(body.logprobs),
        )

    async def _submit(
        self,
        body: CompletionRequest | ChatRequest,
        request: Request,
        prompts: Sequence[Prompt],
        most: int | None,
        usual: int | None,
        chat: bool,
        **how: Any,
    ) -> Job:
        """Submit prompts for `most` tokens each; where that is None, for `usual`, or for as many as there is room."""
        limit = self.llm.max_model_len
        params_of: dict[int, SamplingParams] = {}  # many prompts share them
        asked = []
        for prompt in prompts:
            room = limit - len(prompt.ids)
            if room < (1 if most is None else most):
                raise protocol.too_long(len(prompt.ids), most, limit)
            count = most if most is not None else min(usual or room, room)
            if count not in params_of:
                params_of[count] = body.params(count)
            asked.append(params_of[count])
        session = request.headers.get("x-session-id") or body.prompt_cache_key or body.user or None
        if session is not None and len(session) > MAX_SESSION:
            raise ApiError(400, f"a session of {len(session)} characters; at most {MAX_SESSION} are taken", "user")
        job_id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        facts = request.state.facts
        facts |= {"id": job_id, "prompt_tokens": sum(len(p.ids) for p in prompts)}
        if self.settings.log_prompts:
            facts["prompts"] = [prompt.ids if prompt.text is None else prompt.text for prompt in prompts]

        def observe(done: Any) -> None:
            self.metrics.observe(done)
            facts["generated_tokens"] = facts.get("generated_tokens", 0) + len(done.token_ids)
            facts.setdefault("finished", []).append(done.finish_reason)

        async with AsyncExitStack() as stack:  # what was submitted before something fails is aborted
            streams = []
            for index, (prompt, params) in enumerate(zip(prompts, asked, strict=True)):
                try:
                    stream = await self.engine.submit(
                        prompt.ids,
                        params,
                        id=f"{job_id}-{index}",
                        priority=body.priority or 0,
                        timeout=self.settings.request_timeout,
                        session=session,
                    )
                except QueueFull as full:
                    raise ApiError(429, str(full), code="queue_full", headers=RETRY) from None
                except EngineDead:
                    raise self.unavailable() from None
                streams.append(await stack.enter_async_context(stream))
                self.metrics.asked(params.max_new_tokens, params.n)
            options = body.stream_options
            return Job(
                id=job_id,
                chat=chat,
                created=int(time.time()),
                model=self.check_model(body.model),
                n=body.n or 1,
                prompts=list(prompts),
                streams=streams,
                stack=stack.pop_all(),
                tokenizer=self.llm.tokenizer,
                texts=self.texts,
                observe=observe,
                token_ids=bool(body.return_token_ids),
                tokens_as_ids=bool(body.return_tokens_as_token_ids),
                usage_at_end=bool(options and options.include_usage),
                usage_always=bool(options and options.include_usage and options.continuous_usage_stats),
                **how,
            )

    async def respond(self, body: CompletionRequest | ChatRequest, request: Request) -> Response:
        """The response of either endpoint that generates."""
        if self.draining:
            raise self.unavailable()
        self.check_model(body.model)
        with _refusing(body):
            job = await (self.chat(body, request) if isinstance(body, ChatRequest) else self.completion(body, request))
        if body.stream:
            return EventStream(job)

        async def work() -> Response:
            try:
                return _json(await responses.whole(job))
            except EngineDead:
                raise ApiError(500, responses.DEAD) from None

        return await _unless_gone(request, work())


def _add_routes(app: FastAPI, service: Service) -> None:
    settings, llm = service.settings, service.llm
    page = PAGE.read_text(encoding="utf-8")
    policy = _content_security_policy(page)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/health", response_class=Response, responses=_errors(503))
    async def health() -> Response:
        """200 while the server takes requests."""
        if service.draining or service.engine.failure is not None:
            raise service.unavailable()
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": app.version}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """The engine's statistics now, as the page shows them."""
        now = dataclasses.asdict(service.engine.stats())
        return now | {
            "model": settings.models[0],
            "max_batch": llm.engine.max_batch,
            "max_model_len": llm.max_model_len,
            "chat": llm.tokenizer is not None and llm.tokenizer.chat_template is not None,
        }

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "attention-from-scratch",
            "root": settings.models[0],
            "parent": None,
            "max_model_len": llm.max_model_len,
        }

    @app.get("/v1/models", response_model=protocol.ModelList, responses=_errors(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in settings.models]}

    @app.get("/v1/models/{name:path}", response_model=protocol.ModelCard, responses=_errors(401, 404))
    async def model(name: str) -> dict[str, Any]:
        return card(service.check_model(name))

    generating = _errors(400, 401, 404, 408, 413, 429, 500, 503, 504)

    @app.post("/v1/completions", responses=_responses(protocol.CompletionResponse, events=True) | generating)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts: text, or token ids."""
        return await service.respond(body, request)

    @app.post("/v1/chat/completions", responses=_responses(protocol.ChatResponse, events=True) | generating)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The assistant's next message in a conversation."""
        return await service.respond(body, request)

    @app.post("/tokenize", responses=_responses(protocol.TokenizeResponse) | _errors(400, 401, 404, 408, 413))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation."""
        service.check_model(body.model)

        with _refusing(body):
            if (body.prompt is None) == (body.messages is None):
                raise ApiError(400, "one of prompt and messages must be given", "prompt")
            text, special = body.prompt, body.add_special_tokens is not False
            if text is None:
                conversation = protocol.ChatTemplateInput(
                    messages=body.messages or [],
                    add_generation_prompt=body.add_generation_prompt,
                    chat_template_kwargs=body.chat_template_kwargs,
                )
                text, special = await asyncio.to_thread(service.render, conversation), bool(body.add_special_tokens)
            ids = (await service.encode(text, special, limited=False)).ids

        def respond() -> Response:
            texts = [service.texts.text(i) for i in ids] if body.return_token_strs and service.texts else None
            limit = llm.max_model_len
            return _json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})

        return await asyncio.to_thread(respond)

    @app.post("/detokenize", responses=_responses(protocol.DetokenizeResponse) | _errors(400, 401, 404, 408, 413))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        tokenizer = service.tokenizer()
        with _refusing():
            llm.check_ids(body.tokens, "tokens holds", "tokens")
        return _json({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})

    @app.get("/tokenizer_info", responses=_errors(400, 401))
    async def tokenizer_info() -> dict[str, Any]:
        """The special tokens and the chat template, for clients that render it themselves."""
        tokenizer = service.tokenizer()
        return {"tokenizer_class": type(tokenizer).__name__, **tokenizer.special_tokens} | {
            "chat_template": tokenizer.chat_template
        }


def _add_errors(app: FastAPI) -> None:
    def respond(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Response:
        return respond(ApiError(400, *protocol.describe(error.errors())))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.200}: {error.detail}"
        return respond(ApiError(error.status_code, message, headers=error.headers))


@contextmanager
def _refusing(body: BaseModel | None = None) -> Iterator[None]:
    """A ValueError says that what was asked for cannot be done: the engine's and the tokenizer's name what and why."""
    try:
        yield
    except ValueError as error:
        raise protocol.refusal(error, body) from None


def _check_template(tokenizer: Tokenizer | None) -> None:
    """Raises ValueError where the chat template is none; warns where it does not take what is simplest."""
    if tokenizer is None or tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    except Exception as error:
        if isinstance(error.__context__, TemplateSyntaxError) or not isinstance(tokenizer.chat_template, str):
            raise ValueError(f"the model's chat template is broken: {error.__context__ or error}") from None
        log.warning("the chat template does not take a message alone", extra={"why": str(error)})


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client closes its connection first."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(content: Any) -> Response:
    return Response(responses.encode(content).encode(), media_type="application/json")


def _responses(model: type, events: bool = False) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI document's entry for a response, which may come as events too."""
    stream = {"content": {"text/event-stream": {}}} if events else {}
    return {200: {"model": model, "description": "The response.", **stream}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": protocol.ErrorResponse} for status in statuses}


def _content_security_policy(page: str) -> str:
    """Lets the page run its own script and style, and ask this server; nothing else."""

    def digests(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
