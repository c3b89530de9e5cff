"""docs/reading.md says what happens: its request is run, its table of operations and its ring are compared."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.llm import LLM, EngineConfig
from engine.sampling_params import SamplingParams
from kernels.linear.streamed.tiling import Tiling

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/reading.md").read_text()
SHORT = {"torch.bfloat16": "bf16", "torch.int32": "int32"}


def described(tensor: torch.Tensor) -> str:
    return f"{SHORT[str(tensor.dtype)]} {list(tensor.shape)}"


def record(llm: LLM) -> list[tuple[str, str]]:
    """Name and first result of each operation that is called from now on, those inside another left out."""
    calls: list[tuple[str, str]] = []
    depth = 0

    def wrap(name: str, run: Any) -> Any:
        @functools.wraps(run)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            result = run(*args, **kwargs)
            depth -= 1
            if not depth:
                first = result[0] if isinstance(result, tuple) else result
                calls.append((name, "" if first is None else described(first)))
            return result

        return recorded

    for name in ("embedding", "linear", "attend", "add_norm", "linear_swiglu", "rms_norm", "argmax", "advance"):
        setattr(llm.model.ops, name, wrap(name, getattr(llm.model.ops, name)))
    return calls


def test_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(ROOT / "data/models/olmo2-tiny"), EngineConfig.for_machine(device="cpu", backend="reference"))
    prompt, count = re.search(r'afs generate --prompt "(.*)" --max-new-tokens (\d+)', TEXT).groups()  # type: ignore[union-attr]
    ids = llm.token_ids(prompt, "the prompt")
    assert f"`{ids}`" in TEXT
    calls, batches = record(llm), []
    forward = llm.model.forward
    monkeypatch.setattr(llm.model, "forward", lambda batch, cache: batches.append(batch) or forward(batch, cache))
    done = llm.generate([ids], SamplingParams(max_new_tokens=int(count), temperature=0))[0]

    # The table: a layer, then what comes after the last one.
    rows = re.findall(r"^\| (`\w+`|…) \|.*?\| ((?:bf16|int32) \[[\d, ]+\])?", TEXT, re.MULTILINE)
    table = [(name.strip("`"), gives) for name, gives in rows]
    skipped = table.index(("…", ""))
    layers = llm.config.num_hidden_layers
    tail = len(table) - skipped - 1
    first = calls[: 1 + (skipped - 1) * layers + tail]
    assert first[:skipped] == table[:skipped]
    assert [(name, gives if name != "advance" else "") for name, gives in first[-tail:]] == table[skipped + 1 :]
    assert len(calls) == int(count) * len(first)

    batch, second = batches[:2]
    assert batch.tokens.tolist() == ids + [0] * 8 and batch.positions.tolist() == list(range(16))
    assert batch.logits_at.tolist() == [7] and f"{described(batch.logits_at)}, the place" in TEXT
    assert second.one_token_per_slot and described(second.tokens) == "int32 [1]"
    chosen = done.token_ids[0]
    assert f"int32 [1]: {chosen}, `{llm.tokenizer.decode([chosen])}`" in TEXT  # type: ignore[union-attr]
    assert done.finish_reason == "length" and len(done.token_ids) == int(count)
    cache, pool = llm.core.runner.cache, llm.core.pool
    assert cache.table is not None and f"int32 {list(cache.table.shape)}" in TEXT
    assert list(cache.k[0].shape) == [pool.pages + 1, 16, 2, 128] and (pool.cached, pool.used) == (1, 0)


def test_its_ring() -> None:
    tiling = Tiling.choose(1, 12288, 4096, False, "sm_90a", 132)
    rows, columns = tiling.groups * 8, tiling.boxes * 64
    said = (
        f"{12288 // rows} blocks own {rows} weight rows each: {tiling.groups} groups of 8",
        f"one for each of {tiling.warps} consumer warps",
        f"{4096 // columns} stages of two boxes, {columns} columns: {rows} weight rows and {tiling.tokens} token rows, "
        f"{tiling.stage_bytes:,} bytes",
        f"The ring has {tiling.stages} stages",
    )
    flat = " ".join(TEXT.split())
    for sentence in said:
        assert sentence in flat, sentence
    # Each stage of the drawing is multiplied once a round, and what follows comes as many moments later.
    drawn = {int(n): cells.split() for n, cells in re.findall(r"^    stage (\d) +(.+)$", TEXT, re.MULTILINE)}
    assert list(drawn) == list(range(tiling.stages))
    moments = {int(cell): moment for cells in drawn.values() for moment, cell in enumerate(cells) if cell.isdigit()}
    for step, moment in moments.items():
        assert drawn[step % tiling.stages][moment] == str(step) and moment == min(moments.values()) + step
