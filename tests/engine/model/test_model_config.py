"""config.json is read strictly: what could change a number is understood or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.model.config import ModelConfig, Rope
from engine.model.errors import ConfigError
from engine.model.tensors import parameter_count, tensor_shapes

# config.json of allenai/OLMo-2-1124-13B-Instruct, as transformers 4 wrote it
OLMO2_13B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": False,
    "vocab_size": 100352,
}
LLAMA = {
    **{k: v for k, v in OLMO2_13B.items() if k not in ("rope_theta", "rope_scaling")},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "eos_token_id": [100257, 100258],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 2048,
        "rope_type": "llama3",
    },
}
MISTRAL = {
    **{k: v for k, v in OLMO2_13B.items() if k != "attention_bias"},
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
OLMO3 = {
    **OLMO2_13B,
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 10,
    "sliding_window": 1024,
}


def test_olmo2_axes():
    config = ModelConfig.from_dict(OLMO2_13B)
    arch = config.architecture
    assert (arch.norm_placement, arch.qk_norm, arch.norm_rounding, arch.rope_dtype) == (
        "post", "full", "once", "float32",
    )  # fmt: skip
    assert config.head_dim == 128 and config.q_size == config.kv_size == 5120
    assert config.rope == config.sliding_rope == Rope(theta=500000.0)
    assert config.eos_token_ids == (100257,) and config.dtype == "bfloat16"
    assert {config.window(layer) for layer in range(40)} == {0}
    assert parameter_count(config) == 13_716_198_400
    shapes = tensor_shapes(config)
    assert len(shapes) == 443
    assert shapes["model.layers.39.self_attn.q_norm.weight"] == (5120,)
    assert shapes["model.layers.0.post_feedforward_layernorm.weight"] == (5120,)
    hash(config)


def test_llama_axes():
    config = ModelConfig.from_dict(LLAMA)
    arch = config.architecture
    assert (arch.norm_placement, arch.qk_norm, arch.norm_rounding, arch.rope_dtype) == (
        "pre", "none", "twice", "model",
    )  # fmt: skip
    assert config.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 2048)
    assert config.eos_token_ids == (100257, 100258)
    shapes = tensor_shapes(config)
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == (1024, 5120)
    assert "model.layers.3.input_layernorm.weight" in shapes and "model.layers.3.self_attn.q_norm.weight" not in shapes
    tied = ModelConfig.from_dict({**LLAMA, "tie_word_embeddings": True})
    assert "lm_head.weight" not in tensor_shapes(tied)
    assert parameter_count(config) - parameter_count(tied) == 100352 * 5120


def test_mistral_window():
    config = ModelConfig.from_dict(MISTRAL)
    assert config.window(0) == config.window(39) == 4096
    assert ModelConfig.from_dict({**MISTRAL, "sliding_window": None}).window(0) == 0


def test_olmo3_windows_and_rope():
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = ModelConfig.from_dict({**OLMO3, "rope_scaling": scaling})
    assert [config.window(layer) for layer in range(4)] == [1024, 1024, 1024, 0]
    assert config.layer_rope(3).factor == 4.0 and config.layer_rope(0) == Rope(500000.0)
    fields = {k: v for k, v in OLMO3.items() if k not in ("rope_theta", "rope_scaling")}
    nested = {
        "full_attention": {**scaling, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = ModelConfig.from_dict({**fields, "rope_parameters": nested})
    assert config.layer_rope(3) == Rope(1e6, "linear", 4.0) and config.layer_rope(0) == Rope(1e4)


@pytest.mark.parametrize(
    "scaled",
    [{"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 8}, LLAMA["rope_scaling"]],
    ids=lambda rope: f"{rope.get('rope_type')} {rope['factor']}",
)
def test_flat_rope_of_olmo3_scales_no_layer_in_silence(scaled: dict[str, Any]):
    fields = {k: v for k, v in OLMO3.items() if k not in ("rope_theta", "rope_scaling")}
    with pytest.raises(
        ConfigError, match=r"scales the layers of all types; .* give rope_parameters.full_attention and"
    ):
        ModelConfig.from_dict({**fields, "rope_parameters": {"rope_theta": 500000.0, **scaled}})
    # In the older form scaling is of the layers of full attention, and unscaled both forms mean the same.
    plain = ModelConfig.from_dict({**fields, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})
    assert plain.rope == plain.sliding_rope == Rope(1e5)
    assert ModelConfig.from_dict({**OLMO3, "rope_scaling": scaled}).sliding_rope == Rope(500000.0)
    nested = {
        "full_attention": {**scaled, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e5},
    }
    with pytest.raises(ConfigError, match=r"rope_parameters.factor = 4.0 is beside 'full_attention'"):
        ModelConfig.from_dict({**fields, "rope_parameters": {**nested, "factor": 4.0}})
    # Where all layers are alike, so is their scaling.
    fields = {k: v for k, v in MISTRAL.items() if k not in ("rope_theta", "rope_scaling")}
    config = ModelConfig.from_dict({**fields, "rope_parameters": {"rope_theta": 1e5, **scaled}})
    assert config.rope == config.sliding_rope and config.rope.factor == scaled["factor"]


def test_both_generations_of_rope_fields():
    old = ModelConfig.from_dict(LLAMA)
    fields = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    new = ModelConfig.from_dict({**fields, "rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": 500000.0}})
    assert old.rope == new.rope
    legacy = ModelConfig.from_dict({**MISTRAL, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert legacy.rope == Rope(500000.0, "linear", 2.0)


@pytest.mark.parametrize("base", [OLMO2_13B, LLAMA, MISTRAL, OLMO3], ids=lambda b: b["model_type"])
def test_every_needed_field_is_required(base: dict[str, Any]):
    proved_by_shapes = {"num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"}
    harmless = {"attention_dropout", "bos_token_id", "initializer_range", "pad_token_id", "pretraining_tp",
                "torch_dtype", "transformers_version", "use_cache", "rope_scaling"}  # fmt: skip
    for field in base:
        fields = {k: v for k, v in base.items() if k != field}
        if field in proved_by_shapes | harmless:
            ModelConfig.from_dict(fields)
        else:
            with pytest.raises(ConfigError, match=f"{field} is missing"):
                ModelConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (OLMO2_13B, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        (OLMO2_13B, {"architectures": ["Olmo2ForCausalLM", "LlamaForCausalLM"]}, "LlamaForCausalLM"),
        (OLMO2_13B, {"model_type": "llama"}, "model_type = 'llama'"),
        (OLMO2_13B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (OLMO2_13B, {"attention_bias": True}, "attention_bias = True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
        (OLMO2_13B, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        (OLMO2_13B, {"mlp_bias": False}, "mlp_bias"),
        (OLMO2_13B, {"sliding_window": 128}, "sliding_window"),
        (MISTRAL, {"layer_types": ["full_attention"] * 40}, "layer_types"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        (LLAMA, {"rope_scaling": {"factor": 4.0}}, "rope_type = None"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}}, "contradicts"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor = -1"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "mscale = 1"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "is missing"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "both given"),
        (LLAMA, {"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        (LLAMA, {"rope_theta": "500000"}, "rope_theta = '500000'"),
        (OLMO2_13B, {"vocab_size": 0}, "vocab_size = 0"),
        (OLMO2_13B, {"hidden_size": "5120"}, "hidden_size = '5120'"),
        (OLMO2_13B, {"num_hidden_layers": True}, "num_hidden_layers = True"),
        (OLMO2_13B, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        (OLMO2_13B, {"hidden_size": 5121}, "not a multiple of 40 heads"),
        (LLAMA, {"head_dim": 63}, "head_dim = 63"),
        (OLMO2_13B, {"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        (OLMO2_13B, {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        (OLMO2_13B, {"eos_token_id": 100352}, "eos_token_id = 100352"),
        (OLMO2_13B, {"eos_token_id": [1, "2"]}, "eos_token_id = '2'"),
        (OLMO2_13B, {"torch_dtype": "int8"}, "dtype = 'int8'"),
        (OLMO3, {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (OLMO3, {"layer_types": ["chunked_attention"] * 40}, "'chunked_attention'"),
        (OLMO3, {"sliding_window": None}, "sliding_window is null"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window = 0"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) and len(value) == 1 else "",
)  # fmt: skip
def test_refused_by_name(base: dict[str, Any], change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace("(", r"\(")):
        ModelConfig.from_dict({**base, **change})


def test_no_end_of_sequence():
    assert ModelConfig.from_dict({**OLMO2_13B, "eos_token_id": None}).eos_token_ids == ()


def test_from_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        ModelConfig.from_file(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        ModelConfig.from_file(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="list"):
        ModelConfig.from_file(path)
    path.write_text(json.dumps({**OLMO2_13B, "hidden_act": "relu"}))
    with pytest.raises(ConfigError, match=r"config.json: hidden_act"):
        ModelConfig.from_file(path)
    path.write_text(json.dumps(OLMO2_13B))
    assert ModelConfig.from_file(tmp_path) == ModelConfig.from_file(path) == ModelConfig.from_dict(OLMO2_13B)
