"""A checkpoint of 16 or 32 bits that is read a layer at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.pages import FLOATS, Pages
from engine.model.quant.block import layer_names
from engine.model.safetensors import CheckpointError, read_header, read_index
from engine.model.tensors import tensor_shapes
from engine.model.weights import stored_dtype


class Source:
    """The checkpoint in `directory`.

    Raises:
        ValueError: Its weights have 4 bits already.
        ConfigError, CheckpointError: The folder is not what it must be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = ModelConfig.from_file(directory)
        if self.config.quantization is not None:
            raise ValueError(
                f"{directory}: its weights have 4 bits already; quantise the checkpoint that it was made of"
            )
        self.dtype = getattr(torch, stored_dtype(directory, self.config))  # what it runs in
        self._entries, self._pages = read_index(directory), Pages(directory)
        for name, shape in tensor_shapes(self.config).items():
            if name not in self._entries:
                raise CheckpointError(f"{directory}: tensor {name!r} is missing")
            if self._entries[name].shape != shape:
                raise CheckpointError(
                    f"{directory}: tensor {name!r} has shape {list(self._entries[name].shape)}; the configuration asks "
                    f"for {list(shape)}"
                )

    def tensor(self, name: str) -> Tensor:
        """A tensor in the dtype that the checkpoint runs in.

        Raises:
            CheckpointError: It holds NaN or Inf, or is of another kind of number.
        """
        entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} has dtype {entry.dtype}, not one of 16 or 32 bits"
            )
        tensor = self._pages.tensor(entry).to(self.dtype)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.directory}: tensor {name!r} holds NaN or Inf as {self.dtype}")
        return tensor

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by their names within it, as "mlp.up_proj"."""
        return {name: self.tensor(f"{full}.weight") for name, full in layer_names(self.config, index).items()}

    def outside(self) -> dict[str, Tensor]:
        """Tensors of no layer, by their names in the checkpoint."""
        return {name: self.tensor(name) for name in tensor_shapes(self.config) if ".layers." not in name}


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    pages = Pages(path.parent)
    return {entry.name: pages.tensor(entry) for entry in read_header(path)}
