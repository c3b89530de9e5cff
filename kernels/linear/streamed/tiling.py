"""Which weight rows and tokens a block works on, how deep its ring is, and in what segments K is summed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels.architectures import LIMITS, has_dependent_launch
from kernels.tiles import BOX

TOKENS = (8, 16, 32, 64, 128)
# Bytes of a block at most, so that the small kernels of a chain run beside it.
RING = 160 << 10
# Of wgmma with many tokens and few weight rows; what runs beside it waits for a free multiprocessor.
WIDE_RING = 208 << 10
# Bytes a stage should have at most: smaller ones cost more barriers, larger ones leave fewer in flight.
STAGE = 26 << 10
FEW_STAGE = 16 << 10
# Groups of 8 rows of a block with which the chain of its dependent products takes as long as its weights.
FEW_GROUPS = 8
# Rows below which the chain of a block's dependent products takes longer than its weights take to arrive, and columns
# from which that matters.
FEW_ROWS, DEEP = 2304, 4096


def segments_of(rows: int, depth: int, gated: bool) -> int:
    """Segments of K, 1 or 2, that the products with a weight [rows, depth] are summed in before these are added."""
    return 2 if not gated and rows <= FEW_ROWS and depth >= DEEP and depth % (2 * BOX) == 0 else 1


def tokens_of_a_pass(count: int) -> int:
    """The one of TOKENS that so many tokens are taken as; more than the last take several passes."""
    return next((size for size in TOKENS if count <= size), TOKENS[-1])


@dataclass(frozen=True)
class Tiling:
    """How a block works.

    tokens: of a pass. groups: of 8 weight rows a block owns at a time. each: groups a warp owns. split: warps that
    share a group's tokens. boxes: of 64 columns in a stage. stages: of the ring. batch, together: steps of 16 columns
    and tiles of 16 tokens whose operands a warp loads at once. copy: "bulk" or "async". wgmma: whether warpgroups
    multiply, each all groups for 64 tokens; each, split, batch and together say nothing then. segments: parts of K that
    are summed apart, the boxes of a stage divided among them; each has warps of its own, or accumulators of a
    warpgroup's.
    """

    tokens: int
    groups: int
    each: int
    split: int
    boxes: int
    stages: int
    batch: int
    together: int
    copy: str
    wgmma: bool = False
    segments: int = 1

    @property
    def name(self) -> str:
        """Its part of a kernel's name."""
        way = f"wgmma_b{self.boxes}"
        if not self.wgmma:
            way = f"x{self.each}x{self.split}_b{self.boxes}x{self.batch}x{min(self.tiles, self.together)}"
        segments = f"_k{self.segments}" if self.segments > 1 else ""
        return f"t{self.tokens}_g{self.groups}_{way}{segments}_s{self.stages}"

    @property
    def tiles(self) -> int:
        """Tiles of 16 tokens that a warp owns."""
        return max(1, self.tokens // 16 // self.split)

    @property
    def warps(self) -> int:
        """Consumer warps; one more is the producer."""
        if self.wgmma:
            return 4 * -(-self.tokens // 64)
        return -(-self.groups // self.each) * self.split * self.segments

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    @property
    def own_boxes(self) -> int:
        """Boxes of a stage that a segment of K has."""
        return self.boxes // self.segments

    @property
    def box_bytes(self) -> int:
        """Bytes of the weight rows of one box; where gated, gate rows and up rows in turn."""
        return self.groups * 1024

    @property
    def token_bytes(self) -> int:
        """Bytes of the token rows of one box."""
        return self.tokens * 128

    @property
    def stage_bytes(self) -> int:
        return self.boxes * (self.box_bytes + self.token_bytes)

    @property
    def shared(self) -> int:
        """Bytes of a block: the ring from a multiple of 1024 on, then two barriers a stage, then the exchange buffer;
        wgmma reads 64 tokens."""
        beyond = max(0, 64 - self.tokens) * 128 if self.wgmma else self.exchange_bytes
        return 1024 + self.stages * (self.stage_bytes + 16) + beyond

    @property
    def exchange_bytes(self) -> int:
        """Bytes through which the warps of the second segment pass on their sums: a fragment each."""
        return (self.segments - 1) * self.warps // self.segments * 512

    def columns(self, gated: bool) -> int:
        """Columns of out that a block owns at a time."""
        return self.groups * (4 if gated else 8)

    @staticmethod
    def choose(tokens: int, rows: int, depth: int, gated: bool, arch: str, multiprocessors: int) -> Tiling:
        """The tiling for a pass of `tokens` tokens over a weight [rows, depth] on a GPU of so many multiprocessors.

        One pass of all blocks over the rows where a block can own its share, else the fewest equal passes.
        """
        bucket = tokens_of_a_pass(tokens)
        share = -(-rows // 8 // multiprocessors)
        passes = -(-share // (21 if bucket == 128 and arch != "sm_90a" else 28))
        groups = max(1, -(-rows // 8 // (multiprocessors * passes)))
        few, wgmma = groups <= FEW_GROUPS, arch == "sm_90a" and (bucket >= 64 or (bucket == 32 and groups <= 16))
        # All measured on an H200. Of warps: one with more groups and tokens reads less of each, as far as registers go;
        # with few groups it takes several a group to keep up, and large stages, as each is a wait in the chain of sums.
        each, split, batch, stage, ring = 1, 1, 8, STAGE, RING
        if wgmma:
            # Tokens outweigh few weights: a deeper ring keeps enough of these on their way.
            stage = (2 if few else 1) * (groups * 1024 + bucket * 128 + 1024)
            ring = WIDE_RING if few and bucket > 64 else RING
        elif few:
            each, split = {8: (1, 1), 16: (1, 1), 32: (1, 2)}.get(bucket, (2, 2) if groups > 2 else (1, 4))
            batch, stage = {8: 32, 16: 32, 32: 8}.get(bucket, 4), FEW_STAGE if bucket <= 16 else STAGE // 2
        elif bucket > 16:
            wide = groups > 16
            each, split = (1 + wide, 1) if bucket == 32 else (3, 1 if wide else 2)
            batch = 4
        each = min(each, groups)
        budget = min(ring, LIMITS[arch].shared_block - 2048)
        copy = "bulk" if has_dependent_launch(arch) else "async"
        segments = segments_of(rows, depth, gated)
        tilings = [
            Tiling(bucket, groups, each, split, boxes, 0, min(boxes * 4 // segments, batch), 2, copy, wgmma, segments)
            for boxes in (8, 4, 2, 1)
            if depth % (boxes * BOX) == 0 and boxes % segments == 0
        ]
        if not tilings:
            raise ValueError(f"linear: a weight [{rows}, {depth}]: columns of {BOX} needed")
        tiling = next((tiling for tiling in tilings if tiling.stage_bytes <= stage), tilings[-1])
        stages = min(16, (budget - tiling.exchange_bytes) // (tiling.stage_bytes + 16))
        if stages < 2:
            raise ValueError(f"linear: a weight [{rows}, {depth}] has no tiling for {tokens} tokens on {arch}")
        return replace(tiling, stages=stages)
