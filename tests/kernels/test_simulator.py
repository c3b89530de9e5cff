"""The simulator: barriers, what it refuses, and that it survives a kernel that fails."""

import pytest
import torch

from kernels import device, ptx
from kernels.cuda import SIMULATED, cuda, float32, float64, int32, uint8, uint32, uint64
from kernels.launch import Kernel, LaunchOptions
from kernels.simulated_memory import SimulationError
from kernels.simulator import detecting_races
from kernels.tensor_maps import tensor_map

pytestmark = pytest.mark.skipif(not SIMULATED, reason="needs the simulator")


def run(function, *args, threads=64, grid=(1,), kinds=("f32*", "f32*")):
    Kernel("test", function, kinds, threads).launch(grid, *args)


def reverse(x, out):
    shared = cuda.shared.array(64, float32)
    i = cuda.threadIdx.x
    shared[i] = x[i]
    cuda.syncthreads()
    out[i] = shared[63 - i]


def test_threads_meet_at_barriers():
    x, out = torch.arange(64.0), torch.zeros(64)
    run(reverse, x, out)
    assert torch.equal(out, x.flip(0))


@pytest.mark.usefixtures("races")
def test_block_sum_and_max():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        i = cuda.threadIdx.x
        total = device.block_sum(shared, i, x[i], 64)
        out[i] = total + device.block_max(shared, i, x[i], 64)

    x, out = torch.arange(64.0), torch.zeros(64)
    run(kernel, x, out)
    assert (out == 2016 + 63).all()


def test_grid_and_votes():
    def kernel(x, out):
        i = (cuda.blockIdx.z * 2 + cuda.blockIdx.y) * 3 + cuda.blockIdx.x
        votes = cuda.syncthreads_count(cuda.threadIdx.x < 5)
        every = cuda.syncthreads_and(cuda.threadIdx.x < 8)
        some = cuda.syncthreads_or(cuda.threadIdx.x == 9)
        if cuda.threadIdx.x == 0:
            out[i] = votes * 100 + every * 10 + some + cuda.gridDim.x * cuda.blockDim.x * 1000

    out = torch.zeros(12)
    run(kernel, out, out, threads=8, grid=(3, 2, 2))
    assert (out == 24510).all()


def test_a_barrier_some_threads_skip_is_fine_once_they_are_gone():
    def kernel(x, out):
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()
            out[cuda.threadIdx.x] = 1

    out = torch.zeros(64)
    run(kernel, out, out)
    assert out.sum() == 32


def test_threads_at_different_instructions_are_an_error():
    def kernel(x, out):
        if cuda.threadIdx.x < 16:
            cuda.syncthreads()
        ptx.shfl_sync_bfly_f32(uint32(0xFFFFFFFF), x[cuda.threadIdx.x], uint32(1))

    with pytest.raises(SimulationError, match=r"16 of 32 running threads wait at cuda.syncthreads\(\); 16 lanes"):
        run(kernel, torch.zeros(64), torch.zeros(64))


def test_lanes_at_different_shuffles_are_an_error():
    def kernel(x, out):
        if cuda.threadIdx.x < 16:
            ptx.shfl_sync_up_f32(uint32(0xFFFFFFFF), x[0], uint32(1))
        else:
            ptx.shfl_sync_down_f32(uint32(0xFFFFFFFF), x[0], uint32(1))

    with pytest.raises(SimulationError, match="meet at different instructions"):
        run(kernel, torch.zeros(32), torch.zeros(32), threads=32)


@pytest.mark.parametrize("index", [-1, 64])
def test_access_outside_a_tensor_names_the_thread(index):
    def kernel(x, out):
        cuda.syncthreads()
        if cuda.threadIdx.x == 7:
            out[index] = x[0]
        cuda.syncthreads()

    with pytest.raises(IndexError) as caught:
        run(kernel, torch.zeros(64), torch.zeros(64))
    assert caught.value.__notes__ == ["in thread (7, 0, 0) of block (0, 0, 0)"]
    x, out = torch.arange(64.0), torch.zeros(64)
    run(reverse, x, out)
    assert torch.equal(out, x.flip(0))


def test_shared_memory_is_poisoned_and_its_own_for_every_block():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        out[cuda.blockIdx.x] = shared[0]
        shared[0] = float32(1.0)

    out = torch.zeros(2)
    run(kernel, out, out, threads=1, grid=(2,))
    assert out.isnan().all()


def test_too_much_shared_memory_is_refused():
    def kernel(x, out):
        cuda.shared.array(20000, float32)

    with pytest.raises(SimulationError, match="80000 bytes of shared arrays: 48 KiB is the most"):
        run(kernel, torch.zeros(1), torch.zeros(1), threads=1)


def test_arguments_are_checked():
    x = torch.zeros(64)
    with pytest.raises(TypeError, match=r"test: 1 arguments given, 2 needed"):
        run(reverse, x)
    with pytest.raises(TypeError, match=r"test: argument 1 is torch.int32, f32\* needed"):
        run(reverse, x, x.int())
    with pytest.raises(ValueError, match="argument kind 'f64' is unknown"):
        run(reverse, x, x, kinds=("f64", "f32*"))
    with pytest.raises(ValueError, match="2048 threads a block: a block has 1 to 1024"):
        run(reverse, x, x, threads=2048)


def refused(function, *args, match, error: type[Exception] = SimulationError, **kwargs):
    with pytest.raises(error, match=match):
        run(function, *args, **kwargs)


@pytest.mark.parametrize(("index", "match"), [(3, "index 3 is between"), (10, "out of bounds"), (19, "out of bounds")])
def test_what_is_not_a_views_own_is_not_written(index, match):
    storage = torch.zeros(20)
    view = storage.as_strided((3, 2), (4, 1), 0)

    def kernel(x, out):
        out[index] = x[0]

    refused(kernel, view, view, threads=1, match=match, error=IndexError)

    def pair(x, out):
        ptx.st_global_b32(out, 1, uint32(7))
        ptx.st_global_v4(out, 4, uint32(1), uint32(1), uint32(1), uint32(1))

    refused(pair, view, view, threads=1, match="index 4 is between", error=IndexError)
    assert not storage[2:].any() and storage[1] != 0


def test_a_negative_index_of_a_shared_array():
    def kernel(x, out):
        shared = cuda.shared.array(4, float32)
        shared[cuda.threadIdx.x - 1] = x[0]

    refused(kernel, torch.zeros(1), torch.zeros(1), match="shared index -1 is negative", error=IndexError)


def test_float64_where_float32_is_stored():
    def to_tensor(x, out):
        out[0] = float64(x[0]) * 2

    def to_shared(x, out):
        cuda.shared.array(4, float32)[0] = float64(x[0])

    for kernel in (to_tensor, to_shared):
        refused(kernel, torch.ones(1), torch.zeros(1), threads=1, match="float64 .* is written to float32")


def test_numbers_wider_than_int32():
    def kernel(x, out, stride):
        out[0] = int32(stride * (1 << 20)) & 1

    kinds = ("f32*", "f32*", "i64")
    run(kernel, torch.zeros(1), torch.zeros(1), 5, threads=1, kinds=kinds)
    refused(kernel, torch.zeros(1), torch.zeros(1), 4096, threads=1, kinds=kinds, match="int32 cannot hold 4294967296")
    with pytest.raises(TypeError, match=r"test: argument 2 is 2\.5, an integer needed for i64"):
        run(kernel, torch.zeros(1), torch.zeros(1), 2.5, kinds=kinds)
    with pytest.raises(ValueError, match="argument 2 is 9223372036854775808, which i64 cannot hold"):
        run(kernel, torch.zeros(1), torch.zeros(1), 1 << 63, kinds=kinds)


# --- races -----------------------------------------------------------------------------------------------------------


def test_the_same_value_by_two_threads_is_no_race():
    def kernel(x, out):
        shared = cuda.shared.array(1, float32)
        address = ptx.shared_address(shared)
        ptx.st_shared_b32(address, ptx.bits_from_f32(x[cuda.threadIdx.x * stride]))
        cuda.syncthreads()
        out[cuda.threadIdx.x] = shared[0]

    stride = 0
    with detecting_races():
        run(kernel, torch.zeros(64), torch.zeros(64))
    stride = 1
    raced(kernel, r"thread 1 writes byte 0 .* thread 0 wrote")


def raced(function, match, threads=64, **kwargs):
    """Nothing is said of it but where races are looked for."""
    x, out = torch.arange(256.0), torch.zeros(256)
    Kernel("test", function, ("f32*", "f32*"), threads, **kwargs).launch((1,), x, out)
    with detecting_races(), pytest.raises(SimulationError, match=match):
        Kernel("test", function, ("f32*", "f32*"), threads, **kwargs).launch((1,), x, out)


def test_a_barrier_after_the_write():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        out[i] = shared[i & 31]

    raced(kernel, r"thread 32 reads byte 0 with no barrier after what thread 0 wrote")
    with detecting_races():
        x, out = torch.arange(64.0), torch.zeros(64)
        run(reverse, x, out)
        assert torch.equal(out, x.flip(0))


def test_a_barrier_before_memory_is_used_again():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        cuda.syncthreads()
        out[i] = shared[63 - i]
        shared[i] = x[i] + float32(1.0)

    raced(kernel, r"thread 32 reads byte 124 with no barrier after what thread 31 wrote")


def test_the_last_barrier_of_a_sum():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        cuda.syncthreads()
        total = shared[0] + float32(1.0)
        if last:
            cuda.syncthreads()
        out[i] = device.block_sum(shared, i, total, 64)

    last = False
    raced(kernel, r"thread 1 reads byte 0 .* thread 0 wrote")
    last = True
    with detecting_races():
        run(kernel, torch.zeros(64), torch.zeros(64))


def test_a_warp_barrier():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        if barrier:
            ptx.bar_warp_sync()
        out[i] = shared[i ^ other]

    barrier, other = False, 1
    raced(kernel, r"thread 1 writes byte 4 .* thread 0 read")
    barrier = True
    with detecting_races():
        run(kernel, torch.zeros(64), torch.zeros(64))
    other = 32
    raced(kernel, r"reads byte")


def test_a_named_barrier_orders_those_who_come():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        i = cuda.threadIdx.x
        if i < 32:
            shared[i] = x[i]
            ptx.bar_arrive(uint32(1), uint32(64))
        else:
            if wait:
                ptx.bar_sync(uint32(1), uint32(64))
            out[i] = shared[i - 32]

    wait = True
    with detecting_races():
        run(kernel, torch.zeros(64), torch.zeros(64))
    wait = False
    raced(kernel, r"thread 32 reads byte 0 .* thread 0 wrote")


# --- what is asynchronous --------------------------------------------------------------------------------------------


def programmatic(function, early=()):
    options = LaunchOptions(programmatic=True)
    x, out = torch.ones(64), torch.zeros(64)
    Kernel("test", function, ("f32*", "f32*"), 64, options=options, early=early).launch((2,), x, out)
    return out


def test_what_the_kernel_ahead_may_still_use_is_locked_until_the_wait():
    def kernel(x, out):
        value = x[0] if "read" in before else float32(0.0)
        if "write" in before:
            out[0] = value
        if waits and cuda.threadIdx.x == 32:
            ptx.griddepcontrol_wait()
        cuda.syncthreads()
        out[cuda.threadIdx.x] = value + x[1]

    waits, before = True, ()
    assert (programmatic(kernel) == 1).all()
    before = ("read",)
    assert (programmatic(kernel, early=("x",)) == 2).all()
    with pytest.raises(SimulationError, match=r"x is used before griddepcontrol.wait"):
        programmatic(kernel)
    before = ("write",)
    for early in ((), ("out",)):
        with pytest.raises(SimulationError, match=r"out is written before griddepcontrol.wait"):
            programmatic(kernel, early)
    waits, before = False, ()
    with pytest.raises(SimulationError, match=r"x is used before griddepcontrol.wait"):
        programmatic(kernel)
    with pytest.raises(ValueError, match=r"early names \['y'\], and the parameters are \('x', 'out'\)"):
        programmatic(kernel, early=("y",))


def test_a_block_must_wait_for_the_kernels_ahead():
    def kernel(x, out):
        if cuda.blockIdx.x == 0:
            ptx.griddepcontrol_wait()

    with pytest.raises(SimulationError, match=r"block \(1, 0, 0\) ends without griddepcontrol.wait"):
        programmatic(kernel)


def box_and_then(waits, fence=True):
    """A box of 8 rows to shared memory, which each lane reads; waits: for it, 0: not, 1: after that, 2: before."""

    def kernel(boxes, out):
        memory = cuda.shared.array(0, uint8)
        start = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        barrier = start + uint32(1024)
        if cuda.threadIdx.x == 0:
            ptx.mbarrier_init(barrier, uint32(1))
            if fence:
                ptx.fence_mbarrier_init()
            ptx.mbarrier_arrive_expect_tx(barrier, uint32(1024))
            ptx.cp_async_bulk_tensor_2d(start, boxes, 0, barrier, int32(0), int32(0), uint64(ptx.EVICT_FIRST))
        ptx.bar_warp_sync()
        if waits == 2:
            ptx.mbarrier_try_wait(barrier, uint32(0))
        words = ptx.ld_shared_v4(start)
        if waits == 1:
            ptx.mbarrier_try_wait(barrier, uint32(0))
        out[cuda.threadIdx.x] = int32(words[0])

    x, out = torch.ones(8, 64, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.int32)
    Kernel("test", kernel, ("u8*", "i32*"), 32, dynamic_shared=2048 + 8).launch((1,), tensor_map(x, (8,)), out)
    return out


def test_a_bulk_copy_is_there_once_it_is_waited_for():
    assert (box_and_then(2) == 0x3F803F80).all()
    assert (box_and_then(1) == -1).any()
    with pytest.raises(SimulationError, match="ends with a bulk copy that nobody has waited for"):
        box_and_then(0)
    with pytest.raises(SimulationError, match=r"a bulk copy for the memory barrier \d+: no fence.mbarrier_init"):
        box_and_then(2, fence=False)
    with detecting_races():
        box_and_then(2)
        with pytest.raises(SimulationError, match="reads byte 0 with no barrier after what a bulk copy wrote"):
            box_and_then(1)


def test_a_copy_that_is_under_way_at_the_end():
    def kernel(x, out):
        shared = cuda.shared.array(64, float32)
        ptx.cp_async_ca_4(ptx.shared_address(shared), x, 0)
        ptx.cp_async_commit_group()

    refused(kernel, torch.zeros(64), torch.zeros(64), threads=1, match="cp.async is under way at the end")


def product(without, then=""):
    """out f32[128] = 16, by wgmma of ones that the threads themselves wrote, without one of the steps; then: "reuse" of
    the memory, in the end."""
    wgmma, wait = ptx.wgmma_m64k16_bf16(8), ptx.wgmma_wait_group(0)

    def kernel(x, out):
        memory = cuda.shared.array(0, uint8)
        start = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        thread = int32(cuda.threadIdx.x)
        ones = uint32(0x3F803F80)
        for i in range(thread, 9216 // 16, 128):
            ptx.st_shared_v4(start + uint32(16 * i), ones, ones, ones, ones)
        if without != "fence":
            ptx.fence_proxy_async_shared()
        cuda.syncthreads()
        acc = cuda.local.array(4, float32)
        a = ptx.wgmma_descriptor(start, uint32(16), uint32(1024))
        b = ptx.wgmma_descriptor(start + uint32(8192), uint32(16), uint32(1024))
        if without != "wgmma.fence":
            ptx.wgmma_fence()
        wgmma(acc, a, b, uint32(0))
        ptx.wgmma_commit_group()
        if without != "wait":
            wait()
        out[thread] = acc[0]
        if then == "reuse":
            if without != "barrier":
                cuda.syncthreads()
            ptx.st_shared_v4(start + uint32(16 * thread), ones, ones, ones, uint32(0))
        wait()

    out = torch.zeros(128)
    Kernel("test", kernel, ("f32*", "f32*"), 128, dynamic_shared=10 << 10).launch((1,), out, out)
    return out


def test_wgmma_has_its_sums_once_they_are_waited_for():
    assert (product("") == 16).all() and product("wait").isnan().all()
    with pytest.raises(SimulationError, match=r"wgmma with no wgmma\.fence before it"):
        product("wgmma.fence")


def test_wgmma_reads_until_it_is_waited_for():
    with detecting_races():
        assert (product("", "reuse") == 16).all()
        with pytest.raises(SimulationError, match=r"writes byte .* thread 0 read, which is not waited for"):
            product("wait", "reuse")
        with pytest.raises(SimulationError, match=r"thread \d+ writes byte .* thread 0 read"):
            product("barrier", "reuse")


def test_wgmma_does_not_see_what_is_not_fenced():
    with detecting_races(), pytest.raises(SimulationError, match=r"wgmma reads shared byte .* wrote without fence"):
        product("fence")
