"""What a step must move and compute at least, so that a measured time can be set against the machine's limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.model.config import ModelConfig
from engine.model.tensors import checkpoint_tensors, parameter_count


@dataclass(frozen=True)
class Footprint:
    """What a model's steps cost by: its shapes, and the weights as they are stored.

    dtype: of activations and cache. weight_bytes: of all weights that a step of any size reads.
    """

    config: ModelConfig
    dtype: torch.dtype
    weight_bytes: int

    @classmethod
    def dense(cls, config: ModelConfig, dtype: torch.dtype) -> Footprint:
        """The same of a model whose weights are all stored in `dtype`; none need be loaded."""
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return cls(config, dtype, (parameter_count(config) - looked_up) * dtype.itemsize)


@dataclass(frozen=True)
class StepCost:
    """Bytes that must cross the memory bus and floating-point operations of one forward pass (2 per multiply-add)."""

    weight_bytes: int  # every weight once, and of the embedding only the tokens' rows
    kv_bytes: int  # keys and values read and written
    flops: int  # matrix products and attention

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class Ceilings:
    """What a machine did at most: B/s of a read, FLOP/s of a matrix product."""

    bandwidth: float | None = None
    matrix_rate: float | None = None
    matrix_dtype: str = "bfloat16"

    def milliseconds(self, cost: StepCost) -> tuple[float | None, str | None]:
        """The least time of a step of this cost, and which ceiling says so; None where the ceilings are not known."""
        if self.bandwidth is None or self.matrix_rate is None:
            return None, None
        by_memory = cost.bytes / self.bandwidth * 1e3
        by_matrix = cost.flops / self.matrix_rate * 1e3
        if by_memory >= by_matrix:
            return by_memory, "read bandwidth over weight + KV bytes"
        return by_matrix, f"{self.matrix_dtype} matrix rate over the step's FLOPs"


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of the layers' matrix products: each token takes 2 operations with each of them, but one without logits
    needs no more than keys and values of the last layer."""
    layers = (tensor.shape for tensor in checkpoint_tensors(config) if tensor.layer is not None)
    return sum(math.prod(shape) for shape in layers if len(shape) == 2)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in the cache, all layers together."""
    return 2 * config.num_hidden_layers * config.kv_size * dtype.itemsize


def step_cost(model: Footprint, tokens: int | Sequence[int], contexts: Sequence[int]) -> StepCost:
    """Cost of one forward pass that gives logits for the last token of every sequence.

    Args:
        model: Its shapes and weights.
        tokens: New tokens in this pass: of all sequences together, each having as many, or a list with each one's.
        contexts: Length of each sequence after the pass, the new tokens included.

    Raises:
        ValueError: `tokens` cannot be shared equally, the lists differ in length, or a sequence has fewer tokens than
            are new.
    """
    if isinstance(tokens, int):
        if tokens % len(contexts):
            raise ValueError(f"{tokens} tokens cannot be shared equally by {len(contexts)} sequences; list each one's")
        tokens = [tokens // len(contexts)] * len(contexts)
    if len(tokens) != len(contexts):
        raise ValueError(f"{len(tokens)} token counts for {len(contexts)} contexts; one of each a sequence is needed")
    for new, context in zip(tokens, contexts, strict=True):
        if not 0 < new <= context:
            raise ValueError(f"{new} new tokens in a context of {context}; 1 to {context} can be new")
    config, dtype = model.config, model.dtype
    total = sum(tokens)
    cached = kv_bytes_per_token(config, dtype) // config.num_hidden_layers
    moved = scores = 0
    last = config.num_hidden_layers - 1
    for layer in range(config.num_hidden_layers):
        window = config.window(layer)
        for new, context in zip(tokens, contexts, strict=True):
            first = max(0, context - new - window + 1) if window else 0  # earliest key that any new token sees
            moved += (context - first + new) * cached
            scores += _keys_seen(context, window) - _keys_seen(context - (1 if layer == last else new), window)
    head = config.vocab_size * config.hidden_size
    products = matrix_parameters(config)
    # Of the last layer, for tokens without logits: all but the keys' and values' projections.
    unasked = products // config.num_hidden_layers - 2 * config.kv_size * config.hidden_size
    return StepCost(
        weight_bytes=model.weight_bytes + total * config.hidden_size * dtype.itemsize,
        kv_bytes=moved,
        flops=2 * (total * products - (total - len(tokens)) * unasked + len(tokens) * head)
        + 4 * config.q_size * scores,
    )


def _keys_seen(length: int, window: int) -> int:
    """Query-key pairs of a whole causal sequence: 1 + 2 + … + length, each at most `window`."""
    if not window or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
