"""The door to Numba: the only file that imports numba or llvmlite.

Everything else in kernels/ takes its compiler from here, so that a successor of numba-cuda is swapped in by one edit.

With NUMBA_ENABLE_CUDASIM=1 (`SIMULATED`) the same names run the kernels on a CPU without Numba: `cuda` is the simulator
(kernels/simulator.py), the scalar types are NumPy's, and `device_function` leaves a function as it is.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")

if SIMULATED:
    import numpy as _scalars

    from kernels.simulated_memory import Int32
    from kernels.simulator import cuda as _cuda

    cgutils: Any = None
    intrinsic: Any = None
    ir: Any = None
    types: Any = None
else:
    import numba as _scalars
    from llvmlite import ir
    from numba import cuda as _cuda
    from numba import types
    from numba.cuda import cgutils  # pyright: ignore[reportAttributeAccessIssue]
    from numba.cuda.extending import intrinsic

# Any: what these are to the compiler is not what their stubs say.
cuda: Any = _cuda
float32: Any = _scalars.float32
float64: Any = _scalars.float64
int32: Any = Int32() if SIMULATED else _scalars.int32
int64: Any = _scalars.int64
uint8: Any = _scalars.uint8
uint16: Any = _scalars.uint16
uint32: Any = _scalars.uint32
uint64: Any = _scalars.uint64

__all__ = [
    "SIMULATED",
    "cgutils",
    "compile_ptx",
    "cuda",
    "device_function",
    "float32",
    "float64",
    "int32",
    "int64",
    "intrinsic",
    "ir",
    "said_of",
    "types",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "versions",
]


def device_function(fn: Callable[..., Any]) -> Any:
    """Mark `fn` as callable from kernels; it stays a Python function under the simulator.

    It is a function to Numba too, compiled once for each list of types, and inlined by LLVM: inlined before typing, a
    long kernel would take ten times as long to compile.
    """
    return fn if SIMULATED else cuda.jit(device=True, forceinline=True)(fn)


OLDEST = (8, 0)  # capability for which Numba's part compiles; from there on it asks no capability


def _unfit(name: str) -> str:
    """What is wrong where Numba has another inside than this file knows."""
    return (
        f"numba-cuda {versions()['numba-cuda']} has no {name}, which kernels/cuda.py compiles by: install the version "
        "that requirements.lock pins"
    )


@contextmanager
def _callees_for(capability: tuple[Any, ...]) -> Iterator[None]:
    """Within, Numba compiles callees for `capability`.

    numba-cuda asks the driver which device a callee is for, though the kernel that calls it says so; without a driver
    it could compile none. The question is one name in one module, and compute_capability all it wants to know.
    Raises RuntimeError where this numba-cuda asks in another way.
    """
    import numba.cuda.dispatcher
    from numba.cuda.core.compiler_lock import global_compiler_lock  # pyright: ignore[reportMissingImports]

    dispatcher: Any = numba.cuda.dispatcher
    ask = getattr(dispatcher, "get_current_device", None)
    if not callable(ask):
        raise RuntimeError(_unfit("numba.cuda.dispatcher.get_current_device"))
    with global_compiler_lock:
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = ask


def compile_ptx(fn: Callable[..., Any], signature: Any, arch: str, launch_bounds: tuple[int, ...]) -> str:
    """PTX of the kernel `fn`.

    signature: `types.void(...)`; arch: such as "sm_90a"; launch_bounds: threads a block, then optionally the least
    number of blocks an SM must hold. Raises RuntimeError where libnvvm is missing or under the simulator, and Numba's
    own errors where `fn` does not compile.
    """
    if SIMULATED:
        raise RuntimeError("cannot compile under the simulator: unset NUMBA_ENABLE_CUDASIM")
    digits = arch.removeprefix("sm_")
    suffix = digits[len(digits.rstrip("abcdefghijklmnopqrstuvwxyz")) :]
    number = int(digits.removesuffix(suffix))
    capability = (number // 10, number % 10, suffix) if suffix else (number // 10, number % 10)
    (ptx,) = _lowered(fn, signature, launch_bounds).get_asm_strs(cc=capability)
    return ptx


def said_of(error: Exception, fn: Callable[..., Any]) -> str:
    """What an error of `compile_ptx` says in plain text, behind the source line that it is about.

    Numba names the line within several pages, and each line that called it; other errors, as of an intrinsic's typing,
    name none: then it is the kernel's first.
    """
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    places = [f"{path}:{line}" for path, line in re.findall(r" at (\S+) \((\d+)\)", text)]
    place, *callers = dict.fromkeys(places or [f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}"])
    cause = re.split(r'\nFile "|During: ', text)[0]
    cause = " ".join(line for line in cause.splitlines() if line and not line.startswith("Failed in cuda mode"))
    return f"{place}: {cause}" + "".join(f", called at {caller}" for caller in callers)


@functools.lru_cache(maxsize=1)  # of one kernel after the other each architecture is asked for
def _lowered(fn: Callable[..., Any], signature: Any, launch_bounds: tuple[int, ...]) -> Any:
    """Numba's own part, which takes the most time and is the same for every architecture: from Python to LLVM's IR.

    `cuda.compile` is this and libnvvm for one architecture. Raises RuntimeError where this numba-cuda has no such part.
    """
    import numba.cuda.compiler

    lower: Any = getattr(numba.cuda.compiler, "_compile_pyfunc_with_fixup", None)
    if lower is None:
        raise RuntimeError(_unfit("numba.cuda.compiler._compile_pyfunc_with_fixup"))
    with _callees_for(OLDEST):
        library, _ = lower(fn, signature, device=False, abi="numba", cc=OLDEST, launch_bounds=launch_bounds)
    return library


def versions() -> dict[str, str]:
    """Versions of the packages that turn Python into PTX, by distribution name ("" where one is not installed)."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numba", "numba-cuda", "llvmlite"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
