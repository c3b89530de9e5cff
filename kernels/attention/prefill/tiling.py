"""Tiles of queries: what a block holds, and which way of multiplying an architecture takes."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.architectures import LIMITS
from kernels.attention.softmax import SEGMENT, TILE

TILES = SEGMENT // TILE  # of positions, of a segment
HALF_TILE = TILE // 2


@dataclass(frozen=True)
class Tiling:
    """How a block works.

    rows: queries of a tile, 64 a warpgroup ("wgmma") or 16 a warp ("mma") that multiplies.
    stages: of the ring: "wgmma": tiles of keys, and as many of values; "mma": parts of `part` positions, half or all of
    a tile's keys or values, a power of two.
    """

    multiply: str
    rows: int
    stages: int
    part: int = TILE

    @property
    def name(self) -> str:
        return f"{self.multiply}_r{self.rows}_s{self.stages}" + (f"_p{self.part}" if self.multiply == "mma" else "")

    @property
    def threads(self) -> int:
        """With "wgmma" the producer is a warpgroup: what registers it does not need the others get."""
        return 2 * self.rows + (128 if self.multiply == "wgmma" else 0)

    def shared(self, head_dim: int) -> int:
        """Bytes of a block: ring, running totals of the queries, barriers, from a multiple of 1024 ("wgmma",
        and with the queries) or 256 on."""
        row = 2 * head_dim
        totals = self.rows * 2 * row
        if self.multiply == "wgmma":
            return 1024 + self.rows * row + 2 * self.stages * TILE * row + totals + 192
        return 256 + self.stages * self.part * row + totals + 16 * self.stages

    @staticmethod
    def choose(head_dim: int, arch: str) -> Tiling:
        """The tiling for heads of `head_dim` elements on an architecture."""
        if arch == "sm_90a":
            return Tiling("wgmma", 128, 2)
        return Tiling.of_warps(head_dim, arch)

    @staticmethod
    def of_warps(head_dim: int, arch: str) -> Tiling:
        """A tiling for any architecture: with room for the next tile beside this one, else for this, else for half."""
        tilings = [Tiling("mma", 128, stages, part) for stages, part in ((4, TILE), (2, TILE), (2, HALF_TILE))]
        return next(tiling for tiling in tilings if tiling.shared(head_dim) <= LIMITS[arch].shared_block)
