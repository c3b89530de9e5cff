"""AutoRound: whether each weight is rounded up or down, and each group's scale, by signed gradients.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023. A layer reads
what the quantised layers before it give, and is held to what the layer of the model itself gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.model.quant.block import MATRICES, Block
from engine.model.quant.grid import TOP, Grid
from engine.model.quant.int4 import Int4Matrix

REACH = 0.25  # of a scale, up and down


@dataclass(frozen=True)
class Schedule:
    """Steps, sequences in each, and the seed of which."""

    steps: int
    batch: int
    seed: int


@dataclass
class Rounding:
    """One matrix: weights in groups [N, G, g], scales and zero points [N, G] to begin with, and what is learned.

    shift: [N, G, g], of each weight in steps, -1/2 … 1/2. stretch: [N, G], of each scale.
    """

    groups: Tensor
    scales: Tensor
    zeros: Tensor
    shift: Tensor
    stretch: Tensor

    def stored_scales(self, grid: Grid) -> Tensor:
        scales = self.scales * self.stretch
        return scales + (grid.stored(scales) - scales).detach()

    def codes(self, scales: Tensor) -> Tensor:
        exact = self.groups / scales[..., None] + self.shift
        whole = exact + (exact.round() - exact).detach()  # rounding has the gradient of what it rounds
        return (whole + self.zeros[..., None]).clamp(0, TOP)

    def value(self, grid: Grid) -> Tensor:
        """[N, K], with gradients."""
        scales = self.stored_scales(grid)
        return ((self.codes(scales) - self.zeros[..., None]) * scales[..., None]).flatten(1)

    def matrix(self, grid: Grid) -> Int4Matrix:
        scales = self.stored_scales(grid)
        return grid.matrix(self.codes(scales).flatten(1), scales, self.zeros)


def begin(weight: Tensor, second: Tensor, grid: Grid) -> Rounding:
    """The rounding of `weight` fp32 [N, K] to nearest, in ranges that suit the sizes of its inputs."""
    groups = grid.groups(weight)
    importance = second.diagonal().view(groups.shape[1:])
    scales, zeros = grid.search(groups, lambda off: (off.square() * importance).sum(-1))
    shift, stretch = torch.zeros_like(groups), torch.ones_like(scales)
    return Rounding(groups, scales, zeros, shift.requires_grad_(), stretch.requires_grad_())


def learn(
    block: Block, roundings: dict[str, Rounding], inputs: Tensor, targets: Tensor, grid: Grid, schedule: Schedule
) -> dict[str, Int4Matrix]:
    """The matrices of a layer whose outputs for `inputs` come nearest to `targets`, [S, T, H] each."""
    generator = torch.Generator().manual_seed(schedule.seed)
    # What is learned, about which value, and how far from it at most.
    learned = [(rounding.shift, 0.0, 0.5) for rounding in roundings.values()]
    learned += [(rounding.stretch, 1.0, REACH) for rounding in roundings.values()]
    best, kept = float("inf"), [tensor.detach().clone() for tensor, *_ in learned]
    for step in range(schedule.steps):
        chosen = torch.randperm(len(inputs), generator=generator)[: schedule.batch].to(inputs.device)
        with torch.enable_grad():
            weights = {name: rounding.value(grid).to(inputs.dtype) for name, rounding in roundings.items()}
            output = replace(block, weights=block.weights | weights).forward(inputs[chosen])
            loss = (output.float() - targets[chosen].float()).square().mean()
            gradients = torch.autograd.grad(loss, [tensor for tensor, *_ in learned])
        if loss.item() < best:
            best, kept = loss.item(), [tensor.detach().clone() for tensor, *_ in learned]
        for (tensor, middle, reach), gradient in zip(learned, gradients, strict=True):
            tensor -= gradient.sign() * (2 * reach / schedule.steps * (1 - step / schedule.steps))
            tensor.clamp_(middle - reach, middle + reach)
    for (tensor, *_), value in zip(learned, kept, strict=True):
        tensor.copy_(value)
    return {name: roundings[name].matrix(grid) for name in MATRICES}
