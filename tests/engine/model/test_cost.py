"""Bytes and operations of a step."""

from __future__ import annotations

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.cost import Footprint, kv_bytes_per_token, matrix_parameters, step_cost
from engine.model.tensors import parameter_count

COMMON = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500000, "tie_word_embeddings": False,
    "vocab_size": 100352, "eos_token_id": 100257,
}  # fmt: skip


def olmo2(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            **COMMON,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
        }
    )


def dense(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Footprint:
    return Footprint.dense(config, dtype)


RELEASED = {
    "1B": (olmo2(2048, 16, 16, 16, 8192), 1_484_916_736, 131_072, 2.56),
    "7B": (olmo2(4096, 32, 32, 32, 11008), 7_298_617_344, 524_288, 13.78),
    "13B": (olmo2(5120, 40, 40, 40, 13824), 13_716_198_400, 819_200, 26.40),
    "32B": (olmo2(5120, 64, 40, 8, 27648), 32_234_279_936, 262_144, 63.44),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name: str):
    config, parameters, kv_bytes, gigabytes = RELEASED[name]
    assert parameter_count(config) == parameters
    assert config.head_dim == 128
    assert kv_bytes_per_token(config, torch.bfloat16) == kv_bytes
    assert dense(config).weight_bytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_decode_and_prefill():
    config = RELEASED["7B"][0]
    decode = step_cost(dense(config), tokens=[1, 1], contexts=[100, 1000])
    assert decode.weight_bytes == dense(config).weight_bytes + 2 * 4096 * 2
    assert decode.kv_bytes == (1100 + 2) * 524_288
    products = matrix_parameters(config) + 100352 * 4096
    assert decode.flops == 2 * 2 * products + 4 * 4096 * 1100 * 32
    assert decode.bytes == decode.weight_bytes + decode.kv_bytes

    prefill = step_cost(dense(config), tokens=[512], contexts=[512])
    # The last layer is computed for the last token, but for the keys and values.
    products = 512 * matrix_parameters(config) - 511 * (2 * 4096 + 3 * 11008) * 4096 + 100352 * 4096
    assert prefill.flops == 2 * products + 4 * 4096 * (31 * 512 * 513 // 2 + 512)
    assert step_cost(dense(config), tokens=1024, contexts=[512, 512]).flops == 2 * prefill.flops
    assert (
        step_cost(dense(config, torch.float32), tokens=[1], contexts=[9]).bytes
        == 2 * step_cost(dense(config), 1, [9]).bytes
    )


def test_chunks_of_a_prefill_add_up_to_it():
    config = RELEASED["1B"][0]
    whole = step_cost(dense(config), [1000], [1000])
    parts = [step_cost(dense(config), [250], [context]) for context in (250, 500, 750, 1000)]
    # What a token with logits takes beside the others: the head, and of the last layer all but keys and values.
    products = config.vocab_size * 2048 + (2 * 2048 + 3 * 8192) * 2048
    logits = [2 * products + 4 * 2048 * context for context in (250, 500, 750)]
    assert sum(part.flops for part in parts) == whole.flops + sum(logits)


def test_window_bounds_what_is_read():
    fields = {**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 256,
              "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}  # fmt: skip
    del fields["attention_bias"]
    windowed = ModelConfig.from_dict({**fields, "sliding_window": 100})
    plain = ModelConfig.from_dict({**fields, "sliding_window": None})
    for context in (5, 100, 101, 900):
        near, far = (step_cost(dense(c), [1], [context]) for c in (windowed, plain))
        per_token = kv_bytes_per_token(plain, torch.bfloat16)
        assert far.kv_bytes == (context + 1) * per_token
        assert near.kv_bytes == (min(context, 100) + 1) * per_token
        assert far.flops - near.flops == 4 * 256 * 2 * max(0, context - 100)
    pairs = sum(min(position + 1, 100) for position in range(300))
    base = step_cost(dense(windowed), [300], [300]).flops - 4 * 256 * (pairs + 100)
    assert base == 2 * (300 * matrix_parameters(windowed) - 299 * (2 * 256 + 3 * 512) * 256 + 100352 * 256)


def test_tied_embedding_is_read_once():
    untied = RELEASED["1B"][0]
    tied = ModelConfig.from_dict({**COMMON, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
                                  "intermediate_size": 8192, "tie_word_embeddings": True})  # fmt: skip
    assert dense(tied).weight_bytes == dense(untied).weight_bytes


@pytest.mark.parametrize(
    ("tokens", "contexts", "message"),
    [([1], [1, 2], "1 token counts"), ([3], [2], "3 new tokens"), ([0], [2], "0 new"), (5, [9, 9], "shared equally")],
)
def test_refused(tokens: int | list[int], contexts: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        step_cost(dense(RELEASED["1B"][0]), tokens, contexts)
