"""Small random checkpoints of architectures beside the run's own, and random prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.08,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama_shape": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        # A context of 32 puts wavelengths of head_dim 128 in all three ranges: kept, blended and stretched.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral_shape": _COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 24,
    },
}
SHAPE_TOKENS = (80, 33)  # beyond the window, the chunk of 64 keys and the block of 16 rows


def make_checkpoint(architecture: dict[str, Any], directory: Path, seed: int = 0) -> None:
    """Random bf16 weights of `architecture`, norms too, as transformers saves them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.hf import quiet

    quiet()
    fields = {name: value for name, value in architecture.items() if name != "model_type"}
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture["model_type"], **fields))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    made.to(torch.bfloat16).save_pretrained(directory)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
