"""stages/bench/peers.py: what others take, as far as it runs without a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_pipeline as tiny
import torch

from engine.model.config import ModelConfig
from engine.model.cost import Ceilings
from engine.model.weights import load_weights
from stages import bench
from stages.bench import peers
from stages.hf import load_model
from stages.host import read_host
from stages.metrics import Rows, check
from stages.params import Workload
from stages.stage import Run

BUNDLED = Path(__file__).resolve().parents[3] / "data" / "models" / "olmo2-tiny"
WORKLOAD = Workload("w", ("x",), (1,), (8,), 4, 2, 1, *tiny.MANY)


def test_without_a_gpu_every_row_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.pipeline())
    week = tiny.make_week(bench=("peers",))
    bench.main.__wrapped__(Run("bench"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]
    frame = tiny.read("reports/metrics/bench_w04.parquet")
    ours = frame[frame.suite == "peers"]
    context = tiny.make_context(Rows("bench", "w04", "tiny", read_host()), None)
    assert (
        len(ours) == len(peers.rows(context, True)) > 20
        and set(ours.status) == {"not_measured"}
        and ours.value.isna().all()
    )
    assert set(ours.note) == {"no GPU on this host"} and set(ours.backend) == {"torch", "transformers"}


def test_every_row_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "STEP_CASES", ((1, 8), (2, 8)))
    monkeypatch.setattr(torch, "compile", lambda forward, mode, fullgraph: forward)
    config = ModelConfig.from_file(BUNDLED)
    weights = load_weights(BUNDLED, config, "cpu", torch.bfloat16)
    rows = Rows("bench", "w06", "tiny", read_host())
    llm = SimpleNamespace(weights=weights, release=lambda: None)
    ceilings = Ceilings(1e9, 1e12)
    context = tiny.make_context(rows, llm, WORKLOAD, path=BUNDLED, config=config, ceilings=ceilings)
    peers.measure(context)
    check(rows.rows)
    listed = [(row["case"], row["metric"]) for row in peers.rows(context, True)]
    assert [(row["case"], row["metric"]) for row in rows.rows] == listed
    assert all(row["value"] > 0 and row["limit"] > 0 for row in rows.rows)
    o = next(row for row in rows.rows if row["case"] == "o, batch 8")
    size = config.hidden_size * config.q_size + 8 * (config.hidden_size + config.q_size)
    assert o["limit"] == pytest.approx(2 * size / 1e9 * 1e6)


def test_steps_are_transformers_own(monkeypatch: pytest.MonkeyPatch):
    """The loop over a static cache chooses what `generate` chooses."""
    model = load_model(BUNDLED, torch.float32, "cpu")
    torch.manual_seed(0)
    assert len(peers.time_steps(model, 2, 6, 3, None)) == 3
    seen = []

    def spying(forward, **options):
        assert options == {"mode": "reduce-overhead", "fullgraph": True}

        def run(**given):
            seen.append((int(given["input_ids"][0, 0]), int(given["position_ids"][0, 0])))
            return forward(**given)

        return run

    ids = torch.arange(5, 11)[None]
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: ids)
    peers.time_steps(model, 1, 6, 4, spying)
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert seen[4:] == [(int(token), 6 + place) for place, token in enumerate(whole[0, 6:])]
