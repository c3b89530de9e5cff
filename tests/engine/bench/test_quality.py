"""What is said of quantised weights' quality is what the logits say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from engine_checkpoints import Reference

from engine.bench.quality import Estimate, compare, windows
from engine.model.config import ModelConfig
from engine.model.transformer import Model
from engine.model.weights import load_weights
from engine.ops.reference import ReferenceOps


def load(path: Path, noise: float) -> Model:
    config = ModelConfig.from_file(path)
    weights = load_weights(path, config, "cpu", torch.float32)
    torch.manual_seed(1)
    for layer in weights.layers:
        layer.down.rows().add_(torch.randn(layer.down.rows().shape) * noise)
    return Model(config, weights, ReferenceOps(), 64)


def test_against_the_definition(olmo2: Reference):
    own, off, further = (load(olmo2.path, noise) for noise in (0.0, 0.02, 0.1))
    text = windows([i * 31 % 500 for i in range(200)], 24, 5)
    assert text.shape == (5, 24) and text[1, 0] == 24 * 31 % 500
    found = compare({"own": own, "off": off, "further": further}, own, text)
    with torch.no_grad():
        exact = olmo2.model(text.long()).logits[:, :-1].double().log_softmax(-1)
    losses = -exact.gather(-1, text[:, 1:].long()[..., None])[..., 0].mean(1)
    assert found["own"].losses == pytest.approx(losses.tolist(), abs=1e-4)
    assert found["own"].perplexity.value == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    assert found["own"].tokens == 5 * 23
    assert found["own"].kl_max == 0 and found["own"].same_top == 1 and found["own"].ratio == Estimate(1.0, 0.0)
    assert 0 < found["off"].kl_mean.value < found["further"].kl_mean.value
    for name in ("off", "further"):
        quality = found[name]
        assert quality.kl_mean.value < quality.kl_99 <= quality.kl_max and quality.same_top < 1
        assert quality.own_losses == found["own"].losses
        expected = math.exp(sum(a - b for a, b in zip(quality.losses, quality.own_losses, strict=True)) / 5)
        assert quality.ratio.value == pytest.approx(expected) and quality.ratio.error > 0
        assert found["own"].gain(quality).value == pytest.approx(math.log(expected))


def test_estimates():
    found = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5 and found.error == pytest.approx(math.sqrt(5 / 3 / 4))
    assert Estimate(0.0, 0.1).exp() == Estimate(1.0, 0.1)
    with pytest.raises(ValueError, match="the text has 5 tokens, not one window of 6"):
        windows(range(5), 6)
