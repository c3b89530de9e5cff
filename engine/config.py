"""What the engine switches on, and the operations that follow from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from engine.model.config import DTYPES, ModelConfig
from engine.model.cost import kv_bytes_per_token
from engine.model.kv_cache import PAGE_SIZE, PAGE_SIZES
from engine.ops.protocol import Ops
from engine.ops.reference import ReferenceOps

log = logging.getLogger(__name__)
MANY = 256  # requests that run together where nothing else is asked for
CPU_CACHE_BYTES = 2**30  # of memory that a cache takes on a CPU where its size is not given
_CHOICES = {
    "backend": ("reference", "cuda"),
    "device": ("cpu", "cuda"),
    "dtype": ("auto", *DTYPES),
    "attention": ("naive", "flash"),
    "linear": ("naive", "streamed", "tiled"),
    "sampling": ("naive", "split"),
    "kv_cache": ("none", "contiguous", "paged", "auto"),
    "cuda_graph": (False, True),
    "batching": ("inflight", "continuous"),
    "prefix_cache": (False, True),
}
# Tokens of one forward pass by device, where nothing else is asked for. Who decodes waits for a pass: on a CPU one over
# 2,048 tokens takes seconds, and shorter ones cost it nothing; a GPU needs many tokens to be busy.
STEP_TOKENS = {"cpu": 256, "cuda": 8192}


@dataclass(frozen=True)
class EngineConfig:
    """What the engine switches on. `attention`, `linear`, `sampling` name the versions that the cuda backend runs.

    The fields' defaults are the plainest engine, on a CPU; `for_machine` makes the fastest for this machine.

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
    # none: every step computes the whole prefix again; contiguous: a row for each request; paged: pages, as they grow;
    # auto: paged where the operations read pages of such a model, else contiguous (`for_model`)
    kv_cache: Literal["none", "contiguous", "paged", "auto"] = "contiguous"
    page_size: int = PAGE_SIZE  # tokens of a page
    kv_tokens: int | None = None  # that a paged cache has room for; None = what max_batch requests take, or memory has
    prefix_cache: bool = True  # pages that begin with the same tokens are shared and kept; paged caches alone
    cuda_graph: bool = False  # steps by the decode and prompt loops, captured where the cuda backend runs on a GPU
    # inflight: a step is prompts or decoding, and its results are awaited before the next is scheduled; continuous: it
    # is both, and the next one is scheduled while it runs
    batching: Literal["inflight", "continuous"] = "continuous"
    max_batch: int = 8  # requests that run together
    max_model_len: int | None = None  # prompt and new tokens; None = what the model and kv_tokens allow
    max_step_tokens: int | None = None  # of one forward pass: longer prompts are taken in chunks; None = STEP_TOKENS

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
            if name != "max_batch" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}; it must be an integer of at least 1")

    @classmethod
    def for_machine(cls, backend: str = "auto", **settings: Any) -> EngineConfig:
        """The fastest that this machine runs: `LLM`'s default, and what the command `afs` starts from.

        On a GPU that our kernels are for it is the kernels, each in its fastest version, with decode steps as CUDA
        graphs; on an older GPU, which a line of the log names, and on a CPU torch's operations. Up to MANY requests run
        together, on pages where the operations read them.

        Args:
            backend: "cuda" (our kernels), "reference" (torch's operations) or "auto".
            settings: Fields that are to be otherwise.

        Raises:
            ValueError: There is no such backend, or a field has a value that does not exist.
        """
        if backend not in ("auto", "reference", "cuda"):
            raise ValueError(f"backend = {backend!r}; it must be auto, reference or cuda")
        device = settings.pop("device", "cuda" if backend == "cuda" or torch.cuda.is_available() else "cpu")
        if backend == "auto":
            unfit = why_unfit() if device == "cuda" else None
            if unfit:
                log.warning("%s: torch's operations run in their place", unfit)
            backend = "reference" if device == "cpu" or unfit else "cuda"
        chosen: dict[str, Any] = {
            "backend": backend,
            "device": device,
            "attention": "flash",
            "linear": "tiled",
            "sampling": "split",
            "kv_cache": "auto",
            "cuda_graph": settings.get("kv_cache") != "none",
            "max_batch": MANY,
        }
        return cls(**chosen | settings)

    @property
    def step_tokens(self) -> int:
        """Tokens of one forward pass, at most: max_step_tokens, or where that is None what suits the device."""
        return self.max_step_tokens or STEP_TOKENS[self.device]

    @property
    def cache_tokens(self) -> int | None:
        """Tokens that kv_tokens gives a paged cache room for: whole pages. None where the size is not given."""
        if self.kv_cache not in ("paged", "auto") or self.kv_tokens is None:
            return None
        return -(-self.kv_tokens // self.page_size) * self.page_size

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

    def cache_kind(self, model: ModelConfig, ops: Ops) -> Literal["none", "contiguous", "paged"]:
        """`kv_cache`, in place of "auto": paged where `ops` read pages of such heads of a settled dtype, or `kv_tokens`
        asks for them; else contiguous."""
        if self.kv_cache != "auto":
            return self.kv_cache
        heads = model.num_attention_heads, model.num_key_value_heads, model.head_dim
        paged = self.kv_tokens is not None or ops.why_not_paged(self.torch_dtype, *heads) is None
        return "paged" if paged else "contiguous"

    def for_model(self, model: ModelConfig, ops: Ops, max_len: int) -> EngineConfig:
        """With kv_cache "auto" settled, in kind and size, for a model whose weights are on the device.

        On a CPU a paged cache is of up to CPU_CACHE_BYTES, or one request's bytes where these are more. A contiguous
        one is for as many requests, up to `max_batch`, as half of the device's free memory has room for.

        Args:
            max_len: Tokens of a request, at most: prompt and generated.
        """
        if self.kv_cache != "auto":
            return self
        size = kv_bytes_per_token(model, self.torch_dtype)
        if self.cache_kind(model, ops) == "paged":
            tokens = self.kv_tokens
            if tokens is None and self.device == "cpu":
                tokens = max(max_len, min(self.max_batch * max_len, CPU_CACHE_BYTES // size))
            return replace(self, kv_cache="paged", kv_tokens=tokens)
        # A bucket of rows may be twice as many as run: half of the memory has room for those too.
        room = CPU_CACHE_BYTES if self.device == "cpu" else torch.cuda.mem_get_info()[0] // 2
        fitting = max(1, room // (max_len * size))
        return replace(self, kv_cache="contiguous", max_batch=min(self.max_batch, fitting))


def make_ops(engine: EngineConfig) -> Ops:
    """The operations that `engine` names.

    Raises:
        ValueError: The device or the backend is not there on this machine.
    """
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds no CUDA GPU on this machine; use device = 'cpu'")
    if engine.backend == "reference":
        return ReferenceOps(engine.device)
    if engine.device == "cuda" and (unfit := why_unfit()):
        raise ValueError(f"backend = 'cuda', but {unfit}; use backend = 'reference'")
    from engine.ops.cuda import CudaOps  # it imports numba, which takes a second

    return CudaOps(engine.device, attention=engine.attention, linear=engine.linear, sampling=engine.sampling)


def why_unfit() -> str | None:
    """Why our kernels are not for the GPU; None where they are, or where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return None
    from kernels.architectures import BuildError, architecture_of

    try:
        architecture_of(torch.cuda.get_device_capability())
    except BuildError as error:
        return f"{torch.cuda.get_device_name()}: {error}"
    return None
