"""What a machine does at most: which of kernel and torch reads, and how fast."""

from __future__ import annotations

import pytest
import torch

from engine.bench import ceilings
from engine.bench.ceilings import measure_ceilings, measure_read


def test_a_cpu_is_read_by_torch(monkeypatch: pytest.MonkeyPatch):
    took = iter([0.5, 0.25])
    monkeypatch.setattr(ceilings, "seconds", lambda run, device: (run(), next(took))[1])
    read = measure_read(torch.randn(1000), 2)
    assert read.samples == [4000 / 0.5, 4000 / 0.25]
    assert (read.backend, read.note) == ("reference", "read by torch's sum")


def test_ceilings_of_a_cpu():
    found = measure_ceilings(torch.device("cpu"))
    assert found.bandwidth and found.bandwidth > 1e8 and found.matrix_rate and found.matrix_rate > 1e8
    assert found.matrix_dtype == "float32"


@pytest.mark.gpu
def test_a_gpu_is_read_by_our_kernel_unless_it_is_not_for_it(monkeypatch: pytest.MonkeyPatch):
    source = torch.randn(1 << 26, device="cuda")
    ours = measure_read(source, 3)
    assert (ours.backend, ours.note) == ("cuda", "read by kernels.read")
    monkeypatch.setattr(ceilings, "why_unfit", lambda: "A GPU: too old")
    theirs = measure_read(source, 3)
    assert (theirs.backend, theirs.note) == ("reference", "read by torch's sum: A GPU: too old")
    assert min(ours.samples) > 0.9 * min(theirs.samples)
