"""`afs build`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.models import dtype_of, read_config
from engine.cli.options import DtypeOption, ModelArgument, ModelOption, one_line_errors, one_model

if TYPE_CHECKING:
    from kernels.cubins import Build
    from kernels.launch import Kernel


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
    kernel: Annotated[
        str | None, typer.Option(help="Not a model's kernels but those of the catalogue with this in their name.")
    ] = None,
) -> None:
    """Compile what a model needs ahead of time, with no GPU: images, CI and rented hosts then start at once.

    MODEL may also be a file of conf/model/. The kernels are kept in $AFS_CACHE (default ~/.cache/afs); on a GPU host of
    the same architecture nothing is left to compile. With --kernel a line says what each kernel needs.
    """
    import torch

    from engine.config import EngineConfig
    from engine.runtime.startup import kernels_of
    from kernels.architectures import ARCHITECTURES, MULTIPROCESSORS
    from kernels.cubins import cache_directory
    from kernels.launch import machine_of

    here = dict([machine_of(0)]) if torch.cuda.is_available() else {}
    archs = arch.split(",") if arch else [*here] or [*ARCHITECTURES]
    if unknown := [name for name in archs if name not in ARCHITECTURES]:
        raise ValueError(f"arch = {unknown[0]!r}; it must be one or more of {', '.join(ARCHITECTURES)}")
    if kernel:
        for built in _compile(_find(kernel, archs), archs):
            typer.echo(_describe(built))
        return
    config = read_config(one_model(argument, model))
    count = 0
    for name in archs:
        machine = name, multiprocessors or here.get(name) or MULTIPROCESSORS[name]
        kernels = {}
        for cache in ("auto", "contiguous"):
            engine = EngineConfig.for_machine(
                "cuda", device="cuda", dtype=dtype, kv_cache=cache, max_batch=max_batch, max_step_tokens=max_step_tokens
            ).for_dtype(dtype_of(config))
            kernels |= {kernel.name: kernel for kernel in kernels_of(config, engine, machine=machine)}
        count += len(_compile([*kernels.values()], [name]))
    typer.echo(f"{count} kernels for {', '.join(archs)} are in {cache_directory()}")


def _find(part: str, archs: Sequence[str]) -> "list[Kernel]":
    """The kernels of the catalogue with `part` in their name. Raises ValueError where none is for one of `archs`."""
    from kernels import catalogue

    kernels = catalogue()
    found = [kernel for kernel in kernels if part in kernel.name]
    if not found:
        first = ", ".join(sorted({kernel.name.partition("_")[0] for kernel in kernels}))
        raise ValueError(f"kernel = {part!r}: no kernel of the catalogue has that in its name; they begin with {first}")
    served = {arch for kernel in found for arch in kernel.architectures}
    if not served & set(archs):
        raise ValueError(
            f"kernel = {part!r}: these kernels are for {', '.join(sorted(served))}, not {', '.join(archs)}"
        )
    return found


def _compile(kernels: "Sequence[Kernel]", archs: Sequence[str]) -> "list[Build]":
    """Every kernel for every architecture that it is for. Raises ValueError where one does not compile."""
    from engine.runtime.progress import compile_kernels
    from kernels.architectures import BuildError

    try:
        return compile_kernels(kernels, archs)
    except BuildError as error:
        raise ValueError(str(error)) from None


def _describe(build: "Build") -> str:
    return (
        f"{build.kernel} {build.arch}: {build.registers} registers, {build.spills} B of spills, {build.stack} B of "
        f"stack, {build.static_shared + build.dynamic_shared} B of shared memory, occupancy {build.occupancy:.2f}"
    )
