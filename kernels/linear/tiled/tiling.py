"""Tiles of the prefill GEMM: what they may be, what was measured of them, and which one a product takes."""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.architectures import LIMITS
from kernels.linear.streamed import TOKENS as STREAMED
from kernels.linear.streamed import segments_of
from kernels.tiles import BOX

# A warp passes its results on in pieces of 16 tokens and 64 columns; the rows lie apart so that no two of its accesses
# meet in a bank.
PIECE = 8  # fragments of 8 columns
PITCH = 2 * 8 * PIECE + 16
STAGING = 16 * PITCH
# Of a multiprocessor, measured on an H200: clock cycles of a stage, alone and in a cluster, and of a tile beyond their
# multiplications.
STAGE_CLOCKS, SHARED_STAGE_CLOCKS = 100, 70
TILE_CLOCKS = 2000
# Tokens from which clusters gain: a product as long as that runs at the power limit.
SHARING = 2048
# fp32 sums of a thread at most, where K has several segments.
SUMS = 128


@dataclass(frozen=True)
class Tiling:
    """How a block works.

    tokens, rows: of a tile (gate and up rows together). down, across: parts that the tile's tokens and rows are divided
    into, one a warpgroup ("wgmma", which divides tokens only) or warp ("mma"). columns: of K in a stage. stages: of the
    ring. turns: groups of warpgroups that take tiles in turn (ping-pong): one multiplies as the other writes. cluster:
    blocks, 1 or 2, with tiles of the same weights, of which each copies its part for both. segments: parts of K that
    are summed one after the other and added.
    """

    multiply: str
    tokens: int
    rows: int
    down: int
    across: int
    columns: int
    stages: int
    turns: int = 1
    cluster: int = 1
    segments: int = 1

    @staticmethod
    def of_warpgroups(rows: int, turns: int = 1, cluster: int = 1) -> Tiling:
        """128 tokens between two warpgroups, or all of them for each of two in turn; the ring takes what memory there
        is."""
        columns = 2 * BOX if rows <= 64 else BOX
        tiling = Tiling("wgmma", 128, rows, 2 // turns, 1, columns, 0, turns, cluster)
        return replace(tiling, stages=(LIMITS["sm_90a"].shared_block - tiling.shared) // (tiling.stage_bytes + 16))

    @staticmethod
    def of_warps(tokens: int, rows: int, down: int, across: int, arch: str) -> Tiling:
        tiling = Tiling("mma", tokens, rows, down, across, 32, 0)
        return replace(tiling, stages=min(5, LIMITS[arch].shared_block // tiling.stage_bytes))

    @property
    def name(self) -> str:
        size = f"{self.tokens}x{self.rows}x{self.columns}_{self.down}x{self.across}_s{self.stages}"
        further = (("t", self.turns), ("c", self.cluster), ("k", self.segments))
        return f"{self.multiply}_{size}" + "".join(f"_{letter}{count}" for letter, count in further if count > 1)

    @property
    def warps(self) -> int:
        """Consumer warps."""
        return self.turns * self.down * self.across * (4 if self.multiply == "wgmma" else 1)

    @property
    def threads(self) -> int:
        """With "wgmma" one warp more, the producer; with ping-pong a warpgroup, which leaves registers to others."""
        copying = (4 if self.turns > 1 else 1) if self.multiply == "wgmma" else 0
        return 32 * (self.warps + copying)

    @property
    def stage_bytes(self) -> int:
        return (self.tokens + self.rows) * self.columns * 2

    @property
    def shared(self) -> int:
        """Bytes of a block. "wgmma": the ring from a multiple of 1024 on, the warps' staging, two barriers a stage;
        "mma": the ring, in whose place comes the staging."""
        if self.multiply == "wgmma":
            return 1024 + self.stages * (self.stage_bytes + 16) + self.warps * STAGING
        return max(self.stages * self.stage_bytes, self.warps * STAGING)

    def tiles(self, count: int, rows: int) -> tuple[int, int]:
        """Tiles down and across of `count` tokens and `rows` weight rows; a cluster's blocks have tokens for each."""
        return -(-count // (self.tokens * self.cluster)) * self.cluster, -(-rows // self.rows)

    def group(self, count: int, rows: int, multiprocessors: int) -> int:
        """Tiles down which are worked on together, such that those at work at a time cover about a square."""
        down, _ = self.tiles(count, rows)
        square = math.sqrt(multiprocessors * self.rows / self.tokens) / self.cluster
        return min(down, max(1, round(square)) * self.cluster)

    def fits(self, gated: bool, depth: int) -> bool:
        """Whether the tile divides into whole fragments, segments of K into whole stages, and a thread has registers
        for the sum of each."""
        step = 8 if self.multiply == "wgmma" else 16 * self.across
        whole = self.rows % (2 * step if gated or self.cluster > 1 else step) == 0
        sums = self.tokens * self.rows * self.segments // (32 * self.warps // self.turns)
        return whole and (self.segments == 1 or (sums <= SUMS and depth % (self.segments * self.columns) == 0))

    def blocks(self, count: int, rows: int, multiprocessors: int) -> int:
        """Blocks of the grid: with "wgmma" as many as are at work at a time, else one a tile."""
        down, wide = self.tiles(count, rows)
        at_work = multiprocessors // self.cluster * self.cluster
        return min(down * wide, at_work) if self.multiply == "wgmma" else down * wide

    def clocks(self, count: int, rows: int, depth: int, multiprocessors: int) -> float:
        """About how many clock cycles the product takes: as many tiles one after another as the busiest has."""
        down, wide = self.tiles(count, rows)
        multiply = self.tokens * self.rows / (32 if self.multiply == "wgmma" else 16)
        most = -(-down * wide // multiprocessors)
        stage = STAGE_CLOCKS if self.cluster == 1 or count < SHARING else SHARED_STAGE_CLOCKS
        # With ping-pong, what a tile takes beyond its multiplications passes while the next one multiplies.
        return most * depth / BOX * (multiply + stage) + (most if self.turns == 1 else 1) * TILE_CLOCKS

    @staticmethod
    def choose(count: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int) -> Tiling:
        """The tiling for `count` tokens and a weight [rows, depth] on a GPU of so many multiprocessors.

        It is the fastest one measured for as many tiles of tokens, else chosen by a model of its clock cycles.
        """
        segments = segments_of(rows, depth, gated)
        kept = measured().get((arch, multiprocessors, rows, depth, gated, -(-count // TOKENS) * TOKENS))
        if kept:
            return replace(kept, segments=segments)
        every = (replace(tiling, segments=segments) for tiling in tilings(arch, gated, rows * depth <= SMALL))
        return min(
            (tiling for tiling in every if tiling.fits(gated, depth)),
            key=lambda tiling: tiling.clocks(count, rows, depth, multiprocessors),
        )


# What stages.tune measured: a line for each weight and number of tokens on a kind of GPU; of TOKENS tokens those alone
# where the streamed version is slower.
MEASURED = Path(__file__).parent.with_name("tilings.csv")
TOKENS = 128  # of a tile of warpgroups
STEP = 64  # tokens that may take another tiling than as many more or fewer: the least of a tile
# A weight as small takes microseconds in any tiling, and each tiling is another kernel that a first start compiles.
SMALL = 1 << 21  # elements


@functools.cache
def measured() -> dict[tuple[str, int, int, int, bool, int], Tiling]:
    """Tilings of MEASURED by architecture, multiprocessors, rows and depth of the weight, whether gated, and tokens."""
    found = {}
    with open(MEASURED, newline="") as file:
        for line in csv.DictReader(file):
            key = (*(int(line[name]) for name in ("multiprocessors", "rows", "depth")), line["gated"] == "1")
            tiling = Tiling.of_warpgroups(*(int(line[name]) for name in ("tile_rows", "turns", "cluster")))
            found[line["arch"], *key, int(line["tokens"])] = tiling
    return found


@functools.cache
def tilings(arch: str, gated: bool, small: bool = False) -> tuple[Tiling, ...]:
    """Tilings that `Tiling.choose` chooses from; of a small weight a few."""
    if arch == "sm_90a" and small:
        return tuple(Tiling.of_warpgroups(rows) for rows in (64, 128, 256))
    if arch == "sm_90a":
        alone = tuple(Tiling.of_warpgroups(rows) for rows in (32, 40, 64, 80, 96, 128, 160, 192, 224, 240, 256))
        shared = tuple(Tiling.of_warpgroups(rows, cluster=2) for rows in (160, 192, 224, 256))
        # To write a tile is long work for SwiGLU alone: else ping-pong gains less than its smaller tiles lose. A
        # small tile one warpgroup multiplies with fewer reads than two.
        if gated:
            in_turn = (
                Tiling.of_warpgroups(176, 2),
                Tiling.of_warpgroups(192, 2),
                Tiling.of_warpgroups(192, 2, cluster=2),
            )
            return (*alone, *shared, *in_turn)
        return (Tiling.of_warpgroups(64, 2), *alone, *shared)
    return tuple(Tiling.of_warps(*tile, arch) for tile in ((128, 256, 2, 4), (64, 128, 2, 4)))


def is_faster(count: int, rows: int, depth: int, gated: bool, machine: tuple[str, int]) -> bool:
    """Whether this version takes less time than `kernels.linear.streamed`, whose bits it has: beyond that one's passes,
    and where it was measured. machine: architecture and multiprocessors."""
    if count > STREAMED[-1]:
        return True
    return count > STREAMED[-2] and (*machine, rows, depth, gated, TOKENS) in measured()
