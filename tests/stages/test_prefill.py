"""stages/prefill.py: prompts of several lengths, as far as they run without a GPU."""

import pytest
import tiny_pipeline as tiny
import torch

from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, step_cost
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.reference import ReferenceOps
from stages import bench, prefill
from stages.host import read_host
from stages.metrics import Rows, check
from stages.params import Workload
from stages.stage import Run

CONFIG = ModelConfig.from_dict(tiny.ARCHITECTURE)
WORKLOAD = Workload("w", ("x",), (1,), (8,), 4, 2, 1, *tiny.MANY)


def test_without_a_gpu_every_row_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.pipeline())
    week = tiny.make_week(bench=prefill.SUITES)
    bench.main.__wrapped__(Run("bench"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite.isin(prefill.SUITES)]
    assert len(ours) == sum(len(prefill.list_cases(suite)) * len(prefill.METRICS[suite]) for suite in prefill.SUITES)
    assert set(ours.status) == {"not_measured"} and set(ours.note) == {"no GPU on this host"}
    assert set(ours.backend) == {"cuda", "torch", prefill.PORTABLE, *prefill.PEERS} and ours.value.isna().all()


def test_lengths_are_measured_beside_their_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefill, "TOKENS", (24, 4000))
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps())
    rows = Rows("bench", "w05", "tiny", read_host())
    prefill.bench(
        prefill.LENGTHS, rows, model, WORKLOAD, Ceilings(1e15, 1e12), 16, False, dtype="bfloat16", backend="cuda"
    )
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


def test_a_prompt_beyond_the_models_positions_has_its_rope_scaled():
    class WithAPlan(ReferenceOps):
        def plan(self, *args, **kwargs):
            return ()

    weights = random_weights(CONFIG, "cpu", torch.float32, 0)
    model = Model(CONFIG, weights, WithAPlan())
    most = CONFIG.max_position_embeddings
    assert prefill.stretch(model, most) == (model, None)
    longer, note = prefill.stretch(model, 8 * most)
    assert note == "beyond the model's positions: RoPE scaled by 8" and longer.max_positions == 8 * most
    assert longer.weights is weights and longer.config.rope.theta == CONFIG.rope.theta
    for stretched, own in zip(longer.tables[0], model.tables[0], strict=True):
        assert torch.equal(stretched[::8], own)
    assert prefill.stretch(Model(CONFIG, weights, ReferenceOps()), 8 * most)[1] is None


def test_products_and_attention_beside_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefill, "PRODUCT_TOKENS", (8,))
    monkeypatch.setattr(prefill, "ATTENTION_SIZES", ((2, 16),))
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps())
    rows = Rows("bench", "w05", "tiny", read_host())
    for suite in (prefill.PRODUCTS, prefill.ATTENTION):
        prefill.bench(suite, rows, model, WORKLOAD, Ceilings(1e12, 1e12), 16, False, dtype="bfloat16", backend="cuda")
    check(rows.rows)
    products = [row for row in rows.rows if row["suite"] == prefill.PRODUCTS]
    assert len(products) == 8 and all(row["value"] > 0 and row["limit"] == 1e12 for row in products)
    assert [row["backend"] for row in products[:2]] == ["cuda", "torch"]
    attention = {row["backend"]: row for row in rows.rows if row["suite"] == prefill.ATTENTION}
    assert attention["flash_attention_2"]["value"] > 0  # torch has one for the CPU too
    assert "no kernel for the prompts' attention" in attention["cuda"]["note"]
    assert "no kernel for the prompts' attention" in attention[prefill.PORTABLE]["note"]
    assert attention["cudnn"]["status"] == "not_measured" and attention["cudnn"]["note"].startswith("torch on cpu")


@pytest.mark.gpu
def test_suites_on_a_gpu():
    from engine.ops.cuda import CudaOps

    config = ModelConfig.from_dict(tiny.ARCHITECTURE | {"hidden_size": 128, "max_position_embeddings": 4096})
    weights = random_weights(config, "cuda", torch.bfloat16, 0)
    made = Model(config, weights, CudaOps("cuda", attention="flash", linear="tiled", sampling="split"))
    rows = Rows("bench", "w05", "tiny", read_host())
    for suite in prefill.SUITES:
        prefill.bench(suite, rows, made, WORKLOAD, Ceilings(4e12, 7e14), 2048, True, dtype="bfloat16", backend="cuda")
    check(rows.rows)
    assert {row["status"] for row in rows.rows} == {"ok"} and all(row["value"] > 0 for row in rows.rows)
