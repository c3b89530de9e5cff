"""Generation: equal to transformers' greedy decoding, independent of batching, and checked before any work."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checkpoints import Reference, byte_level_tokenizer

from engine.errors import ContextLengthError
from engine.llm import LLM, Completion, EngineConfig
from engine.model.config import ModelConfig
from engine.model.errors import ConfigError
from engine.model.weights import random_weights
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer

GREEDY = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(10, 60)), [100], list(range(300, 417)), [9, 9, 9, 9]]


@pytest.fixture(scope="module")
def llm(olmo2: Reference) -> LLM:
    return LLM(olmo2.path, EngineConfig(dtype="float32"))


def transformers_greedy(reference: Reference, ids: list[int], count: int) -> list[int]:
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        out = reference.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return out[0, len(ids) :].tolist()


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [(c.token_ids, c.text, c.finish_reason) for c in found] == [
        (c.token_ids, c.text, c.finish_reason) for c in expected
    ]


def test_greedy_equals_transformers(reference: Reference):
    llm = LLM(reference.path, EngineConfig(dtype="float32", max_batch=3))
    for ids, completion in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        assert completion.prompt_token_ids == ids
        assert completion.token_ids == transformers_greedy(reference, ids, 20)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    "engine",
    [{"kv_cache": "none"}, {"max_batch": 1}, {"max_batch": 2, "max_step_tokens": 33}, {"max_step_tokens": 1},
     {"kv_cache": "none", "max_step_tokens": 7}, {"cuda_graph": True}, {"cuda_graph": True, "max_batch": 3},
     {"batching": "inflight"}, {"batching": "inflight", "cuda_graph": True, "max_batch": 2}, {"kv_cache": "paged"},
     {"kv_cache": "paged", "cuda_graph": True, "page_size": 8, "kv_tokens": 160, "max_step_tokens": 40},
     {"kv_cache": "paged", "batching": "inflight", "cuda_graph": True, "prefix_cache": False, "max_batch": 3}],
    ids=str,
)  # fmt: skip
def test_engine_settings_change_no_token(llm: LLM, olmo2: Reference, engine: dict[str, Any]):
    params = [
        SamplingParams(max_new_tokens=4, temperature=t, top_p=0.9, repetition_penalty=p, seed=i, ignore_eos=True)
        for i, (t, p) in enumerate([(0, 1.0), (1.0, 1.0), (0.8, 1.3), (0, 1.2), (1.5, 1.0)])
    ]
    same(
        LLM(olmo2.path, EngineConfig(dtype="float32", **engine)).generate(PROMPTS, params),
        llm.generate(PROMPTS, params),
    )


def test_batch_changes_no_token(olmo2: Reference):
    llm = LLM(olmo2.path, EngineConfig(dtype="bfloat16", max_batch=5))
    params = [SamplingParams(max_new_tokens=6 + i, temperature=i % 2, seed=i) for i in range(5)]
    together = llm.generate(PROMPTS, params)
    same([llm.generate([ids], p)[0] for ids, p in zip(PROMPTS, params, strict=True)], together)
    same(llm.generate(PROMPTS[::-1], params[::-1])[::-1], together)


def test_seeds(llm: LLM):
    def draw(seed: int | None) -> list[int]:
        return llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=12, seed=seed, ignore_eos=True))[0].token_ids

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    first, second = llm.generate([[5, 6, 7]] * 2, SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert first.token_ids != second.token_ids


def test_end_of_sequence(llm: LLM):
    free = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    stop = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    at = free.index(stop)
    params = SamplingParams(max_new_tokens=20, temperature=0, stop_token_ids=[stop], ignore_eos=True)
    done = llm.generate([[5, 6, 7]], params)[0]
    assert (done.token_ids, done.finish_reason) == (free[: at + 1], "stop")
    assert llm.tokenizer is not None
    assert done.text == llm.tokenizer.decode(free[:at])
    last = llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=at + 1, temperature=0, stop_token_ids=[stop]))[0]
    assert last.finish_reason == "stop"


def test_eos_of_the_model_and_of_generation_config(llm: LLM, olmo2: Reference, tmp_path: Path):
    token = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids[2]
    for file in olmo2.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    params = SamplingParams(max_new_tokens=20, temperature=0)

    def run() -> Completion:
        return LLM(tmp_path, EngineConfig(dtype="float32")).generate([[5, 6, 7]], params)[0]

    config = json.loads((olmo2.path / "config.json").read_text()) | {"eos_token_id": [0, token]}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run().token_ids[-1] == token and run().finish_reason == "stop"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert run().finish_reason == "length"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 512}))
    with pytest.raises(ConfigError, match="eos_token_id 512"):
        run()


def test_text_and_stop_strings(llm: LLM):
    free = llm.generate("the quick", GREEDY)[0]
    assert llm.tokenizer is not None
    assert free.prompt_token_ids == llm.tokenizer.encode("the quick")
    assert free.text == llm.tokenizer.decode(free.token_ids, skip_special_tokens=True)
    for begin, end in ((3, 5), (4, 9), (len(free.text) - 2, len(free.text))):
        stop = free.text[begin:end]
        done = llm.generate(
            "the quick", SamplingParams(max_new_tokens=20, temperature=0, stop=["never", stop], ignore_eos=True)
        )[0]
        assert done.text == free.text[: free.text.index(stop)] and done.finish_reason == "stop"
        assert done.token_ids == free.token_ids[: len(done.token_ids)]
        pieces = list(
            llm.stream("the quick", SamplingParams(max_new_tokens=20, temperature=0, stop=stop, ignore_eos=True))
        )
        assert "".join(pieces) == done.text


def test_stream_equals_generate(llm: LLM):
    pieces = llm.stream("the quick", GREEDY)
    shown: list[str] = []
    while True:
        try:
            shown.append(next(pieces))
        except StopIteration as end:
            done = end.value
            break
    same([done], llm.generate("the quick", GREEDY))
    assert "".join(shown) == done.text and all(shown) and len(shown) > 3


def test_text_continues_the_prompt(olmo2: Reference, llama: Tokenizer):
    llm = LLM(olmo2.path, EngineConfig(dtype="float32"), llama)
    ids = llama.encode("the quick")
    done = llm.generate([ids], SamplingParams(max_new_tokens=40, temperature=1, seed=5, ignore_eos=True))[0]
    whole = llama.stream(skip_special_tokens=True)
    assert "the quick" + done.text == whole.push([*ids, *done.token_ids]) + whole.finish()
    spaced = next(token for token in range(llama.vocab_size) if (llama.name(token) or "").startswith("▁b"))
    forced = SamplingParams(max_new_tokens=2, logit_bias={spaced: 100}, ignore_eos=True)
    assert llm.generate([ids], forced)[0].text.startswith(" b")


def test_a_special_token_as_stop_string(llm: LLM):
    """<|endoftext|> by its text, beside the token that generation_config.json names."""
    assert llm.tokenizer is not None
    (eos,) = llm.tokenizer.eos_ids
    params = SamplingParams(max_new_tokens=9, stop="<|endoftext|>", logit_bias={eos: 100}, ignore_eos=True)
    done = llm.generate([[5, 6, 7]], params)[0]
    assert (done.text, done.token_ids, done.stop, done.finish_reason) == ("", [eos], "<|endoftext|>", "stop")


def test_the_tokenizers_end_of_sequence_ends_a_text(olmo2: Reference, tmp_path: Path):
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "filler400"}))
    tokenizer = Tokenizer(tmp_path)
    llm = LLM(olmo2.path, EngineConfig(dtype="float32"), tokenizer)
    assert tokenizer.eos_ids == (400,) and llm.eos_ids > {400}
    done = llm.generate("the", SamplingParams(max_new_tokens=5, logit_bias={400: 100}))[0]
    assert (done.token_ids, done.text, done.finish_reason) == ([400], "", "stop")
    done = llm.generate("the", SamplingParams(max_new_tokens=5, logit_bias={400: 100}, ignore_eos=True))[0]
    assert len(done.token_ids) == 5


def test_a_text_too_long_by_its_bytes_is_not_encoded(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, *_: pytest.fail("encoded") if len(text) > 9 else [1])
    with pytest.raises(ContextLengthError, match=r"^prompt 1 is too long: its 9000000 bytes are at least \d+ tokens\."):
        llm.generate(["the", "the " * 2_250_000], GREEDY)


def test_repetition_penalty_equals_transformers(llm: LLM, olmo2: Reference):
    ids = PROMPTS[1]
    found = llm.generate(
        [ids], SamplingParams(max_new_tokens=15, temperature=0, repetition_penalty=1.7, ignore_eos=True)
    )
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        out = olmo2.model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=15, do_sample=False,
                                   eos_token_id=None, repetition_penalty=1.7)  # fmt: skip
    assert found[0].token_ids == out[0, len(ids) :].tolist()


def test_timings(llm: LLM):
    done = llm.generate([[5, 6, 7]], GREEDY)[0]
    assert len(done.itl_ms) == 19 and done.ttft_ms > 0 and min(done.itl_ms) > 0
    assert done.e2e_ms == pytest.approx(done.ttft_ms + sum(done.itl_ms))


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1, 2], []], GREEDY, "prompt 1 is empty"),
        ("", GREEDY, "prompt 0 is empty"),
        ([[1, 512]], GREEDY, "prompt 0 holds token id 512; ids are 0 to 511"),
        ([[1], [-1]], GREEDY, "prompt 1 holds token id -1"),
        ([[1, "2"]], GREEDY, "prompt 0 = .* must be text or a list of token ids"),
        ([1, 2], GREEDY, "prompt 0 = 1; it must be text"),
        ([[1.0]], GREEDY, "prompt 0"),
        ([[1] * 493], GREEDY, "prompt 0 has 493 tokens and max_new_tokens = 20: 513 is above the limit of 512"),
        ([[1], [2]], [GREEDY], "1 SamplingParams for 2 prompts"),
        ("a\ud800", GREEDY, "surrogate"),
    ],
)
def test_refused_before_any_work(llm: LLM, monkeypatch: pytest.MonkeyPatch, prompts: Any, params: Any, message: str):
    monkeypatch.setattr(llm.model, "forward", None)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    if isinstance(prompts, str):
        with pytest.raises(ValueError, match=message):
            llm.stream(prompts, params)


def test_longest_prompt_fits(llm: LLM):
    assert len(llm.generate([[7] * 492], GREEDY)[0].token_ids) == 20
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "backend = 'triton'; it must be one of reference, cuda"), ({"dtype": "f2"}, "dtype"),
        ({"kv_cache": "row"}, "kv_cache"), ({"batching": "static"}, "batching = 'static'; it must be one of inflight"),
        ({"page_size": 24}, "page_size = 24; it must be one of 8, 16"), ({"kv_tokens": 0}, "kv_tokens = 0"),
        ({"prefix_cache": 1.5}, "prefix_cache"), ({"attention": "x"}, "attention"), ({"linear": "x"}, "linear"),
        ({"sampling": "x"}, "sampling = 'x'; it must be one of naive, split"), ({"cuda_graph": "yes"}, "cuda_graph"),
        ({"cuda_graph": True, "kv_cache": "none"}, "cuda_graph = True with kv_cache = 'none'"),
        ({"device": "tpu"}, "device"), ({"max_batch": 0}, "max_batch = 0"), ({"max_model_len": 0}, "max_model_len = 0"),
        ({"max_step_tokens": 1.5}, "max_step_tokens"),
    ],
)  # fmt: skip
def test_engine_config_is_checked(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**change)


def test_model_length(olmo2: Reference):
    with pytest.raises(ValueError, match="max_model_len = 513 is above the model's 512"):
        LLM(olmo2.path, EngineConfig(max_model_len=513))
    short = LLM(olmo2.path, EngineConfig(dtype="float32", max_model_len=10))
    with pytest.raises(ValueError, match="above the limit of 10"):
        short.generate([[1, 2, 3]], SamplingParams(max_new_tokens=8))
    assert len(short.generate([[1, 2, 3]], SamplingParams(max_new_tokens=7, ignore_eos=True))[0].token_ids) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(olmo2: Reference):
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        LLM(olmo2.path, EngineConfig(device="cuda"))


def test_random_weights_and_no_tokenizer(olmo2: Reference):
    config = ModelConfig.from_file(olmo2.path)
    llm = LLM((config, random_weights(config, "cpu", torch.bfloat16, 0)))
    assert len(llm.generate([[1, 2]], GREEDY)[0].token_ids) == 20
    assert llm.generate([[1, 2]], GREEDY)[0].text == ""
    with pytest.raises(ValueError, match="prompt 0 is text, but"):
        llm.generate("hello", GREEDY)
    with pytest.raises(ValueError, match=r"stop = \['x'\] needs a tokenizer"):
        llm.generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16 on cpu; the engine is set to float32"):
        LLM((config, llm.weights), EngineConfig(dtype="float32"))
    assert LLM((config, llm.weights), tokenizer=Tokenizer(olmo2.path)).generate("the", GREEDY)[0].text


def test_a_checkpoint_in_fp16(olmo2: Reference, tmp_path: Path):
    """Stored in fp16 it runs in fp16, cache too, unless another dtype is asked for; alone as in a batch."""
    copy.deepcopy(olmo2.model).half().save_pretrained(tmp_path)
    llm = LLM(tmp_path, EngineConfig(kv_cache="paged", max_batch=3))
    assert llm.engine.dtype == "float16" and llm.weights.dtype == torch.float16
    prompts = [[5, 6, 7], [9] * 70, [3]]
    together = llm.generate(prompts, GREEDY)
    assert llm.core.runner.cache.k[0].dtype == torch.float16
    assert [done.token_ids for done in together] == [llm.generate([ids], GREEDY)[0].token_ids for ids in prompts]
    # The engine's own choice is the model's in fp32 but where two tokens are nearly as likely.
    wide = LLM(tmp_path, EngineConfig(dtype="float32")).generate(prompts, GREEDY)
    assert sum(a.token_ids[:3] == b.token_ids[:3] for a, b in zip(together, wide, strict=True)) >= 2
    assert LLM(tmp_path, EngineConfig(dtype="bfloat16")).weights.dtype == torch.bfloat16
    assert LLM((llm.config, llm.weights)).engine.dtype == "float16"
    assert LLM(olmo2.path).engine.dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype = 'auto' is no dtype yet"):
        _ = EngineConfig().torch_dtype


def test_nan_logits_are_an_error(olmo2: Reference):
    config = ModelConfig.from_file(olmo2.path)
    weights = random_weights(config, "cpu", torch.float32, 0)
    weights.norm.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="every logit after token 2"):
        LLM((config, weights), EngineConfig(dtype="float32")).generate([[1, 2]], GREEDY)


def test_streams_at_the_same_time(llm: LLM):
    texts = ["the quick", "def main"]
    streams = [llm.stream(text, GREEDY) for text in texts]
    shown, open_ones = ["", ""], {0, 1}
    while open_ones:
        for index in sorted(open_ones):
            piece = next(streams[index], None)
            if piece is None:
                open_ones.remove(index)
            else:
                shown[index] += piece
    assert shown == [completion.text for completion in llm.generate(texts, GREEDY)]


def test_an_abandoned_stream_leaves_the_engine_usable(llm: LLM):
    pieces = llm.stream("the quick", GREEDY)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert llm.generate("the quick", GREEDY)[0].finish_reason == "length"


def test_release(llm: LLM):
    stream = llm.stream("the quick", GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="1 requests are on their way"):
        llm.release()
    stream.close()  # type: ignore[attr-defined]
    core = llm.core
    llm.release()
    assert llm.generate("the quick", GREEDY)[0].finish_reason == "length" and llm.core is not core
