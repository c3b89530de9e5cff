"""Settings that the rows of a batch are sampled with."""

from __future__ import annotations

import torch

from kernels import check

# What a row is sampled with, in the order of `sample`'s arguments.
SETTINGS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "position": torch.int32,
}


def check_settings(operation: str, count: int, *settings: torch.Tensor) -> None:
    """temperature, top_k, top_p, min_p, seed and position of so many rows. Raises as `check.tensor`."""
    for (name, dtype), given in zip(SETTINGS.items(), settings, strict=True):
        check.tensor(operation, name, given, (count,), dtype)
