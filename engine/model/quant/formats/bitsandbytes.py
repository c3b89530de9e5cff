"""The form of bitsandbytes' NF4. A layer's weight is flat, row after row, in blocks that share an absolute maximum.

weight uint8 [N K / 2, 1]: two codes a byte, the first in the high half. weight.absmax fp32 [blocks]. With double
quantisation weight.absmax is uint8, an index into weight.nested_quant_map fp32 [256], whose value is multiplied by
weight.nested_absmax fp32 of its 256 blocks and added to an offset. weight.quant_map fp32 [16] are NF4's levels, and
weight.quant_state.bitsandbytes__nf4 is JSON in bytes: sizes of blocks, shape, offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.model.errors import ConfigError
from engine.model.quant.formats.fields import ANY_LENGTH, Stored, finite, get, is_among, names_of, only_known
from engine.model.quant.int4 import NF4_LEVELS, Int4Matrix, aligned_blocks, make_int4
from engine.model.quant.nibbles import pack_bytes, unpack_bytes

WHERE = "quantization_config"
BLOCK, NESTED_BLOCK = 64, 256
STATE = "weight.quant_state.bitsandbytes__nf4"
FIELDS = frozenset(
    """
    quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant
    bnb_4bit_compute_dtype bnb_4bit_quant_storage llm_int8_skip_modules llm_int8_threshold
    llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Nf4Layer:
    double: bool

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        blocks = -(-rows * columns // BLOCK)
        stored = {
            "weight": Stored(("U8",), (-(-rows * columns // 2), 1)),
            "weight.absmax": Stored(("U8",) if self.double else ("F32",), (blocks,)),
            "weight.quant_map": Stored(("F32",), (16,)),
            STATE: Stored(("U8",), ANY_LENGTH),
        }
        if self.double:
            stored["weight.nested_absmax"] = Stored(("F32",), (-(-blocks // NESTED_BLOCK),))
            stored["weight.nested_quant_map"] = Stored(("F32",), (256,))
        return stored

    def read(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Matrix:
        levels = torch.tensor(NF4_LEVELS, device=tensors["weight"].device)
        if not torch.equal(tensors["weight.quant_map"], levels):
            raise ValueError("weight.quant_map does not hold NF4's sixteen levels")
        state = self._state(tensors[STATE], rows, columns)
        absmax = tensors["weight.absmax"]
        if self.double:
            values = tensors["weight.nested_quant_map"][absmax.int()]
            nested = tensors["weight.nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(absmax)]
            absmax = values * nested + torch.tensor(state["nested_offset"], dtype=torch.float32, device=values.device)
        scales, group_size = aligned_blocks(finite(absmax[None], "weight.absmax")[0], rows, columns, BLOCK)
        swapped = tensors["weight"].view(1, -1)
        swapped = swapped >> 4 | swapped << 4
        codes = unpack_bytes(swapped, rows * columns).view(rows, columns)
        return make_int4(codes, scales, None, group_size, nf4=True)

    def _state(self, raw: Tensor, rows: int, columns: int) -> dict[str, Any]:
        try:
            state = json.loads(bytes(raw.tolist()).decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{STATE} is not JSON ({error})") from None
        expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [rows, columns]}
        if self.double:
            expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} is a JSON {type(state).__name__}, not an object")
        for field, value in expected.items():
            if state.get(field) != value:
                raise ValueError(f"{STATE}: {field} is {state.get(field)!r}; {value!r} was expected")
        if self.double and not isinstance(state.get("nested_offset"), float | int):
            raise ValueError(f"{STATE}: nested_offset is {state.get('nested_offset')!r}; a number was expected")
        return state


@dataclass(frozen=True)
class BitsAndBytes:
    double: bool
    plain: tuple[str, ...]
    method: str = "bitsandbytes"

    def layer(self, name: str) -> Nf4Layer | None:
        return None if is_among(name, self.plain) else Nf4Layer(self.double)


def parse(fields: Mapping[str, Any]) -> BitsAndBytes:
    only_known(fields, FIELDS, WHERE)
    if fields.get("load_in_8bit") or fields.get("_load_in_8bit"):
        raise ConfigError(f"{WHERE}.load_in_8bit = true: weights of 8 bits are not computed here; NF4 is")
    if not (fields.get("load_in_4bit") or fields.get("_load_in_4bit")):
        raise ConfigError(f"{WHERE}.load_in_4bit is not true; NF4 is what is read of bitsandbytes")
    kind = get(fields, "bnb_4bit_quant_type", str, WHERE)
    if kind != "nf4":
        raise ConfigError(f"{WHERE}.bnb_4bit_quant_type = {kind!r} is not computed here; 'nf4' is")
    storage = fields.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ConfigError(f"{WHERE}.bnb_4bit_quant_storage = {storage!r} is not read here; 'uint8' is")
    double = get(fields, "bnb_4bit_use_double_quant", bool, WHERE)
    return BitsAndBytes(double, names_of(fields, "llm_int8_skip_modules", WHERE))


def pack(matrix: Int4Matrix) -> dict[str, Tensor]:
    """An NF4 matrix of groups of 64 in this form, without the layer's name and without double quantisation.

    Raises:
        ValueError: It is not NF4 in groups of 64.
    """
    if not matrix.nf4 or matrix.group_size != BLOCK or matrix.columns % BLOCK:
        raise ValueError(f"bitsandbytes' form is for NF4 in groups of {BLOCK}")
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(matrix.shape)}
    codes = pack_bytes(matrix.unpacked().reshape(1, -1))
    return {
        "weight": (codes >> 4 | codes << 4).view(-1, 1),
        "weight.absmax": matrix.scales.float().reshape(-1).contiguous(),
        "weight.quant_map": torch.tensor(NF4_LEVELS),
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def settings(plain: tuple[str, ...], dtype: str) -> dict[str, Any]:
    """A `quantization_config` that says how `pack` writes linear layers; `plain` are those of 16 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(plain),
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
