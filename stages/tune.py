"""Which tiling of the prompts' matrix products is the fastest: measures every one on this GPU and keeps the best.

    python -m stages.tune olmo2_7b [olmo2_13b_instruct ...] [--tokens 512 2048 ...]

For each projection of the models (files of conf/model/) and number of tokens, all tilings and torch's product (cuBLAS)
run in turn, as CUDA graphs on random numbers, each for a while before it is timed: a card at its power limit, as in a
long prefill, has other favourites than one that has just begun. What is found replaces the
lines of the same weight, tokens and kind of GPU in kernels/linear/tilings.csv, which `kernels.linear.tiled` chooses
from. 128 tokens the streamed version multiplies as well: a line says that a tiling was faster.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stages import timing
from stages.exits import StageError, reported
from stages.stage import write_whole

if TYPE_CHECKING:
    from kernels.linear.tiled import Tiling

MODELS = Path("conf/model")
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
ROWS = range(32, 257, 8)  # weight rows of a tile
# Tilings of a shape that are built and timed: those that the model of clock cycles thinks best.
CANDIDATES = 20
REPEATS = 2
SECONDS = 0.15  # of each before it is timed, and as many again
GAIN = 1.01  # over the streamed version, from which on the tiled one is taken
BEYOND_L2 = 120 << 20  # bytes of weights that a product goes through in turn
FLOPS = 5e11  # of a graph, about
FIELDS: tuple[str, ...] = (
    "arch", "multiprocessors", "rows", "depth", "gated", "tokens", "tile_rows", "turns", "cluster", "tflops",
    "cublas_tflops", "gpu",
)  # fmt: skip
IDENTITY = FIELDS[:6]

Shape = tuple[int, int, bool]  # rows, depth, whether gate and up
Line = Mapping[str, str]


def list_shapes(names: Iterable[str]) -> list[Shape]:
    """The projections of the models, each shape once. Raises StageError for a name without a file."""
    from engine.model.config import ModelConfig

    found = []
    for name in names:
        path = MODELS / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in MODELS.glob("*.yaml")))
            raise StageError(f"{name}: no file {path}; there are {known}")
        config = ModelConfig.from_dict(yaml.safe_load(path.read_text())["architecture"])
        hidden, inner = config.hidden_size, config.intermediate_size
        found += [
            (config.q_size + 2 * config.kv_size, hidden, False), (hidden, config.q_size, False),
            (2 * inner, hidden, True), (hidden, inner, False),
        ]  # fmt: skip
    return list(dict.fromkeys(found))


def list_candidates(tokens: int, shape: Shape, multiprocessors: int) -> list[Tiling]:
    """The tilings to time, the most promising first."""
    from kernels.linear.streamed import segments_of
    from kernels.linear.tiled import Tiling

    rows, depth, gated = shape
    segments = segments_of(rows, depth, gated)
    every = [
        replace(Tiling.of_warpgroups(size, turns, cluster), segments=segments)
        for size in ROWS
        for turns in (1, 2)
        for cluster in (1, 2)
        # Two tiles in turn have half the registers each.
        if size * turns <= 384 and cluster * 128 <= max(tokens, 128)
    ]
    fitting = [tiling for tiling in every if tiling.fits(gated, depth) and tiling.stages >= 2]
    return sorted(fitting, key=lambda tiling: tiling.clocks(tokens, rows, depth, multiprocessors))[:CANDIDATES]


def time_in_turn(runs: Mapping[Any, Callable[[], None]], repeats: int, seconds: float) -> dict[Any, float]:
    """Milliseconds of each run on the GPU, under load: the median over rounds in which each goes on for `seconds`, and
    then for as long again, which is timed."""

    def repeated(run: Callable[[], None], count: int) -> Callable[[], None]:
        def go_on() -> None:
            for _ in range(count):
                run()

        return go_on

    counts = {name: max(1, round(1e3 * seconds / timing.measure(run, 0, 1, "cuda")[0])) for name, run in runs.items()}
    samples: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name] += timing.measure(repeated(run, counts[name]), 1, 1, "cuda")
    return {name: statistics.median(found) / counts[name] for name, found in samples.items()}


def measure(tokens: int, shape: Shape, candidates: Sequence[Tiling], machine: tuple[str, int]) -> dict[Any, float]:
    """FLOP/s of each tiling and, under "cublas" and "streamed", of torch's product and, where it has one pass, the
    streamed version's."""
    import torch

    from engine.runtime.cuda_graph import capture
    from kernels.linear import streamed, tiled

    rows, depth, gated = shape
    flops = 2.0 * tokens * rows * depth
    device = torch.device("cuda")
    weights = max(1, min(8, -(-BEYOND_L2 // (2 * rows * depth))))
    calls = max(weights, min(12, round(FLOPS / flops)))
    x = torch.randn(tokens, depth, device=device).bfloat16()
    matrices = [torch.randn(rows, depth, device=device).bfloat16() * depth**-0.5 for _ in range(weights)]
    whole = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
    out = whole.new_empty(tokens, rows // 2) if gated else whole

    def graph(product: Callable[[Any], Any]) -> Callable[[], None]:
        def run() -> None:
            for call in range(calls):
                product(matrices[call % weights])

        run()
        return capture(run, None)[0].replay

    runs: dict[Any, Callable[[], None]] = {"cublas": graph(lambda matrix: torch.mm(x, matrix.t(), out=whole))}
    if tokens <= streamed.TOKENS[-1]:
        product = streamed.linear_swiglu if gated else streamed.linear
        runs["streamed"] = graph(lambda matrix: product(x, matrix, out))
    for tiling in candidates:
        runs[tiling] = graph(lambda matrix, tiling=tiling: tiled.launch(tiling, x, matrix, out, gated, machine))
    return {name: calls * flops / (spent / 1e3) for name, spent in time_in_turn(runs, REPEATS, SECONDS).items()}


def line_of(
    tokens: int, shape: Shape, rates: Mapping[Any, float], machine: tuple[str, int], gpu: str
) -> dict[str, str] | None:  # fmt: skip
    """The line of the fastest tiling; None where the streamed version is about as fast."""
    best = max((tiling for tiling in rates if not isinstance(tiling, str)), key=lambda tiling: rates[tiling])
    if rates[best] < GAIN * rates.get("streamed", 0.0):
        return None
    speeds = (f"{rates[name] / 1e12:.0f}" for name in (best, "cublas"))
    values = (*identity(tokens, shape, machine), best.rows, best.turns, best.cluster, *speeds, gpu)
    return dict(zip(FIELDS, map(str, values), strict=True))


def identity(tokens: int, shape: Shape, machine: tuple[str, int]) -> tuple[str, ...]:
    """The fields of IDENTITY."""
    rows, depth, gated = shape
    return tuple(map(str, (*machine, rows, depth, int(gated), tokens)))


def merge(kept: Iterable[Line], new: Mapping[tuple[str, ...], Line | None]) -> str:
    """The file's text: what was found, by identity, in place of the lines that were there, in order."""
    lines = {tuple(line[name] for name in IDENTITY): line for line in kept} | dict(new)
    lines = {name: line for name, line in lines.items() if line}
    ordered = sorted(lines.items(), key=lambda item: [int(part) if part.isdigit() else part for part in item[0]])
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(line for _, line in ordered)
    return text.getvalue()


def build(shapes: Sequence[Shape], tokens: Sequence[int], machine: tuple[str, int]) -> set[str]:
    """Compile what is going to be timed; the names of kernels that spill, which are not worth timing."""
    from engine.runtime.progress import compile_kernels
    from kernels.linear import tiled

    kernels = {}
    for shape in shapes:
        for count in tokens:
            for tiling in list_candidates(count, shape, machine[1]):
                kernel = tiled.warpgroups("bf16", tiling, shape[2], machine[0])
                kernels[kernel.name] = kernel
    return {done.kernel for done in compile_kernels(list(kernels.values()), [machine[0]]) if done.spills}


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    from kernels.launch import machine_of
    from kernels.linear import tiled

    parser = argparse.ArgumentParser(prog="stages.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", help="files of conf/model/, without .yaml")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    given = parser.parse_args(arguments)
    try:
        if wrong := [count for count in given.tokens if count < 1 or count % tiled.TOKENS]:
            raise StageError(f"--tokens {wrong[0]}: a multiple of {tiled.TOKENS} needed")
        shapes = list_shapes(given.models)
        if not torch.cuda.is_available() or (machine := machine_of(0))[0] != "sm_90a":
            raise StageError("tilings are measured for GPUs with wgmma, sm_90a, and this host has none")
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    spilling, gpu = build(shapes, given.tokens, machine), torch.cuda.get_device_name()
    new: dict[tuple[str, ...], Line | None] = {}
    with timing.measurement_lock(), torch.inference_mode():
        for count in given.tokens:
            for shape in shapes:
                candidates = [
                    tiling
                    for tiling in list_candidates(count, shape, machine[1])
                    if tiled.warpgroups("bf16", tiling, shape[2], machine[0]).name not in spilling
                ]
                rates = measure(count, shape, candidates, machine)
                line = new[identity(count, shape, machine)] = line_of(count, shape, rates, machine, gpu)
                print(f"{count} tokens, weight {shape}: {line or 'the streamed version'}", flush=True)
    with open(tiled.MEASURED, newline="") as file:
        kept = list(csv.DictReader(file))
    write_whole(tiled.MEASURED, merge(kept, new))
    return 0


if __name__ == "__main__":
    with reported("tune"):
        sys.exit(main())
