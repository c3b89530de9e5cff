"""State that the checks of parity share: what is checked, on which backend, and what was found."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.context import WeekContext
from stages.findings import Findings
from stages.reference import Bundle, checkpoint_id

if TYPE_CHECKING:
    from engine.llm import LLM, EngineConfig

DTYPES = ("float32", "bfloat16")


@dataclass
class Context(WeekContext):
    """One parity run: what is checked, on which backend, and what was found."""

    asking: ClassVar[str] = "this check"

    findings: Findings
    folder: Path
    """For files that are gone when the stage ends."""
    simulations: dict[str, Any] = field(default_factory=dict)
    loaded: LLM | None = None

    @cached_property
    def bundle(self) -> Bundle:
        manifest = self.run.find(f"data/hf/{self.model.name}.manifest.json")
        return Bundle(self.run.find(f"data/reference/{self.model.name}"), checkpoint_id(manifest))

    def engine(self, dtype: str) -> EngineConfig:
        """The week's engine in `dtype`."""
        from engine.llm import EngineConfig

        settings: dict[str, Any] = self.settings | {"dtype": dtype}
        if dtype == "float32" and settings["backend"] == "cuda" and settings["kv_cache"] == "paged":
            # The kernels that read pages are not for fp32, and rows as long as the model's positions take much memory.
            settings |= {"kv_cache": "contiguous", "max_batch": min(8, settings["max_batch"])}
        return EngineConfig(**settings)

    def llm(self, dtype: str) -> LLM:
        """The model of the run in `dtype`. One is kept: both may not fit in memory, and loading takes a while."""
        from engine.llm import LLM

        if self.loaded is None or self.loaded.engine.dtype != dtype:
            self.loaded = None
            free(self.gpu)
            self.loaded = LLM(self.path, self.engine(dtype))
            self.loaded.release()  # checks take caches of their own; a request takes the engine's again
        return self.loaded

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the operations that have more than one."""
        return {name: self.settings[name] for name in ("attention", "linear", "sampling")}

    @property
    def dtype(self) -> str:
        """The week's own."""
        return self.settings["dtype"]

    @property
    def backend(self) -> str:
        return self.settings["backend"]

    @property
    def device(self) -> str:
        return self.settings["device"]


def free(gpu: bool) -> None:
    """Gives memory that nothing refers to any more back to the GPU."""
    gc.collect()
    if gpu:
        import torch

        torch.cuda.empty_cache()
