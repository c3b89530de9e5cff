"""Week 2: the speed of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.bench.context import Context
from stages.bench.suite import Suite

TOKENIZER_BYTES = 1 << 16


def measure(context: Context) -> None:
    """MB/s of UTF-8 text encoded and decoded, one text at a time on one thread, by our tokenizer and transformers'."""
    from stages.hf import has_tokenizer, load_tokenizer
    from stages.timing import measure as time_calls

    shared: dict[str, Any] = {"suite": "tokenizer", "unit": "MB/s", "better": "higher"}
    names = {"encode": "encode_throughput", "decode": "decode_throughput"}
    if not has_tokenizer(context.path):
        for case, metric in names.items():
            context.rows.missing(case=case, metric=metric, reason="random weights come without a tokenizer", **shared)
        return
    from engine.text.tokenizer import Tokenizer

    text = sample_text(context.workload.prompts)
    size = len(text.encode()) / 1e6
    ours, theirs = Tokenizer(context.path), load_tokenizer(context.path)
    ids = ours.encode(text)
    note = f"{size:.2f} MB, {len(ids)} tokens"
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("encode", "afs"): lambda: ours.encode(text),
        ("decode", "afs"): lambda: ours.decode(ids),
        ("encode", "transformers"): lambda: theirs(text)["input_ids"],
        ("decode", "transformers"): lambda: theirs.decode(ids),
    }
    for (case, backend), call in calls.items():
        samples = [size / (milliseconds / 1e3) for milliseconds in time_calls(call, 1, 5)]
        context.rows.add(
            case=case, metric=names[case], value=None, samples=samples, backend=backend, note=note, **shared
        )  # fmt: skip


def sample_text(prompts: tuple[str, ...]) -> str:
    """About TOKENIZER_BYTES of code, prose and difficult Unicode."""
    from stages.corpus import TEXTS

    block = "\n".join([*prompts, *(text for name, text in TEXTS.items() if name != "long run")]) + "\n"
    return block * (TOKENIZER_BYTES // len(block.encode()) + 1)


TOKENIZER = Suite("tokenizer", measure)
