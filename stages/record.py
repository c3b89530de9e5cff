"""Keeps this host's measurements in git: `make record` copies reports/metrics/*.parquet to
reports/recorded/<gpu>/<model>/.

    python -m stages.record [FOLDER]     FOLDER is another checkout's or run's reports/metrics

The folder's name is the GPU's, the model's the one in the files; a name taken by older files is replaced as a whole.
"""

import re
import shutil
import sys
from pathlib import Path

from stages import metrics
from stages.stage import StageError

METRICS = Path("reports/metrics")
RECORDED = Path("reports/recorded")


def slug(name: str) -> str:
    """A GPU's name as a folder's: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def record(source: Path, recorded: Path) -> Path:
    """Copies `source`'s Parquet files to `recorded`/<gpu>/<model>/ and returns that folder.

    The run's model is the baseline's: parity also measures small models of other shapes. Raises StageError where there
    is no Parquet, where the files are of several hosts, or where a check failed.
    """
    files = sorted(source.glob("*.parquet"))
    if not files:
        raise StageError(f"{source} holds no Parquet files: run the pipeline first")
    failed = [file.name for file in files if ".failed." in file.name]
    if failed:
        raise StageError(f"{source / failed[0]}: a failed run is not recorded")
    frames = [metrics.read(file) for file in files]
    for column in ("gpu", "driver"):
        values = {value for frame in frames for value in frame[column].dropna()}
        if len(values) != 1:
            found = ", ".join(sorted(values)) or "none"
            raise StageError(f"{source}: its rows name as {column}: {found}; a recorded run has exactly one")
    baseline = source / "baseline.parquet"
    if baseline not in files:
        raise StageError(f"{baseline} is missing: run the whole pipeline first")
    model = str(metrics.read(baseline)["model"].iloc[0])
    gpu = next(str(value) for frame in frames for value in frame["gpu"].dropna())
    target = recorded / slug(gpu) / model
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
    host = source.parent.parent / "data" / "host.json"
    if host.exists():
        shutil.copyfile(host, target / "host.json")
    return target


if __name__ == "__main__":
    try:
        print(record(Path(sys.argv[1]) if len(sys.argv) > 1 else METRICS, RECORDED))
    except (StageError, metrics.MetricsError) as error:
        sys.exit(f"error: {error}")
