"""Eight codes of 4 bits in an int32 word, two in a byte, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_bytes(packed: Tensor, columns: int) -> Tensor:
    """Codes uint8 [N, columns] of bytes uint8 [N, ≥ columns / 2]; column 2 j is the low half of byte j."""
    codes = packed.new_empty((packed.shape[0], 2 * packed.shape[1]))
    codes[:, ::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes[:, :columns]


def pack_bytes(codes: Tensor) -> Tensor:
    """Bytes uint8 [N, ceil(K / 2)] of codes uint8 [N, K], as `unpack_bytes` reads them; a half that is over is 0."""
    packed = codes[:, ::2].contiguous()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed


def unpack_words(words: Tensor, columns: int, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Codes uint8 [N, columns] of words int32 [N, ≥ columns / 8]; nibble i of word c is column 8 c + order[i]."""
    if words.stride(-1) != 1:  # `contiguous` leaves that as it is where there is one column
        words = words.clone(memory_format=torch.contiguous_format)
    codes = unpack_bytes(words.view(torch.uint8), 8 * words.shape[1])
    if tuple(order) != IN_ORDER:
        place = [tuple(order).index(column) for column in IN_ORDER]
        codes = codes.view(words.shape[0], -1, 8)[:, :, place].reshape(words.shape[0], -1)
    return codes[:, :columns]


def bytes_of(words: Tensor, columns: int) -> Tensor:
    """Bytes of codes, as `pack_bytes` makes them, of words int32 [N, ≥ columns / 8] in order."""
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)[:, : -(-columns // 2)]


def pack_words(codes: Tensor, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Words int32 [N, ceil(K / 8)] of codes uint8 [N, K], as `unpack_words` reads them; filled up with 0."""
    rows, columns = codes.shape
    filled = codes.new_zeros((rows, -(-columns // 8) * 8))
    filled[:, :columns] = codes
    filled = filled.view(rows, -1, 8)[:, :, list(order)].reshape(rows, -1)
    return pack_bytes(filled).view(torch.int32)
