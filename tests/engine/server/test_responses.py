"""Responses of the server, where the text is not that of its tokens one by one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fake_engine import entry

from engine.runtime.request import Completion, Update
from engine.server import responses
from engine.server.responses import Job, Prompt
from engine.server.tokens import TokenTexts
from engine.text.tokenizer import Tokenizer


def ids_of(tokenizer: Tokenizer, *names: str | bytes) -> list[int]:
    ids = {tokenizer.name(token): token for token in range(tokenizer.vocab_size)}
    spelled = ([f"<0x{byte:02X}>" for byte in name] if isinstance(name, bytes) else [name] for name in names)
    return [ids[name] for group in spelled for name in group]


def answer(tokenizer: Tokenizer, prompt: Prompt, generated: list[int], **how: Any) -> dict[str, Any]:
    """The choice that /v1/completions gives, whole; the stream says the same."""
    decoder = tokenizer.stream(True, prompt.ids)
    pieces = [decoder.push([token]) for token in generated]
    pieces[-1] += decoder.finish()
    scored = [None, *(entry(token, 0) for token in prompt.ids[1:])]
    done = Completion(prompt.ids, generated, "".join(pieces), "length", 1.0, [], 1.0,
                      logprobs=[entry(token, 0) for token in generated], prompt_logprobs=scored)  # fmt: skip

    async def updates() -> AsyncIterator[Update]:
        for place, (token, piece) in enumerate(zip(generated, pieces, strict=True)):
            yield Update(0, piece, [token], [entry(token, 0)], done if place == len(pieces) - 1 else None)

    def job() -> Job:
        return Job(id="", chat=False, created=0, model="", n=1, prompts=[prompt], streams=[updates()],  # type: ignore
                   stack=AsyncExitStack(), tokenizer=tokenizer, texts=TokenTexts(tokenizer),
                   observe=lambda _: None, logprobs=True, **how)  # fmt: skip

    async def streamed() -> list[bytes]:
        return [chunk async for chunk in responses.EventStream(job()).body_iterator]  # type: ignore[misc]

    (choice,) = asyncio.run(responses.whole(job()))["choices"]
    chunks = [json.loads(c[6:])["choices"][0] for c in asyncio.run(streamed())[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    offsets = [offset for chunk in chunks for offset in (chunk["logprobs"] or {}).get("text_offset", ())]
    assert offsets == choice["logprobs"]["text_offset"]
    return choice


@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_continues_its_prompt(llama: Tokenizer, echo: bool):
    ids = llama.encode("the")
    prompt = Prompt("the", ids, (1, 0))
    choice = answer(llama, prompt, ids_of(llama, "▁the", b"\n", "▁the"), echo=echo)
    assert choice["text"] == ("the" if echo else "") + " the\n the"
    base = 3 if echo else 0
    assert choice["logprobs"]["text_offset"] == [0] * len(ids) * echo + [base, base + 4, base + 5]


def test_offsets_behind_replacement_characters(llama: Tokenizer):
    generated = ids_of(llama, b"\xf0\x9f", "▁the", b"\xff\n", "👍".encode(), b"!")
    choice = answer(llama, Prompt(None, llama.encode("the")), generated)
    assert choice["text"] == "\ufffd\ufffd the\ufffd\n👍!"
    assert choice["logprobs"]["text_offset"] == [0, 0, 2, 6, 7, 8, 8, 8, 8, 9]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character(llama: Tokenizer, cut: int):
    thumb = ids_of(llama, "👍".encode())
    prompt = Prompt(None, [*llama.encode("the"), *thumb[:cut]])
    generated = [*thumb[cut:], *ids_of(llama, b"!")]
    assert answer(llama, prompt, generated)["text"] == "👍!"
    choice = answer(llama, prompt, generated, echo=True)
    assert choice["text"] == llama.decode([*prompt.ids, *generated])
    place = choice["text"].index("👍")
    assert choice["logprobs"]["text_offset"][-5:] == [place] * 4 + [place + 1]


def test_special_tokens_in_an_echo(llama: Tokenizer):
    """They show where they were in the prompt; the one that the tokenizer has put before a text does not."""
    begin, end = ids_of(llama, "<s>", "</s>")
    the = llama.encode("the", add_special_tokens=False)
    ids = [begin, *the, end, *the]
    choice = answer(llama, Prompt(None, ids), the, echo=True)
    assert choice["text"].startswith("<s>") and "</s>" in choice["text"]
    offsets = choice["logprobs"]["text_offset"]
    assert choice["text"][offsets[1 + len(the)] :].startswith("</s>") and offsets[-len(the)] == len(llama.decode(ids))
    text = llama.decode(ids[1:])
    choice = answer(llama, Prompt(text, ids, (1, 0)), the, echo=True)
    offsets = choice["logprobs"]["text_offset"]
    assert choice["text"].startswith(text) and offsets[0] == offsets[1] == 0
    assert choice["text"][offsets[1 + len(the)] :].startswith("</s>") and offsets[-len(the)] == len(text)
