"""The "pack-quantized" form of compressed-tensors, which llm-compressor writes and transformers and vLLM read.

weight_packed int32 [N, ceil(K / 8)]: codes in order. weight_scale [N, G] in the model's dtype. weight_shape int64 [2].
Asymmetric: weight_zero_point int32 [ceil(N / 8), G], outputs in order. With activation order "group" also weight_g_idx
int32 [K].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.model.errors import ConfigError
from engine.model.quant.formats.fields import (
    Stored,
    finite,
    four_bits,
    get,
    group_size_of,
    groups_of,
    names_of,
    only_known,
)
from engine.model.quant.int4 import Int4Matrix, in_a_row
from engine.model.quant.nibbles import bytes_of, pack_words, unpack_words

WHERE = "quantization_config"
FORMAT = "pack-quantized"
FIELDS = frozenset(
    """
    quant_method format config_groups ignore kv_cache_scheme quantization_status global_compression_ratio
    sparsity_config transform_config moe_sparsity_config version provider
    """.split()  # noqa: SIM905
)
GROUP_FIELDS = frozenset("targets weights input_activations output_activations format".split())  # noqa: SIM905
WEIGHT_FIELDS = frozenset(
    """
    num_bits type symmetric group_size strategy block_structure dynamic actorder observer observer_kwargs scale_dtype
    zp_dtype
    """.split()  # noqa: SIM905
)
CLASSES = ("Linear", "LinearBase")  # names of a linear layer's class that a target may be


@dataclass(frozen=True)
class CompressedLayer:
    group_size: int
    symmetric: bool
    permuted: bool

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        if self.group_size != -1 and columns % self.group_size:
            raise ValueError(f"{columns} inputs are not whole groups of {self.group_size}, as compressed-tensors needs")
        groups = groups_of(columns, self.group_size)
        stored = {
            "weight_packed": Stored(("I32",), (rows, -(-columns // 8))),
            "weight_scale": Stored(("F16", "BF16", "F32"), (rows, groups)),
            "weight_shape": Stored(("I64", "I32"), (2,)),
        }
        if not self.symmetric:
            stored["weight_zero_point"] = Stored(("I32",), (-(-rows // 8), groups))
        if self.permuted:
            stored["weight_g_idx"] = Stored(("I32",), (columns,))
        return stored

    def read(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Matrix:
        shape = tensors["weight_shape"].tolist()
        if shape != [rows, columns]:
            raise ValueError(f"weight_shape is {shape}; the configuration asks for {[rows, columns]}")
        codes = bytes_of(tensors["weight_packed"], columns)
        scales = finite(tensors["weight_scale"], "weight_scale").contiguous()
        zeros = None
        if not self.symmetric:
            zeros = unpack_words(tensors["weight_zero_point"].t(), rows).t().contiguous()
        g_idx = tensors.get("weight_g_idx")
        if g_idx is not None:
            if (g_idx == -1).all():  # written where no order was found
                g_idx = None
            elif ((g_idx < 0) | (g_idx >= scales.shape[1])).any():
                raise ValueError(
                    f"weight_g_idx holds {int(g_idx.min())} … {int(g_idx.max())}; there are groups 0 … "
                    f"{scales.shape[1] - 1}"
                )
        size = columns if self.group_size == -1 else self.group_size
        return Int4Matrix(codes, scales, zeros, columns, size, None if in_a_row(g_idx, size) else g_idx)


@dataclass(frozen=True)
class CompressedTensors:
    """groups: in the file's order, which modules and how they are stored."""

    groups: tuple[tuple[tuple[str, ...], CompressedLayer], ...]
    ignore: tuple[str, ...]
    method: str = "compressed-tensors"

    def layer(self, name: str) -> CompressedLayer | None:
        """How `name` is stored: as the group says that names it, else one whose pattern it matches, else of all."""
        if any(_matches(name, target) for target in self.ignore):
            return None
        for kind in (_is_name, _is_pattern, _is_class):
            for targets, layer in self.groups:
                if any(kind(target) and _matches(name, target) for target in targets):
                    return layer
        return None


def _is_class(target: str) -> bool:
    return target in CLASSES


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_name(target: str) -> bool:
    return not _is_class(target) and not _is_pattern(target)


def _matches(name: str, target: str) -> bool:
    if _is_pattern(target):
        return re.match(target.removeprefix("re:"), name) is not None
    return _is_class(target) or target == name


def parse(fields: Mapping[str, Any]) -> CompressedTensors:
    only_known(fields, FIELDS, WHERE)
    form = get(fields, "format", str, WHERE)
    if form != FORMAT:
        raise ConfigError(f"{WHERE}.format = {form!r} is not read here; {FORMAT!r} with integers of 4 bits is")
    for field in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        given = fields.get(field)
        if given and not (field == "sparsity_config" and given.get("format") == "dense"):
            raise ConfigError(f"{WHERE}.{field} = {given!r} is not computed here; weights alone may be quantised")
    groups = []
    for name, group in get(fields, "config_groups", dict, WHERE).items():
        where = f"{WHERE}.config_groups.{name}"
        if not isinstance(group, dict):
            raise ConfigError(f"{where} = {group!r} is not an object of targets and weights")
        groups.append((_targets(group, where), _layer(group, where)))
    ignore = names_of(fields, "ignore", WHERE)
    _compiled(ignore, f"{WHERE}.ignore")
    return CompressedTensors(tuple(groups), ignore)


def _targets(group: Mapping[str, Any], where: str) -> tuple[str, ...]:
    targets = names_of(group, "targets", where)
    if not targets:
        raise ConfigError(f"{where}.targets is missing or empty; names, patterns or 'Linear' were expected")
    _compiled(targets, f"{where}.targets")
    return targets


def _compiled(targets: Sequence[str], where: str) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if _is_pattern(target) else "")
        except re.error as error:
            raise ConfigError(f"{where}: {target!r} is not a regular expression ({error})") from None


def _layer(group: Mapping[str, Any], where: str) -> CompressedLayer:
    only_known(group, GROUP_FIELDS, where)
    for field in ("input_activations", "output_activations"):
        if group.get(field) is not None:
            raise ConfigError(f"{where}.{field} = {group[field]!r}: activations have 16 bits here; it must be null")
    if group.get("format") not in (None, FORMAT):
        raise ConfigError(f"{where}.format = {group['format']!r} is not read here; {FORMAT!r} is")
    weights = get(group, "weights", dict, where)
    where += ".weights"
    only_known(weights, WEIGHT_FIELDS, where)
    four_bits(weights, "num_bits", where)
    if weights.get("type", "int") != "int":
        raise ConfigError(f"{where}.type = {weights['type']!r} is not computed here; 'int' is (NVFP4 and FP8 are not)")
    if weights.get("dynamic") or weights.get("block_structure"):
        raise ConfigError(f"{where} asks for dynamic scales or blocks of rows; scales of groups or rows are read here")
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") == -1 else "group")
    if strategy not in ("group", "channel"):
        raise ConfigError(f"{where}.strategy = {strategy!r} is not read here; 'group' and 'channel' are")
    size = -1 if strategy == "channel" else group_size_of(weights.get("group_size"), f"{where}.group_size")
    permuted = weights.get("actorder") in ("group", "dynamic", True)
    return CompressedLayer(size, get(weights, "symmetric", bool, where), permuted)


def pack(matrix: Int4Matrix) -> dict[str, Tensor]:
    """A matrix in this form, without the layer's name.

    Raises:
        ValueError: It is NF4, or its columns have an order: readers of this form have given that up.
    """
    if matrix.nf4 or matrix.g_idx is not None:
        raise ValueError("compressed-tensors has no place for NF4 or for groups that are not columns in a row")
    packed = {
        "weight_packed": pack_words(matrix.unpacked()),
        "weight_scale": matrix.scales.contiguous(),
        "weight_shape": torch.tensor(matrix.shape, dtype=torch.int64),
    }
    if matrix.zeros is not None:
        packed["weight_zero_point"] = pack_words(matrix.zeros.t().contiguous()).t().contiguous()
    return packed


def settings(group_size: int, symmetric: bool, plain: Sequence[str], actorder: bool = False) -> dict[str, Any]:
    """A `quantization_config` that says how `pack` writes linear layers; `plain` are those of 16 bits."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": "weight" if actorder else None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
