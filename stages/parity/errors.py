"""How far from transformers in fp32 a forward pass may be, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.findings import Findings, divergence, errors

if TYPE_CHECKING:
    from torch import Tensor

FP32_LIMIT = 1e-3
HALF_RATIO = 1.25
HALVES = {"bfloat16": "bf16", "float16": "fp16"}


def compare_layers(
    findings: Findings,
    suite: str,
    dtype: str,
    ours: Sequence[dict[str, Tensor]],
    exact: Sequence[dict[str, Tensor]],
    theirs: Sequence[dict[str, Tensor]] | None,
    **knobs: Any,
) -> None:
    """The engine's activations and logits against transformers' in fp32 (`exact`).

    fp32: absolute limits. bf16 and fp16: no further from `exact` than HALF_RATIO times transformers in that dtype
    (`theirs`) is.
    """
    found = errors(ours, exact)
    knobs = {"dtype": dtype, **knobs}
    if dtype == "float32":
        for name, error in found.items():
            findings.check(
                suite=suite, case=name, metric="mean_abs_error", value=error.mean, limit=FP32_LIMIT, strict=True,
                limit_kind="absolute, against transformers in fp32", **knobs,
            )  # fmt: skip
        findings.check(
            suite=suite, case="logits", metric="max_abs_error", value=found["logits"].largest, limit=FP32_LIMIT,
            strict=True, limit_kind="absolute, against transformers in fp32", **knobs,
        )  # fmt: skip
        return
    assert theirs is not None
    theirs_knobs: dict[str, Any] = knobs | {"backend": "transformers"}
    kind = f"{HALF_RATIO} x transformers' own {HALVES[dtype]} error"
    own = errors(theirs, exact)
    for name, error in found.items():
        findings.check(
            suite=suite, case=name, metric="mean_abs_error", value=error.mean, limit=HALF_RATIO * own[name].mean,
            limit_kind=kind, **knobs,
        )  # fmt: skip
        findings.rows.add(
            suite=suite, case=name, metric="mean_abs_error", value=own[name].mean, unit="1", better="lower",
            **theirs_knobs,
        )  # fmt: skip
        if own[name].mean > 0 and math.isfinite(error.mean):
            findings.rows.add(
                suite=suite, case=name, metric="error_ratio", value=error.mean / own[name].mean, unit="1",
                better="lower", limit=HALF_RATIO, limit_kind=kind, **knobs,
            )  # fmt: skip
    logits = [[tensors["logits"] for tensors in side] for side in (exact, ours, theirs)]
    own_kl = divergence(logits[0], logits[2])
    findings.check(
        suite=suite, case="logits", metric="mean_kl", value=divergence(logits[0], logits[1]), unit="nat",
        limit=HALF_RATIO**2 * own_kl, limit_kind=f"({HALF_RATIO} x)^2 transformers' own: like the error's square",
        **knobs,
    )  # fmt: skip
    findings.rows.add(
        suite=suite, case="logits", metric="mean_kl", value=own_kl, unit="nat", better="lower",
        **theirs_knobs,
    )  # fmt: skip
