"""What the engine switches on, and the operations that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from engine.config import DTYPES
from engine.kv_cache import PAGE_SIZE, PAGE_SIZES
from engine.ops import Ops, ReferenceOps

_CHOICES = {
    "backend": ("reference", "cuda"),
    "device": ("cpu", "cuda"),
    "dtype": ("auto", *DTYPES),
    "attention": ("naive", "flash"),
    "linear": ("naive", "streamed", "tiled"),
    "sampling": ("naive", "split"),
    "kv_cache": ("none", "contiguous", "paged"),
    "cuda_graph": (False, True),
    "batching": ("inflight", "continuous"),
    "prefix_cache": (False, True),
}


@dataclass(frozen=True)
class EngineConfig:
    """What the engine switches on. `attention`, `linear`, `sampling` name the versions that the cuda backend runs.

    Raises:
        ValueError: A field has a value that does not exist; names the field, the value and the choices.
    """

    backend: Literal["reference", "cuda"] = "reference"
    device: Literal["cpu", "cuda"] = "cpu"
    # auto: the dtype of weights that are given; of a checkpoint float16 where it is stored so, else bfloat16
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: Literal["naive", "flash"] = "naive"
    linear: Literal["naive", "streamed", "tiled"] = "naive"
    sampling: Literal["naive", "split"] = "naive"
    # none: every step computes the whole prefix again; contiguous: a row for each request; paged: pages, as they grow
    kv_cache: Literal["none", "contiguous", "paged"] = "contiguous"
    page_size: int = PAGE_SIZE  # tokens of a page
    kv_tokens: int | None = None  # that a paged cache has room for; None = what max_batch requests take, or memory has
    prefix_cache: bool = True  # pages that begin with the same tokens are shared and kept; paged caches alone
    cuda_graph: bool = False  # decode steps by engine.decode_loop, captured where the cuda backend runs on a GPU
    # inflight: a step is prompts or decoding, and its results are awaited before the next is scheduled; continuous: it
    # is both, and the next one is scheduled while it runs
    batching: Literal["inflight", "continuous"] = "continuous"
    max_batch: int = 8  # requests that run together
    max_model_len: int | None = None  # prompt and new tokens; None = what the model allows
    max_step_tokens: int = 2048  # tokens of one forward pass: longer prompts are taken in chunks

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(map(str, choices))}")
        if self.cuda_graph and self.kv_cache == "none":
            raise ValueError("cuda_graph = True with kv_cache = 'none'; it needs kv_cache = 'contiguous' or 'paged'")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size = {self.page_size!r}; it must be one of {', '.join(map(str, PAGE_SIZES))}")
        for name in ("max_batch", "max_model_len", "max_step_tokens", "kv_tokens"):
            value = getattr(self, name)
            if name in ("max_model_len", "kv_tokens") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}; it must be an integer of at least 1")

    @property
    def captures(self) -> bool:
        """Whether decode steps are CUDA graphs: other backends run the same steps without one."""
        return self.cuda_graph and self.backend == "cuda" and self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ValueError where dtype is still "auto": `for_dtype` settles it."""
        if self.dtype == "auto":
            raise ValueError(f"dtype = 'auto' is no dtype yet; name one of {', '.join(DTYPES)}")
        return getattr(torch, self.dtype)

    def for_dtype(self, found: torch.dtype | str) -> EngineConfig:
        """With `found` in place of dtype "auto": the dtype, or its name, of the weights that there are.

        Raises:
            ValueError: `found` is none of the dtypes that the engine runs in.
        """
        return replace(self, dtype=str(found).removeprefix("torch.")) if self.dtype == "auto" else self


def make_ops(engine: EngineConfig) -> Ops:
    """The operations that `engine` names.

    Raises:
        ValueError: The device or the backend is not there on this machine.
    """
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds no CUDA GPU on this machine; use device = 'cpu'")
    if engine.backend == "reference":
        return ReferenceOps(engine.device)
    from engine.cuda_ops import CudaOps  # it imports numba, which takes a second

    return CudaOps(engine.device, attention=engine.attention, linear=engine.linear, sampling=engine.sampling)
