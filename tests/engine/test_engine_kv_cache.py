"""engine/model/kv_cache.py: pages hold what rows do, to the bit, whichever they are and whatever lies on the others."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.config import ModelConfig
from engine.model.kv_cache import PAGE_SIZE, PAGE_SIZES, PagedCache
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.batch import Batch, TokenSpan
from engine.ops.protocol import Ops
from engine.ops.reference import ReferenceOps
from engine.runtime.decode_loop import DecodeLoop, DecodeRow
from engine.sampling_params import SamplingParams

OPS = ReferenceOps()
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_k=30)
# Grouped heads, and a window that begins and ends within pages.
CONFIG = ModelConfig.from_dict({
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 256, "hidden_size": 128,
    "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "sliding_window": 50, "tie_word_embeddings": False, "eos_token_id": None,
})  # fmt: skip


def build(ops: Ops = OPS, device: str = "cpu") -> Model:
    return Model(CONFIG, random_weights(CONFIG, device, torch.bfloat16, 0), ops)


@pytest.fixture(scope="module")
def model() -> Model:
    return build()


def poison(cache: PagedCache, pages: list[int]) -> None:
    for stored in (*cache.k, *cache.v):
        stored[pages] = torch.nan


def integers(values: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Growing:
    """A paged cache of NaN whose slots are given random pages one by one, as their sequences need them."""

    def __init__(self, model: Model, page_size: int = PAGE_SIZE, slots: int = 3, seed: int = 0) -> None:
        self.cache = model.new_paged_cache(pages=60, slots=slots, capacity=200, page_size=page_size)
        poison(self.cache, list(range(61)))
        self.free = random.Random(seed).sample(range(60), 60)
        self.pages: dict[int, list[int]] = {slot: [] for slot in range(slots)}

    def reach(self, slot: int, positions: int) -> None:
        """Give the slot pages for so many positions."""
        while len(self.pages[slot]) * self.cache.page_size < positions:
            self.pages[slot].append(self.free.pop())
        self.cache.assign({slot: self.pages[slot]})

    def move(self, slot: int) -> None:
        """Copy the slot's pages to others; the old ones are NaN and free."""
        old = self.pages[slot]
        self.pages[slot] = [self.free.pop() for _ in old]
        self.cache.copy_pages(list(zip(old, self.pages[slot], strict=True)))
        self.cache.assign({slot: self.pages[slot]})
        poison(self.cache, old)
        self.free = old + self.free

    def held(self, slot: int) -> list[torch.Tensor]:
        return [stored[self.pages[slot]].nan_to_num(-1.0) for stored in (*self.cache.k, *self.cache.v)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_reference_attention_reads_any_pages(data: st.DataObject):
    """Two sequences written in pieces, in any pages of a pool of NaN: prefill, chunks and single tokens."""
    page_size = data.draw(st.sampled_from(PAGE_SIZES))
    heads, groups, window = data.draw(st.sampled_from([(1, 1, 0), (2, 2, 0), (1, 3, 17), (2, 1, 64)]))
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=2, max_size=2))
    counts = [-(-length // page_size) for length in lengths]
    order = data.draw(st.permutations(range(sum(counts) + 2)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    table = torch.full((2, -(-150 // page_size)), order[-1], dtype=torch.int32)
    table[0, : counts[0]] = integers(order[: counts[0]])
    table[1, : counts[1]] = integers(order[counts[0] : sum(counts)])
    rows = torch.full((2, 2, 150, heads, 16), torch.nan, dtype=dtype)
    pool = torch.full((2, len(order), page_size, heads, 16), torch.nan, dtype=dtype)
    slots = integers([0] * lengths[0] + [1] * lengths[1])
    places = integers([*range(lengths[0]), *range(lengths[1])])
    total = len(places)
    q = torch.randn(total, heads * groups, 16, generator=generator).to(dtype)
    k, v = torch.randn(2, total, heads, 16, generator=generator).to(dtype)
    cut = data.draw(st.integers(0, total))
    for part in (slice(cut, total), slice(0, cut)):
        OPS.kv_write(k[part], v[part], rows[0], rows[1], slots[part], places[part])
        OPS.kv_write(k[part], v[part], pool[0], pool[1], slots[part], places[part], table)

    whole = OPS.attention(q, rows[0], rows[1], slots, places, 0.25, window)
    assert whole.isfinite().all()
    assert torch.equal(OPS.attention(q, pool[0], pool[1], slots, places, 0.25, window, table=table), whole)
    for part in (slice(cut, total), slice(cut // 2, cut // 2 + 1)):
        found = OPS.attention(q[part], pool[0], pool[1], slots[part], places[part], 0.25, window, table=table)
        assert torch.equal(found, whole[part])


@pytest.mark.parametrize("page_size", [8, PAGE_SIZE, 128])
def test_forward_equals_contiguous(model: Model, page_size: int):
    """A prompt whole, in chunks, token by token, and beside another one, as its pages are given to it."""
    ids, other = (random.Random(seed).choices(range(256), k=70) for seed in (1, 2))

    def forward(cache, parts: list[tuple[int, int, list[int]]], alone: bool = False) -> torch.Tensor:
        tokens = integers([token for _, _, some in parts for token in some])
        slots = integers([slot for slot, _, some in parts for _ in some])
        positions = integers([begin + i for _, begin, some in parts for i in range(len(some))])
        return model.forward(Batch(tokens, slots, positions, one_token_per_slot=alone), cache)

    with torch.inference_mode():
        whole = forward(model.new_cache(1, 200), [(0, 0, ids)])
        assert whole.isfinite().all()
        for chunk in (70, 33, 1):
            growing, found = Growing(model, page_size, seed=chunk), []
            for begin in range(0, 70, chunk):
                growing.reach(2, min(begin + chunk, 70))
                found.append(forward(growing.cache, [(2, begin, ids[begin : begin + chunk])], alone=chunk == 1))
            assert torch.equal(torch.cat(found), whole), f"chunks of {chunk}"
        growing = Growing(model, page_size)
        growing.reach(0, 60)
        growing.reach(1, 70)
        first = forward(growing.cache, [(0, 0, other[:60]), (1, 0, ids[:40])])
        assert torch.equal(first[60:], whole[:40])
        growing.move(1)
        assert torch.equal(forward(growing.cache, [(1, 40, ids[40:])]), whole[40:])


def check_decode(model: Model, graph: bool) -> None:
    """Three rows as four, over pages that are given and moved between steps, against a contiguous cache; a sequence
    that has no part in it is left as it was."""
    device = model.weights.device
    prompts = {0: [5, 6, 7], 2: list(range(10, 41)), 3: list(range(100, 190))}
    with torch.inference_mode():
        growing = Growing(model, slots=5)
        loops = [DecodeLoop(model, cache, graph) for cache in (model.new_cache(8, 200), growing.cache)]
        rows = []
        for slot, prompt in {1: [1] * 20, **prompts}.items():
            count = len(prompt) - 1
            growing.reach(slot, count)
            places = integers(list(range(count)), device)
            for loop in loops:
                tokens = integers(prompt[:-1], device)
                spans = [TokenSpan(count, slot, 0)]
                model.forward(Batch(tokens, torch.full_like(tokens, slot), places, spans=spans), loop.cache)
            rows.append(DecodeRow(slot, prompt[-1], count, DRAWN if slot == 2 else GREEDY, slot))
        before = growing.held(1)
        for loop in loops:
            loop.start(rows[1:])
        for step in range(20):
            for row in rows[1:]:
                growing.reach(row.slot, row.position + step + 1)
            if step % 7 == 6:
                growing.move(rows[step % 3 + 1].slot)
            logits, chosen = [], []
            for loop in loops:
                loop.enqueue()
                assert loop.size == 4 and loop.logits is not None
                logits.append(loop.logits[:3].clone())
                chosen.append(loop.wait())
            assert torch.equal(*logits) and chosen[0] == chosen[1], f"step {step}"
            assert logits[0].isfinite().all()
        assert all(map(torch.equal, growing.held(1), before))


def test_decode_loop_equals_contiguous(model: Model):
    check_decode(model, graph=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graph", [False, True])
def test_decode_loop_over_pages_on_a_gpu(graph: bool):
    from engine.ops.cuda import CudaOps

    check_decode(build(CudaOps("cuda", attention="flash", linear="tiled", sampling="split"), "cuda"), graph)


def test_decode_loop_needs_no_more_slots_than_rows(model: Model):
    """Rows that fill the bucket up take none of the cache's slots."""
    growing = Growing(model, slots=3)
    loop = DecodeLoop(model, growing.cache, graph=False)
    for slot in range(3):
        growing.reach(slot, 4)
    loop.start([DecodeRow(slot, 7, 0, GREEDY, 0) for slot in range(3)])
    loop.advance(4)
    first, *others = loop.generated()
    assert loop.size == 4 and others == [first, first] and len(first) == 4


def test_table(model: Model):
    cache = model.new_paged_cache(pages=9, slots=3, capacity=70)
    assert cache.page_size == 16 and cache.table.dtype == torch.int32
    address, spare = cache.table.data_ptr(), [9] * 5
    assert cache.table.tolist() == [spare] * 4
    cache.assign({2: [4, 0, 8], 0: [7]})
    cache.assign({})
    assert cache.table.tolist() == [[7, 9, 9, 9, 9], spare, [4, 0, 8, 9, 9], spare]
    cache.assign({2: [3, 4, 5, 6, 7], 0: [], 1: [1]})
    assert cache.table.tolist() == [spare, [1, 9, 9, 9, 9], [3, 4, 5, 6, 7], spare]
    assert cache.table.data_ptr() == address
    before = cache.table.clone()
    for pages_of, message in (
        ({0: [1], 3: [2]}, "slot 3; the cache has 3"),
        ({-1: [1]}, "slot -1; the cache has 3"),
        ({0: [1, 9]}, "page 9; the cache has 9"),
        ({0: [-1, 2]}, "page -1; the cache has 9"),
        ({1: [0] * 6}, "slot 1 is given 6 pages; 70 positions take 5"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.assign(pages_of)
    assert torch.equal(cache.table, before)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 2), st.lists(st.integers(0, 8), max_size=5), max_size=3), max_size=8))
def test_table_after_any_assignments(model: Model, assignments: list[dict[int, list[int]]]):
    """Slots whose pages grow, shrink, change and stay, some at a time; lists that are changed afterwards."""
    cache, held = model.new_paged_cache(pages=9, slots=3, capacity=70), {slot: [] for slot in range(3)}
    for pages_of in assignments:
        cache.assign(pages_of)
        held |= {slot: list(pages) for slot, pages in pages_of.items()}
        assert cache.table.tolist() == [[*held.get(slot, []), *[9] * 5][:5] for slot in range(4)]
        for pages in pages_of.values():
            pages += [4] * (5 - len(pages))
        cache.assign(pages_of)
        held |= pages_of
        assert cache.table.tolist() == [[*held.get(slot, []), *[9] * 5][:5] for slot in range(4)]


def test_copies(model: Model):
    cache = model.new_paged_cache(pages=5, slots=1, capacity=80)
    for index, stored in enumerate((*cache.k, *cache.v)):
        stored.copy_(torch.arange(6).view(-1, 1, 1, 1) + 10 * index)
    cache.copy_pages([(0, 3), (3, 1), (0, 4)])
    cache.copy_pages([])
    for index, stored in enumerate((*cache.k, *cache.v)):
        assert (stored == integers([0, 3, 2, 0, 0, 5]).view(-1, 1, 1, 1) + 10 * index).all()
    for page in (-1, 5):
        with pytest.raises(ValueError, match=f"page {page}; the cache has 5"):
            cache.copy_pages([(0, 1), (2, page)])


def test_shapes_and_sizes(model: Model):
    cache = model.new_paged_cache(pages=7, slots=2, capacity=33, page_size=8)
    assert len(cache.k) == len(cache.v) == 2 and cache.k[0].shape == cache.v[1].shape == (8, 8, 1, 64)
    assert (cache.slots, cache.capacity, cache.pages, cache.page_size) == (2, 33, 7, 8)
    assert cache.table.shape == (3, 5)
    assert cache.nbytes == 2 * 2 * 8 * 8 * 64 * 2
    assert model.new_cache(2, 33).table is None
    for wrong, message in (
        ({"pages": 0}, "a cache of 0 pages"),
        ({"page_size": 24}, "pages of 24 positions"),
        ({"page_size": 256}, "pages of 256 positions"),
        ({"slots": 0}, "0 slots × 33 positions"),
        ({"capacity": 0}, "2 slots × 0 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            model.new_paged_cache(**({"pages": 7, "slots": 2, "capacity": 33} | wrong))
