"""Progress of work that somebody waits for, compiling above all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.cubins import Build
    from kernels.launch import Kernel

log = logging.getLogger(__name__)


@contextmanager
def show_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr until the work is done.

    The function given moves it: `advance` or `completed`, a number, and `at`, the name of what was done last.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    last = TextColumn("{task.fields[at]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), last)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, at="")
        yield lambda **moved: bar.update(task, **moved)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show how far `total` pieces of work are: a bar on stderr where that is a terminal, else a line at the start.

    The function given is called with a piece's name when it is done. The line goes to the log where somebody has set
    one up.
    """
    if sys.stderr.isatty() and not log.hasHandlers():
        with show_bar(what, total) as move:
            yield lambda name: move(advance=1, at=name)
        return
    if log.hasHandlers():
        log.info("%s: %d", what, total)
    else:
        print(f"{what}: {total}", file=sys.stderr, flush=True)
    yield lambda name: None


def compile_kernels(kernels: Sequence[Kernel], archs: Sequence[str]) -> list[Build]:
    """Compile every kernel for every architecture on all cores, but for those that are kept, and show progress.

    Raises:
        BuildError: One does not compile.
    """
    from kernels.compile import build_all

    with ExitStack() as stack:
        show: list[Callable[[str], None]] = []

        def update(done: int, total: int, name: str) -> None:
            if done:
                show[0](name)
            else:
                show.append(stack.enter_context(progress(f"compiling kernels for {', '.join(archs)}", total)))

        return build_all(kernels, archs, progress=update)
