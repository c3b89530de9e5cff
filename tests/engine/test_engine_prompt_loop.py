"""engine/runtime/prompt_loop.py: prompts filled up to a bucket give the bits of the prompts alone."""

import itertools
import random

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache, PagedCache
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.batch import Batch, TokenSpan
from engine.ops.reference import ReferenceOps
from engine.runtime.prompt_loop import PromptLoop
from engine.sampling_params import SamplingParams

FIELDS = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 256, "eos_token_id": None,
}  # fmt: skip
CONFIG = ModelConfig.from_dict(FIELDS)
GREEDY = SamplingParams(temperature=0.0)


def paged(model: Model) -> PagedCache:
    return model.new_paged_cache(pages=24, slots=2, capacity=96, page_size=8)


def check_prompts(model: Model, cache: KVCache, graph: bool) -> None:
    """Prompts of several lengths, some after tokens of their own, and then a token more, against plain passes."""
    device = model.weights.device
    loop, plain = PromptLoop(model, cache, graph), model.new_cache(2, 96)
    order = random.Random(0).sample(range(24), 24)

    def reach(run: TokenSpan) -> torch.Tensor:
        """Give a paged cache's slot the pages that the run ends in, and no more; which pages are others' then."""
        if not isinstance(cache, PagedCache):
            return torch.tensor([], dtype=torch.int64)
        own = order[run.slot :: 2][: -(-(run.position + run.count) // 8)]
        cache.assign({run.slot: own})
        return torch.tensor([page for page in range(24) if page not in own])

    def kept(pages: torch.Tensor) -> torch.Tensor:
        return torch.stack([stored[pages] for stored in (*cache.k, *cache.v)])

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def forward(cache, ids, run):
        places = integers(list(range(run.position, run.position + run.count)))
        last = integers([run.count - 1])
        return model.forward(Batch(integers(ids), torch.full_like(places, run.slot), places, logits_at=last), cache)

    with torch.inference_mode():
        parts = ((5, 0, 0), (16, 1, 0), (9, 0, 5), (40, 1, 16), (5, 0, 14), (1, 0, 19), (17, 1, 0))
        for run in itertools.starmap(TokenSpan, parts):
            ids = torch.randint(0, CONFIG.vocab_size, (run.count,)).tolist()
            others = reach(run)
            before = kept(others)
            assert loop.takes(run)
            assert torch.equal(loop.forward(ids, run), forward(plain, ids, run)), run
            assert torch.equal(kept(others), before), run
            # What the bucket's other tokens left behind is written again before it is read.
            after = TokenSpan(1, run.slot, run.position + run.count)
            reach(after)
            assert torch.equal(forward(loop.cache, [7], after), forward(plain, [7], after)), after


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prompts_alone_and_filled_up_are_equal(kind: str):
    weights = random_weights(CONFIG, "cpu", torch.bfloat16, 0)
    model = Model(CONFIG, weights, ReferenceOps(), max_positions=96)
    check_prompts(model, paged(model) if kind == "paged" else model.new_cache(2, 96), graph=False)


def check_choices(model: Model, cache: KVCache, graph: bool) -> None:
    """Tokens chosen greedily and drawn, two passes at a time, against a choice from the logits of plain passes."""
    device = model.weights.device
    kept = torch.full((cache.slots + 1,), -7, dtype=torch.int32, device=device)
    loop, plain = PromptLoop(model, cache, graph, kept), model.new_cache(2, 96)
    if isinstance(cache, PagedCache):
        cache.assign({0: list(range(12)), 1: list(range(12, 24))})

    def expected(ids: list[int], run: TokenSpan, params: SamplingParams, seed: int) -> int:
        tokens = torch.tensor(ids, dtype=torch.int32, device=device)
        places = torch.arange(run.position, run.position + run.count, dtype=torch.int32, device=device)
        logits = model.forward(Batch(tokens, torch.full_like(tokens, run.slot), places), plain)[-1:].contiguous()
        if params.temperature == 0:
            return int(model.ops.argmax(logits))
        floats = torch.tensor([params.temperature, params.top_p, params.min_p], device=device)[:, None]
        integers = torch.tensor([params.top_k, run.position + run.count], dtype=torch.int32, device=device)[:, None]
        seeds = torch.tensor([seed], device=device)
        return int(model.ops.sample(logits, floats[0], integers[0], floats[1], floats[2], seeds, integers[1]))

    drawn = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
             for t, k, p, m in ((0.8, 0, 1.0, 0.0), (1.5, 40, 0.9, 0.01))]  # fmt: skip
    ends, before = [0, 0], None
    with torch.inference_mode():
        for number, count in enumerate((5, 16, 1, 20, 3, 17, 2, 9)):
            slot, seed = number % 2, 2**62 + number
            run, ids = TokenSpan(count, slot, ends[slot]), torch.randint(0, CONFIG.vocab_size, (count,)).tolist()
            ends[slot] += count
            params = GREEDY if number % 3 == 0 else drawn[number % 2]
            loop.enqueue(ids, run, params, seed)
            right = expected(ids, run, params, seed)
            assert int(kept[slot]) == right
            if before is not None:
                assert loop.wait() == [[before]]
            before = right
        assert loop.wait() == [[before]] and int(kept[2]) == -7


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_choices(kind: str):
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps(), max_positions=96)
    check_choices(model, paged(model) if kind == "paged" else model.new_cache(2, 96), graph=False)


def test_logits_that_are_nan():
    weights = random_weights(CONFIG, "cpu", torch.bfloat16, 0)
    weights.norm.fill_(torch.nan)
    model, kept = Model(CONFIG, weights, ReferenceOps(), max_positions=96), torch.full((2,), 9, dtype=torch.int32)
    loop = PromptLoop(model, model.new_cache(2, 96), graph=False, tokens_of_slots=kept)
    loop.enqueue([1, 2], TokenSpan(2, 1, 0), GREEDY, 0)
    assert loop.wait() == [[-1]] and kept.tolist() == [9, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("versions", [("naive", "naive", "naive"), ("flash", "tiled", "split")], ids=str)
def test_prompts_from_graphs(versions: tuple[str, str, str]):
    from engine.ops.cuda import CudaOps

    weights = random_weights(CONFIG, "cuda", torch.bfloat16, 0)
    ops = CudaOps("cuda", attention=versions[0], linear=versions[1], sampling=versions[2])
    model = Model(CONFIG, weights, ops, max_positions=96)
    for check in (check_prompts, check_choices):
        for graph in (True, False):
            check(model, model.new_cache(2, 96), graph)
            if versions[0] == "flash":
                check(model, paged(model), graph)


def test_what_does_not_fit():
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps(), max_positions=96)
    loop = PromptLoop(model, model.new_cache(1, 96), graph=False)
    for run in (TokenSpan(0, 0, 0), TokenSpan(257, 0, 0), TokenSpan(65, 0, 0), TokenSpan(5, 0, 81)):
        assert not loop.takes(run)
        with pytest.raises(ValueError, match="1 to 256 within 96 positions"):
            loop.forward([1] * run.count, run)
    with pytest.raises(ValueError, match="a CUDA graph of a model on 'cpu'"):
        PromptLoop(model, loop.cache, graph=True)
