"""Machine code: PTX to cubins, and cubins kept on disk.

They are kept in $AFS_CACHE (default ~/.cache/afs): `<name>-<arch>-<key>.json` describes one and names its file by
content. Both are written beside and renamed, so that any number of processes may build at once; an entry that does not
match its own checksum is built anew. Using a kept cubin needs neither libnvvm nor ptxas. A folder that cannot be
written costs the keeping alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kernels import cuda
from kernels.architectures import BuildError

log = logging.getLogger(__name__)
ABANDONED = 3600  # seconds after which what somebody was writing is nobody's


@dataclass(frozen=True)
class Build:
    """One kernel compiled for one architecture, with what the assembler says of it.

    registers: a thread's. spill_stores, spill_loads, stack: bytes a thread. static_shared, dynamic_shared: bytes of a
    block. blocks_per_sm: resident blocks the architecture's limits allow; occupancy: their share of an SM's threads.
    instructions: PTX instructions by family ("ld.global", "fma", "mma.sync", …), counted in the code, not as executed.
    assembler: what made the cubin, with its version. cubin: the machine code.
    """

    kernel: str
    arch: str
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
    cubin: bytes = field(repr=False)

    @property
    def spills(self) -> int:
        """Bytes a thread stores and loads because registers ran out."""
        return self.spill_stores + self.spill_loads


# --- the kept cubins -------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where cubins are kept: $AFS_CACHE, or ~/.cache/afs."""
    return Path(os.environ.get("AFS_CACHE") or Path.home() / ".cache" / "afs")


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


def kept(entry: str) -> Build | None:
    """The build kept under that name; None where there is none, it is damaged, or another toolchain made it."""
    folder = cache_directory()
    try:
        described = json.loads((folder / f"{entry}.json").read_bytes())
        cubin = (folder / described["cubin"]).read_bytes()
        if hashlib.sha256(cubin).hexdigest() != described["sha256"]:
            log.warning("%s in %s is damaged: it is compiled anew", described["cubin"], folder)
            return None
        # A toolchain that is not installed here cannot have changed: a machine without one uses what it was given.
        if any(now and now != described["toolchain"].get(name) for name, now in _toolchain().items()):
            return None
        return Build(**described["build"], cubin=cubin)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s.json in %s cannot be used: it is compiled anew (%s)", entry, folder, error)
        return None


def keep(entry: str, build: Build) -> None:
    """Keep a build under that name; where the folder cannot be written, say so once and go on."""
    folder = cache_directory()
    sha = hashlib.sha256(build.cubin).hexdigest()
    described = asdict(build)
    del described["cubin"]
    record = {"sha256": sha, "cubin": f"{entry}-{sha[:12]}.cubin", "toolchain": _toolchain(), "build": described}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(folder)
        _write(folder / record["cubin"], build.cubin)
        _write(folder / f"{entry}.json", json.dumps(record, indent=1).encode())
    except OSError as error:
        _say_not_kept(folder, error.strerror or str(error))


@functools.cache
def _say_not_kept(folder: Path, why: str) -> None:
    log.warning(
        "compiled kernels cannot be kept in %s (%s): the next start compiles them again; AFS_CACHE names another",
        folder,
        why,
    )


@functools.cache
def _clear_abandoned(folder: Path) -> None:
    """Remove what a process that was killed had begun to write."""
    for path in folder.glob(".writing-*"):
        if time.time() - path.stat().st_mtime > ABANDONED:
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def assemble(ptx: str, arch: str, name: str) -> tuple[bytes, str, str]:
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


def resources(report: str, name: str) -> dict[str, int]:
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


def instruction_mix(ptx: str) -> dict[str, int]:
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
