"""Flow 1: Hugging Face transformers on the staged checkpoint. What it takes, and what it computes.

Measures the standard suite and the workload's own prompts (latency, throughput, memory, utilisation), then writes the
reference bundle that parity compares with: activations of every layer, logits and greedy tokens, in bf16 and in fp32.
"""

from __future__ import annotations

import zlib
from statistics import mean
from typing import Any

from stages.hf import (
    exact_fp32,
    greedy,
    has_tokenizer,
    load_model,
    load_tokenizer,
    observe,
    score,
    set_threads,
    timed_generate,
)
from stages.host import Sampler, read_host, use_gpu
from stages.metrics import Rows
from stages.params import Gpu, Model, StagedModel, Workload
from stages.reference import GreedyReference, Prompt, checkpoint_id, write_bundle
from stages.stage import Run, stage
from stages.standard import (
    NO_GPU,
    PROMPTS,
    Budget,
    Case,
    Latency,
    TooSlow,
    add_latency,
    limits,
    list_cases,
    list_rows,
    measure_case,
    read_ceilings,
)
from stages.timing import measurement_lock

BACKEND = "transformers"
DTYPE = "bfloat16"
OBSERVED_PROMPTS = 4  # prompts whose activations are kept
OBSERVED_TOKENS = 64  # tokens of a reference prompt at most, so that a 7B bundle stays a few hundred MB
GREEDY_TOKENS = 32


def encode_prompts(tokenizer: Any, texts: tuple[str, ...], vocab_size: int) -> list[list[int]]:
    """Token ids of the prompts, cut to OBSERVED_TOKENS; without a tokenizer random ones, decided by the text."""
    if tokenizer is not None:
        return [tokenizer(text, add_special_tokens=False)["input_ids"][:OBSERVED_TOKENS] for text in texts]
    import torch

    encoded = []
    for text in texts:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        length = min(OBSERVED_TOKENS, max(4, len(text) // 3))
        encoded.append(torch.randint(0, vocab_size, (length,), generator=generator).tolist())
    return encoded


def make_reference(
    model: Any, tokenizer: Any, texts: tuple[str, ...], new_tokens: int
) -> tuple[list[Prompt], dict[str, dict[str, Any]]]:
    """The bundle's prompts and tensors, from a model loaded in bf16, which is left in fp32 with eager attention."""
    prompts = encode_prompts(tokenizer, texts, model.config.vocab_size)
    model.set_attn_implementation("eager")
    tensors: dict[str, dict[str, Any]] = {}
    decoded = {}
    with exact_fp32():
        for dtype in (DTYPE, "float32"):
            if dtype == "float32":
                model.float()
            tensors[dtype] = {
                f"{index}/{name}": tensor.cpu()
                for index, ids in enumerate(prompts[:OBSERVED_PROMPTS])
                for name, tensor in observe(model, ids).items()
            }
            decoded[dtype] = [greedy(model, ids, new_tokens) for ids in prompts]
        exact = {
            dtype: [
                score(model, ids, found.token_ids, found.candidates)
                for ids, found in zip(prompts, decoded[dtype], strict=True)
            ]
            for dtype in decoded
        }
    described = []
    for index, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        continuations = {}
        for dtype, results in decoded.items():
            found = results[index]
            answer = tokenizer.decode(found.token_ids, skip_special_tokens=True) if tokenizer is not None else ""
            continuations[dtype] = GreedyReference(
                found.token_ids, answer, found.candidates, found.logits, exact[dtype][index]
            )
        described.append(Prompt(text, ids, index < OBSERVED_PROMPTS, continuations))
    return described, tensors


def add_utilisation(rows: Rows, case: str, sampler: Sampler, gpu: bool, **knobs: Any) -> None:
    """How busy the CPU (this process, of all its cores) and the GPU were while `sampler` ran, and resident memory."""
    shared: dict[str, Any] = {"suite": "utilisation", "case": case}
    rows.add(
        metric="cpu_utilisation", value=mean(sampler.cpu_percent), unit="%", better=None, samples=sampler.cpu_percent,
        **shared, **knobs,
    )  # fmt: skip
    rows.add(
        metric="peak_rss_bytes", value=float(max(sampler.rss_bytes)), unit="B", better="lower", **shared, **knobs
    )  # fmt: skip
    if gpu:
        rows.add(
            metric="gpu_utilisation", value=mean(sampler.gpu_percent), unit="%", better="higher",
            samples=sampler.gpu_percent, **shared, **knobs,
        )  # fmt: skip
    else:
        rows.missing(metric="gpu_utilisation", unit="%", better="higher", reason=NO_GPU, **shared, **knobs)


def measure_prompts(
    model: Any, encoded: list[list[int]], batch: int, new_tokens: int, workload: Workload, budget: Budget
) -> tuple[Case, Latency]:
    """The workload's own prompts, `batch` of them (repeated if there are fewer), padded on the left to one length."""
    import torch

    chosen = [encoded[index % len(encoded)] for index in range(batch)]
    width = max(map(len, chosen))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in chosen], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chosen], device=model.device)
    case = Case(PROMPTS, batch, width, new_tokens)
    return case, measure_case(
        lambda _prompts, tokens: timed_generate(model, ids, mask, tokens), case, workload, 1, model.device.type, budget,
        rehearse=model.device.type == "cuda",
    )  # fmt: skip


@stage(Gpu, StagedModel, Workload)
def main(run: Run, gpu: Gpu, model: Model, workload: Workload) -> None:
    import torch

    from engine.model.config import ModelConfig
    from engine.model.cost import Footprint
    from engine.model.tensors import parameter_count

    path = run.find_snapshot(model.name)
    checkpoint = checkpoint_id(run.find(f"data/hf/{model.name}.manifest.json"))
    use_cuda = use_gpu(gpu)
    device = "cuda" if use_cuda else "cpu"
    no_memory = None if use_cuda else NO_GPU
    config = ModelConfig.from_file(path)
    set_threads(parameter_count(config))
    ceilings, footprint = read_ceilings(run, use_cuda), Footprint.dense(config, torch.bfloat16)
    rows = Rows("baseline", "w01", model.name, read_host())
    knobs: dict[str, Any] = {
        "dtype": DTYPE,
        "backend": BACKEND,
        "kernel_versions": {"attention": "sdpa"},
        "tensor_parallel": 1,
    }
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    loaded = load_model(path, torch.bfloat16, device)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[float]:
        ids = torch.tensor(prompts, device=device)
        return timed_generate(loaded, ids, torch.ones_like(ids), new_tokens)

    with measurement_lock():
        budget = Budget.on(device)
        for case in list_cases(workload, config.max_position_embeddings):
            with Sampler() as sampler:
                try:
                    # cuDNN makes a plan of attention for every length that is new to it.
                    latency = measure_case(
                        generate, case, workload, config.vocab_size, device, budget, rehearse=use_cuda
                    )  # fmt: skip
                except TooSlow as reason:
                    rows.add_missing(list_rows(case), str(reason), **knobs)
                    continue
            add_latency(rows, case, latency, limits(case, footprint, ceilings), no_memory, **knobs)
            add_utilisation(rows, case.name, sampler, use_cuda, **case.knobs, **knobs)
        encoded = encode_prompts(tokenizer, workload.prompts, config.vocab_size)
        for batch in workload.batch_sizes:
            with Sampler() as sampler:
                case, latency = measure_prompts(loaded, encoded, batch, workload.new_tokens, workload, budget)
            add_latency(rows, case, latency, limits(case, footprint, ceilings), no_memory, **knobs)
            add_utilisation(rows, case.name, sampler, use_cuda, **case.knobs, **knobs)

    prompts, tensors = make_reference(loaded, tokenizer, workload.prompts, min(GREEDY_TOKENS, workload.new_tokens))
    provenance = {
        "attention": "eager",
        "device": device,
        "packages": {name: read_host().packages[name] for name in ("torch", "transformers")},
    }
    write_bundle(run.out(f"data/reference/{model.name}"), checkpoint, prompts, tensors, provenance)
    rows.write(run.out("reports/metrics/baseline.parquet"))


if __name__ == "__main__":
    main()
