"""What quantised weights cost: a text's perplexity, and how far each next token's distribution is from the model's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.transformer import Model
from engine.ops.batch import Batch, TokenSpan

ROWS = 256  # of logits, compared at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over windows of text, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        mean = math.fsum(values) / len(values)
        spread = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        return cls(mean, math.sqrt(spread / len(values)))

    def exp(self) -> Estimate:
        """Of the exponential, as a perplexity is of a mean loss."""
        return Estimate(math.exp(self.value), math.exp(self.value) * self.error)


@dataclass(frozen=True)
class Quality:
    """A model beside the one that it was made of, over the same text.

    tokens: that were predicted. losses, own_losses: nats a token in each window: of the model, and of the other.
    kl_mean: nats a token from the other's distribution to the model's, with its error; kl_99: which 99 % of the tokens
    are below; kl_max. same_top: share of tokens whose likeliest successor is the other's.
    """

    tokens: int
    losses: tuple[float, ...]
    own_losses: tuple[float, ...]
    kl_mean: Estimate
    kl_99: float
    kl_max: float
    same_top: float

    @property
    def perplexity(self) -> Estimate:
        return Estimate.of(self.losses).exp()

    @property
    def ratio(self) -> Estimate:
        """Of the perplexities, window by window: what text is hard for both cancels out."""
        return Estimate.of([a - b for a, b in zip(self.losses, self.own_losses, strict=True)]).exp()

    def gain(self, other: Quality) -> Estimate:
        """Nats a token by which this model's loss is less than `other`'s over the same windows."""
        return Estimate.of([b - a for a, b in zip(self.losses, other.losses, strict=True)])


def windows(tokens: Sequence[int], length: int, most: int | None = None) -> Tensor:
    """Pieces of `length` tokens that follow each other, int32 [S, T], at most `most`.

    Raises:
        ValueError: There is not one.
    """
    count = min(len(tokens) // length, most or len(tokens))
    if not count:
        raise ValueError(f"the text has {len(tokens)} tokens, not one window of {length}; give more text")
    return torch.tensor(tokens[: count * length], dtype=torch.int32).view(count, length)


def compare(models: Mapping[str, Model], own: Model, text: Tensor) -> dict[str, Quality]:
    """How models do on windows of text, int32 [S, T] with T of at least 2, beside the one that they were made of."""
    measured = {name: _Measured() for name in models}
    for window in text:
        wanted = _forward(own, window[:-1])
        for name, model in models.items():
            measured[name].add(_forward(model, window[:-1]), wanted, window[1:].long())
    return {name: found.quality() for name, found in measured.items()}


class _Measured:
    """What has been seen of a model: of each window the mean losses, of each token the divergence."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.own_losses: list[float] = []
        self.divergences: list[Tensor] = []
        self.same = 0

    def add(self, logits: Tensor, own: Tensor, following: Tensor) -> None:
        parts = []
        for begin in range(0, len(following), ROWS):
            at = slice(begin, begin + ROWS)
            parts.append(_compared(logits[at], own[at], following[at]))
        loss, own_loss, divergence, same = (torch.cat(values) for values in zip(*parts, strict=True))
        self.losses.append(loss.mean().item())
        self.own_losses.append(own_loss.mean().item())
        self.divergences.append(divergence)
        self.same += int(same.sum())

    def quality(self) -> Quality:
        kl = torch.cat(self.divergences)
        return Quality(
            tokens=len(kl),
            losses=tuple(self.losses),
            own_losses=tuple(self.own_losses),
            kl_mean=Estimate.of([divergence.mean().item() for divergence in self.divergences]),
            kl_99=kl.sort().values[math.ceil(0.99 * len(kl)) - 1].item(),
            kl_max=kl.max().item(),
            same_top=self.same / len(kl),
        )


def _forward(model: Model, tokens: Tensor) -> Tensor:
    tokens = tokens.to(model.weights.device)
    places = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
    batch = Batch(tokens, torch.zeros_like(tokens), places, spans=[TokenSpan(len(tokens), 0, 0)])
    return model.forward(batch, model.new_cache(1, len(tokens)))


def _compared(logits: Tensor, own: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: both losses and the KL divergence, fp64 on the CPU, and whether the greatest is the same."""
    here, there = (each.double().log_softmax(-1) for each in (logits, own))
    following = following.to(logits.device)[:, None]
    divergence = (there.exp() * (there - here)).sum(-1).clamp(min=0)
    same = here.argmax(-1) == there.argmax(-1)
    losses = (-each.gather(1, following)[:, 0] for each in (here, there))
    loss, own_loss, divergence, same = (value.cpu() for value in (*losses, divergence, same))
    return loss, own_loss, divergence, same
