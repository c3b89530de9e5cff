"""The bundled model, quantised: transformers reads the weights that this engine does, and methods beat rounding."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bench.quality import compare, windows
from engine.model.config import ModelConfig
from engine.model.quant.quantise import quantise
from engine.model.quant.recipe import Recipe
from engine.model.tensors import checkpoint_tensors
from engine.model.transformer import Model
from engine.model.weights import load_weights
from engine.ops.reference import ReferenceOps
from engine.text.tokenizer import Tokenizer

BUNDLED = Path("data/models/olmo2-tiny")
# Of what transformers multiplies with: record_quantized_tiny.py.
READ_BY_TRANSFORMERS = {
    "rtn": "e02348244db49421102155e2a3a8b2bd859932a229a35c47a85f6a46546c5ee4",
    "rtn-asym": "a7fb0637c987e2ba931784624efef22173a08ede0f0bf6dce9ded08c1e2e15ed",
    "rtn-row": "d2ea2bcc40f0a3193428dfb35eefe29239139a034e8841153db49bfe7f6e32fa",
    "nf4": "16ae2725ff785830b5db3104c15df6468287a670640c43acdfe5f9a3c46ad839",
}
RECIPES = {
    "rtn": Recipe(method="rtn"),
    "rtn-asym": Recipe(method="rtn", symmetric=False, group_size=32),
    "rtn-row": Recipe(method="rtn", group_size=-1),
    "nf4": Recipe(method="nf4", form="bitsandbytes"),
}


def loaded(path: Path) -> Model:
    config = ModelConfig.from_file(path)
    return Model(config, load_weights(path, config, "cpu", torch.bfloat16), ReferenceOps(), 512)


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_multiplies_with_the_same_weights(tmp_path: Path, name: str):
    quantise(BUNDLED, tmp_path / "out", RECIPES[name], None)
    model, digest = loaded(tmp_path / "out"), hashlib.sha256()
    matrices = [t for t in checkpoint_tensors(model.config) if len(t.shape) == 2 and t.field != "embedding"]
    for tensor in sorted(matrices, key=lambda tensor: tensor.name):
        value = model.weights.read(tensor).contiguous().view(torch.uint8)
        digest.update(tensor.name.removesuffix(".weight").encode() + value.numpy().tobytes())
    assert digest.hexdigest() == READ_BY_TRANSFORMERS[name]


@pytest.mark.slow
def test_each_method_is_better_than_rounding_beyond_the_error(tmp_path: Path):
    tokenizer = Tokenizer(BUNDLED)
    calibration = tokenizer.encode((BUNDLED / "calibration.txt").read_text(encoding="utf-8"))
    text = windows(tokenizer.encode((BUNDLED / "heldout.txt").read_text(encoding="utf-8")), 256, 40)
    models = {}
    methods: tuple[Any, ...] = ("rtn", "gptq", "awq", "autoround")
    for method in methods:
        recipe = Recipe(method=method, samples=32, length=256, steps=60, batch=4)
        quantise(BUNDLED, tmp_path / method, recipe, calibration if recipe.calibrates else None)
        models[method] = loaded(tmp_path / method)
    found = compare(models, loaded(BUNDLED), text)
    for method in methods[1:]:
        gain = found[method].gain(found["rtn"])
        assert gain.value > 2 * gain.error, (method, gain)
        assert found[method].kl_mean.value < found["rtn"].kl_mean.value - 2 * found["rtn"].kl_mean.error
    assert found["rtn"].ratio.value < 1.06
