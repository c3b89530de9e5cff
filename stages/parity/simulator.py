"""A micro model through the CUDA kernels, on the GPU or under the simulator, against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages import micro
from stages.exits import StageError
from stages.findings import Findings, mean_difference, unequal
from stages.parity.check import Check
from stages.parity.context import DTYPES, Context
from stages.parity.errors import FP32_LIMIT, HALF_RATIO, compare_layers
from stages.parity.shapes import make_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def micro_mode(context: Context) -> str:
    return "decode" if context.settings["kv_cache"] != "none" else "prefill"


def start_simulator(context: Context) -> None:
    """Starts the simulator's processes, which then run beside the other checks; nothing on a host with a GPU."""
    folder = context.folder
    make_checkpoint(micro.ARCHITECTURE, folder)
    if not context.gpu:
        for dtype in DTYPES:
            out = folder / f"{dtype}.out"
            context.simulations[dtype] = micro.start_simulation(
                folder, dtype, micro_mode(context), context.versions, out
            )


def check_simulator(context: Context) -> None:
    """The micro model through the CUDA kernels, on the GPU or under the simulator, against transformers."""
    folder = context.folder
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


SIMULATOR = Check("simulator", check_simulator, start=start_simulator)
