"""Rotary position embedding: the tables of cosines and sines that q and k are rotated by."""

import math

import torch
from torch import Tensor

from engine.model.config import ModelConfig, Rope
from engine.runtime.memory import free_bytes

_ROWS = 1 << 16  # of a rotary table that are computed at a time


def rope_tables(
    config: ModelConfig, positions: int, device: torch.device, dtype: torch.dtype
) -> dict[Rope, tuple[Tensor, Tensor]]:
    """cos and sin, fp32 on `device`, of each RoPE that the layers have; dtype: the model's, in which some keep them.

    Raises:
        ValueError: The free memory has no room for the tables.
    """
    ropes = {config.layer_rope(layer) for layer in range(config.num_hidden_layers)}
    size = len(ropes) * positions * config.head_dim * 4
    if size > (free := free_bytes(device)):
        raise ValueError(
            f"the rotary tables of {positions} positions are {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "lower max_model_len"
        )
    tables = {}
    for rope in ropes:
        cos, sin = rope_table(rope, config.head_dim, positions)
        if config.architecture.rope_dtype == "model":
            cos, sin = cos.to(dtype).float(), sin.to(dtype).float()
        tables[rope] = cos.to(device), sin.to(device)
    return tables


def rope_table(rope: Rope, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inverse frequency, fp32 [positions, head_dim / 2], on the CPU.

    Frequencies and angles are fp32 as in the models' training code; cos and sin of them are computed in fp64.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        frequency = frequency / rope.factor
    elif rope.type == "llama3":
        frequency = _llama3(frequency, rope)
    cos, sin = (torch.empty(positions, head_dim // 2) for _ in range(2))
    for begin in range(0, positions, _ROWS):  # in fp64 all of them take several times the tables' memory
        here = torch.arange(begin, min(begin + _ROWS, positions), dtype=torch.float32)
        angles = (here[:, None] * frequency).double()
        cos[begin : begin + _ROWS], sin[begin : begin + _ROWS] = angles.cos(), angles.sin()
    return cos, sin


def _llama3(frequency: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between are blended (Llama 3.1)."""
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    stretched = frequency / rope.factor
    blended = (1 - blend) * frequency / rope.factor + blend * frequency
    is_long = wavelength > length / rope.low_freq_factor
    is_short = wavelength < length / rope.high_freq_factor
    return torch.where(is_long, stretched, torch.where(is_short, frequency, blended))
