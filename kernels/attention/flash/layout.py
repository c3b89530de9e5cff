"""Sizes of the decode kernel: what a thread owns, and where shared memory holds what."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.attention.softmax import TILE

THREADS = 128


@dataclass(frozen=True)
class Layout:
    """Sizes for heads of `head_dim` elements, `group` query heads a KV head.

    Shared memory: K tile, V tile; queries and the new key, in whose place later are the weights; the weights' sums;
    what warps exchange before: sums of squares, then largest scores; zeros.
    """

    head_dim: int
    group: int

    @property
    def chunks(self) -> int:
        """16-byte chunks of a head."""
        return self.head_dim // 8

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_dim

    @property
    def tile_bytes(self) -> int:
        return TILE * self.row_bytes

    @property
    def steps(self) -> int:
        """Steps of 16 elements of the product over d."""
        return self.head_dim // 16

    @property
    def columns(self) -> int:
        """Blocks of 8 columns of O that a warp owns."""
        return self.head_dim // 32

    @property
    def row_blocks(self) -> int:
        """Blocks of 8 rows, of a product's 16, that are in use."""
        return 2 if self.group > 8 else 1

    @property
    def units(self) -> int:
        """Units of a head to rotate: two pairs of elements each."""
        return self.head_dim // 4

    @property
    def rounds(self) -> int:
        """Units that a thread rotates, of the group's queries and the new key."""
        return -(-(self.group + 1) * self.units // THREADS)

    @property
    def rows_at(self) -> int:
        return 2 * self.tile_bytes

    @property
    def sums_at(self) -> int:
        return self.rows_at + self.group * 256

    @property
    def largest_at(self) -> int:
        return self.sums_at + self.row_blocks * 512

    @property
    def zeros_at(self) -> int:
        return self.largest_at + self.row_blocks * 128

    @property
    def shared_bytes(self) -> int:
        return self.zeros_at + 16
