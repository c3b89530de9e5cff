"""How a model is quantised: method, what codes may stand for, and what is calibrated on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.model.quant.formats.fields import GROUP_SIZES
from engine.model.quant.methods.gptq import ORDERS, Order

METHODS = ("rtn", "gptq", "awq", "nf4", "autoround")
FORMS = ("compressed-tensors", "gptq", "bitsandbytes")


@dataclass(frozen=True)
class Recipe:
    """method: rtn and nf4 take no calibration.
    group_size: inputs that share a scale; -1: a row. nf4 has blocks of 64 of its own.
    symmetric: whether a code of 8 stands for 0 everywhere.
    form: of the checkpoint that is written.
    order: of columns, by gptq ("columns" is told by the form gptq alone).
    samples, length: sequences of calibration and tokens of each.
    steps, batch: of autoround: gradient steps for a layer, sequences in each.
    seed: of which sequences are taken.

    Raises:
        ValueError: A field has a value that does not exist, or two contradict each other.
    """

    method: Literal["rtn", "gptq", "awq", "nf4", "autoround"] = "autoround"
    group_size: int = 128
    symmetric: bool = True
    form: Literal["compressed-tensors", "gptq", "bitsandbytes"] = "compressed-tensors"
    order: Order = "groups"
    samples: int = 128
    length: int = 2048
    steps: int = 200
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "group_size": GROUP_SIZES, "form": FORMS, "order": ORDERS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}")
        for name in ("samples", "length", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if (self.method == "nf4") != (self.form == "bitsandbytes"):
            raise ValueError(
                f"method = {self.method!r} with form = {self.form!r}; nf4 is stored as bitsandbytes, alone"
            )
        if self.method == "gptq" and self.order == "columns" and self.form != "gptq":
            raise ValueError(
                f"order = 'columns' with form = {self.form!r}; it needs form = 'gptq', which tells the order"
            )

    @property
    def calibrates(self) -> bool:
        return self.method in ("gptq", "awq", "autoround")

    def record(self) -> dict[str, Any]:
        """What tells one run from another."""
        return asdict(self)
