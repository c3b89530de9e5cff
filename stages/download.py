"""Stages a checkpoint: `hub`, `path`, `bundled` or `random` files into `data/hf`, and a manifest of their sha256 sums.

    data/hf/hf_snapshot/<model>/     the whole checkpoint, what the engine and transformers read
    data/hf/raw_weights/<model>/     its safetensors files and their index      } hard links
    data/hf/raw_tokenizer/<model>/   its tokenizer's files                      } (copies only where
    data/hf/metadata/<model>/        config.json, licence, …                    } links cannot be)
    data/hf/<model>.manifest.json    source, sizes and sha256 sums: what later stages depend on
    data/hf/<model>.state.json       sizes and times of the files when they were verified; not part of the pipeline

The files lie outside DVC's cache. This stage always runs: it looks whether every file is there as it was verified,
fetches only what is not, and writes the same manifest again, so that nothing after it runs without need. The manifest
is taken away before a file changes and written last: a killed run, a full disk or a lost network leaves none, so no
stage takes its files for whole ones, and the next run goes on from what is there.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.model.config import ModelConfig
from engine.model.errors import ConfigError
from engine.model.safetensors import CheckpointError, read_index
from engine.model.tensors import tensor_shapes
from stages.exits import StageError
from stages.fit import check_fit
from stages.host import read_host
from stages.params import Model
from stages.sources import METADATA, TOKENIZER, WEIGHTS, Source, link, make_source, read_architecture, select_kind
from stages.stage import HF, Run, stage, write_whole

KINDS = {"raw_weights": WEIGHTS, "raw_tokenizer": TOKENIZER, "metadata": METADATA}


@stage(Model)
def main(run: Run, model: Model) -> None:
    """Brings `data/hf` up to date and writes the manifest."""
    source = make_source(model, gpu=bool(read_host().gpus))
    source.check()
    folder, written = run.out(HF / "hf_snapshot" / model.name), run.out(HF / f"{model.name}.manifest.json")
    if run.by_hand:  # before the pipeline's, provision has looked
        check_fit(model, folder, gpu=False, pipeline=False)
    files = bring(source, folder, run.out(HF / f"{model.name}.state.json"), written, model.force)
    check_snapshot(folder, model)
    for kind, pattern in KINDS.items():
        place_links(folder, run.out(HF / kind / model.name), select_kind(files, pattern))
    manifest = {"model": model.name, "source": source.describe(), "files": files}
    write_whole(written, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    total = sum(record["bytes"] for record in files.values())
    print(f"{model.name}: {len(files)} files, {total / 1e9:.3f} GB, from {model.weights}, in {folder}")


def bring(source: Source, folder: Path, state_path: Path, manifest: Path, force: bool) -> dict[str, dict[str, Any]]:
    """Makes `folder` hold exactly the source's files, verified, and returns {name: {bytes, sha256}}.

    A file that is as it was when last verified is not read again, let alone fetched; `force` fetches all. Before
    anything changes `manifest` is removed. Raises StageError.
    """
    identity = source.describe()
    state = read_state(state_path)
    records = state["files"] if state.get("source") == identity and not force else {}
    names = source.names()
    intact = {
        name: records[name] for name in names if name in records and is_intact(source, folder, name, records[name])
    }
    stale = [entry for entry in folder.glob("*") if entry.name not in names]
    missing = [name for name in names if name not in intact]
    if stale or missing:
        manifest.unlink(missing_ok=True)
    folder.mkdir(exist_ok=True)
    for entry in stale:
        entry.unlink()
    try:
        for name in source.place(missing, folder) if missing else ():
            path = folder / name
            digest = sha256(path)
            source.verify(name, path, digest)
            found = path.stat()
            intact[name] = {"bytes": found.st_size, "sha256": digest, "mtime_ns": found.st_mtime_ns}
            write_whole(state_path, json.dumps({"source": identity, "files": intact}, indent=2) + "\n")
            print(f"  {name}  {found.st_size:,} bytes  sha256 {digest[:16]}…", flush=True)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    return {name: {key: intact[name][key] for key in ("bytes", "sha256")} for name in names}


def read_state(path: Path) -> dict[str, Any]:
    """Read what the last run verified; empty where that is not known."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("files"), dict) else {}


def is_intact(source: Source, folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Whether a file is still the one that was verified."""
    try:
        staged = (folder / name).stat()
        same = (staged.st_size, staged.st_mtime_ns) == (record["bytes"], record["mtime_ns"])
        return same and source.unchanged(name, staged)
    except (OSError, KeyError):
        return False


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_links(folder: Path, target: Path, names: list[str]) -> None:
    """Makes `target` hold links to just these files of `folder`."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in target.iterdir():
        if entry.name not in names:
            entry.unlink()
    for name in names:
        link(folder / name, target / name)


def check_snapshot(folder: Path, model: Model) -> None:
    """Raises StageError where the staged files are no whole checkpoint, or one of another model than the parameters
    say.
    """
    try:
        staged, wanted = ModelConfig.from_file(folder), read_architecture(model)
        tensors = read_index(folder)
    except (ConfigError, CheckpointError) as error:
        raise StageError(str(error)) from None
    for name, shape in tensor_shapes(wanted).items():
        other = tensor_shapes(staged).get(name)
        if other != shape:
            raise StageError(f"{folder} is another model than {model.name}: {name} is {other} there, not {shape}")
    if not tensors:
        raise StageError(f"{folder} holds no tensors")


if __name__ == "__main__":
    main()
