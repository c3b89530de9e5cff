"""The operations that the forward graph is written over.

T tokens, H hidden size, I intermediate size, Hq query and Hk key/value heads of D elements, S cache slots of C
positions, B rows of V logits. Integer tensors (tokens, slots, positions, top_k, …) are int32, seeds int64. `out=` is
filled and returned when given. The graph calls the composite operations; `Composed` makes them of the single ones.

A cache is [S, C, Hk, D], position p of slot s at [s, p]. With `table` [S, n] it is [P, page, Hk, D] of P pages, and
position p of slot s at [table[s, p // page], p % page]. Neither the table nor what other pages hold changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from engine.model.linear import DenseLinear, Linear, TiledLinear
from engine.ops.batch import AttentionLayer, Batch, LayerCache, Rounding, TokenSpan

if TYPE_CHECKING:
    from kernels.attention.prefill import Plan

Placement = Literal["pre", "post"]


class Ops(Protocol):
    """What an implementation computes, by the names that the launchers in `kernels/` have."""

    def head_major(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
        """Whether the cache of such heads is to be laid out as [S, Hk, C, D] (and shown as [S, C, Hk, D])."""
        ...

    def why_not_paged(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str | None:
        """Why the cache of such heads cannot have a table, and what would be needed; None where it can."""
        ...

    def new_linear(self, rows: int, depth: int, gated: bool, dtype: torch.dtype) -> DenseLinear | TiledLinear:
        """A matrix [rows, depth] that holds anything, in the form that is multiplied with fastest.

        gated: the first half of the rows are gates, the other half ups.
        """
        ...

    def embedding(self, tokens: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows `tokens` [T] of `table` [V, H] -> [T, H]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rounding: Rounding, out: Tensor | None = None) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over [T, H], in fp32; "twice" also rounds before the weight."""
        ...

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        """Rotate q [T, Hq, D] and k [T, Hk, D] in place; cos, sin fp32 [P, D/2]; fp32 arithmetic, rounded once."""
        ...

    def linear(self, x: Tensor, matrix: Linear, out: Tensor | None = None) -> Tensor:
        """x [T, K] times the matrix [N, K] transposed -> [T, N], accumulated in fp32.

        Raises ValueError where the implementation has no product for the form in which the matrix is stored.
        """
        ...

    def swiglu(self, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
        """silu(gate) * up of [T, 2I] -> [T, I], in fp32, rounded once."""
        ...

    def add(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """x + y, both [T, H]."""
        ...

    def kv_write(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor,
        table: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Store k, v [T, Hk, D] at `positions` [T] of `slots` [T] in the cache."""
        ...

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float,
        window: int, out: Tensor | None = None, table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Token t of q [T, Hq, D] over p - window + 1 (at least 0) … p of slots[t], p = positions[t]. Window 0: all."""
        ...

    def repetition_penalty(self, logits: Tensor, seen: Tensor, penalty: Tensor) -> None:
        """Where `seen` [B, V], divide positive logits by `penalty` [B] and multiply the others, in place."""
        ...

    def argmax(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Greatest of each row -> int32 [B]; ties go to the lowest id, NaN never wins; -1 where all are NaN."""
        ...

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
        position: Tensor, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw int32 [B] after temperature (0 = argmax), top-k (0 = off), top-p and min-p; -1 where all are NaN.

        The largest logit is taken off before the temperature divides; where there are logits of +inf, only they are
        drawn, each as likely as the others.
        """
        ...

    def advance(self, chosen: Tensor, tokens: Tensor, positions: Tensor, places: Tensor, history: Tensor) -> None:
        """Row b's next step reads what this one chose: positions[b] += 1, tokens[b] = chosen[b] (0 where that is -1),
        history[b, places[b]] = chosen[b], places[b] the next of the columns, in turn; history [B, C], for a GPU in
        pinned memory of the host."""
        ...

    def linear_swiglu(self, x: Tensor, gate_up: Linear, out: Tensor | None = None) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T) of x [T, H], gate_up [2I, H] -> [T, I]. Raises ValueError as `linear` does."""
        ...

    def add_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, rounding: Rounding, placement: Placement,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The stream x [T, H] with the branch y [T, H] added, and what the next branch reads, as (stream, normed).

        post: stream = x + norm(y), and normed is stream; `added`, where given, gets norm(y). pre: stream = x + y,
        normed = norm(stream).
        """
        ...

    def plan(
        self, spans: Sequence[TokenSpan], dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int,
        into: Plan | None = None,
    ) -> Plan | None:  # fmt: skip
        """What `attend` wants to know of a packed list of these spans, once for all layers; None where nothing.

        into: a plan of spans of the same counts, whose buffers are refilled in place (graph-safe).
        """
        ...

    def attend(
        self, qkv: Tensor, layer: AttentionLayer, cache: LayerCache, batch: Batch, rows: Tensor | None = None
    ) -> Tensor:
        """Everything between two projections: q and k norms where given, rotation, cache write, attention.

        qkv [T, (Hq + 2Hk) D], which may be overwritten -> [T, Hq D], or [n, Hq D] of the tokens int [n] in `rows`.
        """
        ...
