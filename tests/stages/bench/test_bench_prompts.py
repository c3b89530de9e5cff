"""stages/bench: the suites of prompts, as far as they run without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch

from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, step_cost
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.reference import ReferenceOps
from stages import bench
from stages.bench import prompt_attention, prompt_lengths, prompt_products
from stages.bench.prompts import COMPUTE_RATE, make_suite
from stages.bench.suites import SUITES as ALL
from stages.host import read_host
from stages.metrics import Rows, check
from stages.params import Workload
from stages.stage import Run

CONFIG = ModelConfig.from_dict(tiny.ARCHITECTURE)
SUITES = ("prompt_lengths", "prompt_products", "prompt_attention")
WORKLOAD = Workload("w", ("x",), (1,), (8,), 4, 2, 1, *tiny.MANY)


def test_without_a_gpu_every_row_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.pipeline())
    week = tiny.make_week(bench=SUITES)
    bench.main.__wrapped__(Run("bench"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite.isin(SUITES)]
    context = tiny.make_context(Rows("bench", "w04", "tiny", read_host()), None)
    assert len(ours) == sum(len(list(ALL[name].rows(context, True))) for name in SUITES) > 100
    assert set(ours.status) == {"not_measured"} and set(ours.note) == {"no GPU on this host"}
    assert (
        set(ours.backend) == {"cuda", "torch", prompt_attention.PORTABLE, *prompt_attention.PEERS}
        and ours.value.isna().all()
    )


def engine(model: Model, step_tokens: int, captures: bool = False) -> Any:
    settings = SimpleNamespace(step_tokens=step_tokens, captures=captures)
    return SimpleNamespace(model=model, engine=settings, release=lambda: None)


def test_lengths_are_measured_beside_their_limit():
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps())
    rows = Rows("bench", "w05", "tiny", read_host())
    cases = [{"case": f"{tokens} tokens", "batch": 1, "prompt_tokens": tokens} for tokens in (24, 4000)]
    suite = make_suite("prompt_lengths", prompt_lengths.UNITS, cases, prompt_lengths.bench_length)
    suite.measure(tiny.make_context(rows, engine(model, 16), WORKLOAD, ceilings=Ceilings(1e15, 1e12)))
    check(rows.rows)
    found = {row["metric"]: row for row in rows.rows if row["prompt_tokens"] == 24}
    assert set(found) == {"ttft_ms", "prompt_throughput", "compute_rate"}  # memory is a GPU's
    flops = step_cost(model.footprint, [24], [24]).flops
    assert found["ttft_ms"]["limit"] == pytest.approx(flops / 1e12 * 1e3)
    assert found["compute_rate"]["limit"] == pytest.approx(1e12) and found["ttft_ms"]["value"] > 0
    rates = [24 / sample * 1e3 for sample in found["ttft_ms"]["samples"]]
    assert found["prompt_throughput"]["samples"] == pytest.approx(rates)
    long = [row for row in rows.rows if row["prompt_tokens"] == 4000]
    assert {row["status"] for row in long} == {"not_measured"} and "4000 positions" in long[0]["note"]


def test_a_prompt_beyond_the_models_positions_has_its_rope_scaled():
    class WithAPlan(ReferenceOps):
        def plan(self, *args: Any, **kwargs: Any) -> Any:
            return object()

    weights = random_weights(CONFIG, "cpu", torch.float32, 0)
    model = Model(CONFIG, weights, WithAPlan())
    most = CONFIG.max_position_embeddings
    assert prompt_lengths.stretch(model, most) == (model, None)
    longer, note = prompt_lengths.stretch(model, 8 * most)
    assert note == "beyond the model's positions: RoPE scaled by 8" and longer.max_positions == 8 * most
    assert longer.weights is weights and longer.config.rope.theta == CONFIG.rope.theta
    for stretched, own in ((getattr(m.attention[0], name) for m in (longer, model)) for name in ("cos", "sin")):
        assert torch.equal(stretched[::8], own)
    assert prompt_lengths.stretch(Model(CONFIG, weights, ReferenceOps()), 8 * most)[1] is None


def test_products_and_attention_beside_torch():
    model = Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps())
    rows = Rows("bench", "w05", "tiny", read_host())
    context = tiny.make_context(rows, engine(model, 16), WORKLOAD, ceilings=Ceilings(1e12, 1e12))
    products = [
        {"case": f"{name}, 8 tokens", "prompt_tokens": 8} | other
        for name in prompt_products.PRODUCTS
        for other in ({}, {"backend": "torch"})
    ]
    make_suite("prompt_products", COMPUTE_RATE, products, prompt_products.bench_product).measure(context)
    backends = ({}, *({"backend": name} for name in (prompt_attention.PORTABLE, *prompt_attention.PEERS)))
    attentions = [{"case": "2 x 16 tokens", "batch": 2, "prompt_tokens": 16} | other for other in backends]
    make_suite("prompt_attention", COMPUTE_RATE, attentions, prompt_attention.bench_attention).measure(context)
    check(rows.rows)
    products = [row for row in rows.rows if row["suite"] == "prompt_products"]
    assert len(products) == 8 and all(row["value"] > 0 and row["limit"] == 1e12 for row in products)
    assert [row["backend"] for row in products[:2]] == ["reference", "torch"]
    attention = {row["backend"]: row for row in rows.rows if row["suite"] == "prompt_attention"}
    assert attention["flash_attention_2"]["value"] > 0  # torch has one for the CPU too
    assert "no kernel for the prompts' attention" in attention["reference"]["note"]
    assert "no kernel for the prompts' attention" in attention[prompt_attention.PORTABLE]["note"]
    assert attention["cudnn"]["status"] == "not_measured" and attention["cudnn"]["note"].startswith("torch on cpu")


@pytest.mark.gpu
def test_suites_on_a_gpu():
    from engine.ops.cuda import CudaOps

    config = ModelConfig.from_dict(tiny.ARCHITECTURE | {"hidden_size": 128, "max_position_embeddings": 4096})
    weights = random_weights(config, "cuda", torch.bfloat16, 0)
    made = Model(config, weights, CudaOps("cuda", attention="flash", linear="tiled", sampling="split"))
    rows = Rows("bench", "w05", "tiny", read_host())
    context = tiny.make_context(rows, engine(made, 2048, True), WORKLOAD, gpu=True, ceilings=Ceilings(4e12, 7e14))
    for name in SUITES:
        ALL[name].measure(context)
    check(rows.rows)
    assert {row["status"] for row in rows.rows} == {"ok"} and all(row["value"] > 0 for row in rows.rows)
