"""The forward graph, written once over `Ops`.

Tokens of all sequences are packed into one list; each carries its cache slot and its position. Prefill, decode, chunked
prefill and any mix of them are the same call.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.cost import Footprint
from engine.model.kv_cache import PAGE_SIZE, ContiguousCache, KVCache, PagedCache
from engine.model.rope import rope_tables
from engine.model.weights import Weights
from engine.ops.batch import AttentionLayer, Batch, LayerCache, TokenSpan
from engine.ops.protocol import Ops
from engine.ops.reference import of_rows

if TYPE_CHECKING:
    from kernels.attention.prefill import Plan

Observe = Callable[[str, Tensor], None]


class Model:
    """A decoder with its weights and rotary tables for `max_positions` positions (default: all the model allows).

    Raises:
        ValueError: The free memory has no room for the tables.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, max_positions: int | None = None) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self.max_positions = max_positions or config.max_position_embeddings
        tables = rope_tables(config, self.max_positions, weights.device, weights.dtype)
        self._pre_norm = config.architecture.norm_placement == "pre"
        self._norm_settings = config.rms_norm_eps, config.architecture.norm_rounding
        self.attention = [
            AttentionLayer(
                layer.q_norm, layer.k_norm, *self._norm_settings, *tables[config.layer_rope(index)],
                config.head_dim**-0.5, config.window(index),
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
        ops, weights = self.ops, self.weights
        batch = self._planned(batch)
        x = ops.embedding(batch.tokens, weights.embedding)
        see("embedding", x)
        y = self._norm(x, weights.layers[0].attention_norm) if self._pre_norm else x
        for index in range(len(weights.layers)):
            x, y = self._layer(index, x, y, cache.layer(index), batch, observe)
        if observe:
            y = of_rows(y, batch.logits_at)
        if not self._pre_norm:
            y = self._norm(y, weights.norm)
        see("norm", y)
        logits = ops.linear(y, weights.lm_head)
        see("logits", logits)
        return logits

    def _layer(
        self, index: int, x: Tensor, y: Tensor, cache: LayerCache, batch: Batch, observe: Observe | None
    ) -> tuple[Tensor, Tensor]:
        """The stream x [T, H] after a layer, and what the next layer reads, as y [T, H] is what this one reads."""
        ops, layer = self.ops, self.weights.layers[index]
        is_last = index + 1 == len(self.weights.layers)
        # In the last layer nobody asks what other tokens come to after their keys and values.
        rows = batch.logits_at if is_last and not observe else None
        if self._pre_norm:  # x + attention(norm(x)), then x + mlp(norm(x)): each addition comes with the next norm
            norms = layer.mlp_norm, self.weights.norm if is_last else self.weights.layers[index + 1].attention_norm
        else:  # x + norm(attention(x)), then x + norm(mlp(x)): each addition comes with its own
            norms = layer.attention_norm, layer.mlp_norm

        qkv = ops.linear(y, layer.qkv)
        y = ops.attend(qkv, self.attention[index], cache, batch, rows)
        y = ops.linear(y, layer.o)  # the branch whole: summed over all heads
        x, y = self._add(f"layers.{index}.attention", of_rows(x, rows), y, norms[0], observe)

        y = ops.linear_swiglu(y, layer.gate_up)
        y = ops.linear(y, layer.down)  # the branch whole: summed over all of the intermediate size
        x, y = self._add(f"layers.{index}.mlp", x, y, norms[1], observe)
        if observe:
            observe(f"layers.{index}", x)
        return x, y

    def _add(self, name: str, x: Tensor, y: Tensor, norm: Tensor, observe: Observe | None) -> tuple[Tensor, Tensor]:
        """The stream x with the branch y added, and what the next branch reads: `Ops.add_norm`."""
        placement = self.config.architecture.norm_placement
        added = torch.empty_like(y) if observe and not self._pre_norm else None
        both = self.ops.add_norm(x, y, norm, *self._norm_settings, placement, added)
        if observe:
            observe(name, y if added is None else added)
        return both

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
        return self.ops.rms_norm(x, weight, *self._norm_settings)
