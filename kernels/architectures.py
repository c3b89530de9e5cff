"""The GPU architectures that kernels are compiled for, and what one multiprocessor of each holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
# Of a GPU of each: A100, RTX 3090, RTX 4090, H100 and H200, B200, RTX 5090.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90a": 132, "sm_100": 148, "sm_120": 170}


class BuildError(RuntimeError):
    """A kernel could not be turned into a cubin, or there is no cubin this device can run."""


@dataclass(frozen=True)
class Limits:
    """Limits of one SM of an architecture. Bytes of shared memory; `shared_block` is the most one block can have.

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
