"""The host's identity, which GPUs count, and the sampler."""

import json
import time
from types import SimpleNamespace

import pytest

from stages import host as host_module
from stages.compose import as_dict, compose_conf
from stages.host import Device, Host, Sampler, gpu_available, read_host, stopwatch, use_gpu
from stages.params import Gpu, select

UUIDS = ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]


@pytest.fixture
def three_gpus(monkeypatch):
    """A driver that shows three GPUs."""
    fake = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: UUIDS[handle],
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=150_754_820_096, used=1_000_000),
        nvmlDeviceGetName=lambda handle: b"NVIDIA H200",
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=37),
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13000,
        nvmlSystemGetDriverVersion=lambda: "580.95.05",
    )
    monkeypatch.setattr(host_module, "pynvml", fake)
    monkeypatch.setattr(host_module, "_nvml", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_identity_is_stable():
    first = read_host().as_json()
    time.sleep(0.01)
    assert read_host().as_json() == first


def test_identity_holds_nothing_that_changes(three_gpus):
    fields = json.loads(read_host().as_json())
    assert set(fields) == {"cpu", "cores", "memory_gib", "system", "python", "driver", "cuda", "gpus", "packages"}
    assert set(fields["gpus"][0]) == {"name", "sm", "memory_bytes"}


def test_gpus_are_described(three_gpus):
    host = read_host()
    assert host.gpus == (Device("NVIDIA H200", "sm_90", 150_754_820_096),) * 3
    assert (host.gpu, host.driver, host.cuda) == ("NVIDIA H200", "580.95.05", "13.0")


@pytest.mark.parametrize(
    ("visible", "handles"),
    [("", []), ("2", [2]), ("2,0", [2, 0]), ("GPU-bb", [1]), ("0,7,1", [0]), ("-1", []), (" 1 , 2 ", [1, 2])],
)
def test_visible_devices(three_gpus, monkeypatch, visible, handles):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert host_module._handles() == handles


def test_from_file(tmp_path, three_gpus):
    path = tmp_path / "host.json"
    path.write_text(read_host().as_json())
    assert Host.from_file(path) == read_host()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"gpus": [{"name": 1, "odd": 2}]}'])
def test_from_file_refuses_anything_else(tmp_path, content):
    (tmp_path / "host.json").write_text(content)
    with pytest.raises(ValueError, match=r"host\.json is not a host description"):
        Host.from_file(tmp_path / "host.json")


def test_the_cpu_group_uses_no_gpu(monkeypatch):
    monkeypatch.setattr(host_module, "gpu_available", lambda: True)
    groups = {name: select(Gpu, as_dict(compose_conf([f"gpu={name}"])), None) for name in ("cpu", "auto")}
    assert not use_gpu(groups["cpu"]) and use_gpu(groups["auto"])


def test_no_driver_no_gpu(monkeypatch):
    monkeypatch.setattr(host_module, "_handles", lambda: [])
    gpu_available.cache_clear()
    assert not gpu_available()
    gpu_available.cache_clear()


def test_sampler_without_gpu(monkeypatch):
    monkeypatch.setattr(host_module, "_handles", lambda: [])
    with Sampler(interval=0.01) as sampler:
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            sum(range(1000))
    assert len(sampler.cpu_percent) == len(sampler.rss_bytes) >= 2
    assert max(sampler.cpu_percent) > 0 and min(sampler.rss_bytes) > 1_000_000
    assert sampler.gpu_percent == sampler.gpu_memory_bytes == []


def test_sampler_of_a_short_block_has_a_sample(three_gpus):
    with Sampler(interval=10) as sampler:
        pass
    assert sampler.gpu_percent == [37.0] and sampler.gpu_memory_bytes == [1_000_000]


def test_stopwatch():
    with stopwatch() as seconds:
        time.sleep(0.01)
    assert 0.01 <= seconds[0] < 5


def test_load_of_others_is_what_is_neither_this_process_nor_its_children(monkeypatch):
    cpu = SimpleNamespace
    clock, system, own = [100.0], [1000.0], [10.0]
    monkeypatch.setattr(host_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(host_module.psutil, "cpu_count", lambda: 4)

    class Times(tuple):
        idle, iowait, guest, guest_nice = 500.0, 20.0, 5.0, 0.0

    monkeypatch.setattr(host_module.psutil, "cpu_times", lambda: Times((system[0], 500.0, 20.0, 5.0)))

    class Process:
        def children(self, recursive):
            return [Process(), Gone()] if recursive else []

        def cpu_times(self):
            return cpu(user=own[0], system=1.0, children_user=2.0, children_system=0.0)

    class Gone(Process):
        def cpu_times(self):
            raise host_module.psutil.NoSuchProcess(1)

    monkeypatch.setattr(host_module.psutil, "Process", Process)
    load = host_module.OtherLoad()
    # In 10 s of four cores 26 were busy: 8 by this process, 8 by its child.
    clock[0], system[0], own[0] = 110.0, 1026.0, 18.0
    assert load.share() == 0.25
    own[0] = 40.0
    assert load.share() == 0.0


def test_load_of_others_on_this_machine():
    load = host_module.OtherLoad()
    before = time.process_time()
    while time.process_time() - before < 0.3:
        pass
    assert 0 <= load.share() <= 1
