"""Scales and zero points for the weights of a matrix, and the code nearest to each weight under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.quant.int4 import MIDDLE, NF4_LEVELS, Int4Matrix, aligned_blocks, make_int4

TOP = 15  # the greatest code
NF4_BLOCK = 64
# What the differences [N, G, g] between weights and what is stored for them cost each group: [N, G].
Error = Callable[[Tensor], Tensor]
SHRINKS = tuple(1 - 0.025 * step for step in range(17))  # of a group's range, that a search tries


@dataclass(frozen=True)
class Grid:
    """What a matrix' codes may stand for.

    group_size: inputs that share a scale; -1: all of a row.
    symmetric: whether every zero point is 8.
    dtype: of the scales: fp16 or bf16.
    """

    group_size: int
    symmetric: bool
    dtype: torch.dtype

    def groups(self, weight: Tensor) -> Tensor:
        """[N, K] as [N, G, g].

        Raises:
            ValueError: K is not whole groups.
        """
        size = weight.shape[1] if self.group_size == -1 else self.group_size
        if weight.shape[1] % size:
            raise ValueError(f"{weight.shape[1]} inputs are not whole groups of {size}; choose another group size")
        return weight.unflatten(1, (-1, size))

    def span(self, groups: Tensor, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Scales, rounded to `dtype`, and zero points that span the weights [N, G, g]: fp32 [N, G] each.

        Symmetric: the greatest magnitude is 7.5 steps. shrink: the share of the range that is spanned.
        """
        if self.symmetric:
            return self.stored(groups.abs().amax(-1) * shrink * (2 / TOP)), torch.full(
                groups.shape[:2], float(MIDDLE), device=groups.device
            )
        low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
        scales = self.stored((high - low) / TOP)
        return scales, (-low / scales).round().clamp(0, TOP)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as `dtype` has them, in fp32; 1 where that is 0, which would leave no code for a weight."""
        scales = scales.to(self.dtype).to(scales.dtype)
        return torch.where(scales == 0, torch.ones_like(scales), scales)

    def search(self, groups: Tensor, error: Error) -> tuple[Tensor, Tensor]:
        """As `span`, of shrunken ranges the one with the least error.

        Symmetric scales may be negative: a group's greatest weight may lie on the side that has one code more.
        """
        scales, zeros = self.span(groups)
        best = error(rounded(groups, scales, zeros) - groups)
        for shrink in SHRINKS:
            span, middle = self.span(groups, shrink)
            for tried in (span, -span) if self.symmetric else (span,):
                found = error(rounded(groups, tried, middle) - groups)
                better = found < best
                best = torch.where(better, found, best)
                scales, zeros = torch.where(better, tried, scales), torch.where(better, middle, zeros)
        return scales, zeros

    def matrix(self, codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> Int4Matrix:
        """The matrix of codes [N, K] under scales and zero points [N, G]."""
        size = codes.shape[1] if self.group_size == -1 else self.group_size
        stored = None if self.symmetric else zeros.to(torch.uint8)
        return make_int4(codes.to(torch.uint8), scales.to(self.dtype), stored, size, g_idx)

    def nearest(self, weight: Tensor) -> Int4Matrix:
        """`weight` fp32 [N, K], rounded to nearest in groups that span their ranges."""
        groups = self.groups(weight)
        scales, zeros = self.span(groups)
        return self.matrix(codes_of(groups, scales, zeros).flatten(1), scales, zeros)


def codes_of(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The codes nearest to weights [N, G, g], fp32."""
    return ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, TOP)


def rounded(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What these codes stand for, fp32 [N, G, g]."""
    return (codes_of(groups, scales, zeros) - zeros[..., None]) * scales[..., None]


def nearest_nf4(weight: Tensor) -> Int4Matrix:
    """The nearest of NF4's levels to `weight` fp32 [N, K] in blocks of 64, as bitsandbytes' `quantize_4bit`."""
    flat = weight.reshape(-1)
    count = -(-flat.numel() // NF4_BLOCK)
    blocks = torch.nn.functional.pad(flat, (0, count * NF4_BLOCK - flat.numel())).view(count, NF4_BLOCK)
    absmax = blocks.abs().amax(-1)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    scales, group = aligned_blocks(absmax, weight.shape[0], weight.shape[1], NF4_BLOCK)
    return make_int4(codes.view(-1)[: flat.numel()].view_as(weight).to(torch.uint8), scales, None, group, nf4=True)
