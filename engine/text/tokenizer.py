"""Text to token ids and back, over the `tokenizers` library, equal to transformers' AutoTokenizer for BPE models."""

from __future__ import annotations

import codecs
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

from engine.errors import ContextLengthError
from engine.text.tokenizer_files import (
    TokenizerError,
    added_around,
    chat_template,
    check_agreement,
    read_object,
    read_special_tokens,
)

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DECODERS = frozenset({"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"})
# Every kind of character, and runs of space: what a pre-tokenizer drops of these, it would drop of a text.
_PROBE = "".join(map(chr, range(0x2FFF))) + "a  b   \n\n \t\n 12 , 。漢字かな 한글 \U0001f44d\U0001f3fd\U000e0067"


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json` (which also says what is added around a text), and where
    present `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `chat_template.jinja`.

    Raises:
        TokenizerError: A file is absent or damaged, files contradict each other, or the model is not BPE.
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

        config = read_object(directory / "tokenizer_config.json")
        special = read_special_tokens(directory, config, self._tokenizer)
        self._tokenizer.add_tokens(special.tokens)
        for text, (index, said_by) in special.ids.items():
            if (found := self._tokenizer.token_to_id(text)) != index:
                raise TokenizerError(f"{said_by}: {text!r} has the id {index}, but beside {path.name} it has {found}")
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        check_agreement(directory, config, special.named, self._tokenizer)
        self.special_tokens = special.named
        self.added_ids = added_around(self._tokenizer)  # that encode puts before and behind a text
        self.chat_template = chat_template(directory, config)

        kinds = _decoder_kinds(self._tokenizer.decoder, path)
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        # Two of a token, as the first one of a text may be decoded in another way.
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_texts = {  # by id, of the tokens that are left out where special ones are skipped
            index: token.content for index, token in added.items() if not self.decode([index, index], True)
        }
        # Some decoders drop the space that a text begins with, so a token is decoded after another one.
        before = (self._tokenizer.encode("a", add_special_tokens=False).ids, *([i] for i in range(self.vocab_size)))
        self._before = next((ids for ids in before if self.decode(ids)), [])
        self._skip = len(self.decode(self._before))
        self.piece = functools.lru_cache(maxsize=1 << 17)(self._piece)
        self._longest = self._longest_token()
        self._strips = any(token.lstrip or token.rstrip for token in added.values())

    @property
    def byte_fallback(self) -> bool:
        """Whether tokens such as `<0x0A>` stand for bytes."""
        return self._byte_fallback

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
        """Token ids of `text`, while other threads run. Bytes are read as UTF-8 with U+FFFD in place of what is not.

        Raises:
            TokenizerError: `text` holds an unpaired surrogate.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text holds {text[error.start]!r} at {error.start}, an unpaired surrogate") from None
        # The call for one text would hold the interpreter's lock: seconds, for megabytes.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def check_length(self, text: str, limit: int, name: str = "the prompt") -> None:
        """Refuse a text that has more than `limit` tokens whatever they are, without encoding it.

        Raises:
            ContextLengthError: It has; the message begins with `name`.
        """
        if self._longest is None or len(text) * 4 <= limit * self._longest:
            return
        # Some tokens take all space around them.
        words = text.split() if self._strips else [text]
        size = sum(len(word.encode(errors="replace")) for word in words)
        if size > limit * self._longest:
            raise ContextLengthError(
                f"{name} is too long: its {size} bytes are at least {-(-size // self._longest)} tokens. "
                f"This model's maximum context length is {limit} tokens"
            )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; ids beyond the vocabulary give nothing. U+FFFD stands for bytes that are not UTF-8."""
        return self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def stream(self, skip_special_tokens: bool = False, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder of ids that come after those of `context`."""
        return StreamDecoder(self, skip_special_tokens, context)

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

    def _piece(self, token: int, first: bool = False) -> tuple[bytes, bool] | None:
        """Bytes that `token` adds to a text, and whether they are whole characters by themselves; None where no token
        has that id. `piece` is this with a memory. first: whether the text begins with it.
        """
        name = self.name(token)
        if name is None:
            return None
        if self._byte_level:
            if all(char in _ALPHABET for char in name):
                return bytes(_ALPHABET[char] for char in name), False
            return name.encode(), False
        text = self.decode([token]) if first else self.decode([*self._before, token])[self._skip :]
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return (bytes([int(match[1], 16)]) if text else b""), False
        return text.encode(), True

    def _longest_token(self) -> int | None:
        """Bytes of a text that one token can stand for, at most; None where that has no bound, or it is not known."""
        names = self._tokenizer.get_vocab(with_added_tokens=False)
        single = _ALPHABET if self._byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        if not (self._byte_level or self._tokenizer.model.byte_fallback) or any(name not in names for name in single):
            return None  # a run of unknown characters may be one token, or none
        growth = 1
        for part in _parts(self._tokenizer.normalizer):
            if part["type"] == "NFC":
                growth = 3  # three bytes of one, at most: Hangul, for one
            elif part["type"] == "Replace":
                if len(part["pattern"].get("String", "").encode()) not in range(1, len(part["content"].encode()) + 1):
                    return None
            elif part["type"] not in ("Prepend", "Sequence"):
                return None
        if pre := self._tokenizer.pre_tokenizer:
            kept = {place for _, (begin, end) in pre.pre_tokenize_str(_PROBE) for place in range(begin, end)}
            if len(kept) < len(_PROBE):
                return None
        longest = max(len(name) if self._byte_level else len(name.encode()) for name in names)
        added = self._tokenizer.get_added_tokens_decoder().values()
        return growth * max([longest, *(len(token.content.encode()) for token in added)])


class StreamDecoder:
    """Text of a growing list of ids, in pieces that never hold a part of a character: at most three bytes of one are
    held back until it is complete or broken.

    The pieces join to what `decode` makes of all ids behind what it makes of `context`, without a character that this
    has begun and not completed. A run of byte tokens (`<0x0A>`) that is only partly UTF-8 gives U+FFFD for each wrong
    byte, as in sentencepiece; `decode` gives it for all bytes of the run.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        # Byte-level decoders write one U+FFFD for the beginning of a character, byte fallback one for each byte of it.
        self._errors = "afs.each_byte" if tokenizer.byte_fallback else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._errors)
        self._begun = False  # whether a token has been decoded: that of a text's beginning may lose its space
        self._length = 0
        self.start = 0  # place in the text, in characters, of the token pushed last
        last, size = [], 0
        for token in reversed(context):
            if size > 3:  # a character that is not complete is within the last three bytes
                self._begun = True
                break
            last.append(token)
            if not (skip_special_tokens and token in tokenizer.special_texts) and (piece := tokenizer.piece(token)):
                size += len(piece[0])
        self.push(reversed(last))
        self._length = self.start = 0

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; the text that has become certain, perhaps empty."""
        return "".join([self._push(token) for token in ids])

    def _push(self, token: int) -> str:
        self.start = self._length
        if self._skip and token in self._tokenizer.special_texts:
            return ""
        piece = self._tokenizer.piece(token) if self._begun else self._tokenizer.piece(token, True)
        if piece is None:
            return ""
        self._begun = True
        data, whole = piece
        held: bytes = self._utf8.getstate()[0]
        text = self._utf8.decode(b"", final=True) if whole else ""
        if held and data and not whole and _broken(held + data[:1]):
            self.start += len(held.decode(errors=self._errors))
        self.start += len(text)
        text += self._utf8.decode(data)
        self._length += len(text)
        return text

    def finish(self) -> str:
        """Give the text that is left at the end; U+FFFD where a character was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._length += len(text)
        return text


def _broken(data: bytes) -> bool:
    """Whether `data` is neither UTF-8 nor the beginning of it."""
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return True
    return False


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("afs.each_byte", _each_byte)


def _byte_alphabet() -> dict[str, int]:
    """Bytes by the characters that stand for them in byte-level BPE: printable ones, and U+0100 and on for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + place): b for place, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _decoder_kinds(decoder: Any, path: Path) -> set[str]:
    """Kinds of the parts that a decoder consists of.

    Raises:
        TokenizerError: A token's text may depend on tokens other than the one before it: it cannot be streamed.
    """
    parts = _parts(decoder)
    kinds = [part["type"] for part in parts]
    odd = set(kinds) - _DECODERS
    if "ByteLevel" in kinds:
        odd |= set(kinds) - {"ByteLevel", "Fuse", "Sequence"}
    for place, part in enumerate(parts):  # of the whole text, one character at its beginning
        if part["type"] == "Strip" and (part["start"] > 1 or part["stop"] or "Fuse" not in kinds[:place]):
            odd.add("Strip")
    if odd:
        raise TokenizerError(f"{path}: a decoder with {' and '.join(sorted(odd))} as here is not supported")
    return set(kinds)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A decoder or normalizer of the library and all that it consists of, as tokenizer.json writes them."""
    found = [] if component is None else [json.loads(component.__getstate__())]
    for part in found:
        found += [*part.get("decoders", ()), *part.get("normalizers", ())]
    return found


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
