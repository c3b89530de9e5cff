"""stages/prefill.py: prompts of several lengths, as far as they run without a GPU."""

import pytest
import tiny_pipeline as tiny
import torch

from engine.config import ModelConfig
from engine.cost import Ceilings, step_cost
from engine.model import Model
from engine.ops import ReferenceOps
from engine.weights import random_weights
from stages import bench, prefill
from stages.host import read_host
from stages.metrics import Rows, check
from stages.params import Workload
from stages.stage import Run

CONFIG = ModelConfig.from_dict(tiny.ARCHITECTURE)
WORKLOAD = Workload("w", ("x",), (1,), (8,), 4, 2, 1)


def test_without_a_gpu_every_row_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.pipeline())
    week = tiny.make_week(bench=(prefill.LENGTHS,))
    bench.main.__wrapped__(Run("bench"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite == prefill.LENGTHS]
    assert len(ours) == len(prefill.TOKENS) * len(prefill.METRICS) and set(ours.status) == {"not_measured"}
    assert set(ours.note) == {"no GPU on this host"} and set(ours.backend) == {"cuda"} and ours.value.isna().all()


def test_lengths_are_measured_beside_their_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefill, "TOKENS", (24, 4000))
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps())
    rows = Rows("bench", "w05", "tiny", read_host())
    prefill.bench(rows, model, WORKLOAD, Ceilings(1e15, 1e12), 16, False, dtype="bfloat16", backend="cuda")
    check(rows.rows)
    found = {row["metric"]: row for row in rows.rows if row["prompt_tokens"] == 24}
    assert set(found) == {"ttft_ms", "prompt_throughput", "compute_rate"}  # memory is a GPU's
    flops = step_cost(CONFIG, "bfloat16", [24], [24]).flops
    assert found["ttft_ms"]["limit"] == pytest.approx(flops / 1e12 * 1e3)
    assert found["compute_rate"]["limit"] == pytest.approx(1e12) and found["ttft_ms"]["value"] > 0
    rates = [24 / sample * 1e3 for sample in found["ttft_ms"]["samples"]]
    assert found["prompt_throughput"]["samples"] == pytest.approx(rates)
    long = [row for row in rows.rows if row["prompt_tokens"] == 4000]
    assert {row["status"] for row in long} == {"not_measured"} and "4000 positions" in long[0]["note"]
