"""A checkpoint's tensors, moved to the device in the layout that the forward graph reads.

Q, K and V are one matrix, and so are gate and up: one matmul reads each. Every tensor of the checkpoint is consumed
exactly once, with the expected shape, or loading fails and names it.
"""

import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.safetensors import CheckpointError, TensorEntry, read_index

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class LayerWeights:
    """One layer, Hq query heads, Hk key and value heads of D elements, hidden size H, intermediate size I."""

    qkv: Tensor  # [(Hq + 2 Hk) D, H]: rows of Q, then K, then V
    o: Tensor  # [H, Hq D]
    gate_up: Tensor  # [2 I, H]: rows of gate, then up
    down: Tensor  # [H, I]
    q_norm: Tensor | None  # [Hq D]
    k_norm: Tensor | None  # [Hk D]
    attention_norm: Tensor  # [H], before or after attention as ModelConfig.norm_placement says
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
    """All tensors of a model, of one dtype, on one device."""

    embedding: Tensor  # [V, H]
    layers: list[LayerWeights]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]; the embedding itself when they are tied
    statistics: LoadStatistics | None = field(default=None, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def nbytes(self) -> int:
        """Bytes held on the device; a tied head is counted once."""
        seen = {tensor.data_ptr(): tensor.nbytes for _, tensor in self.named_tensors()}
        return sum(seen.values())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "embedding", self.embedding
        for index, layer in enumerate(self.layers):
            for name, tensor in vars(layer).items():
                if tensor is not None:
                    yield f"layers.{index}.{name}", tensor
        yield "norm", self.norm
        yield "lm_head", self.lm_head


def empty_weights(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Weights of `config`'s shapes that hold anything."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inter = config.hidden_size, config.intermediate_size
    normed = config.qk_norm == "full"
    layers = [
        LayerWeights(
            qkv=new(config.q_size + 2 * config.kv_size, hidden),
            o=new(hidden, config.q_size),
            gate_up=new(2 * inter, hidden),
            down=new(hidden, inter),
            q_norm=new(config.q_size) if normed else None,
            k_norm=new(config.kv_size) if normed else None,
            attention_norm=new(hidden),
            mlp_norm=new(hidden),
        )
        for _ in range(config.num_hidden_layers)
    ]
    embedding = new(config.vocab_size, hidden)
    lm_head = embedding if config.tie_word_embeddings else new(config.vocab_size, hidden)
    return Weights(embedding, layers, new(hidden), lm_head)


def _destinations(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: its Hugging Face name to a view of the fused tensors."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = weights.lm_head
    attention_norm, mlp_norm = config.layer_norm_names()
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split([config.q_size, config.kv_size, config.kv_size])
        gate, up = layer.gate_up.split(config.intermediate_size)
        named = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
            attention_norm: layer.attention_norm,
            mlp_norm: layer.mlp_norm,
        }
        for name, tensor in named.items():
            if tensor is not None:
                places[f"model.layers.{index}.{name}.weight"] = tensor
    return places


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
    expected = config.tensor_shapes()
    for name, entry in entries.items():
        if name not in expected:
            raise CheckpointError(f"{directory / entry.shard}: tensor {name!r} is not one of {config.architecture}")
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{directory / entry.shard}: tensor {name!r} has shape {list(entry.shape)}; the configuration asks "
                f"for {list(expected[name])}"
            )
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{directory / entry.shard}: tensor {name!r} has dtype {entry.dtype}; one of "
                f"{', '.join(TORCH_DTYPES)} was expected"
            )
    for name in expected:
        if name not in entries:
            raise CheckpointError(f"{directory}: tensor {name!r} of {config.architecture} is missing")

    weights = empty_weights(config, device, dtype)
    places = _destinations(config, weights)
    by_shard: dict[str, list[TensorEntry]] = {}
    for entry in entries.values():
        by_shard.setdefault(entry.shard, []).append(entry)
    total = 0
    for shard, tensors in by_shard.items():
        with (directory / shard).open("rb") as file:
            # Private pages: torch wants a writable buffer, and nothing is ever written to them.
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for entry in sorted(tensors, key=lambda entry: entry.begin):
            source = torch.frombuffer(
                pages, dtype=TORCH_DTYPES[entry.dtype], count=entry.nbytes // TORCH_DTYPES[entry.dtype].itemsize,
                offset=entry.begin,
            )  # fmt: skip
            place = places.pop(entry.name)
            place.copy_(source.view(entry.shape))
            if not torch.isfinite(place).all():
                raise CheckpointError(f"{directory / shard}: tensor {entry.name!r} holds NaN or Inf as {dtype}")
            total += entry.nbytes
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    weights.statistics = LoadStatistics(total, time.perf_counter() - started)
    return weights


def random_weights(config: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int) -> Weights:
    """Weights of `config`'s shapes made on the device with no files: matrices N(0, 0.02²), norms N(1, 0.02²).

    The same (seed, device type, dtype) gives the same weights.
    """
    weights = empty_weights(config, device, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for place in _destinations(config, weights).values():
        place.normal_(mean=1.0 if place.ndim == 1 else 0.0, std=0.02, generator=generator)
    return weights
