"""How things are timed: warm up, then device events or a synchronised clock; one measurement at a time on a host."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout


def measure(fn: Callable[[], Any], warmup: int, repeats: int, device: str | torch.device = "cpu") -> list[float]:
    """Milliseconds of each of `repeats` calls of `fn` after `warmup` untimed ones.

    On a GPU by CUDA events on the current stream, each call synchronised before the next; on a CPU by the wall clock.
    Keep all samples; report their median.
    """
    for _ in range(warmup):
        fn()
    if torch.device(device).type != "cuda":
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            fn()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples
    torch.cuda.synchronize(device)
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


@contextlib.contextmanager
def measurement_lock() -> Iterator[None]:
    """Holds the host's one lock for measurements, so that two experiments never share the GPU (or the cores); waits for
    it.

    It lies outside the working directory because queued experiments run in directories of their own.
    """
    path = Path(tempfile.gettempdir()) / f"afs-measurement-{os.getuid()}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waits for another measurement on this host ({path})", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
