"""`afs bench serve`."""

import functools
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.options import (
    ArrivalsOption,
    AskedOption,
    CountOption,
    FormatOption,
    LoadSeedOption,
    PrefixOption,
    PromptTokensOption,
    RateOption,
    ShareGptOption,
    check_format,
    numbers,
    one_line_errors,
)

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


@one_line_errors
def bench_serve(
    url: Annotated[str, typer.Argument(help="The server's root.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its name; default: the first that the server lists.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id with the served model's tokenizer.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="In its place, for completions of random token ids.")] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    num_prompts: CountOption = 64,
    prompt_tokens: PromptTokensOption = "32-1024",
    new_tokens: AskedOption = None,
    prefix_tokens: PrefixOption = 0,
    sharegpt: ShareGptOption = None,
    seed: LoadSeedOption = 1,
    request_rate: RateOption = "inf",
    arrivals: ArrivalsOption = "poisson",
    clients: Annotated[str | None, typer.Option(help="Requests at a time at most, as 8,32 for a run each; default: as "
                                                     "many as arrive.")] = None,
    goodput: Annotated[str | None, typer.Option(help="Count requests within, as 'ttft_ms:500 tpot_ms:50'.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for all tokens; not every server knows this field.")] = True,
    extra_body: Annotated[str | None, typer.Option(help="More fields of every request, as a JSON object.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="AFS_API_KEY", help="Sent as a bearer token.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    form: FormatOption = "table",
) -> None:  # fmt: skip
    """Load an OpenAI-compatible server, ours or another's: throughput, latencies, goodput, errors by kind."""
    import asyncio

    from engine.bench.client import Endpoint, bench, make_body, make_schedules
    from engine.bench.workloads import (
        Mix,
        make_source,
        parse_goodput,
        parse_range,
        parse_schedules,
        print_tables,
        render,
        with_text,
    )
    from engine.model.hub import find_model
    from engine.text.tokenizer import Tokenizer

    check_format(form)
    objectives = parse_goodput(goodput) if goodput else None
    timed = parse_schedules(request_rate, arrivals, seed)
    schedules = make_schedules(timed, numbers("clients", clients) if clients else [])
    low, high = parse_range("prompt-tokens", prompt_tokens)
    mix = Mix(num_prompts, low, high, new_tokens or 128, seed, prefix_tokens)
    loaded = Tokenizer(find_model(tokenizer, "tokenizer")) if tokenizer else None
    if loaded is None and (vocab_size is None or api == "chat"):
        raise ValueError("--tokenizer MODEL is needed (or --vocab-size N, for completions of random token ids)")
    count = functools.partial(_count_tokens, loaded) if loaded else None
    server = Endpoint(url, model or "", api, api_key, timeout, make_body(ignore_eos, extra_body), count)
    ids = vocab_size or (loaded.vocab_size if loaded else 0)
    draw = make_source(mix, ids, loaded, sharegpt, new_tokens=new_tokens)
    texts = (lambda run: with_text(draw(run), loaded)) if loaded and api == "chat" else draw
    records = asyncio.run(bench(server, texts, schedules, objectives))
    if form == "table":
        print_tables(records, f"{records[0]['model']} at {url}, {api}", None if sys.stdout.isatty() else 160)
    else:
        typer.echo(render(records, form))
    for record in records:
        for kind, detail in record["error_details"].items():
            typer.echo(f"{record['run']}: {record['errors'][kind]} of {mix.count} failed, {kind}: {detail}", err=True)
    if not all(record["completed"] for record in records):
        raise typer.Exit(1)


def _count_tokens(tokenizer: "Tokenizer", text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
