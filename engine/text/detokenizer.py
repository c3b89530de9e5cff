"""Tokens to the text that is shown of them: stop strings end it, and what may begin one is held back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from engine.sampling_params import SamplingParams
from engine.text.tokenizer import StreamDecoder


class Detokenizer:
    """Turns the tokens of one completion into text, one by one, and watches for stop strings across token boundaries.

    A stop string may hold the text of special tokens, which the completion's text does not show.

    Args:
        decoder: Decoder of the tokens; None where there is no tokenizer, and no text.
        params: The request's sampling parameters.
        stop_ids: Tokens that end it, which give no text.
        special_texts: Texts, by id, of the tokens that the decoder skips.
    """

    def __init__(
        self,
        decoder: StreamDecoder | None,
        params: SamplingParams,
        stop_ids: frozenset[int],
        special_texts: Mapping[int, str] | None = None,
    ) -> None:
        self._decoder, self._params, self._stop_ids = decoder, params, stop_ids
        self.count = 0  # tokens taken
        self.stop: str | int | None = None  # what has ended it
        self._emitted: list[str] = []
        special = (special_texts or {}).items() if params.stop else ()
        self._hidden = {token: text for token, text in special if any(text in stop for stop in params.stop)}
        self._watches = [_Watch(stop, any(text in stop for text in self._hidden.values())) for stop in params.stop]
        self._firsts = frozenset(stop[0] for stop in params.stop)
        self._open = False  # whether a stop string has begun
        self._seen = 0  # characters, with those of hidden tokens
        self._held: deque[tuple[int, str]] = deque()  # those that may begin a stop string and show, and their places

    @property
    def emitted(self) -> str:
        """All that was shown so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    def take(self, tokens: list[int], last: bool = False) -> str:
        """Take tokens, as far as no stop string is complete; what may be shown now. last: none come after these."""
        shown = []
        for token in tokens:
            self.count += 1
            enough = self.count >= self._params.min_tokens
            if token in self._stop_ids and enough:
                self.stop = token
            elif self._decoder:
                shown.append(self.push(self._decoder.push([token]), enough))
                if token in self._hidden and self.stop is None:
                    shown.append(self.push(self._hidden[token], enough, shows=False))
            if self.stop is not None:
                break
        if last and self._decoder and not isinstance(self.stop, str):
            shown.append(self.push(self._decoder.finish(), enough=self.stop is None, last=True))
        return "".join(shown)

    def push(self, piece: str, enough: bool = True, last: bool = False, shows: bool = True) -> str:
        """Take decoded text; what may be shown of it.

        The stop string that is complete first ends the text, the longest where several are.

        Args:
            enough: Whether a stop string may end it.
            last: Whether no text comes after this.
            shows: Whether this is to be shown at all.
        """
        shown = self._watch(piece, enough, shows) if self._watches else [piece]
        if last:
            shown += [char for _, char in self._held]
            self._held.clear()
        self._emitted += shown
        return "".join(shown)

    def _watch(self, piece: str, enough: bool, shows: bool) -> list[str]:
        if not self._open and self._firsts.isdisjoint(piece):
            self._seen += len(piece)
            return [piece] if shows else []
        shown = []
        for char in piece:
            self._seen += 1
            if shows:
                self._held.append((self._seen, char))
            complete = [watch for watch in self._watches if (shows or watch.hidden) and watch.advance(char)]
            found = max(complete, key=lambda watch: len(watch.stop)) if complete and enough else None
            # What a stop string may need: so many characters that show, or so many with hidden ones.
            need = [(w.hidden, len(w.stop) if found else w.matched) for w in ([found] if found else self._watches)]
            showing = max((length for hidden, length in need if not hidden), default=0)
            begin = self._seen - max((length for hidden, length in need if hidden), default=0)
            while len(self._held) > showing and self._held[0][0] <= begin:
                shown.append(self._held.popleft()[1])
            if found:
                self.stop = found.stop
                self._held.clear()
                break
        self._open = any(watch.matched for watch in self._watches)
        return shown


class _Watch:
    """How much of a stop string the text so far ends with: Knuth, Morris and Pratt's, a step a character on average.

    hidden: whether it looks at special tokens too, which do not show.
    """

    def __init__(self, stop: str, hidden: bool) -> None:
        self.stop, self.hidden = stop, hidden
        self.matched = 0  # characters, less than all
        # By length: of a beginning of the stop string, the longest that it also ends with. As far as was needed.
        self._borders = [0, 0]

    def advance(self, char: str) -> bool:
        """Take a character of the text; whether the stop string is complete with it."""
        self.matched = self._next(self.matched, char)
        if self.matched < len(self.stop):
            return False
        self.matched = self._border(self.matched)
        return True

    def _next(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._border(matched)
        return matched + (self.stop[matched] == char)

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            self._borders.append(self._next(self._borders[-1], self.stop[len(self._borders) - 1]))
        return self._borders[length]
