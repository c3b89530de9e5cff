"""What an engine prepares before its first request, against what its requests then launch and replay."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.llm import LLM, EngineConfig
from engine.model.config import ModelConfig
from engine.model.weights import empty_weights, random_weights
from engine.runtime import graph_step
from engine.runtime.runner import Runner
from engine.runtime.startup import kernels_of
from engine.sampling_params import SamplingParams
from kernels import simulator
from kernels.launch import Kernel

OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 1024, "eos_token_id": None,
}  # fmt: skip
LLAMA = OLMO2 | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
ODD = OLMO2 | {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 200, "vocab_size": 1002}
FAST: dict[str, Any] = {
    "backend": "cuda", "attention": "flash", "linear": "tiled", "sampling": "split", "cuda_graph": True,
    "kv_cache": "paged", "max_batch": 24, "max_step_tokens": 1024,
}  # fmt: skip
SLOW: dict[str, Any] = FAST | {"attention": "naive", "linear": "naive", "sampling": "naive", "kv_cache": "contiguous"}


def configured(**settings: Any) -> EngineConfig:
    return EngineConfig(**settings)


class Graph:
    """Runs again what was captured."""

    def __init__(self, run):
        self.replay = run


def draw(seed: int, count: int, longest: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of any length, and settings of every kind."""
    drawn = random.Random(seed)
    prompts, settings = [], []
    for _ in range(count):
        length = min(longest, drawn.choice((1, 2, 15, 16, 17, 33, 64, 65, 128, 130, 256, 257, 700, 1500)))
        prompts.append([drawn.randrange(256) for _ in range(length)])
        settings.append(
            SamplingParams(
                temperature=drawn.choice((0.0, 0.0, 0.7)),
                top_k=drawn.choice((0, 20)),
                top_p=drawn.choice((1.0, 0.9)),
                max_new_tokens=drawn.randrange(1, 12),
                repetition_penalty=drawn.choice((1.0, 1.0, 1.2)),
                frequency_penalty=drawn.choice((0.0, 0.0, 0.5)),
                logit_bias=drawn.choice(({}, {}, {3: -5.0})),
                logprobs=drawn.choice((None, None, 2)),
                prompt_logprobs=drawn.choice((None, None, None, 1)),
                n=drawn.choice((1, 1, 2)),
                ignore_eos=True,
                seed=drawn.randrange(100),
            )
        )
    return prompts, settings


def generate_everything(llm: LLM, longest: int) -> None:
    """One after another, and in batches of all sizes."""
    for seed, count in enumerate((1, 1, 2, 5, 17, 30)):
        prompts, settings = draw(seed, count, longest)
        llm.generate(prompts, settings)
    llm.core.forget()
    for length in (3, 100, 200, 256):  # alone: a graph of the prompt, greedily, sampled, and up to the logits
        for temperature, penalty in ((0.0, 1.0), (0.8, 1.0), (0.0, 1.1)):
            how = SamplingParams(
                temperature=temperature, seed=1, max_new_tokens=3, ignore_eos=True, repetition_penalty=penalty
            )
            llm.generate([[length % 256] * length], how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the simulator's")
@pytest.mark.parametrize(
    ("fields", "dtype", "settings"),
    [
        (OLMO2, torch.bfloat16, FAST),
        (OLMO2, torch.float16, FAST | {"batching": "inflight", "max_step_tokens": 128}),
        (LLAMA, torch.bfloat16, FAST | {"kv_cache": "contiguous", "cuda_graph": False}),
        (LLAMA, torch.float32, SLOW),
        (ODD, torch.bfloat16, FAST | {"kv_cache": "contiguous"}),
        (OLMO2, torch.bfloat16, SLOW | {"kv_cache": "none", "cuda_graph": False, "max_batch": 3}),
    ],
    ids=["olmo2", "fp16, in flight", "llama, no graphs", "fp32, naive", "odd shapes", "no cache"],
)
def test_no_request_needs_what_was_not_prepared(fields, dtype, settings, monkeypatch):
    """Kernels that do nothing, and graphs that run their steps again, so that long prompts cost no time here."""
    launched: set[str] = set()

    def launch(kernel: Kernel, grid: Any, args: tuple[Any, ...], options: Any) -> None:
        launched.add(kernel.name)
        if kernel.name.startswith("linear"):  # what was there before may be no number
            for value in args:
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.nan_to_num_()
        if kernel.name.startswith(("argmax", "sample")):  # a token of the vocabulary, whichever
            for value in args:
                if isinstance(value, torch.Tensor) and value.dtype == torch.int32:
                    value.clamp_(0, 255)

    monkeypatch.setattr(Kernel, "_simulate", launch)
    monkeypatch.setattr(EngineConfig, "captures", property(lambda engine: engine.cuda_graph))
    monkeypatch.setattr(graph_step, "new_pool", lambda device: None)
    monkeypatch.setattr(graph_step, "capture", lambda run, pool: (Graph(run), run()))
    config = ModelConfig.from_dict(fields)
    weights = empty_weights(config, "cpu", dtype)
    for _, tensor in weights.named_tensors():
        tensor.zero_()
    llm = LLM((config, weights), configured(**settings))
    prepared = {kernel.name for kernel in kernels_of(config, llm.engine, llm.max_model_len)}
    generate_everything(llm, 60 if settings["kv_cache"] == "none" else 1500)
    assert launched <= prepared, sorted(launched - prepared)
    assert llm.stats().late_graphs == 0
    if settings["cuda_graph"]:  # the count counts
        monkeypatch.setattr(Runner, "capture", lambda runner: None)
        llm = LLM((config, weights), configured(**settings))
        llm.generate([[1]], SamplingParams(temperature=0.0, max_new_tokens=3, ignore_eos=True))
        assert llm.stats().late_graphs == 2  # of the prompt, and of a decode step


@pytest.mark.skipif(torch.cuda.is_available(), reason="the simulator's")
def test_a_kernel_that_was_not_prepared_is_counted(monkeypatch):
    monkeypatch.setattr(simulator.cuda, "run", lambda *_: None)
    config = ModelConfig.from_dict(OLMO2 | {"num_hidden_layers": 1})
    engine = configured(**FAST | {"cuda_graph": False})
    llm = LLM((config, empty_weights(config, "cpu", torch.bfloat16)), engine)
    params = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
    llm.generate([[1, 2, 3]], params)
    assert llm.stats().late_kernels == 0
    kernels = {kernel.name: kernel for kernel in kernels_of(config, llm.engine)}
    kernels["argmax_split_bf16"]._loaded.clear()
    llm.generate([[1, 2, 3]], params)
    assert llm.stats().late_kernels == 1


def test_the_rehearsal_is_of_the_gpu_asked_for():
    config = ModelConfig.from_dict(OLMO2)
    engine = configured(**FAST | {"device": "cuda", "dtype": "bfloat16"})
    names = {
        arch: {kernel.name for kernel in kernels_of(config, engine, machine=(arch, 100)) if "linear" in kernel.name}
        for arch in ("sm_80", "sm_90a")
    }
    assert all(name.endswith("_sm_80") for name in names["sm_80"]) and all("sm_90a" in n for n in names["sm_90a"])
    assert not kernels_of(config, EngineConfig())


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [OLMO2, LLAMA], ids=["olmo2", "llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_after_ready_nothing_compiles_and_nothing_is_captured(fields, dtype):
    config = ModelConfig.from_dict(fields)
    weights = random_weights(config, "cuda", getattr(torch, dtype), 0)
    llm = LLM((config, weights), EngineConfig.for_machine(max_batch=24, max_step_tokens=1024))
    generate_everything(llm, 1500)
    stats = llm.stats()
    assert (stats.late_kernels, stats.late_graphs) == (0, 0)
    assert stats.generated_tokens > 300
