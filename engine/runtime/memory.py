"""Memory that is free for weights, tables and caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

# Files of a control group, version 2 and 1: its limit, what it uses, and in memory.stat what of that can be reclaimed.
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes free on a GPU; for a CPU those that the machine, and a container around this process, has unswapped."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def free_host_bytes() -> int:
    """Bytes of a CPU's memory, as `free_bytes` has them; without importing torch."""
    return min([psutil.virtual_memory().available, *container_bytes(Path("/"))])


def container_bytes(root: Path) -> list[int]:
    """Bytes free under the limit of each control group that this process is in, as `root`'s proc and sys tell."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # not Linux
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, limit, usage, cached in _GROUPS:
            if controller not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / controller
            group = top / path.strip("/")
            # The limits of the groups around it hold too; a container may see its own group as the top.
            for folder in {group, *group.parents, top}:
                if folder.is_relative_to(top) and (free := _group_bytes(folder, limit, usage, cached)) is not None:
                    found.append(free)
    return found


def _group_bytes(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # no such group, or one without a limit of its own
    return None if most == "max" else max(0, int(most) - used + int(stat.get(cached, 0)))
