"""From logits to tokens: argmax, filtered sampling, repetition penalty. A row's result depends on that row alone.

| version | idea | files |
|---|---|---|
| naive | one block a row; filters by a search for the threshold over the 32 bits of a logit, a pass a bit | naive.py |
| split | bf16, fp16; many blocks a row, the last one ends it; filters by counting equal logits, one pass | split.py |

Share of the limit, of argmax: "Every kernel under the roofline" of the page,
`reports/site/index.html` (`make report`).

The phases of split: greedy.py; or floor.py (the largest logit, and the least that top_k and top_p keep) and then
draw.py (min_p, noise, the largest); step.py makes the token the next step's input.

split: a 16-bit logit is one of 65536, so the likelihoods of a row are added as (number of equal logits) * (likelihood
in units of 2**-40, rounded down), in 64-bit integers. Such sums are exact: they depend on no order, nor on the number
of blocks. A share of the mass (top_p) is compared with them in fp64. All else is as in naive, to the bit.

In both the largest logit is taken off before the rest is divided by the temperature, so that no temperature makes the
likeliest tokens infinite or NaN, and equal ones stay equally likely (`scores.score`).
"""

from __future__ import annotations

from kernels.sampling.blocks import ARRIVED, HEAD, ROW
from kernels.sampling.draw import split_sample
from kernels.sampling.floor import split_floor
from kernels.sampling.greedy import split_argmax
from kernels.sampling.naive import (
    argmax,
    naive_argmax,
    naive_repetition_penalty,
    naive_sample,
    repetition_penalty,
    sample,
)
from kernels.sampling.reference import philox, reference_filter
from kernels.sampling.settings import SETTINGS
from kernels.sampling.split import argmax_split, argmax_workspace_size, sample_split, sample_workspace_size
from kernels.sampling.step import advance, step_advance

__all__ = [
    "ARRIVED", "HEAD", "ROW", "SETTINGS", "advance", "argmax", "argmax_split", "argmax_workspace_size", "naive_argmax",
    "naive_repetition_penalty", "naive_sample", "philox", "reference_filter", "repetition_penalty", "sample",
    "sample_split", "sample_workspace_size", "split_argmax", "split_floor", "split_sample", "step_advance",
]  # fmt: skip
