import csv
import io

import pytest

from kernels.linear.tiled import MEASURED, Tiling
from stages import tune
from stages.exits import StageError

SHAPE = (4096, 11008, False)
MACHINE = ("sm_90a", 132)


def test_shapes_of_models_each_once():
    assert tune.list_shapes(["olmo2_7b", "olmo2_7b"]) == [
        (12288, 4096, False), (4096, 4096, False), (22016, 4096, True), SHAPE,
    ]  # fmt: skip
    assert tune.list_shapes(["llama3_8b"])[0] == (6144, 4096, False)
    with pytest.raises(StageError, match=r"olmo9: no file conf/model/olmo9.yaml; there are .*olmo2_7b"):
        tune.list_shapes(["olmo9"])


@pytest.mark.parametrize("shape", [SHAPE, (22016, 4096, True), (2048, 8192, False)])
@pytest.mark.parametrize("tokens", [256, 8192])
def test_candidates_are_what_a_block_can_do(tokens, shape):
    found = tune.list_candidates(tokens, shape, 132)
    assert 3 < len(found) <= tune.CANDIDATES and len(set(found)) == len(found)
    assert all(tiling.fits(shape[2], shape[1]) and tiling.stages >= 2 and tiling.threads <= 1024 for tiling in found)
    assert {tiling.segments for tiling in found} == {2 if shape == (2048, 8192, False) else 1}
    rows, depth, gated = shape
    assert Tiling.choose(tokens, rows, depth, gated, "sm_90a", 132).segments == found[0].segments


def test_lines_of_the_fastest_take_the_place_of_older_ones():
    slow, fast = Tiling.of_warpgroups(128), Tiling.of_warpgroups(256, 1, 2)
    rates = {"cublas": 7.1e14, slow: 6e14, fast: 7e14}
    line = tune.line_of(2048, SHAPE, rates, MACHINE, "NVIDIA H100")
    assert line
    assert line["tile_rows"] == "256" and line["cluster"] == "2" and line["tflops"] == "700"
    assert line["cublas_tflops"] == "710" and line["gated"] == "0"
    older, other = line | {"tile_rows": "64"}, line | {"tokens": "512"}
    own = tune.identity(2048, SHAPE, MACHINE)
    text = tune.merge([older, other], {own: line})
    read = list(csv.DictReader(io.StringIO(text)))
    assert read == [other, line]
    assert tune.merge(read, {}) == text
    assert list(csv.DictReader(io.StringIO(tune.merge(read, {own: None})))) == [other]


def test_the_streamed_version_stays_where_it_is_about_as_fast():
    rates = {"cublas": 2e14, "streamed": 3e14, Tiling.of_warpgroups(96): 3.02e14}
    assert tune.line_of(128, SHAPE, rates, MACHINE, "NVIDIA H100") is None
    assert tune.line_of(128, SHAPE, rates | {Tiling.of_warpgroups(64): 3.1e14}, MACHINE, "NVIDIA H100")


def test_the_file_is_as_it_would_be_written():
    text = MEASURED.read_text()
    assert tune.merge(csv.DictReader(io.StringIO(text)), {}) == text


def test_main_says_what_is_wrong(capsys):
    assert tune.main(["olmo2_7b", "--tokens", "100"]) == 1
    assert "error: --tokens 100: a multiple of 128 needed" in capsys.readouterr().err
    assert tune.main(["olmo9"]) == 1
    assert "error: olmo9: no file" in capsys.readouterr().err


@pytest.mark.gpu
def test_main_on_a_gpu(monkeypatch, tmp_path):
    from kernels.linear import tiled

    kept = tmp_path / "tilings.csv"
    kept.write_text(",".join(tune.FIELDS) + "\n")
    monkeypatch.setattr(tiled, "MEASURED", kept)
    monkeypatch.setattr(tune, "CANDIDATES", 2)
    monkeypatch.setattr(tune, "list_shapes", lambda names: [(2048, 2048, False)])
    done = tune.main(["olmo2_1b", "--tokens", "256"])
    if tiled.machine_of(0)[0] != "sm_90a":
        assert done == 1
        return
    (line,) = csv.DictReader(io.StringIO(kept.read_text()))
    assert done == 0 and line["tokens"] == "256" and int(line["tflops"]) > 1
