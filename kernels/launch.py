"""From a kernel's Python function to a launch: PTX, a cubin kept on disk, and a call that costs the host microseconds.

    Kernel.build(arch)     fn + signature -> PTX (Numba, libnvvm) -> cubin (ptxas), kept under a key of what shaped it
    Kernel.prepare()       the cubin of this device's architecture, loaded; nothing compiles after that
    Kernel.launch(grid, …) cuda.core launch on torch's current stream; under the simulator, the function itself
    rehearsal(machine)     within, launches only say which kernels they are of

A launch of a kernel that nobody has prepared prepares it, and is counted: `late_kernels`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import operator
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float
from dataclasses import dataclass
from typing import Any

import torch

from kernels import cubins, cuda
from kernels.architectures import ARCHITECTURES, LIMITS, BuildError, architecture_of, has_dependent_launch
from kernels.cubins import Build
from kernels.identity import code_identity, identity

_POINTERS = {
    "bf16*": (torch.bfloat16,),
    "f16*": (torch.float16,),
    "f32*": (torch.float32,),
    "i32*": (torch.int32,),
    "i64*": (torch.int64,),
    "u8*": (torch.uint8, torch.bool),
}
_SCALARS = ("u64", "i64", "i32", "f32")


@dataclass(frozen=True)
class LaunchOptions:
    """How the blocks of a launch are scheduled.

    cluster: blocks of a thread block cluster in x, y, z (sm_90 and later); the grid still counts blocks.
    cooperative: all blocks resident at once, so that they may wait for each other.
    programmatic: programmatic dependent launch: may start before the kernel ahead of it in the stream has finished, and
    must itself wait (griddepcontrol.wait) before it reads what that kernel wrote. Before sm_90 an ordinary launch.
    """

    cluster: tuple[int, int, int] | None = None
    cooperative: bool = False
    programmatic: bool = False


class Kernel:
    """A kernel function with its argument types and block size.

    name: unique, as "rms_norm_naive_bf16". fn: the Python function. args: the kinds of its arguments, pointers
    "bf16*", "f16*", "f32*", "i32*", "i64*", "u8*" and scalars "u64", "i64", "i32", "f32". threads: of a block.
    dynamic_shared: bytes of a block. blocks_per_sm: blocks an SM must be able to hold (bounds the registers; 0: the
    assembler decides). options: of a launch that names none. architectures: what it can be built for. early: names of
    the pointers that a programmatic launch reads before griddepcontrol.wait, as no kernel ahead writes there (the
    simulator refuses others). Raises ValueError for an unknown argument kind, a block size no GPU takes, or a name in
    `early` that is none of fn's.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[..., None],
        args: tuple[str, ...],
        threads: int,
        dynamic_shared: int = 0,
        blocks_per_sm: int = 0,
        options: LaunchOptions | None = None,
        architectures: tuple[str, ...] = ARCHITECTURES,
        early: tuple[str, ...] = (),
    ):
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"kernel name {name!r}: letters, digits and underscores needed, as it names the PTX entry")
        for kind in args:
            if kind not in _POINTERS and kind not in _SCALARS:
                known = ", ".join((*_POINTERS, *_SCALARS))
                raise ValueError(f"{name}: argument kind {kind!r} is unknown: known are {known}")
        if not 1 <= threads <= 1024:
            raise ValueError(f"{name}: {threads} threads a block: a block has 1 to 1024")
        self.parameters = tuple(inspect.signature(fn).parameters)
        if unknown := set(early).difference(self.parameters):
            raise ValueError(f"{name}: early names {sorted(unknown)}, and the parameters are {self.parameters}")
        self.name = name
        self.fn = fn
        self.args = args
        self.threads = threads
        self.dynamic_shared = dynamic_shared
        self.blocks_per_sm = blocks_per_sm
        self.options = options or LaunchOptions()
        self.architectures = architectures
        self.early = frozenset(self.parameters.index(parameter) for parameter in early)
        self.recipe: tuple[str, str, tuple[Any, ...]] | None = None
        self._plan = tuple((kind in _POINTERS, _POINTERS.get(kind), kind) for kind in args)
        self._loaded: dict[int, Any] = {}
        self._configs: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"Kernel({self.name})"

    def __reduce__(self) -> Any:
        if self.recipe is None:
            raise TypeError(f"{self.name}: only a kernel made by a @kernel_factory can go to another process")
        return _remake, self.recipe

    def ptx(self, arch: str) -> str:
        """PTX for an architecture, its entry named as the kernel.

        Raises BuildError with the source line and the compiler's words where `fn` does not compile.
        """
        element = {
            "bf16*": "uint16", "f16*": "uint16", "f32*": "float32", "i32*": "int32", "i64*": "int64", "u8*": "uint8",
        }  # fmt: skip
        scalar = {"u64": "uint64", "i64": "int64", "i32": "int32", "f32": "float32"}
        types = cuda.types
        if types is None:
            raise BuildError(f"{self.name}: nothing compiles under the simulator: unset NUMBA_ENABLE_CUDASIM")
        kinds = [
            types.CPointer(getattr(types, element[kind])) if kind in element else getattr(types, scalar[kind])
            for kind in self.args
        ]
        bounds = (self.threads, self.blocks_per_sm) if self.blocks_per_sm else (self.threads,)
        try:
            ptx = cuda.compile_ptx(self.fn, types.void(*kinds), arch, bounds)
        except Exception as error:
            # Numba and cuda.bindings each have an exception of their own for a missing library.
            if "nvvm" in str(error).lower():
                said = f"{error}; libnvvm comes with pip install 'numba-cuda[cu13]'"
            else:  # a RuntimeError is about what is installed
                said = str(error) if isinstance(error, RuntimeError) else cuda.said_of(error, self.fn)
            raise BuildError(f"{self.name}: does not compile for {arch}: {said}") from error
        entry = re.search(r"\.entry\s+(\S+?)\(", ptx)
        if entry is None:
            raise BuildError(f"{self.name}: the PTX has no entry:\n{ptx}")
        if not has_dependent_launch(arch):
            ptx = re.sub(r"^\s*griddepcontrol\.\w+;\n", "\n", ptx, flags=re.MULTILINE)
        # Numba's symbols count what the process compiled before: without them the same kernel is the same cubin.
        ptx = re.sub(r"^\.common \.global .*NumbaEnv.*;\n", "", ptx, flags=re.MULTILINE)
        return ptx.replace(entry[1], self.name)

    def entry(self, arch: str) -> str:
        """Name of the cubin among the kept ones: by all that decides what it is, and nothing else.

        Raises BuildError under the simulator, which has no compiler.
        """
        if cuda.SIMULATED:
            raise BuildError(f"{self.name}: nothing compiles under the simulator: unset NUMBA_ENABLE_CUDASIM")
        parts = [
            code_identity(self.fn),
            _compiler(),
            self.args,
            self.threads,
            self.dynamic_shared,
            self.blocks_per_sm,
            arch,
        ]
        return f"{self.name}-{arch}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"

    def check(self, arch: str) -> None:
        """Raises BuildError for an architecture that is unknown, or that the kernel is not for."""
        if arch not in LIMITS:
            raise BuildError(f"{self.name}: architecture {arch!r} is unknown: known are {', '.join(ARCHITECTURES)}")
        if arch not in self.architectures:
            raise BuildError(f"{self.name}: is for {', '.join(self.architectures)}, not for {arch}")

    def kept(self, arch: str) -> Build | None:
        """The cubin for an architecture, where it is kept. Raises BuildError as `check`."""
        self.check(arch)
        return cubins.kept(self.entry(arch))

    def keep(self, build: Build) -> None:
        """Keep what `compile` has made."""
        cubins.keep(self.entry(build.arch), build)

    def build(self, arch: str) -> Build:
        """The cubin for an architecture, kept or compiled now (seconds). Raises BuildError as `compile`."""
        build = self.kept(arch)
        if build is None:
            build = self.compile(arch)
            self.keep(build)
        return build

    def compile(self, arch: str) -> Build:
        """The cubin for one of ARCHITECTURES, compiled.

        Raises BuildError: unknown architecture, the function does not compile, no assembler, too much shared memory.
        """
        self.check(arch)
        ptx = self.ptx(arch)
        cubin, report, assembler = cubins.assemble(ptx, arch, self.name)
        resources = cubins.resources(report, self.name)
        limits, shared = LIMITS[arch], resources["static_shared"] + self.dynamic_shared
        if shared > limits.shared_block:
            raise BuildError(f"{self.name}: {shared} bytes of shared memory a block: {arch} has {limits.shared_block}")
        blocks = limits.blocks_per_sm(self.threads, resources["registers"], shared)
        return Build(
            kernel=self.name,
            arch=arch,
            dynamic_shared=self.dynamic_shared,
            threads=self.threads,
            blocks_per_sm=blocks,
            occupancy=blocks * -(-self.threads // 32) * 32 / limits.threads,
            instructions=cubins.instruction_mix(ptx),
            assembler=assembler,
            cubin=cubin,
            **resources,
        )

    def prepare(self, device: int | None = None, build: Build | None = None) -> None:
        """Load the kernel on a GPU (torch's current one), so that launches neither compile nor load.

        build: for that GPU's architecture; else the kept one, or it is compiled now.
        Raises BuildError as `compile` does, and where the driver refuses the cubin.
        """
        if cuda.SIMULATED:
            self._loaded[0] = True
            return
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

        torch.cuda.init()
        index = torch.cuda.current_device() if device is None else device
        with torch.cuda.device(index):
            _core().Device(index).set_current()
            build = build or self.build(architecture_of(torch.cuda.get_device_capability(index)))
            loaded = _core().ObjectCode.from_cubin(build.cubin, name=self.name).get_kernel(self.name)
            # The driver loads a function when it is first asked for; a stream capture must not be the first.
            status, _ = driver.cuKernelGetFunction(loaded.handle)
            if status == driver.CUresult.CUDA_SUCCESS and build.static_shared + self.dynamic_shared > 48 << 10:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = driver.cuKernelSetAttribute(attribute, self.dynamic_shared, loaded.handle, index)
            if status != driver.CUresult.CUDA_SUCCESS:
                shared = build.static_shared + self.dynamic_shared
                raise BuildError(f"{self.name}: cannot be loaded with {shared} bytes of shared memory: {status.name}")
        self._loaded[index] = loaded

    def is_prepared(self, device: int = 0) -> bool:
        """Whether `prepare` has run for a GPU (under the simulator: at all)."""
        return device in self._loaded

    def launch(self, grid: tuple[int, ...], *args: Any, options: LaunchOptions | None = None) -> None:
        """Run on `grid` blocks (one to three dimensions), on torch's current stream of the tensors' device.

        args: a tensor for each pointer (its first element; strides are the kernel's business; in pinned memory of the
        host or on the GPU) and numbers for the rest.
        Raises TypeError or ValueError where an argument does not fit its kind, naming it by place.
        """
        if len(args) != len(self._plan):
            raise TypeError(f"{self.name}: {len(args)} arguments given, {len(self._plan)} needed: {self.args}")
        if _thread.rehearsed is not None:
            _thread.rehearsed[self.name] = self
            return
        if cuda.SIMULATED:
            self._simulate(grid, args, options or self.options)
            return
        device, values = None, []
        for value, (pointer, dtypes, kind) in zip(args, self._plan, strict=True):
            if pointer:
                if value.dtype not in dtypes:
                    raise TypeError(f"{self.name}: argument {len(values)} is {value.dtype}, {kind} needed")
                place = value.get_device()
                # Pinned memory of the host has the same address on every GPU.
                if place != device and not (place < 0 and value.is_pinned()):
                    if device is not None or place < 0:
                        raise ValueError(f"{self.name}: argument {len(values)} is on {value.device}: one GPU for all")
                    device = place
                values.append(value.data_ptr())
            elif kind == "f32":
                values.append(c_float(value))
            else:
                if type(value) is not int:
                    value = self._integer(len(values), value)
                if kind == "i32" and not -0x80000000 <= value <= 0x7FFFFFFF:
                    raise ValueError(f"{self.name}: argument {len(values)} is {value}, which an int32 cannot hold")
                values.append(value)
        current = torch.cuda.current_device()
        if device is None or device == current:
            self._enqueue(current, grid, values, options)
        else:
            with torch.cuda.device(device):
                self._enqueue(device, grid, values, options)

    def _enqueue(self, device: int, grid: tuple[int, ...], values: list[Any], options: LaunchOptions | None) -> None:
        loaded = self._loaded.get(device)
        if loaded is None:
            _prepare_late(self, device)
            loaded = self._loaded[device]
        key = grid if options is None else (grid, options)
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) >= 4096:
                self._configs.clear()
            config = self._configs[key] = self._configure(grid, options or self.options)
        if _thread.device != device:
            # A thread that launches for the first time has no current context yet.
            _core().Device(device).set_current()
            _thread.device = device
        handle = torch._C._cuda_getCurrentRawStream(device)
        _core().launch(_streams.get(handle) or _stream(handle), config, loaded, *values)

    def _configure(self, grid: tuple[int, ...], options: LaunchOptions) -> Any:
        if not 1 <= len(grid) <= 3 or min(grid) < 1 or max(grid[1:], default=1) > 65535 or grid[0] > 0x7FFFFFFF:
            raise ValueError(f"{self.name}: grid {grid}: one to three extents from 1, the later two to 65535")
        blocks = (*grid, 1, 1)[:3]
        if options.cluster is not None:
            if any(b % c for b, c in zip(blocks, options.cluster, strict=True)):
                raise ValueError(f"{self.name}: grid {blocks} is not a multiple of the cluster {options.cluster}")
            # cuda.core counts the grid in clusters where there are any.
            blocks = tuple(b // c for b, c in zip(blocks, options.cluster, strict=True))
        return _core().LaunchConfig(
            grid=blocks,
            cluster=options.cluster,
            block=(self.threads, 1, 1),
            shmem_size=self.dynamic_shared,
            is_cooperative=options.cooperative,
            programmatic_stream_serialization=options.programmatic and torch.cuda.get_device_capability()[0] >= 9,
        )

    def _integer(self, place: int, value: Any) -> int:
        try:
            return operator.index(value)
        except TypeError:
            kind = self.args[place]
            raise TypeError(f"{self.name}: argument {place} is {value!r}, an integer needed for {kind}") from None

    def _simulate(self, grid: tuple[int, ...], args: Sequence[Any], options: LaunchOptions) -> None:
        from kernels import simulator

        if not self._loaded:
            _prepare_late(self, 0)
        values: list[Any] = []
        for value, (pointer, dtypes, kind) in zip(args, self._plan, strict=True):
            if pointer:
                if value.dtype not in dtypes:
                    raise TypeError(f"{self.name}: argument {len(values)} is {value.dtype}, {kind} needed")
                values.append(simulated_pointer(value, self.parameters[len(values)]))
            elif kind == "f32":
                values.append(cuda.float32(value))
            else:
                value = self._integer(len(values), value)
                bits = 31 if kind == "i32" else 63
                if not -(1 << bits) <= value < 1 << (64 if kind == "u64" else bits):
                    raise ValueError(f"{self.name}: argument {len(values)} is {value}, which {kind} cannot hold")
                values.append(value)
        early = self.early if options.programmatic else None
        simulator.cuda.run(self.fn, grid, self.threads, values, self.dynamic_shared, early)


def simulated_pointer(tensor: torch.Tensor, name: str = "") -> Any:
    """The tensor's own elements, as a kernel's pointer reaches them; name: of the pointer, for messages."""
    import numpy as np

    from kernels.simulated_memory import Pointer, StridedPointer

    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor is on {tensor.device}: the simulator reads CPU tensors")
    shape, strides = tensor.shape, tensor.stride()
    steps = zip(shape, strides, strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    flat = tensor.detach().as_strided((length,), (1,))
    if flat.dtype in (torch.bfloat16, torch.float16):
        array = flat.view(torch.int16).numpy().view("uint16")
    else:
        array = flat.view(torch.uint8).numpy() if flat.dtype == torch.bool else flat.numpy()
    if tensor.numel() == length:
        return Pointer(array, name)
    own = np.zeros(length, np.bool_)
    np.lib.stride_tricks.as_strided(own, shape, strides)[...] = True
    return StridedPointer(array, own, name)


# --- what a launch needs of the machine and the thread ---------------------------------------------------------------


class _Thread(threading.local):
    device: int | None = None  # whose context is current
    rehearsed: dict[str, Kernel] | None = None
    machine: tuple[str, int] | None = None


_thread = _Thread()
_late: list[str] = []


def _prepare_late(kernel: Kernel, device: int) -> None:
    _late.append(kernel.name)
    kernel.prepare(device)


def late_kernels() -> Sequence[str]:
    """Names of the kernels that were compiled or loaded by a launch, since this process began; not to be changed."""
    return _late


@contextmanager
def rehearsal(machine: tuple[str, int] | None = None) -> Iterator[dict[str, Kernel]]:
    """Within, in this thread, launches do nothing but enter their kernel, by its name, into the dictionary given.

    Tensors may be the host's, of any memory. machine: architecture and multiprocessors that `machine_of` answers with.
    """
    before = _thread.rehearsed, _thread.machine
    found: dict[str, Kernel] = {}
    _thread.rehearsed, _thread.machine = found, machine
    try:
        yield found
    finally:
        _thread.rehearsed, _thread.machine = before


def is_rehearsal() -> bool:
    """Whether launches of this thread do nothing."""
    return _thread.rehearsed is not None


def machine_of(device: int) -> tuple[str, int]:
    """Architecture and multiprocessors of a GPU; the simulator is a small sm_90a."""
    return _thread.machine or _machine_of(device)


@functools.cache
def _machine_of(device: int) -> tuple[str, int]:
    if cuda.SIMULATED:
        return "sm_90a", 2
    properties = torch.cuda.get_device_properties(device)
    return architecture_of((properties.major, properties.minor)), properties.multi_processor_count


@functools.cache
def _compiler() -> str:
    """What is done to every kernel, as part of its identity."""
    return identity([Kernel.ptx, cubins.assemble])


@functools.cache
def _core() -> Any:
    return importlib.import_module("cuda.core")


_streams: dict[int, Any] = {}


def _stream(handle: int) -> Any:
    """One of torch's streams for cuda.core; kept, as torch never destroys its streams."""
    core = _core()
    # torch's default stream is the legacy one, whose handle is 0.
    stream = _streams[handle] = core.Stream.from_handle(handle) if handle else core.LEGACY_DEFAULT_STREAM
    return stream


def kernel_factory(make: Callable[..., Kernel]) -> Callable[..., Kernel]:
    """Decorator of a module-level function that makes a Kernel: each argument list makes one Kernel, once, and the
    Kernel can be sent to another process (which makes it anew)."""

    @functools.cache
    @functools.wraps(make)
    def cached(*args: Any) -> Kernel:
        kernel = make(*args)
        kernel.recipe = (make.__module__, make.__qualname__, args)
        return kernel

    return cached


def _remake(module: str, name: str, args: tuple[Any, ...]) -> Kernel:
    return getattr(importlib.import_module(module), name)(*args)
