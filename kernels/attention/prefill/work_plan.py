"""The plan of a pass: its tiles of queries; where few follow a long history, their segments are entries too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from kernels.attention.prefill.tiling import Tiling
from kernels.attention.softmax import SEGMENT
from kernels.cuda import SIMULATED
from kernels.launch import machine_of

# fp32 elements of partial results at most: 64 MiB.
PARTIALS = 1 << 24


class Plan(NamedTuple):
    """A packed list of tokens as tiles of queries, and as entries that blocks take.

    work: i32 [1 + n, 8] on the device: two counters, 0 between launches, how many of the entries are in use, and five
    unused; then of each entry the tile of queries, by its first one's token, how many they are, the first one's
    position and the slot; the positions it is to look at, the first and the one after the last; the number of its
    tile's first partial result, -1 where there are none; and that of the tile.
    tiles: of queries. rows: of a tile at most. positions: that the sequences' last tokens see, together.
    partials: f32, of each segment and 16 rows of a tile, for each head: O, m and l as the warp's lanes hold them; and
    arrived: i32, 0 between launches: how many segments of the rows are there. Both empty where no tile is divided.
    """

    work: torch.Tensor
    tiles: int
    rows: int
    positions: int
    partials: torch.Tensor
    arrived: torch.Tensor


def default_tiling(head_dim: int, index: int) -> tuple[Tiling, str, int]:
    """Tiling, architecture and multiprocessors of a device; the simulator's has few threads."""
    if SIMULATED:
        return Tiling("mma", 32, 2), "sm_80", 2
    arch, multiprocessors = machine_of(index)
    return Tiling.choose(head_dim, arch), arch, multiprocessors


def plan(
    runs: Iterable[tuple[int, int, int]],
    head_dim: int,
    device: torch.device,
    tiling: Tiling | None = None,
    into: Plan | None = None,
    heads: int = 0,
) -> Plan:
    """The division of a packed list of tokens into tiles: made once for all layers of a pass.

    runs: of each sequence in the list how many tokens it has, its slot, and its first token's position; the tokens of a
    run are at consecutive positions. tiling: of `attention` (default: the device's). into: an earlier plan of as many
    tiles, which is filled in place for launches enqueued later, and returned; its work is divided as far as its memory
    reaches, which the runs it was made of have set. heads: query heads, for which tiles may be divided (0: none is).
    Raises ValueError where `into` has another number of tiles.
    """
    chosen, _, multiprocessors = default_tiling(head_dim, device.index or 0)
    tiling = tiling or chosen
    begin, positions, tiles = 0, 0, []
    for count, slot, position in runs:
        for row in range(0, count, tiling.rows):
            tiles.append((begin + row, min(tiling.rows, count - row), position + row, slot))
        begin += count
        positions += position + count
    if into is not None and len(tiles) != into.tiles:
        raise ValueError(f"plan: runs of {len(tiles)} tiles for a plan of {into.tiles}: as many needed")
    # The longest first: the last ones to be done are short.
    tiles.sort(key=lambda tile: -tile[1] - tile[2])
    most = 0  # partial results that there may be
    if into is not None:
        most = len(into.partials)
    elif tiling.multiply == "wgmma" and 0 < 2 * len(tiles) * heads <= multiprocessors:
        most = PARTIALS // (heads * record_size(head_dim))
    entries, partials = _divided(tiles) if most else ([], 0)
    if not 0 < partials <= most or (into is not None and len(entries) >= len(into.work)):
        entries, partials = [(*tile, 0, tile[1] + tile[2], -1, number) for number, tile in enumerate(tiles)], 0
    head = (0, 0, len(entries), 0, 0, 0, 0, 0)
    packed = torch.tensor([head, *entries], dtype=torch.int32, pin_memory=device.type == "cuda")
    if into is not None:
        into.work[: len(packed)].copy_(packed, non_blocking=True)
        return into
    return Plan(
        packed.to(device, non_blocking=True), len(tiles), tiling.rows, positions,
        torch.empty((partials, heads, record_size(head_dim)), device=device),
        torch.zeros((len(tiles) if partials else 0, tiling.rows // 16, heads), dtype=torch.int32, device=device),
    )  # fmt: skip


def _divided(tiles: list[tuple[int, int, int, int]]) -> tuple[list[tuple[int, ...]], int]:
    """An entry for each segment of each tile; and how many partial results those of more than one segment lead to."""
    entries: list[tuple[int, ...]] = []
    partials = 0
    for number, (token, count, position, slot) in enumerate(tiles):
        end = position + count
        segments = range(0, end, SEGMENT)
        first = partials if len(segments) > 1 else -1
        entries += [(token, count, position, slot, at, min(end, at + SEGMENT), first, number) for at in segments]
        if len(segments) > 1:
            partials += len(segments) * -(-count // 16)
    return entries, partials


def record_size(head_dim: int) -> int:
    """fp32 elements of a warp's partial result: for each lane O, m and l of two rows."""
    return 32 * (head_dim // 2 + 4)
