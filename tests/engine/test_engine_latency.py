"""Timing of prompts and decode steps: names, what a case runs and costs, formats, and the command."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from engine_checkpoints import Reference
from typer.testing import CliRunner

from engine.bench.latency import Case, TooLarge, measure, measure_decode, measure_prompt, random_cache, records, render
from engine.cli.app import app
from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, step_cost
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.reference import ReferenceOps


@pytest.fixture(scope="module")
def model(olmo2: Reference) -> Model:
    config = ModelConfig.from_file(olmo2.path)
    return Model(config, random_weights(config, "cpu", torch.bfloat16, 0), ReferenceOps())


def test_names():
    for name, case in {"pp512": Case(512, 0, 0), "tg128": Case(0, 128, 0), "tg4 @ d100": Case(0, 4, 100)}.items():
        assert Case.parse(name) == case and case.name == name
    assert Case.parse(" pp16@d3") == Case(16, 0, 3)
    for name in ("", "pp", "pp0", "gt4", "tg4@100", "tg4 @ d1 x"):
        with pytest.raises(ValueError, match="a test is named like pp512"):
            Case.parse(name)


def test_a_decode_run_makes_its_tokens_after_the_context(model: Model, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[int]] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda batch, cache: (seen.append(batch.positions.tolist()), forward(batch, cache))[1]
    )
    samples = measure_decode(model, batch=3, steps=4, depth=10, repeats=2, graph=False)
    assert len(samples) == 2 and min(samples) > 0
    # Three sequences and an idle row: a short run first, then two of four steps.
    once = [[10 + step] * 3 + [step] for step in range(4)]
    assert seen == once[:3] + once + once


def test_a_prompt_goes_through_in_pieces(model: Model, monkeypatch: pytest.MonkeyPatch):
    sizes: list[tuple[int, int]] = []
    forward = model.forward

    def record(batch, cache):
        logits = forward(batch, cache)
        sizes.append((len(batch.tokens), len(logits)))
        return logits

    monkeypatch.setattr(model, "forward", record)
    measure_prompt(model, batch=2, prompt=5, depth=3, repeats=1, chunk=4)
    assert sizes == [(4, 0), (4, 1), (2, 1)] * 2


def test_results_and_formats(model: Model):
    ceilings = Ceilings(bandwidth=1e9, matrix_rate=1e18)
    case = Case(0, 4, 10)
    result = measure(model, case, 2, 3, False, 64, ceilings)
    cost = step_cost(model.footprint, [1, 1], [13, 13])
    assert result.limit == pytest.approx(cost.bytes / 1e9)
    assert result.limit is not None and result.share == pytest.approx(result.limit * 1e3 / result.step_ms)
    assert result.rates == pytest.approx([8 / sample for sample in result.samples])
    shared = {
        "model_type": "m", "model_size": 2**30, "model_n_params": 5e8, "backends": "reference", "n_batch": 64,
    }  # fmt: skip
    rows = records([result, measure(model, Case(6, 0, 0), 1, 1, False, 64, Ceilings())], **shared)
    assert json.loads(render(rows, "json")) == rows
    table = render(rows, "markdown").splitlines()
    assert len(table) == 4 and table[2].startswith("| m | 1.00 GiB | 0.50 B | reference | 64 | 2 | tg4 @ d10 | ")
    assert table[3].endswith(" |  |") and "± 0.00" in table[3]
    found = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["test"] for row in found] == ["tg4 @ d10", "pp6"] and "samples_ns" not in found[0]
    assert float(found[0]["avg_ts"]) == pytest.approx(rows[0]["avg_ts"])


def test_what_does_not_fit_is_refused(model: Model):
    with pytest.raises(TooLarge, match="513 positions; the model has 512"):
        random_cache(model, 1, 513)


def run(*args: str | Path):
    return CliRunner().invoke(app, ["bench", "latency", *map(str, args)])


def test_command(olmo2: Reference, tmp_path: Path):
    few = ("--repetitions", "1", "--new-tokens", "2", "--context", "4,600", "--batch", "1,2")
    result = run(olmo2.path, *few, "--format", "json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["test"], row["batch"]) for row in rows] == [
        ("pp4", 1), ("pp4", 2), ("tg2 @ d4", 1), ("tg2 @ d4", 2)
    ]  # fmt: skip
    assert all(row["avg_ts"] > 0 and row["limit_share"] > 0 for row in rows)
    assert result.stderr.count("left out: ") == 4 and "600 positions; the model has 512" in result.stderr

    (tmp_path / "config.json").write_text((olmo2.path / "config.json").read_text())
    table = run(tmp_path, "--weights", "random", "--tests", "tg2,pp3", "--repetitions", "1")
    assert table.exit_code == 0 and "tg2" in table.stdout and "pp3" in table.stdout, table.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "x"], "format = 'x'; it must be one of table, json, csv, markdown"),
        (["--batch", "1,a"], "batch = '1,a'; it must be positive integers"),
        (["--tests", "xx1"], "test 'xx1'; a test is named like"),
        (["--weights", "x"], "weights = 'x'"),
        (["--repetitions", "0"], "0 repetitions"),
    ],
)
def test_wrong_arguments(olmo2: Reference, args: list[str], message: str):
    result = run(olmo2.path, *args)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
