"""Forms that checkpoints of 4-bit weights have, a file each, and which one a `quantization_config` announces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model.errors import ConfigError
from engine.model.quant.formats import awq, bitsandbytes, compressed_tensors, gptq
from engine.model.quant.formats.fields import Quantization, Stored, StoredLayer

__all__ = ["Quantization", "Stored", "StoredLayer", "parse"]
PARSERS = {
    "awq": awq.parse,
    "gptq": gptq.parse,
    "compressed-tensors": compressed_tensors.parse,
    "bitsandbytes": bitsandbytes.parse,
}
READ = (
    "AWQ ('gemm'), GPTQ, compressed-tensors ('pack-quantized') and bitsandbytes (NF4) are; "
    "`afs quantize` makes such a checkpoint of one of 16 bits"
)


def parse(fields: Any) -> Quantization:
    """What a `quantization_config` of config.json says.

    Raises:
        ConfigError: It announces a form, a width or a field that is not read here; names it and what would be right.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"quantization_config = {fields!r} is not an object")
    method = fields.get("quant_method")
    if method is None and ("load_in_4bit" in fields or "load_in_8bit" in fields):
        method = "bitsandbytes"
    if method not in PARSERS:
        raise ConfigError(f"quantization_config.quant_method = {method!r} is not read here; {READ}")
    return PARSERS[method](fields)
