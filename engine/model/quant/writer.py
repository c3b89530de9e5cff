"""A quantised checkpoint as it grows beside its place: a file a layer, one for the rest, and what describes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from engine.model.quant.formats import Quantization, bitsandbytes, compressed_tensors, gptq, parse
from engine.model.quant.int4 import Int4Matrix
from engine.model.quant.recipe import Recipe
from engine.model.quant.source import Source, read_file
from engine.model.safetensors import INDEX_NAME, read_header
from engine.model.tensors import tensor_shapes

PLAIN = ("lm_head",)  # linear layers that stay as they are
RECORD = "quantization.json"
# What a checkpoint has beside its weights that goes with it unchanged.
COMPANIONS = (
    "tokenizer*", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.*", "merges.txt", "LICENSE*", "NOTICE*",
)  # fmt: skip


class RunError(ValueError):
    """A place where a checkpoint cannot be written, or one that another run has begun."""


def settings(recipe: Recipe, dtype: str) -> dict[str, Any]:
    """The `quantization_config` of what a recipe makes."""
    if recipe.form == "bitsandbytes":
        return bitsandbytes.settings(PLAIN, dtype)
    if recipe.form == "gptq":
        return gptq.settings(recipe.group_size, recipe.symmetric, recipe.method == "gptq" and recipe.order == "columns")
    ordered = recipe.method == "gptq" and recipe.order != "none"
    return compressed_tensors.settings(recipe.group_size, recipe.symmetric, PLAIN, ordered)


def pack(matrix: Int4Matrix, recipe: Recipe) -> dict[str, Tensor]:
    if recipe.form == "bitsandbytes":
        return bitsandbytes.pack(matrix)
    if recipe.form == "gptq":
        return gptq.pack(matrix, gptq.version_of(recipe.symmetric))
    return compressed_tensors.pack(matrix)


class Writer:
    """The checkpoint that `recipe` makes of `source`, on its way to the folder `out`.

    What is whole is a file in `out`.part: a run that was ended goes on behind it.

    Raises:
        RunError: `out` exists, or `out`.part is of a run with other settings.
    """

    def __init__(self, source: Source, out: Path, recipe: Recipe, record: Mapping[str, Any]) -> None:
        self._source, self._out, self._recipe = source, out, recipe
        self._record = {"source": source.directory.name, **recipe.record(), **record}
        self.quantization: Quantization = parse(settings(recipe, str(source.dtype).removeprefix("torch.")))
        self.folder = out.with_name(f"{out.name}.part")
        if out.exists():
            raise RunError(f"{out} exists; name a folder that does not, or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        record_file = self.folder / RECORD
        if record_file.exists():
            begun = json.loads(record_file.read_text(encoding="utf-8"))
            other = [key for key in self._record if begun.get(key) != self._record[key]]
            if other:
                key = other[0]
                raise RunError(
                    f"{self.folder} is of a run with {key} = {begun.get(key)!r}, this one has {self._record[key]!r}; "
                    "remove it, or go on with the same settings"
                )
        else:
            self._write_json(RECORD, self._record)

    def shard(self, layer: int | None) -> Path:
        """The file of a layer, or of what is outside of the layers."""
        count = self._source.config.num_hidden_layers + 1
        return self.folder / f"model-{1 if layer is None else layer + 2:05}-of-{count:05}.safetensors"

    def write_outside(self) -> None:
        if not self.shard(None).exists():
            self._save(self.shard(None), self._source.outside())

    def write_layer(self, layer: int, matrices: Mapping[str, Int4Matrix], rest: Mapping[str, Tensor]) -> None:
        """Store a layer's matrices, and its other tensors, both by their names within it."""
        prefix = f"model.layers.{layer}."
        stored = {f"{prefix}{name}.weight": tensor.to(self._source.dtype) for name, tensor in rest.items()}
        for name, matrix in matrices.items():
            stored |= {f"{prefix}{name}.{part}": tensor for part, tensor in pack(matrix, self._recipe).items()}
        self._save(self.shard(layer), stored)

    def read_layer(self, layer: int) -> tuple[dict[str, Int4Matrix], dict[str, Tensor]]:
        """What `write_layer` stored, as a reader of the checkpoint finds it."""
        prefix, stored = f"model.layers.{layer}.", read_file(self.shard(layer))
        matrices, rest = {}, {}
        for full, shape in tensor_shapes(self._source.config).items():
            if not full.startswith(prefix):
                continue
            name = full.removesuffix(".weight")
            kind = self.quantization.layer(name) if len(shape) == 2 else None
            if kind is None:
                rest[name.removeprefix(prefix)] = stored[full]
                continue
            parts = {part: stored[f"{name}.{part}"] for part in kind.tensors(*shape) if f"{name}.{part}" in stored}
            matrices[name.removeprefix(prefix)] = kind.read(parts, *shape)
        return matrices, rest

    def finish(self) -> None:
        """Write what describes the files, and put the folder in its place."""
        shards = [self.shard(None), *(self.shard(layer) for layer in range(self._source.config.num_hidden_layers))]
        entries = [entry for shard in shards for entry in read_header(shard)]
        weight_map = {entry.name: entry.shard for entry in sorted(entries, key=lambda entry: entry.name)}
        size = sum(entry.nbytes for entry in entries)
        self._write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
        fields = json.loads((self._source.directory / "config.json").read_text(encoding="utf-8"))
        dtype = str(self._source.dtype).removeprefix("torch.")
        fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
        self._write_json("config.json", fields | {"quantization_config": settings(self._recipe, dtype)})
        for pattern in COMPANIONS:
            for file in self._source.directory.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, self.folder / file.name)
        os.replace(self.folder, self._out)

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        beside = path.with_name(f"{path.name}.part")
        safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside,
                                    metadata={"format": "pt"})  # fmt: skip
        shutil.copymode(self.folder / RECORD, beside)  # the library makes files that nobody else may read
        os.replace(beside, path)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        beside = self.folder / f"{name}.part"
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, self.folder / name)
