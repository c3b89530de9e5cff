"""Attention of random runs of tokens, drawn around the bounds of tiles, halves of tiles, warps and segments.

Every token against float64, so tightly that one position too many or too few is seen; what no token may see is NaN.
"""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from kernel_numerics import DEVICE, assert_equal, assert_within, ints, poisoned

from kernels.attention import flash, prefill, reference
from kernels.attention.prefill import Tiling, work_plan
from kernels.cuda import SIMULATED

WIDTH = 64
WARPS, WARPGROUPS = Tiling("mma", 32, 2), Tiling("wgmma", 128, 2)
HAS_WGMMA = SIMULATED or torch.cuda.get_device_capability()[0] == 9


@dataclass(frozen=True)
class Case:
    """Runs of tokens (how many, the first one's position), each in a slot of its own. page: 0 is a contiguous cache."""

    runs: tuple[tuple[int, int], ...]
    window: int = 0
    heads: int = 1
    kv_heads: int = 1
    page: int = 0

    def first(self, position):
        """The first position that the token at `position` sees."""
        return max(0, position - self.window + 1) if self.window else 0

    def tokens(self):
        """Slot and position of each token."""
        slots = [slot for slot, (count, _) in enumerate(self.runs) for _ in range(count)]
        return ints(*slots), ints(*(begin + i for count, begin in self.runs for i in range(count)))

    def inputs(self):
        """q, and keys and values [S, C, Hk, D], NaN where no token of the slot sees them."""
        torch.manual_seed(hash(self))
        count = sum(count for count, _ in self.runs)
        capacity = -(-max(sum(run) for run in self.runs) // 128) * 128
        # Scores of a like size: no position is lost beside another.
        q = (torch.randn(count, self.heads, WIDTH, device=DEVICE) / 2).bfloat16()
        caches = []
        for _ in range(2):
            cache = poisoned(len(self.runs), self.kv_heads, capacity, WIDTH, dtype=torch.bfloat16)
            for slot, (count, begin) in enumerate(self.runs):
                seen = slice(self.first(begin), begin + count)
                cache[slot, :, seen] = torch.randn_like(cache[slot, :, seen])
            caches.append(cache.transpose(1, 2))
        return q, *caches

    def paged(self, *caches):
        """The caches in pages, in any order, and the table; pages of which no token sees anything are nowhere."""
        slots, capacity, heads, width = caches[0].shape
        order = torch.randperm(slots * capacity // self.page, device=DEVICE)
        table = order.view(slots, -1).int()
        pools = []
        for cache in caches:
            pool = poisoned(len(order), heads, self.page, width, dtype=cache.dtype).transpose(1, 2)
            pool[order] = cache.reshape(-1, self.page, heads, width)
            pools.append(pool)
        for slot, (count, begin) in enumerate(self.runs):
            table[slot, : self.first(begin) // self.page] = table[slot, (begin + count - 1) // self.page + 1 :] = -1
        return *pools, table


@st.composite
def cases(draw, counts, rows, most):
    """counts: tokens of a run; rows: of them those at whose position, or at whose window's begin, a bound is drawn;
    most: runs."""
    window = draw(st.sampled_from([0, 1, 2, 17, 64, 65, 127, 128, 129, 142, 190]))
    runs = []
    for _ in range(draw(st.integers(1, most))):
        count = draw(st.sampled_from(counts))
        row = draw(st.sampled_from([row for row in (*rows, count - 1) if row < count]))
        # A long history is cheap behind a window.
        bound = draw(st.sampled_from([64, 128, 256, *([512, 1024] if window else [])]))
        begin = bound + draw(st.integers(-2, 1)) - row
        if window and draw(st.booleans()):
            begin += window - 1
        runs.append((count, max(0, begin)))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]))
    return Case(tuple(runs), window, heads, kv_heads, draw(st.sampled_from([0, 8, 64, 128])))


def drawn(count, *args, **kwargs):
    """Decorator: `count` cases, the same each time; none is made smaller, as it is small already and slow."""
    return lambda test: settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
    )(given(case=cases(*args, **kwargs))(test))


def assert_as_exact(case, out, q, k_cache, v_cache):
    """Within what rounding weights and results to bf16 makes of it."""
    q, k_cache, v_cache = q.double(), k_cache.double(), v_cache.double()
    slots, positions = case.tokens()
    exact = reference(q, k_cache, v_cache, slots, positions, 0.125, case.window)
    # Of sums of many products with weights that are rounded each by itself.
    spread = []
    for row, slot, position in zip(q, slots.tolist(), positions.tolist(), strict=True):
        seen = slice(case.first(position), position + 1)
        k, v = (given[slot, seen].repeat_interleave(case.heads // case.kv_heads, dim=1) for given in (k_cache, v_cache))
        weights = torch.softmax(torch.einsum("hd,jhd->hj", row, k) * 0.125, dim=-1)
        spread.append(torch.einsum("hj,jhd->hd", weights**2, v**2).sqrt())
    assert_within(out, exact, exact.abs() * 2**-8 + torch.stack(spread) * 2**-7)


def prefill_attention(case, tiling, q, k_cache, v_cache, divided=False):
    table = None
    if case.page:
        k_cache, v_cache, table = case.paged(k_cache, v_cache)
    runs = [(count, slot, begin) for slot, (count, begin) in enumerate(case.runs)]
    with mock.patch.object(work_plan, "default_tiling", lambda *_: (tiling, "sm_90a", 132)):
        plan = prefill.plan(runs, WIDTH, DEVICE, tiling, heads=case.heads if divided else 0)
    plan.partials.fill_(float("nan"))
    out = poisoned(*q.shape, dtype=q.dtype)
    prefill.attention(q, k_cache, v_cache, plan, 0.125, case.window, out, table, tiling)
    assert not plan.work[0, :2].any() and not plan.arrived.any()
    return out


def flash_attention(case, q, k_cache, v_cache):
    slots, positions = case.tokens()
    capacity, table = k_cache.shape[1], None
    if case.page:
        k_cache, v_cache, table = case.paged(k_cache, v_cache)
    out = poisoned(*q.shape, dtype=q.dtype)
    workspace = torch.zeros(flash.workspace_size(len(q), case.heads, WIDTH, capacity), device=DEVICE)
    return flash.attention(q, k_cache, v_cache, slots, positions, 0.125, case.window, out, workspace, table)


@drawn(4, counts=[1, 2, 16, 18, 32, 33], rows=(0, 15, 16, 31), most=2)
# The position that a warp's first row does not see is the first of a tile's second half; the last of a tile.
@example(Case(((2, 62), (18, 46), (2, 126), (18, 110))))
# The last row's window begins at the second position of a tile, or of its second half, that other rows see whole.
@example(Case(((16, 255), (32, 239), (16, 319)), window=142))
def test_warps(case):
    q, *caches = case.inputs()
    assert_as_exact(case, prefill_attention(case, WARPS, q, *caches), q, *caches)


@pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is sm_90a's")
@drawn(2, counts=[1, 65, 128], rows=(0, 63, 64, 127), most=1)
# As of warps, by warpgroups of 64 rows: the first tile and the second one.
@example(Case(((65, 62),)))
@example(Case(((1, 254),)))
@example(Case(((64, 255),), window=190))
@example(Case(((2, 514),), window=20))
def test_warpgroups(case):
    q, *caches = case.inputs()
    out = prefill_attention(case, WARPGROUPS, q, *caches)
    assert_as_exact(case, out, q, *caches)
    segments = range(flash.SEGMENT, 2048, flash.SEGMENT)
    if any(case.first(begin) < segment < begin + count for count, begin in case.runs for segment in segments):
        assert_equal(prefill_attention(case, WARPGROUPS, q, *caches, divided=True), out)


@drawn(3, counts=[1], rows=(0,), most=2)
@example(Case(((2, 126), (1, 64)), heads=9))
@example(Case(((2, 511),), window=129, page=64))
def test_token_by_token(case):
    q, *caches = case.inputs()
    out = flash_attention(case, q, *caches)
    assert_as_exact(case, out, q, *caches)
    assert_equal(prefill_attention(replace(case, page=0), WARPS, q, *caches), out)
