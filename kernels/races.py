"""Races in a block's shared memory, found under the simulator whatever order its threads happen to run in.

Each thread has a vector clock: of every other thread, and of every memory barrier's bulk copies, up to what time its
work has become visible here. A barrier joins clocks; arriving at a memory barrier hands the clock on, waiting for it
takes it. Each word of shared memory knows who wrote it and when, and when each thread read it last: an access is a race
where that is not yet visible. (Flanagan, Freund, "FastTrack: efficient and precise dynamic race detection", 2009.)

Of the warp only bar.warp.sync orders memory. What wgmma reads is read until it is waited for, and what a thread wrote
is not there for wgmma before fence.proxy.async.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from kernels.simulated_memory import SharedMemory, SimulationError

BARRIERS = 64  # memory barriers of a block, at most
NEVER = np.iinfo(np.int32).max
WORD = 4


class Races:
    """The clocks of a block. running: the id of the thread that runs. Accesses are by byte of the shared window."""

    def __init__(self, threads: int, memory: SharedMemory, running: Callable[[], int]) -> None:
        self.threads = threads
        self.running = running
        self.clock = np.zeros((threads, threads + BARRIERS), np.int32)
        np.fill_diagonal(self.clock, 1)
        words = -(-len(memory.window) // WORD)
        self.writer = np.zeros(words, np.int16)
        self.written = np.zeros(words, np.int32)  # when; NEVER while a copy is under way
        self.also = np.zeros(words, np.int16)  # who has written the same over it
        self.also_written = np.full(words, NEVER, np.int32)
        self.seen = np.zeros((words, threads), np.int32)  # when each thread read it
        self.unfenced = np.zeros(words, np.int16)  # 1 + who wrote it without a proxy fence since
        self._handed: dict[Hashable, np.ndarray] = {}
        self._copiers: dict[int, int] = {}  # by memory barrier
        self._copies = np.zeros(BARRIERS, np.int32)

    # --- accesses ----------------------------------------------------------------------------------------------------

    def read(self, begin: int, size: int, thread: int | None = None) -> None:
        thread = self.running() if thread is None else thread
        words = slice(begin // WORD, -(-(begin + size) // WORD))
        self._check_written(thread, words, "reads")
        self.seen[words, thread] = self.clock[thread, thread]

    def write(self, begin: int, size: int, changes: bool = True) -> None:
        """changes: whether it writes other values than are there; the same by several threads are no race."""
        thread = self.running()
        when = self.clock[thread, thread]
        if changes:
            self._write(begin, size, thread, when)
        else:
            words = slice(begin // WORD, -(-(begin + size) // WORD))
            self.also[words], self.also_written[words] = thread, when

    def begin_copy(self, begin: int, size: int) -> None:
        """cp.async of the running thread: the words are its own until `end_copy`."""
        self._write(begin, size, self.running(), NEVER)

    def end_copy(self, begin: int, size: int) -> None:
        thread = self.running()
        self.written[begin // WORD : -(-(begin + size) // WORD)] = self.clock[thread, thread]

    def bulk_copy(self, begin: int, size: int, barrier: int) -> None:
        """A bulk copy that the running thread starts; it is visible to who waits for the barrier's phase."""
        copier = self._copiers.setdefault(barrier, len(self._copiers))
        self._copies[copier] += 1
        self._write(begin, size, self.threads + copier, self._copies[copier])
        self.unfenced[begin // WORD : -(-(begin + size) // WORD)] = 0
        handed = self._hand(barrier)
        handed[self.threads + copier] = self._copies[copier]

    def begin_operand(self, words: np.ndarray, threads: Sequence[int]) -> None:
        """wgmma of a warpgroup, whose warps' first threads these are, reads the words until `end_operands`."""
        if self.unfenced[words].any():
            word = words[self.unfenced[words] > 0][0]
            raise SimulationError(
                f"wgmma reads shared byte {word * WORD}, which thread {self.unfenced[word] - 1} wrote without "
                "fence.proxy.async after it"
            )
        for thread in threads:
            self._check_written(thread, words, "reads by wgmma")
            self.seen[words, thread] = NEVER

    def end_operands(self, done: Sequence[np.ndarray], under_way: Sequence[np.ndarray], thread: int) -> None:
        for words in done:
            self.seen[words, thread] = self.clock[thread, thread]
        for words in under_way:
            self.seen[words, thread] = NEVER

    def fence_proxy(self) -> None:
        mine = self.running() + 1
        self.unfenced[self.unfenced == mine] = 0

    def _check_written(self, thread: int, words: slice | np.ndarray, does: str) -> None:
        clock = self.clock[thread]
        late = self.written[words] > clock[self.writer[words]]
        if late.any() and (late := late & (self.also_written[words] > clock[self.also[words]])).any():
            word = _first(words, late)
            raise SimulationError(f"{self._race(thread, does, word)} {self._name(self.writer[word])} wrote")

    def _write(self, begin: int, size: int, writer: int, when: int) -> None:
        thread = self.running()
        words = slice(begin // WORD, -(-(begin + size) // WORD))
        self._check_written(thread, words, "writes")
        late = self.seen[words] > self.clock[thread, : self.threads]
        if late.any():
            word = _first(words, late.any(axis=1))
            reader = int((self.seen[word] > self.clock[thread, : self.threads]).argmax())
            under_way = ", which is not waited for" if self.seen[word, reader] == NEVER else ""
            raise SimulationError(f"{self._race(thread, 'writes', word)} thread {reader} read{under_way}")
        self.writer[words] = writer
        self.written[words] = when
        self.also_written[words] = NEVER
        self.unfenced[words] = thread + 1

    def _race(self, thread: int, does: str, word: int) -> str:
        return f"a race in shared memory: thread {thread} {does} byte {word * WORD} with no barrier after what"

    def _name(self, writer: int) -> str:
        return f"thread {writer}" if writer < self.threads else "a bulk copy"

    # --- order -------------------------------------------------------------------------------------------------------

    def join(self, threads: Sequence[int]) -> None:
        """A barrier of these threads."""
        who = np.asarray(threads)
        self.clock[who] = self.clock[who].max(axis=0)
        self.clock[who, who] += 1

    def arrive(self, key: Hashable) -> None:
        """The running thread hands its clock to the barrier."""
        thread = self.running()
        handed = self._hand(key)
        np.maximum(handed, self.clock[thread], out=handed)
        self.clock[thread, thread] += 1

    def _hand(self, key: Hashable) -> np.ndarray:
        if key not in self._handed:
            self._handed[key] = np.zeros(self.clock.shape[1], np.int32)
        return self._handed[key]

    def end_phase(self, key: Hashable) -> np.ndarray:
        """The clock of all that has arrived, for those who wait; the barrier begins anew."""
        return self._handed.pop(key, np.zeros(self.clock.shape[1], np.int32))

    def take(self, thread: int, clock: np.ndarray) -> None:
        """The thread has waited for a barrier with this clock."""
        np.maximum(self.clock[thread], clock, out=self.clock[thread])


def _first(words: slice | np.ndarray, late: Any) -> int:
    place = int(late.argmax())
    return words.start + place if isinstance(words, slice) else int(words[place])
