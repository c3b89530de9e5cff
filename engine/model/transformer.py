"""The forward graph, written once over `Ops`.

Tokens of all sequences are packed into one list; each carries its cache slot and its position. Prefill, decode, chunked
prefill and any mix of them are the same call.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.model.config import ModelConfig, Rope
from engine.model.cost import Footprint
from engine.model.kv_cache import PAGE_SIZE, ContiguousCache, KVCache, PagedCache
from engine.model.weights import Weights
from engine.ops.batch import AttentionLayer, Batch, TokenSpan
from engine.ops.reference import Ops, of_rows
from engine.runtime.memory import free_bytes

if TYPE_CHECKING:
    from kernels.attention.prefill import Plan

Observe = Callable[[str, Tensor], None]
_ROWS = 1 << 16  # of a rotary table that are computed at a time


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
    cos, sin = (torch.empty(positions, head_dim // 2) for _ in range(2))
    for begin in range(0, positions, _ROWS):  # in fp64 all of them take several times the tables' memory
        here = torch.arange(begin, min(begin + _ROWS, positions), dtype=torch.float32)
        angles = (here[:, None] * frequency).double()
        cos[begin : begin + _ROWS], sin[begin : begin + _ROWS] = angles.cos(), angles.sin()
    return cos, sin


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
    """A decoder with its weights and rotary tables for `max_positions` positions (default: all the model allows).

    Raises:
        ValueError: The free memory has no room for the tables.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, max_positions: int | None = None) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self.max_positions = max_positions or config.max_position_embeddings
        tables: dict[Rope, tuple[Tensor, Tensor]] = {}
        ropes = {config.layer_rope(layer) for layer in range(config.num_hidden_layers)}
        size = len(ropes) * self.max_positions * config.head_dim * 4
        if size > (free := free_bytes(weights.device)):
            raise ValueError(
                f"the rotary tables of {self.max_positions} positions are {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                "are free; lower max_model_len"
            )
        for rope in ropes:
            cos, sin = rope_table(rope, config.head_dim, self.max_positions)
            if config.architecture.rope_dtype == "model":
                cos, sin = cos.to(weights.dtype).float(), sin.to(weights.dtype).float()
            tables[rope] = cos.to(weights.device), sin.to(weights.device)
        self.attention = [
            AttentionLayer(
                layer.q_norm, layer.k_norm, config.rms_norm_eps, config.architecture.norm_rounding,
                *tables[config.layer_rope(index)], config.head_dim**-0.5, config.window(index),
            )
            for index, layer in enumerate(weights.layers)
        ]  # fmt: skip

    def forward(self, batch: Batch, cache: KVCache, observe: Observe | None = None) -> Tensor:
        """Logits after the batch's tokens; their keys and values are written to `cache` on the way.

        Args:
            batch: What to compute.
            cache: Keys and values.
            observe: Called with a name and a tensor as they are computed: "embedding", "layers.{i}.attention" and
                "layers.{i}.mlp" (what is added to the residual stream), "layers.{i}" (the stream after layer i),
                "norm", "logits".

        Returns:
            [n, V] in the weights' dtype.
        """
        see = observe or (lambda name, tensor: None)
        ops, weights, layers = self.ops, self.weights, self.weights.layers
        batch = self._planned(batch)
        x = ops.embedding(batch.tokens, weights.embedding)
        see("embedding", x)
        # The norm applied where a branch is added: of the branch (post), or for the branch that comes next (pre).
        norms = [weight for layer in layers for weight in (layer.attention_norm, layer.mlp_norm)]
        pre = self.config.architecture.norm_placement == "pre"
        y = self._norm(x, norms[0]) if pre else x
        if pre:
            norms = [*norms[1:], weights.norm]

        def add(name: str, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            config = self.config
            added = torch.empty_like(y) if observe and not pre else None
            settings = config.rms_norm_eps, config.architecture.norm_rounding
            both = ops.add_norm(x, y, weight, *settings, config.architecture.norm_placement, added)
            see(name, y if added is None else added)
            return both

        for index, layer in enumerate(layers):
            # In the last layer nobody asks what other tokens come to after their keys and values.
            rows = batch.logits_at if index == len(layers) - 1 and not observe else None
            y = ops.attend(ops.linear(y, layer.qkv), self.attention[index], cache.layer(index), batch, rows)
            y = ops.linear(y, layer.o)
            x, y = add(f"layers.{index}.attention", of_rows(x, rows), y, norms[2 * index])
            y = ops.linear_swiglu(y, layer.gate_up)
            y = ops.linear(y, layer.down)
            x, y = add(f"layers.{index}.mlp", x, y, norms[2 * index + 1])
            see(f"layers.{index}", x)
        if observe:
            y = of_rows(y, batch.logits_at)
        if not pre:
            y = self._norm(y, weights.norm)
        see("norm", y)
        logits = ops.linear(y, weights.lm_head)
        see("logits", logits)
        return logits

    def _planned(self, batch: Batch) -> Batch:
        """The batch with what follows from its spans."""
        spans = batch.spans
        if not spans:
            return batch
        if all(span.count == 1 for span in spans) and len({span.slot for span in spans}) == len(spans):
            return replace(batch, one_token_per_slot=True)
        return replace(batch, plan=self.plan(spans[batch.decodes :]))

    def plan(self, spans: Sequence[TokenSpan], into: "Plan | None" = None) -> "Plan | None":
        """What the operations want to know of a packed list of these spans before its pass; None where nothing.

        into: an earlier plan, of spans of the same counts, to be refilled in place.
        """
        return self.ops.plan(spans, self.weights.dtype, *self._heads, into)

    def new_cache(self, slots: int, capacity: int) -> ContiguousCache:
        """An empty cache, laid out as the operations want it."""
        config, weights = self.config, self.weights
        head_major = self.ops.head_major(weights.dtype, *self._heads)
        return ContiguousCache(config, slots, capacity, weights.dtype, weights.device, head_major)

    def new_paged_cache(self, *, pages: int, slots: int, capacity: int, page_size: int = PAGE_SIZE) -> PagedCache:
        """An empty cache of `pages` pages for `slots` sequences of up to `capacity` positions.

        Raises:
            ValueError: The operations cannot read one (says what to choose), or sizes that PagedCache refuses.
        """
        config, weights = self.config, self.weights
        if refusal := self.ops.why_not_paged(weights.dtype, *self._heads):
            raise ValueError(refusal)
        return PagedCache(config, pages, page_size, slots, capacity, weights.dtype, weights.device)

    @property
    def footprint(self) -> Footprint:
        return Footprint(self.config, self.weights.dtype, self.weights.step_bytes)

    @property
    def _heads(self) -> tuple[int, int, int]:
        config = self.config
        return config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.ops.rms_norm(x, weight, self.config.rms_norm_eps, self.config.architecture.norm_rounding)
