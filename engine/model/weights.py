"""A checkpoint's tensors, moved to the device in the layout that the forward graph reads.

Q, K and V are one matrix, and so are gate and up: one matmul reads each. Every tensor of the checkpoint is consumed
exactly once, with the expected shape, or loading fails and names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.linear import DenseLinear, Linear
from engine.model.pages import Pages
from engine.model.quant.formats.fields import Stored
from engine.model.quant.loading import Field, quantised_layers, read_matrices, stored_tensors
from engine.model.safetensors import CheckpointError, TensorEntry, read_index
from engine.model.tensors import CheckpointTensor, checkpoint_tensors

if TYPE_CHECKING:
    from engine.ops.protocol import Ops

# How names of tensors of 4-bit weights end.
CODES = ("packed", "qweight", "qzeros", "absmax", "scale", "scales", "g_idx", "_point", "_shape", "_map", "__nf4")


@dataclass(kw_only=True)
class LayerWeights:
    """One layer, Hq query heads, Hk key and value heads of D elements, hidden size H, intermediate size I."""

    qkv: Linear  # [(Hq + 2 Hk) D, H]: rows of Q, then K, then V
    o: Linear  # [H, Hq D]
    gate_up: Linear  # [2 I, H]: rows of gate, then up
    down: Linear  # [H, I]
    q_norm: Tensor | None = None  # [Hq D]
    k_norm: Tensor | None = None  # [Hk D]
    attention_norm: Tensor  # [H], before or after attention as Architecture.norm_placement says
    mlp_norm: Tensor  # [H]


@dataclass(frozen=True)
class LoadStatistics:
    """Bytes read from the checkpoint and the seconds from opening it until all of it was on the device."""

    bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9


@dataclass
class Weights:
    """All weights of a model, on one device."""

    dtype: torch.dtype  # of activations, the embedding and norms; a matrix is stored in a form of its own
    embedding: Tensor  # [V, H]
    layers: list[LayerWeights]
    norm: Tensor  # [H]
    lm_head: Linear  # [V, H]; the embedding itself when they are tied
    statistics: LoadStatistics | None = field(default=None, compare=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def nbytes(self) -> int:
        """Bytes held on the device; a tied head is counted once."""
        seen = {tensor.data_ptr(): tensor.nbytes for _, tensor in self.named_tensors()}
        return sum(seen.values())

    @property
    def step_bytes(self) -> int:
        """Bytes that a step of any size reads: all but the embedding table, which a tied head is."""
        return sum(tensor.nbytes for name, tensor in self.named_tensors() if name != "embedding")

    def read(self, tensor: CheckpointTensor) -> Tensor:
        """A tensor of the checkpoint as it is multiplied with here, in its own shape."""
        held = self._field(tensor)
        return held if isinstance(held, Tensor) else held.rows(tensor.row, tensor.row + tensor.shape[0])

    def write(self, tensor: CheckpointTensor, values: Tensor) -> None:
        """Put a tensor of the checkpoint in its place."""
        held = self._field(tensor)
        if isinstance(held, Tensor):
            held.copy_(values)
        else:
            held.write(tensor.row, values)

    def _field(self, tensor: CheckpointTensor) -> Any:
        return getattr(self if tensor.layer is None else self.layers[tensor.layer], tensor.field)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is held, as "layers.0.qkv.weight" and "norm"; that of a tied head twice."""
        yield "embedding", self.embedding
        for index, layer in enumerate(self.layers):
            for name, held in vars(layer).items():
                yield from _named(f"layers.{index}.{name}", held)
        yield "norm", self.norm
        yield from _named("lm_head", self.lm_head)


def _named(name: str, held: Linear | Tensor | None) -> Iterator[tuple[str, Tensor]]:
    if isinstance(held, Tensor):
        yield name, held
    elif held is not None:
        for part, tensor in held.tensors().items():
            yield f"{name}.{part}", tensor


def empty_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype, ops: Ops | None = None,
    made: Mapping[Field, Linear] | None = None,
) -> Weights:  # fmt: skip
    """Weights of `config`'s shapes that hold anything, matrices in the form that `ops` wants (default: dense), but for
    those that are `made` already."""
    given = made or {}
    fields: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for tensor in checkpoint_tensors(config):
        rows = tensor.row + tensor.shape[0]  # the last tensor of a field ends it
        fields.setdefault(tensor.layer, {})[tensor.field] = (rows, *tensor.shape[1:])

    def new(layer: int | None, name: str, shape: tuple[int, ...]) -> Any:
        if (layer, name) in given:
            return given[layer, name]
        if ops is not None and len(shape) == 2 and name != "embedding":
            return ops.new_linear(*shape, name == "gate_up", dtype)
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor if tensor.ndim == 1 or name == "embedding" else DenseLinear(tensor)

    held = {
        layer: {name: new(layer, name, shape) for name, shape in shapes.items()} for layer, shapes in fields.items()
    }
    whole = held.pop(None)
    whole.setdefault("lm_head", DenseLinear(whole["embedding"]))  # tied
    return Weights(dtype, layers=[LayerWeights(**parts) for parts in held.values()], **whole)


def stored_dtype(directory: str | Path, config: ModelConfig) -> str:
    """What a checkpoint runs in where no dtype is asked for: "float16" where it is stored so, else "bfloat16".

    config.json says how it is stored; where it does not, the embedding's entry does.

    Raises:
        CheckpointError: config.json does not say, and the checkpoint's headers are damaged or not there.
    """
    if config.dtype is None:
        entry = read_index(directory).get("model.embed_tokens.weight")
        return "float16" if entry is not None and entry.dtype == "F16" else "bfloat16"
    return "float16" if config.dtype == "float16" else "bfloat16"


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    ops: Ops | None = None,
) -> Weights:
    """Load the safetensors checkpoint in `directory` onto `device`, cast to `dtype` (rounded to nearest), in the form
    that `ops` wants.

    Matrices of 4 bits stay so: what their codes stand for is what is rounded to `dtype`, when it is multiplied with.

    Raises:
        CheckpointError: A file is damaged, a tensor is missing, unexpected, of another shape or dtype, or holds NaN
            or Inf (also where the cast overflows). The message names the tensor.
    """
    started = time.perf_counter()
    directory = Path(directory)
    entries = read_index(directory)
    layers = quantised_layers(directory, config, entries)
    _check_entries(directory, entries, stored_tensors(config, layers), config)
    pages = Pages(directory)
    made = read_matrices(config, layers, entries, pages, (device, dtype))
    weights = empty_weights(config, device, dtype, ops, made)
    whole = {tensor.name: tensor for tensor in checkpoint_tensors(config) if (tensor.layer, tensor.field) not in made}
    for entry in sorted(entries.values(), key=lambda entry: (entry.shard, entry.begin)):
        if entry.name in whole:
            weights.write(whole[entry.name], pages.tensor(entry))
            if not torch.isfinite(weights.read(whole[entry.name])).all():
                raise CheckpointError(f"{directory / entry.shard}: tensor {entry.name!r} holds NaN or Inf as {dtype}")
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    total = sum(entry.nbytes for entry in entries.values())
    weights.statistics = LoadStatistics(total, time.perf_counter() - started)
    return weights


def _check_entries(
    directory: Path, entries: dict[str, TensorEntry], expected: dict[str, Stored], config: ModelConfig
) -> None:
    """Raises CheckpointError for a tensor that is not expected, missing, or of another shape or dtype."""
    architecture = config.architecture.name
    for name, entry in entries.items():
        if name not in expected:
            hint = f"; {_announced(config)}" if name.endswith(CODES) else ""
            raise CheckpointError(f"{directory / entry.shard}: tensor {name!r} is not one of {architecture}{hint}")
        if not expected[name].fits(entry.shape):
            raise CheckpointError(
                f"{directory / entry.shard}: tensor {name!r} has shape {list(entry.shape)}; the configuration asks "
                f"for {list(expected[name].shape)}"
            )
        if entry.dtype not in expected[name].dtypes:
            raise CheckpointError(
                f"{directory / entry.shard}: tensor {name!r} has dtype {entry.dtype}; one of "
                f"{', '.join(expected[name].dtypes)} was expected"
            )
    for name, stored in expected.items():
        if name not in entries and not stored.optional:
            raise CheckpointError(f"{directory}: tensor {name!r} of {architecture} is missing")


def _announced(config: ModelConfig) -> str:
    """What config.json says of 4-bit weights, for who finds a tensor of such where none should be."""
    if config.quantization is None:
        return "config.json has no quantization_config, which a checkpoint of 4-bit weights needs"
    return f"quantization_config ({config.quantization.method!r}) says that its layer has 16 bits, or another form"


def random_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int, ops: Ops | None = None
) -> Weights:
    """Weights of `config`'s shapes made on the device with no files: matrices N(0, 0.02²), norms N(1, 0.02²).

    The same (seed, device type, dtype) gives the same weights, in the form that `ops` wants.
    """
    weights = empty_weights(config, device, dtype, ops)
    generator = torch.Generator(device=device).manual_seed(seed)
    # In an order that no seed's weights change with: what is outside of the layers first.
    for tensor in sorted(checkpoint_tensors(config), key=lambda tensor: tensor.layer is not None):
        values = torch.empty(tensor.shape, dtype=dtype, device=device)
        mean = 1.0 if values.ndim == 1 else 0.0
        weights.write(tensor, values.normal_(mean=mean, std=0.02, generator=generator))
    return weights
