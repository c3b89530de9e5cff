"""Encoding, decoding, streaming and chat templates equal transformers' AutoTokenizer."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from engine_checkpoints import CORPUS, Reference, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer import Tokenizer, TokenizerError

DOLMA2 = Path(
    os.environ.get("AFS_DOLMA2_TOKENIZER")
    or Path(__file__).resolve().parents[3] / "shared" / "data" / "dolma2-tokenizer.json"
)
TEXTS = [
    "",
    " ",
    "Hello, world! It's a test; don't they're we've I'm he'll she'd ?",
    "def f(x):\n\treturn {'a': [i ** 2 for i in range(10)]}  # comment\r\n\r\n    pass\n",
    "你好,世界。日本語のテキスト。한국어 텍스트입니다",
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪 ☃️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301 n\u0303 a\u0308\u0304 ﬁ Å Å \u1e9b\u0323",
    "\x00\x01\x07\x1b[31m\x7f\u0085\u200b\u200e\u202e\ufeff\ufffd\ufffe",
    "   leading\t\ttabs \n\n\n newlines   \u00a0\u2003\u3000 trailing   ",
    "1234567890 3.14159 1e-10 0xdeadbeef 2024-01-01 ½ ٣ ④",
    "<|endoftext|><|user|>\nhi<|assistant|> <|im_start|> <|pad|> <s> </s> <unk> <0x41> |||PHONE_NUMBER||| filler510",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "𝕳𝖊𝖑𝖑𝖔 𐍈 𝄞 \U0010ffff",
    "https://example.com/a?b=c&d=%20e#f mail@example.org ~/.config/x_y-z.toml",
    "a" * 300 + " " * 100 + "!" * 50 + "\n" * 30,
    CORPUS[:500],
]
INVALID = [
    b"abc\xff\xfe def",
    b"\xe4\xbd",
    b"\xe4\xbd\xa0\xe5",
    b"\xf0\x9f\x91",
    b"\xc0\xaf \xed\xa0\x80",
    bytes(range(256)),
]


def reference_of(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def save_byte_level(path: Path) -> None:
    byte_level_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"})
    )


def save_flags(path: Path) -> None:
    """Tokens that only tokenizer_config.json holds, and flags that transformers ignores beside a tokenizer.json."""
    byte_level_tokenizer().save(str(path / "tokenizer.json"))
    added = {"normalized": False, "lstrip": False, "rstrip": True, "single_word": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": True,
        "bos_token": {"content": "<|begin|>", "__type": "AddedToken", "special": True, **added},
        "eos_token": "<|endoftext|>", "clean_up_tokenization_spaces": True,
        "sep_token": "filler505", "mask_token": "<|mask|>", "extra_special_tokens": ["<|extra|>", "filler506"],
        "added_tokens_decoder": {
            "512": {"content": "<|begin|>", "special": True, **added},
            "513": {"content": "<|plain|>", "special": False, **added},
        },
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def save_llama(path: Path) -> None:
    """SentencePiece fashion: ▁ for spaces, bytes as tokens, a beginning-of-sequence token."""
    import transformers

    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    base.train_from_iterator([CORPUS], trainer)
    model = json.loads(base.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True).save_pretrained(path)


def save_dolma2(path: Path) -> None:
    if not DOLMA2.exists():
        pytest.skip(f"needs OLMo-2's tokenizer.json; set AFS_DOLMA2_TOKENIZER ({DOLMA2} does not exist)")
    shutil.copy(DOLMA2, path / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(
    scope="module", params=[save_byte_level, save_flags, save_llama, save_dolma2], ids=lambda f: f.__name__[5:]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    path = tmp_path_factory.mktemp("tokenizer")
    request.param(path)
    return Tokenizer(path), reference_of(path)


def test_equal_transformers(pair: tuple[Tokenizer, Any]):
    ours, theirs = pair
    for text in [*TEXTS, "".join(TEXTS)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_ids == (theirs.eos_token_id,)


def test_random_ids_decode_as_transformers_decodes_them(pair: tuple[Tokenizer, Any]):
    ours, theirs = pair
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(ours.vocab_size) for _ in range(30)]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_bytes(pair: tuple[Tokenizer, Any]):
    ours, theirs = pair
    for raw in INVALID:
        assert ours.encode(raw) == theirs.encode(raw.decode("utf-8", errors="replace"))
    assert ours.encode("héllo".encode()) == ours.encode("héllo")


BYTE_LEVEL = [save_byte_level, save_flags, save_dolma2]


@pytest.mark.parametrize("pair", BYTE_LEVEL, ids=lambda f: f.__name__[5:], indirect=True)
def test_round_trip(pair: tuple[Tokenizer, Any]):
    ours, _ = pair
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = tokenizer.stream(skip_special_tokens=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    shown = ""
    for token in ids:
        shown += stream.push([token])
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole
    stream = tokenizer.stream(skip_special_tokens=skip)
    assert stream.push(ids) + stream.finish() == whole


def test_stream_of_texts(pair: tuple[Tokenizer, Any]):
    tokenizer, _ = pair
    for text in TEXTS:
        for skip in (False, True):
            check_stream(tokenizer, tokenizer.encode(text), skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids(pair: tuple[Tokenizer, Any], data: st.DataObject):
    tokenizer, _ = pair
    low = st.integers(0, min(300, tokenizer.vocab_size - 1))  # mostly single bytes: broken characters
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size - 1)), max_size=30))
    check_stream(tokenizer, ids, data.draw(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text(pair: tuple[Tokenizer, Any], text: str):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids)
    check_stream(ours, ids, True)


def test_stream_shows_text_at_once(tmp_path: Path):
    """Nothing is held back but an incomplete character."""
    save_byte_level(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    stream, shown = tokenizer.stream(), []
    for token in tokenizer.encode("a你b"):
        shown.append(stream.push([token]))
    assert shown == ["a", "", "", "你", "b"]


CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hello 你好"},
    {"role": "user", "content": "Bye"},
]
TEMPLATES = [
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + "
    "message['content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + "
    "eos_token + '\n' }}{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "{% for m in messages %}\n    {% if loop.index > 3 %}{% break %}{% endif %}\n  {{ m | tojson }}\n"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}\n{{ tools is none }}{{ extra }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=["olmo2", "every extension"])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "list"])
def test_chat_template_equals_transformers(tmp_path: Path, template: str, place: str):
    save_byte_level(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
    elif place == "list":
        config["chat_template"] = [{"name": "other", "template": "x"}, {"name": "default", "template": template}]
    else:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer(tmp_path), reference_of(tmp_path)
    for prompt in (False, True):
        text = ours.apply_chat_template(CHAT, add_generation_prompt=prompt, extra="!")
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, extra="!", tokenize=False)
        assert text == expected
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


def test_chat_template_complaints(tmp_path: Path):
    save_byte_level(tmp_path)
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(tmp_path).apply_chat_template(CHAT)
    for template, message in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ]:
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer(tmp_path).apply_chat_template(CHAT)


def test_files_are_checked(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: there is no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        Tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="WordLevel model; only BPE"):
        Tokenizer(tmp_path)
    save_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).eos_ids == ()


def test_surrogates_are_refused(olmo2: Reference):
    with pytest.raises(TokenizerError, match="unpaired surrogate"):
        Tokenizer(olmo2.path).encode("a\ud800b")
