"""A checkpoint of 4-bit weights has the logits of the dense one that its codes stand for, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from engine_checkpoints import Reference
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.errors import ConfigError
from engine.model.linear import DenseLinear
from engine.model.quant.formats import awq, bitsandbytes, compressed_tensors, gptq
from engine.model.quant.grid import Grid, nearest_nf4
from engine.model.quant.int4 import Int4Matrix
from engine.model.quant.linear import Int4Linear, StackedLinear
from engine.model.safetensors import CheckpointError
from engine.model.tensors import checkpoint_tensors
from engine.model.transformer import Model
from engine.model.weights import load_weights
from engine.ops.batch import Batch
from engine.ops.reference import ReferenceOps

Pack = Callable[[Int4Matrix], dict[str, Tensor]]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
COMPRESSED = compressed_tensors.settings(32, True, ["lm_head"])
FINE = Grid(32, False, torch.float16)
COARSE = Grid(64, True, torch.float16)


def quantised(weight: Tensor, grid: Grid | None) -> Int4Matrix:
    return nearest_nf4(weight.float()) if grid is None else grid.nearest(weight.float())


def shuffled(matrix: Int4Matrix) -> dict[str, Tensor]:
    """As GPTQ stores it with activation order: a matrix whose groups are every second column, and so on."""
    count = matrix.scales.shape[1]
    return gptq.pack(replace(matrix, g_idx=(torch.arange(matrix.columns) % count).int()))


FORMS: dict[str, tuple[dict[str, Any], Grid | None, Pack]] = {
    "awq": (AWQ, FINE, awq.pack),
    "gptq": (GPTQ, COARSE, gptq.pack),
    "gptq-v2-asym": (
        GPTQ | {"group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}, FINE, lambda m: gptq.pack(m, 2),
    ),
    "gptq-order": (GPTQ | {"desc_act": True}, COARSE, shuffled),
    "compressed": (COMPRESSED, Grid(32, True, torch.bfloat16), compressed_tensors.pack),
    "compressed-asym": (compressed_tensors.settings(32, False, ["lm_head"]), FINE, compressed_tensors.pack),
    "compressed-row": (
        compressed_tensors.settings(-1, True, ["lm_head"]), Grid(-1, True, torch.bfloat16), compressed_tensors.pack,
    ),
    "nf4": (bitsandbytes.settings(("lm_head",), "bfloat16"), None, bitsandbytes.pack),
}  # fmt: skip


def stored(reference: Reference, grid: Grid | None, pack: Pack, only: str = "") -> dict[str, Tensor]:
    """A model's tensors, those of its layers' matrices whose names hold `only` packed."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in reference.model.state_dict().items():
        if "_proj" in name and only in name:
            parts = pack(quantised(tensor.bfloat16(), grid))
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        elif name != "lm_head.weight" or not reference.model.config.tie_word_embeddings:
            tensors[name] = tensor.bfloat16().clone()
    return tensors


def save(reference: Reference, path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> Path:
    path.mkdir(exist_ok=True, parents=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    fields = json.loads((reference.path / "config.json").read_text())
    own = {} if settings is None else {"quantization_config": dict(settings)}
    (path / "config.json").write_text(json.dumps(fields | own))
    return path


def logits(path: Path, dtype: torch.dtype) -> tuple[Model, Tensor]:
    config = ModelConfig.from_file(path)
    model = Model(config, load_weights(path, config, "cpu", dtype), ReferenceOps(), 64)
    tokens = torch.arange(4, 44, dtype=torch.int32) * 7 % 512
    places = torch.arange(40, dtype=torch.int32)
    return model, model.forward(Batch(tokens, torch.zeros_like(tokens), places), model.new_cache(1, 64))


def dense(model: Model, reference: Reference, path: Path, dtype: torch.dtype) -> Path:
    """The checkpoint in `dtype` of what a model's weights stand for."""
    tensors = {t.name: model.weights.read(t).to(dtype).clone() for t in checkpoint_tensors(model.config)}
    return save(reference, path, tensors, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_those_of_the_dense_checkpoint(olmo2: Reference, tmp_path: Path, form: str, dtype: torch.dtype):
    settings, grid, pack = FORMS[form]
    model, got = logits(save(olmo2, tmp_path / "int4", stored(olmo2, grid, pack), settings), dtype)
    for layer in model.weights.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            assert isinstance(linear, Int4Linear), form
            assert linear.nbytes < linear.out_features * linear.in_features
            assert (linear.matrix.g_idx is not None) == (form == "gptq-order")
    assert isinstance(model.weights.lm_head, DenseLinear)
    _, wanted = logits(dense(model, olmo2, tmp_path / "dense", dtype), dtype)
    assert torch.equal(got, wanted) and got.isfinite().all()
    _, other = logits(olmo2.path, dtype)
    assert not torch.equal(got, other)


def test_a_layer_with_norms_before_and_a_tied_head(references: Callable[[str], Reference], tmp_path: Path):
    llama = references("llama")
    settings, grid, pack = FORMS["compressed"]
    model, got = logits(save(llama, tmp_path / "int4", stored(llama, grid, pack), settings), torch.bfloat16)
    _, wanted = logits(dense(model, llama, tmp_path / "dense", torch.bfloat16), torch.bfloat16)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("only", ["q_proj", "k_proj", "up_proj"])
def test_parts_that_are_multiplied_together_and_stored_apart(olmo2: Reference, tmp_path: Path, only: str):
    """One of q, k and v has 4 bits, or one of gate and up: no form holds both, and nothing is rounded otherwise."""
    settings, grid, pack = FORMS["gptq"]
    model, got = logits(save(olmo2, tmp_path / "int4", stored(olmo2, grid, pack, only), settings), torch.bfloat16)
    stacked = model.weights.layers[0].gate_up if only == "up_proj" else model.weights.layers[0].qkv
    assert isinstance(stacked, StackedLinear) and isinstance(model.weights.layers[0].o, DenseLinear)
    assert torch.equal(stacked.rows(30, 150), stacked.rows()[30:150])
    _, wanted = logits(dense(model, olmo2, tmp_path / "dense", torch.bfloat16), torch.bfloat16)
    assert torch.equal(got, wanted)


def test_parts_of_other_groups_and_orders(olmo2: Reference, tmp_path: Path):
    tensors = stored(olmo2, COARSE, gptq.pack)
    for name, weight in olmo2.model.state_dict().items():
        base = name.removesuffix(".weight")
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            parts = gptq.pack(quantised(weight, Grid(32, True, torch.float16)))
            if "v_proj" in name:
                parts = shuffled(quantised(weight, COARSE))
            tensors |= {f"{base}.{part}": value for part, value in parts.items()}
    settings = GPTQ | {"dynamic": {".*k_proj": {"group_size": 32}}}
    model, got = logits(save(olmo2, tmp_path / "int4", tensors, settings), torch.bfloat16)
    assert isinstance(model.weights.layers[0].qkv, StackedLinear)
    _, wanted = logits(dense(model, olmo2, tmp_path / "dense", torch.bfloat16), torch.bfloat16)
    assert torch.equal(got, wanted)


def test_a_head_of_4_bits(olmo2: Reference, tmp_path: Path):
    tensors = stored(olmo2, COARSE, gptq.pack)
    head = gptq.pack(quantised(tensors.pop("lm_head.weight"), COARSE))
    tensors |= {f"lm_head.{part}": value for part, value in head.items()}
    model, got = logits(save(olmo2, tmp_path / "int4", tensors, GPTQ | {"lm_head": True}), torch.bfloat16)
    assert isinstance(model.weights.lm_head, Int4Linear)
    _, wanted = logits(dense(model, olmo2, tmp_path / "dense", torch.bfloat16), torch.bfloat16)
    assert torch.equal(got, wanted)
    with pytest.raises(CheckpointError, match=r"'lm_head.g_idx' is not one of|'lm_head.qweight' is not one of"):
        logits(save(olmo2, tmp_path / "unannounced", tensors, GPTQ), torch.bfloat16)


def test_a_tied_head_beside_the_embedding_is_refused(references: Callable[[str], Reference], tmp_path: Path):
    llama = references("llama")
    tensors = stored(llama, COARSE, gptq.pack)
    head = gptq.pack(quantised(tensors["model.embed_tokens.weight"], COARSE))
    tensors |= {f"lm_head.{part}": value for part, value in head.items()}
    with pytest.raises(CheckpointError, match=r"'lm_head\.\w+' is of a head, and tie_word_embeddings = true"):
        logits(save(llama, tmp_path, tensors, GPTQ | {"lm_head": True}), torch.bfloat16)


Q = "model.layers.1.self_attn.q_proj"


def nan_at_the_end(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq", {f"{Q}.qweight": None}, f"tensor '{Q}.qweight' of Olmo2ForCausalLM is missing"),
        ("gptq", {f"{Q}.qzeros": None}, f"tensor '{Q}.qzeros' of Olmo2ForCausalLM is missing"),
        ("gptq", {f"{Q}.scales": lambda t: t[:1]}, rf"'{Q}.scales' has shape \[1, 128\]; .* \[2, 128\]"),
        ("gptq", {f"{Q}.qweight": lambda t: t.t()}, rf"'{Q}.qweight' has shape \[128, 16\]; .* \[16, 128\]"),
        ("gptq", {f"{Q}.qweight": lambda t: t.float()}, f"'{Q}.qweight' has dtype F32; one of I32 was expected"),
        ("gptq", {f"{Q}.scales": nan_at_the_end}, rf"{Q}: scales\[1, 127\] is nan"),
        ("gptq", {f"{Q}.scales": lambda t: t.float() * 0 + 3e38}, f"{Q}: a weight is Inf as torch.bfloat16"),
        ("gptq", {f"{Q}.g_idx": lambda t: t + 1}, rf"{Q}: g_idx\[64\] is 2; there are groups 0 … 1"),
        ("gptq", {f"{Q}.weight": lambda _: torch.ones(128, 128)}, r"q_proj\.\w+' is not one of.*has 16 bits"),
        ("awq", {f"{Q}.qzeros": lambda t: t[:2]}, rf"'{Q}.qzeros' has shape \[2, 16\]; .* \[4, 16\]"),
        ("compressed", {f"{Q}.weight_shape": lambda t: t * 2}, rf"{Q}: weight_shape is \[256, 256\]"),
        ("compressed-asym", {f"{Q}.weight_zero_point": None}, f"'{Q}.weight_zero_point' of .* is missing"),
        ("compressed", {f"{Q}.weight_scale": lambda t: t[:, :2]}, r"weight_scale' has shape \[128, 2\]; .* \[128, 4\]"),
        ("nf4", {f"{Q}.{bitsandbytes.STATE}": None}, f"'{Q}.{bitsandbytes.STATE}' of .* is missing"),
        ("nf4", {f"{Q}.weight": lambda t: t[:-64]}, rf"'{Q}.weight' has shape \[8128, 1\]; .* \[8192, 1\]"),
    ],
)
def test_refused_by_name(olmo2: Reference, tmp_path: Path, form: str, changes: dict[str, Any], message: str):
    settings, grid, pack = FORMS[form]
    tensors = stored(olmo2, grid, pack)
    for name, change in changes.items():
        before = tensors.pop(name, None)
        if change is not None:
            tensors[name] = change(before)
    with pytest.raises(CheckpointError, match=message):
        logits(save(olmo2, tmp_path, tensors, settings), torch.bfloat16)


def test_configurations_that_contradict_the_tensors(olmo2: Reference, tmp_path: Path):
    settings, grid, pack = FORMS["gptq"]
    tensors = stored(olmo2, grid, pack)
    with pytest.raises(CheckpointError, match=r"has no quantization_config, which a checkpoint of 4-bit weights needs"):
        logits(save(olmo2, tmp_path / "none", tensors, None), torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"\('awq'\) says that its layer has 16 bits, or another form|g_idx"):
        logits(save(olmo2, tmp_path / "awq", tensors, AWQ), torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"has shape \[5, 16\]; the configuration asks for \[10, 16\]"):
        logits(save(olmo2, tmp_path / "groups", tensors, settings | {"group_size": 32}), torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"320 inputs are not whole groups of 128, as compressed-tensors needs"):
        logits(save(olmo2, tmp_path / "whole", {}, compressed_tensors.settings(128, True, ["lm_head"])), torch.bfloat16)
    with pytest.raises(ConfigError, match=r"config.json: quantization_config.bits = 8: weights of 8 bits"):
        ModelConfig.from_file(save(olmo2, tmp_path / "eight", tensors, settings | {"bits": 8}))


def test_a_weight_that_fp16_cannot_hold_is_refused(olmo2: Reference, tmp_path: Path):
    tensors = stored(olmo2, Grid(32, True, torch.bfloat16), compressed_tensors.pack)
    scale = f"{Q}.weight_scale"
    tensors[scale] = torch.full_like(tensors[scale], 30000.0)
    path = save(olmo2, tmp_path, tensors, COMPRESSED)
    with pytest.raises(CheckpointError, match=f"{Q}: a weight is Inf as torch.float16"):
        logits(path, torch.float16)
    assert logits(path, torch.bfloat16)[0].weights.dtype == torch.bfloat16
