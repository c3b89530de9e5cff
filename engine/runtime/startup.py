"""Start of an engine: kernels are compiled and loaded before its first request, so that none waits for it.

Which kernels a model needs follows from its configuration, the engine's and the GPU. Nobody lists them: a rehearsal
runs the forward graph on tensors of the host whose memory is never touched, and enters what would have been launched.
(On torch's "meta" device it would be the same, but that takes three seconds to import.)
"""

from __future__ import annotations

from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache
from engine.model.linear import Linear
from engine.model.transformer import Model
from engine.model.weights import empty_weights
from engine.ops.batch import Batch, TokenSpan
from engine.runtime.progress import compile_kernels

if TYPE_CHECKING:
    from kernels.cubins import Build
    from kernels.launch import Kernel

# Prompts whose passes differ by more than their products: by whether tiles of queries are divided, for one.
PROMPTS, LONG = (2, 17, 300), 1024


def kernels_of(
    config: ModelConfig, engine: EngineConfig, max_len: int | None = None, machine: tuple[str, int] | None = None
) -> list[Kernel]:
    """Every kernel that an engine can launch for its requests, whatever they are.

    Args:
        config: The model.
        engine: What is switched on, with a dtype that is settled.
        max_len: Tokens of a request, at most; default: all the model allows.
        machine: Architecture and multiprocessors of the GPU; default: the one that is here.

    Raises:
        ValueError: The engine configuration asks for what the model cannot do.
        BuildError: No kernels are for the GPU that is here.
    """
    if engine.backend != "cuda":
        return []
    from engine.ops.cuda import CudaOps
    from kernels.launch import rehearsal

    # Layers differ in what they are told, not in their kernels; but the last computes fewer rows.
    layers = config.layer_types[:2]
    config = replace(config, num_hidden_layers=len(layers), layer_types=layers)
    with rehearsal(machine) as found, torch.inference_mode():
        ops = CudaOps("cpu", engine.attention, engine.linear, engine.sampling)
        weights = empty_weights(config, "cpu", engine.torch_dtype)
        capacity = max_len or engine.max_model_len or config.max_position_embeddings
        # Of the rotary tables no row is looked at.
        model = Model(config, weights, ops, max_positions=1)
        if engine.cache_kind(config, ops) == "paged":
            cache: KVCache = model.new_paged_cache(pages=1, slots=1, capacity=capacity, page_size=engine.page_size)
        else:
            cache = model.new_cache(1, capacity)
        most = min(max(engine.step_tokens, engine.max_batch), engine.max_batch * capacity)
        _rehearse_passes(model, cache, min(most, LONG, capacity))
        _rehearse_products(model, most)
        _rehearse_sampling(model)
    return list(found.values())


def _ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _rehearse_passes(model: Model, cache: KVCache, most: int) -> None:
    def forward(tokens: int, logits: int, **settings: Any) -> None:
        packed = (_ints(tokens) for _ in range(3))
        model.forward(Batch(*packed, logits_at=_ints(logits), **settings), cache)

    forward(1, 1, one_token_per_slot=True)
    for count in {min(count, most) for count in (*PROMPTS, most)}:
        for position in {0, cache.capacity - count}:
            span = TokenSpan(count, 0, position)
            # One row of logits, and as many as there are tokens: few are computed one by one.
            forward(count, 1, spans=[span])
            forward(count, count, spans=[span])
            # Beside a sequence that decodes.
            forward(count + 1, 2, spans=[TokenSpan(1, 0, 0), span], decodes=1)


def _rehearse_products(model: Model, most: int) -> None:
    """Products with each matrix, for every number of tokens that may take another kernel."""
    from kernels.linear import streamed, tiled

    ops, layer = model.ops, model.weights.layers[0]

    def given(count: int, matrix: Linear) -> Tensor:
        return torch.empty((count, matrix.in_features), dtype=model.weights.dtype)

    counts = {1, *streamed.TOKENS, *range(tiled.STEP, most + tiled.STEP, tiled.STEP)}
    for count in counts:
        for matrix in (layer.qkv, layer.o, layer.down, model.weights.lm_head):
            ops.linear(given(count, matrix), matrix)
        ops.linear_swiglu(given(count, layer.gate_up), layer.gate_up)


def _rehearse_sampling(model: Model) -> None:
    """Samples from logits as they are, and from fp32 ones that penalties have changed."""
    ops, vocabulary = model.ops, model.config.vocab_size
    one, seed = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    for dtype in (model.weights.dtype, torch.float32):
        logits = torch.empty((1, vocabulary), dtype=dtype)
        ops.argmax(logits, out=_ints(1))
        ops.sample(logits, one, _ints(1), one, one, seed, _ints(1), out=_ints(1))
    ops.repetition_penalty(logits, torch.empty((1, vocabulary), dtype=torch.bool), one)
    ops.advance(_ints(1), _ints(1), _ints(1), _ints(1), _ints(1, 2))


class Preparation:
    """The kernels of an engine, compiled beside whatever the caller does until `finish`.

    Args:
        config, engine, max_len: As of `kernels_of`.

    Raises:
        ValueError, BuildError: As `kernels_of`.
    """

    def __init__(self, config: ModelConfig, engine: EngineConfig, max_len: int | None = None) -> None:
        self._kernels = kernels_of(config, engine, max_len)
        self._builds: dict[str, Build] = {}
        self._error: BaseException | None = None
        self._thread = Thread(target=self._compile, name="afs-compile", daemon=True)
        if self._kernels and engine.device == "cuda":
            self._thread.start()

    def _compile(self) -> None:
        from kernels.launch import machine_of

        try:
            arch, _ = machine_of(0)
            self._builds = {build.kernel: build for build in compile_kernels(self._kernels, [arch])}
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait until all kernels are compiled, and load them on torch's current GPU.

        Raises:
            BuildError: One does not compile, or the driver refuses it.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        for kernel in self._kernels:
            # One that another engine has loaded stays as it is: that one's graphs launch it.
            if not kernel.is_prepared(device):
                kernel.prepare(build=self._builds.get(kernel.name))
