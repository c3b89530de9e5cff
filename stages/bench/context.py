"""State that the suites of bench share: what is measured, on what, and where the rows go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.bench.throughput import LATE
from stages.context import WeekContext
from stages.metrics import Rows
from stages.standard import Budget, read_ceilings

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.model.cost import Ceilings

VERSIONS = ("attention", "linear", "sampling", "kv_cache", "cuda_graph", "batching")


@dataclass
class Context(WeekContext):
    """One bench run. What is costly, the model above all, is made when a suite first asks for it."""

    rows: Rows

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def knobs(self) -> dict[str, Any]:
        """Settings that the week's engine ran with, for its rows."""
        versions = {name: self.settings[name] for name in VERSIONS}
        shared = {name: self.settings[name] for name in ("dtype", "backend")}
        return shared | {"tensor_parallel": 1, "kernel_versions": versions}

    @cached_property
    def ceilings(self) -> Ceilings:
        return read_ceilings(self.run, self.gpu)

    @cached_property
    def budget(self) -> Budget:
        """Time that the standard suite may spend, and what it has learnt of the engine's speed."""
        return Budget.on(self.settings["device"])

    @cached_property
    def llm(self) -> LLM:
        """The week's engine with the run's model."""
        from engine.llm import LLM, EngineConfig
        from engine.model.tensors import parameter_count
        from stages.hf import set_threads

        set_threads(parameter_count(self.config))
        llm = LLM(self.path, EngineConfig(**self.settings))
        # Decoding to text is left out of the measurement, as in every other engine's rows.
        llm.tokenizer = None
        return llm

    def add_late(self, suite: str, counts: Mapping[str, float]) -> None:
        """Adds what the engine compiled, loaded and captured while it was measured: nothing, if it was ready when it
        said so."""
        for metric in LATE:
            note = "the engine was not ready: times hold this" if counts[metric] else None
            self.rows.add(
                suite=suite, case="after the engine was ready", metric=metric, value=float(counts[metric]), unit="1",
                better="lower", note=note, **self.knobs,
            )  # fmt: skip
