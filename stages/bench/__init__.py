"""How fast a week's engine is: the standard suite that all weeks share, and what the week measures of its own.

A week without an engine, or a host without a GPU, has the same rows with status not_measured and no value. By hand,
profile=torch|nsys|ncu measures nothing and shows which kernels the time goes to (docs/profiling.md).
"""

from __future__ import annotations

from stages.bench.context import Context
from stages.bench.suites import SUITES
from stages.host import read_host, use_gpu
from stages.metrics import Rows
from stages.params import Gpu, Model, ParamsError, StagedModel, Week, Workload
from stages.profile import TOOLS, profile_week
from stages.stage import Run, stage


@stage(Gpu, StagedModel, Week, Workload, options={"profile": TOOLS})
def main(
    run: Run, gpu: Gpu, model: Model, week: Week, workload: Workload, profile: str | None = None
) -> None:  # fmt: skip
    unknown = [name for name in week.bench if name not in SUITES]
    if unknown:
        raise ParamsError(f"weeks.{week.name}.bench: no suite '{unknown[0]}'; there are: {', '.join(SUITES)}")
    rows = Rows("bench", week.name, model.name, read_host())
    context = Context(run, model, week, workload, use_gpu(gpu), rows)
    if profile:
        profile_week(profile, week.name, model.name, context.path, context.settings, workload)
        return
    for suite in SUITES.values():
        suite.run(context)
    rows.write(run.out(f"reports/metrics/bench_{week.name}.parquet"))
