"""A pipeline directory with a tiny random OLMo-2 as the download stage leaves it, and the stages' sections for it."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from stages import metrics
from stages.host import read_host
from stages.metrics import Rows
from stages.params import Engine, Gpu, Load, Model, Requests, SharedPrefix, Week, Workload
from stages.stage import Run

NAME = "tiny"
ARCHITECTURE = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 319,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 318,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "vocab_size": 320,
}
GPU = Gpu(name="cpu", sm=None, memory_gb=None, bandwidth_gbs=None, bf16_tflops=None, count=0)
MODEL = Model(NAME, None, None, "path", None, 0, False, ARCHITECTURE)
MANY = (Requests(5, (4, 9), 3, 1), SharedPrefix(3, 32, (3, 5), 2), Load((1, 3), (40.0,)))
WORKLOAD = Workload(
    "smoke", ("def f(x):\n    return x", "the quick brown fox", "é語👍"), (1, 2), (8, 20), 6, 2, 1, *MANY
)  # fmt: skip
ENGINE = Engine(
    backend="auto", device="auto", dtype="bfloat16", attention="naive", linear="naive", sampling="naive",
    kv_cache="contiguous", page_size=16, kv_tokens=None, prefix_cache=False, cuda_graph=False, batching="inflight",
    max_batch=8, max_step_tokens=2048, max_model_len=None,
)  # fmt: skip
BANDWIDTH, MATRIX_RATE = 1e10, 1e11


def read(path: str | Path) -> Any:
    """A metrics file as a frame, which type checkers need not follow."""
    return metrics.read(path)


def make_context(rows: Rows, llm: Any, workload: Workload = WORKLOAD, gpu: bool = False, **made: Any) -> Any:
    """A bench run's context whose engine is `llm`; `made` is what else would be read or loaded."""
    from stages.bench.context import VERSIONS, Context

    settings = {"dtype": "bfloat16", "backend": "cuda" if gpu else "reference"} | dict.fromkeys(VERSIONS, "naive")
    context = Context(Run("bench"), MODEL, make_week(), workload, gpu, rows)
    vars(context).update({"llm": llm, "settings": settings} | made)
    return context


def make_week(parity: tuple[str, ...] = (), bench: tuple[str, ...] = (), engine: Engine | None = ENGINE) -> Week:
    return Week("w04", "title", "milestone", engine, parity, bench)


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"] - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog; def f(x): return x " * 20], trainer)
    tokenizer.add_special_tokens(["<|pad|>", "<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


def write_snapshot(directory: Path) -> None:
    """The checkpoint, its manifest and the host's ceilings under the working directory `directory`."""
    from stages.parity.shapes import make_checkpoint

    snapshot = directory / "data/hf/hf_snapshot" / NAME
    snapshot.mkdir(parents=True)
    make_checkpoint(ARCHITECTURE, snapshot)
    write_tokenizer(snapshot)
    (directory / f"data/hf/{NAME}.manifest.json").write_text("{}")
    rows = Rows("provision", None, None, read_host())
    for metric, value in (("read_bandwidth", BANDWIDTH), ("matrix_rate", MATRIX_RATE)):
        dtype = "float32" if metric == "matrix_rate" else None
        rows.add(suite="ceilings", case="cpu", metric=metric, value=value, unit="B/s", better="higher", dtype=dtype)
    rows.write_parquet(directory / "data/ceilings.parquet")


@functools.cache
def pipeline() -> Path:
    """A working directory in which the baseline stage has run; made once a process."""
    import os

    from stages import baseline

    directory = Path(tempfile.mkdtemp(prefix="tiny-pipeline-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write_snapshot(directory)
    before = Path.cwd()
    os.chdir(directory)
    try:
        baseline.main.__wrapped__(Run("baseline"), GPU, MODEL, WORKLOAD)  # type: ignore[attr-defined]
    finally:
        os.chdir(before)
    return directory
