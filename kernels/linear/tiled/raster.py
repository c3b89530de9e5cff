"""Order in which the tiles of out are worked on."""

from __future__ import annotations

from kernels.cuda import device_function, int32, uint32


@device_function
def tile_at(tile, group, down, wide):
    """Row and column of tile number `tile` of [down, wide]: down through `group` of them, then across, then the next
    `group`."""
    # Unsigned: a division of 32 bits, not of 64.
    tile, group, wide = uint32(tile), uint32(group), uint32(wide)
    begin = uint32(uint32(tile // uint32(group * wide)) * group)
    within = uint32(tile - uint32(begin * wide))
    height = min(group, uint32(uint32(down) - begin))
    return int32(begin + within % height), int32(within // height)
