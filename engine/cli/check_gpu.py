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

    from kernels.architectures import ARCHITECTURES

    table = Table(title=f"driver {driver}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for heading in ("GPU", "name", "sm", "SMs", "memory", "kernels"):
        table.add_column(heading)
    usable = False
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        paths = _kernel_paths((device.major, device.minor), ARCHITECTURES)
        usable |= bool(paths)
        table.add_row(
            str(index),
            device.name,
            f"sm_{device.major}{device.minor}",
            str(device.multi_processor_count),
            f"{device.total_memory / 2**30:.1f} GiB",
            ", ".join(paths) or "none: older than sm_80",
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


def _kernel_paths(capability: tuple[int, int], architectures: tuple[str, ...]) -> list[str]:
    """Which of the architectures we compile for a GPU of compute `capability` can run, best first.

    A cubin runs on the same major version with the same or a later minor; one marked "a" only on exactly its own.
    """
    found = []
    for name in architectures:
        digits = name.removeprefix("sm_").rstrip("a")
        major, minor = int(digits[:-1]), int(digits[-1])
        exact = name.endswith("a")
        if capability == (major, minor) or (not exact and capability[0] == major and capability[1] >= minor):
            found.append(name)
    return found[::-1]
