"""The host a measurement is made on: its stable identity, whether a GPU is usable, and a sampler of how busy it is."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import pynvml

from stages.params import Gpu

HOST = Path("data/host.json")
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "numba-cuda", "cuda-core",
    "nvidia-cuda-nvcc", "nvidia-nvvm",
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A GPU as the driver names it."""

    name: str
    sm: str
    """`sm_90`: what the device reports, without the `a` of architecture-specific code."""
    memory_bytes: int


@dataclass(frozen=True)
class Host:
    """Identity of a host, by which an old measurement still holds or not: no clocks, free memory, names or time."""

    cpu: str
    cores: int
    memory_gib: int
    system: str
    python: str
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA the driver runs."""
    gpus: tuple[Device, ...] = ()
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def gpu(self) -> str:
        """The `gpu` column of the metrics: the first GPU's name, or `cpu`."""
        return self.gpus[0].name if self.gpus else "cpu"

    def as_json(self) -> str:
        """The text of data/host.json: the same for the same host."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_file(cls, path: Path = HOST) -> Self:
        """Read what `as_json` wrote. Raises ValueError naming the file where it is anything else."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fields["gpus"] = tuple(Device(**device) for device in fields["gpus"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a host description: {error}") from None


@functools.cache
def _nvml() -> bool:
    """Whether the NVIDIA driver answers."""
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return True
    return False


def _handles() -> list[Any]:
    """NVML handles of the GPUs this process may use, in CUDA's order when CUDA_VISIBLE_DEVICES gives one."""
    if not _nvml():
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return handles
    uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    chosen = []
    for item in filter(None, (part.strip() for part in visible.split(","))):
        found = [h for i, h in enumerate(handles) if item == str(i) or (item[0] == "G" and uuids[i].startswith(item))]
        if not found:
            break  # CUDA ignores the first unknown device and all after it
        chosen += found
    return chosen


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def read_host() -> Host:
    """Reads this host through NVML and the operating system; does not import torch, so it is quick."""
    devices = []
    for handle in _handles():
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        devices.append(Device(_text(pynvml.nvmlDeviceGetName(handle)), f"sm_{major}{minor}", memory))
    cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2() if devices else 0
    return Host(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        system=f"{platform.system()} {platform.machine()}",
        python=".".join(platform.python_version_tuple()[:2]),
        driver=_text(pynvml.nvmlSystemGetDriverVersion()) if devices else None,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if devices else None,
        gpus=tuple(devices),
        packages=_package_versions(),
    )


@functools.cache
def gpu_available() -> bool:
    """Whether the driver shows a GPU and torch can use it."""
    if not _handles() or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def free_gpu_bytes() -> int:
    """Bytes free on the first GPU; 0 where there is none."""
    return next((int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in _handles()), 0)


def use_gpu(gpu: Gpu) -> bool:
    """Whether to measure on a GPU: there is a usable one and the `gpu` group is not `cpu`."""
    return gpu.name != "cpu" and gpu_available()


class Sampler:
    """Samples how busy the host is in a thread while its `with` block runs.

    `cpu_percent` is this process's share of all its cores, `gpu_percent` the first GPU's NVML utilisation, both 0 to
    100; `gpu_memory_bytes` is what is in use on that GPU, by anyone; `rss_bytes` is this process's resident memory. The
    GPU's lists are empty without a GPU.
    """

    def __init__(self, interval: float = 0.05) -> None:
        self.interval = interval
        self.cpu_percent: list[float] = []
        self.gpu_percent: list[float] = []
        self.gpu_memory_bytes: list[int] = []
        self.rss_bytes: list[int] = []
        self._process = psutil.Process()
        self._cores = len(os.sched_getaffinity(0))
        self._handles = _handles()[:1]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        self._process.cpu_percent()  # the first call only starts its clock
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()  # a block shorter than the interval has one sample all the same

    def _loop(self) -> None:
        while not self._done.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        self.cpu_percent.append(self._process.cpu_percent() / self._cores)
        self.rss_bytes.append(self._process.memory_info().rss)
        for handle in self._handles:
            self.gpu_percent.append(float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            self.gpu_memory_bytes.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))


class OtherLoad:
    """Meter of what other processes take of this machine's cores while one, with its children, measures."""

    def __init__(self) -> None:
        self._begin = self._read()

    def share(self) -> float:
        """The share of all cores, 0 to 1, that other processes kept busy on the average since the meter was made."""
        busy, own, now = (after - before for before, after in zip(self._begin, self._read(), strict=True))
        return round(min(max((busy - own) / (max(now, 0.01) * (psutil.cpu_count() or 1)), 0.0), 1.0), 4)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: cores busy with anything, with this process and its children, and the clock."""
        system = psutil.cpu_times()
        # Guests' time is part of user's.
        busy = sum(system) - system.idle - sum(getattr(system, name, 0) for name in ("iowait", "guest", "guest_nice"))
        process, own = psutil.Process(), 0.0
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                own += times.user + times.system + times.children_user + times.children_system
        return busy, own, time.monotonic()


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A list that holds the block's wall-clock seconds once it has ended."""
    seconds: list[float] = []
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        seconds.append(time.perf_counter() - start)
