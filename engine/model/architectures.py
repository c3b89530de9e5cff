"""The architectures that there are.

A family of models that differs from those here in what `Architecture` says is one more entry of `ARCHITECTURES`. What
it does not say yet is a field of it, tensors in `checkpoint_tensors` (engine/model/tensors.py), and arithmetic in one
place: the forward graph (engine/model/transformer.py), an operation (engine/ops/) or the rotary table
(engine/model/rope.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


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
