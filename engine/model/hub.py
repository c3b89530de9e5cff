"""Models by name: a folder, or an id of the Hugging Face hub, fetched through `huggingface_hub` and its cache."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from engine.model.safetensors import INDEX_NAME, SINGLE_NAME

log = logging.getLogger(__name__)
EXAMPLE = "allenai/OLMo-2-0425-1B-Instruct"
# Files of a checkpoint by kind, as patterns of names: in no other format, and none of a subfolder.
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.safetensors",
           "pytorch_model*.safetensors.index.json")  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip
SETTINGS = ("config.json", "generation_config.json")
Part = Literal["model", "config", "tokenizer"]
_PATTERNS: dict[Part, tuple[str, ...]] = {
    "model": (*SETTINGS, *TOKENIZER, *WEIGHTS),
    "config": ("config.json",),
    "tokenizer": TOKENIZER,
}


class HubError(ValueError):
    """A name that stands for no model, or a model that the hub does not give.

    Args:
        reason: What is wrong with which name.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


def find_model(name: str | Path, part: Part = "model") -> Path:
    """The folder of a model: `name` itself, or where the hub's cache has what is fetched if it is not there yet.

    A folder comes first: an id names the hub's model where there is no folder of that name. Without a network, or with
    HF_HUB_OFFLINE=1, the copy in the cache is taken; a whole copy of a commit is taken without asking the hub.

    Args:
        name: A folder, or OWNER/NAME or OWNER/NAME@REVISION (a branch, tag or commit) on the hub.
        part: What is fetched: all that an engine needs, the config.json alone, or the tokenizer's files.

    Raises:
        HubError: There is no such folder and no such id; the hub does not have it or does not give it, or is out of
            reach and the cache has no whole copy; the disk is too small for it.
    """
    path = Path(name)
    if path.is_dir() and str(name):
        return path
    if path.is_file():
        raise HubError(f"{name} is a file", f"name the folder that holds it, or a hub id as {EXAMPLE}")
    repo, revision = parse_id(str(name))
    remedy = "give a folder that holds the model"
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and (folder := _cached(repo, revision, part)):
        return folder
    try:
        with explained(repo, revision, remedy):
            return _fetch(repo, revision, part)
    except HubError as error:
        from huggingface_hub import constants

        folder = _cached(repo, revision, part)
        if folder is None:
            raise
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s: the copy in the hub's cache is used", error.reason)
        return folder


def parse_id(name: str) -> tuple[str, str | None]:
    """OWNER/NAME and the revision of a hub id. Raises HubError for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, at, revision = name.partition("@")
    valid = repo.count("/") == 1 and bool(revision) == bool(at)
    with contextlib.suppress(HFValidationError):
        validate_repo_id(repo)
        if valid:
            return repo, revision or None
    raise HubError(
        f"there is no folder {name!r}, and it is no hub id",
        f"these are OWNER/NAME or OWNER/NAME@REVISION, as {EXAMPLE}",
    )


def model_name(name: str | Path) -> str:
    """What a model is called where nothing else is asked for: the folder's name, or the hub id without revision."""
    path = Path(name)
    return path.resolve().name if path.exists() else parse_id(str(name))[0]


@contextlib.contextmanager
def explained(repo: str, revision: str | None, remedy: str) -> Iterator[None]:
    """Turns what the hub's client raises into a HubError; `remedy` is what to do where the hub cannot help."""
    import httpx
    from huggingface_hub import constants, errors

    where = f"{repo}@{revision}" if revision else repo
    login = "log in with `hf auth login` to an account that may have it"
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{repo} is gated", f"accept its licence at {constants.ENDPOINT}/{repo}, then {login}") from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"{repo} has no revision {revision}", "it must be a branch, a tag or a commit on the hub"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"{repo} is not on the hub, or private", f"check the name, {login}, or {remedy}") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(
            f"{where} is not, or not whole, in the hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set",
            f"unset it and connect to fetch the model, or {remedy}",
        ) from None
    except (errors.LocalEntryNotFoundError, httpx.TransportError) as error:
        raise HubError(
            f"{where} cannot be fetched, the hub is out of reach ({type(error).__name__})",
            f"run again online to fetch or resume, or {remedy}",
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(f"the hub refuses {where} (HTTP {status})", f"{login}, or {remedy}") from None
        raise HubError(
            f"{where} cannot be fetched, the hub answers HTTP {status}", f"run again later, or {remedy}"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: of the client's own library for large files
        text, number = " ".join(str(error).split()), getattr(error, "errno", None)
        cache = f"the hub's cache ({constants.HF_HUB_CACHE})"
        if number == errno.ENOSPC or f"os error {errno.ENOSPC}" in text:
            raise HubError(
                f"{where} has no room in {cache}, the disk is full", "make room, or set HF_HUB_CACHE to another folder"
            ) from None
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT):
            raise HubError(
                f"{where} cannot be written to {cache}, {text}", "set HF_HUB_CACHE to a folder that can be written"
            ) from None
        raise HubError(f"{where} cannot be fetched, {text}", f"run again to resume, or {remedy}") from None


def _fetch(repo: str, revision: str | None, part: Part) -> Path:
    """The snapshot's folder, whole. The hub is asked; only what the cache does not have is fetched."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import tqdm

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if "/" not in file.rfilename and any(fnmatch(file.rfilename, pattern) for pattern in _PATTERNS[part])
    }
    required = {
        "model": {"config.json": "config.json", "*.safetensors": "safetensors files"},
        "config": {"config.json": "config.json"},
        "tokenizer": {"tokenizer.json": "tokenizer.json"},
    }
    for pattern, what in required[part].items():
        if not any(fnmatch(name, pattern) for name in sizes):
            raise HubError(f"{repo} holds no {what}", "the engine reads checkpoints in transformers' format alone")
    lacking = _lacking_bytes(repo, info.sha, sizes)
    _check_space(repo, lacking)

    bars: list[tqdm] = []

    class Bar(tqdm):
        """Shown on a terminal, where there is something to wait for."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            settings["disable"] = settings.get("disable") if lacking else True
            super().__init__(*args, **settings)
            bars.append(self)

    patterns = list(_PATTERNS[part])
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], tqdm_class=Bar
        )
    finally:
        for bar in bars:  # left to themselves some would be drawn once more over what is printed later
            bar.close()
    return Path(found)


def _lacking_bytes(repo: str, commit: str | None, sizes: Mapping[str, int]) -> int:
    """Bytes of the files that the hub's cache does not have."""
    from huggingface_hub import try_to_load_from_cache

    return sum(
        size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    )


def _check_space(repo: str, size: int) -> None:
    """Raises HubError where the disk of the hub's cache has no room for `size` bytes, but for what is there of them."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    begun = (cache / f"models--{repo.replace('/', '--')}" / "blobs").glob("*.incomplete")
    free = shutil.disk_usage(cache).free
    if size - sum(path.stat().st_blocks * 512 for path in begun) > free:
        raise HubError(
            f"{repo} takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in the hub's cache ({cache})",
            "make room there, or set HF_HUB_CACHE to a folder on another disk",
        )


def _cached(repo: str, revision: str | None, part: Part) -> Path | None:
    """The snapshot's folder in the hub's cache where it is whole, without asking the hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(_PATTERNS[part]), ignore_patterns=["*/*"],
                local_files_only=True,
            )
        )  # fmt: skip
    except errors.LocalEntryNotFoundError:
        return None
    return folder if all((folder / name).exists() for name in _needed(folder, part)) else None


def _needed(folder: Path, part: Part) -> list[str]:
    """Names of the files without which there is no `part` in a folder; the index says which shards there are."""
    if part != "model":
        return ["config.json" if part == "config" else "tokenizer.json"]
    if not (folder / INDEX_NAME).exists():
        return ["config.json", SINGLE_NAME]
    with contextlib.suppress(
        ValueError, AttributeError, KeyError, TypeError
    ):  # loading says what is wrong with a damaged one
        shards = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
        return ["config.json", *sorted(set(shards))]
    return ["config.json"]
