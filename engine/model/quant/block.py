"""A decoder layer in plain torch over batches of whole sequences: gradients go through it, and its inputs can be seen.

The forward graph of engine/model/transformer.py serves requests: its operations fix the order of sums, and write in
place. Calibration wants neither; what it computes here is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.config import ModelConfig
from engine.model.tensors import checkpoint_tensors

# A layer's matrices that read the same input, by the name of the engine's matrix that they are together.
ROLES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MATRICES = tuple(name for names in ROLES.values() for name in names)
See = Callable[[str, Tensor], None]


def layer_names(config: ModelConfig, index: int) -> dict[str, str]:
    """A layer's tensors: their names within it, as "mlp.up_proj", to those in the checkpoint, without ".weight"."""
    prefix = f"model.layers.{index}."
    names = [tensor.name.removesuffix(".weight") for tensor in checkpoint_tensors(config) if tensor.layer == index]
    return {name.removeprefix(prefix): name for name in names}


@dataclass
class Block:
    """Layer `index` of a model.

    weights: its matrices and norms by their names within the layer, all of one dtype: that of the arithmetic.
    cos, sin: fp32 [positions, D / 2].
    """

    config: ModelConfig
    index: int
    weights: dict[str, Tensor]
    cos: Tensor
    sin: Tensor

    def forward(self, x: Tensor, see: See | None = None) -> Tensor:
        """The stream [B, T, H] after the layer; `see` is given each role's input as it is computed."""
        see = see or (lambda role, tensor: None)
        architecture = self.config.architecture
        pre = architecture.norm_placement == "pre"
        for norm, branch in ((architecture.attention_norm, self._attention), (architecture.mlp_norm, self._mlp)):
            x = x + (branch(self._norm(x, norm), see) if pre else self._norm(branch(x, see), norm))
        return x

    def _attention(self, x: Tensor, see: See) -> Tensor:
        see("qkv", x)
        q, k, v = (self._linear(x, name) for name in ROLES["qkv"])
        if self.config.architecture.qk_norm == "full":
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = self._rotated(q), self._rotated(k)
        length, window = x.shape[1], self.config.window(self.index)
        grouped = {"scale": self.config.head_dim**-0.5, "enable_gqa": q.shape[1] != k.shape[1]}
        if window and window < length:
            place = torch.arange(length, device=x.device)
            back = place[:, None] - place
            y = functional.scaled_dot_product_attention(q, k, v, (back >= 0) & (back < window), **grouped)
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        y = y.transpose(1, 2).flatten(2)
        see("o", y)
        return self._linear(y, "self_attn.o_proj")

    def _mlp(self, x: Tensor, see: See) -> Tensor:
        see("gate_up", x)
        y = functional.silu(self._linear(x, "mlp.gate_proj")) * self._linear(x, "mlp.up_proj")
        see("down", y)
        return self._linear(y, "mlp.down_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[name])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        if self.config.architecture.norm_rounding == "twice":
            normed = normed.to(x.dtype).float()
        return (normed * self.weights[name].float()).to(x.dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
