"""What the forms of 4-bit checkpoints have in common: the rules of a configuration, and a layer as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from engine.model.errors import ConfigError
from engine.model.quant.int4 import Int4Matrix

GROUP_SIZES = (32, 64, 128, -1)

ANY_LENGTH = (-1,)  # the shape of a list of bytes


@dataclass(frozen=True)
class Stored:
    """A tensor that a layer has in a checkpoint: the safetensors dtypes that it may have, and its shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape in (shape, ANY_LENGTH)


class StoredLayer(Protocol):
    """How a linear layer of N outputs and K inputs lies in a checkpoint."""

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        """What follows the layer's name in those of its tensors, as "qweight".

        Raises:
            ValueError: Such a layer cannot be stored so; says why.
        """
        ...

    def read(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Matrix:
        """The layer of its tensors, which have the dtypes and shapes that `tensors` says.

        Raises:
            ValueError: What they hold is no such matrix; says which value and what would be right.
        """
        ...


class Quantization(Protocol):
    """A checkpoint's `quantization_config`: which of its linear layers have 4 bits, and how they lie in it."""

    @property
    def method(self) -> str:
        """Its `quant_method`."""
        ...

    def layer(self, name: str) -> StoredLayer | None:
        """How the linear layer of this name, as "model.layers.0.mlp.up_proj", is stored; None: in 16 bits.

        Raises:
            ConfigError: In a way that is not read here.
        """
        ...


def get(fields: Mapping[str, Any], field: str, kind: type | tuple[type, ...], where: str) -> Any:
    if field not in fields:
        raise ConfigError(f"{where}.{field} is missing; no default is assumed for it")
    value = fields[field]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{where}.{field} = {value!r} is not a {' or '.join(k.__name__ for k in kinds)}")
    return value


def only_known(fields: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for field, value in fields.items():
        if field not in known:
            raise ConfigError(f"{where}.{field} = {value!r} is not a field known here; it may change results")


def four_bits(fields: Mapping[str, Any], field: str, where: str) -> None:
    bits = get(fields, field, int, where)
    if bits != 4:
        raise ConfigError(f"{where}.{field} = {bits}: weights of {bits} bits are not computed here; 4 bits are")


def group_size_of(value: Any, where: str) -> int:
    if value not in GROUP_SIZES or isinstance(value, bool):
        raise ConfigError(
            f"{where} = {value!r} is not supported; one of {', '.join(map(str, GROUP_SIZES))} (-1: whole rows)"
        )
    return value


def names_of(fields: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A list of module names, which may be null or left out."""
    value = fields.get(field)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{where}.{field} = {value!r} is not a list of module names")
    return tuple(value)


def is_among(name: str, listed: Sequence[str]) -> bool:
    """Whether one of `listed` is the module's name or a run of its parts, as "lm_head", "layers.0" or "self_attn"."""
    return any(f".{key.strip('.')}." in f".{name}." for key in listed)


def groups_of(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def multiple_of_8(what: str, count: int) -> None:
    if count % 8:
        raise ValueError(f"{count} {what} are not a multiple of 8, as the words of eight codes need")


def finite(scales: Tensor, name: str) -> Tensor:
    """`scales` as they are.

    Raises:
        ValueError: One is NaN or Inf.
    """
    bad = ~scales.isfinite()
    if bad.any():
        row, group = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}[{row}, {group}] is {scales[row, group].item()}; scales are finite (negative and 0 are)"
        )
    return scales
