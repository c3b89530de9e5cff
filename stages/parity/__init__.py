"""Whether the engine computes what Hugging Face computes, and the same bits however it is asked to.

A week's list names its checks. Each writes rows with the error, its limit and a status; anything beyond its limit
fails the stage, which names the first thing that is wrong and by how much. The rows of a failed run are kept beside the
place of a good one's, as `<name>.failed.parquet`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from stages.exits import StageError
from stages.findings import Findings
from stages.hf import set_threads
from stages.host import read_host, stopwatch, use_gpu
from stages.metrics import Rows
from stages.params import Gpu, Model, ParamsError, StagedModel, Week, Workload
from stages.parity.checks import CHECKS
from stages.parity.context import Context
from stages.stage import Run, stage


@stage(Gpu, StagedModel, Week, Workload)
def main(run: Run, gpu: Gpu, model: Model, week: Week, workload: Workload) -> None:
    unknown = [name for name in week.parity if name not in CHECKS]
    if unknown:
        raise ParamsError(f"weeks.{week.name}.parity: no check '{unknown[0]}'; there are: {', '.join(CHECKS)}")
    chosen = [check for name, check in CHECKS.items() if name in week.parity]
    rows = Rows("parity", week.name, model.name, read_host())
    target = run.out(f"reports/metrics/parity_{week.name}.parquet")
    failed = target.with_suffix(".failed.parquet")
    failed.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(run, model, week, workload, use_gpu(gpu), Findings(rows), Path(folder))
        if chosen:
            from engine.model.tensors import parameter_count

            set_threads(parameter_count(context.config))
        try:
            for check in chosen:
                check.start(context)
            for check in chosen:
                with stopwatch() as seconds:
                    check.run(context)
                print(f"{check.name}: {seconds[0]:.1f} s", flush=True)
        finally:
            for process in context.simulations.values():
                process.kill()
    failures = context.findings.failures
    if failures:
        target.unlink(missing_ok=True)
        rows.write_parquet(failed)
        rows.write_headlines(target)  # which say how many checks failed
        more = f" (and {len(failures) - 1} more; all rows: {failed})" if len(failures) > 1 else f" (all rows: {failed})"
        raise StageError(failures[0] + more)
    rows.write(target)
