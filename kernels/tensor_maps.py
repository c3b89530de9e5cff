"""Tensor maps: how the bulk tensor copy of sm_90 and later reads boxes of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels import cuda
from kernels.launch import is_rehearsal, simulated_pointer

BOX = 64  # columns of a box: 128 bytes


def tensor_map(tensor: torch.Tensor, box: Sequence[int], ahead: bool = True) -> torch.Tensor:
    """uint8 [128] on the tensor's device: how the bulk tensor copy reads boxes of it.

    tensor […, R, C] bf16 or fp16 of two to five dimensions with any strides that are multiples of 16 bytes, columns
    contiguous. box: its size in the tensor's last dimensions but columns, of which it has 64; 1 in those before. It
    lies in shared memory row after row of 128 bytes, the 16-byte chunk j of row i at place j ^ (i % 8) (CUDA's 128-byte
    swizzle). ahead: whether L2 fetches 256 bytes where 128 are asked for, which is of no use where each byte is read
    once (7B decode on an H200: 4 % slower with it). The map is valid as long as the tensor is where it was.
    Raises ValueError for a tensor or a box that the copy engine cannot read.
    """
    shape, strides = tuple(tensor.shape), tensor.stride()
    if tensor.dtype not in (torch.bfloat16, torch.float16) or not 2 <= len(shape) <= 5 or strides[-1] != 1:
        raise ValueError(f"tensor_map: a {tensor.dtype} tensor of shape {shape}: bf16 or fp16 [R, C] needed")
    if tensor.data_ptr() % 16 or any(stride % 8 for stride in strides[:-1]):
        raise ValueError(f"tensor_map: rows {strides[:-1]} elements apart: multiples of 16 bytes needed")
    if not 1 <= len(box) < len(shape) or not all(1 <= size <= 256 for size in box):
        raise ValueError(
            f"tensor_map: boxes of {tuple(box)} rows: 1 to 256 in up to {len(shape) - 1} dimensions needed"
        )
    sizes = (*(1,) * (len(shape) - 1 - len(box)), *box, BOX)
    if cuda.SIMULATED:
        import numpy as np

        from kernels.simulated_memory import TensorMap, add_tensor_map

        elements = simulated_pointer(tensor).array
        view = np.lib.stride_tricks.as_strided(elements, shape, [2 * stride for stride in strides])
        words = [add_tensor_map(TensorMap(view, sizes))] + [0] * 15
    else:
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

        kinds, half = driver.CUtensorMapDataType, tensor.dtype == torch.float16
        promotion = driver.CUtensorMapL2promotion
        status, encoded = driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(shape),
            tensor.data_ptr(),
            [driver.cuuint64_t(size) for size in reversed(shape)],
            [driver.cuuint64_t(stride * 2) for stride in reversed(strides[:-1])],
            [driver.cuuint32_t(size) for size in reversed(sizes)],
            [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B if ahead else promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise ValueError(f"tensor_map: {shape} in boxes of {sizes}: {status.name}")
        words = [int(word) for word in encoded.opaque]
    content = b"".join(word.to_bytes(8, "little") for word in words)
    return _keep_map(torch.frombuffer(bytearray(content), dtype=torch.uint8), tensor.device)


_kept_maps: dict[tuple[Any, ...], torch.Tensor] = {}


def kept_tensor_map(tensor: torch.Tensor, box: tuple[int, ...], ahead: bool = True) -> torch.Tensor:
    """`tensor_map`, made once for each place, shape, strides and dtype: a map says where and how large, not what is
    there, so that one serves every tensor that comes to lie at the same place in the same shape."""
    if is_rehearsal():
        return tensor.new_empty(128, dtype=torch.uint8)
    key = (tensor.dtype, tensor.get_device(), tensor.data_ptr(), *tensor.shape, *tensor.stride(), box, ahead)
    found = _kept_maps.get(key)
    if found is None:
        found = _kept_maps[key] = tensor_map(tensor, box, ahead)
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
