"""Greedy choices other than transformers', and how much lower a logit they may have."""

from __future__ import annotations

from dataclasses import dataclass

from stages.findings import bf16_step
from stages.parity.errors import FP32_LIMIT
from stages.reference import GreedyReference

MARGIN_KIND = {
    "float32": "the limit on logits",
    "bfloat16": "one rounding step, or twice transformers' own largest bf16 error along the continuation",
}


@dataclass(frozen=True)
class Divergence:
    """A greedy choice other than transformers'. Logits are those of transformers in fp32 on the same prefix."""

    prompt: int
    step: int
    chosen: int
    expected: int
    margin: float
    """How much lower the chosen token's logit is; at least so much where it was not among the kept candidates."""
    rounding: float
    """One rounding step of the dtype at the expected token's logit."""
    allowed: float

    @property
    def note(self) -> str:
        steps = f"margin {self.margin:.3g} = {self.margin / self.rounding:.2g} rounding steps"
        return f"prompt {self.prompt}, token {self.step}: {self.chosen}, not {self.expected}; {steps}"


def diverge(reference: GreedyReference, prompt: int, step: int, chosen: int, dtype: str) -> Divergence:
    """Judges choosing `chosen` before token `step`.

    Allowed in fp32 is the limit on logits. In bf16 it is one rounding step, or where that is larger twice the largest
    error that transformers' own bf16 logits have along this continuation: both of two logits may be off by so much.
    """
    ids, exact, expected = reference.candidates[step], reference.float32[step], reference.token_ids[step]
    best = exact[ids.index(expected)]
    margin = best - (exact[ids.index(chosen)] if chosen in ids else min(exact))
    rounding = bf16_step(best) * (1.0 if dtype == "bfloat16" else 2.0**-16)
    if dtype == "float32":
        return Divergence(prompt, step, chosen, expected, margin, rounding, FP32_LIMIT)
    own = max(
        abs(rounded - right)
        for pair in zip(reference.logits, reference.float32, strict=True)
        for rounded, right in zip(*pair, strict=True)
    )
    return Divergence(prompt, step, chosen, expected, margin, rounding, max(rounding, 2 * own))
