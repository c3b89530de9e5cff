"""engine/prompt_loop.py: prompts filled up to a bucket give the bits of the prompts alone."""

import random

import pytest
import torch

from engine.config import ModelConfig
from engine.kv_cache import KVCache, PagedCache
from engine.model import Model
from engine.ops import ReferenceOps, Run
from engine.prompt_loop import PromptLoop
from engine.weights import random_weights

FIELDS = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 256, "eos_token_id": None,
}  # fmt: skip
CONFIG = ModelConfig.from_dict(FIELDS)


def paged(model: Model) -> PagedCache:
    return model.new_paged_cache(pages=24, slots=2, capacity=96, page_size=8)


def check_prompts(model: Model, cache: KVCache, graph: bool) -> None:
    """Prompts of several lengths, some after tokens of their own, and then a token more, against plain passes."""
    device = model.weights.device
    loop, plain = PromptLoop(model, cache, graph), model.new_cache(2, 96)
    order = random.Random(0).sample(range(24), 24)

    def reach(run: Run) -> torch.Tensor:
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
        return model.forward(integers(ids), torch.full_like(places, run.slot), places, cache, logits_at=last)

    with torch.inference_mode():
        for run in (Run(5, 0, 0), Run(16, 1, 0), Run(9, 0, 5), Run(40, 1, 16), Run(5, 0, 14), Run(17, 1, 0)):
            ids = torch.randint(0, CONFIG.vocab_size, (run.count,)).tolist()
            others = reach(run)
            before = kept(others)
            assert loop.takes(run)
            assert torch.equal(loop.forward(ids, run), forward(plain, ids, run)), run
            assert torch.equal(kept(others), before), run
            # What the bucket's other tokens left behind is written again before it is read.
            after = Run(1, run.slot, run.position + run.count)
            reach(after)
            assert torch.equal(forward(loop.cache, [7], after), forward(plain, [7], after)), after


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prompts_alone_and_filled_up_are_equal(kind: str):
    weights = random_weights(CONFIG, "cpu", torch.bfloat16, 0)
    model = Model(CONFIG, weights, ReferenceOps(), max_positions=96)
    check_prompts(model, paged(model) if kind == "paged" else model.new_cache(2, 96), graph=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("versions", [("naive", "naive"), ("flash", "tiled")], ids=str)
def test_prompts_from_graphs(versions):
    from engine.cuda_ops import CudaOps

    weights = random_weights(CONFIG, "cuda", torch.bfloat16, 0)
    ops = CudaOps("cuda", attention=versions[0], linear=versions[1])
    model = Model(CONFIG, weights, ops, max_positions=96)
    check_prompts(model, model.new_cache(2, 96), graph=True)
    if versions[0] == "flash":
        check_prompts(model, paged(model), graph=True)


def test_what_does_not_fit():
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps(), max_positions=96)
    loop = PromptLoop(model, model.new_cache(1, 96), graph=False)
    for run in (Run(1, 0, 0), Run(257, 0, 0), Run(65, 0, 0), Run(5, 0, 81)):
        assert not loop.takes(run)
        with pytest.raises(ValueError, match="2 to 256 within 96 positions"):
            loop.forward([1] * run.count, run)
    with pytest.raises(ValueError, match="a CUDA graph of a model on 'cpu'"):
        PromptLoop(model, loop.cache, graph=True)
