"""Run kernels on a CPU: what `cuda` is when NUMBA_ENABLE_CUDASIM=1.

Numba's own simulator starts one operating-system thread for each CUDA thread and polls them: about 3 ms a thread in a
kernel with ten barriers. Here one CUDA thread runs at a time, in order, and gives way only at a barrier or a warp-wide
instruction: hundreds of times cheaper, the same every time, and a barrier that not all threads reach is an error, not a
hang. A block's threads share workers, which are greenlets: a worker runs one CUDA thread after another until one of
them has to wait.

What is asynchronous on a GPU comes late here too: cp.async, bulk copies and wgmma have their results where a kernel
waits for them, and not before. What a kernel programmatically launched may not touch before griddepcontrol.wait is
locked until then. Within `detecting_races()` races in shared memory are errors.

It does not see: another order of blocks, races in global memory, clusters, how much a warp's lanes diverge, registers
that wgmma reads changed before it is waited for, and what differs by the compiler, as float32 with a Python float.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from greenlet import getcurrent, greenlet

from kernels.races import Races
from kernels.simulated_memory import LocalMemory, Pointer, SharedMemory, SimulationError

WARP = 32


class Dim3(NamedTuple):
    """Place or extent of a thread in its block, or of a block in its grid."""

    x: int
    y: int
    z: int


class _Abandoned(BaseException):
    """Unwinds the threads of a block in which another thread failed."""


class Copy(NamedTuple):
    """A cp.async under way: `size` bytes to a shared address."""

    address: int
    target: np.ndarray
    source: np.ndarray


class Products:
    """What wgmma has under way for a thread: its accumulators are NaN until they are waited for."""

    def __init__(self) -> None:
        self.committed = 0  # groups
        self.fenced = False  # wgmma.fence since registers may have changed
        # By accumulators: they, what they will be, and the group that changed them last.
        self._sums: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self._operands: list[tuple[np.ndarray, int]] = []  # words of shared memory, and their group

    def add(self, sums: np.ndarray, added: np.ndarray, keeps: bool) -> None:
        """`sums` become `added`, plus what they were where it `keeps` that."""
        if not self.fenced:
            raise SimulationError("wgmma with no wgmma.fence before it, or none since the last wait")
        if keeps:
            held = self._sums.get(id(sums))
            added = added + (sums if held is None else held[1])
        self._sums[id(sums)] = sums, added.astype(np.float32), self.committed
        sums.fill(np.nan)

    def read(self, words: np.ndarray) -> None:
        self._operands.append((words, self.committed))

    def wait(self, pending: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """At most `pending` groups are unfinished from here on; what the others have read of shared memory, and what
        these read."""
        self.fenced = False
        first = self.committed - pending  # of the unfinished ones
        for key, (sums, values, group) in list(self._sums.items()):
            if group < first:
                sums[:] = values
                del self._sums[key]
        done = [words for words, group in self._operands if group < first]
        self._operands = [(words, group) for words, group in self._operands if group >= first]
        return done, [words for words, _ in self._operands]

    def __bool__(self) -> bool:
        return bool(self._sums)


class _Worker(greenlet):
    """A greenlet that plays CUDA threads, one after another."""

    threadIdx: Dim3
    blockIdx: Dim3
    thread_id: int
    block: _Block
    result: Any

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[list[Copy]] = []
        self.products = Products()

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
        self.products = Products()
        block.live += 1
        try:
            block.launch.kernel(*block.launch.args)
            if any(self.copies):
                raise SimulationError("cp.async is under way at the end, with no wait for it")
            if self.products:
                raise SimulationError("wgmma is under way at the end, with no wait for it")
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
            phases.seen(address)
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
        block, key = self.block, (number, threads)
        met = block.named.setdefault(key, [0, []])
        met[0] += 1
        if block.races:
            block.races.arrive(key)
        if met[0] == threads:
            if block.races:
                clock = block.races.end_phase(key)
                for thread in [w.thread_id for w in met[1]] + [self.thread_id] * wait:
                    block.races.take(thread, clock)
            block.ready.extend(met[1])
            del block.named[key]
        elif wait:
            met[1].append(self)
            self._park()

    # --- shared memory, by address ---------------------------------------------------------------------------------

    def read_shared(self, address: int, size: int, thread: int | None = None) -> np.ndarray:
        """A view of the `size` bytes at a shared address, a multiple of `size`, for this thread or another to read."""
        block = self.block
        if block.races:
            block.races.read(address - SharedMemory.BASE, size, thread)
        return block.shared.bytes(address, size)

    def write_shared(self, address: int, *words: Any) -> None:
        """These uint32 to a shared address, a multiple of their bytes."""
        block = self.block
        target = block.shared.bytes(address, 4 * len(words)).view(np.uint32)
        if block.races:
            block.races.write(address - SharedMemory.BASE, 4 * len(words), tuple(target) != words)
        target[:] = words

    def copy_async(self, address: int, size: int, source: np.ndarray) -> None:
        """Begin a cp.async."""
        block = self.block
        target = block.shared.bytes(address, size)
        if block.races:
            block.races.begin_copy(address - SharedMemory.BASE, size)
        self.copies[-1].append(Copy(address, target, source))

    def end_copies(self, group: list[Copy]) -> None:
        """The copies of a group have arrived."""
        for copy in group:
            copy.target[:] = copy.source
            if self.block.races:
                self.block.races.end_copy(copy.address - SharedMemory.BASE, len(copy.target))
        group.clear()

    def wait_for_products(self, pending: int) -> None:
        """At most `pending` groups of wgmma are unfinished from here on."""
        done, under_way = self.products.wait(pending)
        if self.block.races:
            self.block.races.end_operands(done, under_way, self.thread_id)


class _Phases:
    """The memory barriers of a block: by shared address how many arrivals and bytes the running phase still waits for.

    A phase ends when both are 0; whoever waited for it runs again. What bulk copies bring is there once somebody has
    seen their phase end.
    """

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.barriers: dict[int, list[int]] = {}  # address: [arrivals of a phase, arrivals pending, bytes, phase]
        self.waiting: dict[tuple[int, int], list[_Worker]] = {}  # by address and parity
        self.landing: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}  # by address: phase, target, content
        self.clocks: dict[int, np.ndarray] = {}  # by address, of the phase that ended last
        self.unfenced: set[int] = set()  # addresses of those that the copy engine may not see yet

    def init(self, address: int, count: int) -> None:
        self.block.shared.bytes(address, 8)
        if count < 1:
            raise SimulationError(f"mbarrier.init at {address} for {count} arrivals: at least 1 needed")
        self.barriers[address] = [count, count, 0, 0]
        self.unfenced.add(address)

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
        if self.block.races:
            self.block.races.arrive(address)
        self._end_phase(address, barrier)

    def copy(self, address: int, target: int, content: np.ndarray) -> None:
        """A bulk copy to a shared address, of which the barrier's phase is told."""
        barrier, races = self._at(address), self.block.races
        if address in self.unfenced:
            raise SimulationError(
                f"a bulk copy for the memory barrier {address}: no fence.mbarrier_init since it was made"
            )
        place = self.block.shared.span(target, target + len(content))
        if races:
            races.bulk_copy(target - SharedMemory.BASE, len(content), address)
        self.landing.setdefault(address, []).append((barrier[3], place, content))
        barrier[2] -= len(content)
        self._end_phase(address, barrier)

    def ended(self, address: int, parity: int) -> bool:
        """Whether the newest phase of this parity has ended; before phase 0 that of parity 1 has."""
        if self._at(address)[3] & 1 == parity:
            return False
        self.seen(address)
        return True

    def is_seen(self, address: int, parity: int) -> bool:
        """As `ended`, but not where that would be the first to see what a bulk copy brings: it may be on its way."""
        barrier, landing = self._at(address), self.landing.get(address)
        return not (landing and landing[0][0] < barrier[3]) and self.ended(address, parity)

    def seen(self, address: int) -> None:
        """The running thread has seen the phase before this one end."""
        if address in self.landing:
            phase, landing = self.barriers[address][3], self.landing[address]
            while landing and landing[0][0] < phase:
                _, place, content = landing.pop(0)
                place[:] = content
        if self.block.races and address in self.clocks:
            self.block.races.take(current().thread_id, self.clocks[address])

    def _end_phase(self, address: int, barrier: list[int]) -> None:
        if barrier[1] or barrier[2]:
            return
        parity = barrier[3] & 1
        barrier[1], barrier[3] = barrier[0], barrier[3] + 1
        if self.block.races:
            self.clocks[address] = self.block.races.end_phase(address)
        for worker in self.waiting.pop((address, parity), ()):
            worker.result = 1
            self.block.ready.append(worker)


class _Block:
    """One thread block in flight."""

    def __init__(self, launch: _Launch, index: Dim3):
        self.launch = launch
        self.index = index
        self.shared = SharedMemory(launch.dynamic_shared)
        self.races: Races | None = None
        if _watched:
            self.races = Races(math.prod(launch.block_dim), self.shared, lambda: current().thread_id)
            self.shared.watch = self.races
        self.unstarted = deque(range(math.prod(launch.block_dim)))
        self.live = 0
        self.ready: deque[_Worker] = deque()
        self.at_barrier: list[tuple[_Worker, bool]] = []
        self.meetings: dict[tuple[int, int], dict[int, tuple[_Worker, str, Any]]] = {}
        self.named: dict[tuple[int, int], list[Any]] = {}  # barrier and its threads: how many came, who waits
        self.phases = _Phases(self)
        self.failure: BaseException | None = None
        self.control = getcurrent()

    def run(self) -> None:
        # All workers are switched to from here: one that another starts would begin at that one's depth of calls.
        self.launch.lock()
        while (worker := self.following()) is not None:
            worker.switch()
        if self.failure is not None:
            self._abandon()
        if self.launch.locked:
            raise SimulationError(
                f"block {tuple(self.index)} ends without griddepcontrol.wait: the kernel behind this one could start "
                "before the one ahead is done"
            )
        if any(self.phases.landing.values()):
            raise SimulationError(f"block {tuple(self.index)} ends with a bulk copy that nobody has waited for")

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
        if self.races:
            self.races.join([worker.thread_id for worker, _ in self.at_barrier])
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
    """One kernel launch: what its blocks have in common. early: of a programmatic one the places of the pointers that
    may be read before griddepcontrol.wait; else None."""

    def __init__(
        self,
        kernel: Callable[..., None],
        args: Sequence[Any],
        block_dim: tuple[int, int, int],
        dynamic_shared: int,
        early: frozenset[int] | None,
    ):
        self.kernel = kernel
        self.args = args
        self.block_dim = block_dim
        self.dynamic_shared = dynamic_shared
        self.early = early
        self.locked = False
        self.idle: list[_Worker] = []

    def lock(self) -> None:
        """A block begins."""
        if self.early is not None:
            self.locked = True
            for place, pointer in enumerate(self.args):
                if isinstance(pointer, Pointer):
                    pointer.lock(place in self.early)

    def unlock(self) -> None:
        """A thread of the block has waited for the kernels ahead."""
        if self.locked:
            self.locked = False
            for pointer in self.args:
                if isinstance(pointer, Pointer):
                    pointer.unlock()


class _SimulatedCuda:
    """The part of `numba.cuda` that kernels use. One launch runs at a time, so its shape lives here."""

    local = LocalMemory
    gridDim: Dim3
    blockDim: Dim3

    def __init__(self) -> None:
        self.launching = threading.Lock()

    @property
    def threadIdx(self) -> Dim3:
        return current().threadIdx

    @property
    def blockIdx(self) -> Dim3:
        return current().blockIdx

    @property
    def shared(self) -> SharedMemory:
        return current().block.shared

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
        self,
        kernel: Callable[..., None],
        grid: tuple[int, ...],
        threads: int,
        args: Sequence[Any],
        dynamic_shared: int,
        early: frozenset[int] | None = None,
    ) -> None:
        """Run `kernel(*args)` for every thread of every block, block after block. Raises what the kernel raises.

        early: of a programmatic launch the places of the pointers that may be read before griddepcontrol.wait.
        """
        with self.launching:
            extent = (*grid, 1, 1)[:3]
            self.gridDim, self.blockDim = Dim3(*extent), Dim3(threads, 1, 1)
            launch = _Launch(kernel, args, self.blockDim, dynamic_shared, early)
            for z, y, x in np.ndindex(extent[2], extent[1], extent[0]):
                _Block(launch, Dim3(x, y, z)).run()


cuda = _SimulatedCuda()


def current() -> _Worker:
    """The CUDA thread that is running. Raises SimulationError outside a kernel."""
    worker = getcurrent()
    if not isinstance(worker, _Worker):
        raise SimulationError("this runs inside a kernel only")
    return worker


_watched = False


@contextmanager
def detecting_races() -> Iterator[None]:
    """Within, a race in a block's shared memory is a SimulationError: kernels take about twice as long."""
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before
