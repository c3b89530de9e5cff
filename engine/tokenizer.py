"""Text to token ids and back, over the `tokenizers` library, equal to transformers' AutoTokenizer for BPE models."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TokenizerError(ValueError):
    """Tokenizer files that are absent or unusable, text that cannot be encoded, or a chat template's complaint."""


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json` (which also says what is added around a text), and where
    present `tokenizer_config.json` (special tokens) and `chat_template.jinja`.

    Raises:
        TokenizerError: A file is absent or damaged, or the model is not BPE.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise TokenizerError(f"{path}: there is no such file; a checkpoint folder with a tokenizer holds one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer ({error})") from None
        kind = type(self._tokenizer.model).__name__
        if kind != "BPE":
            raise TokenizerError(f"{path}: a {kind} model; only BPE is supported")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        config_path = directory / "tokenizer_config.json"
        config = _read_object(config_path) if config_path.exists() else {}
        self.special_tokens = {name: _content(config[name]) for name in SPECIAL_NAMES if config.get(name) is not None}
        self._special_ids = self._add_tokens(config)
        self._byte_fallback = "ByteFallback" in str(self._tokenizer.decoder)
        self.chat_template = _chat_template(directory, config)

    def _add_tokens(self, config: dict[str, Any]) -> set[int]:
        """Add the tokens that only `tokenizer_config.json` lists; ids of all tokens that are special."""
        listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = [config[name] for name in self.special_tokens]
        present = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in [*(t for _, t in listed), *named, *(extra.values() if isinstance(extra, dict) else extra)]:
            if _content(token) not in present:
                present.add(_content(token))
                self._tokenizer.add_tokens([_added(token)])
        return {index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Id of the end-of-sequence token, if the tokenizer names one."""
        token = self.special_tokens.get("eos_token")
        index = None if token is None else self._tokenizer.token_to_id(token)
        return () if index is None else (index,)

    def encode(self, text: str | bytes, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Bytes are read as UTF-8 with U+FFFD in place of what is not.

        Raises:
            TokenizerError: `text` holds an unpaired surrogate.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text holds {text[error.start]!r} at {error.start}, an unpaired surrogate") from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; ids beyond the vocabulary give nothing. U+FFFD stands for bytes that are not UTF-8."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = False) -> "StreamDecoder":
        return StreamDecoder(self, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation. Encode it with `add_special_tokens=False`: the template adds its own.

        Raises:
            TokenizerError: The folder has no chat template, or the template is wrong or refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template (chat_template.jinja or tokenizer_config.json)")
        try:
            return _template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **self.special_tokens, **variables},
            )
        except TemplateError as error:
            raise TokenizerError(f"chat template: {error}") from None

    def name(self, token: int) -> str | None:
        """How the vocabulary writes a token; None where no token has that id."""
        return self._tokenizer.id_to_token(token)

    def ends_open(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether text so far may still change after `token`: a run of byte tokens is decoded as a whole, and tokens
        that give no text do not end it.
        """
        name = self.name(token)
        if name is None or (skip_special_tokens and token in self._special_ids):
            return True
        return self._byte_fallback and _BYTE_TOKEN.fullmatch(name) is not None


class StreamDecoder:
    """Text of a growing list of ids, in pieces that never hold half a character and join to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # the last group emitted, then what is not emitted yet
        self._emitted = 0  # of _ids, how many are emitted
        self._text = ""  # of those

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; the text that has become certain, perhaps empty."""
        pieces = []
        for token in ids:
            self._ids.append(token)
            if self._tokenizer.ends_open(token, self._skip):
                continue
            text = self._tokenizer.decode(self._ids, self._skip)
            if text.endswith("\ufffd") or len(text) == len(self._text):
                continue
            pieces.append(text[len(self._text) :])
            # The group just emitted stays as context: some decoders treat the first token of a text differently.
            self._ids = self._ids[self._emitted :]
            self._emitted = len(self._ids)
            self._text = self._tokenizer.decode(self._ids, self._skip)
        return "".join(pieces)

    def finish(self) -> str:
        """What is left at the end; U+FFFD where a character was never completed."""
        text = self._tokenizer.decode(self._ids, self._skip)[len(self._text) :]
        self._ids, self._emitted, self._text = [], 0, ""
        return text


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


@functools.lru_cache(maxsize=8)
def _template(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _added(token: Any) -> AddedToken:
    """A token as `tokenizer_config.json` writes it: its text, or an object of text and flags."""
    flags = token if isinstance(token, dict) else {}
    kept = {name: flags[name] for name in ("single_word", "lstrip", "rstrip", "special") if name in flags}
    return AddedToken(_content(token), **{"normalized": flags.get("normalized", False), "special": True, **kept})


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
