"""What a model needs of a machine, known from its architecture, and what is there."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import fit
from stages.compose import as_dict, compose_conf
from stages.exits import StageError
from stages.params import Model, select

GB = 10**9
LLAMA3 = 8_030_261_248  # parameters
SNAPSHOT = Path("data/hf/hf_snapshot/x")


@pytest.fixture
def machine(workspace, monkeypatch):
    """A machine of which a test sets what is free: 73 GB of disk, 23 of memory, a GPU of 80."""
    free = SimpleNamespace(disk=73 * GB, memory=23 * GB, gpu=80 * GB)
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: SimpleNamespace(free=free.disk))
    monkeypatch.setattr(fit, "free_host_bytes", lambda: free.memory)
    monkeypatch.setattr(fit, "free_gpu_bytes", lambda: free.gpu)
    return free


def model(*overrides: str) -> Model:
    return select(Model, as_dict(compose_conf(list(overrides))), None)


def needed(of: Model, gpu: bool, pipeline: bool = True) -> dict[str, int]:
    return {need.of: need.needed for need in fit.list_needs(of, SNAPSHOT, gpu, pipeline)}


def test_a_large_model_on_a_small_cpu(machine, capsys):
    llama = model("model=llama3_8b", "model.weights=random")
    assert needed(llama, gpu=False) == {"of disk": 2 * LLAMA3, "of memory": 4 * LLAMA3}
    with pytest.raises(StageError) as refused:
        fit.check_fit(llama, SNAPSHOT, gpu=False, pipeline=True)
    assert "llama3_8b does not fit this machine: 32.1 GB of memory (23.0 GB free): all of it in float32" in str(
        refused.value
    )
    line = "llama3_8b from random needs 16.1 GB of disk (73.0 GB free), 32.1 GB of memory (23.0 GB free)\n"
    assert capsys.readouterr().out == line
    machine.memory = 33 * GB
    fit.check_fit(llama, SNAPSHOT, gpu=False, pipeline=True)
    machine.disk = 16 * GB
    with pytest.raises(StageError, match=r"16\.1 GB of disk \(16\.0 GB free\): its weights"):
        fit.check_fit(llama, SNAPSHOT, gpu=False, pipeline=True)


def test_a_gpu_holds_what_is_computed_and_memory_what_is_loaded(machine, capsys):
    llama = model("model=llama3_8b", "model.weights=random")
    assert needed(llama, gpu=True) == {"of disk": 2 * LLAMA3, "of memory": 2 * LLAMA3, "on the GPU": 4 * LLAMA3}
    fit.check_fit(llama, SNAPSHOT, gpu=True, pipeline=True)
    assert "32.1 GB on the GPU (80.0 GB free)" in capsys.readouterr().out
    machine.gpu = 24 * GB
    with pytest.raises(StageError, match=r"32\.1 GB on the GPU \(24\.0 GB free\)"):
        fit.check_fit(llama, SNAPSHOT, gpu=True, pipeline=True)


def test_download_alone_needs_one_shard_in_memory(machine):
    llama = model("model=llama3_8b", "model.weights=random")
    alone = needed(llama, gpu=False, pipeline=False)
    assert alone["of disk"] == 2 * LLAMA3 and 4 * GB < alone["of memory"] < 5 * GB
    fit.check_fit(llama, SNAPSHOT, gpu=False, pipeline=False)


def test_what_is_staged_needs_no_more_disk(machine):
    tiny = model("model.weights=random")
    whole = needed(tiny, gpu=False)["of disk"]
    SNAPSHOT.mkdir(parents=True)
    (SNAPSHOT / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
    assert needed(tiny, gpu=False)["of disk"] == whole - 1000
    assert needed(model("gpu=cpu"), gpu=False)["of disk"] == 0  # bundled: links


def test_what_the_hub_s_cache_has_is_not_fetched_again(machine, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    olmo = model("model=olmo2_1b")
    whole = needed(olmo, gpu=False)["of disk"]
    assert whole == 2 * 1_484_916_736
    blobs = tmp_path / "hub/models--allenai--OLMo-2-0425-1B/blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.incomplete").write_bytes(bytes(8192))
    assert needed(olmo, gpu=False)["of disk"] == whole - 8192


@pytest.mark.parametrize("size, text", [(16_060_522_496, "16.1 GB"), (2_560_000, "2.6 MB"), (0, "0.0 kB")])
def test_sizes_are_readable(size, text):
    assert fit.show(size) == text
