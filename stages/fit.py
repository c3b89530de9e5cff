"""Whether a model fits this machine: bytes it needs on disk, in memory and on the GPU, known before anything is made.

They follow from the architecture alone, and are the least: caches, activations and other programs come on top.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.model.tensors import parameter_count, tensor_shapes
from engine.runtime.memory import free_host_bytes
from stages.exits import StageError
from stages.host import free_gpu_bytes
from stages.params import Model
from stages.sources import SHARD_BYTES, count_bytes, plan_shards, read_architecture

FLOAT32 = 4


@dataclass(frozen=True)
class Need:
    """Bytes that are needed of something, and those that are free of it now."""

    of: str
    needed: int
    free: int
    why: str

    def __str__(self) -> str:
        return f"{show(self.needed)} {self.of} ({show(self.free)} free)"


def show(size: int) -> str:
    """Bytes for a reader."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit / 10), (1e3, "kB"))
    return f"{size / unit:,.1f} {name}"


def list_needs(model: Model, snapshot: Path, gpu: bool, pipeline: bool) -> list[Need]:
    """Needs of the pipeline, or of download alone, on this machine for a model that is to be staged at `snapshot`.

    gpu: whether it is measured on a GPU. Raises ParamsError for an architecture that the engine refuses.
    """
    config = read_architecture(model)
    itemsize = 4 if config.dtype == "float32" else 2
    shapes = tensor_shapes(config)
    stored = count_bytes(shapes, itemsize)
    needs = list(list_disks(model, snapshot, stored))
    memory = {"its largest shard while it is made": 0}
    if model.weights == "random":
        shards = plan_shards(shapes, itemsize, SHARD_BYTES).values()
        memory = {"its largest shard while it is made": max(count_bytes(shard, itemsize) for shard in shards)}
    whole = FLOAT32 * parameter_count(config)
    if pipeline and gpu:
        memory["transformers loads it there first"] = stored
        needs.append(
            Need("on the GPU", whole, free_gpu_bytes(), "all of it in float32, as baseline and parity have it")
        )
    elif pipeline:
        memory["all of it in float32, as baseline and parity have it"] = whole
    why = max(memory, key=lambda reason: memory[reason])
    needs.insert(1, Need("of memory", memory[why], free_host_bytes(), why))
    return needs


def list_disks(model: Model, snapshot: Path, stored: int) -> Iterator[Need]:
    """Disks and the bytes that staging still writes there: `snapshot`'s and, if another, that of the hub's cache."""
    place = find_existing(snapshot)
    there = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    origin = None
    if model.weights == "hub":
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        origin = find_existing(cache)
        blobs = (cache / f"models--{str(model.hub_id).replace('/', '--')}" / "blobs").glob("*")
        fetched = sum(path.stat().st_blocks * 512 for path in blobs)
    elif model.weights in ("path", "bundled"):
        origin, fetched = find_existing(Path(str(model.path))), stored
    else:
        fetched = 0
    apart = origin is not None and origin.stat().st_dev != place.stat().st_dev
    lacking = stored - there if apart or origin is None else stored - max(there, fetched)
    yield Need("of disk", max(0, lacking), shutil.disk_usage(place).free, f"its weights, in {snapshot}")
    if apart and origin is not None and fetched < stored:
        yield Need("of disk", stored - fetched, shutil.disk_usage(origin).free, f"its weights, in {origin}")


def find_existing(path: Path) -> Path:
    """The path, or the nearest folder around it that there is."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if place.exists())


def check_fit(model: Model, snapshot: Path, gpu: bool, pipeline: bool) -> None:
    """Prints in a line what a model needs and what is free. Raises StageError where that is less.

    pipeline: Whether all stages are to run on it, rather than download alone.
    """
    needs = list_needs(model, snapshot, gpu, pipeline)
    print(f"{model.name} from {model.weights} needs {', '.join(map(str, needs))}", flush=True)
    lacking = [f"{need}: {need.why}" for need in needs if need.needed > need.free]
    if lacking:
        remedy = "choose a smaller model, or run by hand the stages that need less" if pipeline else "make room"
        raise StageError(f"{model.name} does not fit this machine: {'; '.join(lacking)}; {remedy}")
