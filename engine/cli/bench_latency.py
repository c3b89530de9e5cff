"""`afs bench latency`."""

import dataclasses
import sys
from typing import Annotated

import typer

from engine.cli.models import describe_measured, load_shaped
from engine.cli.options import (
    BackendOption,
    DtypeOption,
    FormatOption,
    MeasuredArgument,
    ModelOption,
    WeightsOption,
    check_format,
    numbers,
    one_line_errors,
    one_model,
)


@one_line_errors
def latency(
    argument: MeasuredArgument = None,
    model: ModelOption = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time, as 1,8.")] = "1",
    context: Annotated[str, typer.Option(help="Prompt lengths, which are also the contexts of decoding.")] = "128",
    new_tokens: Annotated[int, typer.Option(help="Decode steps of a run.")] = 64,
    tests: Annotated[str | None, typer.Option(help="As llama-bench names them, pp512,tg128,tg128@d1024, in place of "
                                                   "--context and --new-tokens.")] = None,
    repetitions: Annotated[int, typer.Option(help="Runs of each test.")] = 5,
    form: FormatOption = "table",
    weights: WeightsOption = "checkpoint",
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="Capture decode steps, on a GPU.")] = True,
) -> None:  # fmt: skip
    """Time prompts (pp) and decode steps (tg) in llama-bench's columns, each beside what the machine allows at best."""
    from engine.bench.ceilings import measure_ceilings
    from engine.bench.latency import COLUMNS, Case, TooLarge, lines, measure, records, render

    check_format(form)
    if repetitions < 1 or new_tokens < 1:
        raise ValueError(f"{repetitions} repetitions of {new_tokens} new tokens; at least 1 of 1 is needed")
    batches, contexts = numbers("batch", batch), numbers("context", context)
    if tests is None:
        wanted = [Case(length, 0, 0) for length in contexts] + [Case(0, new_tokens, depth) for depth in contexts]
    else:
        wanted = [Case.parse(name) for name in tests.split(",")]
    name, most = one_model(argument, model), max(batches)
    # The caches and graphs are the measurement's own: the engine takes none.
    llm = load_shaped(name, weights, backend, dtype, cuda_graph=False, kv_cache="contiguous", max_batch=most)
    engine = dataclasses.replace(llm.engine, cuda_graph=cuda_graph)
    ceilings = measure_ceilings(llm.weights.device)
    chunk, results = engine.step_tokens, []
    for test in wanted:
        for size in batches:
            try:
                results.append(measure(llm.model, test, size, repetitions, engine.captures, chunk, ceilings))
            except TooLarge as reason:
                typer.echo(f"left out: {test.name}, batch {size}: {reason}", err=True)
    described = describe_measured(llm, name, weights)
    device = described["gpu_info"]
    rows = records(
        results,
        **described,
        n_batch=chunk,
        cuda_graph=engine.captures,
        read_bandwidth=ceilings.bandwidth,
        matrix_rate=ceilings.matrix_rate,
    )
    if form != "table":
        typer.echo(render(rows, form))
        return
    from rich.console import Console
    from rich.table import Table

    assert ceilings.bandwidth is not None and ceilings.matrix_rate is not None
    table = Table(
        title=f"{device}: read {ceilings.bandwidth / 1e12:.3g} TB/s, matrix {ceilings.matrix_rate / 1e12:.3g} TFLOP/s"
    )
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in COLUMNS[:4] else "right", no_wrap=True)
    for line in lines(rows):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
