"""Week 2: the time from a checkpoint's files to weights on the device."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from stages.bench.context import Context
from stages.bench.suite import Suite


def evict(path: Path) -> None:
    """Asks the kernel to drop the file from its page cache, so that the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_through(paths: list[Path]) -> float:
    """Seconds to read the files from beginning to end into one buffer."""
    buffer = bytearray(16 << 20)
    begin = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def measure(context: Context) -> None:
    """Seconds from files to weights on the device, with the page cache dropped (cold) and filled (warm).

    The limit is the plain reading of the same files in the same state.
    """
    import torch

    from engine.model.weights import load_weights

    files = sorted(context.path.resolve().glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    dtype = context.config.dtype or "bfloat16"
    large = size > 2 << 30
    for case in ("cold", "warm"):
        seconds, plain_seconds = [], []
        for _ in range(1 if large else context.workload.repeats):
            for spent in (plain_seconds, seconds):
                if case == "cold":
                    for path in files:
                        evict(path)
                if spent is plain_seconds:
                    plain_seconds.append(read_through(files))
                else:
                    weights = load_weights(
                        context.path, context.config, context.device, getattr(torch, dtype), context.ops
                    )
                    assert weights.statistics is not None
                    seconds.append(weights.statistics.seconds)
                    del weights
        least = min(plain_seconds)
        shared: dict[str, Any] = {
            "suite": "load",
            "case": case,
            "dtype": dtype,
            "note": f"{size} bytes on {context.device}",
        }
        shared |= {"limit_kind": f"reading the same files, {case} page cache"}
        context.rows.add(
            metric="load_seconds", value=None, samples=seconds, unit="s", better="lower", limit=least, **shared
        )  # fmt: skip
        context.rows.add(
            metric="load_gbs", value=None, samples=[size / 1e9 / s for s in seconds], unit="GB/s", better="higher",
            limit=size / 1e9 / least, **shared,
        )  # fmt: skip


LOAD = Suite("load", measure)
