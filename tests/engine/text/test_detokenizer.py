"""The text of a completion: stop strings, whatever pieces the text comes in, and what is held back for them."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_across_pieces(pieces: list[str], stop: list[str]):
    text = Detokenizer(None, SamplingParams(stop=stop), frozenset())
    whole, shown = "".join(pieces), ""
    for index, piece in enumerate(pieces):
        if text.stop is None:
            shown += text.push(piece, last=index == len(pieces) - 1)
    cuts = [whole.index(s) for s in stop if s in whole]
    # The stop string that is complete first ends the text, at its own beginning.
    assert (text.stop is not None) == bool(cuts)
    if not cuts:
        assert shown == whole
    else:
        assert shown in {whole[:cut] for cut in cuts}
        assert not any(s in shown for s in stop)
    assert text.emitted == shown


@settings(max_examples=200, deadline=None)
@given(
    whole=st.text("ab", max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=6),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_stop_strings_do_not_depend_on_pieces(whole: str, cuts: list[int], stop: list[str]):
    """The one that is complete first, the longest of several, and never more held back than it needs."""
    text, places = Detokenizer(None, SamplingParams(stop=stop), frozenset()), [0, *sorted(cuts), len(whole)]
    for begin, end in itertools.pairwise(places):
        if text.stop is None:
            text.push(whole[begin:end])
            if text.stop is None:
                seen = whole[:end]
                held = max(n for s in stop for n in range(len(s)) if seen.endswith(s[:n]))
                assert text.emitted == seen[: len(seen) - held]
    ends = [(whole.index(s) + len(s), -len(s), s) for s in stop if s in whole]
    assert text.stop == (min(ends)[2] if ends else None)
    if ends:
        assert text.emitted == whole[: min(ends)[0] + min(ends)[1]]


def test_long_stop_strings_take_time_by_the_text():
    text = Detokenizer(None, SamplingParams(stop=["a" * 10**6, "a" * 9999 + "b"]), frozenset())
    begin = time.perf_counter()
    for _ in range(20_000):
        text.push("a")
    assert text.emitted == "" and text.push("c", last=True) == "a" * 20_000 + "c"
    assert time.perf_counter() - begin < 5


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    names = {tokenizer.name(token): token for token in range(tokenizer.vocab_size)}
    return [names[f"<0x{byte:02X}>"] for byte in data]


@pytest.mark.parametrize(("stop", "shown", "count"), [("\n", "a", 2), ("\n\n", "a", 3), ("\n\n\nx", "a\n\n\né!", 7)])
def test_stop_strings_of_byte_tokens_end_at_their_token(llama: Tokenizer, stop: str, shown: str, count: int):
    ids = byte_tokens(llama, "a\n\n\né!".encode())
    text = Detokenizer(llama.stream(True, llama.encode("Hello")), SamplingParams(stop=stop), frozenset())
    assert text.take(ids[:count]) == shown and text.count == count
    assert text.stop == (stop if shown == "a" else None)


@pytest.mark.parametrize(
    ("stop", "min_tokens", "shown", "count"),
    [
        (["</s>"], 0, "ab", 3),
        (["b</s>"], 0, "a", 3),
        (["</s>c"], 0, "ab", 4),
        (["b</s>c"], 0, "a", 4),
        (["s>"], 0, "abc", 4),  # only what shows, or a whole special token
        (["bc"], 0, "a", 4),  # of what shows, as other stop strings
        (["</s>x", "bc"], 0, "a", 4),
        (["</s>"], 4, "abc", 4),
    ],
)
def test_stop_strings_of_special_tokens(llama: Tokenizer, stop: list[str], min_tokens: int, shown: str, count: int):
    ids = [*byte_tokens(llama, b"ab"), llama.eos_ids[0], *byte_tokens(llama, b"c")]
    params = SamplingParams(stop=stop, min_tokens=min_tokens, ignore_eos=True)
    text = Detokenizer(llama.stream(True, llama.encode("Hello")), params, frozenset(), llama.special_texts)
    assert text.take(ids, last=True) == text.emitted == shown
    assert text.count == count and text.stop == (stop[-1] if shown != "abc" else None)
