"""On a GPU, two layers of OLMo-2 7B's shape: a sequence's logits are the same bits however its step is run."""

from __future__ import annotations

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.batch import Batch, TokenSpan
from engine.runtime.decode_loop import DecodeLoop, DecodeRow
from engine.sampling_params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GREEDY = SamplingParams(temperature=0.0)
SHAPE = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def model(request: pytest.FixtureRequest) -> Model:
    from engine.ops.cuda import CudaOps

    config = ModelConfig.from_dict(SHAPE)
    weights = random_weights(config, "cuda", request.param, 0)
    return Model(config, weights, CudaOps("cuda", attention="flash", linear="tiled", sampling="split"))


def logits(model: Model, neighbours: int, slot: int, graph: bool) -> tuple[torch.Tensor, list[int]]:
    """Of the sequence under test after four steps in `slot`, and its tokens, beside random neighbours."""
    rows = neighbours + 1
    loop = DecodeLoop(model, model.new_cache(rows if rows & (rows - 1) == 0 else 1 << rows.bit_length(), 700), graph)
    noise = torch.Generator("cuda").manual_seed(slot + rows)
    for index in range(model.config.num_hidden_layers):
        for cache in (loop.cache.k[index], loop.cache.v[index]):
            cache.normal_(generator=noise)
            own = torch.randn(cache.shape[1:], generator=torch.Generator().manual_seed(index), dtype=torch.float32)
            cache[slot] = own.to(cache.device, cache.dtype)
    sequences = [DecodeRow(i, 17 + i, 40 + 3 * i % 600, GREEDY, i) for i in range(rows)]
    sequences[slot] = DecodeRow(slot, 11, 600, GREEDY, 0)
    loop.start(sequences)
    loop.advance(4)
    assert loop.logits is not None
    return loop.logits[slot].clone(), loop.generated()[slot]


@torch.inference_mode()
def test_alone_in_batches_and_from_graphs(model: Model):
    alone, tokens = logits(model, 0, 0, graph=False)
    assert torch.isfinite(alone).all()
    for batch in (1, 2, 7, 16, 64, 256):
        for slot in {0, batch // 2, batch - 1}:
            for graph in (False, True):
                ours, same = logits(model, batch - 1, slot, graph)
                assert torch.equal(ours, alone) and same == tokens, f"batch {batch}, slot {slot}, graph {graph}"


@torch.inference_mode()
def test_repeats(model: Model):
    loop = DecodeLoop(model, model.new_cache(4, 300), graph=True)
    for cache in (*loop.cache.k, *loop.cache.v):
        cache.normal_()
    rows = [DecodeRow(i, i, 200, GREEDY, i) for i in range(4)]
    loop.start(rows)
    loop.advance(1)
    assert loop.logits is not None
    first = loop.logits.clone()
    for _ in range(250):
        loop.start(rows)
        loop.advance(1)
        assert torch.equal(loop.logits, first)


@torch.inference_mode()
def test_prompts_whole_in_chunks_packed_and_token_by_token(model: Model):
    length, steps = 1100, 200
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).int().cuda()
    places = torch.arange(length, dtype=torch.int32, device="cuda")
    slots = torch.zeros_like(places)

    def run(chunk: int, until: int = length) -> torch.Tensor:
        cache, found = model.new_cache(1, length), []
        for begin in range(0, until, chunk):
            here = slice(begin, min(begin + chunk, until))
            spans = [TokenSpan(here.stop - begin, 0, begin)]
            found.append(model.forward(Batch(ids[here], slots[here], places[here], spans=spans), cache))
        return torch.cat(found)

    whole = run(length)
    assert torch.isfinite(whole).all()
    for chunk in (17, 128, 1000):
        assert torch.equal(run(chunk), whole), f"chunks of {chunk}"
    assert torch.equal(run(1, steps), whole[:steps])
    assert torch.equal(model.forward(Batch(ids, slots, places), model.new_cache(1, length)), whole), "without spans"
    before = 37
    packed = torch.cat([ids.flip(0)[:before], ids]), torch.cat([slots[:before] + 1, slots])
    spans = [TokenSpan(before, 1, 0), TokenSpan(length, 0, 0)]
    batch = Batch(*packed, torch.cat([places[:before], places]), spans=spans)
    beside = model.forward(batch, model.new_cache(2, length))
    assert torch.equal(beside[before:], whole), "packed with another"


@torch.inference_mode()
@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_pages_in_any_order(model: Model, page_size: int):
    """A prompt and what is decoded after it, over shuffled pages among others of NaN, as over a contiguous cache."""
    length, steps = 1100, 20
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).int().cuda()
    places = torch.arange(length, dtype=torch.int32, device="cuda")
    slots = torch.zeros_like(places)
    found = []
    for chunk in (None, length, 300):
        cache = model.new_cache(1, length + steps)
        if chunk:
            count = -(-(length + steps) // page_size)
            cache = model.new_paged_cache(pages=2 * count, slots=1, capacity=length + steps, page_size=page_size)
            for stored in (*cache.k, *cache.v):
                stored.fill_(torch.nan)
            order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(chunk)).tolist()
            cache.assign({0: order[:count]})
        parts = []
        for begin in range(0, length, chunk or length):
            here = slice(begin, min(begin + (chunk or length), length))
            spans = [TokenSpan(here.stop - begin, 0, begin)]
            parts.append(model.forward(Batch(ids[here], slots[here], places[here], spans=spans), cache))
        loop = DecodeLoop(model, cache, graph=True)
        loop.start([DecodeRow(0, 7, length, GREEDY, 0)])
        loop.advance(steps)
        assert loop.logits is not None
        found.append((torch.cat(parts), loop.generated(), loop.logits.clone()))
    logits, tokens, last = found[0]
    assert torch.isfinite(logits).all() and torch.isfinite(last).all()
    for others in found[1:]:
        assert torch.equal(others[0], logits) and others[1] == tokens and torch.equal(others[2], last)
