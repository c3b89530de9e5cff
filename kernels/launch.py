"""From a kernel's Python function to a launch: PTX, a cubin kept on disk, and a call that costs the host microseconds.

    Kernel.build(arch)     fn + signature -> PTX (Numba, libnvvm) -> cubin (ptxas), kept under a key of what shaped it
    Kernel.prepare()       the cubin of this device's architecture, loaded; nothing compiles after that
    Kernel.launch(grid, …) cuda.core launch on torch's current stream; under the simulator, the function itself

Kept cubins live in $AFS_CACHE (default ~/.cache/afs): `<name>-<arch>-<key>.json` describes one and names its file by
content. Both are written beside and renamed, so that any number of processes may build at once; an entry that does
not match its own checksum is built anew. Using a kept cubin needs neither libnvvm nor ptxas.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from ctypes import c_float
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from kernels import cuda

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

_POINTERS = {
    "bf16*": (torch.bfloat16,),
    "f16*": (torch.float16,),
    "f32*": (torch.float32,),
    "i32*": (torch.int32,),
    "i64*": (torch.int64,),
    "u8*": (torch.uint8, torch.bool),
}
_SCALARS = ("u64", "i64", "i32", "f32")

_PACKAGE = Path(__file__).resolve().parent
_FORMAT = 1


class BuildError(RuntimeError):
    """A kernel could not be turned into a cubin, or there is no cubin this device can run."""


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


@dataclass(frozen=True)
class Build:
    """One kernel compiled for one architecture, with what the assembler says of it.

    registers: a thread's. spill_stores, spill_loads, stack: bytes a thread. static_shared, dynamic_shared: bytes of a
    block. blocks_per_sm: resident blocks the architecture's limits allow; occupancy: their share of an SM's threads.
    instructions: PTX instructions by family ("ld.global", "fma", "mma.sync", …), counted in the code, not as executed.
    assembler: what made the cubin, with its version.
    """

    kernel: str
    arch: str
    cubin: Path
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    dynamic_shared: int
    threads: int
    blocks_per_sm: int
    occupancy: float
    instructions: dict[str, int] = field(hash=False)
    assembler: str

    @property
    def spills(self) -> int:
        """Bytes a thread stores and loads because registers ran out."""
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Limits:
    """What one SM of an architecture holds. Bytes of shared memory; `shared_block` is the most one block can have.

    Source: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability".
    """

    threads: int
    blocks: int
    shared: int
    shared_block: int
    registers: int = 65536
    register_unit: int = 256
    warp_unit: int = 4
    shared_unit: int = 128
    shared_reserved: int = 1024

    def blocks_per_sm(self, threads: int, registers: int, shared: int) -> int:
        """Blocks resident at once, each of `threads` threads of `registers` registers and `shared` bytes."""
        warps = -(-threads // 32)
        by_threads = self.threads // 32 // warps
        a_warp = max(1, -(-registers * 32 // self.register_unit) * self.register_unit)
        by_registers = self.registers // self.warp_unit // a_warp * self.warp_unit // warps
        a_block = -(-(shared + self.shared_reserved) // self.shared_unit) * self.shared_unit
        return min(self.blocks, by_threads, by_registers, self.shared // a_block)


LIMITS = {
    "sm_80": Limits(threads=2048, blocks=32, shared=164 << 10, shared_block=163 << 10),
    "sm_86": Limits(threads=1536, blocks=16, shared=100 << 10, shared_block=99 << 10),
    "sm_89": Limits(threads=1536, blocks=24, shared=100 << 10, shared_block=99 << 10),
    "sm_90a": Limits(threads=2048, blocks=32, shared=228 << 10, shared_block=227 << 10),
    "sm_100": Limits(threads=2048, blocks=32, shared=228 << 10, shared_block=227 << 10),
    "sm_120": Limits(threads=1536, blocks=24, shared=100 << 10, shared_block=99 << 10),
}


def has_dependent_launch(arch: str) -> bool:
    """Whether programmatic dependent launch and the bulk tensor copy are there: sm_90 and later."""
    return int(re.sub(r"\D", "", arch)) >= 90


def architecture_of(capability: tuple[int, int]) -> str:
    """The entry of ARCHITECTURES whose cubins run on a device of this compute capability.

    A cubin runs on its own major version, same or later minor; sm_90a on 9.0 alone. Raises BuildError for the rest.
    """
    best = None
    for arch in ARCHITECTURES:
        number = int(arch.removeprefix("sm_").rstrip("a"))
        major, minor = divmod(number, 10)
        if major == capability[0] and (minor == capability[1] or (minor < capability[1] and not arch.endswith("a"))):
            best = arch
    if best is None:
        version = ".".join(map(str, capability))
        raise BuildError(f"compute capability {version} is not supported: kernels are for {', '.join(ARCHITECTURES)}")
    return best


# --- the kept cubins -------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where cubins are kept: $AFS_CACHE, or ~/.cache/afs."""
    return Path(os.environ.get("AFS_CACHE") or Path.home() / ".cache" / "afs")


@functools.cache
def _package_source() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _describe(value: Any, seen: tuple[int, ...] = ()) -> str:
    """Text that changes when a constant a kernel closes over, or a function it calls, changes; no addresses in it."""
    function = getattr(value, "py_func", value)
    if isinstance(function, FunctionType):
        if id(function) in seen:
            return "again"
        inner = (*seen, id(function))
        cells = [_describe(cell.cell_contents, inner) for cell in function.__closure__ or ()]
        return f"{function.__module__}.{function.__qualname__}({_code(function.__code__)}; {', '.join(cells)})"
    if isinstance(value, tuple):
        return f"({', '.join(_describe(item, seen) for item in value)})"
    if isinstance(value, ModuleType):
        return value.__name__
    text = repr(value)
    return f"{type(value).__qualname__} {getattr(value, '__name__', '')}" if " at 0x" in text else text


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


@functools.cache
def _toolchain() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = cuda.versions()
    for name in ("nvidia-nvvm", "nvidia-cuda-nvcc"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_entry(path: Path) -> Build | None:
    """The build that `path` describes; None where there is none, it is damaged, or another toolchain made it."""
    try:
        entry = json.loads(path.read_bytes())
        cubin = path.parent / entry["cubin"]
        if hashlib.sha256(cubin.read_bytes()).hexdigest() != entry["sha256"]:
            return None
        # A toolchain that is not installed here cannot have changed: a machine without one uses what it was given.
        if any(now and now != entry["toolchain"].get(name) for name, now in _toolchain().items()):
            return None
        return Build(**{**entry["build"], "cubin": cubin})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# --- PTX to cubin ----------------------------------------------------------------------------------------------------


def _assemblers() -> Iterable[str]:
    """Paths of ptxas: first the one packaged with libnvvm, which reads the PTX version that libnvvm writes."""
    found: list[str] = []
    try:
        from cuda import pathfinder

        packaged = pathfinder.find_nvidia_binary_utility("ptxas")
        found += [packaged] if packaged else []
    except (ImportError, AttributeError):
        pass
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            found.append(str(Path(home) / "bin" / "ptxas"))
    on_path = shutil.which("ptxas")
    found += [on_path] if on_path else []
    return [path for path in dict.fromkeys(found) if os.access(path, os.X_OK)]


@functools.cache
def _ptxas_version(path: str) -> str:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match[1] if match else "of unknown version"


def _assemble(ptx: str, arch: str, name: str) -> tuple[bytes, str, str]:
    """Cubin, the assembler's report (registers, spills) and the assembler's name and version. Raises BuildError."""
    refusals = []
    for path in _assemblers():
        with tempfile.TemporaryDirectory(prefix="afs-") as folder:
            source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(ptx)
            command = [path, "-v", f"-arch={arch}", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return target.read_bytes(), done.stderr, f"ptxas {_ptxas_version(path)}"
            message = done.stderr.strip()
        # A ptxas older than the libnvvm that wrote the PTX, or than the architecture: another may do.
        if "Unsupported .version" not in message and "is not defined for option" not in message:
            raise BuildError(f"{name}: ptxas for {arch} refuses the kernel:\n{message}")
        refusals.append(f"{path} ({_ptxas_version(path)}): {message.splitlines()[0]}")
    try:
        return _assemble_with_nvjitlink(ptx, arch, name)
    except BuildError as error:
        refusals.append(str(error))
    version = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    raise BuildError(
        f"{name}: nothing here assembles PTX {version[1] if version else '?'} for {arch}. Tried: "
        + "; ".join(refusals)
        + ". Install a ptxas or nvJitLink of the same CUDA release as libnvvm: pip install 'nvidia-cuda-nvcc==13.*' "
        "'nvidia-nvjitlink==13.*', or put the toolkit's bin folder on PATH."
    )


def _assemble_with_nvjitlink(ptx: str, arch: str, name: str) -> tuple[bytes, str, str]:
    try:
        from cuda.bindings import nvjitlink  # pyright: ignore[reportAttributeAccessIssue]

        major, minor = nvjitlink.version()
    except (ImportError, RuntimeError) as error:
        raise BuildError(f"nvJitLink: {error}") from error
    options = [f"-arch={arch}", "-Xptxas=-v"]
    handle = nvjitlink.create(len(options), options)
    try:
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, ptx.encode(), len(ptx), name)
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            said = bytes(log).rstrip(b"\0").decode(errors="replace").strip()
            raise BuildError(f"nvJitLink {major}.{minor}: {said or error}") from error
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        return bytes(cubin), bytes(log).rstrip(b"\0").decode(errors="replace"), f"nvJitLink {major}.{minor}"
    finally:
        nvjitlink.destroy(handle)


def _resources(report: str, name: str) -> dict[str, int]:
    """Registers, spills, stack and static shared memory out of what `ptxas -v` prints for the entry `name`."""
    start = report.find(f"Compiling entry function '{name}'")
    properties = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        report[max(start, 0) :],
        re.DOTALL,
    )
    if properties is None:
        raise BuildError(f"{name}: no register count in the assembler's report:\n{report}")
    shared = re.search(r"(\d+) bytes smem", properties[5])
    stack, stores, loads, registers = (int(properties[i]) for i in range(1, 5))
    return {
        "registers": registers,
        "spill_stores": stores,
        "spill_loads": loads,
        "stack": stack,
        "static_shared": int(shared[1]) if shared else 0,
    }


def _instruction_mix(ptx: str) -> dict[str, int]:
    """PTX instructions of the kernel's body by family, most frequent first."""
    body = ptx[ptx.index(".entry") :]
    body = body[body.index("{") :]
    body = re.sub(r"//[^\n]*", "", body)
    families: Counter[str] = Counter()
    for statement in re.split(r"[;\n]|\{(?=\s*\.reg)", body):
        words = re.sub(r"^[\s{}]*(?:\$?\w+:\s*)?(?:@!?%?\w+\s+)?", "", statement).split()
        if not words or not re.fullmatch(r"[a-z][\w.:]*", words[0]):
            continue
        parts = re.sub(r"::\w+", "", words[0]).split(".")
        spaces = {"global", "shared", "local", "param", "const"}
        if parts[0] in ("ld", "st", "atom", "red"):
            families[".".join([parts[0], *[p for p in parts[1:] if p in spaces][:1]])] += 1
        elif parts[0] in ("cp", "mma", "wgmma", "shfl", "bar", "barrier", "mbarrier"):
            families[".".join(parts[:2])] += 1
        else:
            families[parts[0]] += 1
    return dict(families.most_common())


# --- kernels ---------------------------------------------------------------------------------------------------------


class Kernel:
    """A kernel function with its argument types and block size.

    name: unique, as "rms_norm_naive_bf16". fn: the Python function. args: the kinds of its arguments, pointers
    "bf16*", "f16*", "f32*", "i32*", "i64*", "u8*" and scalars "u64", "i64", "i32", "f32". threads: of a block.
    dynamic_shared: bytes of a block. blocks_per_sm: blocks an SM must be able to hold (bounds the registers; 0: the
    assembler decides). options: of a launch that names none. architectures: what it can be built for. Raises ValueError
    for an unknown argument kind or a block size no GPU takes.
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
    ):
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"kernel name {name!r}: letters, digits and underscores needed, as it names the PTX entry")
        for kind in args:
            if kind not in _POINTERS and kind not in _SCALARS:
                known = ", ".join((*_POINTERS, *_SCALARS))
                raise ValueError(f"{name}: argument kind {kind!r} is unknown: known are {known}")
        if not 1 <= threads <= 1024:
            raise ValueError(f"{name}: {threads} threads a block: a block has 1 to 1024")
        self.name = name
        self.fn = fn
        self.args = args
        self.threads = threads
        self.dynamic_shared = dynamic_shared
        self.blocks_per_sm = blocks_per_sm
        self.options = options or LaunchOptions()
        self.architectures = architectures
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

        Raises BuildError with the compiler's words where `fn` does not compile.
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
            missing = "; libnvvm comes with pip install 'numba-cuda[cu13]'" if "nvvm" in str(error).lower() else ""
            raise BuildError(f"{self.name}: does not compile for {arch}: {error}{missing}") from error
        entry = re.search(r"\.entry\s+(\S+?)\(", ptx)
        if entry is None:
            raise BuildError(f"{self.name}: the PTX has no entry:\n{ptx}")
        if not has_dependent_launch(arch):
            ptx = re.sub(r"^\s*griddepcontrol\.\w+;\n", "\n", ptx, flags=re.MULTILINE)
        # Numba's symbols count what the process compiled before: without them the same kernel is the same cubin.
        ptx = re.sub(r"^\.common \.global .*NumbaEnv.*;\n", "", ptx, flags=re.MULTILINE)
        return ptx.replace(entry[1], self.name)

    def key(self, arch: str) -> str:
        """Identity of the cubin: all the source in kernels/, the function with its constants, its arguments, `arch`."""
        file = Path(inspect.getsourcefile(self.fn) or "").resolve()
        parts = [
            _FORMAT,
            _package_source(),
            file.read_text() if file.is_file() and not file.is_relative_to(_PACKAGE) else "",
            _describe(self.fn),
            self.args,
            self.threads,
            self.dynamic_shared,
            self.blocks_per_sm,
            arch,
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    def build(self, arch: str) -> Build:
        """The kernel for one of ARCHITECTURES, from the cache or compiled now (about a second).

        Raises BuildError: unknown architecture, the function does not compile, no assembler, too much shared memory.
        """
        if arch not in LIMITS:
            raise BuildError(f"{self.name}: architecture {arch!r} is unknown: known are {', '.join(ARCHITECTURES)}")
        if arch not in self.architectures:
            raise BuildError(f"{self.name}: is for {', '.join(self.architectures)}, not for {arch}")
        folder = cache_directory()
        entry = folder / f"{self.name}-{arch}-{self.key(arch)}.json"
        kept = _read_entry(entry)
        if kept is not None:
            return kept
        folder.mkdir(parents=True, exist_ok=True)
        ptx = self.ptx(arch)
        cubin, report, assembler = _assemble(ptx, arch, self.name)
        resources = _resources(report, self.name)
        limits, shared = LIMITS[arch], resources["static_shared"] + self.dynamic_shared
        if shared > limits.shared_block:
            raise BuildError(f"{self.name}: {shared} bytes of shared memory a block: {arch} has {limits.shared_block}")
        blocks = limits.blocks_per_sm(self.threads, resources["registers"], shared)
        sha = hashlib.sha256(cubin).hexdigest()
        path = folder / f"{entry.stem}-{sha[:12]}.cubin"
        build = Build(
            kernel=self.name,
            arch=arch,
            cubin=path,
            dynamic_shared=self.dynamic_shared,
            threads=self.threads,
            blocks_per_sm=blocks,
            occupancy=blocks * -(-self.threads // 32) * 32 / limits.threads,
            instructions=_instruction_mix(ptx),
            assembler=assembler,
            **resources,
        )
        described = {**asdict(build), "cubin": path.name}
        _write(path, cubin)
        record = {"sha256": sha, "cubin": path.name, "toolchain": _toolchain(), "build": described}
        _write(entry, json.dumps(record, indent=1).encode())
        return build

    def prepare(self, device: int | None = None) -> Build | None:
        """Build for `device` (torch's current one) and load, so that launches do neither. None under the simulator.

        Raises BuildError as `build` does, and where the driver refuses the cubin.
        """
        if cuda.SIMULATED:
            return None
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

        torch.cuda.init()
        index = torch.cuda.current_device() if device is None else device
        with torch.cuda.device(index):
            _core().Device(index).set_current()
            build = self.build(architecture_of(torch.cuda.get_device_capability(index)))
            loaded = _core().ObjectCode.from_cubin(build.cubin.read_bytes(), name=self.name).get_kernel(self.name)
            # The driver loads a function when it is first asked for; a stream capture must not be the first.
            status, _ = driver.cuKernelGetFunction(loaded.handle)
            if status == driver.CUresult.CUDA_SUCCESS and build.static_shared + self.dynamic_shared > 48 << 10:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = driver.cuKernelSetAttribute(attribute, self.dynamic_shared, loaded.handle, index)
            if status != driver.CUresult.CUDA_SUCCESS:
                shared = build.static_shared + self.dynamic_shared
                raise BuildError(f"{self.name}: cannot be loaded with {shared} bytes of shared memory: {status.name}")
        self._loaded[index] = loaded
        return build

    def launch(self, grid: tuple[int, ...], *args: Any, options: LaunchOptions | None = None) -> None:
        """Run on `grid` blocks (one to three dimensions), on torch's current stream of the tensors' device.

        args: a tensor for each pointer (its first element; strides are the kernel's business; in pinned memory of the
        host or on the GPU) and numbers for the rest.
        Raises TypeError or ValueError where an argument does not fit its kind, naming it by place.
        """
        if len(args) != len(self._plan):
            raise TypeError(f"{self.name}: {len(args)} arguments given, {len(self._plan)} needed: {self.args}")
        if cuda.SIMULATED:
            self._simulate(grid, args)
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
            self.prepare(device)
            loaded = self._loaded[device]
        key = grid if options is None else (grid, options)
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) >= 4096:
                self._configs.clear()
            config = self._configs[key] = self._configure(grid, options or self.options)
        if getattr(_thread, "device", None) != device:
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

    def _simulate(self, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        from kernels import simulator

        values: list[Any] = []
        for value, (pointer, dtypes, kind) in zip(args, self._plan, strict=True):
            if pointer:
                if value.dtype not in dtypes:
                    raise TypeError(f"{self.name}: argument {len(values)} is {value.dtype}, {kind} needed")
                values.append(_simulated_pointer(value))
            else:
                values.append(cuda.float32(value) if kind == "f32" else int(value))
        simulator.cuda.run(self.fn, grid, self.threads, values, self.dynamic_shared)


def _simulated_pointer(tensor: torch.Tensor) -> Any:
    """All elements of the tensor's storage from its first one on, as a kernel's pointer reaches them."""
    from kernels import simulator

    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor is on {tensor.device}: the simulator reads CPU tensors")
    whole = tensor.detach()
    length = whole.untyped_storage().nbytes() // whole.element_size() - whole.storage_offset()
    flat = whole.as_strided((length,), (1,))
    if flat.dtype in (torch.bfloat16, torch.float16):
        return simulator.Pointer(flat.view(torch.int16).numpy().view("uint16"))
    if flat.dtype == torch.bool:
        return simulator.Pointer(flat.view(torch.uint8).numpy())
    return simulator.Pointer(flat.numpy())


@functools.cache
def machine_of(device: int) -> tuple[str, int]:
    """Architecture and multiprocessors of a GPU; the simulator is a small sm_90a."""
    if cuda.SIMULATED:
        return "sm_90a", 2
    properties = torch.cuda.get_device_properties(device)
    return architecture_of((properties.major, properties.minor)), properties.multi_processor_count


def tensor_map(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """uint8 [128] on the tensor's device: how the bulk tensor copy reads boxes of `rows` rows and 64 columns of it.

    tensor […, R, C] bf16 or fp16 of two to five dimensions with any strides that are multiples of 16 bytes, columns
    contiguous. A box lies in shared memory row after row of 128 bytes, the 16-byte chunk j of row i at place j ^ (i %
    8) (CUDA's 128-byte swizzle). The map is valid as long as the tensor is where it was.
    Raises ValueError for a tensor or a box that the copy engine cannot read.
    """
    shape, strides = tuple(tensor.shape), tensor.stride()
    if tensor.dtype not in (torch.bfloat16, torch.float16) or not 2 <= len(shape) <= 5 or strides[-1] != 1:
        raise ValueError(f"tensor_map: a {tensor.dtype} tensor of shape {shape}: bf16 or fp16 [R, C] needed")
    if tensor.data_ptr() % 16 or any(stride % 8 for stride in strides[:-1]):
        raise ValueError(f"tensor_map: rows {strides[:-1]} elements apart: multiples of 16 bytes needed")
    if not 1 <= rows <= 256:
        raise ValueError(f"tensor_map: boxes of {rows} rows: 1 to 256 needed")
    if cuda.SIMULATED:
        from kernels import simulator

        elements = _simulated_pointer(tensor).array
        view = simulator.np.lib.stride_tricks.as_strided(elements, shape, [2 * stride for stride in strides])
        words = [simulator.add_tensor_map(simulator.TensorMap(view, rows))] + [0] * 15
    else:
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

        kinds, half = driver.CUtensorMapDataType, tensor.dtype == torch.float16
        status, encoded = driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(shape),
            tensor.data_ptr(),
            [driver.cuuint64_t(size) for size in reversed(shape)],
            [driver.cuuint64_t(stride * 2) for stride in reversed(strides[:-1])],
            [driver.cuuint32_t(size) for size in (64, rows, 1, 1, 1)[: len(shape)]],
            [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise ValueError(f"tensor_map: {shape} in boxes of {rows} rows: {status.name}")
        words = [int(word) for word in encoded.opaque]
    content = b"".join(word.to_bytes(8, "little") for word in words)
    return _keep_map(torch.frombuffer(bytearray(content), dtype=torch.uint8), tensor.device)


_kept_maps: dict[tuple[Any, ...], torch.Tensor] = {}


def kept_tensor_map(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor_map`, made once for each place, shape, strides and dtype: a map says where and how large, not what is
    there, so that one serves every tensor that comes to lie at the same place in the same shape."""
    key = (tensor.dtype, tensor.get_device(), tensor.data_ptr(), *tensor.shape, *tensor.stride(), rows)
    found = _kept_maps.get(key)
    if found is None:
        found = _kept_maps[key] = tensor_map(tensor, rows)
    return found


_MAPS = 4096


class _MapRoom:
    """Places for tensor maps on one device, and the way there: pinned memory and a stream of its own, so that a stream
    capture does not contain the copy."""

    def __init__(self, device: torch.device):
        with torch.inference_mode(False):  # else the room could be filled in that mode alone
            self.free = list(torch.empty((_MAPS, 128), dtype=torch.uint8, device=device))
            self.pinned = torch.empty((_MAPS, 128), dtype=torch.uint8, pin_memory=True)
        self.stream = torch.cuda.Stream(device)


_map_rooms: dict[torch.device, _MapRoom] = {}


def _keep_map(content: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The 128 bytes on `device`, kept as long as the process, as graphs hold their address."""
    if device.type == "cpu":
        return content
    room = _map_rooms.get(device)
    if room is None or not room.free:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("tensor_map: no room for a new map in a stream capture: run the work once before it")
        room = _map_rooms[device] = _MapRoom(device)
    place = room.free.pop()
    source = room.pinned[len(room.free)]
    source.copy_(content)
    with torch.cuda.stream(room.stream):
        place.copy_(source, non_blocking=True)
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).wait_stream(room.stream)
    return place


@functools.cache
def _core() -> Any:
    return importlib.import_module("cuda.core")


_streams: dict[int, Any] = {}
_thread = threading.local()


def _stream(handle: int) -> Any:
    """One of torch's streams for cuda.core; kept, as torch never destroys its streams."""
    core = _core()
    # torch's default stream is the legacy one, whose handle is 0.
    stream = _streams[handle] = core.Stream.from_handle(handle) if handle else core.LEGACY_DEFAULT_STREAM
    return stream


# --- many kernels ----------------------------------------------------------------------------------------------------


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


def _build(kernel: Kernel, arch: str) -> Build:
    return kernel.build(arch)


def build_all(
    kernels: Sequence[Kernel],
    archs: Sequence[str] = ARCHITECTURES,
    workers: int | None = None,
    progress: Callable[[int, int, Build], None] | None = None,
) -> list[Build]:
    """Build every kernel for every architecture that it is for, in processes: kernels outermost in the result.

    workers: processes (default: one a CPU). progress(done, total, build) is called as each finishes.
    Raises BuildError at the first that fails.
    """
    from multiprocessing import get_context

    work = [(kernel, arch) for kernel in kernels for arch in archs if arch in kernel.architectures]
    count = min(workers or len(os.sched_getaffinity(0)), len(work))
    builds: list[Build | None] = [None] * len(work)
    done = 0
    if count <= 1:
        for place, (kernel, arch) in enumerate(work):
            builds[place] = kernel.build(arch)
            if progress:
                progress(place + 1, len(work), builds[place])  # type: ignore[arg-type]
        return builds  # type: ignore[return-value]
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_build, kernel, arch): place for place, (kernel, arch) in enumerate(work)}
        try:
            for future in as_completed(waiting):
                build = builds[waiting[future]] = future.result()
                done += 1
                if progress:
                    progress(done, len(work), build)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return builds  # type: ignore[return-value]
