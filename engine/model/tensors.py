"""The tensors that a checkpoint of a configuration holds, and where in the engine's weights each belongs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from engine.model.config import ModelConfig


class CheckpointTensor(NamedTuple):
    """A tensor of a checkpoint, and where the engine has it.

    name, shape: its own. layer, field: of `LayerWeights` of that layer, or of `Weights` where layer is None. row: the
    first of the field's rows that it is: matrices that are multiplied together are one, their rows one below the other.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    field: str
    row: int = 0


def checkpoint_tensors(config: ModelConfig) -> Iterator[CheckpointTensor]:
    """Every tensor that a checkpoint of this configuration holds; those of a field by their rows."""
    table = (config.vocab_size, config.hidden_size)
    yield CheckpointTensor("model.embed_tokens.weight", table, None, "embedding")
    for layer in range(config.num_hidden_layers):
        yield from _layer_tensors(config, layer)
    yield CheckpointTensor("model.norm.weight", (config.hidden_size,), None, "norm")
    if not config.tie_word_embeddings:
        yield CheckpointTensor("lm_head.weight", table, None, "lm_head")


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[CheckpointTensor]:
    architecture, hidden, inner = config.architecture, config.hidden_size, config.intermediate_size
    q, kv = config.q_size, config.kv_size
    # A field's columns, and the checkpoint's matrices with their rows.
    matrices = {
        "qkv": (hidden, {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
        "o": (q, {"self_attn.o_proj": hidden}),
        "gate_up": (hidden, {"mlp.gate_proj": inner, "mlp.up_proj": inner}),
        "down": (inner, {"mlp.down_proj": hidden}),
    }
    norms = {"q_norm": ("self_attn.q_norm", q), "k_norm": ("self_attn.k_norm", kv)}
    norms = norms if architecture.qk_norm == "full" else {}
    norms |= {"attention_norm": (architecture.attention_norm, hidden), "mlp_norm": (architecture.mlp_norm, hidden)}
    for field, (columns, parts) in matrices.items():
        row = 0
        for stem, rows in parts.items():
            yield CheckpointTensor(f"model.layers.{layer}.{stem}.weight", (rows, columns), layer, field, row)
            row += rows
    for field, (stem, size) in norms.items():
        yield CheckpointTensor(f"model.layers.{layer}.{stem}.weight", (size,), layer, field)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint holds, by its Hugging Face name."""
    return {tensor.name: tensor.shape for tensor in checkpoint_tensors(config)}


def parameter_count(config: ModelConfig) -> int:
    return sum(math.prod(tensor.shape) for tensor in checkpoint_tensors(config))
