"""Which tensors a checkpoint of 4-bit weights holds, and its matrices made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.linear import Linear
from engine.model.pages import FLOATS, Pages
from engine.model.quant.formats.fields import Stored, StoredLayer
from engine.model.quant.int4 import Int4Matrix
from engine.model.quant.linear import stacked
from engine.model.safetensors import CheckpointError, TensorEntry
from engine.model.tensors import CheckpointTensor, checkpoint_tensors

Field = tuple[int | None, str]  # of a layer, or of the whole model


@dataclass(frozen=True)
class QuantisedLayer:
    """A linear layer of 4 bits.

    name: its own, without ".weight". tensor: what it would be in 16 bits. kind: how it is stored.
    """

    name: str
    tensor: CheckpointTensor
    kind: StoredLayer

    def stored(self) -> dict[str, Stored]:
        """Its tensors by what follows its name."""
        return self.kind.tensors(*self.tensor.shape)

    def read(self, tensors: Mapping[str, Tensor]) -> Int4Matrix:
        return self.kind.read(tensors, *self.tensor.shape)


def quantised_layers(
    directory: Path, config: ModelConfig, entries: Mapping[str, TensorEntry]
) -> dict[str, QuantisedLayer]:
    """The layers that have 4 bits in a checkpoint with these tensors, by name.

    Of the layers that the configuration says are quantised, those are not that the file has a weight of 16 bits of.

    Raises:
        CheckpointError: A layer's shape cannot be stored as the configuration says, or a tied head is quantised.
    """
    found: dict[str, QuantisedLayer] = {}
    if config.quantization is None:
        return found
    for tensor in checkpoint_tensors(config):
        name = tensor.name.removesuffix(".weight")
        kind = config.quantization.layer(name) if len(tensor.shape) == 2 and tensor.field != "embedding" else None
        plain = entries.get(tensor.name)
        if kind is None or (plain is not None and plain.dtype in FLOATS):
            continue
        found[name] = QuantisedLayer(name, tensor, kind)
        try:
            found[name].stored()
        except ValueError as error:
            raise CheckpointError(f"{directory}: {name}: {error}") from None
    if config.tie_word_embeddings:
        for entry in entries.values():
            if entry.name.startswith("lm_head."):
                raise CheckpointError(
                    f"{directory / entry.shard}: tensor {entry.name!r} is of a head, and tie_word_embeddings = true "
                    "says that the head is the embedding; one of them is wrong"
                )
    return found


def stored_tensors(config: ModelConfig, layers: Mapping[str, QuantisedLayer]) -> dict[str, Stored]:
    """Every tensor of the checkpoint: its dtypes and shape."""
    expected: dict[str, Stored] = {}
    for tensor in checkpoint_tensors(config):
        layer = layers.get(tensor.name.removesuffix(".weight"))
        if layer is None:
            expected[tensor.name] = Stored(tuple(FLOATS), tensor.shape)
        else:
            expected |= {f"{layer.name}.{part}": stored for part, stored in layer.stored().items()}
    return expected


def read_matrices(
    config: ModelConfig, layers: Mapping[str, QuantisedLayer], entries: Mapping[str, TensorEntry], pages: Pages,
    place: tuple[torch.device | str, torch.dtype],
) -> dict[Field, Linear]:  # fmt: skip
    """Matrices of which a part at least has 4 bits, by their place in `Weights`.

    place: device and dtype of the model.

    Raises:
        CheckpointError: A layer's tensors hold what is no such matrix, or what is NaN or Inf in this dtype.
    """
    device, dtype = place
    parts: dict[Field, list[CheckpointTensor]] = {}
    for tensor in checkpoint_tensors(config):
        parts.setdefault((tensor.layer, tensor.field), []).append(tensor)
    made: dict[Field, Linear] = {}
    for field, tensors in parts.items():
        named = {tensor.name.removesuffix(".weight"): tensor for tensor in tensors}
        if named.keys() & layers.keys():
            made[field] = stacked(
                [
                    _read(layers[name], entries, pages, device, dtype) if name in layers else
                    _finite(pages.tensor(entries[tensor.name]).to(device, dtype), tensor.name, dtype)
                    for name, tensor in named.items()
                ],
                dtype,
            )  # fmt: skip
    return made


def _read(
    layer: QuantisedLayer, entries: Mapping[str, TensorEntry], pages: Pages, device: torch.device | str,
    dtype: torch.dtype,
) -> Int4Matrix:  # fmt: skip
    names = {part: f"{layer.name}.{part}" for part in layer.stored()}
    found = {part: pages.tensor(entries[name]).to(device, copy=True) for part, name in names.items() if name in entries}
    try:
        matrix = layer.read(found)
    except ValueError as error:
        raise CheckpointError(f"{layer.name}: {error}") from None
    if matrix.overflows(dtype):
        raise CheckpointError(f"{layer.name}: a weight is Inf as {dtype}")
    return matrix


def _finite(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name!r} holds NaN or Inf as {dtype}")
    return tensor
