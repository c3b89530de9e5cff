"""The kernels behind the forward graph: on the GPU where there is one, else in the simulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.llm import LLM, EngineConfig
from engine.model.config import ModelConfig
from engine.model.linear import DenseLinear, TiledLinear
from engine.model.tensors import checkpoint_tensors
from engine.model.transformer import Model
from engine.model.weights import LayerWeights, Weights, random_weights
from engine.ops.batch import AttentionLayer, Batch, LayerCache, TokenSpan
from engine.ops.protocol import Ops
from engine.ops.reference import ReferenceOps, gumbel
from engine.sampling_params import SamplingParams
from kernels.launch import machine_of
from kernels.tiles import to_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MICRO = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 64, "eos_token_id": None,
}  # fmt: skip
MICRO_LLAMA = MICRO | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 1, "hidden_size": 64,
    "head_dim": 32, "intermediate_size": 64, "num_hidden_layers": 1,
}  # fmt: skip


MICRO_LLAMA_64 = MICRO | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 1, "num_hidden_layers": 1,
}  # fmt: skip
FAST = {"attention": "flash", "linear": "tiled", "sampling": "split"}


def cuda_ops(**versions: str) -> Ops:
    from engine.ops.cuda import CudaOps

    return CudaOps(DEVICE, **versions)


def micro(fields: dict, dtype: torch.dtype) -> tuple[ModelConfig, Weights]:
    config = ModelConfig.from_dict(fields)
    weights = random_weights(config, "cpu", dtype, 0)
    for _, tensor in weights.named_tensors():
        if tensor.ndim == 2:
            tensor *= 5  # so that rounding is not hidden behind tiny activations
    return config, weights


def moved(held: Any) -> Any:
    if isinstance(held, DenseLinear):
        return DenseLinear(held.weight.to(DEVICE))
    return None if held is None else held.to(DEVICE)


def on_device(weights: Weights) -> Weights:
    layers = []
    for layer in weights.layers:
        layers.append(LayerWeights(**{name: moved(held) for name, held in vars(layer).items()}))
    embedding, norm, head = (moved(held) for held in (weights.embedding, weights.norm, weights.lm_head))
    return Weights(weights.dtype, embedding, layers, norm, head)


@pytest.mark.parametrize(
    ("fields", "dtype", "versions"),
    [
        (MICRO, torch.bfloat16, {}),
        (MICRO_LLAMA, torch.float32, {}),
        (MICRO, torch.bfloat16, FAST),
        (MICRO_LLAMA_64, torch.bfloat16, FAST),
        (MICRO_LLAMA, torch.float32, FAST),
        pytest.param(MICRO, torch.float16, FAST, marks=pytest.mark.slow),
        pytest.param(MICRO_LLAMA_64, torch.float16, FAST, marks=pytest.mark.slow),
    ],
    ids=[
        *("olmo2 bf16", "llama fp32", "olmo2 bf16 fast", "llama bf16 fast", "llama fp32 with fast versions asked for"),
        *("olmo2 fp16 fast", "llama fp16 fast"),
    ],
)
def test_forward_equals_reference(fields: dict, dtype: torch.dtype, versions: dict[str, str]):
    """A prompt of two tokens, then one more beside another sequence: every observed tensor."""
    config, weights = micro(fields, dtype)
    results = []
    for ops, device in ((ReferenceOps(), "cpu"), (cuda_ops(**versions), DEVICE)):
        model = Model(config, weights if device == "cpu" else on_device(weights), ops, max_positions=64)
        cache = model.new_cache(2, 64)
        seen: dict[str, torch.Tensor] = {}
        for step, (tokens, slots, positions) in enumerate([([3, 5], [1, 1], [0, 1]), ([7, 9], [0, 1], [0, 2])]):
            packed = torch.tensor([tokens, slots, positions], dtype=torch.int32, device=device)

            def keep(name: str, x: torch.Tensor, step: int = step, seen: dict[str, torch.Tensor] = seen) -> None:
                seen[f"{step} {name}"] = x.float().cpu().clone()

            model.forward(Batch(*packed), cache, observe=keep)
        results.append(seen)
    expected, found = results
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # 16 bits: sums in another order round some values to the neighbour, and later layers spread that.
        allowed = (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps) * tensor.abs().max()
        assert (found[name] - tensor).abs().max() <= allowed, name


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({**MICRO, "num_hidden_layers": 1}, torch.bfloat16),
        pytest.param({**MICRO, "num_hidden_layers": 1}, torch.float16, marks=pytest.mark.slow),
        (MICRO_LLAMA_64, torch.bfloat16),
    ],
    ids=["olmo2 bf16", "olmo2 fp16", "llama bf16"],
)
def test_fast_versions_of_decode_and_prefill_are_equal(fields: dict, dtype: torch.dtype):
    """Two tokens in one list, one at a time, the second beside another sequence: the same bits."""
    config, weights = micro(fields, dtype)
    model = Model(config, on_device(weights), cuda_ops(**FAST), max_positions=64)

    def run(cache: Any, parts: list[tuple[int, int, int]], **known: Any) -> torch.Tensor:
        packed = torch.tensor(parts, dtype=torch.int32, device=DEVICE).t().contiguous()
        return model.forward(Batch(*packed, **known), cache)

    whole = run(model.new_cache(2, 64), [(3, 1, 0), (5, 1, 1)])
    assert torch.equal(run(model.new_cache(2, 64), [(3, 1, 0), (5, 1, 1)], spans=[TokenSpan(2, 1, 0)]), whole)
    cache = model.new_cache(2, 64)
    assert torch.equal(run(cache, [(3, 1, 0)], one_token_per_slot=True)[0], whole[0])
    assert torch.equal(run(cache, [(7, 0, 0), (5, 1, 1)], one_token_per_slot=True)[1], whole[1])


@pytest.mark.parametrize("kind", ["decode", "runs", "mixed"])
def test_attention_over_pages_equals_contiguous(kind: str, monkeypatch: pytest.MonkeyPatch):
    """A token in each of two slots, or the next two of one, over pages in any order among others of NaN; some or none
    of them alone."""
    alone, spans = kind == "decode", [TokenSpan(2, 1, 9)]
    ops, heads, dim = cuda_ops(attention="flash"), 2, 64
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)

    rows = noise(2, 2, 16, 1, dim)  # keys and values of two slots of 16 positions
    order, table = [4, 0, 3, 2], torch.tensor([[4, 0, 5], [3, 2, 5]], dtype=torch.int32, device=DEVICE)
    pool = torch.full((2, 6, 8, 1, dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    pool[:, order] = rows.view(2, 4, 8, 1, dim)
    slots, positions = torch.tensor([[0, 1], [3, 9]] if alone else [[1, 1], [9, 10]]).int().to(DEVICE)
    angles = torch.rand(16, dim // 2, generator=generator).to(DEVICE)
    projected = noise(2, (heads + 2) * dim)
    plan = ops.plan(spans, torch.bfloat16, heads, 1, dim) if kind == "runs" else None

    batch = Batch(slots, slots, positions, one_token_per_slot=alone, plan=plan)
    layer = AttentionLayer(None, None, 0.0, "once", angles.cos(), angles.sin(), 0.125, 0)

    def attend(cache: torch.Tensor, pages: torch.Tensor | None, wanted: list[int] | None = None) -> torch.Tensor:
        rows = None if wanted is None else torch.tensor(wanted, dtype=torch.int32, device=DEVICE)
        return ops.attend(projected.clone(), layer, LayerCache(cache[0], cache[1], pages), batch, rows)

    results = [attend(rows, None), attend(pool, table)]
    assert torch.equal(*results) and results[0].isfinite().all()
    for few in (1, 16):
        monkeypatch.setattr("engine.ops.cuda.FEW", few)
        assert torch.equal(attend(pool, table, [1]), results[0][1:])
        assert attend(rows, None, []).shape == (0, heads * dim)
    assert torch.equal(pool[:, order].view_as(rows), rows) and pool[:, [1, 5]].isnan().all()


def test_where_pages_cannot_be():
    from engine.model.kv_cache import PAGE_SIZES
    from kernels.rope_write import PAGES

    assert PAGE_SIZES == PAGES
    for fields, dtype, versions, found in (
        (MICRO, torch.bfloat16, {}, "attention = 'naive', torch.bfloat16, head_dim 64, 2 query heads and 2 KV heads"),
        (MICRO, torch.float32, FAST, "attention = 'flash', torch.float32"),
        (MICRO_LLAMA, torch.bfloat16, FAST, "attention = 'flash', torch.bfloat16, head_dim 32"),
    ):
        config, weights = micro(fields, dtype)
        model = Model(config, on_device(weights), cuda_ops(**versions), max_positions=64)
        with pytest.raises(
            ValueError, match=f"needs attention = 'flash', dtype = 'bfloat16' or 'float16', .* here {found}"
        ):
            model.new_paged_cache(pages=4, slots=1, capacity=64)
    config, weights = micro(MICRO_LLAMA_64, torch.bfloat16)
    model = Model(config, on_device(weights), cuda_ops(**FAST), max_positions=64)
    cache = model.new_paged_cache(pages=4, slots=1, capacity=64)
    x, at = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    naive = cuda_ops()
    with pytest.raises(ValueError, match="kv_write: table is given"):
        naive.kv_write(x, x, cache.k[0], cache.v[0], at, at, cache.table)
    with pytest.raises(ValueError, match="attention: table is given"):
        naive.attention(x, cache.k[0], cache.v[0], at, at, 0.125, 0, table=cache.table)


def test_sampling_draws_what_the_reference_draws():
    torch.manual_seed(0)
    logits = torch.randn(4, 64) * 3
    logits[1, 5] = torch.nan
    settings = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5]),
        "top_k": torch.tensor([0, 9, 0, 0], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 1.0, 0.8, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.05]),
        "seed": torch.tensor([1, 2, 2**40 + 3, 4]),
        "position": torch.tensor([0, 100, 7, 3], dtype=torch.int32),
    }
    expected = ReferenceOps().sample(logits, **settings)
    ops, there = cuda_ops(), {name: value.to(DEVICE) for name, value in settings.items()}
    assert ops.sample(logits.to(DEVICE), **there).tolist() == expected.tolist()
    assert ops.argmax(logits.to(DEVICE)).tolist() == ReferenceOps().argmax(logits).tolist()
    assert expected[0] == logits[0].argmax()

    penalised = [logits.clone(), logits.clone().to(DEVICE)]
    seen, penalty = torch.rand(4, 64) < 0.3, torch.tensor([1.0, 1.5, 0.5, 2.0])
    ReferenceOps().repetition_penalty(penalised[0], seen, penalty)
    ops.repetition_penalty(penalised[1], seen.to(DEVICE), penalty.to(DEVICE))
    assert torch.equal(penalised[0].nan_to_num(), penalised[1].cpu().nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_logits_and_tiny_temperatures_are_drawn_alike(dtype: torch.dtype):
    nan, inf = float("nan"), float("inf")
    rows = [
        [1.0, inf, -inf, inf, nan, 5.0, 0.0, inf],
        [20.0, -20.0, 19.9, 0.0, 20.0, -inf, nan, 19.0],
        [-inf, nan, -inf, -inf, -inf, nan, -inf, -inf],
        [-7.0, -7.01, -900.0, -8.0, -7.0, -30.0, -7.5, -inf],
    ]
    cases = [(row, t, seed) for row in rows for t in (2.0**-149, 1e-38, 1e-20, 0.7, 100.0) for seed in range(4)]
    count = len(cases)
    logits = torch.tensor([row for row, _, _ in cases]).to(dtype)
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (2, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.3)):
        settings = {
            "temperature": torch.tensor([t for _, t, _ in cases]),
            "top_k": torch.full((count,), top_k, dtype=torch.int32),
            "top_p": torch.full((count,), top_p),
            "min_p": torch.full((count,), min_p),
            "seed": torch.tensor([seed for _, _, seed in cases]),
            "position": torch.arange(count, dtype=torch.int32),
        }
        expected = ReferenceOps().sample(logits, **settings).tolist()
        there = {name: value.to(DEVICE) for name, value in settings.items()}
        for version, stride in (("naive", 3), ("split", 40)):  # the simulator is slow, and takes a few of them
            some = slice(top_k, None, 1 if DEVICE == "cuda" else stride)
            few = {name: value[some].contiguous() for name, value in there.items()}
            found = cuda_ops(sampling=version).sample(logits[some].contiguous().to(DEVICE), **few)
            assert found.tolist() == expected[some]
        assert {token for token, (row, _, _) in zip(expected, cases, strict=True) if row is rows[0]} == {1, 3, 7}
        cold = {(row[4], token) for token, (row, t, _) in zip(expected, cases, strict=True) if t < 1e-6}
        assert {token for first, token in cold if first in (20.0, -7.0)} == {0, 4}


def test_random_words_are_the_kernels():
    from kernels.sampling import philox

    seed, position, word = 2**40 + 3, 100, 2.0**-32
    for token in (0, 1, 63):
        uniform = (
            torch.tensor(float(philox((token, 0, position, 0), (seed & 0xFFFFFFFF, seed >> 32))[0])) + 0.5
        ) * word
        expected = -torch.log(-torch.log1p(-uniform))
        assert gumbel(torch.tensor([seed]), torch.tensor([position]), 64)[0, token] == expected


def test_generate_equals_reference():
    config, weights = micro(MICRO_LLAMA, torch.float32)
    params = [SamplingParams(max_new_tokens=2, temperature=t, seed=5) for t in (0, 1)]
    prompts = [[1, 2, 3], [4]]
    expected = LLM((config, weights), EngineConfig(dtype="float32")).generate(prompts, params)
    engine = EngineConfig(backend="cuda", device=DEVICE, dtype="float32")
    found = LLM((config, on_device(weights)), engine).generate(prompts, params)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_device_must_fit_the_simulator(monkeypatch: pytest.MonkeyPatch):
    from engine.ops import cuda as module

    with pytest.raises(ValueError, match=r"device = 'cuda' .* NUMBA_ENABLE_CUDASIM=1"):
        module.CudaOps("cuda")
    monkeypatch.setattr(module, "SIMULATED", False)
    with pytest.raises(ValueError, match=r"device = 'cpu' .* NUMBA_ENABLE_CUDASIM=0"):
        module.CudaOps("cpu")


def test_weights_are_tiles_where_these_arrive_faster():
    config, ops = ModelConfig.from_dict(MICRO), cuda_ops(**FAST)
    rows, tiles = (random_weights(config, DEVICE, torch.bfloat16, 0, given) for given in (None, ops))
    arch, _ = machine_of(0)
    assert isinstance(tiles.layers[0].gate_up, TiledLinear if arch == "sm_90a" else DenseLinear)
    assert (rows.nbytes, rows.step_bytes) == (tiles.nbytes, tiles.step_bytes)
    for tensor in checkpoint_tensors(config):
        assert torch.equal(rows.read(tensor), tiles.read(tensor)), tensor.name
    assert torch.equal(rows.layers[0].gate_up.rows(), tiles.layers[0].gate_up.rows())
    batch = Batch(
        *(torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([5, 9, 2], [0, 0, 0], [0, 1, 2]))
    )
    for versions in (FAST, FAST | {"linear": "naive"}):
        given, expected = (Model(config, weights, cuda_ops(**versions)) for weights in (tiles, rows))
        logits = given.forward(batch, given.new_cache(1, 64))
        assert torch.equal(logits, expected.forward(batch, expected.new_cache(1, 64)))


def test_tiles_take_whole_tiles_of_rows():
    gated = TiledLinear(to_tiles(torch.zeros(32, 64, dtype=torch.bfloat16), True))
    gated.write(16, torch.ones(16, 64))
    assert gated.rows(16).all() and not gated.rows(0, 16).any()
    for row, count in ((2, 4), (4, 6), (12, 8)):
        with pytest.raises(ValueError, match=f"rows {row} to {row + count - 1} of 32 as tiles: whole tiles needed"):
            gated.write(row, torch.ones(count, 64))
