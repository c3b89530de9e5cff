"""GPTQ: columns are rounded one after another, and those that follow make up for each one's error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023. The order of
the columns is free: by importance, the diagonal of the Hessian, those that matter most are rounded while many are left
to make up for them. Where whole groups keep together ("groups", as GPTQModel's group-aware reordering), what is stored
does not tell the order; where they do not ("columns", desc_act), each column's group is stored, too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.model.quant.grid import TOP, Grid
from engine.model.quant.int4 import Int4Matrix

Order = Literal["none", "groups", "columns"]
ORDERS = ("none", "groups", "columns")
DAMPING = 0.01  # of the Hessian's mean diagonal, added to it
BLOCK = 128  # columns whose errors reach the columns behind them together


def column_order(diagonal: Tensor, group_size: int, order: Order) -> Tensor:
    """In which order the columns are rounded: int64 [K]."""
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "columns" or group_size == -1:
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group_size)
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    first = torch.argsort(groups.amax(1), descending=True, stable=True)
    starts = torch.arange(len(groups), device=diagonal.device)[:, None] * group_size
    return (within + starts)[first].flatten()


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, order: Order) -> Int4Matrix:
    """The codes of `weight` [N, K] for inputs whose second moment is `hessian` [K, K], both fp32.

    Raises:
        ValueError: K is not whole groups, or the Hessian holds NaN or Inf.
    """
    grid.groups(weight)
    if not torch.isfinite(hessian).all():
        raise ValueError("the inputs of a matrix hold NaN or Inf")
    columns = weight.shape[1]
    size = columns if grid.group_size == -1 else grid.group_size
    places = column_order(hessian.diagonal(), grid.group_size, order)
    factor, dead = _inverse_factor(hessian[places][:, places])
    rest = weight[:, places].clone()
    rest[:, dead] = 0
    codes = torch.empty_like(rest)
    scales, zeros = (torch.empty((weight.shape[0], columns // size), device=weight.device) for _ in range(2))
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = torch.empty_like(rest[:, begin:end])
        for column in range(begin, end):
            group = column // size
            if column % size == 0:
                span = rest[:, column : column + size]
                importance = factor.diagonal()[column : column + size] ** -2
                found = grid.search(span[:, None], lambda off, by=importance: (off.square() * by).sum(-1))
                scales[:, group], zeros[:, group] = (value[:, 0] for value in found)
            scale, zero = scales[:, group], zeros[:, group]
            code = ((rest[:, column] / scale).round() + zero).clamp(0, TOP)
            codes[:, column] = code
            error = (rest[:, column] - (code - zero) * scale) / factor[column, column]
            errors[:, column - begin] = error
            if column + 1 < end:
                rest[:, column + 1 : end].addr_(error, factor[column, column + 1 : end], alpha=-1)
        # The groups that begin in this block are spanned by what its own columns have left; the others wait till here.
        rest[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    return _in_place(grid, places, codes, scales, zeros, order)


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped Hessian's inverse, and which inputs were always 0."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    damping = DAMPING * hessian.diagonal().mean()
    while True:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor, dead
        damping = damping * 10  # it is positive definite but for rounding


def _in_place(grid: Grid, places: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, order: Order) -> Int4Matrix:
    """The matrix with its columns where they were before they were put in order."""
    back = torch.argsort(places)
    if grid.group_size == -1 or order == "none":
        return grid.matrix(codes[:, back], scales, zeros)
    groups = places[:: grid.group_size] // grid.group_size
    if order == "groups":
        home = torch.argsort(groups)
        return grid.matrix(codes[:, back], scales[:, home], zeros[:, home])
    return grid.matrix(codes[:, back], scales, zeros, (back // grid.group_size).to(torch.int32))
