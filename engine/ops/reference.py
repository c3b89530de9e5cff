"""The operations in plain torch, and the composite ones made of single ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.model.linear import DenseLinear, Linear, TiledLinear
from engine.ops.batch import AttentionLayer, Batch, LayerCache, Rounding, TokenSpan
from engine.ops.protocol import Ops, Placement

if TYPE_CHECKING:
    from kernels.attention.prefill import Plan

BLOCK = 16  # rows of every matrix product
CHUNK = 64  # key positions whose partial attention is computed together
_WEIGHT_ROWS = 8192  # rows of a matrix held in fp32 at a time


class Composed:
    """The composite operations, as the single ones one after another."""

    device: torch.device

    def new_linear(self, rows: int, depth: int, gated: bool, dtype: torch.dtype) -> DenseLinear | TiledLinear:
        return DenseLinear(torch.empty((rows, depth), dtype=dtype, device=self.device))

    def linear_swiglu(self: Ops, x: Tensor, gate_up: Linear, out: Tensor | None = None) -> Tensor:
        return self.swiglu(self.linear(x, gate_up), out)

    def add_norm(
        self: Ops, x: Tensor, y: Tensor, weight: Tensor, eps: float, rounding: Rounding, placement: Placement,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if placement == "post":
            stream = self.add(x, self.rms_norm(y, weight, eps, rounding, added))
            return stream, stream
        stream = self.add(x, y)
        return stream, self.rms_norm(stream, weight, eps, rounding)

    def plan(
        self, spans: Sequence[TokenSpan], dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int,
        into: Plan | None = None,
    ) -> Plan | None:  # fmt: skip
        return None

    def attend(
        self: Ops, qkv: Tensor, layer: AttentionLayer, cache: LayerCache, batch: Batch, rows: Tensor | None = None
    ) -> Tensor:
        kv_heads, width = cache.k.shape[2:]
        kv_size = kv_heads * width
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            self.rms_norm(q, layer.q_norm, layer.eps, layer.rounding, out=q)
            self.rms_norm(k, layer.k_norm, layer.eps, layer.rounding, out=k)
        q, k, v = (x.view(x.shape[0], -1, width) for x in (q, k, v))
        self.rope(q, k, layer.cos, layer.sin, batch.positions)
        self.kv_write(k, v, cache.k, cache.v, batch.slots, batch.positions, cache.table)
        q, slots, positions = (of_rows(x, rows) for x in (q, batch.slots, batch.positions))
        out = self.attention(q, cache.k, cache.v, slots, positions, layer.scale, layer.window, table=cache.table)
        return out.flatten(1)


def of_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """x's rows at the int indices `rows`, in their order; None is all."""
    return x if rows is None else x.index_select(0, rows)


def _blocks(x: Tensor) -> Tensor:
    """Rows of [T, …] as fp32 [ceil(T/16), 16, …], the last block filled with zeros."""
    count = -(-x.shape[0] // BLOCK)
    padded = x.new_zeros((count * BLOCK, *x.shape[1:]), dtype=torch.float32)
    padded[: x.shape[0]] = x
    return padded.view(count, BLOCK, *x.shape[1:])


class ReferenceOps(Composed):
    """Plain torch on any device. A row's bits depend on nothing but that row (and, in attention, its own keys).

    torch's fp32 products and sums change bits with the number of rows, so everything that reduces works on blocks of
    exactly 16 rows; attention adds up fixed chunks of 64 absolute key positions in order. `torch.sigmoid` and `silu`
    change bits with an element's place (vector body or scalar tail); `exp` does not.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def head_major(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
        return False

    def why_not_paged(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str | None:
        return None

    def embedding(self, tokens: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.index_select(table, 0, tokens, out=out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rounding: Rounding, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        scale = weight.float()
        rows = _blocks(x)
        for block in rows:
            block *= torch.rsqrt(block.pow(2).mean(-1, keepdim=True) + eps)
        normed = rows.view(-1, x.shape[1])[: x.shape[0]]
        if rounding == "twice":
            normed = normed.to(x.dtype).float()
        return out.copy_(normed * scale)

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        c, s = (table.index_select(0, positions).unsqueeze(1) for table in (cos, sin))
        for x in (q, k):
            first, second = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=-1))

    def linear(self, x: Tensor, matrix: Linear, out: Tensor | None = None) -> Tensor:
        out = x.new_empty((x.shape[0], matrix.out_features)) if out is None else out
        rows = _blocks(x)
        for begin in range(0, matrix.out_features, _WEIGHT_ROWS):
            columns = matrix.rows(begin, begin + _WEIGHT_ROWS).float().t()
            for index, block in enumerate(rows):
                place = out[index * BLOCK : (index + 1) * BLOCK, begin : begin + _WEIGHT_ROWS]
                place.copy_((block @ columns)[: place.shape[0]])
        return out

    def swiglu(self, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        result = gate / (1 + torch.exp(-gate.contiguous())) * up
        return result.to(gate_up.dtype) if out is None else out.copy_(result)

    def add(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.add(x, y, out=out)

    def kv_write(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor,
        table: Tensor | None = None,
    ) -> None:  # fmt: skip
        row, place = slots, positions
        if table is not None:
            page = k_cache.shape[1]
            row, place = table[slots, positions // page], positions % page
        k_cache[row, place] = k
        v_cache[row, place] = v

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float,
        window: int, out: Tensor | None = None, table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        by_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(slots.tolist()):
            by_slot.setdefault(slot, []).append(row)
        for slot, rows in by_slot.items():
            last = int(positions[rows].max())
            keys, values = (self._of_slot(cache, slot, last, table) for cache in (k_cache, v_cache))
            for begin in range(0, len(rows), BLOCK):
                some = rows[begin : begin + BLOCK]
                filled = torch.tensor(some + some[-1:] * (BLOCK - len(some)), device=q.device)
                block = self._attend(q[filled], keys, values, positions[filled], scale, window)
                out[filled[: len(some)]] = block[: len(some)].to(out.dtype)
        return out

    @staticmethod
    def _of_slot(cache: Tensor, slot: int, last: int, table: Tensor | None) -> Tensor:
        """Keys or values of a slot's positions 0 … `last` at least, [C, Hk, D]."""
        if table is None:
            return cache[slot]
        return cache[table[slot, : last // cache.shape[1] + 1]].flatten(0, 1)

    def _attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float, window: int
    ) -> Tensor:
        """16 queries [16, Hq, D] of one slot over its keys and values [C, Hk, D] -> fp32 [16, Hq, D]."""
        (rows, q_heads, dim), heads = q.shape, k_cache.shape[1]
        groups = q_heads // heads
        queries = q.float().view(rows, heads, groups, dim).permute(1, 2, 0, 3).reshape(heads, groups * rows, dim)
        queries = queries * scale
        own = positions.view(rows, 1)
        lowest, last = int(positions.min()), int(positions.max())
        first = max(0, lowest - window + 1) if window else 0

        best = q.new_full((heads, groups, rows, 1), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(best)
        result = q.new_zeros((heads, groups, rows, dim), dtype=torch.float32)
        for begin in range(first // CHUNK * CHUNK, last + 1, CHUNK):
            here = torch.arange(begin, begin + CHUNK, device=q.device)
            keys, values = (self._chunk(cache, begin, last) for cache in (k_cache, v_cache))
            scores = (queries @ keys.transpose(1, 2)).view(heads, groups, rows, CHUNK)
            visible = here <= own
            if window:
                visible &= here > own - window
            scores = scores.masked_fill(~visible, -torch.inf)
            higher = torch.maximum(best, scores.amax(-1, keepdim=True))
            base = higher.masked_fill(higher == -torch.inf, 0.0)  # a row that has seen no key yet
            kept, weights = torch.exp(best - base), torch.exp(scores - base)
            part = (weights.view(heads, groups * rows, CHUNK) @ values).view_as(result)
            total = total * kept + weights.sum(-1, keepdim=True)
            result = result * kept + part
            best = higher
        return (result / total).permute(2, 0, 1, 3).reshape(rows, q_heads, dim)

    @staticmethod
    def _chunk(cache: Tensor, begin: int, last: int) -> Tensor:
        """Positions begin … begin + 63 of [C, Hk, D] as fp32 [Hk, 64, D]; zeros after `last` (0 * stale may be NaN)."""
        chunk = cache.new_zeros((CHUNK, *cache.shape[1:]), dtype=torch.float32)
        filled = cache[begin : min(begin + CHUNK, last + 1)]
        chunk[: filled.shape[0]] = filled
        return chunk.transpose(0, 1).contiguous()

    def repetition_penalty(self, logits: Tensor, seen: Tensor, penalty: Tensor) -> None:
        values = logits.float()
        by = penalty.view(-1, 1)
        values = torch.where(seen.bool(), torch.where(values < 0, values * by, values / by), values)
        logits.copy_(values)

    def argmax(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        best = _first_greatest(logits.float())
        return best.to(torch.int32) if out is None else out.copy_(best)

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
        position: Tensor, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device) if out is None else out
        rows = (temperature > 0).nonzero()[:, 0]
        noisy = logits.to(torch.float32, copy=True)
        noise = gumbel(seed[rows], position[rows], logits.shape[1])
        for row, own in zip(rows.tolist(), noise, strict=True):
            inverse, usable = 1 / temperature[row], ~noisy[row].isnan()
            values = noisy[row].masked_fill(~usable, -torch.inf)
            scores = _scores(values, values.max(), inverse)
            kept = usable & _kept(values, scores, inverse, int(top_k[row]), float(top_p[row]), float(min_p[row]))
            noisy[row] = (scores + own).masked_fill(~kept, torch.nan)
        return out.copy_(_first_greatest(noisy))

    def advance(self, chosen: Tensor, tokens: Tensor, positions: Tensor, places: Tensor, history: Tensor) -> None:
        positions += 1
        tokens.copy_(chosen.clamp(min=0))
        history.scatter_(1, places.long()[:, None].to(history.device), chosen[:, None].to(history.device))
        places.copy_((places + 1) % history.shape[1])


def _first_greatest(scores: Tensor) -> Tensor:
    """Index of the greatest over the last dimension; the lowest of equals, NaN never, -1 where all are NaN."""
    unusable = scores.isnan()
    best = scores.masked_fill(unusable, -torch.inf).amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[-1], device=scores.device)
    chosen = torch.where(scores == best, ids, scores.shape[-1]).amin(-1)
    return chosen.masked_fill(unusable.all(-1), -1)


def _scores(logits: Tensor, largest: Tensor, inverse: Tensor) -> Tensor:
    """(logits - largest) / temperature, by its inverse: 0 for the largest, be it infinite or the temperature tiny."""
    return torch.where(logits == largest, 0.0, (logits - largest) * inverse)


def _kept(logits: Tensor, scores: Tensor, inverse: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which of one row of logits [V] with these scores top-k, top-p and min-p leave; equals of the last kept stay."""
    floor = -torch.inf
    if 0 < top_k < logits.shape[0]:
        floor = logits.topk(top_k).values[-1]
    if top_p < 1:
        ordered = logits[logits >= floor].sort(descending=True).values
        mass = _scores(ordered, ordered[0], inverse).double().softmax(-1).cumsum(-1)
        floor = ordered[int((mass < top_p).sum().clamp(max=len(ordered) - 1))]
    return (logits >= floor) & (torch.exp(scores) >= min_p)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), 32-bit words in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around in int64; their 64 bits are those of the unsigned ones.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32 & low) ^ c1 ^ k0, second & low, (first >> 32 & low) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def gumbel(seed: Tensor, position: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise fp32 [B, count] for token ids 0 … count - 1 at `position` of sequences with `seed` [B].

    -log(-log(1 - u)), u = (first Philox word + 1/2) / 2^32 of counter (id, 0, position, 0) under the key seed: the bits
    that the CUDA sampler draws, up to the rounding of the logarithms.
    """
    seed, place = seed.long()[:, None], position.long()[:, None]
    ids = torch.arange(count, dtype=torch.int64, device=seed.device).expand(len(seed), -1)
    zero = torch.zeros_like(place)
    word = philox((ids, zero, place, zero), (seed & 0xFFFFFFFF, seed >> 32))[0]
    uniform = (word.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))
