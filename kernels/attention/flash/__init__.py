"""Flash decode, version "flash": tensor cores over tiles of 128 positions, fused with all that comes before attention.

| step | file | idea |
|---|---|---|
| copy | copy.py | K and V tiles by cp.async, contiguous or paged, the next one while the last is worked on |
| prologue | prologue.py | norm, RoPE and cache write of the new token in the same launch, under the first copies |
| tile | tile.py | the query heads of a KV head (GQA) are the rows of mma.sync; online softmax; P·V |
| split-KV | combine.py | segments of 512 positions by several blocks, combined in order by the last of them |

What the steps gained: docs/decisions.md. Shares of the limit, KV bytes over bandwidth: "Every kernel under the
roofline" of the page, `reports/site/index.html` (`make report`).

One block of 128 threads walks over segments of a token's positions for the query heads that share a KV head: they are
the rows of the matrix products.

Order of operations, for the token at position p that attends to positions begin … p (any version may compute it so):
1. Segments are positions 512 s … 512 s + 511, tiles 128 t … 128 t + 127; those without a position of the token are
   left out. Each segment is computed by itself, from m = -inf, l = 0, O = 0, its tiles in order:
2. score_j = q · k_j by mma.sync (m16n8k16, fp32) over d in order; -inf for positions outside begin … p.
3. m' = max(m, the tile's largest score); factor = scale * log2 e in fp32; alpha = 2 ** ((m - m') * factor);
   w_j = 2 ** fma(score_j, factor, -(m' * factor)); every 2 ** x is ex2.approx.ftz.
4. l is four sums: lane c of four adds up columns 8 i + 2 c, 8 i + 2 c + 1 of the tile for i = 4 g … 4 g + 3, in order,
   to u_g (g = 0 … 3); l_c = fma(l_c, alpha, ((u_0 + u_1) + u_2) + u_3), w in fp32.
5. O = O * alpha, then w (rounded to the dtype) times V by mma.sync over the tile's positions in order, added to it.
6. At the segment's end l = (l_0 + l_1) + (l_2 + l_3).
7. Segments are combined in order into M, L, O, which start as -inf, 0, 0: M' = max(M, m_s), a = 2 ** ((M - M') *
   factor), b = 2 ** ((m_s - M') * factor), L = fma(L, a, l_s * b), O = fma(O, a, o_s * b); out = O / L, rounded once.
Which block computes a segment changes no bit.
"""

from __future__ import annotations

import math

import torch

from kernels import check
from kernels.attention.flash.combine import TOKENS, workspace_size
from kernels.attention.flash.kernel import flash
from kernels.attention.softmax import SEGMENT
from kernels.rope_write import Cache, cache_of, check_projection, check_tokens, norm_kind

__all__ = ["SEGMENT", "TOKENS", "attention", "decode", "flash", "workspace_size"]

# Blocks of a launch that has fewer tokens and KV heads than this: their segments are spread over more blocks.
BLOCKS = 1024


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a packed list of tokens over the cache: prefill, decode and mixtures of them.

    q, out [T, Hq, D], heads contiguous, any token stride; D is 64 or 128. k_cache, v_cache [S, C, Hk, D] of the same
    strides, the last one 1, Hq / Hk at most 16; all bf16, or all fp16; with table i32[S, pages] they are [P, page, Hk,
    D] and position p of slot s is place p % page of page table[s, p // page], page a power of two from 8 to 128. Token
    t reads positions max(0, positions[t] - window + 1) … positions[t] of slots[t]; window 0 is no window. slots,
    positions i32[T] with 0 <= slot < S and 0 <= position < C (not checked). All rows at multiples of 16 bytes.
    workspace fp32, contiguous, at least `workspace_size(T, Hq, D, C)` elements, zero when it is first used and left to
    calls with the same Hq, D and C alone; its counters are zero again after each call. Returns out.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    count, heads, width = check.dimensions("attention", "q", q, "T, Hq, D")
    if width not in (64, 128):
        raise ValueError(f"attention: q has head dimension {width}: 64 or 128 needed")
    check.half_name("attention", "q", q)
    check.rows("attention", "q", q, (count, heads, width), q.dtype)
    check.rows("attention", "out", out, (count, heads, width), q.dtype)
    check.aligned("attention", "q", q)
    cache = cache_of("attention", k_cache, v_cache, width, table, q.dtype)
    check_tokens("attention", count, width, k_cache, slots, positions)
    _launch("attention", "q", q, None, None, 0.0, None, None, k_cache, v_cache, slots, positions, scale, window, out,
            workspace, table, cache, heads, width)  # fmt: skip
    return out


def decode(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rounding: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """`kernels.rope_write` and then `attention`, in one kernel with the same bits, for tokens of different slots.

    qkv [T, (Hq + 2 Hk) D], rows contiguous; out [T, Hq D], rows contiguous, of one dtype; no slot twice (not checked).
    All else as `rope_write` and `attention`: the new keys and values are in the cache afterwards. Returns out.
    It reads positions, slots, table and the cache while the kernel ahead may still run: in a chain of programmatic
    launches they must be older than the chain's `kernels.embedding`, which lets nothing behind it start before that.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    check.dimensions("decode", "out", out, "T, Hq D")
    check.dimensions("decode", "cos", cos, "P, D/2")
    check.half_name("decode", "qkv", qkv)
    cache = cache_of("decode", k_cache, v_cache, k_cache.shape[-1], table, qkv.dtype)
    heads = out.shape[1] // max(1, 2 * cos.shape[1])
    width = check_projection("decode", qkv, q_norm, k_norm, rounding, cos, sin, heads, cache.kv_heads)
    check_tokens("decode", len(qkv), width, k_cache, slots, positions)
    check.rows("decode", "out", out, (len(qkv), heads * width), qkv.dtype)
    _launch("decode", norm_kind(q_norm, rounding), qkv, q_norm, k_norm, eps, cos, sin, k_cache, v_cache, slots,
            positions, scale, window, out, workspace, table, cache, heads, width)  # fmt: skip
    return out


def _launch(
    operation: str,
    source: str,
    x: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    workspace: torch.Tensor,
    table: torch.Tensor | None,
    cache: Cache,
    heads: int,
    width: int,
) -> None:
    kv_heads = cache.kv_heads
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{operation}: q has {heads} heads and k_cache {kv_heads}: a multiple of the cache's needed")
    if heads // kv_heads > 16:
        raise ValueError(f"{operation}: q has {heads} heads and k_cache {kv_heads}: at most 16 times as many needed")
    if not scale > 0:
        raise ValueError(f"{operation}: scale is {scale}: a positive number needed")
    if window < 0:
        raise ValueError(f"{operation}: window is {window}: 0 (none) or a number of positions needed")
    check.aligned(operation, "out", out)
    count = len(x)
    needed = workspace_size(count, heads, width, cache.capacity)
    if workspace.dtype != torch.float32:
        raise TypeError(f"{operation}: workspace is {workspace.dtype}: torch.float32 needed")
    if workspace.numel() < needed or not workspace.is_contiguous():
        raise ValueError(f"{operation}: workspace has {workspace.numel()} elements: {needed}, contiguous, needed")
    check.aligned(operation, "workspace", workspace)
    segments = -(-cache.capacity // SEGMENT)
    kernel = flash(check.HALVES[x.dtype], width, heads // kv_heads, source, table is not None)
    counters = workspace.view(torch.int32)
    factor = scale * math.log2(math.e)
    for begin in range(0, count, TOKENS):
        here = slice(begin, begin + TOKENS)
        tokens = min(TOKENS, count - begin)
        shares = min(segments, -(-BLOCKS // (tokens * kv_heads)))
        kernel.launch(
            (shares, kv_heads, tokens), x[here], _or(q_norm, x), _or(k_norm, x), _or(cos, workspace),
            _or(sin, workspace), k_cache, v_cache, slots[here], positions[here], _or(table, slots), out[here],
            workspace, counters, heads, kv_heads, cache.pages, cache.page_bits, segments, cache.slot_stride,
            cache.position_stride, cache.head_stride, x.stride(0), out.stride(0), factor, eps, window,
        )  # fmt: skip


def _or(given: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """The tensor, or one that a kernel that has no use for it may be given."""
    return other if given is None else given
