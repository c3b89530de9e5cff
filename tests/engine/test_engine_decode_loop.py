"""The decode loop: the same tokens and logits as the step by step path, idle rows and graphs change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_checkpoints import Reference

from engine.llm import LLM, EngineConfig
from engine.model.config import ModelConfig
from engine.model.transformer import Model
from engine.model.weights import load_weights, random_weights
from engine.ops.batch import Batch
from engine.ops.reference import ReferenceOps
from engine.runtime.decode_loop import BUCKETS, DecodeLoop, DecodeRow, bucket
from engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01)
PROMPTS = [[5, 6, 7], list(range(10, 60)), [100], list(range(300, 417)), [9, 9, 9, 9]]


def build(path: Path, dtype: torch.dtype = torch.float32) -> Model:
    config = ModelConfig.from_file(path)
    return Model(config, load_weights(path, config, "cpu", dtype), ReferenceOps())


def step_by_step(
    model: Model, prompt: list[int], steps: int, params: SamplingParams, seed: int
) -> tuple[list[int], torch.Tensor]:
    """Tokens after `prompt`, one forward pass each, and the logits before each of them."""
    device = model.weights.device
    cache, ids, rows = model.new_cache(1, 200), list(prompt), []
    for _ in range(steps):
        begin = 0 if len(ids) == len(prompt) else len(ids) - 1
        new = torch.tensor(ids[begin:], dtype=torch.int32, device=device)
        places = torch.arange(begin, len(ids), dtype=torch.int32, device=device)
        logits = model.forward(Batch(new, torch.zeros_like(new), places), cache)[-1:]
        rows.append(logits)
        floats = torch.tensor([params.temperature, params.top_p, params.min_p], device=device)[:, None]
        integers = torch.tensor([params.top_k, len(ids)], dtype=torch.int32, device=device)[:, None]
        seeds = torch.tensor([seed], device=device)
        token = model.ops.sample(logits, floats[0], integers[0], floats[1], floats[2], seeds, integers[1])
        ids.append(int(token))
    return ids[len(prompt) :], torch.cat(rows)


def fill(model: Model, loop: DecodeLoop, slots: list[int], params: list[SamplingParams]) -> list[DecodeRow]:
    """Prefill PROMPTS[i] but its last token into slots[i]; the rows that go on from there."""
    rows = []
    for slot, prompt, setting in zip(slots, PROMPTS, params, strict=False):
        if len(prompt) > 1:
            new = torch.tensor(prompt[:-1], dtype=torch.int32, device=model.weights.device)
            places = torch.arange(len(new), dtype=torch.int32, device=new.device)
            model.forward(Batch(new, torch.full_like(new, slot), places), loop.cache)
        rows.append(DecodeRow(slot, prompt[-1], len(prompt) - 1, setting, seed=slot))
    return rows


def check_loop(model: Model, graph: bool, steps: int = 5) -> None:
    """Three rows in a bucket of four, two of them drawn, against each of them alone."""
    with torch.inference_mode():
        loop = DecodeLoop(model, model.new_cache(4, 200), graph)
        slots, params = [2, 0, 3], [DRAWN, GREEDY, DRAWN]
        expected = [
            step_by_step(model, prompt, steps, setting, slot)
            for prompt, setting, slot in zip(PROMPTS, params, slots, strict=False)
        ]
        rows = fill(model, loop, slots, params)
        loop.start(rows)
        for step in range(steps):
            loop.enqueue()
            assert loop.logits is not None and loop.size == 4
            logits = loop.logits.clone()
            assert loop.wait() == [[tokens[step]] for tokens, _ in expected]
            for row, (_, right) in enumerate(expected):
                assert torch.equal(logits[row], right[step])
        assert loop.generated() == [tokens for tokens, _ in expected]
        loop.start(rows)
        loop.advance(steps)
        assert loop.generated() == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_step_by_step(reference: Reference, dtype: torch.dtype):
    check_loop(build(reference.path, dtype), graph=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("versions", [("naive", "naive", "naive"), ("flash", "tiled", "split")], ids=str)
def test_graph_equals_step_by_step(olmo2: Reference, versions: tuple[str, str, str]):
    """On the GPU: steps replayed from a graph, single and many, against forward passes without one."""
    from engine.ops.cuda import CudaOps

    fields = ModelConfig.from_file(olmo2.path)
    config = ModelConfig(**{**vars(fields), "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64})
    weights = random_weights(config, "cuda", torch.bfloat16, 0)
    attention, linear, sampling = versions
    model = Model(config, weights, CudaOps("cuda", attention=attention, linear=linear, sampling=sampling))
    check_loop(model, graph=False, steps=19)
    check_loop(model, graph=True, steps=19)  # two graphs of several steps, and some single ones


def test_idle_rows_and_rows_of_other_slots_change_nothing(references: Callable[[str], Reference]):
    model = build(references("olmo2").path)
    with torch.inference_mode():
        loop = DecodeLoop(model, model.new_cache(8, 200), graph=False)
        rows = fill(model, loop, [6, 1, 4], [GREEDY] * 3)
        before = [tensor[1].clone() for tensor in (*loop.cache.k, *loop.cache.v)]
        loop.start([rows[0], rows[2]])
        loop.advance(4)
        assert all(map(torch.equal, before, (tensor[1] for tensor in (*loop.cache.k, *loop.cache.v))))
        alone = loop.generated()
        loop.start(rows[2:])
        loop.advance(4)
        assert loop.generated() == alone[1:] and loop.size == 1


def test_what_cannot_run_is_refused(references: Callable[[str], Reference]):
    model = build(references("olmo2").path)
    loop = DecodeLoop(model, model.new_cache(3, 20), graph=False)
    with pytest.raises(ValueError, match="3 rows decode as 4, and the cache has 3 slots"):
        loop.start([DecodeRow(slot, 1, 0, GREEDY, 0) for slot in range(3)])
    with pytest.raises(ValueError, match="a CUDA graph of a model on 'cpu'"):
        DecodeLoop(model, model.new_cache(1, 20), graph=True)


def test_buckets():
    largest = BUCKETS[-1]
    sizes = [*BUCKETS, 2 * largest, 3 * largest]
    for rows in range(1, 3 * largest + 1):
        assert bucket(rows) == min(size for size in sizes if size >= rows)


@pytest.fixture(scope="module")
def engines(olmo2: Reference) -> tuple[LLM, LLM]:
    """The same model step by step and with the decode loop, three requests at a time."""
    first, second = (
        LLM(olmo2.path, EngineConfig(dtype="float32", max_batch=3, cuda_graph=loop)) for loop in (False, True)
    )
    return first, second


def generate(llm: LLM, params: list[SamplingParams]) -> list[tuple[list[int], str, str]]:
    return [(done.token_ids, done.text, done.finish_reason) for done in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generate_equals_step_by_step(engines: tuple[LLM, LLM], temperature: float):
    """Requests that end at different steps, by length and by a token, while others wait for their slots."""
    params = [
        SamplingParams(max_new_tokens=new, temperature=temperature, top_p=0.9, seed=new, ignore_eos=True)
        for new in (20, 1, 7, 12, 2)
    ]
    expected = generate(engines[0], params)
    assert generate(engines[1], params) == expected
    stops = [SamplingParams(**{**vars(p), "stop_token_ids": (tokens[-1],)})
             for p, (tokens, _, _) in zip(params, expected, strict=True)]  # fmt: skip
    stopped = generate(engines[0], stops)
    assert {reason for _, _, reason in stopped} == {"stop"}
    assert generate(engines[1], stops) == stopped


def test_stop_strings_penalties_and_streams(engines: tuple[LLM, LLM]):
    free = engines[0].generate("the quick", SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True))[0]
    for params in (
        SamplingParams(max_new_tokens=20, temperature=0, stop=free.text[4:9], ignore_eos=True),
        SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1.4, ignore_eos=True),
    ):
        first, second = (llm.generate("the quick", params)[0] for llm in engines)
        assert (first.token_ids, first.text, first.finish_reason) == (
            second.token_ids,
            second.text,
            second.finish_reason,
        )
        assert "".join(engines[1].stream("the quick", params)) == first.text


def test_an_abandoned_stream_leaves_the_loop_usable(engines: tuple[LLM, LLM]):
    params = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    expected = engines[0].generate("def main", params)[0].text
    for _ in range(2):
        streams = [engines[1].stream(text, params) for text in ("the quick", "def main")]
        next(streams[0])
        assert "".join(streams[1]) == expected
        streams[0].close()  # type: ignore[attr-defined]
    assert engines[1].generate("def main", params)[0].text == expected


def test_nan_logits_are_an_error(olmo2: Reference):
    config = ModelConfig.from_file(olmo2.path)
    weights = random_weights(config, "cpu", torch.float32, 0)
    weights.norm.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="every logit after token 1"):
        LLM((config, weights), EngineConfig(dtype="float32", cuda_graph=True)).generate([[1]], GREEDY)
