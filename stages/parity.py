"""Whether the engine computes what Hugging Face computes, and the same bits however it is asked to.

A week's list names its checks. Each writes rows with the error, its limit and a status; anything beyond its limit
fails the stage, which names the first thing that is wrong and by how much. The rows of a failed run are kept beside the
place of a good one's, as `<name>.failed.parquet`.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import micro
from stages.checks import (
    Findings,
    Piece,
    bf16_step,
    divergence,
    errors,
    forward,
    load_engine,
    mean_difference,
    new_cache,
    observe_engine,
)
from stages.corpus import INVALID_UTF8, TEXTS
from stages.hf import exact_fp32, has_tokenizer, load_model, load_tokenizer, observe, set_threads
from stages.host import read_host, stopwatch, use_gpu
from stages.metrics import Rows
from stages.params import Gpu, Model, ParamsError, StagedModel, Week, Workload
from stages.reference import Bundle, GreedyReference, checkpoint_id
from stages.stage import Run, StageError, stage

if TYPE_CHECKING:
    from torch import Tensor

    from engine.llm import LLM, EngineConfig
    from engine.model.config import ModelConfig
    from engine.model.transformer import Model as EngineModel

FP32_LIMIT = 1e-3
HALF_RATIO = 1.25
NORM_SHARE = 0.02
DTYPES = ("float32", "bfloat16")
HALVES = {"bfloat16": "bf16", "float16": "fp16"}
ORDER = "one reduction order: no bit may differ"
HEADLINE = (
    "mean_abs_error", "max_abs_error", "error_ratio", "mean_kl", "divergent_tokens", "equal_completions",
    "unequal_logits",
)  # fmt: skip
NO_TOKENIZER = "random weights come without a tokenizer"


@dataclass
class Context:
    """One parity run: what is checked, on which backend, and what was found."""

    run: Run
    model: Model
    week: Week
    workload: Workload
    gpu: bool
    findings: Findings
    simulations: dict[str, Any] = field(default_factory=dict)
    loaded: LLM | None = None

    @cached_property
    def path(self) -> Path:
        return self.run.find_snapshot(self.model.name)

    @cached_property
    def config(self) -> ModelConfig:
        from engine.model.config import ModelConfig

        return ModelConfig.from_file(self.path)

    @cached_property
    def bundle(self) -> Bundle:
        manifest = self.run.find(f"data/hf/{self.model.name}.manifest.json")
        return Bundle(self.run.find(f"data/reference/{self.model.name}"), checkpoint_id(manifest))

    @property
    def settings(self) -> dict[str, Any]:
        """The week's EngineConfig fields on this host."""
        if self.week.engine is None:
            raise ParamsError(f"weeks.{self.week.name}.engine is null: this check needs an engine")
        return self.week.engine.settings(self.gpu, self.config.max_position_embeddings)

    def engine(self, dtype: str) -> EngineConfig:
        """The week's engine in `dtype`."""
        from engine.llm import EngineConfig

        settings: dict[str, Any] = self.settings | {"dtype": dtype}
        if dtype == "float32" and settings["backend"] == "cuda" and settings["kv_cache"] == "paged":
            # The kernels that read pages are not for fp32, and rows as long as the model's positions take much memory.
            settings |= {"kv_cache": "contiguous", "max_batch": min(8, settings["max_batch"])}
        return EngineConfig(**settings)

    def llm(self, dtype: str) -> LLM:
        """The model of the run in `dtype`. One is kept: both may not fit in memory, and loading takes a while."""
        from engine.llm import LLM

        if self.loaded is None or self.loaded.engine.dtype != dtype:
            self.loaded = None
            free(self.gpu)
            self.loaded = LLM(self.path, self.engine(dtype))
            self.loaded.release()  # checks take caches of their own; a request takes the engine's again
        return self.loaded

    @property
    def versions(self) -> dict[str, str]:
        """Of the operations that have more than one."""
        return {name: self.settings[name] for name in ("attention", "linear", "sampling")}

    @property
    def dtype(self) -> str:
        """The week's own."""
        return self.settings["dtype"]

    @property
    def backend(self) -> str:
        return self.settings["backend"]

    @property
    def device(self) -> str:
        return self.settings["device"]


def free(gpu: bool) -> None:
    """Gives memory that nothing refers to any more back to the GPU."""
    gc.collect()
    if gpu:
        import torch

        torch.cuda.empty_cache()


# --- tokenizer ------------------------------------------------------------------------------------------------------


def unequal(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Places at which two sequences differ, the length of the longer one's rest included."""
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def check_tokenizer(context: Context) -> None:
    """Encoding and decoding equal to transformers' on every text of the corpus and on every single token."""
    shared: dict[str, Any] = {"suite": "tokenizer", "unit": "1"}
    if not has_tokenizer(context.path):
        context.findings.rows.missing(
            case="all", metric="differing_tokens", better="lower", reason=NO_TOKENIZER, **shared
        )
        return
    compare_tokenizers(context.findings, context.path, list(context.workload.prompts))


def compare_tokenizers(findings: Findings, path: Path, prompts: list[str]) -> None:
    """Our tokenizer of the files at `path` against transformers' own."""
    import torch

    from engine.text.tokenizer import Tokenizer

    ours, theirs = Tokenizer(path), load_tokenizer(path)
    texts = TEXTS | {f"prompt {index}": text for index, text in enumerate(prompts)}
    texts |= {f"invalid {name}": data.decode(errors="replace") for name, data in INVALID_UTF8.items()}
    equal: dict[str, Any] = {"limit": 0.0, "limit_kind": "equal to transformers'"}
    for name, text in texts.items():
        raw = INVALID_UTF8.get(name.removeprefix("invalid "), text) if name.startswith("invalid ") else text
        ids = theirs(text)["input_ids"]
        value = unequal(ours.encode(raw), ids)
        findings.check(suite="tokenizer", case=name, metric="differing_tokens", value=value, **equal)
        value = unequal(ours.decode(ids), theirs.decode(ids))
        findings.check(suite="tokenizer", case=name, metric="differing_characters", value=value, **equal)
    # Single tokens and random sequences of them are mostly not whole UTF-8.
    generator = torch.Generator().manual_seed(0)
    size = len(theirs)
    sequences = {
        "every token": [[index] for index in range(size)],
        "random tokens": torch.randint(0, size, (200, 16), generator=generator).tolist(),
    }
    for name, lists in sequences.items():
        value = sum(ours.decode(ids) != theirs.decode(ids) for ids in lists)
        findings.check(suite="tokenizer", case=name, metric="differing_sequences", value=value, **equal)


# --- tensors --------------------------------------------------------------------------------------------------------


def engine_tensors(config: ModelConfig, weights: Any) -> dict[str, Tensor]:
    """The engine's fused tensors under the names and in the shapes that transformers gives them (views, no copies)."""
    named = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    named["lm_head.weight"] = weights.lm_head
    first, second = config.layer_norm_names()
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split([config.q_size, config.kv_size, config.kv_size])
        gate, up = layer.gate_up.split(config.intermediate_size)
        parts = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.o,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
            "self_attn.q_norm": layer.q_norm, "self_attn.k_norm": layer.k_norm,
            first: layer.attention_norm, second: layer.mlp_norm,
        }  # fmt: skip
        named |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items() if part is not None}
    return named


def check_tensors(context: Context) -> None:
    """Every tensor as the engine holds it equals the one transformers loads."""
    import torch

    from engine.model.weights import load_weights

    device = "cuda" if context.gpu else "cpu"
    dtype = getattr(torch, context.config.dtype or "bfloat16")
    ours = engine_tensors(context.config, load_weights(context.path, context.config, device, dtype))
    theirs = load_model(context.path, dtype, device).state_dict()
    names = sorted(ours.keys() | theirs.keys())
    for name in names:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            value = float("inf")
        else:
            value = mean_difference(ours[name], theirs[name])
        context.findings.check(
            suite="tensors", case=name, metric="mean_abs_difference", value=value, limit=0.0,
            limit_kind="the checkpoint's own numbers", dtype=context.config.dtype,
        )  # fmt: skip


# --- layers ---------------------------------------------------------------------------------------------------------


def compare_layers(
    findings: Findings,
    suite: str,
    dtype: str,
    ours: Sequence[dict[str, Tensor]],
    exact: Sequence[dict[str, Tensor]],
    theirs: Sequence[dict[str, Tensor]] | None,
    **knobs: Any,
) -> None:
    """The engine's activations and logits against transformers' in fp32 (`exact`).

    fp32: absolute limits. bf16 and fp16: no further from `exact` than HALF_RATIO times transformers in that dtype
    (`theirs`) is.
    """
    found = errors(ours, exact)
    knobs = {"dtype": dtype, **knobs}
    if dtype == "float32":
        for name, error in found.items():
            findings.check(
                suite=suite, case=name, metric="mean_abs_error", value=error.mean, limit=FP32_LIMIT, strict=True,
                limit_kind="absolute, against transformers in fp32", **knobs,
            )  # fmt: skip
        findings.check(
            suite=suite, case="logits", metric="max_abs_error", value=found["logits"].largest, limit=FP32_LIMIT,
            strict=True, limit_kind="absolute, against transformers in fp32", **knobs,
        )  # fmt: skip
        return
    assert theirs is not None
    theirs_knobs: dict[str, Any] = knobs | {"backend": "transformers"}
    kind = f"{HALF_RATIO} x transformers' own {HALVES[dtype]} error"
    own = errors(theirs, exact)
    for name, error in found.items():
        findings.check(
            suite=suite, case=name, metric="mean_abs_error", value=error.mean, limit=HALF_RATIO * own[name].mean,
            limit_kind=kind, **knobs,
        )  # fmt: skip
        findings.rows.add(
            suite=suite, case=name, metric="mean_abs_error", value=own[name].mean, unit="1", better="lower",
            **theirs_knobs,
        )  # fmt: skip
        if own[name].mean > 0 and math.isfinite(error.mean):
            findings.rows.add(
                suite=suite, case=name, metric="error_ratio", value=error.mean / own[name].mean, unit="1",
                better="lower", limit=HALF_RATIO, limit_kind=kind, **knobs,
            )  # fmt: skip
    logits = [[tensors["logits"] for tensors in side] for side in (exact, ours, theirs)]
    own_kl = divergence(logits[0], logits[2])
    findings.check(
        suite=suite, case="logits", metric="mean_kl", value=divergence(logits[0], logits[1]), unit="nat",
        limit=HALF_RATIO**2 * own_kl, limit_kind=f"({HALF_RATIO} x)^2 transformers' own: like the error's square",
        **knobs,
    )  # fmt: skip
    findings.rows.add(
        suite=suite, case="logits", metric="mean_kl", value=own_kl, unit="nat", better="lower",
        **theirs_knobs,
    )  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """A greedy choice other than transformers'. Logits are those of transformers in fp32 on the same prefix."""

    prompt: int
    step: int
    chosen: int
    expected: int
    margin: float
    """How much lower the chosen token's logit is; at least so much where it was not among the kept candidates."""
    rounding: float
    """One rounding step of the dtype at the expected token's logit."""
    allowed: float

    @property
    def note(self) -> str:
        steps = f"margin {self.margin:.3g} = {self.margin / self.rounding:.2g} rounding steps"
        return f"prompt {self.prompt}, token {self.step}: {self.chosen}, not {self.expected}; {steps}"


def diverge(reference: GreedyReference, prompt: int, step: int, chosen: int, dtype: str) -> Divergence:
    """Judges choosing `chosen` before token `step`.

    Allowed in fp32 is the limit on logits. In bf16 it is one rounding step, or where that is larger twice the largest
    error that transformers' own bf16 logits have along this continuation: both of two logits may be off by so much.
    """
    ids, exact, expected = reference.candidates[step], reference.float32[step], reference.token_ids[step]
    best = exact[ids.index(expected)]
    margin = best - (exact[ids.index(chosen)] if chosen in ids else min(exact))
    rounding = bf16_step(best) * (1.0 if dtype == "bfloat16" else 2.0**-16)
    if dtype == "float32":
        return Divergence(prompt, step, chosen, expected, margin, rounding, FP32_LIMIT)
    own = max(
        abs(rounded - right)
        for pair in zip(reference.logits, reference.float32, strict=True)
        for rounded, right in zip(*pair, strict=True)
    )
    return Divergence(prompt, step, chosen, expected, margin, rounding, max(rounding, 2 * own))


def compare_norm(findings: Findings, engine: EngineModel, theirs: Sequence[dict[str, Tensor]], **knobs: Any) -> None:
    """The engine's final norm of transformers' own input in its dtype, 16 bits wide, gives transformers' output.

    Where a norm rounds hides below the ratio of a whole layer's errors, but changes a third of its outputs' last bits;
    another order of summation changes hardly any.
    """
    last = f"layers.{engine.config.num_hidden_layers - 1}"
    differing, count = 0, 0
    for tensors in theirs:
        weight = engine.weights.norm
        x = tensors[last].to(weight.device, weight.dtype)
        out = engine.ops.rms_norm(x, weight, engine.config.rms_norm_eps, engine.config.norm_rounding)
        differing += int((out.float() != tensors["norm"].float().to(weight.device)).sum())
        count += out.numel()
    findings.check(
        suite="layers", case="norm of transformers' input", metric="differing_share", value=differing / count,
        limit=NORM_SHARE, limit_kind="ties that another order of summation turns", **knobs,
    )  # fmt: skip


MARGIN_KIND = {
    "float32": "the limit on logits",
    "bfloat16": "one rounding step, or twice transformers' own largest bf16 error along the continuation",
}


def check_greedy(context: Context, engine: EngineModel, dtype: str) -> None:
    """The engine's own choice at each step of transformers' greedy continuation, which is forced on it."""
    found: list[Divergence] = []
    for index, prompt in enumerate(context.bundle.prompts):
        reference = prompt.greedy[dtype]
        ids = prompt.token_ids + reference.token_ids[:-1]
        logits = forward(engine, [Piece(0, ids)], engine.new_cache(1, len(ids)))[0][len(prompt.token_ids) - 1 :]
        for step, chosen in enumerate(engine.ops.argmax(logits).tolist()):
            if chosen != reference.token_ids[step]:
                found.append(diverge(reference, index, step, chosen, dtype))
    shared: dict[str, Any] = {"suite": "layers", "case": "greedy", "dtype": dtype, "backend": context.backend}
    counts = {
        "divergent_tokens": len(found),
        "divergences_beyond_one_step": sum(one.margin > one.rounding for one in found),
    }
    for metric, count in counts.items():
        context.findings.rows.add(metric=metric, value=count, unit="1", better="lower", **shared)
    unexplained = [one for one in found if one.margin > one.allowed]
    context.findings.check(
        metric="unexplained_divergences", value=len(unexplained), limit=0.0,
        limit_kind="a token may differ only within " + MARGIN_KIND[dtype],
        note=unexplained[0].note if unexplained else None, **shared,
    )  # fmt: skip
    if found:
        context.findings.rows.add(
            metric="first_divergence_margin", value=found[0].margin, unit="logit", better="lower",
            limit=found[0].allowed, limit_kind=MARGIN_KIND[dtype], note=found[0].note, **shared,
        )  # fmt: skip


def check_layers(context: Context) -> None:
    """Every layer and the logits: the model of the run, then Llama and Mistral shapes."""
    observed = [index for index, prompt in enumerate(context.bundle.prompts) if prompt.observed]
    for dtype in DTYPES:
        engine = context.llm(dtype).model
        ours = [observe_engine(engine, context.bundle.prompts[index].token_ids) for index in observed]
        exact, theirs = (
            [context.bundle.activations(kind, index, context.device) for index in observed] for kind in DTYPES
        )
        compare_layers(context.findings, "layers", dtype, ours, exact, theirs, backend=context.backend)
        if dtype == "bfloat16":
            compare_norm(context.findings, engine, theirs, dtype=dtype, backend=context.backend)
        check_greedy(context, engine, dtype)
        # Or the next dtype's weights would not find this one's memory free.
        del engine, ours, exact, theirs
    for name, architecture in SHAPES.items():
        compare_shape(context.findings, name, architecture, context.engine)


_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.08,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama_shape": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        # A context of 32 puts wavelengths of head_dim 128 in all three ranges: kept, blended and stretched.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral_shape": _COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 24,
    },
}
SHAPE_TOKENS = (80, 33)  # beyond the window, the chunk of 64 keys and the block of 16 rows


def make_checkpoint(architecture: dict[str, Any], directory: Path, seed: int = 0) -> None:
    """Random bf16 weights of `architecture`, norms too, as transformers saves them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.hf import quiet

    quiet()
    fields = {name: value for name, value in architecture.items() if name != "model_type"}
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture["model_type"], **fields))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    made.to(torch.bfloat16).save_pretrained(directory)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def compare_shape(
    findings: Findings, name: str, architecture: dict[str, Any], engine: Callable[[str], EngineConfig]
) -> None:
    """A small model of random weights, saved by transformers: `engine(dtype)` against transformers, in each dtype."""
    import torch

    device, backend = engine("float32").device, engine("float32").backend

    prompts = random_prompts(SHAPE_TOKENS, architecture["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_checkpoint(architecture, path)
        reference = {}
        for dtype in ("float32", *HALVES):
            loaded = load_model(path, getattr(torch, dtype), device, attention="eager")
            with exact_fp32():
                reference[dtype] = [observe(loaded, ids) for ids in prompts]
        for dtype in reference:
            loaded = load_engine(path, engine(dtype))
            ours = [observe_engine(loaded, ids) for ids in prompts]
            sides = ours, reference["float32"], reference[dtype]
            compare_layers(findings, "layers", dtype, *sides, backend=backend, model=name)
            if dtype in HALVES:
                compare_norm(findings, loaded, reference[dtype], dtype=dtype, backend=backend, model=name)


# --- simulator ------------------------------------------------------------------------------------------------------


def micro_mode(context: Context) -> str:
    return "decode" if context.settings["kv_cache"] != "none" else "prefill"


def start_simulator(context: Context, folder: Path) -> None:
    """Starts the simulator's processes, which then run beside the other checks; nothing on a host with a GPU."""
    make_checkpoint(micro.ARCHITECTURE, folder)
    if not context.gpu:
        for dtype in DTYPES:
            out = folder / f"{dtype}.out"
            context.simulations[dtype] = micro.start_simulation(
                folder, dtype, micro_mode(context), context.versions, out
            )


def check_simulator(context: Context, folder: Path) -> None:
    """The micro model through the CUDA kernels, on the GPU or under the simulator, against transformers."""
    prompt = micro.LONG_PROMPT if context.gpu else micro.PROMPT
    reference = {dtype: micro.reference(folder, dtype, prompt) for dtype in DTYPES}
    for dtype in DTYPES:
        if context.gpu:
            found = micro.run_micro(folder, dtype, micro_mode(context), "cuda", context.versions, prompt)
        else:
            try:
                found = micro.finish_simulation(context.simulations.pop(dtype), folder / f"{dtype}.out")
            except RuntimeError as error:
                raise StageError(f"simulator ({dtype}): {error}") from None
        found = {name: tensor.cpu() for name, tensor in found.items()}
        compare_micro(context.findings, dtype, found, reference, "cuda" if context.gpu else "cuda simulator")


def compare_micro(
    findings: Findings, dtype: str, found: dict[str, Tensor], reference: dict[str, dict[str, Tensor]], backend: str
) -> None:
    """Activations, logits and cache against transformers' (`reference`, by dtype), tokens against `ReferenceOps`.

    `found` is what `micro.run_micro` returns, on the CPU.
    """
    import torch

    from engine.ops.reference import ReferenceOps

    knobs: dict[str, Any] = {"backend": backend, "model": "micro"}
    exact, own = reference["float32"], reference[dtype]
    cached = [name for name in exact if name.startswith(("k.", "v."))]

    def activations(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [{name: tensors[name] for name in exact if name not in cached}]

    compare_layers(findings, "simulator", dtype, activations(found), activations(exact), activations(own), **knobs)
    for name in cached:
        allowed = FP32_LIMIT if dtype == "float32" else HALF_RATIO * mean_difference(own[name], exact[name])
        findings.check(
            suite="simulator", case=f"cache {name}", metric="mean_abs_error", limit=allowed,
            value=mean_difference(found[name], exact[name]), limit_kind="against transformers' cache in fp32",
            dtype=dtype, **knobs,
        )  # fmt: skip
    if "argmax" not in found:
        return
    right = micro.choose(ReferenceOps("cpu"), found["logits"])
    for name in ("argmax", "sampled"):
        findings.check(
            suite="simulator", case=name, metric="differing_tokens", limit=0.0,
            value=unequal(found[name].tolist(), right[name].tolist()),
            limit_kind="the reference operation's choice", dtype=dtype, **knobs,
        )  # fmt: skip
    step = torch.finfo(found["penalised"].dtype).eps
    difference = (found["penalised"].double() - right["penalised"].double()).abs() / right["penalised"].double().abs()
    findings.check(
        suite="simulator", case="repetition penalty", metric="max_relative_error", value=difference.max().item(),
        limit=step, limit_kind="one rounding step", dtype=dtype, **knobs,
    )  # fmt: skip


# --- invariance -----------------------------------------------------------------------------------------------------

LENGTHS = (70, 1, 16, 33)  # around the block of 16 rows and the chunk of 64 keys
CHUNKS = (1, 7, 64)
REPEATS = 20
STEPS = 12


def check_invariance(context: Context) -> None:
    """Design section 5 on the target backend: the same token's logits are the same bits however they were computed."""
    llm = context.llm(context.dtype)
    engine, config = llm.model, llm.engine
    prompts = random_prompts(LENGTHS, context.config.vocab_size)
    paged = config.kv_cache == "paged"
    found = count_unequal(engine, prompts, paged)
    if config.cuda_graph:
        case = "steps of a CUDA graph" if config.captures else "steps of the decode loop"
        found[case] = count_unequal_steps(engine, prompts, config.captures, paged)
    if config.batching == "continuous":
        found["requests together, in pieces and preempted"] = count_unequal_requests(llm, prompts)
    for case, count in found.items():
        context.findings.check(
            suite="invariance", case=case, metric="unequal_logits", value=count, limit=0.0, limit_kind=ORDER,
            dtype=context.dtype, backend=context.backend,
        )  # fmt: skip


def differing(results: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """Elements whose bits differ, of tensors of one floating-point dtype."""
    import torch

    # Viewed as integers, NaN equals itself and -0 is not 0.
    kind = {2: torch.int16, 4: torch.int32}[expected[0].element_size()]
    return sum(int((a.view(kind) != b.view(kind)).sum()) for a, b in zip(results, expected, strict=True))


def count_unequal_requests(llm: LLM, prompts: list[list[int]]) -> int:
    """Log probabilities of requests' tokens and of the likeliest others that differ from those of each request alone.

    Together they have pages for a part of their tokens only, and steps too short for the longest prompt.
    """
    from engine.llm import LLM
    from engine.sampling_params import MOST_LOGPROBS, SamplingParams

    params = [
        SamplingParams(max_new_tokens=2 * STEPS, temperature=i % 2, seed=i, logprobs=MOST_LOGPROBS, ignore_eos=True)
        for i in range(len(prompts))
    ]
    longest = max(map(len, prompts)) + 2 * STEPS
    small = {"max_batch": len(prompts), "max_step_tokens": 24, "kv_tokens": longest + 16, "page_size": 8}
    short = replace(llm.engine, max_model_len=longest)
    weights = llm.config, llm.weights

    def run(engine: EngineConfig, groups: list[list[int]]) -> list[Any]:
        single = LLM(weights, engine)
        return [
            done.logprobs
            for group in groups
            for done in single.generate([prompts[i] for i in group], [params[i] for i in group])
        ]

    order = list(range(len(prompts)))
    together = run(replace(short, **small), [order])
    alone = run(replace(short, max_batch=1, kv_tokens=2 * longest), [[i] for i in order])
    return sum(mine != theirs for a, b in zip(together, alone, strict=True) for mine, theirs in zip(a, b, strict=True))


def count_unequal_steps(engine: EngineModel, prompts: list[list[int]], captures: bool, paged: bool) -> int:
    """Logits of STEPS greedy steps of the decode loop that differ from those of one pass over the finished text.

    Each prompt but its last token is in the cache before. With `captures` the steps are replayed from a CUDA graph.
    """
    import torch

    from engine.runtime.decode_loop import DecodeLoop, Row, bucket
    from engine.sampling_params import SamplingParams

    capacity = max(map(len, prompts)) + STEPS
    loop = DecodeLoop(engine, new_cache(engine, bucket(len(prompts)), capacity, paged), captures)
    pieces = [Piece(slot, ids[:-1]) for slot, ids in enumerate(prompts) if len(ids) > 1]
    forward(engine, pieces, loop.cache)
    greedy = SamplingParams(temperature=0.0)
    loop.start([Row(slot, ids[-1], len(ids) - 1, greedy, 0) for slot, ids in enumerate(prompts)])
    steps = []
    for _ in range(STEPS):
        loop.enqueue()
        loop.wait()
        assert loop.logits is not None
        steps.append(loop.logits[: len(prompts)].clone())
    found = torch.stack(steps, dim=1)
    whole = [ids + new for ids, new in zip(prompts, loop.generated(), strict=True)]
    alone = [
        forward(engine, [Piece(0, text[:-1])], engine.new_cache(1, capacity))[0][len(ids) - 1 :]
        for ids, text in zip(prompts, whole, strict=True)
    ]
    return differing(list(found), alone)


def count_unequal(engine: EngineModel, prompts: list[list[int]], paged: bool) -> dict[str, int]:
    """case -> logits whose bits differ from those of the prompt run alone in one pass."""
    import torch

    capacity = max(map(len, prompts))
    alone = [forward(engine, [Piece(0, ids)], engine.new_cache(1, capacity))[0] for ids in prompts]

    def packed(order: Sequence[int]) -> int:
        pieces = [Piece(place, prompts[index]) for place, index in enumerate(order)]
        results = forward(engine, pieces, new_cache(engine, len(order), capacity, paged))
        return differing(results, [alone[index] for index in order])

    def chunked(size: int) -> int:
        cache = new_cache(engine, len(prompts), capacity, paged)
        parts: list[list[Tensor]] = [[] for _ in prompts]
        for begin in range(0, capacity, size):
            running = [index for index, ids in enumerate(prompts) if begin < len(ids)]
            pieces = [Piece(index, prompts[index][begin : begin + size], begin) for index in running]
            for index, logits in zip(running, forward(engine, pieces, cache), strict=True):
                parts[index].append(logits)
        return differing([torch.cat(pieces) for pieces in parts], alone)

    order = list(range(len(prompts)))
    found = {
        f"a batch of {len(prompts)}": packed(order),
        "the batch in another order": packed(order[::-1]),
        "16 times in one batch": packed([1] * 16),
    }
    found |= {f"prefill in chunks of {size}": chunked(size) for size in CHUNKS if size > 1}
    found["decoded token by token"] = chunked(1)
    again = [forward(engine, [Piece(0, prompts[2])], engine.new_cache(1, capacity))[0] for _ in range(REPEATS)]
    found[f"{REPEATS} repeats"] = differing(again, [alone[2]] * REPEATS)
    return found


# --- text -----------------------------------------------------------------------------------------------------------


def check_text(context: Context) -> None:
    """`generate` gives transformers' greedy text for every prompt, all of them in one batch."""
    # The week's dtype first: it is the one that the checks before this left loaded.
    for dtype in sorted(DTYPES, key=lambda dtype: dtype != context.dtype):
        compare_text(context.findings, context.llm(dtype), context.bundle)


def compare_text(findings: Findings, llm: LLM, bundle: Bundle) -> None:
    """Greedy completions of the bundle's prompts by `llm` against the bundle's."""
    from engine.sampling_params import SamplingParams

    dtype, tokenizer = llm.engine.dtype, llm.tokenizer
    references = [prompt.greedy[dtype] for prompt in bundle.prompts]
    # A prompt that was cut for the bundle, or made without a tokenizer, can only be given as ids.
    whole = tokenizer is not None and all(tokenizer.encode(p.text) == p.token_ids for p in bundle.prompts)
    prompts = [p.text for p in bundle.prompts] if whole else [p.token_ids for p in bundle.prompts]
    params = SamplingParams(temperature=0.0, max_new_tokens=max(len(r.token_ids) for r in references))
    completions = llm.generate(prompts, params)
    shared: dict[str, Any] = {"suite": "text", "dtype": dtype, "backend": llm.engine.backend}
    equal = 0
    for index, (done, reference) in enumerate(zip(completions, references, strict=True)):
        ours = done.token_ids[: len(reference.token_ids)]
        places = [
            place for place, pair in enumerate(zip(ours, reference.token_ids, strict=False)) if pair[0] != pair[1]
        ]
        case = f"prompt {index}"
        if places:
            first = diverge(reference, index, places[0], ours[places[0]], dtype)
            value, limit, note = first.margin, first.allowed, first.note
        else:
            missing = len(reference.token_ids) - len(ours)
            value, limit = (float("inf") if missing else 0.0), FP32_LIMIT
            note = f"{missing} tokens fewer than transformers" if missing else "all tokens equal"
        findings.check(
            case=case, metric="first_divergence_margin", value=value, unit="logit", limit=limit,
            limit_kind=MARGIN_KIND[dtype], note=note, **shared,
        )  # fmt: skip
        equal += not places
        if not places and tokenizer is not None and len(done.token_ids) == len(reference.token_ids):
            findings.check(
                case=case, metric="differing_characters", value=unequal(done.text, reference.text), limit=0.0,
                limit_kind="transformers' text of the same tokens", **shared,
            )  # fmt: skip
    findings.rows.add(
        case="all prompts", metric="equal_completions", value=equal, unit="1", better="higher", limit=len(references),
        limit_kind="all prompts", **shared,
    )  # fmt: skip


# --- sampling -------------------------------------------------------------------------------------------------------

DRAWS = 1000
VOCABULARY = 16
FILTERS: dict[str, dict[str, float]] = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 8": {"top_k": 8},
    "top-p 0.8": {"top_p": 0.8},
    "min-p 0.1": {"min_p": 0.1},
    "all filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}
RARE = 1e-6  # chance that a right sampler fails one test


def expected_distribution(logits: Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> Tensor:
    """fp32 [V] probabilities after transformers' own processors, in its order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits[None].float()
    scores = TemperatureLogitsWarper(temperature)(None, scores)  # type: ignore[arg-type]
    if top_k:
        scores = TopKLogitsWarper(int(top_k))(None, scores)  # type: ignore[arg-type]
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)  # type: ignore[arg-type]
    return scores[0].softmax(-1)


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> tuple[float, float]:
    """Pearson's statistic over cells of at least 5 expected draws (rarer ones pooled), and its quantile at 1 - RARE.

    The quantile is Wilson and Hilferty's approximation.
    """
    from statistics import NormalDist

    cells: list[tuple[float, float]] = []
    pooled = (0.0, 0.0)
    for count, mean in zip(counts, expected, strict=True):
        if mean >= 5:
            cells.append((count, mean))
        else:
            pooled = (pooled[0] + count, pooled[1] + mean)
    if pooled[1] >= 5:
        cells.append(pooled)
    freedom = max(1, len(cells) - 1)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + NormalDist().inv_cdf(1 - RARE) * spread**0.5) ** 3


def draw(ops: Any, logits: Tensor, seeds: Tensor, positions: Tensor, **filters: float) -> list[int]:
    """One token for each of `seeds` and `positions` from the same [V] logits."""
    import torch

    count, device = seeds.shape[0], logits.device

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), filters.get(name, default), dtype=dtype, device=device)

    return ops.sample(
        logits.expand(count, -1).contiguous(),
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        seed=seeds,
        position=positions,
    ).tolist()


def check_sampling(context: Context) -> None:
    """Draws follow transformers' distribution, and are the same for the same seed whatever they are batched with."""
    from engine.sampling_params import SamplingParams

    llm = context.llm(context.dtype)
    compare_distributions(context.findings, llm.model.ops, context.device, context.backend)
    prompts = random_prompts((5, 17, 9), context.config.vocab_size)
    params = [
        SamplingParams(max_new_tokens=8, temperature=0.9, top_k=100, top_p=0.95, seed=seed, ignore_eos=True)
        for seed in (1, 2, 3)
    ]
    together = [done.token_ids for done in llm.generate(prompts, params)]
    again = [done.token_ids for done in llm.generate(prompts[::-1], params[::-1])][::-1]
    alone = [llm.generate([ids], setting)[0].token_ids for ids, setting in zip(prompts, params, strict=True)]
    for case, other in (("generate again, in another order", again), ("generate alone", alone)):
        context.findings.check(
            suite="sampling", case=case, metric="differing_tokens",
            value=sum(unequal(a, b) for a, b in zip(together, other, strict=True)), limit=0.0,
            limit_kind="a seed decides its tokens", dtype=context.dtype, backend=context.backend,
        )  # fmt: skip


def compare_distributions(findings: Findings, ops: Any, device: str, backend: str) -> None:
    """`ops.sample` on fixed logits: chi-square against transformers' filters and softmax, and repeatability."""
    import torch

    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(1.5)
    here = logits.to(device)
    by_position = (
        torch.full((DRAWS,), 1234, dtype=torch.int64, device=device),
        torch.arange(DRAWS, dtype=torch.int32, device=device),
    )
    by_seed = (
        torch.arange(DRAWS, dtype=torch.int64, device=device),
        torch.full((DRAWS,), 17, dtype=torch.int32, device=device),
    )
    shared: dict[str, Any] = {"suite": "sampling", "backend": backend, "dtype": "float32"}
    for name, filters in FILTERS.items():
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
        expected = (expected_distribution(logits, **settings).double() * DRAWS).tolist()
        for kind, streams in (("positions", by_position), ("seeds", by_seed)):
            if kind == "seeds" and name != "temperature 1":
                continue
            tokens = draw(ops, here, *streams, **filters)
            counts = [0.0] * VOCABULARY
            for token in tokens:
                counts[token] += 1
            statistic, quantile = chi_square(counts, expected)
            case = f"{name}, {DRAWS} {kind}"
            findings.check(
                case=case, metric="chi_square", value=statistic, limit=quantile,
                limit_kind=f"chi-square quantile at 1 - {RARE:g}", **shared,
            )  # fmt: skip
            findings.check(
                case=case, metric="forbidden_tokens", limit=0.0,
                value=sum(c for c, e in zip(counts, expected, strict=True) if not e),
                limit_kind="transformers' filters leave them out", **shared,
            )  # fmt: skip
    tokens = draw(ops, here, *by_position)
    some = torch.tensor([11, 3, DRAWS - 1, 0, 70], device=device)
    findings.check(
        case="draws out of a batch", metric="differing_tokens",
        value=unequal(draw(ops, here, by_position[0][some], by_position[1][some]), [tokens[i] for i in some.tolist()]),
        limit=0.0, limit_kind="a draw depends on its seed and position alone", **shared,
    )  # fmt: skip


# In the order they run: checks of one dtype together, and last the simulator, whose processes run beside the others.
CHECKS: dict[str, Callable[..., None]] = {
    "tokenizer": check_tokenizer,
    "tensors": check_tensors,
    "layers": check_layers,
    "invariance": check_invariance,
    "sampling": check_sampling,
    "text": check_text,
    "simulator": check_simulator,
}


@stage(Gpu, StagedModel, Week, Workload)
def main(run: Run, gpu: Gpu, model: Model, week: Week, workload: Workload) -> None:
    unknown = [name for name in week.parity if name not in CHECKS]
    if unknown:
        raise ParamsError(f"weeks.{week.name}.parity: no check '{unknown[0]}'; there are: {', '.join(CHECKS)}")
    host = read_host()
    rows = Rows("parity", week.name, model.name, host)
    context = Context(run, model, week, workload, use_gpu(gpu), Findings(rows))
    target = run.out(f"reports/metrics/parity_{week.name}.parquet")
    failed = target.with_suffix(".failed.parquet")
    failed.unlink(missing_ok=True)
    if week.parity:
        set_threads(context.config.parameter_count())
    with tempfile.TemporaryDirectory() as folder:
        try:
            if "simulator" in week.parity:
                start_simulator(context, Path(folder))
            for name in [name for name in CHECKS if name in week.parity]:
                with stopwatch() as seconds:
                    if name == "simulator":
                        check_simulator(context, Path(folder))
                    else:
                        CHECKS[name](context)
                print(f"{name}: {seconds[0]:.1f} s", flush=True)
        finally:
            for process in context.simulations.values():
                process.kill()
    failures = context.findings.failures
    if failures:
        for suffix in (".parquet", ".json", ".csv"):
            target.with_suffix(suffix).unlink(missing_ok=True)
        rows.write_parquet(failed)
        more = f" (and {len(failures) - 1} more; all rows: {failed})" if len(failures) > 1 else f" (all rows: {failed})"
        raise StageError(failures[0] + more)
    rows.write(target, headline=lambda row: row["suite"] != "tensors" and row["metric"] in HEADLINE)


if __name__ == "__main__":
    main()
