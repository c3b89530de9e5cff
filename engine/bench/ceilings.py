"""What a machine does at most: how fast it reads its memory and multiplies matrices; a step's least time follows.

Decode steps only read, so the bandwidth is that of a read, not of a copy, half of which is writing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.bench.latency import seconds
from engine.config import why_unfit
from engine.model.cost import Ceilings

READS = 16  # of a sample on a GPU: all launches but the first hide behind the read before


@dataclass(frozen=True)
class Read:
    """How fast memory was read, by our kernel (backend "cuda") or by torch's sum ("reference"), which `note` says."""

    samples: list[float]  # B/s
    backend: str
    note: str


def measure_read(source: torch.Tensor, repeats: int) -> Read:
    """Read all of source, far larger than any cache, again and again.

    source: float32 [n], on a GPU n a multiple of 4096. Our kernel reads it where the GPU runs our kernels.
    """
    gpu = source.device.type == "cuda"
    unfit = why_unfit() if gpu else None
    if gpu and unfit is None:
        once, backend, note = _stream(source), "cuda", "read by kernels.read"
    else:
        once, backend, note = source.sum, "reference", "read by torch's sum" + (f": {unfit}" if unfit else "")
    reads = READS if gpu else 1

    def run() -> None:
        for _ in range(reads):
            once()

    run()  # compiles what is not kept
    samples = [reads * source.nbytes / seconds(run, source.device) for _ in range(repeats)]
    return Read(samples, backend, note)


def _stream(source: torch.Tensor) -> Callable[[], Any]:
    """A call that reads source once, by our kernel."""
    from kernels import read  # it imports numba, which takes a second

    out = torch.empty(read.blocks(source.get_device()), 32 * read.WARPS, 4, dtype=torch.int32, device=source.device)
    words = source.view(torch.int32)
    return lambda: read.read(words, out)


def measure_ceilings(device: torch.device) -> Ceilings:
    """The medians of reading a buffer beyond any cache and of a matrix product (bf16, on a CPU fp32)."""
    gpu = device.type == "cuda"
    elements, size, dtype = (1 << 28, 8192, torch.bfloat16) if gpu else (1 << 26, 1024, torch.float32)
    read = measure_read(torch.randn(elements, device=device), 12)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    took = statistics.median(seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(12))
    return Ceilings(statistics.median(read.samples), 2.0 * size**3 / took, str(dtype).removeprefix("torch."))
