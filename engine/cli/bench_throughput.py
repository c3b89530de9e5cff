"""`afs bench throughput`."""

import sys
from typing import Annotated

import typer

from engine.cli.models import describe_measured, load_shaped
from engine.cli.options import (
    ArrivalsOption,
    AskedOption,
    BackendOption,
    CountOption,
    DtypeOption,
    FormatOption,
    LoadSeedOption,
    MeasuredArgument,
    ModelOption,
    PrefixOption,
    PromptTokensOption,
    RateOption,
    ShareGptOption,
    WeightsOption,
    check_format,
    one_line_errors,
    one_model,
)


@one_line_errors
def throughput(
    argument: MeasuredArgument = None,
    model: ModelOption = None,
    num_prompts: CountOption = 64,
    prompt_tokens: PromptTokensOption = "32-1024",
    new_tokens: AskedOption = None,
    prefix_tokens: PrefixOption = 0,
    sharegpt: ShareGptOption = None,
    seed: LoadSeedOption = 1,
    request_rate: RateOption = "inf",
    arrivals: ArrivalsOption = "poisson",
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 256,
    kv_cache: Annotated[str, typer.Option(help="paged, contiguous: a row of the longest length each, or auto: paged "
                                               "where it can.")] = "auto",
    form: FormatOption = "table",
    weights: WeightsOption = "checkpoint",
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="Capture decode steps, on a GPU.")] = True,
) -> None:  # fmt: skip
    """Requests a second and tokens a second, with latencies, beside the floor of what the machine allows."""
    from engine.bench.ceilings import measure_ceilings
    from engine.bench.throughput import bench
    from engine.bench.workloads import Mix, make_source, parse_range, parse_schedules, print_tables, render

    check_format(form)
    schedules = parse_schedules(request_rate, arrivals, seed)
    low, high = parse_range("prompt-tokens", prompt_tokens)
    mix = Mix(num_prompts, low, high, new_tokens or 128, seed, prefix_tokens)
    name = one_model(argument, model)
    llm = load_shaped(name, weights, backend, dtype, cuda_graph, kv_cache=kv_cache, max_batch=max_batch)
    limits = {"new_tokens": new_tokens, "max_total": min(2048, llm.max_model_len)}
    draw = make_source(mix, llm.config.vocab_size, llm.tokenizer, sharegpt, **limits)
    ceilings = measure_ceilings(llm.weights.device)
    engine = llm.engine
    described = describe_measured(llm, name, weights)
    device = described["gpu_info"]
    records = bench(
        llm,
        draw,
        schedules,
        ceilings,
        **described,
        kv_cache=engine.kv_cache,
        max_batch=engine.max_batch,
        n_batch=engine.step_tokens,
        cuda_graph=engine.captures,
        detokenized=llm.tokenizer is not None,
        read_bandwidth=ceilings.bandwidth,
        matrix_rate=ceilings.matrix_rate,
    )
    for record in records:
        if record["late_kernels"] or record["late_graphs"]:
            late = (
                f"{record['late_kernels']} kernels were compiled or loaded and {record['late_graphs']} graphs captured"
            )
            typer.echo(f"{record['run']}: {late} while it was measured: its times hold this", err=True)
    if form != "table":
        typer.echo(render(records, form))
        return
    assert ceilings.bandwidth is not None and ceilings.matrix_rate is not None
    title = (
        f"{name} ({engine.dtype}, {engine.backend}) on {device}: read {ceilings.bandwidth / 1e12:.3g} TB/s, "
        f"matrix {ceilings.matrix_rate / 1e12:.3g} TFLOP/s"
    )
    print_tables(records, title, None if sys.stdout.isatty() else 160)
