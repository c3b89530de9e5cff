import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, ints, poisoned, randn

from kernels.attention import flash, prefill, reference
from kernels.attention.prefill import Tiling
from kernels.cuda import SIMULATED

BF16, F16 = torch.bfloat16, torch.float16
DEVICE = ints(0).device
HAS_WGMMA = SIMULATED or torch.cuda.get_device_capability()[0] == 9
WGMMA = pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is sm_90a's")
# Few warps, for the simulator's sake.
TILINGS = {
    "mma": Tiling("mma", 32, 2),
    "mma, a small ring": Tiling("mma", 16, 2, 64),
    "mma, a large ring": Tiling("mma", 16, 4),
    "wgmma": Tiling("wgmma", 128, 2),
}


def each(*names):
    """Parametrize with these of TILINGS."""
    marks = {name: (WGMMA,) if TILINGS[name].multiply == "wgmma" else () for name in names}
    return pytest.mark.parametrize(
        "tiling", [pytest.param(TILINGS[name], marks=marks[name], id=name) for name in names]
    )


both = each("mma", "wgmma")


def on_gpu(value):
    """A parameter that the simulator takes too long for."""
    return pytest.param(value, marks=pytest.mark.gpu)


def tokens_of(runs):
    """Slot and position of each token."""
    slots = [slot for count, slot, _ in runs for _ in range(count)]
    positions = [position + i for count, _, position in runs for i in range(count)]
    return ints(*slots), ints(*positions)


def caches(*shape, dtype=BF16):
    """k_cache and v_cache, head-major."""
    slots, capacity, heads, width = shape
    k, v = (randn(slots, heads, capacity, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    return k, v


def run(tiling, runs, q, k_cache, v_cache, scale=0.2, window=0, table=None):
    """With whole tiles and, where `plan` divides them, with their segments on blocks of their own."""
    outs = []
    for heads in (0, q.shape[1]):
        plan = prefill.plan(runs, q.shape[2], DEVICE, tiling, heads=heads)
        if outs and not len(plan.partials):
            break
        plan.partials.fill_(float("nan"))
        outs.append(poisoned(*q.shape, dtype=q.dtype))
        prefill.attention(q, k_cache, v_cache, plan, scale, window, outs[-1], table, tiling)
        assert not plan.work[0, :2].any() and not plan.arrived.any()
    assert all(torch.equal(out, outs[0]) for out in outs)
    return outs[0]


def assert_as_flash(out, runs, q, k_cache, v_cache, scale=0.2, window=0):
    """The bits of tokens taken one by one, as in decoding: of all on a GPU, of a few in the simulator."""
    some = torch.arange(0, len(q), max(1, len(q) // 5) if SIMULATED else 1, device=DEVICE)
    q, (slots, positions) = q[some], (given[some] for given in tokens_of(runs))
    workspace = torch.zeros(flash.workspace_size(len(q), q.shape[1], q.shape[2], k_cache.shape[1]), device=DEVICE)
    expected = poisoned(*q.shape, dtype=q.dtype)
    flash.attention(q, k_cache, v_cache, slots, positions, scale, window, expected, workspace)
    assert_equal(out[some], expected)


def assert_as_good(tiling, runs, q, k_cache, v_cache, scale, window):
    out = run(tiling, runs, q, k_cache, v_cache, scale, window)
    others = (*tokens_of(runs), scale, window)
    exact = reference(q.double(), k_cache.double(), v_cache.double(), *others)
    assert_as_good_as_torch(out, reference(q, k_cache, v_cache, *others), exact)
    return out


@both
@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        *((count, BF16) for count in (1, 17, 65, 129)),
        *(pytest.param(count, BF16, marks=pytest.mark.gpu) for count in (63, 64, 127, 128)),
        (17, F16),
        *(pytest.param(count, F16, marks=pytest.mark.gpu) for count in (65, 129)),
    ],
)
def test_lengths(tiling, count, dtype):
    q, cache, runs = randn(count, 1, 64, dtype=dtype), caches(1, 136, 1, 64, dtype=dtype), [(count, 0, 0)]
    out = assert_as_good(tiling, runs, q, *cache, 0.125, 0)
    assert_as_flash(out, runs, q, *cache, 0.125)


@both
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window", "runs", "dtype"),
    [
        (3, 1, 128, 0, [(2, 1, 130), (3, 0, 0), (1, 2, 15)], BF16),
        pytest.param(2, 2, 64, 0, [(20, 2, 120), (1, 1, 127)], BF16, marks=pytest.mark.gpu),
        (16, 1, 64, 0, [(2, 0, 63)], BF16),
        (2, 1, 128, 20, [(10, 0, 125), (1, 1, 5)], BF16),
        (1, 1, 64, 3, [(5, 2, 126), (7, 1, 0)], BF16),
        pytest.param(2, 1, 128, 20, [(10, 0, 125), (1, 1, 5)], F16, marks=pytest.mark.slow),
        pytest.param(1, 1, 64, 0, [(5, 2, 126), (7, 1, 0)], F16, marks=pytest.mark.slow),
    ],
)
def test_runs_at_any_position(tiling, heads, kv_heads, width, window, runs, dtype):
    q = randn(sum(count for count, _, _ in runs), heads, width, dtype=dtype)
    cache = caches(3, 144, kv_heads, width, dtype=dtype)
    out = assert_as_good(tiling, runs, q, *cache, width**-0.5, window)
    assert_as_flash(out, runs, q, *cache, width**-0.5, window)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiling", "window"),
    [
        (TILINGS["mma"], 0),
        pytest.param(TILINGS["wgmma"], 0, marks=WGMMA),
        (TILINGS["mma, a small ring"], 515),
        (TILINGS["mma, a large ring"], 515),
        pytest.param(TILINGS["wgmma"], 515, marks=[WGMMA, pytest.mark.gpu]),
    ],
)
def test_segments_are_combined_in_order(tiling, window):
    # Queries of one tile of which some see three segments, or begin in another one than the others.
    runs = [(3, 1, 1022), (2, 0, 511)]
    q, cache = randn(5, 1, 64, dtype=BF16), caches(2, 1032, 1, 64)
    out = assert_as_good(tiling, runs, q, *cache, 0.125, window)
    assert_as_flash(out, runs, q, *cache, 0.125, window)


@each("mma", "mma, a large ring", "wgmma")
@pytest.mark.parametrize("window", [0, 100])
def test_what_lies_beyond_is_never_used(tiling, window):
    runs = [(3, 1, 138), (2, 0, 12)]
    q, cache = randn(5, 2, 64, dtype=BF16), caches(2, 256, 1, 64)
    expected = run(tiling, runs, q, *cache, window=window)
    for given in cache:
        given[1, 141:] = given[0, 14:] = float("nan")
        if window:
            given[1, : 138 - window + 1] = float("nan")
    assert_equal(run(tiling, runs, q, *cache, window=window), expected)


@pytest.mark.usefixtures("races")
@each("mma", "mma, a small ring", "wgmma")
def test_a_stage_of_the_ring_is_filled_again_once_it_is_read(tiling):
    # Two segments: their totals are kept where the queries were, and the result is staged there.
    q, cache, runs = randn(1, 1, 64, dtype=BF16), caches(1, 640, 1, 64), [(1, 0, 519)]
    assert_as_flash(run(tiling, runs, q, *cache, window=270), runs, q, *cache, window=270)


@pytest.mark.slow
@both
@pytest.mark.parametrize("page", [8, on_gpu(64), 128])
def test_pages_strides_and_chunks_change_no_bit(tiling, page):
    runs = [(9, 1, 125), (4, 0, 2)]
    q, cache = randn(13, 2, 64, dtype=BF16), caches(2, 256, 2, 64)
    expected = run(tiling, runs, q, *cache, window=50)
    order = torch.randperm(512 // page, device=DEVICE) + 3
    table = order.view(2, -1).int()
    pools = []
    for given in cache:
        pool = poisoned(512 // page + 3, 2, page, 64, dtype=BF16).transpose(1, 2)
        pool[order] = given.reshape(-1, page, 2, 64)
        pools.append(pool)
    # Pages that are not seen may be gone.
    table[1, : (125 - 49) // page] = -1
    table[0, 5 // page + 1 :] = 1 << 20
    assert_equal(run(tiling, runs, q, pools[0], pools[1], window=50, table=table), expected)
    if page == 8:
        wide = randn(13, 4, 64, dtype=BF16)
        wide[:, 1:3] = q
        assert_equal(run(tiling, runs, wide[:, 1:3], *cache, window=50), expected)
        pieces = [(1, 1, 125), (6, 1, 126), (2, 1, 132), (3, 0, 2), (1, 0, 5)]
        assert_equal(run(tiling, pieces, q, *cache, window=50), expected)
        swapped = cache[0].flip(0), cache[1].flip(0)
        assert_equal(run(tiling, [(4, 1, 2)], q[9:], *swapped, window=50), expected[9:])


@both
def test_heads_go_together_as_far_as_l2_reaches(tiling, monkeypatch):
    q, cache, runs = randn(3, 4, 64, dtype=BF16), caches(1, 8, 2, 64), [(3, 0, 1)]
    expected = run(tiling, runs, q, *cache)
    monkeypatch.setattr(prefill, "SHARED_KEYS", 1)
    assert_equal(run(tiling, runs, q, *cache), expected)
    assert prefill._heads_at_once(1 << 20, 32, 4) == 4


def test_a_plan_has_the_longest_tiles_first():
    plan = prefill.plan([(70, 3, 0), (0, 1, 5), (2, 2, 1000)], 64, DEVICE, Tiling("mma", 32, 2))
    head = [0, 0, 4, 0, 0, 0, 0, 0]
    assert plan.work.tolist() == [
        head, [70, 2, 1000, 2, 0, 1002, -1, 0], [64, 6, 64, 3, 0, 70, -1, 1], [32, 32, 32, 3, 0, 64, -1, 2],
        [0, 32, 0, 3, 0, 32, -1, 3],
    ]  # fmt: skip
    assert (plan.tiles, plan.rows, plan.positions, len(plan.partials)) == (4, 32, 1077, 0)
    work = plan.work
    again = prefill.plan([(70, 1, 8), (0, 1, 5), (2, 2, 0)], 64, DEVICE, Tiling("mma", 32, 2), into=plan)
    assert again is plan and plan.work is work
    assert work.tolist() == [
        head, [64, 6, 72, 1, 0, 78, -1, 0], [32, 32, 40, 1, 0, 72, -1, 1], [0, 32, 8, 1, 0, 40, -1, 2],
        [70, 2, 0, 2, 0, 2, -1, 3],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="runs of 3 tiles for a plan of 4"):
        prefill.plan([(70, 1, 8)], 64, DEVICE, Tiling("mma", 32, 2), into=plan)


def test_a_plan_divides_the_tiles_of_few_queries(monkeypatch):
    monkeypatch.setattr(prefill.work_plan, "default_tiling", lambda *_: (Tiling("wgmma", 128, 2), "sm_90a", 132))
    plan = prefill.plan([(40, 5, 1500)], 128, DEVICE, heads=32)
    assert plan.work.tolist() == [
        [0, 0, 4, 0, 0, 0, 0, 0], [0, 40, 1500, 5, 0, 512, 0, 0], [0, 40, 1500, 5, 512, 1024, 0, 0],
        [0, 40, 1500, 5, 1024, 1536, 0, 0], [0, 40, 1500, 5, 1536, 1540, 0, 0],
    ]  # fmt: skip
    assert plan.partials.shape == (4 * 3, 32, 32 * 68) and plan.arrived.shape == (1, 8, 32)
    # Shorter ones take less of its memory, and longer ones, which it has none for, stay whole.
    assert prefill.plan([(40, 5, 600)], 128, DEVICE, into=plan).work[:2].tolist() == [
        [0, 0, 2, 0, 0, 0, 0, 0], [0, 40, 600, 5, 0, 512, 0, 0]
    ]  # fmt: skip
    prefill.plan([(40, 5, 9)], 128, DEVICE, into=plan)
    assert plan.work[:2].tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0, 40, 9, 5, 0, 49, -1, 0]]
    prefill.plan([(40, 5, 2500)], 128, DEVICE, into=plan)
    assert plan.work[:2].tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0, 40, 2500, 5, 0, 2540, -1, 0]]
    # Where there are tiles for half of the multiprocessors, and where the results would take too much, none is divided.
    assert not len(prefill.plan([(300, 5, 1500)], 128, DEVICE, heads=32).partials)
    assert not len(prefill.plan([(128, 5, 40000)], 128, DEVICE, heads=32).partials)


@WGMMA
@pytest.mark.parametrize("window", [0, pytest.param(400, marks=pytest.mark.slow)])
def test_segments_of_a_tile_on_blocks_of_their_own(window, monkeypatch):
    monkeypatch.setattr(prefill.work_plan, "default_tiling", lambda *_: (TILINGS["wgmma"], "sm_90a", 132))
    cache, q, runs = caches(2, 1100, 1, 64), randn(17, 1, 64, dtype=BF16), [(17, 1, 1015)]
    assert len(prefill.plan(runs, 64, DEVICE, heads=1).partials) == 2 * 3
    assert_as_flash(run(None, runs, q, *cache, window=window), runs, q, *cache, window=window)


def test_nothing_to_do():
    q, cache = randn(0, 2, 64, dtype=BF16), caches(1, 8, 1, 64)
    assert run(TILINGS["mma"], [], q, *cache).shape == (0, 2, 64)


def test_refusals():
    q, (k_cache, v_cache) = randn(1, 2, 64, dtype=BF16), caches(1, 8, 1, 64)
    tiling = TILINGS["mma"]
    good = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "plan": prefill.plan([(1, 0, 0)], 64, DEVICE, tiling),
        "scale": 0.1, "window": 0, "out": poisoned(1, 2, 64, dtype=BF16), "tiling": tiling,
    }  # fmt: skip

    def refused(error, match, **changed):
        with pytest.raises(error, match=match):
            prefill.attention(**(good | changed))

    refused(ValueError, "q has head dimension 32: 64 or 128", q=randn(1, 2, 32, dtype=BF16))
    refused(TypeError, "q is torch.float32: torch.bfloat16 or torch.float16 needed", q=randn(1, 2, 64))
    refused(TypeError, "out is torch.bfloat16: torch.float16 needed", q=randn(1, 2, 64, dtype=F16))
    refused(TypeError, "v_cache is torch.float32", v_cache=randn(1, 8, 1, 64))
    turned = {"k_cache": randn(1, 8, 2, 64, dtype=BF16), "v_cache": randn(1, 8, 2, 64, dtype=BF16)}
    refused(ValueError, "k_cache has a stride of 128 elements between a head's positions: 64 needed", **turned)
    refused(ValueError, "k_cache has head dimension 128: 64", k_cache=caches(1, 8, 1, 128)[0])
    many = randn(1, 17, 64, dtype=BF16)
    refused(ValueError, "q has 17 heads and k_cache 1: 1 to 16", q=many, out=many)
    refused(ValueError, "scale is 0", scale=0)
    refused(ValueError, "window is -1", window=-1)
    refused(ValueError, "plan has tiles of 32 queries: 16 needed", tiling=TILINGS["mma, a small ring"])
    refused(ValueError, r"out has shape \(1, 3, 64\)", out=poisoned(1, 3, 64, dtype=BF16))
    refused(ValueError, "table has shape", table=ints(0))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [513, 1000, 4096, 16384])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_long_sequences(half, length, kv_heads):
    cache = caches(2, length, kv_heads, 128, dtype=half)
    q, runs = randn(length, 8, 128, dtype=half), [(length, 1, 0)]
    chosen, arch, _ = prefill.work_plan.default_tiling(128, 0)
    for tiling in (chosen, Tiling.of_warps(128, arch)):
        whole = run(tiling, runs, q, *cache)
        assert_as_flash(whole, runs, q, *cache)
        for size in (1000, 128, 17):
            some = min(length, 40 * size)
            pieces = [(min(size, some - i), 1, i) for i in range(0, some, size)]
            assert_equal(run(tiling, pieces, q[:some], *cache), whole[:some])
        for _ in range(50):
            assert_equal(run(tiling, runs, q, *cache), whole)


@pytest.mark.gpu
def test_a_graph_replays():
    q, cache, runs = randn(700, 8, 128, dtype=BF16), caches(2, 1024, 2, 128), [(300, 1, 77), (400, 0, 0)]
    expected = run(None, runs, q, *cache)
    plan, out = prefill.plan(runs, 128, DEVICE), poisoned(700, 8, 128, dtype=BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            prefill.attention(q, *cache, plan, 0.2, 0, out)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert_equal(out, expected)
