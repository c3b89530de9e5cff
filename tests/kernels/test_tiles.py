import pytest
import torch

from kernels.tiles import boxes_of, empty_tiles, parts_of, shape_of, to_rows, to_tiles


@pytest.mark.parametrize(
    ("rows", "depth", "gated"), [(8, 64, False), (40, 192, False), (16, 64, True), (48, 128, True)]
)
def test_tiles_hold_the_rows(rows, depth, gated):
    weight = torch.arange(rows * depth, dtype=torch.float32).view(rows, depth)
    tiles = to_tiles(weight, gated)
    assert shape_of(tiles) == shape_of(weight) == (rows, depth)
    assert torch.equal(to_rows(tiles), weight)
    assert to_rows(weight) is weight
    assert torch.equal(boxes_of(tiles, gated), boxes_of(weight, gated))


def test_a_tile_has_gate_and_up_in_turn():
    weight = torch.arange(32, dtype=torch.float32)[:, None].expand(32, 64).contiguous()  # rows: 0 to 15 gate, 16 up
    tiles = to_tiles(weight, True)
    assert tiles[1, 0, :, :, 0].tolist() == [[4, 20], [5, 21], [6, 22], [7, 23]]
    gate, up = parts_of(tiles)
    assert gate[1, 2, 0, 0] == 6 and up[1, 2, 0, 0] == 22


@pytest.mark.parametrize(("rows", "depth", "gated"), [(12, 64, False), (8, 32, False), (24, 64, True)])
def test_a_weight_that_is_no_tiles_is_refused(rows, depth, gated):
    with pytest.raises(ValueError, match=rf"tiles of a weight \[{rows}, {depth}\]"):
        empty_tiles(rows, depth, gated, torch.float32, "cpu")
