"""What one forward pass is about, and what attention of a layer knows beside its matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from kernels.attention.prefill import Plan

Rounding = Literal["once", "twice"]


class TokenSpan(NamedTuple):
    """Tokens of one sequence next to each other in a packed list: how many, their slot, the first one's position."""

    count: int
    slot: int
    position: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens that a forward pass takes together, packed into one list without padding.

    tokens: int32 [T] token ids.
    slots: int32 [T] cache slot of each token's sequence.
    positions: int32 [T] place of each token in its sequence; earlier ones are in the cache or in this list.
    logits_at: int [n] indices into the T tokens whose logits are wanted; None: all.

    What follows is for the caller to say where it knows, and changes no bit:

    one_token_per_slot: no slot occurs twice, as in a decode step.
    spans: of each sequence the tokens in the list.
    decodes: of the spans so many come first that are one token each, of different slots.
    plan: `Ops.plan` of the spans behind those, where it is made already.
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    _: KW_ONLY
    logits_at: Tensor | None = None
    one_token_per_slot: bool = False
    spans: Sequence[TokenSpan] | None = None
    decodes: int = 0
    plan: Plan | None = None


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """What attention of a layer knows beside its matrices.

    q_norm, k_norm: weights over all heads of a token, where the architecture has such norms; eps, rounding: as of
    `Ops.rms_norm`. cos, sin: fp32 [P, D / 2]. scale: of the scores. window: positions a token looks at; 0: all.
    """

    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    rounding: Rounding
    cos: Tensor
    sin: Tensor
    scale: float
    window: int


class LayerCache(NamedTuple):
    """Keys and values of a layer, [rows, positions, Hk, D] each, and the table that says on which rows a slot's
    positions are; None: on its own."""

    k: Tensor
    v: Tensor
    table: Tensor | None = None
