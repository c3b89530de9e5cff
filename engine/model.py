"""The forward graph, written once over `Ops`.

Tokens of all sequences are packed into one list; each carries its cache slot and its position. Prefill, decode, chunked
prefill and any mix of them are the same call.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import ModelConfig, Rope
from engine.kv_cache import ContiguousCache
from engine.ops import Ops
from engine.weights import LayerWeights, Weights

Observe = Callable[[str, Tensor], None]


def rope_table(rope: Rope, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inverse frequency, fp32 [positions, head_dim / 2], on the CPU.

    Frequencies and angles are fp32 as in the models' training code; cos and sin of them are computed in fp64.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        frequency = frequency / rope.factor
    elif rope.type == "llama3":
        frequency = _llama3(frequency, rope)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return angles.double().cos().float(), angles.double().sin().float()


def _llama3(frequency: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between are blended (Llama 3.1)."""
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    stretched = frequency / rope.factor
    blended = (1 - blend) * frequency / rope.factor + blend * frequency
    is_long = wavelength > length / rope.low_freq_factor
    is_short = wavelength < length / rope.high_freq_factor
    return torch.where(is_long, stretched, torch.where(is_short, frequency, blended))


class Model:
    """A decoder with its weights and rotary tables for `max_positions` positions (default: all the model allows)."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, max_positions: int | None = None) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self.max_positions = max_positions or config.max_position_embeddings
        self.scale = config.head_dim**-0.5
        tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        for rope in {config.layer_rope(layer) for layer in range(config.num_hidden_layers)}:
            cos, sin = rope_table(rope, config.head_dim, self.max_positions)
            if config.rope_dtype == "model":
                cos, sin = cos.to(weights.dtype).float(), sin.to(weights.dtype).float()
            tables[rope] = cos.to(weights.device), sin.to(weights.device)
        self._tables = [tables[config.layer_rope(layer)] for layer in range(config.num_hidden_layers)]

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        cache: ContiguousCache,
        logits_at: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Logits after T packed tokens; their keys and values are written to `cache` on the way.

        Args:
            tokens: int32 [T] token ids.
            slots: int32 [T] cache slot of each token's sequence.
            positions: int32 [T] place of each token in its sequence; earlier ones are in the cache or in this list.
            cache: Keys and values.
            logits_at: int [n] indices into the T tokens whose logits are wanted; None = all.
            observe: Called with a name and a tensor as they are computed: "embedding", "layers.{i}.attention" and
                "layers.{i}.mlp" (what is added to the residual stream), "layers.{i}" (the stream after layer i),
                "norm", "logits".

        Returns:
            [n, V] in the weights' dtype.
        """
        see = observe or (lambda name, tensor: None)
        ops, weights = self.ops, self.weights
        x = ops.embedding(tokens, weights.embedding)
        see("embedding", x)
        pre = self.config.norm_placement == "pre"
        for index, layer in enumerate(weights.layers):
            y = self._norm(x, layer.attention_norm) if pre else x
            y = self._attention(index, layer, y, slots, positions, cache)
            y = y if pre else self._norm(y, layer.attention_norm)
            see(f"layers.{index}.attention", y)
            x = ops.add(x, y)

            y = self._norm(x, layer.mlp_norm) if pre else x
            y = ops.linear(ops.swiglu(ops.linear(y, layer.gate_up)), layer.down)
            y = y if pre else self._norm(y, layer.mlp_norm)
            see(f"layers.{index}.mlp", y)
            x = ops.add(x, y)
            see(f"layers.{index}", x)
        if logits_at is not None:
            x = x.index_select(0, logits_at)
            if not len(x):
                return x.new_empty((0, self.config.vocab_size))
        x = self._norm(x, weights.norm)
        see("norm", x)
        logits = ops.linear(x, weights.lm_head)
        see("logits", logits)
        return logits

    def _norm(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return self.ops.rms_norm(x, weight, self.config.rms_norm_eps, self.config.norm_rounding, out=out)

    def _attention(
        self, index: int, layer: LayerWeights, x: Tensor, slots: Tensor, positions: Tensor, cache: ContiguousCache
    ) -> Tensor:
        config, count = self.config, x.shape[0]
        qkv = self.ops.linear(x, layer.qkv)
        q, k, v = qkv.split([config.q_size, config.kv_size, config.kv_size], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm(q, layer.q_norm, out=q)
            self._norm(k, layer.k_norm, out=k)
        q = q.view(count, config.num_attention_heads, config.head_dim)
        k = k.view(count, config.num_key_value_heads, config.head_dim)
        v = v.view(count, config.num_key_value_heads, config.head_dim)
        self.ops.rope(q, k, *self._tables[index], positions)
        self.ops.kv_write(k, v, cache.k[index], cache.v[index], slots, positions)
        window = config.window(index)
        out = self.ops.attention(q, cache.k[index], cache.v[index], slots, positions, self.scale, window)
        return self.ops.linear(out.view(count, config.q_size), layer.o)
