"""A model's matrices made into codes of 4 bits, a layer at a time: one layer and the stream between two are held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.model.quant.block import MATRICES, ROLES, Block
from engine.model.quant.calibration import advance, batches, moments, sequences
from engine.model.quant.grid import Grid, nearest_nf4
from engine.model.quant.int4 import Int4Matrix
from engine.model.quant.methods.autoround import Schedule, begin, learn
from engine.model.quant.methods.awq import fold, searched
from engine.model.quant.methods.gptq import gptq
from engine.model.quant.recipe import Recipe
from engine.model.quant.source import Source
from engine.model.quant.writer import Writer
from engine.model.rope import rope_tables


@dataclass
class Streams:
    """What calibration comes to between two layers, [S, T, H] each: of the quantised model, and of the model itself
    where a method asks for that."""

    quantised: Tensor
    exact: Tensor | None


@torch.no_grad()
def quantise(
    source: Path, out: Path, recipe: Recipe, tokens: Sequence[int] | None, device: torch.device | str = "cpu",
    done: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Write the checkpoint that `recipe` makes of the one in `source` to the folder `out`.

    A run that was ended is gone on with, to the same result. `done` is called with each layer's name when it is whole.

    Args:
        tokens: Of the calibration text; None where the recipe does not calibrate.

    Raises:
        ValueError: The recipe does not suit the model, there is too little text, or RunError: where `out` cannot be
            written. CheckpointError, ConfigError: `source` is not what it must be.
    """
    model = Source(source)
    calibration = None
    if recipe.calibrates:
        if tokens is None:
            raise ValueError(f"method = {recipe.method!r} needs a calibration text")
        length = min(recipe.length, model.config.max_position_embeddings)
        calibration = sequences(tokens, recipe.samples, length, recipe.seed)
    writer = Writer(model, out, recipe, _described(calibration))
    writer.write_outside()
    _Run(model, writer, recipe, torch.device(device)).layers(calibration, done)
    writer.finish()


def _described(calibration: Tensor | None) -> dict[str, Any]:
    if calibration is None:
        return {"calibration": None}
    digest = hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    return {"calibration": {"sequences": len(calibration), "tokens": calibration.shape[1], "sha256": digest}}


class _Run:
    def __init__(self, model: Source, writer: Writer, recipe: Recipe, device: torch.device) -> None:
        self.model, self.writer, self.recipe, self.device = model, writer, recipe, device
        self.dtype = torch.float32 if device.type == "cpu" else model.dtype  # of the arithmetic
        scales = torch.float16 if recipe.form == "gptq" else model.dtype
        self.grid = Grid(recipe.group_size, recipe.symmetric, scales)

    def layers(self, calibration: Tensor | None, done: Callable[[str], None]) -> None:
        streams = None if calibration is None else self._streams(calibration)
        length = 1 if calibration is None else calibration.shape[1]
        tables = rope_tables(self.model.config, length, self.device, self.model.dtype)
        for index in range(self.model.config.num_hidden_layers):
            weights = {name: tensor.to(self.device) for name, tensor in self.model.layer(index).items()}
            cos, sin = tables[self.model.config.layer_rope(index)]
            block = Block(self.model.config, index, {n: t.to(self.dtype) for n, t in weights.items()}, cos, sin)
            self._layer(block, {name: tensor.float() for name, tensor in weights.items()}, streams)
            done(f"layer {index}")

    def _streams(self, calibration: Tensor) -> Streams:
        embedding = self.model.tensor("model.embed_tokens.weight")
        stream = embedding[calibration].to(self.device, self.dtype)
        return Streams(stream, stream.clone() if self.recipe.method == "autoround" else None)

    def _layer(self, block: Block, weights: dict[str, Tensor], streams: Streams | None) -> None:
        if streams is not None and streams.exact is not None:
            advance(block, streams.exact)  # the layer's outputs, which autoround holds its own to
        if not self.writer.shard(block.index).exists():
            matrices = self._matrices(replace(block, weights=dict(block.weights)), weights, streams)
            rest = {name: tensor for name, tensor in weights.items() if name not in MATRICES}
            self.writer.write_layer(block.index, matrices, rest)
        if streams is not None:
            stored, rest = self.writer.read_layer(block.index)
            values = {name: matrix.to(self.device).dequantise(self.model.dtype) for name, matrix in stored.items()}
            read = {name: tensor.to(self.device, self.dtype) for name, tensor in (rest | values).items()}
            advance(replace(block, weights=read), streams.quantised)

    def _matrices(self, block: Block, weights: dict[str, Tensor], streams: Streams | None) -> dict[str, Int4Matrix]:
        """A layer's matrices; a method that folds factors changes `weights`, fp32, in place."""
        if streams is None:
            make = nearest_nf4 if self.recipe.method == "nf4" else self.grid.nearest
            return {name: make(weights[name]) for name in MATRICES}
        if self.recipe.method == "gptq":
            return self._gptq(block, weights, streams.quantised)
        found = moments(block, batches(streams.quantised), list(ROLES))
        if self.recipe.method == "awq":
            seconds = fold(weights, self.model.config, found, self.grid)
            return {n: searched(weights[n], seconds[role], self.grid) for role, names in ROLES.items() for n in names}
        assert streams.exact is not None
        roundings = {
            n: begin(weights[n], found[role].second, self.grid) for role, names in ROLES.items() for n in names
        }
        del found
        schedule = Schedule(self.recipe.steps, self.recipe.batch, self.recipe.seed + block.index)
        return learn(block, roundings, streams.quantised, streams.exact, self.grid, schedule)

    def _gptq(self, block: Block, weights: dict[str, Tensor], stream: Tensor) -> dict[str, Int4Matrix]:
        """Matrix after matrix: each is made for what those before it, as they are stored, give it to read."""
        matrices: dict[str, Int4Matrix] = {}
        for role, names in ROLES.items():
            second = moments(block, batches(stream), [role])[role].second
            for name in names:
                matrices[name] = gptq(weights[name], second, self.grid, self.recipe.order)
                block.weights[name] = matrices[name].dequantise(self.model.dtype).to(self.dtype)
        return matrices
