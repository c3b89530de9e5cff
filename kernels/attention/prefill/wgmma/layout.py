"""Shared memory of a block, and waiting for what arrives there."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.attention.prefill.tiling import Tiling
from kernels.attention.softmax import TILE
from kernels.cuda import device_function, uint32


class Layout:
    """Shared memory of a block, from a multiple of 1024 on: queries, ring of keys, ring of values, running totals,
    barriers (queries, keys and values there; queries, keys and values used up), then the entry worked on and, with
    `divided`, the next one, and 4 bytes that nobody reads."""

    def __init__(self, head_dim: int, tiling: Tiling, divided: bool):
        self.head_dim, self.divided = head_dim, divided
        self.groups, self.rows, self.stages = tiling.rows // 64, tiling.rows, tiling.stages
        self.workers = 128 * self.groups
        self.boxes = head_dim // 64  # of 64 columns
        self.box_bytes = TILE * 128
        self.q_bytes, self.tile_bytes = self.boxes * self.rows * 128, self.boxes * self.box_bytes
        self.k_at, self.v_at = self.q_bytes, self.q_bytes + self.stages * self.tile_bytes
        self.totals_at = self.v_at + self.stages * self.tile_bytes
        self.q_full = self.totals_at + head_dim // 8 * self.workers * 16
        self.k_full, self.v_full = self.q_full + 8, self.q_full + 8 + 8 * self.stages
        used = 8 + 16 * self.stages
        self.q_used, self.k_used, self.v_used = self.q_full + used, self.k_full + used, self.v_full + used
        self.entry_at = self.q_full + -(-2 * used // 16) * 16
        self.entry_stride = 32 if divided else 0
        self.spare_at = self.entry_at + 64


@device_function
def wait(barrier, parity):
    while ptx.mbarrier_try_wait(barrier, parity) == 0:
        pass


def stage_barriers(stages: int) -> tuple[Callable[..., None], Callable[..., bool], Callable[..., None]]:
    """Functions that wait for, look for, and release a tile by its number among all that the block works on."""

    @device_function
    def await_stage(barriers, tile):
        wait(barriers + uint32(8) * (tile % uint32(stages)), tile // uint32(stages) & uint32(1))

    @device_function
    def peek(barriers, tile):
        """Whether the tile is there."""
        parity = tile // uint32(stages) & uint32(1)
        return ptx.mbarrier_test(barriers + uint32(8) * (tile % uint32(stages)), parity) != 0

    @device_function
    def release(barriers, tile, lane):
        if lane == 0:
            ptx.mbarrier_arrive(barriers + uint32(8) * (tile % uint32(stages)))

    return await_stage, peek, release
