"""transformers as the reference: loading a checkpoint, observing a forward pass, greedy decoding with its margins.

Every import of transformers and torch is inside a function, so that a stage which does not need them starts quickly.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

THREADED_PARAMETERS = 100_000_000
TOP = 8  # candidates kept at each greedy step


def quiet() -> None:
    """Silence transformers' progress bars and advice: a stage's output is its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def set_threads(parameters: int) -> None:
    """torch's threads on a CPU: one for a model whose operations are too small to share, else as they are.

    Threads that take turns at microseconds of work spin in between: on cores that something else uses as well, a model
    of 7 million parameters was forty times slower with two threads than with one.
    """
    import torch

    if parameters < THREADED_PARAMETERS:
        torch.set_num_threads(1)


@contextmanager
def exact_fp32() -> Iterator[None]:
    """fp32 matrix products in fp32: TF32 off, whatever the process had set."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_model(path: str | Path, dtype: torch.dtype, device: str, attention: str = "sdpa") -> Any:
    """The checkpoint at `path` as transformers loads it, on `device`, in evaluation mode. Reads local files only."""
    from transformers import AutoModelForCausalLM

    quiet()
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, attn_implementation=attention, local_files_only=True
    )
    return model.to(device).eval()


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder holds a tokenizer: a checkpoint of random weights has none."""
    return (Path(path) / "tokenizer.json").is_file()


def load_tokenizer(path: str | Path) -> Any:
    """transformers' tokenizer of the files at `path`."""
    from transformers import AutoTokenizer

    quiet()
    return AutoTokenizer.from_pretrained(str(path), local_files_only=True)


def observe(model: Any, token_ids: list[int]) -> dict[str, torch.Tensor]:
    """One forward pass over one sequence: {"embedding", "layers.<i>", "norm": [T, hidden], "logits": [T, vocab]}.

    "layers.<i>" is the residual stream after layer i (transformers' `hidden_states` shows the last one only after the
    final norm, so hooks are used). Tensors keep the model's dtype and device.
    """
    import torch

    seen: dict[str, torch.Tensor] = {}

    def record(name: str):
        def hook(_module, _inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()[0]

        return hook

    core = model.model
    modules = {"embedding": core.embed_tokens, "norm": core.norm}
    modules |= {f"layers.{index}": layer for index, layer in enumerate(core.layers)}
    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        with torch.inference_mode():
            ids = torch.tensor([token_ids], device=model.device)
            seen["logits"] = model(ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return {name: tensor.clone() for name, tensor in seen.items()}


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding of one prompt. `candidates[i]`: the best ids before token i was chosen; `logits[i]`: theirs."""

    token_ids: list[int]
    candidates: list[list[int]]
    logits: list[list[float]]


def greedy(model: Any, token_ids: list[int], new_tokens: int) -> Greedy:
    """transformers' `generate` without sampling, stopping at the checkpoint's own eos."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([token_ids], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        logits = torch.stack([step[0].float() for step in out.logits])
    top = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    return Greedy(out.sequences[0, len(token_ids) :].tolist(), top.indices.tolist(), top.values.tolist())


def score(model: Any, token_ids: list[int], continuation: list[int], candidates: list[list[int]]) -> list[list[float]]:
    """The logits this model gives `candidates[i]` before `continuation[i]`, with the earlier tokens forced."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([token_ids + continuation[:-1]], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(token_ids) - 1 :].float()
        return logits.gather(1, torch.tensor(candidates, device=logits.device)).tolist()


def timed_generate(model: Any, token_ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds from the call to each of `new_tokens` tokens of `generate` (greedy, eos ignored), batch [B, T].

    The clock is read after a device synchronisation at every token.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    cuda = token_ids.device.type == "cuda"
    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    with torch.inference_mode():
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(
            token_ids,
            attention_mask=attention_mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
    if len(times) != new_tokens:
        raise RuntimeError(f"generate made {len(times)} tokens where {new_tokens} were asked for")
    return [moment - begin for moment in times]
