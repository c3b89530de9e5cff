"""Each PTX instruction against a NumPy model of the PTX manual: its twin under the simulator, itself on a GPU."""

import numpy as np
import ptx_kernels
import pytest
import torch
from kernel_numerics import DEVICE, assert_equal

from kernels.cuda import SIMULATED
from kernels.simulator import SimulationError
from kernels.tensor_maps import tensor_map

EDGES = [0.0, -0.0, 1.0, -1.5, 3.0e38, 1e-38, 1e-45, np.inf, -np.inf, 1.00390625, 1.01171875, 1.0078125, 3.3895314e38]


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def numbers(count, seed=0):
    """Floats over the whole range of exponents, after the edge cases."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal(count) * 2.0 ** rng.integers(-40, 40, count)
    return np.concatenate([EDGES, wide])[:count].astype(np.float32)


def bf16_bits(values):
    """Round to nearest even by the definition: of the two neighbours the nearer, the even one of two equally near."""
    low = (values.view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    exact = values.astype(np.float64)
    below = low.view(np.float32).astype(np.float64)
    # The neighbour above the greatest bf16 is 2**128 for this purpose, which is infinity when chosen.
    above_bits = (low.astype(np.uint64) + 0x10000).astype(np.uint32)
    above = np.where(
        np.isinf(above_bits.view(np.float32)), np.copysign(2.0**128, exact), above_bits.view(np.float32)
    ).astype(np.float64)
    with np.errstate(invalid="ignore"):
        up = np.abs(above - exact) < np.abs(exact - below)
        tie = np.abs(above - exact) == np.abs(exact - below)
    odd = (low >> 16 & 1).astype(bool)
    take = (up | (tie & odd)) & np.isfinite(values)
    return (np.where(take, above_bits, low) >> 16).astype(np.uint16)


def f16_bits(values):
    """Round to nearest even by the definition, among all f16; 65536 is the neighbour above the greatest one."""
    bits = np.arange(0x7C01, dtype=np.uint16)
    known = bits.view(np.float16).astype(np.float64)
    known[-1] = 65536.0
    exact = np.abs(values.astype(np.float64))
    above = np.minimum(np.searchsorted(known, exact), len(known) - 1)
    below = np.maximum(above - 1, 0)
    up, down = known[above] - exact, exact - known[below]
    take = (up < down) | ((up == down) & (bits[above] % 2 == 0)) | (exact >= known[-1])
    return np.where(take, bits[above], bits[below]) | (np.signbit(values).astype(np.uint16) << 15).astype(np.uint16)


HALVES = {"bf16": (torch.bfloat16, bf16_bits), "f16": (torch.float16, f16_bits)}


@pytest.mark.parametrize("dtype", HALVES)
def test_conversions(dtype):
    # For f16: ties of subnormals and normals, the limit of what is finite, and numbers of its range.
    ties = [2.0**-25, 3 * 2.0**-25, 2.0**-26, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.99, 65520.0, 65504.0, -65520.0]
    small = np.random.default_rng(1).standard_normal(30) * 2.0 ** np.arange(-26, 4)
    x = np.concatenate([numbers(90), ties, small]).astype(np.float32)
    kind, bits_of = HALVES[dtype]
    n = len(x)
    rounded = torch.zeros(n, dtype=kind, device=DEVICE)
    widened = torch.zeros(n, device=DEVICE)
    pairs, bits = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for _ in range(2))
    ptx_kernels.convert(dtype).launch((-(-n // 32),), tensor(x), rounded, widened, pairs, bits, n)
    expected = bits_of(x)
    assert (rounded.view(torch.int16).cpu().numpy().view(np.uint16) == expected).all()
    assert_equal(rounded.cpu(), torch.from_numpy(x).to(kind))
    assert_equal(widened.cpu(), torch.from_numpy(expected.view(np.int16)).view(kind).float())
    packed = pairs.cpu().numpy().view(np.uint32)
    assert (packed & 0xFFFF == expected).all() and (packed >> 16 == bits_of(-x)).all()
    assert (bits.cpu().numpy() == x.view(np.int32)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_stays_nan(dtype):
    x = np.array([np.nan, -np.nan] * 16, np.float32)
    rounded = torch.zeros(32, dtype=HALVES[dtype][0], device=DEVICE)
    rest = [torch.zeros(32, device=DEVICE), *(torch.zeros(32, dtype=torch.int32, device=DEVICE) for _ in range(2))]
    ptx_kernels.convert(dtype).launch((1,), tensor(x), rounded, *rest, 32)
    assert rounded.isnan().all() and rest[0].isnan().all()


def test_bits_to_float():
    x = numbers(40)
    out = torch.zeros(40, device=DEVICE)
    ptx_kernels.unary("f32_from_bits").launch((2,), tensor(x.view(np.int32)), out, 40)
    assert (out.cpu().numpy().view(np.uint32) == x.view(np.uint32)).all()


def test_square_root_and_exp2():
    x = np.abs(numbers(64))
    out = torch.zeros(64, device=DEVICE)
    ptx_kernels.unary("sqrt_rn_f32").launch((2,), tensor(x), out, 64)
    assert (out.cpu().numpy() == np.sqrt(x.astype(np.float64)).astype(np.float32)).all()
    x = np.linspace(-140, 127, 64).astype(np.float32)
    x[:2] = -np.inf, 0.0
    ptx_kernels.unary("ex2_approx_f32").launch((2,), tensor(x), out, 64)
    exact = np.exp2(x.astype(np.float64))
    exact[exact < 2.0**-126] = 0
    assert np.allclose(out.cpu().numpy(), exact, rtol=2.0**-21, atol=0)
    assert out[0] == 0 and out[1] == 1


def test_reciprocal():
    x = np.linspace(-2, 2, 64).astype(np.float32) * np.float32(2.0) ** np.arange(-60, 68, 2, dtype=np.float32)
    out = torch.zeros(64, device=DEVICE)
    ptx_kernels.unary("rcp_approx_f32").launch((2,), tensor(x), out, 64)
    assert np.allclose(out.cpu().numpy(), 1 / x.astype(np.float64), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("name", ptx_kernels.BINARY)
def test_rounded_arithmetic(name):
    x, y = numbers(64, 1), numbers(64, 2)[::-1].copy()
    out = torch.zeros(64, device=DEVICE)
    ptx_kernels.binary(name).launch((2,), tensor(x), tensor(y), out, 64)
    operation = {"add_rn_f32": np.add, "mul_rn_f32": np.multiply, "div_rn_f32": np.divide}[name]
    with np.errstate(all="ignore"):
        expected = operation(x, y)
    assert np.array_equal(out.cpu().numpy(), expected, equal_nan=True)


def test_fused_multiply_add_rounds_once():
    x = np.array([1 + 2.0**-12] * 32, np.float32)
    z = np.array([-1 - 2.0**-11] * 31 + [1.0], np.float32)
    out = torch.zeros(32, device=DEVICE)
    ptx_kernels.fma().launch((1,), tensor(x), tensor(x), tensor(z), out, 32)
    exact = x.astype(np.float64) * x + z
    assert (out.cpu().numpy() == exact.astype(np.float32)).all() and out[0] == 2.0**-24


@pytest.mark.parametrize(("mode", "kind", "by"), ptx_kernels.SHUFFLES)
def test_shuffles(mode, kind, by):
    x = np.arange(64, dtype=np.float32 if kind == "f32" else np.int32) + 5
    out = torch.zeros_like(tensor(x))
    ptx_kernels.shuffle(mode, kind, by).launch((1,), tensor(x), out)
    lane = np.arange(32)
    source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": np.full(32, by)}[mode]
    source = np.where((source < 0) | (source > 31), lane, source)
    expected = np.concatenate([x[source], x[32 + source]])
    assert (out.cpu().numpy() == expected).all()


def test_shuffle_in_half_a_warp():
    x = np.arange(32, dtype=np.float32)
    out = torch.zeros(32, device=DEVICE)
    ptx_kernels.half_warp_sum().launch((1,), tensor(x), out)
    assert (out.cpu().numpy() == np.where(x < 16, x[:16].sum(), x)).all()


def test_wide_load():
    x = np.random.default_rng(0).integers(-(2**31), 2**31, 64).astype(np.int32)
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    ptx_kernels.wide_load().launch((1,), tensor(x), out, 64)
    assert (out.cpu().numpy() == x).all()


@pytest.mark.skipif(not SIMULATED, reason="a GPU traps instead")
def test_wide_load_must_be_aligned():
    x = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(SimulationError, match="do not begin at a multiple of 16"):
        ptx_kernels.wide_load().launch((1,), x[1:], torch.zeros(64, dtype=torch.int32), 60)


@pytest.mark.parametrize(("name", "size"), ptx_kernels.COPIES)
def test_asynchronous_copies(name, size):
    x = np.random.default_rng(0).integers(0, 256, 64 * size).astype(np.uint8)
    early, out = (torch.zeros(64 * size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    ptx_kernels.asynchronous_copy(name, size, True).launch((1,), tensor(x), early, out)
    assert (out.cpu().numpy() == x).all()
    assert (early.cpu().numpy()[: 32 * size] == x[: 32 * size]).all()


@pytest.mark.skipif(not SIMULATED, reason="on a GPU what was not waited for may have come all the same")
def test_a_copy_not_waited_for_has_not_arrived():
    kernel = ptx_kernels.asynchronous_copy("cp_async_cg_16", 16, False)
    x = np.arange(1024, dtype=np.uint16).astype(np.uint8)
    early, out = (torch.zeros(1024, dtype=torch.uint8) for _ in range(2))
    kernel.launch((1,), tensor(x), early, out)
    assert (early.numpy()[:512] == 0xFF).all() and (out.numpy() == x).all()


@pytest.mark.parametrize(("count", "transposed"), ptx_kernels.MATRICES)
def test_load_matrices(count, transposed):
    elements = np.arange(64 * count, dtype=np.uint16)
    out = torch.zeros(count, 32, dtype=torch.int32, device=DEVICE)
    ptx_kernels.load_matrices(count, transposed).launch((1,), tensor(elements.view(np.int32)), out)
    got = out.cpu().numpy().view(np.uint16).reshape(count, 32, 2)
    matrices = elements.reshape(count, 8, 8)
    for i in range(count):
        for lane in range(32):
            for j in range(2):
                row, column = lane // 4, 2 * (lane % 4) + j
                expected = matrices[i, column, row] if transposed else matrices[i, row, column]
                assert got[i, lane, j] == expected


@pytest.mark.parametrize("dtype", HALVES)
def test_multiply(dtype):
    rng = np.random.default_rng(0)
    kind = HALVES[dtype][0]
    # Small integers: every product and sum is exact in any order.
    a, b, c = (rng.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    ta, tb = (torch.from_numpy(m).to(kind).view(torch.int16).numpy().view(np.uint16) for m in (a, b))
    ra, rb = np.zeros((4, 32, 2), np.uint16), np.zeros((2, 32, 2), np.uint16)
    rc = np.zeros((4, 32), np.float32)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(4):
            for j in range(2):
                # PTX ISA, "Matrix Fragments for mma.m16n8k16": row of a_i, column of a_i.
                row = group if i in (0, 2) else group + 8
                column = 2 * member + j + (8 if i >= 2 else 0)
                ra[i, lane, j] = ta[row, column]
        for i in range(2):
            for j in range(2):
                rb[i, lane, j] = tb[2 * member + j + 8 * i, group]
        for i in range(4):
            rc[i, lane] = c[group + 8 * (i >= 2), 2 * member + i % 2]
    out = torch.zeros(4, 32, device=DEVICE)
    kernel = ptx_kernels.multiply(dtype)
    kernel.launch((1,), tensor(ra.view(np.int32)), tensor(rb.view(np.int32)), tensor(rc), out)
    got = out.cpu().numpy()
    expected = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert got[i, lane] == expected[lane // 4 + 8 * (i >= 2), 2 * (lane % 4) + i % 2]


HAS_BULK = SIMULATED or torch.cuda.get_device_capability()[0] >= 9


@pytest.mark.skipif(not HAS_BULK, reason="the bulk tensor copy needs sm_90")
@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 64), (16, 32), (-2, -8)])
def test_boxes_of_a_tensor_map(row, column):
    matrix = torch.arange(20 * 96, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(20, 96).to(DEVICE)
    out = torch.full((8, 32), -1, dtype=torch.int32, device=DEVICE)
    ptx_kernels.box(8).launch((1,), tensor_map(matrix, (8,)), out, row, column)
    framed = torch.zeros(20 + 32, 96 + 128, dtype=torch.int16)
    framed[16:36, 64:160] = matrix.cpu().view(torch.int16)
    expected = framed[16 + row : 24 + row, 64 + column : 128 + column]
    assert_equal(out.cpu().view(torch.int16), expected)


def test_tensor_maps_refuse_what_cannot_be_copied():
    matrix = torch.zeros(16, 64, dtype=torch.bfloat16, device=DEVICE)
    assert tensor_map(matrix.half(), (8,)).shape == (128,)
    for given, box, message in (
        (matrix.float(), (8,), "a torch.float32 tensor"),
        (matrix.t(), (8,), "bf16 or fp16 \\[R, C\\] needed"),
        (matrix[:, 1:], (8,), "multiples of 16 bytes needed"),
        (matrix, (257,), "boxes of \\(257,\\) rows: 1 to 256 in up to 1 dimensions needed"),
        (matrix, (1, 8), "boxes of \\(1, 8\\) rows: 1 to 256 in up to 1 dimensions needed"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_map(given, box)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_memory_barriers_hand_over(rounds):
    x = torch.arange(32 * rounds, dtype=torch.int32, device=DEVICE)
    out = torch.zeros_like(x)
    ptx_kernels.handover(rounds).launch((1,), x, out)
    assert_equal(out, x + 1)


def test_phases_of_a_memory_barrier():
    out = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    ptx_kernels.phases().launch((1,), out)
    assert out.tolist() == [0, 1, 1, 0]


def test_wide_stores_and_atomics():
    x = torch.arange(128, dtype=torch.int32, device=DEVICE)
    out, counter = torch.zeros_like(x), torch.ones(1, dtype=torch.int32, device=DEVICE)
    ptx_kernels.wide_stores().launch((1,), x, out, counter)
    expected = x.view(32, 4).flip(0).contiguous()
    expected[:, 0] += 1
    assert torch.equal(out.view(32, 4), expected) and counter.item() == 1 + sum(range(32))


@pytest.mark.skipif(not (SIMULATED or torch.cuda.get_device_capability()[0] == 9), reason="wgmma is sm_90a's")
@pytest.mark.parametrize(("n", "source", "b_major", "dtype"), ptx_kernels.WARPGROUPS)
def test_warpgroups_multiply(n, source, b_major, dtype):
    generator = torch.Generator().manual_seed(n)
    kind = HALVES[dtype][0]
    left, right = (torch.randint(-9, 10, shape, generator=generator).to(kind) for shape in ((64, 64), (n, 64)))
    # A map holds no reference: the matrices must live until the kernel has run.
    a, b = left.to(DEVICE), (right if b_major == "k" else right.t().contiguous()).to(DEVICE)
    a_map, b_map = tensor_map(a, (64,)), tensor_map(b, (len(b),))
    out = torch.full((64, n), torch.nan, device=DEVICE)
    ptx_kernels.warpgroup_multiply(n, source, b_major, dtype).launch((1,), a_map, b_map, out)
    assert_equal(out.cpu(), 2 * left.float() @ right.float().t())
