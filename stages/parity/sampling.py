"""Sampled tokens: their distribution, and that a seed decides them whatever they are batched with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.findings import Findings, unequal
from stages.parity.check import Check
from stages.parity.context import Context
from stages.parity.shapes import random_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DRAWS = 1000
VOCABULARY = 16
FILTERS: dict[str, dict[str, float]] = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 8": {"top_k": 8},
    "top-p 0.8": {"top_p": 0.8},
    "min-p 0.1": {"min_p": 0.1},
    "all filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}
RARE = 1e-6  # chance that a right sampler fails one test


def expected_distribution(logits: Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> Tensor:
    """fp32 [V] probabilities after transformers' own processors, in its order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits[None].float()
    scores = TemperatureLogitsWarper(temperature)(None, scores)  # type: ignore[arg-type]
    if top_k:
        scores = TopKLogitsWarper(int(top_k))(None, scores)  # type: ignore[arg-type]
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)  # type: ignore[arg-type]
    return scores[0].softmax(-1)


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> tuple[float, float]:
    """Pearson's statistic over cells of at least 5 expected draws (rarer ones pooled), and its quantile at 1 - RARE.

    The quantile is Wilson and Hilferty's approximation.
    """
    from statistics import NormalDist

    cells: list[tuple[float, float]] = []
    pooled = (0.0, 0.0)
    for count, mean in zip(counts, expected, strict=True):
        if mean >= 5:
            cells.append((count, mean))
        else:
            pooled = (pooled[0] + count, pooled[1] + mean)
    if pooled[1] >= 5:
        cells.append(pooled)
    freedom = max(1, len(cells) - 1)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + NormalDist().inv_cdf(1 - RARE) * spread**0.5) ** 3


def draw(ops: Any, logits: Tensor, seeds: Tensor, positions: Tensor, **filters: float) -> list[int]:
    """One token for each of `seeds` and `positions` from the same [V] logits."""
    import torch

    count, device = seeds.shape[0], logits.device

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), filters.get(name, default), dtype=dtype, device=device)

    return ops.sample(
        logits.expand(count, -1).contiguous(),
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        seed=seeds,
        position=positions,
    ).tolist()


def check_sampling(context: Context) -> None:
    """Draws follow transformers' distribution, and are the same for the same seed whatever they are batched with."""
    from engine.sampling_params import SamplingParams

    llm = context.llm(context.dtype)
    compare_distributions(context.findings, llm.model.ops, context.device, context.backend)
    prompts = random_prompts((5, 17, 9), context.config.vocab_size)
    params = [
        SamplingParams(max_new_tokens=8, temperature=0.9, top_k=100, top_p=0.95, seed=seed, ignore_eos=True)
        for seed in (1, 2, 3)
    ]
    together = [done.token_ids for done in llm.generate(prompts, params)]
    again = [done.token_ids for done in llm.generate(prompts[::-1], params[::-1])][::-1]
    alone = [llm.generate([ids], setting)[0].token_ids for ids, setting in zip(prompts, params, strict=True)]
    for case, other in (("generate again, in another order", again), ("generate alone", alone)):
        context.findings.check(
            suite="sampling", case=case, metric="differing_tokens",
            value=sum(unequal(a, b) for a, b in zip(together, other, strict=True)), limit=0.0,
            limit_kind="a seed decides its tokens", dtype=context.dtype, backend=context.backend,
        )  # fmt: skip


def compare_distributions(findings: Findings, ops: Any, device: str, backend: str) -> None:
    """`ops.sample` on fixed logits: chi-square against transformers' filters and softmax, and repeatability."""
    import torch

    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(1.5)
    here = logits.to(device)
    by_position = (
        torch.full((DRAWS,), 1234, dtype=torch.int64, device=device),
        torch.arange(DRAWS, dtype=torch.int32, device=device),
    )
    by_seed = (
        torch.arange(DRAWS, dtype=torch.int64, device=device),
        torch.full((DRAWS,), 17, dtype=torch.int32, device=device),
    )
    shared: dict[str, Any] = {"suite": "sampling", "backend": backend, "dtype": "float32"}
    for name, filters in FILTERS.items():
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
        expected = (expected_distribution(logits, **settings).double() * DRAWS).tolist()
        for kind, streams in (("positions", by_position), ("seeds", by_seed)):
            if kind == "seeds" and name != "temperature 1":
                continue
            tokens = draw(ops, here, *streams, **filters)
            counts = [0.0] * VOCABULARY
            for token in tokens:
                counts[token] += 1
            statistic, quantile = chi_square(counts, expected)
            case = f"{name}, {DRAWS} {kind}"
            findings.check(
                case=case, metric="chi_square", value=statistic, limit=quantile,
                limit_kind=f"chi-square quantile at 1 - {RARE:g}", **shared,
            )  # fmt: skip
            findings.check(
                case=case, metric="forbidden_tokens", limit=0.0,
                value=sum(c for c, e in zip(counts, expected, strict=True) if not e),
                limit_kind="transformers' filters leave them out", **shared,
            )  # fmt: skip
    tokens = draw(ops, here, *by_position)
    some = torch.tensor([11, 3, DRAWS - 1, 0, 70], device=device)
    findings.check(
        case="draws out of a batch", metric="differing_tokens",
        value=unequal(draw(ops, here, by_position[0][some], by_position[1][some]), [tokens[i] for i in some.tolist()]),
        limit=0.0, limit_kind="a draw depends on its seed and position alone", **shared,
    )  # fmt: skip


SAMPLING = Check("sampling", check_sampling)
