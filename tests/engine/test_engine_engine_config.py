"""The configuration where none is given: the fastest for this machine, with a cache that model and memory take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checkpoints import Reference

from engine.config import EngineConfig, make_ops
from engine.llm import LLM
from engine.model.config import ModelConfig
from engine.model.cost import kv_bytes_per_token
from engine.model.weights import random_weights
from engine.ops.reference import ReferenceOps
from engine.runtime.startup import kernels_of
from engine.sampling_params import SamplingParams

TINY = Path(__file__).resolve().parents[2] / "data/models/olmo2-tiny"
FASTEST = {"attention": "flash", "linear": "tiled", "sampling": "split", "kv_cache": "auto", "cuda_graph": True}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Makes torch see a GPU of a compute capability, or none."""

    def see(capability: tuple[int, int] | None, free: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2 * free))

    return see


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, ("reference", "cpu")),
        ((9, 0), ("cuda", "cuda")),
        ((8, 6), ("cuda", "cuda")),
        ((7, 5), ("reference", "cuda")),
    ],
)
def test_the_fastest_of_a_machine(machine, capability, expected):
    machine(capability)
    engine = EngineConfig.for_machine()
    assert (engine.backend, engine.device) == expected and engine.max_batch == 256
    assert {name: getattr(engine, name) for name in FASTEST} == FASTEST
    assert EngineConfig.for_machine("reference").device == expected[1]
    changed = EngineConfig.for_machine(max_batch=3, attention="naive", kv_cache="none")
    assert (changed.max_batch, changed.attention, changed.cuda_graph) == (3, "naive", False)
    assert EngineConfig.for_machine(device="cpu").backend == "reference"


def test_a_gpu_that_the_kernels_are_not_for(machine, caplog: pytest.LogCaptureFixture):
    machine((7, 5))
    assert EngineConfig.for_machine().backend == "reference"
    assert "A GPU: compute capability 7.5 is not supported" in caplog.text
    with pytest.raises(ValueError, match=r"backend = 'cuda', but A GPU: .* 7\.5 .*; use backend = 'reference'"):
        make_ops(EngineConfig.for_machine("cuda"))


def test_bad_requests(machine):
    machine(None)
    with pytest.raises(ValueError, match="backend = 'triton'; it must be auto, reference or cuda"):
        EngineConfig.for_machine("triton")
    with pytest.raises(ValueError, match="max_batch = 0"):
        EngineConfig.for_machine(max_batch=0)
    with pytest.raises(ValueError, match="finds no CUDA GPU on this machine"):
        make_ops(EngineConfig.for_machine("cuda"))


def settled(model: ModelConfig, ops: Any, **settings: Any) -> EngineConfig:
    length = model.max_position_embeddings
    return EngineConfig.for_machine(**{"dtype": "bfloat16"} | settings).for_model(model, ops, length)


def test_a_cpu_takes_no_gigabytes_for_its_cache(machine):
    machine(None)
    model = ModelConfig.from_file(TINY)
    size = kv_bytes_per_token(model, torch.bfloat16)
    many = settled(model, ReferenceOps())
    assert (many.kv_cache, many.kv_tokens, many.max_batch) == ("paged", 2**30 // size, 256)
    assert settled(model, ReferenceOps(), max_batch=3).kv_tokens == 3 * model.max_position_embeddings
    assert settled(model, ReferenceOps(), kv_tokens=99).kv_tokens == 99
    # A request of the longest length always fits.
    large = dataclasses.replace(model, num_hidden_layers=600)
    assert kv_bytes_per_token(large, torch.bfloat16) * 2048 > 2**30
    assert settled(large, ReferenceOps()).kv_tokens == 2048
    given = EngineConfig(dtype="bfloat16")
    assert given.for_model(model, ReferenceOps(), 2048) is given


class NoPages(ReferenceOps):
    def why_not_paged(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str | None:
        return None if dtype == torch.bfloat16 and head_dim == 128 else "such heads have no pages"


def test_a_cache_that_the_operations_read(machine):
    model = ModelConfig.from_file(TINY)
    row = model.max_position_embeddings * kv_bytes_per_token(model, torch.float32)
    machine((9, 0), free=40 * row)
    on_pages = settled(model, NoPages("cuda"))
    assert (on_pages.kv_cache, on_pages.kv_tokens) == ("paged", None)  # the engine takes what the GPU has
    rows = settled(model, NoPages("cuda"), dtype="float32")
    assert (rows.kv_cache, rows.max_batch) == ("contiguous", 20)
    assert settled(model, NoPages("cuda"), dtype="float32", max_batch=4).max_batch == 4
    assert settled(dataclasses.replace(model, head_dim=96), NoPages("cuda")).kv_cache == "contiguous"
    machine((9, 0), free=row)
    assert settled(model, NoPages("cuda"), dtype="float32").max_batch == 1
    # What is asked for by name stays, and the cache says what it lacks.
    assert settled(model, NoPages("cuda"), dtype="float32", kv_tokens=4096).kv_cache == "paged"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_heads_without_pages_under_the_simulator(olmo2: Reference):
    model = ModelConfig.from_file(olmo2.path)
    weights = random_weights(model, "cpu", torch.bfloat16, 0)
    llm = LLM((model, weights), EngineConfig.for_machine("cuda", device="cpu"))
    assert model.head_dim == 32 and llm.engine.kv_cache == "contiguous"


def test_the_kernels_are_those_of_the_chosen_cache():
    """They are known before the weights are there, on a machine without a GPU too."""
    model, machine = ModelConfig.from_file(TINY), ("sm_90a", 132)

    def kernels(kv_cache: str, dtype: str) -> set[str]:
        engine = EngineConfig.for_machine("cuda", dtype=dtype, kv_cache=kv_cache, max_step_tokens=64)
        return {kernel.name for kernel in kernels_of(model, engine, 128, machine)}

    assert model.head_dim == 128
    assert kernels("auto", "bfloat16") == kernels("paged", "bfloat16") != kernels("contiguous", "bfloat16")
    assert kernels("auto", "float32") == kernels("contiguous", "float32")


def test_llm_takes_the_fastest(olmo2: Reference):
    llm = LLM(olmo2.path)
    chosen = EngineConfig.for_machine(dtype="bfloat16")
    assert (llm.engine.backend, llm.engine.device, llm.engine.cuda_graph) == (chosen.backend, chosen.device, True)
    prompts = [[5, 6, index] for index in range(20)]
    params = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
    together = [done.token_ids for done in llm.generate(prompts, params)]
    assert llm.stats().steps <= 6 and llm.engine.max_batch >= 20  # all at once
    assert together == [llm.generate([ids], params)[0].token_ids for ids in prompts]


def test_weights_of_the_caller_say_the_device(olmo2: Reference):
    model = ModelConfig.from_file(olmo2.path)
    engine = LLM((model, random_weights(model, "cpu", torch.bfloat16, 0))).engine
    assert (engine.backend, engine.device, engine.kv_cache) == ("reference", "cpu", "paged")
