"""Tokens and text: ours and transformers' own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.corpus import INVALID_UTF8, TEXTS
from stages.findings import Findings, unequal
from stages.hf import has_tokenizer, load_tokenizer
from stages.parity.check import Check
from stages.parity.context import Context

NO_TOKENIZER = "random weights come without a tokenizer"


def check_tokenizer(context: Context) -> None:
    """Encoding and decoding equal to transformers' on every text of the corpus and on every single token."""
    shared: dict[str, Any] = {"suite": "tokenizer", "unit": "1"}
    if not has_tokenizer(context.path):
        context.findings.rows.missing(
            case="all", metric="differing_tokens", better="lower", reason=NO_TOKENIZER, **shared
        )
        return
    compare_tokenizers(context.findings, context.path, list(context.workload.prompts))


def compare_tokenizers(findings: Findings, path: Path, prompts: list[str]) -> None:
    """Our tokenizer of the files at `path` against transformers' own."""
    import torch

    from engine.text.tokenizer import Tokenizer

    ours, theirs = Tokenizer(path), load_tokenizer(path)
    texts = TEXTS | {f"prompt {index}": text for index, text in enumerate(prompts)}
    texts |= {f"invalid {name}": data.decode(errors="replace") for name, data in INVALID_UTF8.items()}
    equal: dict[str, Any] = {"limit": 0.0, "limit_kind": "equal to transformers'"}
    for name, text in texts.items():
        raw = INVALID_UTF8.get(name.removeprefix("invalid "), text) if name.startswith("invalid ") else text
        ids = theirs(text)["input_ids"]
        value = unequal(ours.encode(raw), ids)
        findings.check(suite="tokenizer", case=name, metric="differing_tokens", value=value, **equal)
        value = unequal(ours.decode(ids), theirs.decode(ids))
        findings.check(suite="tokenizer", case=name, metric="differing_characters", value=value, **equal)
    # Single tokens and random sequences of them are mostly not whole UTF-8.
    generator = torch.Generator().manual_seed(0)
    size = len(theirs)
    sequences = {
        "every token": [[index] for index in range(size)],
        "random tokens": torch.randint(0, size, (200, 16), generator=generator).tolist(),
    }
    for name, lists in sequences.items():
        value = sum(ours.decode(ids) != theirs.decode(ids) for ids in lists)
        findings.check(suite="tokenizer", case=name, metric="differing_sequences", value=value, **equal)


TOKENIZER = Check("tokenizer", check_tokenizer, needs_engine=False)
