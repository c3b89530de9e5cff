"""Products of a warpgroup: scores by keys, O by values."""

from __future__ import annotations

from collections.abc import Callable

from kernels import ptx
from kernels.attention.prefill.wgmma.layout import Layout
from kernels.attention.softmax import TILE
from kernels.cuda import device_function, int32, uint32, uint64
from kernels.device import HALVES


def products(dtype: str, layout: Layout) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that issue the scores of a tile's keys, and O's growth by a tile's values."""
    head_dim, rows, box_bytes = layout.head_dim, layout.rows, layout.box_bytes
    stages, tile_bytes = layout.stages, layout.tile_bytes
    steps = head_dim // 16
    by_keys = HALVES[dtype].wgmma(TILE)
    by_values = HALVES[dtype].wgmma(head_dim, "registers", "n")

    @device_function
    def offset(matrix, tile):
        """The matrix of the tile of this number, from that of tile 0."""
        return uint32(matrix + uint32(tile % uint32(stages)) * uint32(tile_bytes >> 4))

    @device_function
    def descriptor(matrix, units):
        """Descriptor of the place that lies so many units of 16 bytes on from a matrix; `matrix` is its descriptor's
        lower half, of which alone a register is needed."""
        return ptx.wgmma_descriptor(uint32(0), uint32(0), uint32(1024)) | uint64(uint32(matrix + uint32(units)))

    @device_function
    def multiply_keys(score, q_matrix, k_matrices, tile):
        k_matrix = offset(k_matrices, tile)
        for s in range(steps):
            along = s % 4 * 2
            by_keys(
                score, descriptor(q_matrix, s // 4 * rows * 8 + along),
                descriptor(k_matrix, s // 4 * box_bytes // 16 + along), uint32(0) if s == 0 else uint32(1),
            )  # fmt: skip
        ptx.wgmma_commit_group()

    @device_function
    def multiply_values(o, p, v_matrices, tile, fresh):
        """fresh: 0 where O begins anew."""
        v_matrix = offset(v_matrices, tile)
        for s in range(TILE // 16):
            by_values(
                o, p[4 * s], p[4 * s + 1], p[4 * s + 2], p[4 * s + 3], descriptor(v_matrix, 128 * s),
                fresh if s == 0 else uint32(1),
            )  # fmt: skip
        ptx.wgmma_commit_group()

    return multiply_keys, multiply_values


def cleaner(layout: Layout) -> Callable[..., None]:
    stages, boxes, box_bytes, tile_bytes = layout.stages, layout.boxes, layout.box_bytes, layout.tile_bytes

    @device_function
    def clear(v_tiles, tile, first, low, limit, thread, group):
        """Rows outside low … limit - 1 of the tile of values at position `first` become 0: a weight of 0 times what
        memory happens to hold need not be 0. Each warpgroup does so by itself."""
        if first < low or first + TILE > limit:
            v_tile = v_tiles + tile % uint32(stages) * uint32(tile_bytes)
            begin, end = int32(low - first), int32(limit - first)
            for i in range(8):
                row = int32(i * 16 + (thread >> 3))
                if row < begin or row >= end:
                    for b in range(boxes):
                        zero = uint32(0)
                        place = uint32(b * box_bytes + i * 2048) + uint32(thread * 16)
                        ptx.st_shared_v4(v_tile + place, zero, zero, zero, zero)
            ptx.fence_proxy_async_shared()
            ptx.bar_sync(uint32(3 + group), uint32(128))

    return clear
