"""The bundled model: trained, loads, and gives the tokens that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.llm import LLM, EngineConfig
from engine.model.kv_cache import ContiguousCache
from engine.ops.batch import Batch
from engine.sampling_params import SamplingParams

PATH = Path(__file__).resolve().parents[2] / "data" / "models" / "olmo2-tiny"
pytestmark = pytest.mark.skipif(
    not (PATH / "config.json").exists(), reason=f"{PATH} holds no model; `python tools/train_tiny.py` makes it"
)


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        PATH, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(PATH, EngineConfig(dtype="float32"))


def prompts() -> list[str]:
    held_out = (PATH / "heldout.txt").read_text(encoding="utf-8")
    return [held_out[begin : begin + length] for begin, length in ((0, 200), (20_000, 900), (90_000, 40), (150_000, 5))]


def test_shape_and_files(llm: LLM):
    config = llm.config
    assert config.architecture.name == "Olmo2ForCausalLM" and config.head_dim == 128
    assert llm.tokenizer is not None and llm.tokenizer.vocab_size <= config.vocab_size
    assert llm.tokenizer.eos_ids == config.eos_token_ids
    assert llm.tokenizer.chat_template is not None


def test_tokenizer_equals_transformers(llm: LLM):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(PATH, local_files_only=True)
    assert llm.tokenizer is not None
    for text in [*prompts(), "你好 👍🏽 e\u0301\x00\t  \n", json.dumps({"a": [1, 2]})]:
        ids = llm.tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert llm.tokenizer.decode(ids) == theirs.decode(ids) == text


def test_logits_equal_transformers(llm: LLM, transformers_model: Any):
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(prompts()[1])
    count = len(ids)
    packed = torch.tensor([ids, [0] * count, list(range(count))], dtype=torch.int32)
    cache = ContiguousCache(llm.config, 1, count, torch.float32, "cpu")
    with torch.inference_mode():
        ours = llm.model.forward(Batch(*packed), cache)
        theirs = transformers_model(torch.tensor([ids])).logits[0]
    assert (ours - theirs).abs().max() < 1e-3


def test_greedy_equals_transformers(llm: LLM, transformers_model: Any):
    done = llm.generate(prompts(), SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True))
    for completion in done:
        inputs = torch.tensor([completion.prompt_token_ids])
        with torch.inference_mode():
            out = transformers_model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, eos_token_id=None
            )
        assert completion.token_ids == out[0, inputs.shape[1] :].tolist()


def test_it_has_learned(llm: LLM):
    """Held-out text is far likelier than under a uniform guess (ln 4096 = 8.3 nats a token)."""
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(prompts()[1])
    count = len(ids)
    packed = torch.tensor([ids, [0] * count, list(range(count))], dtype=torch.int32)
    cache = ContiguousCache(llm.config, 1, count, torch.float32, "cpu")
    with torch.inference_mode():
        logits = llm.model.forward(Batch(*packed), cache)
    assert torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item() < 4.5
