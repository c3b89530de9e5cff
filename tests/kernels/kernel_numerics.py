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


def _largest(where):
    """Place of the largest element, as in a subscript."""
    return tuple(int(index) for index in torch.unravel_index(where.flatten().argmax(), where.shape))


def assert_finite(ours):
    __tracebackhide__ = True
    bad = ~torch.isfinite(ours)
    if bad.any():
        place = _largest(bad.int())
        raise AssertionError(
            f"{bad.sum()} of {bad.numel()} elements are not written or not finite: {ours[place]} at {place}"
        )


def assert_equal(ours, expected):
    """Of one shape and dtype, and equal in every element; a NaN is equal to nothing."""
    __tracebackhide__ = True
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    other = ours != expected
    if other.any():
        place = _largest(other.int())
        raise AssertionError(
            f"{other.sum()} of {other.numel()} elements differ, first that at {place}: {ours[place].item()}, not "
            f"{expected[place].item()}"
        )


def assert_within(ours, exact, bound):
    """No element further from float64's than its bound."""
    __tracebackhide__ = True
    assert_finite(ours)
    error = (ours.double() - exact).abs() / bound
    if (error > 1).any():
        place = _largest(error)
        raise AssertionError(
            f"{(error > 1).sum()} of {error.numel()} elements are wrong, most of all that at {place}: "
            f"{ours[place]:.6g} for {exact[place]:.6g}, {error[place]:.3g} times as far off as it may be"
        )


def assert_as_good_as_torch(ours, torchs, exact):
    """Error against float64 at most twice torch's own, at the worst element and in the mean square."""
    __tracebackhide__ = True
    assert ours.dtype == torchs.dtype and exact.dtype == torch.float64
    assert_finite(ours)
    mine, theirs = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
    # One unit in the last place of the largest value, for where torch is exact by chance.
    unit = exact.abs().max() * torch.finfo(ours.dtype).eps / 2
    place = _largest(mine)
    assert mine[place] <= 2 * theirs.max() + unit, (
        f"worst error {mine[place]:.3g}, at {place}: {ours[place]:.6g} for {exact[place]:.6g}; "
        f"torch's worst {theirs.max():.3g}"
    )
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
