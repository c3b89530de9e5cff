"""A suite of bench: rows that it has with or without a value, what it needs, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from stages.bench.context import Context
from stages.metrics import Listed
from stages.standard import NO_GPU

NO_FORWARD = "no forward pass before w03"


def list_none(context: Context, gpu: bool) -> Iterable[Listed]:
    """No rows, for a suite whose rows are known only once it has run."""
    return ()


def no_knobs(context: Context) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Suite:
    """A suite of bench; its name is what a week's list says.

    measure: adds the rows. needs: "engine" also runs on a CPU, "gpu" does not. rows: those of a host with or without a
    GPU. knobs: what all rows say of what ran them. shared: every week has the rows, those without values where it does
    not list the suite.
    """

    name: str
    measure: Callable[[Context], None]
    needs: Literal["nothing", "engine", "gpu"] = "nothing"
    rows: Callable[[Context, bool], Iterable[Listed]] = list_none
    knobs: Callable[[Context], dict[str, Any]] = no_knobs
    shared: bool = False

    @property
    def needs_engine(self) -> bool:
        return self.needs != "nothing"

    def run(self, context: Context) -> None:
        """Adds the suite's rows: measured where the week lists the suite and the host can, else with the reason."""
        from stages.timing import measurement_lock

        listed = self.name in context.week.bench
        if not listed and not self.shared:
            return
        if self.needs_engine:
            if context.week.engine is None:
                context.rows.add_missing(self.rows(context, True), NO_FORWARD, backend="cuda", tensor_parallel=1)
                return
            knobs = self.knobs(context)
            if not listed:
                reason = f"{context.week.name} does not measure {self.name}"
                context.rows.add_missing(self.rows(context, context.gpu), reason, **knobs)
            if not context.gpu:
                context.rows.add_missing(self.rows(context, True), NO_GPU, **knobs | {"backend": "cuda"})
        if listed and (context.gpu or self.needs != "gpu"):
            with measurement_lock():
                self.measure(context)


def engine_knobs(context: Context) -> dict[str, Any]:
    """The week's engine, for the rows of suites that run it."""
    return context.knobs
