"""Encoding, decoding, streaming and chat templates equal transformers' AutoTokenizer."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from engine_checkpoints import CORPUS, Reference, byte_level_tokenizer, save_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ContextLengthError
from engine.text.tokenizer import Tokenizer, TokenizerError

DOLMA2 = Path(
    os.environ.get("AFS_DOLMA2_TOKENIZER")
    or Path(__file__).resolve().parents[4] / "shared" / "data" / "dolma2-tokenizer.json"
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


PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Bytes as byte-level vocabularies write them.
SHOWN_AS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(0x100 + place) for place, byte in enumerate(b for b in range(256) if b not in PRINTABLE)
}


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


def save_llama2(path: Path) -> None:
    """Llama-2's own way: the ▁ of the beginning is the normaliser's."""
    save_llama(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    replace = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), replace])
    tokenizer.pre_tokenizer = None
    tokenizer.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def save_dolma2(path: Path) -> None:
    if not DOLMA2.exists():
        pytest.skip(f"needs OLMo-2's tokenizer.json; set AFS_DOLMA2_TOKENIZER ({DOLMA2} does not exist)")
    shutil.copy(DOLMA2, path / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(
    scope="module",
    params=[save_byte_level, save_flags, save_llama, save_llama2, save_dolma2],
    ids=lambda f: f.__name__[5:],
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


def wanted_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """The library's text, but of a run of byte tokens the characters that it holds, and U+FFFD for each other byte."""
    whole, run, pieces = tokenizer.decode(ids, skip_special_tokens=skip), b"", []
    names = [tokenizer.name(token) for token in ids if not (skip and token in tokenizer.special_texts)]
    if tokenizer.byte_fallback:
        for name in [*names, "end"]:
            if name and re.fullmatch("<0x..>", name):
                run += bytes([int(name[3:5], 16)])
                continue
            while run:
                width = next((n for n in (1, 2, 3, 4) if is_character(run[:n])), 0)
                pieces.append(run[:width].decode() or "\ufffd")
                run = run[width or 1 :]
            pieces.append((name or "").replace("▁", " "))
        return "".join(pieces).removesuffix("end").removeprefix(" ")
    return whole


def is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool, sizes: Sequence[int] = (1,)) -> str:
    """Pieces of any size join to the whole, and hold back three bytes at most, those of one character."""
    whole = wanted_text(tokenizer, ids, skip)
    stream, shown, place = tokenizer.stream(skip_special_tokens=skip), "", 0
    for size in itertools.cycle(sizes):
        shown += stream.push(ids[place : place + size])
        assert whole.startswith(shown)
        place += size
        if place >= len(ids):
            break
        rest = wanted_text(tokenizer, ids[:place], skip)[len(shown) :]
        assert rest in ("", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd")
    assert shown + stream.finish() == whole
    return whole


def test_stream_of_texts(pair: tuple[Tokenizer, Any]):
    tokenizer, _ = pair
    for text in TEXTS:
        for skip in (False, True):
            ids = tokenizer.encode(text)
            assert check_stream(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids(pair: tuple[Tokenizer, Any], data: st.DataObject):
    tokenizer, _ = pair
    low = st.integers(0, min(300, tokenizer.vocab_size - 1))  # mostly single bytes: broken characters
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, tokenizer.vocab_size - 1)), max_size=30))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    check_stream(tokenizer, ids, data.draw(st.booleans()), sizes)


@functools.cache
def single_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each byte."""
    names = {tokenizer.name(token): token for token in range(tokenizer.vocab_size)}
    written = [f"<0x{byte:02X}>" for byte in range(256)]
    return {byte: names[written[byte] if written[byte] in names else SHOWN_AS[byte]] for byte in range(256)}


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [single_bytes(tokenizer)[byte] for byte in data]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_of_whole_characters_equals_transformers(pair: tuple[Tokenizer, Any], data: st.DataObject):
    """Characters byte by byte, among tokens of all kinds."""
    ours, theirs = pair
    single = single_bytes(ours)
    spelled = st.text(max_size=5).map(lambda text: [single[byte] for byte in text.encode()])
    one = st.integers(0, ours.vocab_size - 1).filter(lambda token: token not in single.values())
    ids = list(itertools.chain.from_iterable(data.draw(st.lists(st.one_of(spelled, st.tuples(one)), max_size=12))))
    skip, sizes = data.draw(st.booleans()), data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    assert check_stream(ours, ids, skip, sizes) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_behind_a_context(pair: tuple[Tokenizer, Any], data: st.DataObject):
    """What comes behind a prompt is what the whole has more than the prompt's complete characters."""
    tokenizer, _ = pair
    low, any_id = st.integers(0, min(300, tokenizer.vocab_size - 1)), st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(low, any_id), max_size=20))
    cut, skip = data.draw(st.integers(0, len(ids))), data.draw(st.booleans())
    prompt, stream = tokenizer.stream(skip), tokenizer.stream(skip, context=ids[:cut])
    assert prompt.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish() == wanted_text(tokenizer, ids, skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text(pair: tuple[Tokenizer, Any], text: str):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids)
    assert check_stream(ours, ids, True) == theirs.decode(ids, skip_special_tokens=True)


def test_stream_shows_text_at_once(tmp_path: Path):
    """Nothing is held back but an incomplete character."""
    save_byte_level(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    stream, shown = tokenizer.stream(), []
    for token in tokenizer.encode("a你b"):
        shown.append(stream.push([token]))
    assert shown == ["a", "", "", "你", "b"]


def test_byte_tokens_are_shown_when_they_are_complete(llama: Tokenizer):
    stream = llama.stream()
    ids = byte_tokens(llama, "\n\né👍".encode() + b"\xf0\x9f\n\xff")
    shown = [stream.push([token]) for token in ids]
    assert shown == ["\n", "\n", "", "é", "", "", "", "👍", "", "", "\ufffd\ufffd\n", "\ufffd"]


def test_a_text_begins_where_the_prompt_ends(llama: Tokenizer):
    prompt, more = llama.encode("Hello"), llama.encode(" the", add_special_tokens=False)[-1:]
    assert (llama.name(more[0]) or "").startswith("▁")
    assert llama.stream(True, prompt).push(more) == llama.decode([*prompt, *more], True).removeprefix("Hello")
    assert not llama.stream(True).push(more).startswith(" ") and llama.stream(True, prompt).push(more)[0] == " "
    assert not llama.stream(True, prompt[:1]).push(more).startswith(" ")  # a prompt of <s> has no text
    thumb = byte_tokens(llama, "👍!".encode())
    for cut in range(1, 4):
        assert llama.stream(True, [*prompt, *thumb[:cut]]).push(thumb[cut:]) == "👍!"


def test_start_of_a_token_in_the_text(llama: Tokenizer, tmp_path: Path):
    def starts(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
        stream, found = tokenizer.stream(), []
        for token in ids:
            stream.push([token])
            found.append(stream.start)
        return found

    (the,) = (token for token in range(llama.vocab_size) if llama.name(token) == "▁the")
    ids = [*byte_tokens(llama, b"x\xf0\x9f"), the, *byte_tokens(llama, "👍".encode() + b"\xf0\xffz")]
    assert starts(llama, ids) == [0, 1, 1, 3, 7, 7, 7, 7, 8, 9, 10]
    save_byte_level(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = byte_tokens(tokenizer, b"x\xf0\x9fy\xf0\x9f\x91\x8d\xf0\xffz")
    assert starts(tokenizer, ids) == [0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 6]


def test_long_runs_of_invalid_bytes_take_time_by_their_length(llama: Tokenizer):
    (bad,) = byte_tokens(llama, b"\xff")
    stream, begin = llama.stream(), time.perf_counter()
    shown = [stream.push([bad]) for _ in range(32_000)]
    assert set(shown) == {"\ufffd"} and time.perf_counter() - begin < 5


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


def save_case(path: Path, added: Sequence[tokenizers.AddedToken] = (), **files: dict[str, Any]) -> None:
    tokenizer = byte_level_tokenizer()
    for token in added:
        tokenizer.add_tokens([token])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}{{ image_token }}."}
    for name, content in {"tokenizer_config": {}, **files}.items():
        content = config | content if name == "tokenizer_config" else content
        (path / f"{name}.json").write_text(json.dumps(content))


def flags(content: str, **changes: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **usual, **changes}


Added = tokenizers.AddedToken
END, START, TOOL, S = "<|im_end|>", "<|im_start|>", "TOOL", "</s>"
SPECIAL_TEXTS = [
    f"x{END}\ny",
    f"x{END}  y",
    f"a {START} b",
    "xTOOLy TOOL z",
    f"x <s> y{S}z {S}",
    "<tool>a<tool> <image>",
]
LISTED = "added_tokens_decoder"
FILES: dict[str, tuple[list[Added], dict[str, Any]]] = {
    "rstrip": ([Added(END, special=True)], {"tokenizer_config": {LISTED: {"512": flags(END, rstrip=True)}}}),
    "special": ([Added(END, special=False)], {"tokenizer_config": {LISTED: {"512": flags(END)}}}),
    "not special": ([Added(END, special=True)],
        {"tokenizer_config": {LISTED: {"512": flags(END, special=False)}}}),
    "flags taken away": ([Added(END, special=True, rstrip=True)],
        {"tokenizer_config": {LISTED: {"512": flags(END)}}}),
    "lstrip and single_word": ([Added(START, special=True), Added(TOOL, special=False)],
        {"tokenizer_config": {LISTED: {
            "512": flags(START, lstrip=True), "513": flags(TOOL, single_word=True, special=False, normalized=True)}}}),
    "another token listed": ([Added(S, special=False), Added(END, special=True)],
        {"tokenizer_config": {"eos_token": S, LISTED: {"513": flags(END, rstrip=True)}}}),
    "eos named": ([Added(S, special=False)], {"tokenizer_config": {"eos_token": S}}),
    "eos named with flags": ([Added(S, special=False)],
        {"tokenizer_config": {"eos_token": flags(S, rstrip=True) | {"__type": "AddedToken"}}}),
    "eos named and listed": ([Added(S, special=False)],
        {"tokenizer_config": {"eos_token": S, LISTED: {"512": flags(S, special=False)}}}),
    "added_tokens.json": ([], {"added_tokens": {"<tool>": 512, END: 513}}),
    "added_tokens.json, one named": ([],
        {"tokenizer_config": {"eos_token": END}, "added_tokens": {"<tool>": 513, END: 512}}),
    "added_tokens.json, one known": ([Added("<tool>", rstrip=True, special=True)], {"added_tokens": {"<tool>": 512}}),
    "added_tokens.json, not read": ([],
        {"tokenizer_config": {LISTED: {"512": flags(END)}}, "added_tokens": {"<tool>": 513, END: 512}}),
    "special_tokens_map.json": ([Added("<s>", special=True)], {"special_tokens_map": {"bos_token": "<s>"}}),
    "special_tokens_map.json, new": ([], {"special_tokens_map": {"bos_token": flags("<s>", rstrip=True)}}),
    "special_tokens_map.json first": ([Added("<s>", special=True)],
        {"tokenizer_config": {"bos_token": "<|pad|>"}, "special_tokens_map": {"bos_token": "<s>"}}),
    "special_tokens_map.json, not read": ([Added("<s>", special=True)],
        {"tokenizer_config": {LISTED: {"512": flags("<s>")}}, "special_tokens_map": {"bos_token": "<s>"}}),
    "a name of the model's own": ([], {"tokenizer_config": {"image_token": "<image>"}}),
    "names of the model's own": ([], {"tokenizer_config": {"extra_special_tokens": {"image_token": "<image>"}}}),
    "split_special_tokens": ([Added(END, special=True)], {"tokenizer_config": {"split_special_tokens": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_beside_tokenizer_json_are_merged_as_transformers_does(tmp_path: Path, name: str):
    added, files = FILES[name]
    save_case(tmp_path, added, **files)
    ours, theirs = Tokenizer(tmp_path), reference_of(tmp_path)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for text in SPECIAL_TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            check_stream(ours, ids, skip)
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_nameless_special_tokens_of_special_tokens_map(tmp_path: Path):
    """transformers 5 fails here; 4 adds them behind the named ones."""
    save_case(tmp_path, special_tokens_map={"additional_special_tokens": ["<tool>", flags(END)], "bos_token": "<s>"})
    assert [Tokenizer(tmp_path).encode(text) for text in ("<s>", "<tool>", END)] == [[512], [513], [514]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<tool>": 517}}, r"added_tokens\.json: '<tool>' has the id 517, but .* it has 512"),
        ({"added_tokens": {"<|pad|>": 512}}, r"added_tokens\.json: '<\|pad\|>' has the id 512, but .* it has 1"),
        ({"added_tokens": {"<tool>": "x"}}, r"added_tokens\.json: 'x' is not the id of a token"),
        ({"special_tokens_map": {"bos_token": 5}}, r"5 is not a token"),
        ({"tokenizer_config": {"added_tokens_decoder": {"600": flags(END)}}}, "has the id 600, but .* it has 512"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder is a list, not an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"512": flags(END) | {"lstrip": 1}}}}, "must be true or false"),
        ({"tokenizer_config": {"extra_special_tokens": "x"}}, "must be a list or an object of tokens"),
        ({"tokenizer_config": {"add_prefix_space": True}}, "add_prefix_space is true .* does not do so"),
        (
            {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True}},
            "add_bos_token is true for LlamaTokenizer, but tokenizer.json does not do so",
        ),
        (
            {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<s>", "add_eos_token": True}},
            "add_eos_token is true for LlamaTokenizerFast",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path: Path, files: dict[str, Any], message: str):
    save_case(tmp_path, **files)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(tmp_path)


def test_add_bos_token_and_a_name_in_special_tokens_map(tmp_path: Path):
    save_llama(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("bos_token", "added_tokens_decoder"):
        config.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert Tokenizer(tmp_path).special_tokens["bos_token"] == "<s>"


def test_add_bos_token_that_tokenizer_json_does_not_confirm(tmp_path: Path):
    save_llama(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for wanted in (None, True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": wanted}))
        if wanted is False:
            with pytest.raises(TokenizerError, match=r"add_bos_token is false for LlamaTokenizer, .* does so"):
                Tokenizer(tmp_path)
        else:
            assert Tokenizer(tmp_path).added_ids == ([1], [])


DECODERS = tokenizers.decoders


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (DECODERS.BPEDecoder(), "BPEDecoder"),
        (DECODERS.Sequence([DECODERS.ByteFallback(), DECODERS.Strip(" ", 1, 0), DECODERS.Fuse()]), "Strip"),
        (DECODERS.Sequence([DECODERS.Fuse(), DECODERS.Strip(" ", 1, 1)]), "Strip"),
        (DECODERS.Sequence([DECODERS.Replace("x", "y"), DECODERS.ByteLevel()]), "Replace"),
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused(tmp_path: Path, decoder: Any, named: str):
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=f"a decoder with {named} as here is not supported"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        DECODERS.Metaspace(prepend_scheme="always"),
        DECODERS.Metaspace(prepend_scheme="never"),
        DECODERS.Sequence([DECODERS.ByteFallback(), DECODERS.Metaspace(prepend_scheme="first"), DECODERS.Fuse()]),
        DECODERS.Sequence([DECODERS.Replace("▁", " "), DECODERS.ByteFallback(), DECODERS.Fuse()]),
    ],
    ids=str,
)
def test_streams_of_other_decoders(tmp_path: Path, decoder: Any):
    save_llama(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["decoder"] = decoder and json.loads(decoder.__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    tokenizer, generator = Tokenizer(tmp_path), random.Random(0)
    for _ in range(200):
        ids: list[int] = []
        for _ in range(generator.randrange(8)):
            char = generator.choice("é👍a\n ")
            token = generator.randrange(259, tokenizer.vocab_size)
            ids += generator.choice([byte_tokens(tokenizer, char.encode()), [token], [generator.randrange(3)]])
        cut, skip = generator.randint(0, len(ids)), generator.random() < 0.5
        prompt, stream = tokenizer.stream(skip), tokenizer.stream(skip, ids[:cut])
        text = prompt.push(ids[:cut]) + "".join(stream.push([token]) for token in ids[cut:]) + stream.finish()
        assert text == tokenizer.decode(ids, skip), [tokenizer.name(token) for token in ids]


def test_too_long_by_bytes(pair: tuple[Tokenizer, Any]):
    """Only what has more tokens whatever they are: never a text that fits."""
    tokenizer, _ = pair
    for text in TEXTS:
        tokenizer.check_length(text, len(tokenizer.encode(text, add_special_tokens=False)))
    with pytest.raises(ContextLengthError, match=r"^the prompt is too long: .*maximum context length is 100 tokens"):
        tokenizer.check_length("abc d" * 2**20, 100)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20), times=st.integers(1, 40))
def test_never_too_long_where_it_fits(pair: tuple[Tokenizer, Any], text: str, times: int):
    tokenizer, _ = pair
    tokenizer.check_length(text * times, len(tokenizer.encode(text * times, add_special_tokens=False)))


def test_no_bound_where_characters_can_vanish(tmp_path: Path):
    """Space that a token takes along is not counted, and unknown characters may give no token at all."""
    save_case(tmp_path, [Added(END, special=True, rstrip=True)])
    Tokenizer(tmp_path).check_length(END + " " * 10**6, 1)
    tokenizer = byte_level_tokenizer()
    for part in (
        {"normalizer": tokenizers.normalizers.Replace(tokenizers.Regex(" +"), " ")},
        {"normalizer": tokenizers.normalizers.NFKC()},
        {"pre_tokenizer": tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.ByteLevel()])},
    ):  # fmt: skip
        tokenizer = byte_level_tokenizer()
        for name, value in part.items():
            setattr(tokenizer, name, value)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        Tokenizer(tmp_path).check_length("a b" * 10**6, 1)


def test_other_threads_run_while_a_text_is_encoded(olmo2: Reference):
    tokenizer, rounds = Tokenizer(olmo2.path), 0
    thread = threading.Thread(target=tokenizer.encode, args=(CORPUS * 400,))
    thread.start()
    while thread.is_alive():
        rounds += 1
        time.sleep(0.001)
    assert rounds > 20
