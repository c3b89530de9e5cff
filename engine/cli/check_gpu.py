"""`afs check-gpu`."""

import typer

from engine.cli.options import one_line_errors


@one_line_errors
def check_gpu() -> None:
    """Show the driver, each GPU and the kernels it can run. Exit status 1 and the reason when there is none."""
    import torch
    from rich.console import Console
    from rich.table import Table

    driver, reason = _driver()
    if reason is None and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    if reason is None and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU under driver {driver}"
    if reason is not None:
        typer.echo(f"no GPU: {reason}", err=True)
        raise typer.Exit(1)

    from kernels.architectures import BuildError, architecture_of

    table = Table(title=f"driver {driver}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for heading in ("GPU", "name", "sm", "SMs", "memory", "kernels"):
        table.add_column(heading)
    usable = False
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        try:
            kernels, usable = architecture_of((device.major, device.minor)), True
        except BuildError as error:
            kernels = f"none: {error}"
        table.add_row(
            str(index),
            device.name,
            f"sm_{device.major}{device.minor}",
            str(device.multi_processor_count),
            f"{device.total_memory / 2**30:.1f} GiB",
            kernels,
        )
    Console().print(table)
    if not usable:
        typer.echo("no GPU here can run the kernels; they need sm_80 (Ampere) or newer", err=True)
        raise typer.Exit(1)


def _driver() -> tuple[str, str | None]:
    """The driver's version, and why there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return "", f"no NVIDIA driver answers ({error})"
    try:
        if not pynvml.nvmlDeviceGetCount():
            return "", "the NVIDIA driver is there, but it lists no GPU"
        return pynvml.nvmlSystemGetDriverVersion(), None
    finally:
        pynvml.nvmlShutdown()
