"""`afs inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli.options import ModelArgument, ModelOption, one_line_errors, one_model

if TYPE_CHECKING:
    from engine.model.config import ModelConfig


@one_line_errors
def inspect(argument: ModelArgument = None, model: ModelOption = None) -> None:
    """Show a checkpoint's architecture: parameters and bytes by role, and what a token takes in the KV cache.

    Of a model on the hub only the configuration is fetched.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from engine.model.config import ModelConfig
    from engine.model.cost import Footprint, kv_bytes_per_token
    from engine.model.hub import find_model
    from engine.model.tensors import parameter_count

    name = one_model(argument, model)
    directory = find_model(name, "config")
    config = ModelConfig.from_file(directory)
    console = Console()
    architecture = config.architecture
    facts = Table(title=f"{name}: {architecture.name}", show_header=False)
    kv_heads = config.num_key_value_heads
    for name, value in {
        "layers": str(config.num_hidden_layers),
        "hidden size": str(config.hidden_size),
        "intermediate size": str(config.intermediate_size),
        "heads": f"{config.num_attention_heads} query, {kv_heads} key/value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, {'tied to' if config.tie_word_embeddings else 'apart from'} the head",
        "positions": str(config.max_position_embeddings),
        "norms": (
            f"{architecture.norm_placement}, rounded {architecture.norm_rounding}; q and k: {architecture.qk_norm}"
        ),
        "rotary embedding": f"{config.rope.type}, theta {config.rope.theta:g}",
        "window": str(config.sliding_window or "none"),
        "end of sequence": ", ".join(map(str, config.eos_token_ids)) or "none",
    }.items():
        facts.add_row(name, value)
    console.print(facts)

    table = Table(title="parameters by role")
    for heading in ("role", "parameters", "share", "bytes (16 bits)"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    total = parameter_count(config)
    for role, count in _parameters_by_role(config).items():
        table.add_row(role, f"{count:,}", f"{count / total:.1%}", f"{2 * count:,}")
    table.add_section()
    table.add_row("all", f"{total:,}", "", f"{2 * total:,}")
    console.print(table)
    read = Footprint.dense(config, torch.bfloat16).weight_bytes
    console.print(f"weight bytes read a token (16 bits, batch 1): {read:,}")
    console.print(f"KV cache bytes a token (16 bits): {kv_bytes_per_token(config, torch.bfloat16):,}")
    console.print(_stored(directory, config))


def _parameters_by_role(config: "ModelConfig") -> dict[str, int]:
    import math

    from engine.model.tensors import checkpoint_tensors

    role_of = {
        "embedding": "embedding", "qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp",
        "lm_head": "head",
    }  # fmt: skip
    roles = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "head": 0}
    for tensor in checkpoint_tensors(config):
        roles[role_of.get(tensor.field, "norms")] += math.prod(tensor.shape)
    return roles


def _stored(directory: Path, config: "ModelConfig") -> str:
    """One line on the checkpoint's tensors, or that there are none."""
    from engine.model.quant.loading import quantised_layers, stored_tensors
    from engine.model.safetensors import INDEX_NAME, SINGLE_NAME, read_index

    if not any((directory / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return "no weights in this folder"
    entries = read_index(directory)
    layers = quantised_layers(directory, config, entries)
    expected = stored_tensors(config, layers)
    wrong = [name for name in entries if name not in expected or not expected[name].fits(entries[name].shape)]
    wrong += [name for name, stored in expected.items() if name not in entries and not stored.optional]
    if wrong:
        raise ValueError(f"{directory}: tensors do not match config.json: {', '.join(sorted(wrong)[:5])}")
    shards = len({entry.shard for entry in entries.values()})
    stored = sum(entry.nbytes for entry in entries.values())
    dtypes = ", ".join(sorted({entry.dtype for entry in entries.values()}))
    form = f", {config.quantization.method}: {len(layers)} linear layers of 4 bits" if config.quantization else ""
    files = f"{shards} file{'s' if shards > 1 else ''}"
    return f"stored: {len(entries)} tensors, {stored:,} bytes, {dtypes}, {files}{form}"
