"""The simulator: barriers, what it refuses, and that it survives a kernel that fails."""

import pytest
import torch

from kernels import device, ptx
from kernels.cuda import SIMULATED, cuda, float32, uint32
from kernels.launch import Kernel
from kernels.simulator import SimulationError

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
        shared[0] = 1.0

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
