"""`afs build`."""

from typing import Annotated

import typer

from engine.cli.models import dtype_of, read_config
from engine.cli.options import DtypeOption, ModelArgument, ModelOption, one_line_errors, one_model


@one_line_errors
def build(
    argument: ModelArgument = None,
    model: ModelOption = None,
    arch: Annotated[
        str | None, typer.Option(help="Architectures, as sm_90a,sm_120. Default: this machine's GPU's, or all.")
    ] = None,
    multiprocessors: Annotated[
        int | None,
        typer.Option(help="Of the GPU, where it is another than the usual one; products are tiled by them.", min=1),
    ] = None,
    dtype: DtypeOption = "auto",
    max_batch: Annotated[int, typer.Option(help="Requests that will run together, at most.")] = 256,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass, at most.")] = 8192,
) -> None:
    """Compile what a model needs ahead of time, with no GPU: images, CI and rented hosts then start at once.

    MODEL may also be a file of conf/model/. The kernels are kept in $AFS_CACHE (default ~/.cache/afs); on a GPU host of
    the same architecture nothing is left to compile.
    """
    import torch

    from engine.config import EngineConfig
    from engine.runtime.progress import compile_kernels
    from engine.runtime.startup import kernels_of
    from kernels.architectures import ARCHITECTURES, MULTIPROCESSORS
    from kernels.cubins import cache_directory
    from kernels.launch import machine_of

    config = read_config(one_model(argument, model))
    here = dict([machine_of(0)]) if torch.cuda.is_available() else {}
    archs = arch.split(",") if arch else [*here] or [*ARCHITECTURES]
    if unknown := [name for name in archs if name not in ARCHITECTURES]:
        raise ValueError(f"arch = {unknown[0]!r}; it must be one or more of {', '.join(ARCHITECTURES)}")
    count = 0
    for name in archs:
        machine = name, multiprocessors or here.get(name) or MULTIPROCESSORS[name]
        kernels = {}
        for cache in ("auto", "contiguous"):
            engine = EngineConfig.for_machine(
                "cuda", device="cuda", dtype=dtype, kv_cache=cache, max_batch=max_batch, max_step_tokens=max_step_tokens
            ).for_dtype(dtype_of(config))
            kernels |= {kernel.name: kernel for kernel in kernels_of(config, engine, machine=machine)}
        count += len(compile_kernels([*kernels.values()], [name]))
    typer.echo(f"{count} kernels for {', '.join(archs)} are in {cache_directory()}")
