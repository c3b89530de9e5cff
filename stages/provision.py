"""Checks all parameters, reads the host, measures what it can do at most, and checks the `gpu` group against it.

It runs before all other stages, and refuses here what they would find wrong later, when what they had made before is
gone: a wrong value in any section, and a model that does not fit this machine.

`data/host.json` is the host's stable identity, on which all that is measured depends. `data/ceilings.parquet` holds
what was measured once for that identity: rows of suite `ceilings`, case `gpu` or `cpu`, metrics

- `read_bandwidth` (B/s), by which limits are: of our own kernel (knob `backend`: cuda), or of torch's sum (reference)
  on a CPU and on a GPU that our kernels are not for; the note says which,
- `copy_bandwidth` (B/s), of what a copy reads and what it writes together,
- `matrix_rate` (FLOP/s, knob `dtype`: bfloat16 on a GPU, float32 on a CPU).

They are kept under `~/.cache/afs` (or `AFS_CACHE`), so that running again is quick and gives the same bytes;
`AFS_REMEASURE=1` measures them anew. `reports/metrics/provision.parquet` adds the check of the `gpu` group and of a
first kernel. Stable bytes matter: whatever depends on these files is measured again when they change.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from stages import metrics
from stages.fit import check_fit
from stages.host import HOST, Host, gpu_available, read_host, use_gpu
from stages.metrics import Rows
from stages.params import Gpu, Model, Weeks, Workload
from stages.sources import make_source
from stages.stage import HF, Run, cache_folder, stage, write_whole
from stages.validate import check

if TYPE_CHECKING:
    import torch

CEILINGS = Path("data/ceilings.parquet")
METRICS = Path("reports/metrics/provision.parquet")
UNITS = {"read_bandwidth": "B/s", "copy_bandwidth": "B/s", "matrix_rate": "FLOP/s"}
RULER = "kernels.read"
"""What kept ceilings are found by, beside the host: another word here measures every host anew."""
NO_GPU = "no usable GPU on this host"
MEMORY_TOLERANCE = 0.12
"""Datasheets count GB of 10^9 bytes, drivers what is left of 2^30 ones."""


@stage(Gpu, Model, Weeks, Workload)
def main(run: Run, gpu: Gpu, model: Model, weeks: Weeks, workload: Workload) -> None:
    """Writes host.json, ceilings.parquet and provision.parquet; a host that is not the wanted GPU is no error."""
    check(gpu, model, weeks, workload)
    make_source(model, gpu=False).check()
    kept = cache_folder("ceilings")
    check_fit(model, HF / "hf_snapshot" / model.name, use_gpu(gpu), pipeline=True)
    host = read_host()
    write_whole(run.out(HOST), host.as_json())
    measured = recall_ceilings(host, kept)
    write_whole(run.out(CEILINGS), measured)
    rows = build_rows(host, gpu, metrics.read_table(run.out(CEILINGS)).to_pylist())
    rows.write(run.out(METRICS))
    show(host, rows)


def recall_ceilings(host: Host, folder: Path) -> bytes:
    """The Parquet bytes of this host's ceilings, measured on the first call for such a host and kept in `folder`."""
    kept = folder / f"{hashlib.sha256((host.as_json() + RULER).encode()).hexdigest()[:32]}.parquet"
    if os.environ.get("AFS_REMEASURE", "0") == "0":
        with contextlib.suppress(OSError, metrics.MetricsError):
            metrics.read_table(kept)
            return kept.read_bytes()
    rows = Rows("provision", None, None, host)
    measure_ceilings(rows)
    rows.write_parquet(kept)
    return kept.read_bytes()


def measure_ceilings(rows: Rows) -> None:
    """Measures the CPU and, where there is one, the GPU; the rest are rows that say so."""
    from stages.timing import measurement_lock

    with measurement_lock():
        for metric, found in measure_device("cpu", megabytes=256, size=2048, repeats=5):
            add_ceiling(rows, "cpu", metric, found)
        if gpu_available():
            for metric, found in measure_device("cuda", megabytes=4096, size=8192, repeats=20):
                add_ceiling(rows, "gpu", metric, found)
            rows.add(
                suite="check", case="first_kernel", metric="max_abs_error", unit="1", better="lower",
                **check_kernel(),
            )  # fmt: skip
            return
    for metric, unit in UNITS.items():
        dtype = "bfloat16" if metric == "matrix_rate" else None
        rows.missing(
            suite="ceilings", case="gpu", metric=metric, unit=unit, better="higher", reason=NO_GPU, dtype=dtype
        )
    rows.missing(suite="check", case="first_kernel", metric="max_abs_error", unit="1", better="lower", reason=NO_GPU)


def add_ceiling(rows: Rows, case: str, metric: str, found: dict[str, Any]) -> None:
    """Adds a ceiling; its value is the samples' median."""
    rows.add(suite="ceilings", case=case, metric=metric, value=None, unit=UNITS[metric], better="higher", **found)


def measure_device(device: str, megabytes: int, size: int, repeats: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields (metric, samples and knobs) of read and copy bandwidth [B/s] over buffers far larger than any cache, and
    of a matrix product of random [size, size] operands [FLOP/s]: bf16 through cuBLAS on a GPU, fp32 on a CPU.
    """
    import torch

    from stages.timing import measure

    def rates(work: float, fn: Callable[[], Any]) -> dict[str, Any]:
        took = measure(fn, max(2, repeats // 4), repeats, device)
        return {"samples": [work / (milliseconds * 1e-3) for milliseconds in took]}

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else megabytes * 2**20 * 4
    elements = min(megabytes * 2**20, free // 4) // 2**14 * 2**12
    source = torch.randn(elements, device=device)
    yield "read_bandwidth", read_memory(source, repeats)
    target = torch.empty_like(source)
    yield "copy_bandwidth", rates(8 * elements, lambda: target.copy_(source))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    found = rates(2 * size**3, lambda: torch.mm(a, b, out=product))
    yield "matrix_rate", found | {"dtype": str(dtype).removeprefix("torch.")}


def read_memory(source: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Samples of reading source [B/s], and by what; a failure of our kernel is a failed row, as `check_kernel`'s."""
    from engine.bench.ceilings import measure_read

    try:
        read = measure_read(source, repeats)
    except Exception as error:
        return describe_failure(error)
    return {"samples": read.samples, "backend": read.backend, "note": read.note}


def describe_failure(error: Exception) -> dict[str, Any]:
    """The fields of a row that could not be measured for this."""
    return {"status": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}


def check_kernel() -> dict[str, Any]:
    """Compiles and launches one of our kernels on the GPU, a residual add of bf16 [4, 256], and compares it with torch.

    Returns the value, status and note of its row: a failure is a failed row, so that the host is still described.
    """
    import torch

    try:
        from kernels import residual

        x, y = (torch.randn(4, 256, device="cuda").bfloat16() for _ in range(2))
        out = torch.full_like(x, float("nan"))
        residual.add(x, y, out)
        worst = float((out.float() - (x + y).float()).abs().nan_to_num(float("inf")).max())
    except Exception as error:
        return {"value": None} | describe_failure(error)
    if worst > 0:
        return {"value": None, "status": "failed", "note": f"differs from torch's sum by {worst}"}
    return {"value": worst, "status": "ok"}


def build_rows(host: Host, gpu: Gpu, ceilings: list[dict[Any, Any]]) -> Rows:
    """The ceilings, with the datasheet as their limit where the host is that GPU, and the check of the `gpu` group."""
    rows = Rows("provision", None, None, host)
    # The commit that measured, not the one that repeats it: the file stays the same until something is measured.
    rows.common["commit"] = ceilings[0]["commit"]
    mismatches = compare(host, gpu)
    datasheet = {
        "read_bandwidth": gpu.bandwidth_gbs and gpu.bandwidth_gbs * 1e9,
        "copy_bandwidth": gpu.bandwidth_gbs and gpu.bandwidth_gbs * 1e9,
        "matrix_rate": gpu.bf16_tflops and gpu.bf16_tflops * 1e12,
    }
    for ceiling in ceilings:
        row = ceiling | rows.common
        if row["case"] == "gpu" and row["status"] == "ok" and not mismatches and datasheet.get(row["metric"]):
            row |= {"limit": datasheet[row["metric"]], "limit_kind": f"datasheet of {gpu.name}"}
        rows.rows.append(row)
    shared: dict[str, Any] = {
        "suite": "gpu_group",
        "case": gpu.name,
        "metric": "matches_host",
        "unit": "1",
        "better": "higher",
    }
    if gpu.count and not host.gpus:
        rows.missing(**shared, reason=f"{NO_GPU}: kernels are built for {gpu.sm} and not run")
    elif mismatches:
        note = "; ".join(mismatches) + f": kernels are built for {gpu.sm}, what is measured is this host"
        rows.add(**shared, value=0, status="failed", note=note)
    else:
        rows.add(**shared, value=1)
    return rows


def compare(host: Host, gpu: Gpu) -> list[str]:
    """What of the `gpu` group this host is not; nothing for `auto` and `cpu`."""
    if gpu.sm is None or gpu.memory_gb is None:
        return []
    if not host.gpus:
        return [NO_GPU]
    device = host.gpus[0]
    wrong = []
    if device.sm != gpu.sm.rstrip("a"):
        wrong.append(f"{device.name} is {device.sm}, {gpu.name} is {gpu.sm.rstrip('a')}")
    if abs(device.memory_bytes / 1e9 / gpu.memory_gb - 1) > MEMORY_TOLERANCE:
        wrong.append(f"{device.name} has {device.memory_bytes / 1e9:.0f} GB, {gpu.name} has {gpu.memory_gb:.0f}")
    if gpu.count is not None and len(host.gpus) < gpu.count:
        wrong.append(f"{len(host.gpus)} GPUs, {gpu.name} wants {gpu.count}")
    return wrong


def show(host: Host, rows: Rows) -> None:
    """Prints the host and its ceilings, and what changes too often to be kept: the free disk."""
    table = Table(title=f"{host.gpu if host.gpus else host.cpu}, {host.cores} cores, {host.memory_gib} GiB", box=None)
    for column in ("suite", "case", "metric"):
        table.add_column(column)
    table.add_column("value", justify="right")
    table.add_column("of datasheet", justify="right")
    for row in rows.rows:
        value = row["note"] if row["value"] is None else f"{row['value']:,.4g} {row['unit']}"
        share = f"{row['value'] / row['limit']:.0%}" if row["limit"] else ""
        table.add_row(row["suite"], row["case"], row["metric"], value, share)
    console = Console()
    console.print(table)
    console.print(f"{shutil.disk_usage('.').free / 1e9:,.0f} GB of disk free here")


if __name__ == "__main__":
    main()
