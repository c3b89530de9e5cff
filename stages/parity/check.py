"""A check of parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stages.parity.context import Context


def start_nothing(context: Context) -> None:
    """Nothing: most checks have nothing that runs beside the others."""


@dataclass(frozen=True)
class Check:
    """A check of parity; its name is what a week's list says.

    run: adds the findings. start: begins, before any check runs, what then runs beside them.
    """

    name: str
    run: Callable[[Context], None]
    needs_engine: bool = True
    start: Callable[[Context], None] = start_nothing
