"""A model is quantised a layer at a time: better than by rounding to nearest, resumably, into what readers know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from engine_checkpoints import Reference
from torch import Tensor

from engine.cli.app import app
from engine.model.config import ModelConfig
from engine.model.quant import quantise as driver
from engine.model.quant.block import ROLES, Block
from engine.model.quant.calibration import advance, moments, read_texts, sequences
from engine.model.quant.grid import Grid, nearest_nf4
from engine.model.quant.int4 import NF4_LEVELS, Int4Matrix
from engine.model.quant.linear import Int4Linear
from engine.model.quant.methods import awq
from engine.model.quant.methods.gptq import ORDERS, Order, column_order, gptq
from engine.model.quant.quantise import quantise
from engine.model.quant.recipe import Recipe
from engine.model.quant.source import Source
from engine.model.quant.writer import RunError
from engine.model.rope import rope_tables
from engine.model.tensors import checkpoint_tensors
from engine.model.transformer import Model
from engine.model.weights import load_weights
from engine.ops.batch import Batch
from engine.ops.reference import ReferenceOps

TOKENS = [i * i * 31 % 509 for i in range(2000)]
SMALL = Recipe(method="gptq", group_size=32, samples=16, length=48, steps=30, batch=8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def block_of(reference: Reference, index: int, length: int) -> Block:
    source = Source(reference.path)
    weights = {name: tensor.float() for name, tensor in source.layer(index).items()}
    tables = rope_tables(source.config, length, torch.device("cpu"), torch.float32)
    return Block(source.config, index, weights, *tables[source.config.layer_rope(index)])


def test_a_block_is_the_models_layer(reference: Reference):
    """Of every architecture, windows and norms before or behind the branches included."""
    config = ModelConfig.from_file(reference.path)
    weights = load_weights(reference.path, config, "cpu", torch.float32)
    for tensor in checkpoint_tensors(config):  # as the blocks have them
        weights.write(tensor, weights.read(tensor).bfloat16().float())
    model, seen = Model(config, weights, ReferenceOps(), 64), {}
    tokens = torch.tensor(TOKENS[:40], dtype=torch.int32)
    batch = Batch(tokens, torch.zeros_like(tokens), torch.arange(40, dtype=torch.int32))
    model.forward(batch, model.new_cache(1, 64), lambda name, tensor: seen.__setitem__(name, tensor.clone()))
    x = seen["embedding"][None]
    for index in range(config.num_hidden_layers):
        x = block_of(reference, index, 64).forward(x)
        torch.testing.assert_close(x[0], seen[f"layers.{index}"], rtol=2e-4, atol=2e-4)


def calibrated(weight: Tensor, x: Tensor, matrix: Int4Matrix) -> float:
    """Mean square of what a matrix' outputs for inputs x [T, K] are off."""
    return (x @ (matrix.dequantise(torch.float32) - weight).t()).square().mean().item()


def correlated(count: int, columns: int) -> Tensor:
    torch.manual_seed(3)
    sizes = torch.rand(columns) ** 3 * 4 + 0.05
    return (torch.randn(count, 24) @ torch.randn(24, columns) + torch.randn(count, columns)) * sizes


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", ORDERS)
def test_gptq_on_inputs_that_depend_on_each_other(order: Order, symmetric: bool):
    x = correlated(600, 128)
    weight = torch.randn(48, 128) * 0.05
    second, grid = x.t() @ x / len(x), Grid(32, symmetric, torch.float16)
    found = gptq(weight, second, grid, order)
    assert (found.g_idx is not None) == (order == "columns") and (found.zeros is None) == symmetric
    assert calibrated(weight, x, found) < 0.5 * calibrated(weight, x, grid.nearest(weight))
    assert calibrated(weight, x, found) < 0.8 * calibrated(weight, x, awq.searched(weight, second, grid))


def test_gptq_of_whole_rows_and_of_inputs_that_are_never_there():
    x = correlated(300, 64)
    x[:, 5] = 0
    weight = torch.randn(16, 64) * 0.05
    for size in (-1, 64):
        found = gptq(weight, x.t() @ x, Grid(size, True, torch.float16), "groups")
        assert found.scales.shape == (16, 1) and found.dequantise(torch.float32).isfinite().all()
        assert calibrated(weight, x, found) < calibrated(weight, x, Grid(-1, True, torch.float16).nearest(weight))
    with pytest.raises(ValueError, match="64 inputs are not whole groups of 128"):
        gptq(weight, x.t() @ x, Grid(128, True, torch.float16), "none")
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq(weight, x.t() @ x * torch.nan, Grid(32, True, torch.float16), "none")


def test_column_orders():
    diagonal = torch.tensor([1.0, 3, 2, 0, 9, 4, 5, 7])
    assert column_order(diagonal, 4, "none").tolist() == [*range(8)]
    assert column_order(diagonal, 4, "groups").tolist() == [4, 7, 6, 5, 1, 2, 0, 3]
    assert column_order(diagonal, 4, "columns").tolist() == [4, 7, 6, 5, 1, 2, 0, 3]
    mixed = torch.tensor([1.0, 8, 2, 0, 9, 4, 5, 7])
    assert column_order(mixed, 4, "groups").tolist() == [4, 7, 6, 5, 1, 2, 0, 3]
    assert column_order(mixed, 4, "columns").tolist() == [4, 1, 7, 6, 5, 2, 0, 3]


def test_grids():
    weight = torch.randn(8, 64)
    for symmetric in (True, False):
        grid = Grid(32, symmetric, torch.bfloat16)
        groups = grid.groups(weight)
        near = grid.nearest(weight)
        step = near.scales.float()[..., None].abs()
        assert (
            (near.dequantise(torch.float32).view_as(groups) - groups).abs() <= step * (1.01 if symmetric else 0.6)
        ).all()
        scales, _ = grid.search(groups, lambda off: off.square().sum(-1))
        assert (scales < 0).any() == symmetric
    zero = Grid(32, True, torch.bfloat16).nearest(torch.zeros(2, 64))
    assert (zero.dequantise(torch.bfloat16) == 0).all() and (zero.scales == 1).all()


def test_nf4_takes_the_nearest_level():
    weight = torch.randn(4, 96)
    weight[1, 3] = 0
    matrix = nearest_nf4(weight)
    blocks, levels = weight.view(-1, 64), torch.tensor(NF4_LEVELS)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    wanted = levels[(scaled[..., None] - levels).abs().argmin(-1)] * blocks.abs().amax(1, keepdim=True)
    assert torch.equal(matrix.dequantise(torch.float32), wanted.view_as(weight))


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_awq_folds_change_nothing_but_the_rounding(references: Any, kind: str):
    """Before anything is rounded, a layer with factors folded in computes what it did."""
    block = block_of(references(kind), 1, 32)
    x = torch.randn(4, 32, 128)
    x[..., 7] *= 20
    wanted = block.forward(x)
    found = moments(block, [x], list(ROLES))
    weights = dict(block.weights)
    seconds = awq.fold(weights, block.config, found, Grid(32, True, torch.float16))
    changed = {name for name in weights if not torch.equal(weights[name], block.weights[name])}
    behind = {"self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"}
    if kind == "olmo2":
        assert changed == behind
    else:
        assert changed > behind | {"input_layernorm", "post_attention_layernorm"}
    folded = replace(block, weights=weights)
    torch.testing.assert_close(folded.forward(x), wanted, rtol=1e-3, atol=1e-4)
    again = moments(folded, [x], list(ROLES))
    for role in ROLES:
        torch.testing.assert_close(again[role].second, seconds[role], rtol=1e-2, atol=1e-3)


def loss_of(reference: Reference, path: Path) -> float:
    """Mean square of what the stream behind the last layer is off, over text that was not calibrated on."""
    streams = []
    for folder in (reference.path, path):
        config = ModelConfig.from_file(folder)
        weights = load_weights(folder, config, "cpu", torch.bfloat16)
        named = {t.name.removesuffix(".weight"): weights.read(t).float() for t in checkpoint_tensors(config)}
        x = named["model.embed_tokens"][torch.tensor(TOKENS[1500:1980]).view(10, 48)]
        tables = rope_tables(config, 48, torch.device("cpu"), torch.bfloat16)
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            own = {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
            advance(Block(config, index, own, *tables[config.layer_rope(index)]), x)
        streams.append(x)
    return (streams[0] - streams[1]).square().mean().item()


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_methods_are_better_than_rounding(references: Any, tmp_path: Path, kind: str):
    reference = references(kind)
    losses = {}
    for method in ("rtn", "gptq", "awq", "autoround"):
        recipe = replace(SMALL, method=method, form="gptq" if method == "awq" else "compressed-tensors")
        quantise(reference.path, tmp_path / method, recipe, TOKENS[:1500] if recipe.calibrates else None)
        losses[method] = loss_of(reference, tmp_path / method)
    assert losses["gptq"] < losses["rtn"] and losses["awq"] < losses["rtn"] and losses["autoround"] < losses["rtn"]


@pytest.mark.parametrize(
    ("recipe", "method", "calibrates"),
    [
        (Recipe(method="rtn", group_size=64, symmetric=False), "compressed-tensors", False),
        (Recipe(method="rtn", group_size=-1), "compressed-tensors", False),
        (Recipe(method="nf4", form="bitsandbytes"), "bitsandbytes", False),
        (replace(SMALL, form="gptq", order="columns", symmetric=False), "gptq", True),
    ],
    ids=["rtn asymmetric", "rtn rows", "nf4", "gptq with its order"],
)
def test_what_is_written(olmo2: Reference, tmp_path: Path, recipe: Recipe, method: str, calibrates: bool):
    out, done = tmp_path / "out", []
    quantise(olmo2.path, out, recipe, TOKENS if calibrates else None, done=done.append)
    assert done == ["layer 0", "layer 1", "layer 2"] and not (tmp_path / "out.part").exists()
    config = ModelConfig.from_file(out)
    assert config.quantization is not None and config.quantization.method == method
    weights = load_weights(out, config, "cpu", torch.bfloat16)
    for layer in weights.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            assert isinstance(linear, Int4Linear)
            assert (linear.matrix.zeros is None) == (recipe.symmetric or linear.matrix.nf4)
    own = load_weights(olmo2.path, config, "cpu", torch.bfloat16)
    for tensor in checkpoint_tensors(config):
        got, wanted = weights.read(tensor).float(), own.read(tensor).float()
        if "_proj" not in tensor.name:
            assert torch.equal(got, wanted), tensor.name
        else:
            assert (got - wanted).square().mean() < 0.02 * wanted.square().mean(), tensor.name
    record = json.loads((out / "quantization.json").read_text())
    assert record["method"] == recipe.method and record["seed"] == 0
    assert (record["calibration"] is not None) == calibrates
    assert (out / "tokenizer.json").read_bytes() == (olmo2.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_a_run_that_was_killed_goes_on_to_the_same_result(
    olmo2: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
):
    recipe = replace(SMALL, method=method, steps=4)
    quantise(olmo2.path, tmp_path / "whole", recipe, TOKENS)

    def killed(name: str) -> None:
        if name == "layer 1":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantise(olmo2.path, out, recipe, TOKENS, done=killed)
    assert not out.exists()
    with pytest.raises(RunError, match=r"out.part is of a run with seed = 0, this one has 1"):
        quantise(olmo2.path, out, replace(recipe, seed=1), TOKENS)
    with pytest.raises(RunError, match=r"is of a run with calibration = .*remove it, or go on with the same"):
        quantise(olmo2.path, out, recipe, TOKENS[::-1])
    made: list[int] = []
    whole = driver._Run._matrices
    monkeypatch.setattr(
        driver._Run, "_matrices", lambda run, block, *rest: made.append(block.index) or whole(run, block, *rest)
    )
    quantise(olmo2.path, out, recipe, TOKENS)
    assert made == [2]
    files = sorted(file.name for file in out.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "whole").iterdir())
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(RunError, match=r"out exists; name a folder that does not"):
        quantise(olmo2.path, out, recipe, TOKENS)
    with pytest.raises(ValueError, match="its weights have 4 bits already"):
        quantise(out, tmp_path / "again", recipe, TOKENS)


def test_calibration_text(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    assert read_texts(tmp_path) == ["first", "second"] and read_texts(tmp_path / "a.txt") == ["first"]
    with pytest.raises(ValueError, match=r"c.bin: not text in UTF-8"):
        read_texts(tmp_path / "c.bin")
    with pytest.raises(ValueError, match="there is no such file or folder of calibration text"):
        read_texts(tmp_path / "absent")
    drawn = sequences(range(100), 3, 10, seed=5)
    assert drawn.shape == (3, 10) and torch.equal(drawn, sequences(range(100), 3, 10, seed=5))
    assert not torch.equal(drawn, sequences(range(100), 3, 10, seed=6))
    assert all(row.tolist() == [*range(row[0], row[0] + 10)] and row[0] % 10 == 0 for row in drawn)
    assert sequences(range(25), 99, 10, seed=0).shape == (2, 10)
    with pytest.raises(ValueError, match="has 9 tokens, not one sequence of 10"):
        sequences(range(9), 1, 10, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, "method = 'magic'; it must be one of rtn, gptq, awq, nf4, autoround"),
        ({"group_size": 100}, "group_size = 100; it must be one of 32, 64, 128, -1"),
        ({"method": "nf4"}, "method = 'nf4' with form = 'compressed-tensors'; nf4 is stored as bitsandbytes"),
        ({"method": "gptq", "order": "columns"}, "order = 'columns' with form = 'compressed-tensors'; it needs"),
        ({"steps": 0}, "steps = 0; it must be at least 1"),
    ],
)
def test_recipes_are_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_command(olmo2: Reference, tmp_path: Path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog; def main(): return [x for x in range(10)]\n" * 40)
    run = typer.testing.CliRunner().invoke
    out = tmp_path / "out"
    options = ["--method", "gptq", "--group-size", "64", "--calibration", str(text), "--length", "32", "--samples", "8"]
    result = run(app, ["quantize", str(olmo2.path), str(out), *options, "--device", "cpu"])
    assert result.exit_code == 0 and "bytes of weights" in result.output, result.output
    assert ModelConfig.from_file(out).quantization is not None
    shown = run(app, ["inspect", str(out)])
    assert "compressed-tensors: 21 linear layers of 4 bits" in " ".join(shown.output.split())
    base = ["quantize", str(olmo2.path), str(tmp_path / "no"), "--length", "32", "--device", "cpu"]
    for wrong, message in (
        (["--method", "rtn", "--calibration", str(text)], "takes no calibration text"),
        (["--method", "gptq", "--calibration", str(tmp_path / "absent")], "no such file or folder of calibration text"),
        (["--method", "gptq", "--calibration", str(text)], "320 inputs are not whole groups of 128"),
    ):
        failed = run(app, [*base, *wrong])
        assert failed.exit_code == 2 and message in failed.output, failed.output
