"""Tokens one by one as text and bytes, as log probabilities are written with."""

from __future__ import annotations

import functools
import re

from engine.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """What stands for bytes in byte-level BPE: printable characters for themselves, U+0100 and on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + place): b for place, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """Text and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some decoders drop the space that a text begins with, so a token is decoded after another one.
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self._skip = len(tokenizer.decode(self._before))
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)
        self.bytes = functools.lru_cache(maxsize=1 << 16)(self._bytes)

    def _bytes(self, token: int) -> list[int]:
        """The token's bytes, which need not be whole characters; none for an id without a token."""
        text = self._tokenizer.decode([*self._before, token])[self._skip :]
        if "\ufffd" not in text:
            return list(text.encode())
        name = self._tokenizer.name(token) or ""
        if match := _BYTE_TOKEN.fullmatch(name):
            return [int(match[1], 16)]
        if all(char in _ALPHABET for char in name):
            return [_ALPHABET[char] for char in name]
        return list(text.encode())

    def _text(self, token: int) -> str:
        """The token's text; `bytes:\\xe2\\x80` where its bytes are not whole characters, as OpenAI writes those."""
        data = bytes(self.bytes(token))
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
