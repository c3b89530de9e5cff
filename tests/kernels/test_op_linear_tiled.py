from dataclasses import replace

import pytest
import torch
from kernel_numerics import DEVICE, assert_as_good_as_torch, assert_equal, poisoned, randn

from kernels import device, ptx
from kernels.architectures import ARCHITECTURES, LIMITS, architecture_of
from kernels.cuda import SIMULATED, cuda, uint32
from kernels.launch import Kernel, kernel_factory
from kernels.linear import reference, streamed, tiled
from kernels.linear.tiled import Tiling

BF16, F16 = torch.bfloat16, torch.float16
ARCH = "sm_90a" if SIMULATED else architecture_of(torch.cuda.get_device_capability())
# Small enough for the simulator; two blocks, so that one of "wgmma" has several tiles.
TILINGS = {
    "warps": Tiling("mma", tokens=32, rows=64, down=1, across=2, columns=32, stages=3),
    "warps 64": Tiling("mma", tokens=64, rows=32, down=2, across=1, columns=64, stages=2),
    "down": Tiling("wgmma", tokens=128, rows=48, down=2, across=1, columns=64, stages=3),
    "whole": Tiling("wgmma", tokens=64, rows=64, down=1, across=1, columns=128, stages=2),
    "turns": Tiling("wgmma", tokens=64, rows=32, down=1, across=1, columns=64, stages=2, turns=2),
    "turns 128": Tiling("wgmma", tokens=128, rows=32, down=1, across=1, columns=128, stages=3, turns=2),
}
HOPPER = pytest.mark.skipif(ARCH != "sm_90a", reason="wgmma is sm_90a's")
KINDS = [pytest.param(name, marks=HOPPER if tiling.multiply == "wgmma" else ()) for name, tiling in TILINGS.items()]


def run(tiling, x, weight, gated=False, multiprocessors=2):
    out = poisoned(len(x), len(weight) // 2 if gated else len(weight), dtype=x.dtype)
    tiled.launch(tiling, x, weight, out, gated, (ARCH, multiprocessors))
    return out


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("count", "gated", "dtype"),
    [(70, False, BF16), (33, True, BF16), (1, False, BF16), (130, True, BF16), (33, True, F16), (1, False, F16)],
)
def test_against_float64_and_streamed(kind, count, gated, dtype):
    tiling = TILINGS[kind]
    if gated and kind == "down":
        tiling = replace(tiling, rows=96)
    x, weight = randn(count, 192, dtype=dtype), randn(112, 192, dtype=dtype, scale=0.1)
    out = run(tiling, x, weight, gated)
    ours, exact = reference(x, weight), reference(x.double(), weight.double())
    if gated:
        ours, exact = swiglu(ours), swiglu(exact)
    assert_as_good_as_torch(out, ours, exact)
    decode = streamed.linear_swiglu if gated else streamed.linear
    assert_equal(out, decode(x, weight, torch.empty_like(out)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_accumulator_in_order_of_depth(kind):
    # 2 ** 24 swallows a 1 that is added to it, but not the sum of two that come before.
    x = torch.ones(1, 128, dtype=BF16, device=DEVICE)
    weight = torch.zeros(8, 128, dtype=BF16, device=DEVICE)
    weight[:, 0], weight[:, 32], weight[:, 64] = 2.0**24, 1.0, -(2.0**24)
    assert (run(TILINGS[kind], x, weight) == 0).all()
    weight[:, 32], weight[:, 96] = 0.0, 1.0
    assert (run(TILINGS[kind], x, weight) == 1).all()


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_of_the_ring_is_filled_again_once_it_is_read(kind):
    # One block, so that a persistent one has a second tile; the last of more stages than the ring has is its first,
    # where results are staged.
    x, weight = randn(1, 320, dtype=BF16), randn(72, 320, dtype=BF16)
    out = run(TILINGS[kind], x, weight, multiprocessors=1)
    assert_as_good_as_torch(out, reference(x, weight), reference(x.double(), weight.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_summed_apart(kind):
    # 2 ** 24 swallows a 1 that is added to it: in the same half, but not from the other one.
    tiling = replace(TILINGS[kind], segments=2)
    x, weight = randn(33, 512, dtype=BF16), randn(40, 512, dtype=BF16, scale=0.1)
    x[0], weight[:2] = 1.0, 0.0
    weight[:2, 0], weight[0, 32], weight[1, 256], weight[:2, 255] = 2.0**24, 1.0, 1.0, -(2.0**24)
    out = run(tiling, x, weight)
    assert out[0, 0] == 0 and out[0, 1] == 1
    decode = streamed.Tiling(16, 2, 1, 1, boxes=2, stages=3, batch=4, together=2, copy="async", segments=2)
    expected = poisoned(33, 40, dtype=BF16)
    streamed.streamed("bf16", decode, False, ARCH).launch((2, 3), weight, x, expected, 33, 40, 512)
    assert_equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_any_size(kind):
    # Tokens are multiples of the first weight row: gates of 0, far below and above 60, infinite and NaN.
    weight = randn(32, 64, dtype=BF16, scale=0.1)
    sizes = [0.0, 1.0, -1.0, 1e-19, -1e-30, 300.0, -300.0, -3e3, 3e4, 1e38, -1e38, float("inf"), float("nan")]
    x = weight[:1] * torch.tensor(sizes, device=DEVICE)[:, None].to(BF16)
    out = run(replace(TILINGS[kind], rows=32 if kind != "warps" else 64), x, weight, True)
    expected = streamed.linear_swiglu(x, weight, torch.empty_like(out))
    assert_equal(out.view(torch.int16), expected.view(torch.int16))


@kernel_factory
def silus():
    """bits i32[n] of gates -> silu and common_silu f32[n], where the gate is common; n; grid (n / 256,)."""

    def kernel(bits, exact, branchless, count):
        i = cuda.blockIdx.x * 256 + cuda.threadIdx.x
        if i < count:
            gate = ptx.f32_from_bits(uint32(bits[i]))
            if device.is_common(gate):
                exact[i], branchless[i] = device.silu(gate), device.common_silu(gate)

    return Kernel("test_silus", kernel, ("i32*", "f32*", "f32*", "i32"), 256)


def test_silu_without_branches_has_the_same_bits():
    count = 2048 if SIMULATED else 1 << 26
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=DEVICE)
    exact, branchless = torch.zeros(count, device=DEVICE), torch.zeros(count, device=DEVICE)
    silus().launch((count // 256,), bits, exact, branchless, count)
    assert exact.count_nonzero() > count // 5 and torch.equal(exact, branchless)


@pytest.mark.parametrize("multiprocessors", [pytest.param(1, marks=pytest.mark.gpu), 3])
@HOPPER
def test_blocks_that_take_several_tiles(multiprocessors):
    x, weight = randn(150, 192, dtype=BF16), randn(104, 192, dtype=BF16)
    expected = run(TILINGS["warps"], x, weight)
    for tiling in (replace(TILINGS["whole"], rows=32, columns=64), TILINGS["turns"], TILINGS["turns 128"]):
        assert_equal(run(tiling, x, weight, False, multiprocessors), expected)


@pytest.mark.parametrize("count", [1, 17])
def test_launchers(half, count):
    x, weight = randn(count, 128, dtype=half), randn(48, 128, dtype=half, scale=0.1)
    out = tiled.linear(x, weight, poisoned(count, 48, dtype=half))
    assert_equal(out, streamed.linear(x, weight, torch.empty_like(out)))
    out = tiled.linear_swiglu(x, weight, poisoned(count, 24, dtype=half))
    assert_equal(out, streamed.linear_swiglu(x, weight, torch.empty_like(out)))
    assert tiled.linear(x[:0], weight, poisoned(0, 48, dtype=half)).shape == (0, 48)


# (rows, depth) of OLMo-2 1B, 7B, 13B and 32B; of Llama 3 8B and Mistral 7B; of the bundled model and of none.
SHAPES = [
    *[(6144, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    *[(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    *[(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    *[(7168, 5120), (55296, 5120), (5120, 27648)],
    *[(6144, 4096), (28672, 4096), (4096, 14336)],
    *[(768, 256), (1536, 256), (16, 64)],
]


def test_what_was_measured_is_chosen_for_as_many_tiles():
    lines = tiled.measured()
    assert lines, "an empty file would leave every choice to the model"
    for (arch, multiprocessors, rows, depth, gated, tokens), tiling in lines.items():
        assert tokens % tiled.TOKENS == 0 and tiling.fits(gated, depth) and tiling.stages >= 2
        for count in (tokens, tokens - 127):
            chosen = Tiling.choose(count, rows, depth, gated, arch, multiprocessors)
            assert replace(chosen, segments=1) == tiling
    key = ("sm_90a", 132, 4096, 4096, False)
    assert (*key, 2048) in lines and (*key, 2176) not in lines
    assert Tiling.choose(2049, 4096, 4096, False, "sm_90a", 132) in tiled.tilings("sm_90a", False)
    for count, shape, faster in (
        (129, (48, 64, False), True),
        (128, (22016, 4096, True), True),
        (65, (12288, 4096, False), True),
        (64, (22016, 4096, True), False),
        (128, (4096, 11008, False), False),
    ):
        assert tiled.is_faster(count, *shape, ("sm_90a", 132)) == faster
    assert not tiled.is_faster(128, 22016, 4096, True, ("sm_90a", 58))
    assert Tiling.choose(2048, 4096, 4096, False, "sm_90a", 58) in tiled.tilings("sm_90a", False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_choices_fit(arch):
    for rows, depth in SHAPES:
        for count in (1, 17, 64, 128, 129, 512, 1000, 2048, 8192, 100_000):
            for multiprocessors in (58, 108, 132, 170):
                for gated in (False, True):
                    tiling = Tiling.choose(count, rows, depth, gated, arch, multiprocessors)
                    assert tiling.fits(gated, depth)
                    assert tiling.threads <= 1024 and tiling.shared <= LIMITS[arch].shared_block and tiling.stages >= 2
                    assert tiling.multiply == ("wgmma" if arch == "sm_90a" else "mma")
                    down, wide = tiling.tiles(count, rows)
                    assert down * tiling.tokens >= count and wide * tiling.rows >= rows
                    assert 1 <= tiling.group(count, rows, multiprocessors) <= down


def test_registers_hold_the_sums_of_two_segments():
    """With 160 rows a thread would have 160 sums, which the assembler spills."""
    wide, fitting = (replace(Tiling.of_warpgroups(rows), segments=2) for rows in (160, 128))
    assert fitting.fits(False, 8192) and not wide.fits(False, 8192)
    assert replace(wide, segments=1).fits(False, 8192)


def test_catalogue_holds_what_is_chosen():
    names = {kernel.name for kernel in tiled.catalogue("bf16", 4096, 4096, False)}
    for count in range(1, 9000, 61):
        tiling = Tiling.choose(count, 4096, 4096, False, "sm_90a", 132)
        assert tiled.warpgroups("bf16", tiling, False, "sm_90a").name in names


def test_refusals():
    x = randn(2, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"linear: weight is \(12, 64\): rows of 8 and columns of 64 needed"):
        tiled.linear(x, randn(12, 64, dtype=BF16), randn(2, 12, dtype=BF16))
    with pytest.raises(ValueError, match=r"linear_swiglu: weight is \(8, 64\): rows of 16 and columns of 64 needed"):
        tiled.linear_swiglu(x, randn(8, 64, dtype=BF16), randn(2, 4, dtype=BF16))
    with pytest.raises(ValueError, match=r"linear: out has shape \(2, 8\): \(2, 16\) needed"):
        tiled.linear(x, randn(16, 64, dtype=BF16), randn(2, 8, dtype=BF16))
    with pytest.raises(TypeError, match=r"linear: x is torch.float32: torch.bfloat16 or torch.float16 needed"):
        tiled.linear(x.float(), randn(16, 64, dtype=BF16), randn(2, 16, dtype=BF16))


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED, reason="too much for the simulator")
@pytest.mark.parametrize(
    ("rows", "depth", "gated"), [(4096, 11008, False), (22016, 4096, True), (2064, 1088, False), (2048, 8192, False)]
)
def test_real_shapes(half, rows, depth, gated):
    x, weight = randn(700, depth, dtype=half), randn(rows, depth, dtype=half, scale=0.02)
    launch, decode = (getattr(m, "linear_swiglu" if gated else "linear") for m in (tiled, streamed))
    columns = rows // 2 if gated else rows
    whole = launch(x, weight, poisoned(700, columns, dtype=half))
    ours, exact = reference(x, weight), reference(x.double(), weight.double())
    assert_as_good_as_torch(whole, swiglu(ours) if gated else ours, swiglu(exact) if gated else exact)
    assert_equal(whole, decode(x, weight, poisoned(700, columns, dtype=half)))
    for count in (1, 17, 127, 128, 129, 300):
        for begin in (0, 700 - count):
            part = x[begin : begin + count].contiguous()
            out = launch(part, weight, poisoned(count, columns, dtype=half))
            assert torch.equal(out, whole[begin : begin + count]), (count, begin)
    for _ in range(20):
        assert_equal(launch(x, weight, poisoned(700, columns, dtype=half)), whole)


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED, reason="too much for the simulator")
@pytest.mark.parametrize(("gated", "segments"), [(False, 1), (True, 1), (False, 2)])
def test_every_tiling_has_the_same_bits(half, gated, segments):
    x, weight = randn(300, 1280, dtype=half), randn(2096, 1280, dtype=half, scale=0.05)
    every = [*tiled.tilings(ARCH, gated), *(tiled.tilings("sm_80", gated) if ARCH == "sm_90a" else ())]
    every = [replace(tiling, segments=segments) for tiling in every]
    tilings = [tiling for tiling in every if tiling.fits(gated, 1280)]
    first = run(tilings[0], x, weight, gated, 132)
    for tiling in tilings[1:]:
        assert torch.equal(run(tiling, x, weight, gated, 132), first), tiling
