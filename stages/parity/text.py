"""Greedy completions of whole prompts, and transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.findings import Findings, unequal
from stages.parity.check import Check
from stages.parity.context import DTYPES, Context
from stages.parity.errors import FP32_LIMIT
from stages.parity.greedy import MARGIN_KIND, diverge
from stages.reference import Bundle

if TYPE_CHECKING:
    from engine.llm import LLM


def check_text(context: Context) -> None:
    """`generate` gives transformers' greedy text for every prompt, all of them in one batch."""
    # The week's dtype first: it is the one that the checks before this left loaded.
    for dtype in sorted(DTYPES, key=lambda dtype: dtype != context.dtype):
        compare_text(context.findings, context.llm(dtype), context.bundle)


def compare_text(findings: Findings, llm: LLM, bundle: Bundle) -> None:
    """Greedy completions of the bundle's prompts by `llm` against the bundle's."""
    from engine.sampling_params import SamplingParams

    dtype, tokenizer = llm.engine.dtype, llm.tokenizer
    references = [prompt.greedy[dtype] for prompt in bundle.prompts]
    # A prompt that was cut for the bundle, or made without a tokenizer, can only be given as ids.
    whole = tokenizer is not None and all(tokenizer.encode(p.text) == p.token_ids for p in bundle.prompts)
    prompts = [p.text for p in bundle.prompts] if whole else [p.token_ids for p in bundle.prompts]
    params = SamplingParams(temperature=0.0, max_new_tokens=max(len(r.token_ids) for r in references))
    completions = llm.generate(prompts, params)
    shared: dict[str, Any] = {"suite": "text", "dtype": dtype, "backend": llm.engine.backend}
    equal = 0
    for index, (done, reference) in enumerate(zip(completions, references, strict=True)):
        ours = done.token_ids[: len(reference.token_ids)]
        places = [
            place for place, pair in enumerate(zip(ours, reference.token_ids, strict=False)) if pair[0] != pair[1]
        ]
        case = f"prompt {index}"
        if places:
            first = diverge(reference, index, places[0], ours[places[0]], dtype)
            value, limit, note = first.margin, first.allowed, first.note
        else:
            missing = len(reference.token_ids) - len(ours)
            value, limit = (float("inf") if missing else 0.0), FP32_LIMIT
            note = f"{missing} tokens fewer than transformers" if missing else "all tokens equal"
        findings.check(
            case=case, metric="first_divergence_margin", value=value, unit="logit", limit=limit,
            limit_kind=MARGIN_KIND[dtype], note=note, **shared,
        )  # fmt: skip
        equal += not places
        if not places and tokenizer is not None and len(done.token_ids) == len(reference.token_ids):
            findings.check(
                case=case, metric="differing_characters", value=unequal(done.text, reference.text), limit=0.0,
                limit_kind="transformers' text of the same tokens", **shared,
            )  # fmt: skip
    findings.rows.add(
        case="all prompts", metric="equal_completions", value=equal, unit="1", better="higher", limit=len(references),
        limit_kind="all prompts", **shared,
    )  # fmt: skip


TEXT = Check("text", check_text)
