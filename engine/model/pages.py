"""A checkpoint's tensors as they lie in its files, without a copy."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from engine.model.safetensors import TensorEntry

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPES = FLOATS | {"I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}


class Pages:
    """The files of the checkpoint in `directory`, each mapped into memory when a tensor of it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, mmap.mmap] = {}

    def tensor(self, entry: TensorEntry) -> Tensor:
        """The tensor of an entry whose dtype is one of DTYPES. It is for reading: writes reach no file."""
        if entry.shard not in self._files:
            with (self._directory / entry.shard).open("rb") as file:
                # Private pages: torch wants a writable buffer, and nothing is ever written to them.
                self._files[entry.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = DTYPES[entry.dtype]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        count, pages = entry.nbytes // dtype.itemsize, self._files[entry.shard]
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=entry.begin).view(entry.shape)
