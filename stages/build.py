"""Compiles every kernel for every supported architecture and says what each needs; no GPU takes part.

Rows: registers, spills, stack and shared memory, theoretical occupancy and the PTX instruction mix, one case a kernel
and architecture, and the seconds of all. A kernel that spills registers to memory fails the stage unless
EXPLAINED_SPILLS says why it may.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stages.exits import StageError
from stages.host import read_host, stopwatch
from stages.metrics import Rows
from stages.params import Gpu
from stages.stage import Run, stage, write_whole

if TYPE_CHECKING:
    from kernels.cubins import Build

# Kernel name -> why spilling costs less than not doing so.
EXPLAINED_SPILLS: dict[str, str] = {}

RESOURCES = {
    "registers": ("registers", "1"),
    "spill_bytes": ("spills", "B"),
    "stack_bytes": ("stack", "B"),
    "shared_bytes_static": ("static_shared", "B"),
    "shared_bytes_dynamic": ("dynamic_shared", "B"),
}


def add_build(rows: Rows, build: Build) -> str | None:
    """The rows of one kernel on one architecture; what is wrong with it, if something is."""
    case = f"{build.kernel} {build.arch}"
    shared: dict[str, Any] = {"case": case, "backend": "cuda"}
    problem = None
    for metric, (attribute, unit) in RESOURCES.items():
        value = getattr(build, attribute)
        verdict: dict[str, Any] = {}
        if metric == "spill_bytes" and value:
            reason = EXPLAINED_SPILLS.get(build.kernel)
            if reason is None:
                problem = f"{case} spills {value} bytes a thread"
            verdict: dict[str, Any] = {"status": "ok" if reason else "failed", "note": reason or problem}
        rows.add(suite="resources", metric=metric, value=value, unit=unit, better="lower", **verdict, **shared)
    rows.add(suite="resources", metric="threads", value=build.threads, unit="1", better=None, **shared)
    rows.add(
        suite="resources", metric="theoretical_occupancy", value=build.occupancy, unit="1", better="higher", limit=1.0,
        limit_kind="all of an SM's threads", **shared,
    )  # fmt: skip
    for family, count in sorted(build.instructions.items()):
        rows.add(suite="instructions", metric=f"instructions.{family}", value=count, unit="1", better=None, **shared)
    return problem


@stage(Gpu)
def main(run: Run, gpu: Gpu) -> None:
    from engine.runtime.progress import compile_kernels
    from kernels import catalogue
    from kernels.architectures import ARCHITECTURES, BuildError

    kernels = catalogue()
    rows = Rows("build", None, None, read_host())
    target = run.out("reports/metrics/build.parquet")
    failed = target.with_suffix(".failed.parquet")
    failed.unlink(missing_ok=True)
    try:
        with stopwatch() as seconds:
            builds = compile_kernels(kernels, ARCHITECTURES)
    except BuildError as error:
        raise StageError(str(error)) from None
    print(f"{len(kernels)} kernels for {len(ARCHITECTURES)} architectures in {seconds[0]:.1f} s")
    problems = [problem for build in builds if (problem := add_build(rows, build))]
    rows.add(
        suite="compilation", case="all kernels", metric="seconds", value=seconds[0], unit="s", better=None,
        note="kernels that are kept from before are not compiled again",
    )  # fmt: skip
    if problems:
        rows.write_parquet(failed)
        rows.write_headlines(target)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StageError(f"{problems[0]}{more}: all rows are in {failed}")
    manifest = {"kernels": sorted(kernel.name for kernel in kernels), "architectures": list(ARCHITECTURES)}
    write_whole(run.out("reports/metrics/engine_manifest.json"), json.dumps(manifest, indent=2) + "\n")
    rows.write(target)


if __name__ == "__main__":
    main()
