"""`afs serve`."""

import dataclasses
from typing import Annotated

import typer

from engine.cli.models import make
from engine.cli.options import (
    BackendOption,
    DtypeOption,
    LengthOption,
    ModelArgument,
    ModelOption,
    WeightsOption,
    one_line_errors,
    one_model,
)

SERVED_STEP_TOKENS = 2048  # of a server's passes: longer ones keep those waiting that decode


@one_line_errors
def serve(
    argument: ModelArgument = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback, set an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one; the log says which.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the model in the API; may be given more than once. Default: the folder's, or the hub id."
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="AFS_API_KEY", help="Key that requests must bring.")] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.")] = 1024,
    max_model_len: LengthOption = None,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of one forward pass; longer prompts take several. Default: 256 on a CPU, else 2048."),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in the KV cache; default: what a GPU's memory has room for, on a CPU 1 GiB."),
    ] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take.")] = None,
    max_body: Annotated[int, typer.Option(help="Bytes that a request's body may have.")] = 8 * 2**20,
    grace: Annotated[float, typer.Option(help="Seconds that requests have to end in when the server is to stop.")] = 30,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Site whose pages may ask; may be given more than once.")
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Names under which the server may be asked, as example.com or *.example.com, separated by commas; "
            "against pages that give their own name to this address. May be given more than once. Default: any."
        ),
    ] = None,
    keep_alive: Annotated[
        float, typer.Option(help="Seconds that a connection stays open without a request; longer than a proxy's.")
    ] = 75,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[
        str, typer.Option(help="json, text, or auto: text where stderr is a terminal, else json.")
    ] = "auto",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "checkpoint",
) -> None:
    """Serve a model over OpenAI's API, with a page to chat with it at /. Ends on Ctrl-C or SIGTERM."""
    from engine.llm import EngineConfig
    from engine.model.hub import model_name
    from engine.server.app import Settings
    from engine.server.serve import serve as run

    name = one_model(argument, model)
    settings = Settings(
        models=tuple(served_model_name or [model_name(name)]),
        api_key=api_key,
        max_waiting=max_waiting,
        max_body=max_body,
        request_timeout=request_timeout,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(name for names in allowed_hosts or () for name in names.split(",")),
        keep_alive=keep_alive,
        log_prompts=log_prompts,
    )
    engine = EngineConfig.for_machine(
        backend,
        dtype=dtype,
        kv_tokens=kv_tokens,
        max_batch=max_batch,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
    )
    if max_step_tokens is None:
        engine = dataclasses.replace(engine, max_step_tokens=min(SERVED_STEP_TOKENS, engine.step_tokens))
    run(lambda: make(name, weights, engine), settings, host, port, grace, log_level, log_format)
