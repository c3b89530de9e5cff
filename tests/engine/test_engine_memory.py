"""How much memory is free, in a container too."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from engine.runtime.memory import container_bytes, free_bytes


def write(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def test_this_machine():
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_no_groups(tmp_path: Path):
    assert container_bytes(tmp_path) == []
    write(tmp_path / "proc/self", cgroup="0::/\n1:name=systemd:/x\n")
    assert container_bytes(tmp_path) == []


@pytest.mark.parametrize("shown", ["/", "/a/b", "/../host"])
def test_version_2(tmp_path: Path, shown: str):
    """A container's own group is the top, whatever the host calls it; groups around one hold too."""
    write(tmp_path / "proc/self", cgroup=f"0::{shown}\n")
    top = tmp_path / "sys/fs/cgroup"
    write(top, memory__max="8000\n", memory__current="5000\n", memory__stat="anon 3000\ninactive_file 1500\n")
    assert container_bytes(tmp_path) == [4500]
    write(top / "a/b", memory__max="max\n", memory__current="400\n", memory__stat="inactive_file 0\n")
    assert container_bytes(tmp_path) == [4500]
    write(top / "a/b", memory__max="300\n")
    assert sorted(container_bytes(tmp_path)) == ([0, 4500] if shown == "/a/b" else [4500])


def test_version_1(tmp_path: Path):
    write(tmp_path / "proc/self", cgroup="4:cpu:/docker/x\n3:memory:/docker/x\n")
    files = {"memory__limit_in_bytes": "9000\n", "memory__usage_in_bytes": "2000\n"}
    write(tmp_path / "sys/fs/cgroup/memory", **files, memory__stat="inactive_file 7\ntotal_inactive_file 10\n")
    assert container_bytes(tmp_path) == [7010]


def test_free_memory_is_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.runtime.memory.container_bytes", lambda root: [12345, 99 << 40])
    assert free_bytes(torch.device("cpu")) == 12345
