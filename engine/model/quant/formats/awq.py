"""AutoAWQ's "gemm" form. The layer's inputs are the rows of what is stored.

qweight int32 [K, N / 8] and qzeros int32 [G, N / 8]: nibble i of word c is output 8 c + ORDER[i]. scales fp16 [G, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.model.errors import ConfigError
from engine.model.quant.formats.fields import (
    Stored,
    finite,
    four_bits,
    get,
    group_size_of,
    groups_of,
    is_among,
    multiple_of_8,
    names_of,
    only_known,
)
from engine.model.quant.int4 import Int4Matrix, make_int4
from engine.model.quant.nibbles import pack_words, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WHERE = "quantization_config"
FIELDS = frozenset(
    """
    quant_method bits group_size zero_point version format modules_to_not_convert backend do_fuse exllama_config
    fuse_max_seq_len modules_to_fuse meta pack_dtype sym desc_act lm_head checkpoint_format
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class AwqLayer:
    group_size: int

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        multiple_of_8("outputs", rows)
        groups = groups_of(columns, self.group_size)
        if self.group_size != -1 and columns % self.group_size:
            raise ValueError(f"{columns} inputs are not whole groups of {self.group_size}, as AWQ needs")
        return {
            "qweight": Stored(("I32",), (columns, rows // 8)),
            "qzeros": Stored(("I32",), (groups, rows // 8)),
            "scales": Stored(("F16", "BF16", "F32"), (groups, rows)),
        }

    def read(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Matrix:
        codes = unpack_words(tensors["qweight"], rows, ORDER).t()
        zeros = unpack_words(tensors["qzeros"], rows, ORDER).t().contiguous()
        scales = finite(tensors["scales"], "scales").t().contiguous()
        return make_int4(codes.contiguous(), scales, zeros, columns if self.group_size == -1 else self.group_size)


@dataclass(frozen=True)
class Awq:
    group_size: int
    plain: tuple[str, ...]
    method: str = "awq"

    def layer(self, name: str) -> AwqLayer | None:
        return None if is_among(name, self.plain) else AwqLayer(self.group_size)


def parse(fields: Mapping[str, Any]) -> Awq:
    only_known(fields, FIELDS, WHERE)
    four_bits(fields, "bits", WHERE)
    version = str(fields.get("version", fields.get("format", "gemm"))).lower()
    if version != "gemm":
        raise ConfigError(f"{WHERE}.version = {version!r} is not read here; AutoAWQ's 'gemm' form is")
    get(fields, "zero_point", bool, WHERE)  # either way the zero points are in the checkpoint
    size = group_size_of(get(fields, "group_size", int, WHERE), f"{WHERE}.group_size")
    return Awq(size, names_of(fields, "modules_to_not_convert", WHERE))


def pack(matrix: Int4Matrix) -> dict[str, Tensor]:
    """A matrix in this form, without the layer's name.

    Raises:
        ValueError: It has activation order or is NF4, which this form has no place for.
    """
    if matrix.nf4 or matrix.g_idx is not None:
        raise ValueError("AWQ's form has no place for NF4 or for groups that are not columns in a row")
    return {
        "qweight": pack_words(matrix.unpacked().t().contiguous(), ORDER),
        "qzeros": pack_words(matrix.zero_points().t().contiguous(), ORDER),
        "scales": matrix.scales.t().contiguous(),
    }
