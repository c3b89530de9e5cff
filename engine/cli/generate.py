"""`afs generate` and `afs chat`."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.models import load
from engine.cli.options import (
    BackendOption,
    CacheOption,
    DtypeOption,
    LengthOption,
    MinPOption,
    ModelArgument,
    ModelOption,
    NewTokensOption,
    PenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    one_line_errors,
    one_model,
)

if TYPE_CHECKING:
    from engine.llm import LLM, Completion
    from engine.sampling_params import SamplingParams


def _print_stream(pieces: Iterator[str]) -> "Completion":
    """Write pieces to stdout as they come; the finished completion."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            sys.stdout.write("\n")
            sys.stdout.flush()
            return end.value
        sys.stdout.write(piece)
        sys.stdout.flush()


def _print_timing(done: "Completion") -> None:
    rest = done.itl_ms
    speed = f", then {1e3 * len(rest) / sum(rest):.1f} tokens/s" if rest else ""
    typer.echo(
        f"{len(done.prompt_token_ids)} prompt tokens, first token after {done.ttft_ms:.0f} ms{speed}; "
        f"{len(done.token_ids)} tokens in {done.e2e_ms:.0f} ms, ended by {done.finish_reason}",
        err=True,
    )


@one_line_errors
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    argument: ModelArgument = None,
    model: ModelOption = None,
    max_new_tokens: NewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at end-of-sequence tokens.")] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache: CacheOption = None,
    max_model_len: LengthOption = None,
) -> None:
    """Continue a text: the continuation goes to stdout as it is generated, a line of timings to stderr."""
    from engine.sampling_params import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    llm = load(one_model(argument, model), backend, dtype, kv_cache, max_model_len)
    _print_timing(_print_stream(llm.stream(prompt, params)))


@one_line_errors
def chat(
    argument: ModelArgument = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    max_new_tokens: NewTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: LengthOption = None,
) -> None:
    """Talk with a model that has a chat template. An empty line is skipped; end with Ctrl-D or /exit."""
    from engine.sampling_params import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    llm = load(one_model(argument, model), backend, dtype, None, max_model_len)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        done = _reply(llm, messages, params)
        messages.append({"role": "assistant", "content": done.text})
        _print_timing(done)


def _reply(llm: "LLM", messages: list[dict[str, Any]], params: "SamplingParams") -> "Completion":
    if llm.tokenizer is None:
        raise ValueError("this model has no tokenizer.json")
    prompt = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return _print_stream(llm.stream(llm.tokenizer.encode(prompt, add_special_tokens=False), params))
