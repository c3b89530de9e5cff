"""The architectures that there are, and the tensors of their checkpoints.

A family of models that differs from those here in what `Architecture` says is one more entry of `ARCHITECTURES`. What
it does not say yet is a field of it, tensors in `checkpoint_tensors`, and arithmetic in one place: the forward graph
(engine/model/transformer.py), an operation (engine/ops/) or the rotary table (engine/model/rope.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from engine.model.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """What a class name in a config.json's `architectures` fixes beyond the fields of the file.

    name, model_type: as the file has them.
    norm_placement: pre: x + f(norm(x)); post: x + norm(f(x)).
    attention_norm, mlp_norm: a layer's norms of the two branches, as the checkpoint names them.
    qk_norm: full: one RMSNorm over the whole projection of q, and one of k, before the head split.
    norm_rounding: once: (w * n).to(dtype); twice: w * n.to(dtype).
    rope_dtype: in which cos and sin are kept.
    fields: of the file, those that it reads besides the common ones.
    rope_by_layer_type: whether only layers that see everything have their RoPE scaled.
    """

    name: str
    model_type: str
    norm_placement: Literal["pre", "post"]
    attention_norm: str
    mlp_norm: str
    qk_norm: Literal["none", "full"]
    norm_rounding: Literal["once", "twice"]
    rope_dtype: Literal["float32", "model"]
    fields: frozenset[str]
    rope_by_layer_type: bool = False


_OLMO2 = Architecture(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    norm_placement="post",
    attention_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
    qk_norm="full",
    norm_rounding="once",
    rope_dtype="float32",
    fields=frozenset({"attention_bias"}),
)
_LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    norm_placement="pre",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",  # as OLMo-2 names another norm, in another place
    qk_norm="none",
    norm_rounding="twice",
    rope_dtype="model",
    fields=frozenset({"attention_bias", "mlp_bias"}),
)
_OLMO3 = replace(
    _OLMO2,
    name="Olmo3ForCausalLM",
    model_type="olmo3",
    fields=frozenset({"attention_bias", "layer_types", "sliding_window"}),
    rope_by_layer_type=True,
)
_MISTRAL = replace(
    _LLAMA, name="MistralForCausalLM", model_type="mistral", fields=frozenset({"sliding_window"})
)  # fmt: skip
ARCHITECTURES = {entry.name: entry for entry in (_OLMO2, _OLMO3, _LLAMA, _MISTRAL)}


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
