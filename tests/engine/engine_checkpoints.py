"""Small checkpoints written by transformers, the reference for everything the engine reads and computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
CORPUS = "the quick brown fox jumps over the lazy dog; def main(): return [x for x in range(10)]\n" * 20


@dataclass(frozen=True)
class Reference:
    """A checkpoint folder and the transformers model that wrote it, fp32, eager attention."""

    path: Path
    model: Any


def make_reference(kind: str, path: Path) -> Reference:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    configs = {
        "olmo2": lambda: transformers.Olmo2Config(**SIZES, rope_parameters=dict(PLAIN)),
        "olmo3": lambda: transformers.Olmo3Config(
            **SIZES,
            sliding_window=9,
            layer_types=WINDOWS,
            rope_parameters={"full_attention": dict(LINEAR), "sliding_attention": dict(PLAIN)},
        ),
        "llama": lambda: transformers.LlamaConfig(
            **SIZES, head_dim=64, tie_word_embeddings=True, rope_parameters=dict(LLAMA3)
        ),
        "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=9, rope_parameters=dict(LINEAR)),
    }
    torch.manual_seed(sum(kind.encode()))
    model = transformers.AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="eager").float().eval()
    with torch.no_grad():  # norm weights of 1 would hide a norm in the wrong place
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(path)
    return Reference(path, model)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|unused|>", "<|pad|>", "<|other|>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    while tokenizer.get_vocab_size() < SIZES["vocab_size"]:
        tokenizer.add_tokens([f"filler{tokenizer.get_vocab_size()}"])
    return tokenizer


def save_llama(path: Path) -> None:
    """SentencePiece fashion: ▁ for spaces, bytes as tokens, a beginning-of-sequence token."""
    import transformers

    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    base.train_from_iterator([CORPUS], trainer)
    model = json.loads(base.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True).save_pretrained(path)
