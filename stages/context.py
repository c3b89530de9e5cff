"""What parity and bench of a week share: the run's checkpoint, and the week's engine on this host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.params import Model, ParamsError, Week, Workload
from stages.stage import Run

if TYPE_CHECKING:
    from engine.model.config import ModelConfig
    from engine.ops.protocol import Ops


@dataclass
class WeekContext:
    """One run of a week. What is costly is made when it is first asked for."""

    asking: ClassVar[str] = "this"
    """Who needs an engine, where the week has none."""

    run: Run
    model: Model
    week: Week
    workload: Workload
    gpu: bool

    @cached_property
    def path(self) -> Path:
        return self.run.find_snapshot(self.model.name)

    @cached_property
    def config(self) -> ModelConfig:
        from engine.model.config import ModelConfig

        return ModelConfig.from_file(self.path)

    @cached_property
    def ops(self) -> Ops | None:
        """The operations of the week's engine, whose form of storing weights loading takes; None without an engine."""
        from engine.config import EngineConfig, make_ops

        return None if self.week.engine is None else make_ops(EngineConfig(**self.settings))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The week's EngineConfig fields on this host. Raises ParamsError where the week has no engine."""
        if self.week.engine is None:
            raise ParamsError(f"weeks.{self.week.name}.engine is null: {self.asking} needs an engine")
        return self.week.engine.settings(self.gpu, self.config.max_position_embeddings)
