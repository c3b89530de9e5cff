"""The form of GPTQ's tools (AutoGPTQ, GPTQModel). The layer's inputs are the rows of what is stored.

qweight int32 [K / 8, N]: nibble j of row r is input 8 r + j. qzeros int32 [G, N / 8] in order: the zero points, in
version 1 ("gptq") each less one. scales fp16 [G, N]. g_idx int32 [K]: each input's group.

A zero point of 0 is 15 in version 1. GPTQModel takes the ones off a word of eight as one number, so that a 0 borrows
from its neighbour; the others take each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    is_among,
    multiple_of_8,
    names_of,
    only_known,
)
from engine.model.quant.int4 import MIDDLE, Int4Matrix, in_a_row
from engine.model.quant.nibbles import bytes_of, pack_words, unpack_words

WHERE = "quantization_config"
ONES = 0x11111111
FIELDS = frozenset(
    """
    quant_method bits group_size sym desc_act checkpoint_format format lm_head dynamic pack_dtype meta quantizer
    modules_to_not_convert static_groups true_sequential damp_percent damp_auto_increment act_group_aware mse
    model_name_or_path model_file_base_name is_marlin_format tokenizer dataset use_exllama exllama_config
    disable_exllama max_input_length model_seqlen block_name_to_quantize module_name_preceding_first_block
    modules_in_block_to_quantize batch_size pad_token_id use_cuda_fp16 backend cache_block_outputs rotation adapter
    parallel_packing offload_to_disk device offload_to_disk_path hessian gptaq foem failsafe fallback
    hyb_act true_seq autoround_version data_type amp bits_group iters lr minmax_lr nsamples seqlen seed train_bs
    enable_quanted_input enable_minmax_tuning enable_norm_bias_tuning low_gpu_mem_usage low_cpu_mem_usage scale_dtype
    gradient_accumulate_steps provider quant_block_list to_quant_block_names super_bits super_group_size
    """.split()  # noqa: SIM905
)
OVERRIDES = frozenset("bits group_size sym desc_act damp_percent mse".split())  # noqa: SIM905


@dataclass(frozen=True)
class GptqLayer:
    """version: 1 or 2. borrows: whether the zero points of version 1 were made less by words."""

    group_size: int
    symmetric: bool
    version: int
    borrows: bool

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        multiple_of_8("outputs", rows)
        multiple_of_8("inputs", columns)
        groups = groups_of(columns, self.group_size)
        return {
            "qweight": Stored(("I32",), (columns // 8, rows)),
            "qzeros": Stored(("I32",), (groups, rows // 8)),
            "scales": Stored(("F16", "BF16", "F32"), (groups, rows)),
            "g_idx": Stored(("I32",), (columns,), optional=True),
            "bias": Stored(("F16", "BF16", "F32"), (rows,), optional=True),  # of zeros: some tools write one
        }

    def read(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Matrix:
        if "bias" in tensors and tensors["bias"].any():
            raise ValueError("bias is not all zeros; projections have no bias here")
        scales = finite(tensors["scales"], "scales").t().contiguous()
        size = columns if self.group_size == -1 else self.group_size
        g_idx = tensors.get("g_idx")
        if g_idx is not None:
            outside = (g_idx < 0) | (g_idx >= scales.shape[1])
            if outside.any():
                place = int(outside.nonzero()[0, 0])
                raise ValueError(f"g_idx[{place}] is {int(g_idx[place])}; there are groups 0 … {scales.shape[1] - 1}")
        codes, zeros = bytes_of(tensors["qweight"].t(), columns), self._zeros(tensors["qzeros"], rows)
        matrix = Int4Matrix(codes, scales, zeros, columns, size, None if in_a_row(g_idx, size) else g_idx)
        if not self.symmetric:
            self._check_version(matrix)
        return matrix

    def _zeros(self, words: Tensor, rows: int) -> Tensor | None:
        stored = unpack_words(words, rows)
        if self.symmetric:
            if not ((stored == MIDDLE - 1).all() or (stored == MIDDLE).all()):
                raise ValueError(
                    f"qzeros hold zero points that are not {MIDDLE}, and the configuration says sym = true; it must "
                    "say false"
                )
            return None
        if self.version == 1:
            stored = unpack_words(words + ONES, rows) if self.borrows else stored + 1 & 15
        return stored.t().contiguous()

    def _check_version(self, matrix: Int4Matrix) -> None:
        """Refuse zero points that are one off: then all weights of a row lie a step to one side of 0."""
        shares = torch.bincount(matrix.group_of(), minlength=matrix.scales.shape[1]) / matrix.columns
        step = (matrix.unpacked().float().mean() - matrix.zero_points().float().mean(0) @ shares).item()
        wrong = 1 if self.version == 2 else -1
        if abs(step - wrong) < 0.2:
            other = "gptq" if self.version == 2 else "gptq_v2"
            raise ValueError(
                f"the weights lie {step:+.2f} steps from 0 on average: qzeros are as checkpoint_format {other!r} "
                f"stores them, and the configuration says another; correct it there"
            )


@dataclass(frozen=True)
class Gptq:
    """overrides: of GPTQModel's `dynamic`, (pattern, how such layers are stored or None) in order."""

    default: GptqLayer
    head: bool
    plain: tuple[str, ...]
    overrides: tuple[tuple[str, GptqLayer | None], ...]
    method: str = "gptq"

    def layer(self, name: str) -> GptqLayer | None:
        for pattern, layer in self.overrides:
            if re.match(pattern, name):
                return layer
        if is_among(name, self.plain) or (name == "lm_head" and not self.head):
            return None
        return self.default


def parse(fields: Mapping[str, Any]) -> Gptq:
    only_known(fields, FIELDS, WHERE)
    form = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2") or fields.get("is_marlin_format"):
        form = "marlin" if fields.get("is_marlin_format") else form
        raise ConfigError(f"{WHERE}.checkpoint_format = {form!r} is not read here; 'gptq' and 'gptq_v2' are")
    if fields.get("pack_dtype", "int32") not in ("int32", None):
        raise ConfigError(f"{WHERE}.pack_dtype = {fields['pack_dtype']!r} is not read here; 'int32' is")
    get(fields, "desc_act", bool, WHERE)  # either way g_idx says which inputs are a group
    default = _layer(fields, WHERE, 2 if form == "gptq_v2" else 1, _quantizer(fields))
    overrides = []
    dynamic = fields.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ConfigError(f"{WHERE}.dynamic = {dynamic!r} is not an object of patterns")
    for key, changes in dynamic.items():
        pattern = key[2:] if key.startswith(("+:", "-:")) else key
        where = f"{WHERE}.dynamic[{key!r}]"
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where} is not a regular expression ({error})") from None
        if key.startswith("-:"):
            overrides.append((pattern, None))
            continue
        if not isinstance(changes, dict):
            raise ConfigError(f"{where} = {changes!r} is not an object of fields")
        only_known(changes, OVERRIDES, where)
        merged = {name: fields.get(name) for name in ("bits", "group_size", "sym")} | changes
        overrides.append((pattern, _layer(merged, where, default.version, default.borrows)))
    plain = names_of(fields, "modules_to_not_convert", WHERE)
    return Gptq(default, bool(fields.get("lm_head")), plain, tuple(overrides))


def _layer(fields: Mapping[str, Any], where: str, version: int, borrows: bool) -> GptqLayer:
    four_bits(fields, "bits", where)
    size = group_size_of(get(fields, "group_size", int, where), f"{where}.group_size")
    return GptqLayer(size, get(fields, "sym", bool, where), version, borrows)


def _quantizer(fields: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote the checkpoint, as `meta.quantizer` says."""
    meta = fields.get("meta")
    named = meta.get("quantizer", "") if isinstance(meta, dict) else fields.get("quantizer", "")
    return "gptqmodel" in str(named).lower()


def pack(matrix: Int4Matrix, version: int = 1) -> dict[str, Tensor]:
    """A matrix in this form, without the layer's name; the zero points of version 1 each less one by itself.

    Raises:
        ValueError: It is NF4, or N or K is no multiple of 8.
    """
    if matrix.nf4:
        raise ValueError("GPTQ's form has no place for NF4")
    for what, count in zip(("outputs", "inputs"), matrix.shape, strict=True):
        multiple_of_8(what, count)
    zeros = matrix.zero_points() - (1 if version == 1 else 0) & 15
    return {
        "qweight": pack_words(matrix.unpacked()).t().contiguous(),
        "qzeros": pack_words(zeros.t().contiguous()),
        "scales": matrix.scales.t().contiguous(),
        "g_idx": matrix.group_of().to(torch.int32),
    }


def version_of(symmetric: bool) -> int:
    """Of what is written: 1, which all tools read, where zero points are 8; else 2, which has no offset to misread."""
    return 1 if symmetric else 2


def settings(group_size: int, symmetric: bool, ordered: bool) -> dict[str, Any]:
    """A `quantization_config` that says how `pack` writes linear layers; all but the head."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": ordered,
        "checkpoint_format": "gptq" if version_of(symmetric) == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
    }
