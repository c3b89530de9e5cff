"""A whole forward pass of a micro model through the CUDA kernels, every operation of it: on a GPU, or on a CPU.

    NUMBA_ENABLE_CUDASIM=1 python -m stages.micro <checkpoint> <dtype> <prefill|decode> <versions> <out.safetensors>

On a CPU the kernels run under the simulator, which has to be switched on before they are imported: hence a process of
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.findings import Piece, forward, load_engine

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 256
ARCHITECTURE = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.08,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
PROMPT = (17, 200, 3, 91, 142)
LONG_PROMPT = tuple((37 * index + 5) % VOCABULARY for index in range(48))  # where a GPU makes it cheap
DECODED = 2  # of the prompt's tokens, run one at a time in mode "decode"
PENALTY, SEED = 1.3, 7


def run_micro(
    path: Path, dtype: Any, mode: str, device: Any, versions: Mapping[str, Any], prompt: Sequence[int] = PROMPT
) -> dict[str, Tensor]:
    """The micro model over `prompt` through CudaOps of these versions (`EngineConfig`'s attention, linear, sampling).

    prefill: all tokens in one pass. decode: the last DECODED one by one, then everything that chooses a token.
    Returns: "embedding", "layers.<i>", "norm" [T, hidden], "logits" [T, V]; "k.<i>", "v.<i>" [T, heads, head_dim], the
    cache; with mode decode also "penalised" [T, V], "argmax" [T] and "sampled" [T].
    """
    import torch

    from engine.llm import EngineConfig

    model = load_engine(path, EngineConfig(backend="cuda", device=device, dtype=dtype, **versions))
    cache = model.new_cache(1, len(prompt))
    seen: dict[str, list[Tensor]] = {}

    def record(name: str, tensor: Tensor) -> None:
        if not name.endswith((".attention", ".mlp")):
            seen.setdefault(name, []).append(tensor.clone())

    first = len(prompt) - (DECODED if mode == "decode" else 0)
    forward(model, [Piece(0, prompt[:first])], cache, record)
    for position in range(first, len(prompt)):
        forward(model, [Piece(0, prompt[position : position + 1], position)], cache, record)
    found = {name: torch.cat(tensors) for name, tensors in seen.items()}
    for index in range(model.config.num_hidden_layers):
        found |= {f"k.{index}": cache.k[index][0], f"v.{index}": cache.v[index][0]}
    if mode == "decode":
        found |= choose(model.ops, found["logits"])
    return found


def reference(path: Path, dtype: str, prompt: Sequence[int] = PROMPT) -> dict[str, Tensor]:
    """Compute with transformers, for `prompt` on the CPU, under `run_micro`'s names, the chosen tokens aside."""
    import torch

    from stages.hf import exact_fp32, load_model, observe

    loaded = load_model(path, getattr(torch, dtype), "cpu", attention="eager")
    with exact_fp32(), torch.inference_mode():
        found = observe(loaded, list(prompt))
        past = loaded(torch.tensor([prompt]), use_cache=True).past_key_values
    for index, layer in enumerate(past.layers):
        found |= {f"k.{index}": layer.keys[0].transpose(0, 1), f"v.{index}": layer.values[0].transpose(0, 1)}
    return found


def choose(ops: Any, logits: Tensor) -> dict[str, Tensor]:
    """Every operation that turns logits [T, V] into tokens: penalty, argmax, and sampling with all filters on."""
    import torch

    rows, vocabulary = logits.shape
    device = logits.device
    seen = torch.zeros(rows, vocabulary, dtype=torch.uint8, device=device)
    seen[:, list(PROMPT)] = 1
    penalised = logits.clone()
    ops.repetition_penalty(penalised, seen, torch.full((rows,), PENALTY, device=device))
    sampled = ops.sample(
        logits,
        torch.linspace(0.0, 1.5, rows, device=device),
        torch.full((rows,), 50, dtype=torch.int32, device=device),
        torch.full((rows,), 0.9, device=device),
        torch.full((rows,), 0.02, device=device),
        torch.full((rows,), SEED, dtype=torch.int64, device=device),
        torch.arange(rows, dtype=torch.int32, device=device),
    )
    return {"penalised": penalised, "argmax": ops.argmax(logits), "sampled": sampled}


def start_simulation(
    path: Path, dtype: str, mode: str, versions: Mapping[str, Any], out: Path
) -> subprocess.Popen[str]:
    """`run_micro` in a process of its own, under the simulator; it writes `out`."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.micro", str(path), dtype, mode, json.dumps(dict(versions)), str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_simulation(process: subprocess.Popen[str], out: Path) -> dict[str, Tensor]:
    """Read what the process computed. Raises RuntimeError with its last line where it failed."""
    _, errors = process.communicate()
    if process.returncode:
        last = errors.strip().splitlines()[-1] if errors.strip() else "it said nothing"
        raise RuntimeError(f"the simulator ended with status {process.returncode}: {last}")
    from safetensors.torch import load_file

    return load_file(out)


def main(arguments: list[str]) -> None:
    from safetensors.torch import save_file

    path, dtype, mode, versions, out = arguments
    found = run_micro(Path(path), dtype, mode, "cpu", json.loads(versions))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1:])
