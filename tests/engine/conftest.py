"""Checkpoints that the tests of the engine share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
from engine_checkpoints import Reference, byte_level_tokenizer, make_reference, save_llama

from engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """A checkpoint of the architecture that is asked for, made once."""
    return functools.cache(lambda kind: make_reference(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="session", params=["olmo2", "olmo3", "llama", "mistral"])
def reference(request: pytest.FixtureRequest, references: Callable[[str], Reference]) -> Reference:
    return references(request.param)


@pytest.fixture(scope="session")
def olmo2(references: Callable[[str], Reference]) -> Reference:
    """The OLMo-2 checkpoint with a byte-level tokenizer of 512 tokens."""
    reference = references("olmo2")
    byte_level_tokenizer().save(str(reference.path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "chat_template": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }
    (reference.path / "tokenizer_config.json").write_text(json.dumps(settings))
    return reference


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with byte fallback, as Llama's."""
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return Tokenizer(path)
