"""Where a checkpoint's files come from: the Hugging Face hub, a folder, or a seed."""

import contextlib
import errno
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import yaml

from engine.model import hub
from engine.model.config import ModelConfig
from engine.model.errors import ConfigError
from engine.model.tensors import tensor_shapes
from stages.exits import StageError
from stages.params import CONF, Model, ParamsError, thaw
from stages.stage import cache_folder, write_whole

BUNDLED = Path("data/models/olmo2-tiny")
WEIGHTS, TOKENIZER, _SETTINGS = (
    re.compile("|".join(map(fnmatch.translate, patterns))) for patterns in (hub.WEIGHTS, hub.TOKENIZER, hub.SETTINGS)
)
METADATA = re.compile(rf"{_SETTINGS.pattern}|^(README(\.md|\.txt)?|(LICENSE|NOTICE|USE_POLICY)[^/]*)$")
FETCHED_AT_ONCE = 4
SHARD_BYTES = 5_000_000_000
"""The hub's own limit for a shard of a checkpoint that transformers saved."""


def is_wanted(name: str) -> bool:
    """Whether a file of a repository or folder belongs to the checkpoint: weights, tokenizer, metadata; no other
    formats.
    """
    return any(pattern.match(name) for pattern in (WEIGHTS, TOKENIZER, METADATA))


class Source(Protocol):
    """Something a snapshot is made from."""

    def describe(self) -> dict[str, Any]:
        """Fields that decide the files' content, for the manifest."""
        ...

    def check(self) -> None:
        """Raises StageError for a source that is known not to be there, without asking anybody outside."""
        ...

    def names(self) -> list[str]:
        """Every file a whole snapshot has. Raises StageError where that cannot be known."""
        ...

    def unchanged(self, name: str, staged: os.stat_result) -> bool:
        """Whether the source still has the file that was staged and verified."""
        ...

    def place(self, names: list[str], folder: Path) -> Iterator[str]:
        """Puts the files into `folder`, each whole or not at all, and yields each name as it is there."""
        ...

    def verify(self, name: str, path: Path, sha256: str) -> None:
        """Raises StageError, after removing what is damaged, where the source knows better what the file should be."""
        ...


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy of it on another device; in one step, replacing what was
    there.
    """
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.part")
    beside.unlink(missing_ok=True)
    try:
        try:
            os.link(source, beside)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            shutil.copy2(source, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises StageError where the disk of `folder` lacks `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StageError(f"{folder} needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")


@dataclass(frozen=True)
class Folder:
    """A local snapshot: the bundled model's or the user's own."""

    weights: str
    path: Path

    def describe(self) -> dict[str, Any]:
        return {"weights": self.weights, "path": str(self.path)}

    def check(self) -> None:
        if not self.path.is_dir():
            raise StageError(f"model.path = '{self.path}': should be a folder that is there")
        if not (self.path / "config.json").is_file():
            raise StageError(f"model.path = '{self.path}': should be a checkpoint's folder, with its config.json")

    def names(self) -> list[str]:
        self.check()
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file() and is_wanted(entry.name))

    def unchanged(self, name: str, staged: os.stat_result) -> bool:
        source = (self.path / name).stat()
        return (source.st_size, source.st_mtime_ns) == (staged.st_size, staged.st_mtime_ns)

    def place(self, names: list[str], folder: Path) -> Iterator[str]:
        for name in names:
            # A snapshot of the hub's cache is made of symbolic links; what they name is linked.
            link((self.path / name).resolve(), folder / name)
            yield name

    def verify(self, name: str, path: Path, sha256: str) -> None:
        pass


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub at one commit, fetched through `huggingface_hub` and its cache.

    The cache is outside the working directory, so an experiment run elsewhere fetches nothing again; an interrupted
    fetch is resumed. The commit's listing, which cannot change, is kept in AFS_CACHE.
    """

    hub_id: str
    revision: str
    force: bool

    def describe(self) -> dict[str, Any]:
        return {"weights": "hub", "hub_id": self.hub_id, "revision": self.revision}

    def check(self) -> None:
        pass

    def names(self) -> list[str]:
        return sorted(self._listing())

    def unchanged(self, name: str, staged: os.stat_result) -> bool:
        return True

    def _listing(self) -> dict[str, dict[str, Any]]:
        """name → {bytes, sha256 of a large file, git's sha1 of a small one}."""
        kept = cache_folder("hub") / f"{self.hub_id.replace('/', '--')}@{self.revision}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(kept.read_text(encoding="utf-8"))
        from huggingface_hub import HfApi

        with self._explained():
            info = HfApi().model_info(self.hub_id, revision=self.revision, files_metadata=True)
        listing = {
            file.rfilename: {
                "bytes": file.size,
                "sha256": file.lfs.sha256 if file.lfs else None,
                "git_sha1": None if file.lfs else file.blob_id,
            }
            for file in info.siblings or []
            if is_wanted(file.rfilename)
        }
        if not any(name.endswith(".safetensors") for name in listing):
            raise StageError(f"{self.hub_id}@{self.revision} holds no safetensors files")
        write_whole(kept, json.dumps(listing, indent=2))
        return listing

    def place(self, names: list[str], folder: Path) -> Iterator[str]:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        listing = self._listing()
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        sizes = {name: listing[name]["bytes"] or 0 for name in names}
        cached = {
            name for name in names if isinstance(try_to_load_from_cache(self.hub_id, name, revision=self.revision), str)
        }
        check_space(cache, sum(size for name, size in sizes.items() if self.force or name not in cached))
        if cache.stat().st_dev != folder.stat().st_dev:
            check_space(folder, sum(sizes.values()))

        def fetch(name: str) -> str:
            with self._explained():
                return hf_hub_download(self.hub_id, name, revision=self.revision, force_download=self.force)

        for name, file in zip(names, fetch_beside(fetch, names), strict=True):
            link(Path(file).resolve(), folder / name)
            yield name

    def verify(self, name: str, path: Path, sha256: str) -> None:
        known = self._listing()[name]
        if known["sha256"]:
            kind, found, expected = "sha256", sha256, known["sha256"]
        else:
            content = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            kind, found, expected = "git sha1", blob.hexdigest(), known["git_sha1"]
        if found == expected:
            return
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.hub_id, name, revision=self.revision)
        if isinstance(cached, str):
            Path(cached).resolve().unlink(missing_ok=True)
            Path(cached).unlink(missing_ok=True)
        path.unlink()
        raise StageError(
            f"{self.hub_id}: {name} has {kind} {found}, the hub says {expected}; it was removed, run again to fetch it"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the hub's client raises into one line that says what to do."""
        remedy = "say model.weights=path model.path=FOLDER, or model.weights=random"
        try:
            with hub.explained(self.hub_id, self.revision, remedy):
                yield
        except hub.HubError as error:
            raise StageError(str(error)) from None


def fetch_beside(fetch: Callable[[str], str], names: Sequence[str]) -> Iterator[str]:
    """Yields `fetch`'s result for each name, in order, while threads fetch the next ones.

    An executor would wait for what is on its way, gigabytes perhaps, before Ctrl-C or an error ends the process.
    """
    results: dict[str, Future[str]] = {name: Future() for name in names}
    waiting = deque(names)

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                result = results[name := waiting.popleft()]
                try:
                    result.set_result(fetch(name))
                except BaseException as error:
                    result.set_exception(error)

    for _ in range(FETCHED_AT_ONCE):
        Thread(target=work, daemon=True).start()
    try:
        for result in results.values():
            yield result.result()
    finally:
        waiting.clear()


@dataclass(frozen=True)
class Random:
    """A checkpoint of the model's true shapes and names, sharded as the hub shards, from a seed; no network.

    Made shard by shard, on the GPU if there is one, so the bytes are the same for the same seed on the same kind of
    device. Matrices are normal with the config's `initializer_range`, norms are near 1. The tokenizer is the bundled
    model's, so that text encodes; its ids reach only the vocabulary's beginning.
    """

    architecture: dict[str, Any]
    seed: int
    gpu: bool

    def describe(self) -> dict[str, Any]:
        fields = hashlib.sha256(json.dumps(self.architecture, sort_keys=True).encode()).hexdigest()
        return {
            "weights": "random",
            "seed": self.seed,
            "device": "cuda" if self.gpu else "cpu",
            "architecture_sha256": fields,
            "tokenizer": str(BUNDLED),
        }

    def check(self) -> None:
        pass

    def names(self) -> list[str]:
        shards = list(self._shards())
        index = ["model.safetensors.index.json"] if len(shards) > 1 else []
        return sorted([*shards, *index, "config.json", "generation_config.json", *self._tokenizer_names()])

    def unchanged(self, name: str, staged: os.stat_result) -> bool:
        return not TOKENIZER.match(name) or Folder("bundled", BUNDLED).unchanged(name, staged)

    def _tokenizer_names(self) -> list[str]:
        return sorted(path.name for path in BUNDLED.glob("*") if TOKENIZER.match(path.name))

    def _config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.architecture)

    def _shards(self) -> dict[str, dict[str, tuple[int, ...]]]:
        config = self._config()
        return plan_shards(tensor_shapes(config), 4 if config.dtype == "float32" else 2, SHARD_BYTES)

    def place(self, names: list[str], folder: Path) -> Iterator[str]:
        shards = self._shards()
        itemsize = 4 if self._config().dtype == "float32" else 2
        check_space(folder, sum(count_bytes(shards[name], itemsize) for name in names if name in shards))
        for name in names:
            if name in shards:
                self._make_shard(shards, name, folder / name)
            elif name == "config.json":
                write_whole(folder / name, json.dumps(self.architecture, indent=2) + "\n")
            elif name == "generation_config.json":
                ids = {key: self.architecture.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
                known = {key: value for key, value in ids.items() if value is not None}
                write_whole(folder / name, json.dumps(known, indent=2) + "\n")
            elif name == "model.safetensors.index.json":
                weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
                total = sum(count_bytes(tensors, itemsize) for tensors in shards.values())
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_whole(folder / name, json.dumps(index, indent=2, sort_keys=True) + "\n")
            else:
                link(BUNDLED / name, folder / name)
            yield name

    def _make_shard(self, shards: dict[str, dict[str, tuple[int, ...]]], name: str, path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        dtype = getattr(torch, self._config().dtype or "bfloat16")
        device = "cuda" if self.gpu else "cpu"
        spread = float(self.architecture.get("initializer_range", 0.02))
        numbers = {tensor: number for number, tensor in enumerate(tensor_shapes(self._config()))}
        tensors = {}
        for tensor, shape in shards[name].items():
            # A seed of its own for each tensor, so that a shard does not depend on those before it.
            generator = torch.Generator(device).manual_seed((self.seed * 1_000_003 + numbers[tensor]) % 2**63)
            values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            tensors[tensor] = (values.mul_(0.05).add_(1) if len(shape) == 1 else values.mul_(spread)).cpu()
        beside = path.with_name(f".{path.name}.part")
        try:
            save_file(tensors, beside, metadata={"format": "pt"})
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def verify(self, name: str, path: Path, sha256: str) -> None:
        pass


def count_bytes(shapes: dict[str, tuple[int, ...]], itemsize: int) -> int:
    """Bytes of tensors of these shapes."""
    return sum(math.prod(shape) * itemsize for shape in shapes.values())


def plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name → its tensors: in order, a new shard where the next tensor would pass `limit` bytes, as the hub
    does.
    """
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = count_bytes({name: shape}, itemsize)
        if parts[-1] and filled + size > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def read_architecture(model: Model) -> ModelConfig:
    """The model's architecture as the engine has it. Raises ParamsError where the engine refuses it."""
    try:
        return ModelConfig.from_dict(thaw(model.architecture))
    except ConfigError as error:
        raise ParamsError(f"model.architecture.{error}") from None


USED_BY = {"hub_id": ("hub",), "revision": ("hub",), "path": ("path", "bundled"), "seed": ("random",)}
"""Key of a model → the values of `model.weights` that it counts for."""


def check_unused(model: Model) -> None:
    """Raises ParamsError for a key that is not as in the model's file of `conf/`, and that `model.weights` ignores."""
    usual = yaml.safe_load((CONF / "model" / f"{model.name}.yaml").read_text(encoding="utf-8"))
    for key, kinds in USED_BY.items():
        given = getattr(model, key)
        if model.weights not in kinds and given not in (None, usual[key]):
            raise ParamsError(
                f"model.{key} = {given!r} changes nothing with model.weights = {model.weights}: say "
                f"model.weights={kinds[0]}"
            )


def make_source(model: Model, gpu: bool) -> Source:
    """The source `model.weights` asks for. Raises ParamsError where what it needs is not said, and where something is
    said that it does not need.
    """
    check_unused(model)
    if model.weights == "random":
        return Random(thaw(model.architecture), model.seed, gpu)
    if model.weights == "hub":
        if model.hub_id is None:
            raise ParamsError(f"model {model.name} is not on the hub: model.weights is bundled, path or random")
        if model.revision is None:
            raise ParamsError(
                f"model.revision is null: say model.revision=<40-digit commit of {model.hub_id}> to pin what is fetched"
            )
        return Hub(model.hub_id, model.revision, model.force)
    if model.path is None:
        remedy = "say model.path=FOLDER" if model.weights == "path" else "it is not bundled; say hub, path or random"
        raise ParamsError(f"model.weights={model.weights} of {model.name} has no model.path: {remedy}")
    return Folder(model.weights, Path(model.path))


def select_kind(names: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """The names of one kind: WEIGHTS, TOKENIZER or METADATA."""
    return [name for name in names if pattern.match(name)]
