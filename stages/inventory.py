"""Lists every tensor of the staged checkpoint from its safetensors headers, and verifies the list.

What is checked, each with its own error: every shard's header (length, offsets, overlaps, holes), the index against the
shards, names and shapes against the config, and each tensor's bytes, extracted by hand at the listed offset, against
what the `safetensors` library reads.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from engine.model.config import ModelConfig
from engine.model.errors import ConfigError
from engine.model.safetensors import CheckpointError, TensorEntry, read_index, read_tensor_bytes
from engine.model.tensors import tensor_shapes
from stages.exits import StageError
from stages.host import read_host
from stages.metrics import Rows
from stages.params import Model, StagedModel
from stages.stage import Run, stage, write_whole

INVENTORY = Path("reports/inventory.parquet")
ARCHITECTURE = Path("reports/architecture.csv")
METRICS = Path("reports/metrics/inventory.parquet")
COLUMNS = (
    "tensor_number", "tensor_name", "num_parameters", "shape", "shard_file", "data_offset_bytes", "dtype", "bytes",
    "layer", "role",
)  # fmt: skip
ROLES = {"model.embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "lm_head"}


@stage(StagedModel)
def main(run: Run, model: Model) -> None:
    """Writes inventory.parquet and .csv, architecture.csv and the stage's metrics. Raises StageError for what is
    wrong.
    """
    folder = run.find_snapshot(model.name)
    source = json.loads(run.find(f"data/hf/{model.name}.manifest.json").read_bytes())["source"]
    try:
        config = ModelConfig.from_file(folder)
        tensors = read_index(folder)
        check_shapes(tensors, config)
        verify_bytes(folder, tensors)
    except (ConfigError, CheckpointError) as error:
        raise StageError(str(error)) from None
    inventory = list_tensors(tensors)
    summary = summarize_architecture(config, inventory)
    path = run.out(INVENTORY)
    inventory.to_parquet(path, index=False)
    write_whole(path.with_suffix(".csv"), inventory.to_csv(index=False, lineterminator="\n"))
    write_whole(run.out(ARCHITECTURE), summary.to_csv(index=False, lineterminator="\n"))
    rows = Rows("inventory", None, model.name, read_host())
    add_metrics(rows, inventory, source)
    rows.write(run.out(METRICS))
    show(model.name, summary, inventory)


def check_shapes(tensors: dict[str, TensorEntry], config: ModelConfig) -> None:
    """Raises CheckpointError naming the first missing, extra or misshapen tensor."""
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing; the config asks for it with shape {list(shape)}")
        if tensors[name].shape != shape:
            entry = tensors[name]
            raise CheckpointError(
                f"{entry.shard}: tensor {name!r} has shape {list(entry.shape)}; the config asks for {list(shape)}"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"{tensors[extra[0]].shard}: tensor {extra[0]!r} is not in the config's architecture")


def verify_bytes(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    """Extracts every tensor by hand and compares it with the library's reading, byte for byte. Raises
    CheckpointError.
    """
    import torch
    from safetensors import safe_open

    for shard in sorted({entry.shard for entry in tensors.values()}):
        with safe_open(folder / shard, framework="pt") as library:
            for entry in (entry for entry in tensors.values() if entry.shard == shard):
                ours = torch.frombuffer(bytearray(read_tensor_bytes(folder, entry)), dtype=torch.uint8)
                theirs = library.get_tensor(entry.name)
                same = tuple(theirs.shape) == entry.shape and torch.equal(
                    ours, theirs.contiguous().flatten().view(torch.uint8)
                )
                if not same:
                    raise CheckpointError(f"{shard}: tensor {entry.name!r} extracted by hand differs from safetensors'")


def list_tensors(tensors: dict[str, TensorEntry]) -> pd.DataFrame:
    """One row a tensor with `COLUMNS`, in the order of names, numbered from 1.

    `data_offset_bytes` counts from the shard's first data byte, as its header does (the file has 8 + header bytes
    before it); `shape` is written `4096x256`; `layer` is null outside the layers.
    """
    data = {entry.shard: entry.begin for entry in sorted(tensors.values(), key=lambda entry: -entry.begin)}
    rows = []
    for number, name in enumerate(sorted(tensors), 1):
        entry = tensors[name]
        layer, role = place(name)
        shape = "x".join(str(extent) for extent in entry.shape)
        offset = entry.begin - data[entry.shard]
        size = math.prod(entry.shape)
        rows.append((number, name, size, shape, entry.shard, offset, entry.dtype, entry.nbytes, layer, role))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"layer": "Int64"})


def place(name: str) -> tuple[int | None, str]:
    """The layer and role of a tensor by its Hugging Face name: `model.layers.3.mlp.up_proj.weight` is (3,
    "mlp.up_proj").
    """
    stem = name.removesuffix(".weight")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if found:
        return int(found[1]), found[2]
    return None, ROLES.get(stem, stem)


def summarize_architecture(config: ModelConfig, inventory: Any) -> pd.DataFrame:
    """Columns `property` and `value`: the architecture's axes, then parameters and bytes."""
    facts: dict[str, Any] = {
        "architecture": config.architecture.name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "norm_placement": config.architecture.norm_placement,
        "qk_norm": config.architecture.qk_norm,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_type": config.rope.type,
        "sliding_window": config.sliding_window,
        "tied_embeddings": config.tie_word_embeddings,
        "parameters": int(inventory["num_parameters"].sum()),
        "tensors": len(inventory),
        "shards": inventory["shard_file"].nunique(),
        "bytes": int(inventory["bytes"].sum()),
        "dtypes": ", ".join(f"{dtype} ({count})" for dtype, count in sorted(Counter(inventory["dtype"]).items())),
    }
    return pd.DataFrame({"property": list(facts), "value": [str(value) for value in facts.values()]})


def add_metrics(rows: Rows, inventory: pd.DataFrame, source: dict[str, Any]) -> None:
    """Adds what the checkpoint weighs, in all and by role. source: the manifest's, so that random weights say so."""
    shared: dict[str, Any] = {"suite": "inventory", "better": None}
    note = f"random weights, seed {source['seed']}" if source["weights"] == "random" else None
    rows.add(**shared, case="checkpoint", metric="tensors_verified", value=len(inventory), unit="1", note=note)
    groups: list[tuple[Any, Any]] = [("checkpoint", inventory), *inventory.groupby("role", sort=True)]
    for case, group in groups:
        rows.add(**shared, case=str(case), metric="parameters", value=int(group["num_parameters"].sum()), unit="1")
        rows.add(**shared, case=str(case), metric="weight_bytes", value=int(group["bytes"].sum()), unit="B")


def show(model: str, summary: pd.DataFrame, inventory: pd.DataFrame) -> None:
    """Prints the architecture and its weights by role."""
    console = Console()
    table = Table(title=f"{model}: architecture", box=None)
    table.add_column("property")
    table.add_column("value", justify="right")
    for name, value in summary.itertuples(index=False):
        table.add_row(name, value)
    console.print(table)
    table = Table(title="weights by role, all verified byte for byte", box=None)
    for column in ("role", "tensors", "parameters", "bytes", "share"):
        table.add_column(column, justify="left" if column == "role" else "right")
    total = inventory["bytes"].sum()
    for role, group in sorted(inventory.groupby("role"), key=lambda item: -item[1]["bytes"].sum()):
        size = group["bytes"].sum()
        parameters = group["num_parameters"].sum()
        table.add_row(str(role), str(len(group)), f"{parameters:,}", f"{size:,}", f"{size / total:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
