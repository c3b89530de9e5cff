"""What a layer is calibrated on: sequences of tokens, and the stream between the layers that they come to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.model.quant.block import Block

BATCH_TOKENS = 16384  # that pass a layer together


class Moments:
    """Of the inputs of a matrix: the mean of x xᵀ, fp32 [K, K], and of |x|, fp32 [K], over all tokens."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._second = torch.zeros((columns, columns), device=device)
        self._size = torch.zeros(columns, device=device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Count the inputs [..., K]."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._second.addmm_(x.t(), x)
        self._size += x.abs().sum(0)
        self._tokens += x.shape[0]

    @property
    def second(self) -> Tensor:
        return self._second / self._tokens

    @property
    def size(self) -> Tensor:
        return self._size / self._tokens


class _Enough(Exception):
    """Ends a forward pass whose rest nobody needs."""


def moments(block: Block, stream: Iterable[Tensor], roles: Sequence[str]) -> dict[str, Moments]:
    """Of the inputs of a layer's matrices, by role, those that `stream`, batches [B, T, H], comes to."""
    found: dict[str, Moments] = {}

    def see(role: str, x: Tensor) -> None:
        if role in roles:
            found.setdefault(role, Moments(x.shape[-1], x.device)).add(x)
        if role == roles[-1]:
            raise _Enough

    for x in stream:
        try:
            block.forward(x, see)
        except _Enough:
            continue
    return found


def batches(x: Tensor, tokens: int = BATCH_TOKENS) -> Iterator[Tensor]:
    """[S, T, …] in pieces of whole sequences of about so many tokens."""
    yield from x.split(max(1, tokens // x.shape[1]))


def advance(block: Block, stream: Tensor) -> None:
    """Take the stream [S, T, H] through the layer, in place."""
    for x in batches(stream):
        x.copy_(block.forward(x))


def read_texts(path: Path) -> list[str]:
    """The text of a file, or of all files of a folder and those below it, in the order of their paths.

    Raises:
        ValueError: There is no text.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder of calibration text")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            if path.is_file():
                raise ValueError(f"{file}: not text in UTF-8") from None
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path}: holds no text in UTF-8 to calibrate on")
    return texts


def sequences(tokens: Sequence[int], samples: int, length: int, seed: int) -> Tensor:
    """`samples` pieces of `length` tokens each, int64 [S, T], or as many as there are, drawn without an overlap.

    Raises:
        ValueError: There is not one.
    """
    count = len(tokens) // length
    if not count:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, not one sequence of {length}; give more text or shorter "
            "sequences"
        )
    pieces = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return pieces[drawn.sort().values]
