"""Prefill attention, version "prefill": flash attention of many tokens of a sequence at a time, over the KV cache.

| step | idea |
|---|---|
| mma | sm_80 and later: cp.async, ldmatrix and mma.sync; warps of 16 queries, a tile a block |
| wgmma | sm_90a: tensor maps (TMA); warpgroups of 64 queries, the product with the next keys during softmax |
| persistent | blocks stay and take one tile after another |
| ping-pong | one warpgroup multiplies as the other exponentiates |
| split-KV | few queries after a long history: a tile's segments are work for several blocks, the last one combines |

What they gained: docs/decisions.md. Shares of the limit, the sustained matrix rate: the report's kernel tables,
`reports/REPORT.md`.

A block works on a tile of queries of one head, which stay, and walks over the keys and values that any of them sees in
tiles of 128 positions. With "wgmma" one warp copies, the others multiply; with "mma" all do both.

Order of operations: that of `kernels.attention.flash`, so that a token's result has the same bits whichever computes
it. A tile of positions that a query does not see at all is an identity here (weights 0, alpha 1), and so is a segment
(factors 1 and 0); what may differ between the queries of a tile is no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from kernels import check
from kernels.architectures import LIMITS
from kernels.attention.prefill import work_plan
from kernels.attention.prefill.mma import warps
from kernels.attention.prefill.tiling import Tiling
from kernels.attention.prefill.wgmma import warpgroups
from kernels.attention.prefill.work_plan import Plan, plan
from kernels.attention.softmax import TILE
from kernels.launch import Kernel
from kernels.rope_write import cache_of
from kernels.tensor_maps import kept_tensor_map

__all__ = ["Plan", "Tiling", "attention", "catalogue", "plan", "warpgroups", "warps"]

# Bytes of keys and values that the blocks at work at a time should share: of an L2 of 50 MB.
SHARED_KEYS = 24 << 20


def catalogue(dtype: str, head_dims: Iterable[int] = (128,), paged: Iterable[bool] = (False, True)) -> list[Kernel]:
    """The kernels for heads of these dimensions, over a cache that is paged or not."""
    kernels = []
    for head_dim in head_dims:
        for arch in LIMITS:
            tiling = Tiling.choose(head_dim, arch)
            if tiling.multiply == "wgmma":
                kernels += [warpgroups(dtype, head_dim, tiling, divided) for divided in (False, True)]
            else:
                kernels += [warps(dtype, head_dim, each, tiling, arch) for each in paged]
    return kernels


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    scale: float,
    window: int,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Causal attention of the runs of tokens that `plan` was made of over the cache, where their keys and values are.

    q, out [T, Hq, D], heads contiguous, any token stride; D is 64 or 128. k_cache, v_cache [S, C, Hk, D] of the same
    strides, a head's positions one after another, Hq / Hk at most 16; all bf16, or all fp16; with table i32[S, pages]
    they are [P, page, Hk, D] and position p of slot s is place p % page of page table[s, p // page], page a power of
    two from 8 to 128. A token at position p reads positions max(0, p - window + 1) … p of its slot; window 0 is no
    window. All rows at multiples of 16 bytes. plan: of these T tokens, for heads of D elements, on this device (not
    checked: 0 <= slot < S, position < C); not in two launches at a time. tiling: another one than the device's, as the
    plan's. Returns out.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, heads, width = check.dimensions("attention", "q", q, "T, Hq, D")
    if width not in (64, 128):
        raise ValueError(f"attention: q has head dimension {width}: 64 or 128 needed")
    dtype = check.half_name("attention", "q", q)
    for name, given in (("q", q), ("out", out)):
        check.rows("attention", name, given, (count, heads, width), q.dtype)
        check.aligned("attention", name, given)
    cache = cache_of("attention", k_cache, v_cache, width, table, q.dtype)
    if cache.position_stride != width:
        found = f"k_cache has a stride of {cache.position_stride} elements between a head's positions"
        raise ValueError(f"attention: {found}: {width} needed, one after another")
    kv_heads = cache.kv_heads
    if kv_heads == 0 or heads % kv_heads or heads > 16 * kv_heads:
        raise ValueError(f"attention: q has {heads} heads and k_cache {kv_heads}: 1 to 16 times as many needed")
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}: a positive number needed")
    if window < 0:
        raise ValueError(f"attention: window is {window}: 0 (none) or a number of positions needed")
    chosen, arch, multiprocessors = work_plan.default_tiling(width, max(q.get_device(), 0))
    tiling = tiling or chosen
    if plan.rows != tiling.rows:
        raise ValueError(f"attention: plan has tiles of {plan.rows} queries: {tiling.rows} needed")
    if not count:
        return out
    group, factor = heads // kv_heads, scale * math.log2(math.e)
    pages_of = plan.work if table is None else table
    heads_at_once = _heads_at_once(plan.positions * width * 4, heads, group)
    if tiling.multiply == "wgmma":
        if len(plan.partials) and plan.partials.shape[1] != heads:
            raise ValueError(f"attention: plan is for {plan.partials.shape[1]} heads and q has {heads}")
        entries = len(plan.work) - 1
        box = TILE if table is None else 1 << cache.page_bits
        maps = [kept_tensor_map(q.flatten(1), (tiling.rows,))]
        maps += [kept_tensor_map(given.transpose(1, 2), (box,)) for given in (k_cache, v_cache)]
        warpgroups(dtype, width, tiling, len(plan.partials) > 0).launch(
            (min(entries * heads, multiprocessors),), *maps, plan.work, pages_of, out,
            plan.partials, plan.arrived, entries, heads, group, heads_at_once, 0 if table is None else cache.pages,
            TILE.bit_length() - 1 if table is None else cache.page_bits, out.stride(0), factor, window,
        )  # fmt: skip
    else:
        warps(dtype, width, table is not None, tiling, arch).launch(
            (heads_at_once, plan.tiles, heads // heads_at_once), q, k_cache, v_cache, plan.work, pages_of, out, group,
            cache.pages, cache.page_bits, cache.slot_stride, cache.head_stride, q.stride(0), out.stride(0), factor,
            window,
        )  # fmt: skip
    return out


def _heads_at_once(head_bytes: int, heads: int, group: int) -> int:
    """Query heads at work at a time, whose keys and values, `head_bytes` a KV head, stay in L2 meanwhile: a divisor of
    `heads` in whole groups of one KV head."""
    fitting = [n for n in range(group, heads + 1, group) if heads % n == 0 and n // group * head_bytes <= SHARED_KEYS]
    return max(fitting, default=group)
