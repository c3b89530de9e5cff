"""The safetensors format, read with its own parser: an 8-byte little-endian length, a JSON header, then raw tensors.

Every byte of a file must be accounted for: the header lies inside the file, each tensor's range has exactly the bytes
of its shape and dtype, and the ranges follow one another with no hole and no overlap up to the end of the file.
Format: https://huggingface.co/docs/safetensors
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint file that is damaged, incomplete, or not what the configuration asks for."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one file. `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    shard: str

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: str | Path) -> list[TensorEntry]:
    """Entries of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: The file is absent or any rule of the format is broken; names the file, tensor and value.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for the 8-byte header length")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header length {length} is above the format's {MAX_HEADER_BYTES} bytes")
            if 8 + length > size:
                raise CheckpointError(f"{path}: header length {length} reaches beyond the file's {size} bytes")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    header = _parse_header(path, raw)

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    data = 8 + length
    entries = [_entry(path, name, value, data, size) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = data
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} begins at byte {entry.begin} and {what}; {position} was expected"
            )
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path}: tensors end at byte {position} but the file has {size} bytes")
    return entries


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return result

    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: the header starts with {raw[:1]!r}, not with '{{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    return header


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is described by {value!r}, not by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; one of {', '.join(DTYPE_BYTES)} was expected")
    if not isinstance(shape, list) or not all(_is_size(extent) for extent in shape):
        raise CheckpointError(f"{where} has shape {shape!r}; a list of sizes was expected")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(f"{where} has data_offsets {offsets!r}; two byte offsets were expected")
    begin, end = offsets
    if begin > end or data + end > size:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, outside the {size - data} data bytes of the file")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(f"{where} has {end - begin} bytes; {dtype} of shape {shape} takes {expected}")
    return TensorEntry(name, dtype, tuple(shape), data + begin, data + end, path.name)


def read_index(directory: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder by name: from its index and shards, or from its single file.

    Raises:
        CheckpointError: No checkpoint, a shard is absent, a tensor is in the index but not in its shard or the other
            way round, or a header is damaged.
    """
    directory = Path(directory)
    index = directory / INDEX_NAME
    if not index.exists():
        if not (directory / SINGLE_NAME).exists():
            raise CheckpointError(f"{directory}: holds neither {INDEX_NAME} nor {SINGLE_NAME}")
        return {entry.name: entry for entry in read_header(directory / SINGLE_NAME)}

    try:
        listing = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: not JSON ({error})") from None
    weight_map = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: tensor {name!r} lies in {shard!r}, which is not a file name")

    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).exists():
            missing = next(name for name, file in weight_map.items() if file == shard)
            raise CheckpointError(f"{directory / shard}: the shard is absent; {index.name} expects {missing!r} in it")
        found = {entry.name: entry for entry in read_header(directory / shard)}
        for name in found:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{directory / shard}: holds tensor {name!r}, which {index.name} places in {weight_map.get(name)!r}"
                )
        for name, file in weight_map.items():
            if file == shard and name not in found:
                raise CheckpointError(f"{directory / shard}: lacks tensor {name!r}, which {index.name} places there")
        tensors |= found
    return tensors


def read_tensor_bytes(directory: str | Path, entry: TensorEntry) -> bytes:
    """The raw little-endian bytes of one tensor of the checkpoint in `directory`.

    Raises:
        CheckpointError: The shard ends before the tensor does.
    """
    path = Path(directory) / entry.shard
    with path.open("rb") as file:
        file.seek(entry.begin)
        raw = file.read(entry.nbytes)
    if len(raw) != entry.nbytes:
        raise CheckpointError(f"{path}: tensor {entry.name!r} has {len(raw)} of {entry.nbytes} bytes")
    return raw
