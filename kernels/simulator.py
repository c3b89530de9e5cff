"""Run kernels on a CPU: what `cuda` is when NUMBA_ENABLE_CUDASIM=1.

Numba's own simulator starts one operating-system thread for each CUDA thread and polls them: about 3 ms a thread in a
kernel with ten barriers. Here one CUDA thread runs at a time, in order, and gives way only at a barrier or a warp-wide
instruction: hundreds of times cheaper, the same every time, and a barrier that not all threads reach is an error, not a
hang. A block's threads share workers, which are greenlets: a worker runs one CUDA thread after another until one of
them has to wait.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from greenlet import getcurrent, greenlet

WARP = 32


class Dim3(NamedTuple):
    """Place or extent of a thread in its block, or of a block in its grid."""

    x: int
    y: int
    z: int


class SimulationError(RuntimeError):
    """A kernel did what a GPU does not allow, as waiting at a barrier that some threads never reach."""


class Pointer:
    """What a kernel sees of a pointer argument: elements by index from the first one, bounds checked.

    array: flat NumPy array from the pointed-to element to the end of its storage (bf16 and f16 as uint16).
    """

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            raise IndexError(f"pointer index {index} is before the tensor")
        return self.array[index]

    def bytes(self, index: int, size: int) -> np.ndarray:
        """The `size` bytes at an element, which must lie at a multiple of `size`, as a view."""
        flat = self.array.view(np.uint8)
        begin = int(index) * self.array.itemsize
        if index < 0 or begin + size > len(flat):
            raise IndexError(f"{size} bytes at index {index} are outside the tensor of {len(self.array)} elements")
        if (flat.ctypes.data + begin) % size:
            raise SimulationError(f"{size} bytes at index {index} do not begin at a multiple of {size}")
        return flat[begin : begin + size]

    def __setitem__(self, index: int, value: Any) -> None:
        if index < 0:
            raise IndexError(f"pointer index {index} is before the tensor")
        self.array[index] = value


class _Abandoned(BaseException):
    """Unwinds the threads of a block in which another thread failed."""


class _Shared:
    """`cuda.shared`: one array for each place in the source that asks, all threads of a block the same one.

    The arrays lie in one window, dynamic shared memory first, so that each has a 32-bit address. Memory nobody wrote is
    all ones (NaN as a float).
    """

    # What the system keeps for itself of each block's window since sm_80.
    BASE = 1024

    def __init__(self, dynamic_bytes: int):
        self.arrays: dict[Any, np.ndarray] = {}
        buffer = np.full(dynamic_bytes + (48 << 10) + 1024, 0xFF, np.uint8)
        start = -buffer.ctypes.data % 1024
        self.window = buffer[start:]
        self.start = self.window.ctypes.data
        self.dynamic_bytes = dynamic_bytes
        self.used = dynamic_bytes

    def array(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        if shape == 0:
            return self.window[: self.dynamic_bytes // size * size].view(dtype)
        frame = sys._getframe(1)
        place = (frame.f_code, frame.f_lasti)
        if place not in self.arrays:
            count = math.prod(shape) if isinstance(shape, tuple) else shape
            begin = -(-self.used // 16) * 16
            self.used = begin + count * size
            if self.used > len(self.window):
                raise SimulationError(f"{self.used - self.dynamic_bytes} bytes of shared arrays: 48 KiB is the most")
            self.arrays[place] = self.window[begin : self.used].view(dtype).reshape(shape)
        return self.arrays[place]


class _Local:
    """`cuda.local`: an array of the thread's own."""

    @staticmethod
    def array(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)


class _Worker(greenlet):
    """A greenlet that plays CUDA threads, one after another."""

    threadIdx: Dim3
    blockIdx: Dim3
    thread_id: int
    block: _Block
    result: Any

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[list[tuple[np.ndarray, np.ndarray]]] = []

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                block = self.block
                while block.unstarted and block.failure is None:
                    self._play(block, block.unstarted.popleft())
                block.launch.idle.append(self)
                block.control.switch()

    def _play(self, block: _Block, index: int) -> None:
        dim = block.launch.block_dim
        self.thread_id = index
        self.threadIdx = Dim3(index % dim[0], index // dim[0] % dim[1], index // (dim[0] * dim[1]))
        self.blockIdx = block.index
        self.copies = [[]]
        block.live += 1
        try:
            block.launch.kernel(*block.launch.args)
        except _Abandoned:
            pass
        except Exception as error:
            error.add_note(f"in thread {tuple(self.threadIdx)} of block {tuple(block.index)}")
            block.failure = error
        finally:
            block.live -= 1

    def _park(self) -> None:
        self.block.control.switch()
        if self.block.failure is not None:
            raise _Abandoned

    def syncthreads_count(self, value: Any) -> int:
        self.block.at_barrier.append((self, bool(value)))
        self._park()
        return self.result

    def wait_for_phase(self, address: int, parity: int) -> int:
        """Give way until the phase of this parity of the memory barrier at `address` has ended; 1."""
        phases = self.block.phases
        if not phases.ended(address, parity):
            phases.waiting.setdefault((address, parity), []).append(self)
            self._park()
        return 1

    def collective(
        self, name: str, mask: int, value: Any, compute: Callable[[dict[int, Any]], Any], size: int = WARP
    ) -> Any:
        """Meet the lanes of `mask` in this warp, or group of `size` threads; `compute` maps their values {lane: value}
        to each lane's result."""
        group, lane = divmod(self.thread_id, size)
        if not mask >> lane & 1:
            raise SimulationError(f"{name}: lane {lane} executes it but is not in its mask {mask:#010x}")
        block = self.block
        met = block.meetings.get((group, mask))
        if met is None:
            met = block.meetings[group, mask] = {}
        met[lane] = (self, name, value)
        if len(met) < mask.bit_count():
            self._park()
            return self.result
        del block.meetings[group, mask]
        lanes = {i: met[i] for i in range(size) if i in met}
        if any(other is not name and other != name for _, other, _ in lanes.values()):
            names = {n for _, n, _ in lanes.values()}
            raise SimulationError(f"lanes of warp {group} meet at different instructions: {sorted(names)}")
        results = compute({i: held for i, (_, _, held) in lanes.items()})
        for i, (worker, _, _) in lanes.items():
            worker.result = results[i]
            if worker is not self:
                block.ready.append(worker)
        return self.result

    def named_barrier(self, number: int, threads: int, wait: bool) -> None:
        """Arrive at barrier `number` of `threads` threads, and with `wait` give way until all have."""
        met = self.block.named.setdefault((number, threads), [0, []])
        met[0] += 1
        if met[0] == threads:
            self.block.ready.extend(met[1])
            del self.block.named[number, threads]
        elif wait:
            met[1].append(self)
            self._park()


class _Phases:
    """The memory barriers of a block: by shared address how many arrivals and bytes the running phase still waits for.

    A phase ends when both are 0; whoever waited for it runs again.
    """

    def __init__(self, ready: deque[_Worker]) -> None:
        self.ready = ready
        self.barriers: dict[int, list[int]] = {}  # address: [arrivals of a phase, arrivals pending, bytes, phase]
        self.waiting: dict[tuple[int, int], list[_Worker]] = {}  # by address and parity

    def init(self, address: int, count: int) -> None:
        shared_bytes(address, 8)
        if count < 1:
            raise SimulationError(f"mbarrier.init at {address} for {count} arrivals: at least 1 needed")
        self.barriers[address] = [count, count, 0, 0]

    def _at(self, address: int) -> list[int]:
        if address not in self.barriers:
            raise SimulationError(f"no memory barrier was made at shared address {address}")
        return self.barriers[address]

    def arrive(self, address: int, expected: int = 0) -> None:
        barrier = self._at(address)
        if barrier[1] == 0:
            raise SimulationError(f"more than {barrier[0]} arrivals at the memory barrier {address} in one phase")
        barrier[1] -= 1
        barrier[2] += expected
        self._end_phase(address, barrier)

    def complete(self, address: int, size: int) -> None:
        barrier = self._at(address)
        barrier[2] -= size
        self._end_phase(address, barrier)

    def ended(self, address: int, parity: int) -> bool:
        """Whether the newest phase of this parity has ended; before phase 0 that of parity 1 has."""
        return self._at(address)[3] & 1 != parity

    def _end_phase(self, address: int, barrier: list[int]) -> None:
        if barrier[1] or barrier[2]:
            return
        parity = barrier[3] & 1
        barrier[1], barrier[3] = barrier[0], barrier[3] + 1
        for worker in self.waiting.pop((address, parity), ()):
            worker.result = 1
            self.ready.append(worker)


class _Block:
    """One thread block in flight."""

    def __init__(self, launch: _Launch, index: Dim3):
        self.launch = launch
        self.index = index
        self.unstarted = deque(range(math.prod(launch.block_dim)))
        self.live = 0
        self.ready: deque[_Worker] = deque()
        self.at_barrier: list[tuple[_Worker, bool]] = []
        self.meetings: dict[tuple[int, int], dict[int, tuple[_Worker, str, Any]]] = {}
        self.named: dict[tuple[int, int], list[Any]] = {}  # barrier and its threads: how many came, who waits
        self.phases = _Phases(self.ready)
        self.failure: BaseException | None = None
        self.control = getcurrent()

    def run(self) -> None:
        # All workers are switched to from here: one that another starts would begin at that one's depth of calls.
        while (worker := self.following()) is not None:
            worker.switch()
        if self.failure is not None:
            self._abandon()

    def following(self) -> _Worker | None:
        """The worker to run next; None when the block is finished or has failed."""
        if not (self.ready or self.unstarted or self.failure) and self.live:
            self._open_barrier()
        if self.failure:
            return None
        if self.ready:
            return self.ready.popleft()
        if not self.unstarted:
            return None
        worker = self.launch.idle.pop() if self.launch.idle else _Worker()
        worker.block = self
        return worker

    def _open_barrier(self) -> None:
        if len(self.at_barrier) < self.live:
            parts = [f"{len(self.at_barrier)} of {self.live} running threads wait at cuda.syncthreads()"]
            for (warp, mask), met in self.meetings.items():
                name = next(iter(met.values()))[1]
                parts.append(f"{len(met)} lanes of warp {warp} wait at {name} with mask {mask:#010x}")
            for (number, threads), (count, _) in self.named.items():
                parts.append(f"{count} of {threads} threads have come to barrier {number}")
            for (address, parity), workers in self.phases.waiting.items():
                parts.append(f"{len(workers)} threads wait at memory barrier {address} for parity {parity}")
            self.failure = SimulationError(f"block {tuple(self.index)} is stuck: " + "; ".join(parts))
            return
        count = sum(value for _, value in self.at_barrier)
        for worker, _ in self.at_barrier:
            worker.result = count
            self.ready.append(worker)
        self.at_barrier = []

    def _abandon(self) -> None:
        """Unwind the threads that wait, one at a time, and raise what went wrong."""
        waiting = [w for w, _ in self.at_barrier] + list(self.ready)
        waiting += [w for met in self.meetings.values() for w, _, _ in met.values()]
        waiting += [w for _, workers in self.named.values() for w in workers]
        waiting += [w for workers in self.phases.waiting.values() for w in workers]
        for worker in dict.fromkeys(waiting):
            worker.switch()
        assert self.failure is not None
        raise self.failure


class _Launch:
    """One kernel launch: what its blocks have in common."""

    def __init__(self, kernel: Callable[..., None], args: Sequence[Any], block_dim: tuple[int, int, int]):
        self.kernel = kernel
        self.args = args
        self.block_dim = block_dim
        self.idle: list[_Worker] = []


class _SimulatedCuda:
    """The part of `numba.cuda` that kernels use. One launch runs at a time, so its shape lives here."""

    local = _Local
    gridDim: Dim3
    blockDim: Dim3
    shared: _Shared

    def __init__(self) -> None:
        self.launching = threading.Lock()

    @property
    def threadIdx(self) -> Dim3:
        return current().threadIdx

    @property
    def blockIdx(self) -> Dim3:
        return current().blockIdx

    def syncthreads(self) -> None:
        current().syncthreads_count(0)

    def syncthreads_count(self, value: Any) -> int:
        """Barrier; the number of threads whose value is not zero."""
        return current().syncthreads_count(value)

    def syncthreads_and(self, value: Any) -> int:
        """Barrier; 1 where every thread's value is not zero, else 0."""
        return int(current().syncthreads_count(not value) == 0)

    def syncthreads_or(self, value: Any) -> int:
        """Barrier; 1 where any thread's value is not zero, else 0."""
        return int(current().syncthreads_count(value) > 0)

    def run(
        self, kernel: Callable[..., None], grid: tuple[int, ...], threads: int, args: Sequence[Any], dynamic_shared: int
    ) -> None:
        """Run `kernel(*args)` for every thread of every block, block after block. Raises what the kernel raises."""
        with self.launching:
            extent = (*grid, 1, 1)[:3]
            self.gridDim, self.blockDim = Dim3(*extent), Dim3(threads, 1, 1)
            launch = _Launch(kernel, args, self.blockDim)
            for z, y, x in np.ndindex(extent[2], extent[1], extent[0]):
                self.shared = _Shared(dynamic_shared)
                _Block(launch, Dim3(x, y, z)).run()


cuda = _SimulatedCuda()


def current() -> _Worker:
    """The CUDA thread that is running. Raises SimulationError outside a kernel."""
    worker = getcurrent()
    if not isinstance(worker, _Worker):
        raise SimulationError("this runs inside a kernel only")
    return worker


def shared_address(array: np.ndarray) -> int:
    """Address in the running block's shared window of a shared array's first element."""
    offset = array.__array_interface__["data"][0] - cuda.shared.start
    if not 0 <= offset < len(cuda.shared.window):
        raise SimulationError("shared_address of an array that is not in shared memory")
    return offset + _Shared.BASE


def shared_bytes(address: int, size: int) -> np.ndarray:
    """A view of the `size` bytes at an address, a multiple of `size`, of the running block's shared window."""
    begin = address - _Shared.BASE
    if begin < 0 or begin + size > cuda.shared.used:
        raise SimulationError(f"{size} bytes at shared address {address} are outside the block's shared memory")
    if address % size:
        raise SimulationError(f"{size} bytes at shared address {address} do not begin at a multiple of {size}")
    return cuda.shared.window[begin : begin + size]


def shared_span(begin: int, end: int) -> np.ndarray:
    """A view of the running block's shared window from address `begin` up to `end`."""
    if begin < _Shared.BASE or end - _Shared.BASE > cuda.shared.used:
        raise SimulationError(f"addresses {begin} to {end} are outside the block's shared memory")
    return cuda.shared.window[begin - _Shared.BASE : end - _Shared.BASE]


class TensorMap:
    """What the bulk tensor copy sees of a tensor: boxes of some size, 128 bytes of a row, zeros beyond its edges."""

    def __init__(self, tensor: np.ndarray, sizes: Sequence[int]) -> None:
        self.tensor = tensor  # […, R, C] of 2-byte elements
        self.sizes = tuple(sizes)

    def box(self, *first: int) -> np.ndarray:
        """uint8 [rows, 128]: the box whose first element is at [*first], its rows in order."""
        found = np.zeros(self.sizes, np.uint16)
        inside = self.tensor[
            tuple(slice(max(at, 0), max(at + size, 0)) for at, size in zip(first, self.sizes, strict=True))
        ]
        place = tuple(slice(max(-at, 0), max(-at, 0) + size) for at, size in zip(first, inside.shape, strict=True))
        found[place] = inside
        return found.reshape(-1, self.sizes[-1]).view(np.uint8)


_tensor_maps: list[TensorMap] = []


def add_tensor_map(tensor_map: TensorMap) -> int:
    """A number that stands for the map in the 128 bytes a kernel is given; it is kept as long as the process."""
    _tensor_maps.append(tensor_map)
    return len(_tensor_maps) - 1


def simulated_tensor_map(number: int) -> TensorMap:
    return _tensor_maps[number]
