"""A checkpoint's tensors, moved to the device in the layout that the forward graph reads.

Q, K and V are one matrix, and so are gate and up: one matmul reads each. Every tensor of the checkpoint is consumed
exactly once, with the expected shape, or loading fails and names it.
"""

import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.model.architectures import CheckpointTensor, checkpoint_tensors
from engine.model.config import ModelConfig
from engine.model.linear import DenseLinear, Linear
from engine.model.safetensors import CheckpointError, TensorEntry, read_index

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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


def empty_weights(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Weights of `config`'s shapes that hold anything: where the form of each matrix is chosen."""
    fields: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for tensor in checkpoint_tensors(config):
        rows = tensor.row + tensor.shape[0]  # the last tensor of a field ends it
        fields.setdefault(tensor.layer, {})[tensor.field] = (rows, *tensor.shape[1:])

    def new(name: str, shape: tuple[int, ...]) -> Any:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        return tensor if tensor.ndim == 1 or name == "embedding" else DenseLinear(tensor)

    made = {layer: {name: new(name, shape) for name, shape in shapes.items()} for layer, shapes in fields.items()}
    whole = made.pop(None)
    whole.setdefault("lm_head", DenseLinear(whole["embedding"]))  # tied
    return Weights(dtype, layers=[LayerWeights(**held) for held in made.values()], **whole)


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


def load_weights(directory: str | Path, config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Load the safetensors checkpoint in `directory` onto `device`, cast to `dtype` (rounded to nearest).

    Raises:
        CheckpointError: A file is damaged, a tensor is missing, unexpected, of another shape or dtype, or holds NaN
            or Inf (also where the cast overflows). The message names the tensor.
    """
    started = time.perf_counter()
    directory = Path(directory)
    entries = read_index(directory)
    expected = {tensor.name: tensor for tensor in checkpoint_tensors(config)}
    _check_entries(directory, entries, expected, config)
    weights = empty_weights(config, device, dtype)
    by_shard: dict[str, list[TensorEntry]] = {}
    for entry in entries.values():
        by_shard.setdefault(entry.shard, []).append(entry)
    for shard, tensors in by_shard.items():
        for entry, values in _stored(directory / shard, tensors):
            tensor = expected[entry.name]
            weights.write(tensor, values)
            if not torch.isfinite(weights.read(tensor)).all():
                raise CheckpointError(f"{directory / shard}: tensor {entry.name!r} holds NaN or Inf as {dtype}")
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    total = sum(entry.nbytes for entry in entries.values())
    weights.statistics = LoadStatistics(total, time.perf_counter() - started)
    return weights


def _check_entries(
    directory: Path, entries: dict[str, TensorEntry], expected: dict[str, CheckpointTensor], config: ModelConfig
) -> None:
    """Raises CheckpointError for a tensor that is not expected, missing, or of another shape or dtype."""
    architecture = config.architecture.name
    for name, entry in entries.items():
        if name not in expected:
            raise CheckpointError(f"{directory / entry.shard}: tensor {name!r} is not one of {architecture}")
        if entry.shape != expected[name].shape:
            raise CheckpointError(
                f"{directory / entry.shard}: tensor {name!r} has shape {list(entry.shape)}; the configuration asks "
                f"for {list(expected[name].shape)}"
            )
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{directory / entry.shard}: tensor {name!r} has dtype {entry.dtype}; one of "
                f"{', '.join(TORCH_DTYPES)} was expected"
            )
    for name in expected:
        if name not in entries:
            raise CheckpointError(f"{directory}: tensor {name!r} of {architecture} is missing")


def _stored(shard: Path, entries: list[TensorEntry]) -> Iterator[tuple[TensorEntry, Tensor]]:
    """The tensors of a file in the order in which it has them, in its own memory and dtype."""
    with shard.open("rb") as file:
        # Private pages: torch wants a writable buffer, and nothing is ever written to them.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for entry in sorted(entries, key=lambda entry: entry.begin):
        dtype = TORCH_DTYPES[entry.dtype]
        flat = torch.frombuffer(pages, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.begin)
        yield entry, flat.view(entry.shape)


def random_weights(config: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int) -> Weights:
    """Weights of `config`'s shapes made on the device with no files: matrices N(0, 0.02²), norms N(1, 0.02²).

    The same (seed, device type, dtype) gives the same weights.
    """
    weights = empty_weights(config, device, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    # In an order that no seed's weights change with: what is outside of the layers first.
    for tensor in sorted(checkpoint_tensors(config), key=lambda tensor: tensor.layer is not None):
        values = torch.empty(tensor.shape, dtype=dtype, device=device)
        mean = 1.0 if values.ndim == 1 else 0.0
        weights.write(tensor, values.normal_(mean=mean, std=0.02, generator=generator))
    return weights
