"""The safetensors parser accepts what the safetensors library writes, and nothing that is damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.safetensors import (
    DTYPE_BYTES,
    INDEX_NAME,
    CheckpointError,
    read_header,
    read_index,
    read_tensor_bytes,
)


def write(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path: Path):
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b.c": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "ünï": torch.ones(1, dtype=torch.bool),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    entries = {e.name: e for e in read_header(path)}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = entries[name]
        assert found.shape == tuple(tensor.shape) and found.shard == "model.safetensors"
        raw = read_tensor_bytes(tmp_path, found)
        assert raw == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert read_index(tmp_path).keys() == tensors.keys()


GOOD = {"a": entry(), "b": entry("BF16", (4,), (8, 16))}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))}, b"." * 12, "'b' begins at byte .* overlaps"),
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(10, 18))}, b"." * 18, "'b' begins at byte .* hole"),
        ({"a": entry(offsets=(4, 12))}, b"." * 12, "'a' begins at byte .* hole"),
        ({"a": entry()}, b"." * 9, "tensors end at byte"),
        ({}, b".", "tensors end at byte"),
        ({"a": entry()}, b"." * 7, "'a' has data_offsets .* outside the 7 data bytes"),
        ({"a": entry(offsets=(8, 0))}, b"." * 8, "outside"),
        ({"a": entry(shape=(3,))}, b"." * 8, "'a' has 8 bytes; F32 of shape .3. takes 12"),
        ({"a": entry(dtype="BF16")}, b"." * 8, "'a' has 8 bytes; BF16"),
        ({"a": entry(dtype="F4")}, b"." * 8, "'a' has dtype 'F4'"),
        ({"a": {**entry(), "dtype": None}}, b"." * 8, "dtype None"),
        ({"a": entry(shape=(-2,))}, b"." * 8, "shape .-2."),
        ({"a": entry(shape=(2.0,))}, b"." * 8, "shape .2.0."),
        ({"a": entry(shape=(True, 2))}, b"." * 8, "shape"),
        ({"a": {**entry(), "shape": 2}}, b"." * 8, "shape 2"),
        ({"a": entry(offsets=(0,))}, b"." * 8, "data_offsets .0."),
        ({"a": entry(offsets=(-8, 0))}, b"." * 8, "data_offsets"),
        ({"a": entry(offsets=(0, "8"))}, b"." * 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"." * 8, "'a' is described by"),
        ({"a": {**entry(), "extra": 1}}, b"." * 8, "'a' is described by"),
        ({"a": [1]}, b"." * 8, "'a' is described by"),
        ({"__metadata__": {"n": 1}, "a": entry()}, b"." * 8, "__metadata__"),
        ({"__metadata__": "x"}, b"", "__metadata__"),
        (b"[]", b"", r"starts with b'\['"),
        (b" {}", b"", "starts with"),
        (b"{", b"", "not JSON"),
        (b"{} x", b"", "not JSON"),
        (b'{"\xff": 1}', b"", "not JSON"),
        (b"{" + b'"a":{' * 5000, b"", "not JSON"),
        (b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {}}', b"." * 8, "names 'a' twice"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_damage_is_named(tmp_path: Path, header: Any, data: bytes, message: str):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)


def test_truncated_and_absent_files(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)
    path.write_bytes(b"\x01\x02")
    with pytest.raises(CheckpointError, match="2 bytes, too short"):
        read_header(path)
    write(path, GOOD, b"", length=10_000)
    with pytest.raises(CheckpointError, match="header length 10000 reaches beyond"):
        read_header(path)
    write(path, GOOD, b"", length=2**63)
    with pytest.raises(CheckpointError, match="above the format's"):
        read_header(path)
    write(path, GOOD, b"." * 16)
    found = read_header(path)[1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="'b' has 5 of 8 bytes"):
        read_tensor_bytes(tmp_path, found)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_header_is_read_exactly_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Valid layouts survive; after any one change of a byte the parser agrees with itself or raises CheckpointError."""
    shapes = st.lists(st.integers(0, 4), max_size=3)
    items = data.draw(st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes)))
    items.pop("__metadata__", None)
    header, position = {}, 0
    for name, (dtype, shape) in items.items():
        size = DTYPE_BYTES[dtype]
        for extent in shape:
            size *= extent
        header[name] = entry(dtype, shape, (position, position + size))
        position += size
    path = write(tmp_path_factory.mktemp("h") / "x.safetensors", header, bytes(position))
    entries = {e.name: e for e in read_header(path)}
    assert {n: (e.dtype, list(e.shape)) for n, e in entries.items()} == {n: (d, s) for n, (d, s) in items.items()}

    raw = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(raw) - position - 1))
    raw[where] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        changed = read_header(path)
    except CheckpointError as error:
        assert "x.safetensors" in str(error)
    else:
        assert sum(e.nbytes for e in changed) == position


def sharded(path: Path, weight_map: dict[str, str], shards: dict[str, list[str]], index: Any = None) -> Path:
    for shard, names in shards.items():
        safetensors.torch.save_file({name: torch.ones(2) for name in names}, path / shard)
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} if index is None else index))
    return path


def test_index(tmp_path: Path):
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    found = read_index(tmp_path)
    assert {name: e.shard for name, e in found.items()} == {"a": "1.safetensors", "b": "2.safetensors"}


@pytest.mark.parametrize(
    ("weight_map", "shards", "message"),
    [
        ({"a": "1", "b": "2"}, {"1": ["a"]}, "2: the shard is absent; .* expects 'b'"),
        ({"a": "1", "b": "1"}, {"1": ["a"]}, "1: lacks tensor 'b'"),
        ({"a": "1"}, {"1": ["a", "b"]}, "1: holds tensor 'b', which .* places in None"),
        ({"a": "1", "b": "2"}, {"1": ["a", "b"], "2": ["b"]}, "1: holds tensor 'b', which .* places in '2'"),
        ({"a": "../1"}, {"1": ["a"]}, "'a' lies in '../1'"),
        ({"a": 5}, {"1": ["a"]}, "'a' lies in 5"),
        ({}, {}, "no weight_map"),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, weight_map: Any, shards: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        read_index(sharded(tmp_path, weight_map, shards))


@pytest.mark.parametrize("index", [[], {"metadata": {}}, {"weight_map": [1]}])
def test_index_of_another_kind(tmp_path: Path, index: Any):
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_index(sharded(tmp_path, {}, {}, index))


def test_no_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds neither .*index.json nor model.safetensors"):
        read_index(tmp_path)
    (tmp_path / INDEX_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_index(tmp_path)
