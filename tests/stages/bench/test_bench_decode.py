"""stages/bench: the suites of the decode step, as far as they run without a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch

from engine.bench.latency import random_cache
from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, Footprint, step_cost
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.reference import ReferenceOps
from stages import bench
from stages.bench.decode_step import STEP, UNITS, bench_step, make_suite, name_case
from stages.bench.graphs import GRAPHS
from stages.bench.kernels import KERNELS, PARTS, list_parts
from stages.bench.suites import SUITES as ALL
from stages.host import read_host
from stages.metrics import Rows, check
from stages.params import Workload
from stages.stage import Run

CONFIG = ModelConfig.from_dict(tiny.ARCHITECTURE)
LLAMA = ModelConfig.from_dict(
    tiny.ARCHITECTURE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
)
SUITES = (STEP, KERNELS.name, GRAPHS.name)
WORKLOAD = Workload("w", ("x",), (1,), (8,), 4, 2, 1, *tiny.MANY)


def model(config: ModelConfig = CONFIG) -> Model:
    return Model(config, random_weights(config, "cpu", torch.bfloat16, 0), ReferenceOps())


def engine(made: Model, captures: bool = False) -> Any:
    return SimpleNamespace(model=made, engine=SimpleNamespace(captures=captures), release=lambda: None)


def test_without_a_gpu_every_row_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.pipeline())
    week = tiny.make_week(bench=SUITES)
    bench.main.__wrapped__(Run("bench"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite.isin(SUITES)]
    assert set(ours.suite) == set(SUITES) and set(ours.status) == {"not_measured"} and ours.value.isna().all()
    assert set(ours.note) == {"no GPU on this host"} and set(ours.backend) == {"cuda"}
    context = tiny.make_context(Rows("bench", "w04", "tiny", read_host()), None)
    expected = [(row["suite"], row["case"], row["metric"]) for name in SUITES for row in ALL[name].rows(context, True)]
    assert list(zip(ours.suite, ours.case, ours.metric, strict=True)) == expected and len(expected) > 80


def test_steps_are_measured_beside_their_limit():
    ceilings = Ceilings(bandwidth=1e9, matrix_rate=1e18)
    found = bench_step(model(), WORKLOAD, ceilings, False, batch=2, context=10)
    (case, metric, samples, limit, kind), (_, other, rates, best, _) = found
    assert (case, metric, other) == ("batch 2 context 10", "step_ms", "output_throughput")
    assert limit == pytest.approx(
        step_cost(Footprint.dense(CONFIG, torch.bfloat16), [1, 1], [13, 13]).bytes / 1e9 * 1e3
    )
    assert len(samples) == len(rates) == 2 and min(samples) > 0 and kind == "read bandwidth over weight + KV bytes"
    assert (
        limit is not None
        and rates == pytest.approx([2 / sample * 1e3 for sample in samples])
        and best == pytest.approx(2 / limit * 1e3)
    )


def test_a_case_that_does_not_fit_is_a_row_with_the_reason():
    rows = Rows("bench", "w05", "tiny", read_host())
    suite = make_suite(
        STEP, UNITS, [(1, 16), (1, 1024)], lambda size: [(name_case(*size), m) for m in UNITS], bench_step
    )
    suite.measure(tiny.make_context(rows, engine(model()), WORKLOAD, ceilings=Ceilings(1e9, 1e12)))
    check(rows.rows)
    found = {(row["context"], row["status"]): row["note"] for row in rows.rows}
    assert found == {(16, "ok"): None, (1024, "not_measured"): "1028 positions; the model has 256"}


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["norms after", "norms before"])
def test_parts_are_the_whole_step(config: ModelConfig):
    with torch.inference_mode():
        made = model(config)
        parts = list_parts(made, random_cache(made, 3, 21), 3, 20)
        for part in parts:
            for call in part.calls:
                call()
    names = [name for name in PARTS if name != "norm" or config is CONFIG]
    assert [part.name for part in parts] == names
    counts = {part.name: len(part.calls) for part in parts}
    assert counts["qkv"] == counts["attention"] == counts["down"] == 4 and counts["add_norm"] == 8
    # All but the norms' weights, and activations beside them.
    moved = sum(part.bytes for part in parts)
    cost = step_cost(made.footprint, [1] * 3, [21] * 3)
    assert cost.bytes - 2 * 9 * 4 * 64 * 2 < moved < 1.5 * cost.bytes
    assert made.footprint == Footprint.dense(config, torch.bfloat16)


@pytest.mark.gpu
def test_suites_on_a_gpu(tmp_path: Path):
    from engine.ops.cuda import CudaOps

    config = ModelConfig.from_dict(tiny.ARCHITECTURE | {"hidden_size": 128, "max_position_embeddings": 2048})
    weights = random_weights(config, "cuda", torch.bfloat16, 0)
    made = Model(config, weights, CudaOps("cuda", attention="flash", linear="tiled", sampling="split"))
    rows = Rows("bench", "w06", "tiny", read_host())
    context = tiny.make_context(rows, engine(made, True), WORKLOAD, gpu=True, ceilings=Ceilings(4e12, 7e14))
    for name in SUITES:
        ALL[name].measure(context)
    check(rows.rows)
    assert {row["status"] for row in rows.rows} == {"ok"} and all(row["value"] > 0 for row in rows.rows)
