"""Many kernels to machine code, by processes beside each other that end with this one.

A process is a Python of its own that is told over a pipe what to compile: nothing is forked, and the caller's main
module is not run again, so that a script needs no guard. Its input ends when its parent does, and so does it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from kernels.architectures import ARCHITECTURES, BuildError
from kernels.cubins import Build
from kernels.launch import Kernel

Progress = Callable[[int, int, str], None]
TASKS = 8  # kernels that a process compiles: 0.7 s go to its start


@dataclass(frozen=True)
class _Task:
    """A kernel and the architectures to compile it for: one process keeps what its callees have come to."""

    kernel: Kernel
    archs: tuple[str, ...]

    @property
    def size(self) -> int:
        """About how long it takes."""
        return len(self.kernel.fn.__code__.co_code) * len(self.archs)


def build_all(
    kernels: Iterable[Kernel],
    archs: Sequence[str] = ARCHITECTURES,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Build]:
    """Every kernel for every architecture that it is for, kept or compiled now: kernels outermost in the result.

    workers: processes (default: one a CPU). progress(done, total, name): of those that are not kept; called before the
    first is compiled, with 0 done and no name, and as each is there.
    Raises BuildError at the first that fails; what is compiled by then is kept.
    """
    work = [(kernel, arch) for kernel in kernels for arch in archs if arch in kernel.architectures]
    wanted = {(kernel.name, arch): kernel for kernel, arch in work}
    builds: dict[tuple[str, str], Build] = {}
    missing: dict[str, list[str]] = {}
    for (name, arch), kernel in wanted.items():
        build = kernel.kept(arch)
        if build is None:
            missing.setdefault(name, []).append(arch)
        else:
            builds[name, arch] = build
    tasks = [_Task(wanted[name, archs[0]], tuple(archs)) for name, archs in missing.items()]
    total = len(wanted) - len(builds)
    if progress and total:
        progress(0, total, "")
    count = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    compiled = _compile_here(tasks) if count <= 1 else _compile_beside(tasks, count)
    for done, (kernel, build) in enumerate(compiled, 1):
        kernel.keep(build)
        builds[build.kernel, build.arch] = build
        if progress:
            progress(done, total, f"{build.kernel} {build.arch}")
    return [builds[kernel.name, arch] for kernel, arch in work]


def _compile_here(tasks: Sequence[_Task]) -> Iterable[tuple[Kernel, Build]]:
    for task in tasks:
        for arch in task.archs:
            yield task.kernel, task.kernel.compile(arch)


def _compile_beside(tasks: Sequence[_Task], count: int) -> Iterable[tuple[Kernel, Build]]:
    """In `count` processes at a time; what takes long begins first."""
    waiting: SimpleQueue[_Task] = SimpleQueue()
    for task in sorted(tasks, key=lambda task: -task.size):
        waiting.put(task)
    done: SimpleQueue[tuple[Kernel, Build] | Exception] = SimpleQueue()
    processes = [_Process() for _ in range(count)]
    threads = [Thread(target=_feed, args=(process, waiting, done), daemon=True) for process in processes]
    try:
        for thread in threads:
            thread.start()
        for _ in range(sum(len(task.archs) for task in tasks)):
            result = done.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        with contextlib.suppress(Empty):
            while True:
                waiting.get_nowait()
        for process in processes:
            process.stop()
        for thread in threads:
            thread.join()


def _feed(process: _Process, waiting: SimpleQueue[_Task], done: SimpleQueue[tuple[Kernel, Build] | Exception]) -> None:
    """Give one process tasks, one after another, until there are none, or one ends it."""
    while True:
        try:
            task = waiting.get_nowait()
        except Empty:
            return
        arch = task.archs[0]
        try:
            answers = process.begin(task)
            for arch in task.archs:  # noqa: B007 the one it ended with
                result = pickle.load(answers)
                done.put(result if isinstance(result, Exception) else (task.kernel, result))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            done.put(BuildError(f"{task.kernel.name}: the process that compiled it for {arch} {process.stop()}"))
            return


class _Process:
    """A process that compiles, and another in its place after TASKS kernels: Numba keeps all that it compiled, and gets
    slower."""

    def __init__(self) -> None:
        self._tasks = 0
        self._popen = self._start()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        code = f"import sys; sys.path[:] = {sys.path!r}; {_WITHOUT_TORCH}; from kernels.compile import work; work()"
        # It is to compile, whatever this process was told, and needs no GPU.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def begin(self, task: _Task) -> IO[bytes]:
        """Let it compile a kernel; where its answers, one an architecture, are read. Raises OSError where it died."""
        if self._tasks == TASKS:
            self.stop()
            self._popen, self._tasks = self._start(), 0
        self._tasks += 1
        assert self._popen.stdin and self._popen.stdout
        _send(self._popen.stdin, task)
        return self._popen.stdout

    def stop(self) -> str:
        """End it; how it ended, if it had before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(0.1)  # one that died by itself may not have been noticed
        self._popen.kill()
        status = self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        return f"was ended by signal {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


# To compile takes nothing of torch but the names of its dtypes, and torch takes seconds to import.
_WITHOUT_TORCH = "import kernels.no_torch as torch; sys.modules['torch'] = torch"


def _send(pipe: Any, value: Any) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def work() -> None:
    """Compile what comes as `_Task`s on standard input, until it ends; builds, or errors, go to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks: SimpleQueue[_Task] = SimpleQueue()

    def read() -> None:
        with contextlib.suppress(EOFError):
            while True:
                tasks.put(pickle.load(sys.stdin.buffer))
        os._exit(0)

    Thread(target=read, daemon=True).start()
    # What Numba makes is a great many objects, of which few are garbage before this process is done.
    gc.disable()
    while True:
        task = tasks.get()
        for arch in task.archs:
            try:
                _send(answers, task.kernel.compile(arch))
            except BuildError as error:
                _send(answers, error)
                break
            except Exception as error:
                _send(answers, BuildError(f"{task.kernel.name}: does not compile for {arch}: {error!r}"))
                break
