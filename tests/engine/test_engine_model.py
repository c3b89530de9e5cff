"""The forward graph: equal to transformers' within rounding, and bit for bit to itself however tokens are arranged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from engine_checkpoints import Reference

from engine.model.config import ModelConfig, Rope
from engine.model.kv_cache import ContiguousCache
from engine.model.rope import rope_table
from engine.model.transformer import Model
from engine.model.weights import load_weights
from engine.ops.batch import Batch
from engine.ops.reference import ReferenceOps


def build(reference: Reference, dtype: torch.dtype = torch.float32) -> Model:
    config = ModelConfig.from_file(reference.path)
    return Model(config, load_weights(reference.path, config, "cpu", dtype), ReferenceOps())


def new_cache(model: Model, slots: int = 1, capacity: int = 200) -> ContiguousCache:
    return ContiguousCache(model.config, slots, capacity, model.weights.dtype, "cpu")


def run(model: Model, cache: ContiguousCache, parts: list[tuple[int, int, list[int]]], logits_at=None, observe=None):
    """Forward of (slot, first position, token ids) parts in one packed list."""
    tokens, slots, positions = [], [], []
    for slot, begin, ids in parts:
        tokens += ids
        slots += [slot] * len(ids)
        positions += range(begin, begin + len(ids))
    packed = torch.tensor([tokens, slots, positions], dtype=torch.int32)
    with torch.inference_mode():
        return model.forward(Batch(*packed, logits_at=logits_at), cache, observe)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, 512), k=length)


def observe_transformers(model, ids: list[int]) -> dict[str, torch.Tensor]:
    seen, hooks = {}, []

    def watch(name, module):
        def hook(_module, _inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0]

        hooks.append(module.register_forward_hook(hook))

    base = model.model
    watch("embedding", base.embed_tokens)
    for index, layer in enumerate(base.layers):
        watch(f"layers.{index}", layer)
        post = hasattr(layer, "post_feedforward_layernorm")
        watch(f"layers.{index}.attention", layer.post_attention_layernorm if post else layer.self_attn)
        watch(f"layers.{index}.mlp", layer.post_feedforward_layernorm if post else layer.mlp)
    watch("norm", base.norm)
    watch("logits", model.lm_head)
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return {name: tensor.squeeze(0) if tensor.ndim == 3 else tensor for name, tensor in seen.items()}


def test_every_layer_equals_transformers(reference: Reference):
    model, ids = build(reference), prompt(100)
    seen: dict[str, torch.Tensor] = {}
    logits = run(model, new_cache(model), [(0, 0, ids)], observe=lambda name, x: seen.__setitem__(name, x.clone()))
    expected = observe_transformers(reference.model, ids)
    assert seen.keys() == expected.keys() and len(seen) == 3 * 3 + 3
    assert torch.equal(seen["logits"], logits)
    for name, tensor in expected.items():
        assert (seen[name] - tensor).abs().max() < 2e-5 * max(1.0, tensor.abs().max().item()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errs_no_more_than_transformers(reference: Reference, dtype: torch.dtype):
    """Error against fp32, per layer and in the logits: at most 1.25 times that of transformers in the same dtype."""
    import copy

    ids = prompt(100, seed=3)
    half = copy.deepcopy(reference.model)
    for parameter in half.parameters():  # not buffers: .to() would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    exact_model = copy.deepcopy(half)
    for parameter in exact_model.parameters():
        parameter.data = parameter.data.float()
    exact, theirs = (observe_transformers(m, ids) for m in (exact_model, half))
    model = build(reference, dtype)
    ours: dict[str, torch.Tensor] = {}
    run(model, new_cache(model), [(0, 0, ids)], observe=lambda name, x: ours.__setitem__(name, x.clone()))
    for name in exact:
        if name == "embedding":
            assert torch.equal(ours[name], theirs[name])
            continue
        mine, reference_error = ((x[name].float() - exact[name]).abs().mean().item() for x in (ours, theirs))
        assert mine <= 1.25 * reference_error, f"{name}: {mine} against {reference_error}"


def test_logits_at(reference: Reference):
    model, ids = build(reference), prompt(20)
    whole = run(model, new_cache(model), [(0, 0, ids)])
    some = run(model, new_cache(model), [(0, 0, ids)], logits_at=torch.tensor([19, 4]))
    assert torch.equal(some, whole[[19, 4]])
    assert run(model, new_cache(model), [(0, 0, ids)], logits_at=torch.tensor([], dtype=torch.int32)).shape == (0, 512)


ARRANGED = [
    ("olmo2", torch.float32, 2),
    ("olmo2", torch.bfloat16, 1),
    ("olmo3", torch.float32, 1),
    ("llama", torch.float32, 1),
    ("llama", torch.float16, 1),
    ("mistral", torch.bfloat16, 1),
]


@pytest.fixture(scope="module", params=ARRANGED, ids=lambda p: f"{p[0]}, {p[1]}, {p[2]} threads")
def arranged(
    request: pytest.FixtureRequest, references: Callable[[str], Reference]
) -> Iterator[tuple[Model, list[int], torch.Tensor]]:
    """A model, 80 tokens, and their logits in one prefill."""
    kind, dtype, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, ids = build(references(kind), dtype), prompt(80)
    yield model, ids, run(model, new_cache(model), [(0, 0, ids)])
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [2, 7, 16, 33])
def test_neighbours_change_nothing(arranged: tuple[Model, list[int], torch.Tensor], batch: int):
    model, ids, alone = arranged
    place = batch // 2
    parts = [(slot, 0, prompt(1 + 5 * slot % 23, seed=slot)) for slot in range(batch)]
    parts[place] = (place, 0, ids)
    first = sum(len(part[2]) for part in parts[:place])
    together = run(model, new_cache(model, batch), parts)
    assert torch.equal(together[first : first + 80], alone)


@pytest.mark.parametrize("size", [1, 17, 64])
def test_chunks_change_nothing(arranged: tuple[Model, list[int], torch.Tensor], size: int):
    """Chunked prefill, and with chunks of one token, decode."""
    model, ids, alone = arranged
    cache = new_cache(model)
    parts = [run(model, cache, [(0, begin, ids[begin : begin + size])]) for begin in range(0, 80, size)]
    assert torch.equal(torch.cat(parts), alone)


def test_decode_beside_a_prefill_changes_nothing(arranged: tuple[Model, list[int], torch.Tensor]):
    model, ids, alone = arranged
    cache = new_cache(model, 3)
    run(model, cache, [(2, 0, ids[:70])])
    mixed = run(model, cache, [(0, 0, prompt(40, seed=5)), (2, 70, ids[70:71]), (1, 0, prompt(3, seed=6))])
    assert torch.equal(mixed[40], alone[70])


def test_used_cache_changes_nothing(arranged: tuple[Model, list[int], torch.Tensor]):
    model, ids, alone = arranged
    cache = new_cache(model)
    run(model, cache, [(0, 0, prompt(150, seed=9))])
    assert torch.equal(run(model, cache, [(0, 0, ids)]), alone)


def test_repeats(arranged: tuple[Model, list[int], torch.Tensor]):
    model, ids, alone = arranged
    cache = new_cache(model)
    for _ in range(50):
        assert torch.equal(run(model, cache, [(0, 0, ids[:12])]), alone[:12])


@pytest.mark.parametrize(
    "rope", [Rope(500000.0), Rope(1e4, "linear", 4.0), Rope(1e4, "llama3", 8.0, 1.0, 4.0, 64)], ids=lambda r: r.type
)
def test_rope_table_equals_transformers(rope: Rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type != "default":
        parameters["factor"] = rope.factor
    if rope.type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=parameters
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])
    ours = rope_table(rope, 128, 4096)
    assert (ours[0] - cos[0, :, :64]).abs().max() < 2e-7 and (ours[1] - sin[0, :, :64]).abs().max() < 2e-7
    assert torch.equal(rope_table(rope, 128, 100)[0], ours[0][:100])


def test_cache_size():
    config = ModelConfig.from_dict({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": False, "eos_token_id": None,
    })  # fmt: skip
    cache = ContiguousCache(config, 5, 7, torch.bfloat16, "cpu")
    assert len(cache.k) == 3 and cache.k[0].shape == cache.v[2].shape == (5, 7, 1, 4)
    assert cache.nbytes == 2 * 3 * 5 * 7 * 4 * 2
    with pytest.raises(ValueError, match="0 slots"):
        ContiguousCache(config, 0, 7, torch.bfloat16, "cpu")
