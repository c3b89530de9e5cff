"""What the kernel tests measure with: random tensors with outliers, poisoned outputs, errors against float64."""

import os
import subprocess
import sys
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).resolve().parents[2]


def randn(*shape, dtype=torch.float32, scale=1.0):
    """Normal numbers, one in fifty of them ten times as large."""
    x = torch.randn(*shape, device=DEVICE) * scale
    return torch.where(torch.rand(*shape, device=DEVICE) < 0.02, 10 * x, x).to(dtype)


def poisoned(*shape, dtype):
    """A tensor of NaN to be written over."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def floats(*values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def assert_as_good_as_torch(ours, torchs, exact):
    """Error against float64 at most twice torch's own, at the worst element and in the mean square."""
    assert ours.dtype == torchs.dtype and exact.dtype == torch.float64
    assert torch.isfinite(ours).all(), "an element was not written or is not finite"
    mine, theirs = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
    # One unit in the last place of the largest value, for where torch is exact by chance.
    unit = exact.abs().max() * torch.finfo(ours.dtype).eps / 2
    assert mine.max() <= 2 * theirs.max() + unit, f"worst error {mine.max():.3g}, torch's {theirs.max():.3g}"
    rms, their_rms = mine.square().mean().sqrt(), theirs.square().mean().sqrt()
    assert rms <= 2 * their_rms + unit / 4, f"mean square error {rms:.3g}, torch's {their_rms:.3g}"


def run_compiled(code, timeout=280, **environment):
    """Run Python with the real compiler, not the simulator, in the repository; returns what it prints.

    tests/kernels is on its path; environment is added to the process's. timeout in seconds.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
