"""Kernels that go wrong while they are compiled."""

import os
import signal
import time
from pathlib import Path

from kernels.cuda import device_function, intrinsic, types
from kernels.launch import Kernel, kernel_factory


@kernel_factory
def broken():
    def kernel(x):
        x[0] = x.nothing

    return Kernel("broken", kernel, ("f32*",), 32)


@device_function
def _nothing_of(x):
    return x.nothing


@kernel_factory
def broken_within():
    def kernel(x):
        x[0] = _nothing_of(x[0])

    return Kernel("broken_within", kernel, ("f32*",), 32)


@kernel_factory
def deadly():
    """Ends the process that compiles it."""

    def typing(typingctx):
        os.kill(os.getpid(), signal.SIGKILL)
        return types.void(), None

    stop = intrinsic(typing)

    def kernel(x):
        stop()

    return Kernel("deadly", kernel, ("f32*",), 32)


@kernel_factory
def endless(number):
    """Writes the id of the process that compiles it to the cache's folder, and compiles for an hour."""

    def typing(typingctx):
        (Path(os.environ["AFS_CACHE"]) / f"endless-{number}").write_text(str(os.getpid()))
        time.sleep(3600)
        return types.void(), None

    stop = intrinsic(typing)

    def kernel(x):
        stop()

    return Kernel(f"endless_{number}", kernel, ("f32*",), 32)
