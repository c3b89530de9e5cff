"""Weights as tiles of 8 rows and 64 columns: how sm_90a reads them fastest.

Row-major, the rows of a stage lie K elements apart, and memory opens a page for 128 bytes of each. A tile is 1 KB in
one piece, and the tiles of a row group follow each other along K, so that a stage is as many pieces as it has row
groups. Measured on an H200, a ring alone: 4.48 to 4.52 TB/s against 4.33 to 4.47.

    weight [N, K]          tiles [N / 8, K / 64, 8, 64]         row r, column c: [r / 8, c / 64, r % 8, c % 64]
    gate_up [2 I, K]       tiles [I / 4, K / 64, 4, 2, 64]      gate i: [i / 4, c / 64, i % 4, 0, c % 64], up i: 1

Of gate and up each tile has four rows in turn: a block that owns some outputs owns whole tiles. No sum knows of it:
what a kernel multiplies is the same as of the rows.
"""

from __future__ import annotations

import torch

BOX = 64  # columns of a tile: 128 bytes


def shape_of(weight: torch.Tensor) -> tuple[int, int]:
    """N and K of a weight [N, K], as rows or as tiles."""
    if weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return weight.shape[0] * 8, weight.shape[1] * BOX


def empty_tiles(rows: int, depth: int, gated: bool, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Tiles of a weight [rows, depth] that hold anything. Raises ValueError where it does not divide into tiles."""
    if rows % (16 if gated else 8) or depth % BOX:
        raise ValueError(f"tiles of a weight [{rows}, {depth}]: rows of {16 if gated else 8} and columns of 64 needed")
    tile = (4, 2, BOX) if gated else (8, BOX)
    return torch.empty((rows // 8, depth // BOX, *tile), dtype=dtype, device=device)


def parts_of(tiles: torch.Tensor) -> list[torch.Tensor]:
    """The rows of tiles as views [rows / r, r, K / 64, 64], r 8, or of gate and of up 4: to be copied from or to."""
    if tiles.dim() == 4:
        return [tiles.transpose(1, 2)]
    return [part.transpose(1, 2) for part in tiles.unbind(3)]


def to_tiles(weight: torch.Tensor, gated: bool) -> torch.Tensor:
    """The tiles of a weight [N, K]. Raises ValueError as `empty_tiles`."""
    tiles = empty_tiles(*shape_of(weight), gated, weight.dtype, weight.device)
    parts = parts_of(tiles)
    for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
        part.copy_(rows.view(part.shape))
    return tiles


def to_rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] of tiles; of rows itself."""
    if weight.dim() == 2:
        return weight
    return torch.cat([part.reshape(-1, weight.shape[1] * BOX) for part in parts_of(weight)])


def boxes_of(weight: torch.Tensor, gated: bool) -> torch.Tensor:
    """A view [K / 64, N / 8, 8 / p, p, 64] of a weight as rows or tiles; p: 2 where gated (gate, up), else 1.

    What a tensor map needs to read both alike.
    """
    if weight.dim() == 5:
        return weight.transpose(0, 1)
    if weight.dim() == 4:
        return weight.transpose(0, 1).unsqueeze(3)
    rows, depth = weight.shape
    if gated:
        return weight.view(2, rows // 8, 4, depth // BOX, BOX).permute(3, 1, 2, 0, 4)
    return weight.view(rows // 8, 8, depth // BOX, BOX).permute(2, 0, 1, 3).unsqueeze(3)
