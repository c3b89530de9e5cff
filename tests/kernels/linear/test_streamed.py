from dataclasses import replace

import pytest
import torch
from kernel_numerics import DEVICE, assert_as_good_as_torch, assert_equal, poisoned, randn

from kernels.architectures import ARCHITECTURES, LIMITS, architecture_of
from kernels.check import HALVES
from kernels.cuda import SIMULATED
from kernels.linear import reference, streamed, tiled
from kernels.linear.streamed import Tiling
from kernels.tiles import shape_of, to_tiles

BF16, F16 = torch.bfloat16, torch.float16
HAS_BULK = SIMULATED or torch.cuda.get_device_capability()[0] >= 9
COPIES = [
    pytest.param("bulk", marks=pytest.mark.skipif(not HAS_BULK, reason="bulk copies need sm_90")),
    "async",
]
# One for each number of tokens a pass takes, small enough for the simulator.
TILINGS = {
    8: Tiling(8, 3, 1, 1, boxes=2, stages=2, batch=8, together=2, copy=""),
    16: Tiling(16, 2, 1, 1, boxes=2, stages=3, batch=4, together=2, copy=""),
    32: Tiling(32, 3, 2, 2, boxes=1, stages=2, batch=4, together=1, copy=""),
    64: Tiling(64, 3, 2, 2, boxes=1, stages=2, batch=2, together=2, copy=""),
    128: Tiling(128, 2, 2, 4, boxes=2, stages=2, batch=2, together=1, copy=""),
}

# Of the warpgroups' way.
GROUPED = [replace(TILINGS[tokens], boxes=2, copy="bulk", wgmma=True) for tokens in (8, 32, 128)]
HAS_WGMMA = SIMULATED or torch.cuda.get_device_capability()[0] == 9


def run(tiling, x, weight, gated=False, blocks=2):
    """The product by a tiling of the test's choice, on few blocks, so that each takes several turns."""
    (count, depth), (rows, _) = x.shape, shape_of(weight)
    out = poisoned(count, rows // 2 if gated else rows, dtype=x.dtype)
    sources = [weight, x]
    if tiling.copy == "bulk":
        sources = streamed.maps(tiling, weight, x, gated)
    grid = (min(blocks, -(-rows // (8 * tiling.groups))), -(-count // tiling.tokens))
    arch = "sm_90a" if SIMULATED else architecture_of(torch.cuda.get_device_capability())
    streamed.streamed(HALVES[x.dtype], tiling, gated, arch).launch(grid, *sources, out, count, rows, depth)
    return out


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(
    ("tokens", "count", "dtype"),
    [(8, 3, BF16), (16, 11, BF16), (32, 20, BF16), (64, 70, BF16), (128, 40, BF16), (8, 3, F16), (16, 11, F16)],
)
@pytest.mark.parametrize("gated", [False, True])
def test_against_float64(tokens, count, dtype, gated, copy):
    x, weight = randn(count, 128, dtype=dtype), randn(80, 128, dtype=dtype, scale=0.1)
    out = run(replace(TILINGS[tokens], copy=copy), x, weight, gated)
    ours, exact = reference(x, weight), reference(x.double(), weight.double())
    if gated:
        ours, exact = swiglu(ours), swiglu(exact)
    assert_as_good_as_torch(out, ours, exact)


@pytest.mark.slow
def test_tilings_change_no_bit():
    x, weight = randn(9, 256, dtype=BF16), randn(64, 256, dtype=BF16)
    rows = [run(replace(TILINGS[8], copy="async"), x[i : i + 1], weight) for i in range(9)]
    alone = torch.cat(rows)
    for tokens, tiling in TILINGS.items():
        for changes in ({}, {"groups": 4, "each": 1}, {"boxes": 1, "stages": 5}, {"batch": 2}):
            changed = replace(tiling, copy="bulk" if HAS_BULK else "async", **changes)
            if tokens in (16, 128) or not changes:
                assert torch.equal(run(changed, x, weight), alone), changed


@pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is sm_90a's")
@pytest.mark.parametrize(("tiling", "dtype"), [*((tiling, BF16) for tiling in GROUPED), (GROUPED[1], F16)])
@pytest.mark.parametrize("gated", [False, True])
def test_warpgroups_change_no_bit(tiling, dtype, gated):
    # The simulator adds 16 products in one rounding, whatever the instruction; a GPU has its own way in both.
    x, weight = randn(tiling.tokens + 9, 256, dtype=dtype), randn(80, 256, dtype=dtype)
    expected = run(replace(TILINGS[16], copy="async"), x, weight, gated)
    assert_equal(run(tiling, x, weight, gated), expected)


@pytest.mark.usefixtures("races")
@pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is sm_90a's")
def test_a_stage_of_the_ring_is_filled_again_once_it_is_read():
    # With fewer tokens a warpgroup reads the next stage too, and makes nothing of that.
    x, weight = randn(1, 512, dtype=BF16), randn(40, 512, dtype=BF16)
    out = run(GROUPED[2], x, weight)
    assert_as_good_as_torch(out, reference(x, weight), reference(x.double(), weight.double()))


@pytest.mark.skipif(not HAS_BULK, reason="tiles are read by tensor maps, from sm_90 on")
@pytest.mark.parametrize(
    ("tiling", "gated"),
    [
        (TILINGS[8], False),
        (TILINGS[8], True),
        (replace(TILINGS[16], segments=2), False),
        *([(GROUPED[1], False), (GROUPED[1], True)] if HAS_WGMMA else []),
    ],
)
def test_tiles_change_no_bit(tiling, gated):
    tiling = replace(tiling, copy="bulk")
    x, weight = randn(tiling.tokens - 3, 256, dtype=BF16), randn(80, 256, dtype=BF16)
    assert torch.equal(run(tiling, x, to_tiles(weight, gated), gated), run(tiling, x, weight, gated))


def test_one_accumulator_in_order_of_depth():
    # 2 ** 24 swallows a 1 that is added to it, but not the sum of two that come before.
    x = torch.ones(1, 128, dtype=BF16, device=DEVICE)
    weight = torch.zeros(8, 128, dtype=BF16, device=DEVICE)
    weight[:, 0], weight[:, 32], weight[:, 64] = 2.0**24, 1.0, -(2.0**24)
    tiling = replace(TILINGS[8], groups=1, copy="async")
    assert (run(tiling, x, weight) == 0).all()
    weight[:, 32], weight[:, 96] = 0.0, 1.0
    assert (run(tiling, x, weight) == 1).all()


# Weights of few rows: a sum for each half of K.
HALVED = {
    "8": replace(TILINGS[8], segments=2, batch=4),
    "16": replace(TILINGS[16], segments=2),
    "64": replace(TILINGS[64], segments=2, boxes=2),
    "128": replace(TILINGS[128], segments=2),
    "wgmma 32": replace(GROUPED[1], segments=2),
    "wgmma 128": replace(GROUPED[2], segments=2, boxes=4),
}
HALVED_PARAMS = [
    pytest.param(name, marks=pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is sm_90a's") if tiling.wgmma else ())
    for name, tiling in HALVED.items()
]


@pytest.mark.parametrize("name", HALVED_PARAMS)
def test_halves_are_summed_apart(name, request):
    if name != "wgmma 32":  # which reads 64 rows of tokens, of the next stage too, and makes nothing of those
        request.getfixturevalue("races")
    tiling = HALVED[name] if HALVED[name].wgmma else replace(HALVED[name], copy="bulk" if HAS_BULK else "async")
    # 2 ** 24 swallows a 1 that is added to it: in the same half, but not from the other one.
    x = torch.ones(1, 512, dtype=BF16, device=DEVICE)
    weight = torch.zeros(8, 512, dtype=BF16, device=DEVICE)
    weight[:, 0], weight[:, 32], weight[:, 255] = 2.0**24, 1.0, -(2.0**24)
    assert (run(tiling, x, weight) == 0).all()
    weight[:, 32], weight[:, 256] = 0.0, 1.0
    assert (run(tiling, x, weight) == 1).all()
    weight[:, 255], weight[:, 511] = 0.0, -(2.0**24)
    assert (run(tiling, x, weight) == 1).all()


@pytest.mark.parametrize("name", HALVED_PARAMS)
def test_halves_in_every_tiling(name):
    tiling = HALVED[name] if HALVED[name].wgmma else replace(HALVED[name], copy="bulk" if HAS_BULK else "async")
    x, weight = randn(tiling.tokens // 2 + 1, 512, dtype=BF16), randn(40, 512, dtype=BF16, scale=0.1)
    out = run(tiling, x, weight)
    assert_as_good_as_torch(out, reference(x, weight), reference(x.double(), weight.double()))
    assert_equal(out, run(replace(HALVED["16"], copy="async"), x, weight))


def test_weights_of_few_rows_are_halved():
    assert streamed.segments_of(2048, 8192, False) == 2
    others = ((4096, 8192, False), (2048, 2048, False), (2048, 8256, False), (2048, 8192, True))
    assert {streamed.segments_of(*shape) for shape in others} == {1}
    x, weight = randn(3, 4096, dtype=BF16), randn(16, 4096, dtype=BF16, scale=0.1)
    expected = run(replace(HALVED["16"], copy="async"), x, weight)
    assert_equal(streamed.linear(x, weight, poisoned(3, 16, dtype=BF16)), expected)


@pytest.mark.parametrize("count", [1, 5])
def test_launchers(half, count):
    x, weight = randn(count, 128, dtype=half), randn(48, 128, dtype=half, scale=0.1)
    exact = reference(x.double(), weight.double())
    out = streamed.linear(x, weight, poisoned(count, 48, dtype=half))
    assert_as_good_as_torch(out, reference(x, weight), exact)
    assert_equal(streamed.linear(x[-1:], weight, poisoned(1, 48, dtype=half)), out[-1:])
    out = streamed.linear_swiglu(x, weight, poisoned(count, 24, dtype=half))
    assert_as_good_as_torch(out, swiglu(reference(x, weight)), swiglu(exact))
    assert_equal(streamed.linear_swiglu(x[-1:], weight, poisoned(1, 24, dtype=half)), out[-1:])


def test_products_beyond_fp16_are_infinite():
    """As torch's: only what is written is fp16, gate and up are not."""
    x = torch.full((1, 64), 32.0, dtype=F16, device=DEVICE)
    weight = torch.ones(16, 64, dtype=F16, device=DEVICE)
    assert (streamed.linear_swiglu(x, weight, poisoned(1, 8, dtype=F16)) == float("inf")).all()
    weight[8:] = -0.001
    assert (streamed.linear_swiglu(x * 40, weight, poisoned(1, 8, dtype=F16)) == float("-inf")).all()
    weight[8:] = 2.0**-20
    out = streamed.linear_swiglu(x * 40, weight, poisoned(1, 8, dtype=F16))  # the gate alone is 81920
    assert torch.allclose(out, torch.full_like(out, 81920 * 81920 * 2.0**-20), rtol=1e-3)


# (rows, depth, gated) of OLMo-2 1B, 7B, 13B, Llama 3 8B and the bundled model.
SHAPES = [
    *[(6144, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (100352, 2048)],
    *[(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (100352, 4096)],
    *[(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824), (100352, 5120)],
    *[(6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    *[(768, 256), (256, 256), (1536, 256), (256, 768), (4096, 256)],
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_choices_fit(arch):
    for rows, depth in SHAPES:
        for tokens in (1, 8, 9, 32, 64, 100, 128, 256):
            for multiprocessors in (58, 108, 132, 170):
                tiling = Tiling.choose(tokens, rows, depth, False, arch, multiprocessors)
                assert tiling.tokens >= min(tokens, 128) and depth % (64 * tiling.boxes) == 0
                assert tiling.threads <= 1024 and tiling.shared <= LIMITS[arch].shared_block
                steps = tiling.boxes * 4 // tiling.segments
                assert tiling.stages >= 2 and steps % tiling.batch == 0 and tiling.batch % 2 == 0
                assert tiling.tiles % min(tiling.together, tiling.tiles) == 0
                assert tiling.copy == ("async" if arch in ("sm_80", "sm_86", "sm_89") else "bulk")


def test_refusals():
    x = randn(2, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"linear: weight is \(12, 64\): rows of 8 and columns of 64 needed"):
        streamed.linear(x, randn(12, 64, dtype=BF16), randn(2, 12, dtype=BF16))
    with pytest.raises(ValueError, match=r"linear_swiglu: weight is \(8, 64\): rows of 16 and columns of 64 needed"):
        streamed.linear_swiglu(x, randn(8, 64, dtype=BF16), randn(2, 4, dtype=BF16))
    with pytest.raises(ValueError, match=r"linear: out has shape \(2, 8\): \(2, 16\) needed"):
        streamed.linear(x, randn(16, 64, dtype=BF16), randn(2, 8, dtype=BF16))
    with pytest.raises(TypeError, match=r"linear: x is torch.float32: torch.bfloat16 or torch.float16 needed"):
        streamed.linear(x.float(), randn(16, 64, dtype=BF16), randn(2, 16, dtype=BF16))
    with pytest.raises(TypeError, match=r"linear: weight is torch.bfloat16: torch.float16 needed"):
        streamed.linear(x.half(), randn(16, 64, dtype=BF16), randn(2, 16, dtype=F16))


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED, reason="too much for the simulator")
@pytest.mark.parametrize(
    ("rows", "depth", "gated"),
    [
        *[(16384, 2048, True), (22016, 4096, True), (27648, 5120, True), (55296, 5120, True), (5120, 13824, False)],
        (2048, 8192, False),
    ],
)
@pytest.mark.parametrize("count", [1, 8, 16])
def test_no_stage_is_filled_before_it_is_read(rows, depth, gated, count):
    """A stage given back before its loads have ended shows as a few wrong outputs in one of some launches."""
    x, weight = randn(count, depth, dtype=BF16), randn(rows, depth, dtype=BF16, scale=0.02)
    name, columns = ("linear_swiglu", rows // 2) if gated else ("linear", rows)
    expected = getattr(tiled, name)(x, weight, poisoned(count, columns, dtype=BF16))
    outs = [poisoned(count, columns, dtype=BF16) for _ in range(100)]
    for out in outs:
        getattr(streamed, name)(x, weight, out)
    assert [i for i, out in enumerate(outs) if not torch.equal(out, expected)] == []


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED, reason="too much for the simulator")
@pytest.mark.parametrize(
    ("rows", "depth", "gated"), [(4096, 11008, False), (22016, 4096, True), (100352, 2048, False), (2048, 8192, False)]
)
def test_real_shapes(half, rows, depth, gated):
    x, weight = randn(256, depth, dtype=half), randn(rows, depth, dtype=half, scale=0.02)
    launch = streamed.linear_swiglu if gated else streamed.linear
    columns = rows // 2 if gated else rows
    whole = launch(x, weight, poisoned(256, columns, dtype=half))
    ours, exact = reference(x, weight), reference(x.double(), weight.double())
    assert_as_good_as_torch(whole, swiglu(ours) if gated else ours, swiglu(exact) if gated else exact)
    for count in (1, 2, 7, 8, 16, 17, 32, 64, 65, 128):
        begin = 256 - count
        part = launch(x[begin:].contiguous(), weight, poisoned(count, columns, dtype=half))
        assert torch.equal(part, whole[begin:]), count
    for _ in range(20):
        assert_equal(launch(x[:1].contiguous(), weight, poisoned(1, columns, dtype=half)), whole[:1])
