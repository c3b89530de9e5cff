"""Tokens one by one as text and bytes, as log probabilities are written with."""

from __future__ import annotations

import functools

from engine.text.tokenizer import Tokenizer


class TokenTexts:
    """Text and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)

    def bytes(self, token: int) -> list[int]:
        """The token's bytes, which need not be whole characters; none for an id without a token."""
        piece = self._tokenizer.piece(token)
        return list(piece[0]) if piece else []

    def _text(self, token: int) -> str:
        """The token's text; `bytes:\\xe2\\x80` where its bytes are not whole characters, as OpenAI writes those."""
        data = bytes(self.bytes(token))
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
