"""Memory as kernels see it under the simulator: pointers, arrays in shared and local memory, tensor maps.

Each refuses what a GPU does without a word: what lies outside a tensor, a negative index, a number too wide.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


class SimulationError(RuntimeError):
    """A kernel did what a GPU does not allow, as waiting at a barrier that some threads never reach."""


def _refuse_float64(value: Any, array: np.ndarray) -> None:
    raise SimulationError(
        f"the float64 {value} is written to {array.dtype}: float32() needed, or a GPU computes in float64"
    )


class Pointer:
    """What a kernel sees of a pointer argument: a tensor's elements by index from the first one, bounds checked.

    array: flat NumPy array from the tensor's first element to its last (bf16 and f16 as uint16). name: for messages.
    """

    __slots__ = ("array", "locked", "name", "tensor")

    def __init__(self, array: np.ndarray, name: str = "") -> None:
        self.array: Any = array
        self.tensor = array
        self.name = name
        self.locked = ""  # why it may not be written

    def lock(self, readable: bool) -> None:
        """Until `unlock` it may not be written, and where not `readable` not be read."""
        self.locked = f"{self.name} is written before griddepcontrol.wait, and the kernel ahead may still use it"
        if not readable:
            self.array = _Locked(f"{self.name} is used before griddepcontrol.wait: the kernel ahead may still write it")

    def unlock(self) -> None:
        self.array, self.locked = self.tensor, ""

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            raise IndexError(f"pointer index {index} is before the tensor")
        return self.array[index]

    def __setitem__(self, index: int, value: Any) -> None:
        if index < 0:
            raise IndexError(f"pointer index {index} is before the tensor")
        if self.locked:
            raise SimulationError(self.locked)
        if value.__class__ is np.float64 or value.__class__ is float:
            _refuse_float64(value, self.array)
        self.array[index] = value

    def bytes(self, index: int, size: int) -> np.ndarray:
        """The `size` bytes at an element, which must lie at a multiple of `size`, as a view to read."""
        flat = self.array.view(np.uint8)
        begin = int(index) * self.array.itemsize
        if index < 0 or begin + size > len(flat):
            raise IndexError(f"{size} bytes at index {index} are outside the tensor of {len(self.array)} elements")
        if (flat.ctypes.data + begin) % size:
            raise SimulationError(f"{size} bytes at index {index} do not begin at a multiple of {size}")
        return flat[begin : begin + size]

    def written(self, index: int, size: int) -> np.ndarray:
        """As `bytes`, to be written."""
        if self.locked:
            raise SimulationError(self.locked)
        return self.bytes(index, size)


class StridedPointer(Pointer):
    """A pointer to a tensor whose elements do not lie one after another: what lies between them is not its own.

    own: bool, of each element of `array` whether it is the tensor's.
    """

    __slots__ = ("own",)

    def __init__(self, array: np.ndarray, own: np.ndarray, name: str = "") -> None:
        super().__init__(array, name)
        self.own = own

    def _check(self, index: int, count: int) -> None:
        if index >= 0 and not self.own[index : index + count].all():
            raise IndexError(f"pointer index {index} is between the tensor's elements: another's memory")

    def __getitem__(self, index: int) -> Any:
        self._check(index, 1)
        return super().__getitem__(index)

    def __setitem__(self, index: int, value: Any) -> None:
        self._check(index, 1)
        super().__setitem__(index, value)

    def bytes(self, index: int, size: int) -> np.ndarray:
        self._check(int(index), size // self.array.itemsize)
        return super().bytes(index, size)


class _Locked:
    """In place of an array that must not be touched."""

    def __init__(self, why: str) -> None:
        self._why = why

    def _refuse(self, *_: Any) -> Any:
        raise SimulationError(self._why)

    __getitem__ = __setitem__ = __len__ = _refuse

    def __getattr__(self, name: str) -> Any:
        return self._refuse()


class SharedArray:
    """An array in shared memory. watch: what is told of each access (`kernels.races`), with the running thread."""

    __slots__ = ("array", "begin", "watch")

    def __init__(self, array: np.ndarray, begin: int, watch: Any) -> None:
        self.array = array
        self.begin = begin  # its first byte in the window
        self.watch = watch

    def _check(self, index: int) -> None:
        if index < 0:
            raise IndexError(f"shared index {index} is negative")

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            self._check(index)
        if self.watch is not None:
            size = self.array.itemsize
            self.watch.read(self.begin + int(index) * size, size)
        return self.array[index]

    def __setitem__(self, index: int, value: Any) -> None:
        if index < 0:
            self._check(index)
        if value.__class__ is np.float64 or value.__class__ is float:
            _refuse_float64(value, self.array)
        if self.watch is not None:
            size = self.array.itemsize
            self.watch.write(self.begin + int(index) * size, size, self.array[index] != value)
        self.array[index] = value


class SharedMemory:
    """`cuda.shared` of a block: one array for each place in the source that asks, all threads of a block the same one.

    The arrays lie in one window, dynamic shared memory first, so that each has a 32-bit address. Memory nobody wrote is
    all ones (NaN as a float). watch: as of SharedArray.
    """

    # What the system keeps for itself of each block's window since sm_80.
    BASE = 1024

    def __init__(self, dynamic_bytes: int) -> None:
        self.arrays: dict[Any, SharedArray] = {}
        buffer = np.full(dynamic_bytes + (48 << 10) + 1024, 0xFF, np.uint8)
        self.window = buffer[-buffer.ctypes.data % 1024 :]
        self.dynamic_bytes = dynamic_bytes
        self.used = dynamic_bytes
        self.watch: Any = None

    def array(self, shape: int, dtype: Any) -> SharedArray:
        size = np.dtype(dtype).itemsize
        if shape == 0:
            return SharedArray(self.window[: self.dynamic_bytes // size * size].view(dtype), 0, self.watch)
        frame = sys._getframe(1)
        place = (frame.f_code, frame.f_lasti)
        if place not in self.arrays:
            begin = -(-self.used // 16) * 16
            self.used = begin + shape * size
            if self.used > len(self.window):
                raise SimulationError(f"{self.used - self.dynamic_bytes} bytes of shared arrays: 48 KiB is the most")
            self.arrays[place] = SharedArray(self.window[begin : self.used].view(dtype), begin, self.watch)
        return self.arrays[place]

    def address(self, array: Any) -> int:
        """Address in the window of a shared array's first element."""
        if not isinstance(array, SharedArray):
            raise SimulationError("shared_address of an array that is not in shared memory")
        return array.begin + self.BASE

    def span(self, begin: int, end: int) -> np.ndarray:
        """A view of the window from address `begin` up to `end`."""
        if begin < self.BASE or end - self.BASE > self.used:
            raise SimulationError(f"shared addresses {begin} to {end} are outside the block's shared memory")
        return self.window[begin - self.BASE : end - self.BASE]

    def bytes(self, address: int, size: int) -> np.ndarray:
        """A view of the `size` bytes at an address, a multiple of `size`."""
        if address % size:
            raise SimulationError(f"{size} bytes at shared address {address} do not begin at a multiple of {size}")
        return self.span(address, address + size)


class LocalMemory:
    """`cuda.local`: an array of the thread's own."""

    @staticmethod
    def array(shape: int, dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)


class Int32:
    """NumPy's int32, but for numbers that it cannot hold, which a GPU cuts off: they are refused.

    A uint32 is taken by its bits.
    """

    dtype = np.dtype(np.int32)

    def __call__(self, value: Any) -> np.int32:
        kind = value.__class__
        if kind is np.int32:
            return value
        if kind is np.uint32:
            return value.view(np.int32)
        if not -0x80000000 <= value <= 0x7FFFFFFF:
            raise SimulationError(f"int32 cannot hold {value}")
        return np.int32(value)


class TensorMap:
    """What the bulk tensor copy sees of a tensor: boxes of some size, 128 bytes of a row, zeros beyond its edges."""

    def __init__(self, tensor: np.ndarray, sizes: Sequence[int]) -> None:
        self.tensor = tensor  # […, R, C] of 2-byte elements
        self.sizes = tuple(sizes)

    def box(self, *first: int) -> np.ndarray:
        """uint8 [rows, 128]: the box whose first element is at [*first], its rows in order."""
        found = np.zeros(self.sizes, np.uint16)
        begin_end = zip(first, self.sizes, strict=True)
        inside = self.tensor[tuple(slice(max(at, 0), max(at + size, 0)) for at, size in begin_end)]
        place = tuple(slice(max(-at, 0), max(-at, 0) + size) for at, size in zip(first, inside.shape, strict=True))
        found[place] = inside
        return found.reshape(-1, self.sizes[-1]).view(np.uint8)


_tensor_maps: list[TensorMap] = []


def add_tensor_map(tensor_map: TensorMap) -> int:
    """A number that stands for the map in the 128 bytes a kernel is given; it is kept as long as the process."""
    _tensor_maps.append(tensor_map)
    return len(_tensor_maps) - 1


def simulated_tensor_map(number: int) -> TensorMap:
    return _tensor_maps[number]
