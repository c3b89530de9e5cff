"""Every tensor of a checkpoint reaches its place in the fused layout once, or loading names what is wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from engine_checkpoints import Reference

from engine.model.architectures import ARCHITECTURES
from engine.model.config import ModelConfig
from engine.model.cost import Footprint
from engine.model.safetensors import CheckpointError
from engine.model.tensors import checkpoint_tensors, parameter_count, tensor_shapes
from engine.model.transformer import Model
from engine.model.weights import load_weights, random_weights, stored_dtype
from engine.ops.batch import Batch
from engine.ops.reference import ReferenceOps

SMALL = {
    "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "vocab_size": 10, "eos_token_id": None,
}  # fmt: skip


def test_tensors_equal_transformers(reference: Reference):
    config = ModelConfig.from_file(reference.path)
    weights = load_weights(reference.path, config, "cpu", torch.float32)
    state = reference.model.state_dict()
    assert torch.equal(weights.embedding, state["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head.rows(), state["lm_head.weight"])
    assert (weights.lm_head.tensors()["weight"] is weights.embedding) == config.tie_word_embeddings
    assert torch.equal(weights.norm, state["model.norm.weight"])
    arch = config.architecture
    attention_norm, mlp_norm = arch.attention_norm, arch.mlp_norm
    for index, layer in enumerate(weights.layers):
        get = {name: state.get(f"model.layers.{index}.{name}.weight") for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj", "self_attn.q_norm", "self_attn.k_norm", attention_norm, mlp_norm,
        )}  # fmt: skip
        assert torch.equal(layer.qkv.rows(), torch.cat([get[f"self_attn.{n}_proj"] for n in "qkv"]))
        assert torch.equal(layer.gate_up.rows(), torch.cat([get["mlp.gate_proj"], get["mlp.up_proj"]]))
        assert torch.equal(layer.o.rows(), get["self_attn.o_proj"])
        assert torch.equal(layer.down.rows(), get["mlp.down_proj"])
        assert torch.equal(layer.attention_norm, get[attention_norm]) and torch.equal(layer.mlp_norm, get[mlp_norm])
        if layer.q_norm is not None and layer.k_norm is not None:
            assert arch.qk_norm == "full"
            assert torch.equal(layer.q_norm, get["self_attn.q_norm"])
            assert torch.equal(layer.k_norm, get["self_attn.k_norm"])
        else:
            assert layer.q_norm is layer.k_norm is None and arch.qk_norm == "none"
    stored = sum(file.stat().st_size for file in reference.path.glob("*.safetensors"))
    assert weights.statistics is not None
    assert weights.nbytes == 4 * parameter_count(config) == weights.statistics.bytes < stored
    assert weights.step_bytes == Footprint.dense(config, torch.float32).weight_bytes
    assert weights.statistics.seconds > 0 and weights.statistics.gigabytes_per_second > 0


def test_shards_and_casts(olmo2: Reference, tmp_path: Path):
    olmo2.model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    config = ModelConfig.from_file(tmp_path)
    whole = load_weights(olmo2.path, config, "cpu", torch.float32)
    parts = load_weights(tmp_path, config, "cpu", torch.bfloat16)
    for (name, a), (_, b) in zip(whole.named_tensors(), parts.named_tensors(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float32, "bfloat16")],
    ids=str,
)
def test_what_a_checkpoint_runs_in(olmo2: Reference, tmp_path: Path, stored: torch.dtype, expected: str):
    copy.deepcopy(olmo2.model).to(stored).save_pretrained(tmp_path)
    config = ModelConfig.from_file(tmp_path)
    assert config.dtype == str(stored).removeprefix("torch.")
    assert stored_dtype(tmp_path, config) == expected
    # Where config.json does not say, the tensors do.
    assert stored_dtype(tmp_path, replace(config, dtype=None)) == expected


def test_what_fp16_cannot_hold_is_refused(olmo2: Reference, tmp_path: Path):
    config = altered(olmo2, tmp_path, **{NAME: torch.full((320, 128), 65520.0)})
    with pytest.raises(CheckpointError, match=f"'{NAME}' holds NaN or Inf as torch.float16"):
        load_weights(tmp_path, config, "cpu", torch.float16)
    assert load_weights(tmp_path, config, "cpu", torch.bfloat16).dtype == torch.bfloat16


def altered(reference: Reference, path: Path, **changes: torch.Tensor | None) -> ModelConfig:
    tensors = {k: v.clone() for k, v in reference.model.state_dict().items()}
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return ModelConfig.from_file(reference.path)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME: None}, f"tensor '{NAME}' of Olmo2ForCausalLM is missing"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}, "q_proj.bias' is not one of Olmo2ForCausalLM"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(320, 128)}, "layers.3.mlp.up_proj.weight' is not one of"),
        ({NAME: torch.ones(128, 320)}, rf"'{NAME}' has shape \[128, 320\]; .* \[320, 128\]"),
        ({NAME: torch.ones(320, 128, dtype=torch.int32)}, f"'{NAME}' has dtype I32"),
        ({NAME: torch.full((320, 128), torch.nan)}, f"'{NAME}' holds NaN or Inf"),
        ({NAME: torch.ones(320, 128).index_fill(0, torch.tensor([7]), torch.inf)}, f"'{NAME}' holds NaN or Inf"),
        ({NAME: torch.full((320, 128), 3.4e38)}, f"'{NAME}' holds NaN or Inf as torch.bfloat16"),
    ],
    ids=["missing", "bias", "layer too many", "shape", "dtype", "nan", "inf", "overflow in the cast"],
)
def test_refused_by_name(olmo2: Reference, tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str):
    config = altered(olmo2, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path, config, "cpu", torch.bfloat16)


def test_tied_head_in_the_file_is_refused(tmp_path: Path, olmo2: Reference):
    fields = ModelConfig.from_file(olmo2.path)
    tied = ModelConfig(**{**vars(fields), "tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is not one of"):
        load_weights(olmo2.path, tied, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("base", "change", "norms"),
    [
        ("LlamaForCausalLM", {"qk_norm": "full", "mlp_norm": "other"}, "attention_norm q_norm k_norm mlp_norm"),
        ("Olmo2ForCausalLM", {"qk_norm": "none", "mlp_norm": "other"}, "attention_norm mlp_norm"),
    ],
    ids=["pre", "post"],
)
def test_an_architecture_is_its_entry_in_the_table(
    base: str, change: dict[str, Any], norms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Names and norms that no architecture has together: loaded, placed and computed as the entry says."""

    class Watched(ReferenceOps):
        def rms_norm(self, x, weight, eps, rounding, out=None):
            used.append(weight)
            return super().rms_norm(x, weight, eps, rounding, out)

    entry = replace(ARCHITECTURES[base], name="NewForCausalLM", model_type="new", **change)
    monkeypatch.setitem(ARCHITECTURES, entry.name, entry)
    config = ModelConfig.from_dict(SMALL | {"architectures": [entry.name], "model_type": "new"})
    stored = {name: torch.rand(shape) for name, shape in tensor_shapes(config).items()}
    assert "model.layers.1.other.weight" in stored
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, config, "cpu", torch.float32)
    assert all(torch.equal(weights.read(tensor), stored[tensor.name]) for tensor in checkpoint_tensors(config))
    used: list[torch.Tensor] = []
    model = Model(config, weights, Watched())
    model.forward(Batch(*torch.tensor([[3, 5], [0, 0], [0, 1]], dtype=torch.int32)), model.new_cache(1, 2))
    expected = [getattr(layer, norm) for layer in weights.layers for norm in norms.split()]
    assert [id(weight) for weight in used] == [id(weight) for weight in (*expected, weights.norm)]


def test_random_weights(olmo2: Reference):
    config = ModelConfig.from_file(olmo2.path)
    a, b, c = (random_weights(config, "cpu", torch.bfloat16, seed) for seed in (1, 1, 2))
    for (name, x), (_, y), (_, z) in zip(a.named_tensors(), b.named_tensors(), c.named_tensors(), strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z), name
        assert x.isfinite().all() and x.dtype == torch.bfloat16
        assert x.float().mean().item() == pytest.approx(1.0 if x.ndim == 1 else 0.0, abs=0.01), name
        assert x.float().std().item() == pytest.approx(0.02, rel=0.25), name
