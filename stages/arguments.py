"""Numbers on the command lines of what is no stage, as types of `argparse`. The standard library alone."""

import argparse
import contextlib
import math


def positive(text: str) -> float:
    """A finite number above 0. Raises ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}': should be a number above 0")


def not_negative(text: str) -> float:
    """A finite number of 0 or more. Raises ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}': should be a number of 0 or more")
