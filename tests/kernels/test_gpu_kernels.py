"""On a GPU: OLMo-2's shapes, bits that repeat, addresses beyond 2**31, streams, graphs and what a launch costs."""

import threading
import time

import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, ints, poisoned, randn

from kernels import catalogue, embedding, kv_write, residual, rms_norm, rope, sampling, swiglu, tensor_maps
from kernels.attention import naive as attention
from kernels.attention import reference as attention_reference
from kernels.cuda import cuda, uint8
from kernels.launch import Kernel, LaunchOptions
from kernels.linear import naive as linear
from kernels.linear import reference as linear_reference

pytestmark = pytest.mark.gpu

VOCABULARY = 100352
# Hidden width, heads, intermediate width.
MODELS = {"1B": (2048, 16, 8192), "7B": (4096, 32, 11008)}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.mark.parametrize("count", [1, 2, 33, 256])
def test_elementwise_operations(dtype, model, count):
    width, heads, intermediate = model
    x, y, weight = randn(count, width, dtype=dtype), randn(count, width, dtype=dtype), randn(width, dtype=dtype)
    assert_equal(residual.add(x, y, poisoned(count, width, dtype=dtype)), x + y)
    out = rms_norm.rms_norm(x, weight, 1e-6, "once", poisoned(count, width, dtype=dtype))
    exact = rms_norm.reference(x.double(), weight.double(), 1e-6)
    assert_as_good_as_torch(out, rms_norm.reference(x, weight, 1e-6), exact)
    gate_up = randn(count, 2 * intermediate, dtype=dtype)
    out = swiglu.swiglu(gate_up, poisoned(count, intermediate, dtype=dtype))
    assert_as_good_as_torch(out, swiglu.reference(gate_up), swiglu.reference(gate_up.double()))
    table = randn(1000, width, dtype=dtype)
    tokens = torch.randint(0, 1000, (count,), dtype=torch.int32, device="cuda")
    out = embedding.embedding(tokens, table, poisoned(count, width, dtype=dtype))
    assert_equal(out, table[tokens.long()])
    turns = torch.rand(4096, 64, device="cuda") * 6.3
    positions = torch.randint(0, 4096, (count,), dtype=torch.int32, device="cuda")
    qkv = randn(count, 3 * width, dtype=dtype)
    q, k, _ = (part.unflatten(1, (heads, 128)) for part in qkv.split(width, dim=1))
    expected = [rope.reference(part, turns.cos(), turns.sin(), positions) for part in (q, k)]
    rope.rope(q, k, turns.cos(), turns.sin(), positions)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@pytest.mark.parametrize("count", [1, 17])
def test_linear(dtype, model, count):
    width, _, intermediate = model
    for columns, depth in ((3 * width, width), (width, intermediate), (VOCABULARY, width)):
        x, weight = randn(count, depth, dtype=dtype), randn(columns, depth, dtype=dtype, scale=0.02)
        out = linear.linear(x, weight, poisoned(count, columns, dtype=dtype))
        exact = linear_reference(x.double(), weight.double())
        assert_as_good_as_torch(out, linear_reference(x, weight), exact)
        assert_equal(linear.linear(x[:1], weight, poisoned(1, columns, dtype=dtype)), out[:1])


@pytest.mark.parametrize("window", [0, 1000])
@pytest.mark.parametrize("kv_heads", [4, 16])
def test_attention(dtype, kv_heads, window):
    length = 4096
    k_cache, v_cache = (randn(3, length, kv_heads, 128, dtype=dtype) for _ in range(2))
    slots, positions = ints(0, 1, 2, 2, 0), ints(0, 63, 64, 1023, 4095)
    q = randn(5, 16, 128, dtype=dtype)
    arguments = (k_cache, v_cache, slots, positions, 128**-0.5, window)
    out = attention.attention(q, *arguments, poisoned(*q.shape, dtype=dtype))
    exact = attention_reference(q.double(), k_cache.double(), v_cache.double(), *arguments[2:])
    assert_as_good_as_torch(out, attention_reference(q, *arguments), exact)


def test_prefill_and_decode_have_the_same_bits(dtype):
    count = 300
    q = randn(count, 16, 128, dtype=dtype)
    k_cache, v_cache = (randn(2, 512, 16, 128, dtype=dtype) for _ in range(2))
    positions = torch.arange(count, dtype=torch.int32, device="cuda")
    slots = torch.ones_like(positions)

    def run(begin, end):
        part = slice(begin, end)
        out = poisoned(end - begin, 16, 128, dtype=dtype)
        return attention.attention(q[part], k_cache, v_cache, slots[part], positions[part], 0.1, 0, out)

    whole = run(0, count)
    for size in (1, 7, 64, 100):
        assert_equal(torch.cat([run(i, min(i + size, count)) for i in range(0, count, size)]), whole)


def test_250_repeats_have_the_same_bits(dtype):
    width, heads, intermediate = MODELS["1B"]
    x, weight = randn(33, width, dtype=dtype), randn(width, dtype=dtype)
    projection = randn(3 * width, width, dtype=dtype, scale=0.02)
    gate_up = randn(33, 2 * intermediate, dtype=dtype)
    k_cache, v_cache = (randn(1, 300, heads, 128, dtype=dtype) for _ in range(2))
    positions = torch.arange(200, 233, dtype=torch.int32, device="cuda")
    slots = torch.zeros_like(positions)
    q = randn(33, heads, 128, dtype=dtype)
    logits = randn(8, VOCABULARY, dtype=dtype)
    rows = [torch.full((8,), value, device="cuda") for value in (0.8, 0.95, 0.01)]
    top_k = torch.full((8,), 50, dtype=torch.int32, device="cuda")
    seeds = torch.arange(8, device="cuda")

    def run():
        return [
            rms_norm.rms_norm(x, weight, 1e-6, "twice", poisoned(33, width, dtype=dtype)),
            linear.linear(x[:4], projection, poisoned(4, 3 * width, dtype=dtype)),
            swiglu.swiglu(gate_up, poisoned(33, intermediate, dtype=dtype)),
            attention.attention(q, k_cache, v_cache, slots, positions, 0.1, 0, poisoned(33, heads, 128, dtype=dtype)),
            sampling.argmax(logits, ints(*[-7] * 8)),
            sampling.sample(logits, rows[0], top_k, rows[1], rows[2], seeds, slots[:8], ints(*[-7] * 8)),
        ]

    first = run()
    for _ in range(249):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_sampling_over_the_vocabulary(dtype):
    logits = randn(4, VOCABULARY, dtype=dtype) * 3
    assert sampling.argmax(logits, ints(*[-7] * 4)).tolist() == logits.float().argmax(-1).tolist()
    count = 512
    row = logits[:1].expand(count, VOCABULARY).contiguous()
    same = lambda value: torch.full((count,), value, device="cuda")  # noqa: E731
    drawn = sampling.sample(
        row,
        same(0.9),
        torch.full((count,), 40, dtype=torch.int32, device="cuda"),
        same(0.9),
        same(0.001),
        torch.arange(count, device="cuda"),
        torch.zeros(count, dtype=torch.int32, device="cuda"),
        torch.full((count,), -7, dtype=torch.int32, device="cuda"),
    )
    kept = sampling.reference_filter(row[0], 0.9, 40, 0.9, 0.001)
    assert kept.isfinite()[drawn.long()].all()
    expected = kept.softmax(-1) * count
    common = expected > 5
    found = torch.bincount(drawn.long(), minlength=VOCABULARY)
    chi_square = ((found - expected)[common].square() / expected[common]).sum().item()
    assert chi_square < 3 * common.sum().item() + 10


@pytest.mark.slow
def test_addresses_beyond_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    kind = torch.bfloat16
    slots, capacity, heads = 140, 4096, 32
    k_cache, v_cache = (torch.zeros(slots, capacity, heads, 128, dtype=kind, device="cuda") for _ in range(2))
    k, v, q = (randn(3, heads, 128, dtype=kind) for _ in range(3))
    at_slots, positions = ints(139, 0, 131), ints(4095, 0, 17)
    kv_write.kv_write(k, v, k_cache, v_cache, at_slots, positions)
    assert_equal(k_cache[at_slots.long(), positions.long()], k)
    assert_equal(v_cache[at_slots.long(), positions.long()], v)
    out = attention.attention(q, k_cache, v_cache, at_slots, positions, 0.1, 0, poisoned(3, heads, 128, dtype=kind))
    alone = attention.attention(
        q[:1], k_cache[139:], v_cache[139:], ints(0), positions[:1], 0.1, 0, poisoned(1, heads, 128, dtype=kind)
    )
    assert_equal(out[:1], alone)
    del k_cache, v_cache
    logits = torch.zeros(22000, VOCABULARY, dtype=kind, device="cuda")
    logits[21999, 77] = 1
    assert sampling.argmax(logits, torch.full((22000,), -7, dtype=torch.int32, device="cuda"))[21999] == 77
    width = 1 << 20
    x = torch.ones(2049, width, dtype=kind, device="cuda")
    assert (residual.add(x, x, x)[2048] == 2).all()


def test_launches_follow_torchs_current_stream():
    x, out = randn(64, 4096), torch.zeros(64, 4096, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        residual.add(x, x, out)
    assert (out == 0).all() or stream.query()
    stream.synchronize()
    assert_equal(out, x + x)


def test_a_graph_captures_and_replays():
    for kernel in catalogue(("f32",)):
        kernel.prepare()
    x, out = randn(8, 512), torch.zeros(8, 512, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        residual.add(x, x, out)
        residual.add(out, x, out)
    out.zero_()
    graph.replay()
    assert_equal(out, (x + x) + x)


def test_another_thread_launches():
    x, out = randn(8, 512), torch.zeros(8, 512, device="cuda")
    failures = []

    def work():
        try:
            residual.add(x, x, out)
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and torch.equal(out, x + x)


def test_large_shared_memory_and_options():
    size = 64 << 10

    def kernel(out):
        shared = cuda.shared.array(0, uint8)
        i = cuda.threadIdx.x
        shared[size - 1 - i] = uint8(i)
        cuda.syncthreads()
        out[cuda.blockIdx.x * 64 + i] = shared[size - 64 + i]

    big = Kernel("test_large_shared", kernel, ("u8*",), 64, dynamic_shared=size)
    expected = torch.arange(63, -1, -1, dtype=torch.uint8, device="cuda").repeat(4)
    options = [LaunchOptions(), LaunchOptions(cooperative=True)]
    if torch.cuda.get_device_capability() >= (9, 0):
        options += [LaunchOptions(programmatic=True), LaunchOptions(cluster=(2, 1, 1))]
    for option in options:
        out = torch.zeros(256, dtype=torch.uint8, device="cuda")
        big.launch((4,), out, options=option)
        assert torch.equal(out, expected), option
    if torch.cuda.get_device_capability() >= (9, 0):
        with pytest.raises(ValueError, match=r"grid \(3, 1, 1\) is not a multiple of the cluster \(2, 1, 1\)"):
            big.launch((3,), out, options=LaunchOptions(cluster=(2, 1, 1)))


def test_a_tensor_on_the_cpu_is_refused():
    x = randn(2, 8)
    with pytest.raises(ValueError, match="argument 1 is on cpu: one GPU for all"):
        residual.naive("f32").launch((1,), x, x.cpu(), x, 16)


def test_a_launch_costs_the_host_little():
    x = randn(1, 256)
    kernel = residual.naive("f32")
    kernel.prepare()
    best = min(_microseconds(lambda: kernel.launch((2,), x, x, x, 256)) for _ in range(5))
    assert best < 20, f"{best:.1f} us a launch"


def _microseconds(call, repeats=500):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / repeats * 1e6


def test_tensor_maps_of_both_modes():
    """The room for maps that inference mode makes is filled outside of it too."""
    tensor_maps._map_rooms.clear()
    weights = [torch.zeros(64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    with torch.inference_mode():
        first = tensor_maps.tensor_map(weights[0], (8,))
    assert not torch.equal(tensor_maps.tensor_map(weights[1], (8,)).cpu(), first.cpu())
