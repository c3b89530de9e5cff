"""The reference bundle: what transformers computes for a checkpoint, in fp32 and in bf16, that parity compares with.

data/reference/<model>/reference.json        prompts, greedy tokens with their best candidates, text, provenance
data/reference/<model>/<dtype>.safetensors   "<prompt>/<name>" with the names of `stages.hf.observe`
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.exits import StageError

if TYPE_CHECKING:
    import torch

FORMAT = 1
DTYPES = ("float32", "bfloat16")


class BundleError(StageError):
    """The bundle is absent, incomplete, or was made from other weights."""


@dataclass(frozen=True)
class GreedyReference:
    """transformers' greedy continuation of one prompt in one dtype.

    candidates[i]: the ids with the highest logits before token i; logits[i]: theirs in this dtype; float32[i]: theirs
    in the fp32 model on the same forced prefix.
    """

    token_ids: list[int]
    text: str
    candidates: list[list[int]]
    logits: list[list[float]]
    float32: list[list[float]]


@dataclass(frozen=True)
class Prompt:
    """`token_ids` is the whole prompt; `observed` says whether activations are kept for it."""

    text: str
    token_ids: list[int]
    observed: bool
    greedy: dict[str, GreedyReference]


def checkpoint_id(manifest: Path) -> str:
    """Key of a bundle's weights: sha256 of the download stage's manifest. Raises BundleError without one."""
    if not manifest.is_file():
        raise BundleError(f"{manifest} is absent: run `python -m stages.download` for this model first")
    return sha256(manifest.read_bytes()).hexdigest()


def write_bundle(
    directory: Path,
    checkpoint: str,
    prompts: list[Prompt],
    tensors: dict[str, dict[str, torch.Tensor]],
    provenance: dict[str, Any],
) -> None:
    """Write beside `directory`, then rename: a killed stage leaves the old bundle or none, never a part of one.

    tensors: dtype -> {"<prompt>/<name>": tensor}.
    """
    from safetensors.torch import save_file

    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    for stale in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    for dtype, named in tensors.items():
        save_file({name: tensor.cpu().contiguous() for name, tensor in named.items()}, partial / f"{dtype}.safetensors")
    record = {
        "format": FORMAT,
        "checkpoint": checkpoint,
        "provenance": provenance,
        "prompts": [asdict(prompt) for prompt in prompts],
    }
    (partial / "reference.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


class Bundle:
    """A bundle on disk. `activations` reads one prompt's tensors as fp32."""

    def __init__(self, directory: Path, checkpoint: str | None = None):
        self.directory = directory
        path = directory / "reference.json"
        if not path.is_file():
            raise BundleError(f"{path} is absent: run `python -m stages.baseline` for this model first")
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise BundleError(f"{path} has format {record['format']}, not {FORMAT}: run `python -m stages.baseline`")
        if checkpoint is not None and record["checkpoint"] != checkpoint:
            raise BundleError(f"{path} was made from other weights than data/hf holds: run `python -m stages.baseline`")
        self.prompts = [
            Prompt(
                entry["text"],
                entry["token_ids"],
                entry["observed"],
                {dtype: GreedyReference(**found) for dtype, found in entry["greedy"].items()},
            )
            for entry in record["prompts"]
        ]

    def activations(self, dtype: str, prompt: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        """{"embedding", "layers.<i>", "norm", "logits"} of prompt number `prompt`, fp32 on `device`."""
        from safetensors import safe_open

        prefix = f"{prompt}/"
        with safe_open(self.directory / f"{dtype}.safetensors", framework="pt", device=device) as tensors:
            names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no dict
            return {name.removeprefix(prefix): tensors.get_tensor(name).float() for name in names}
