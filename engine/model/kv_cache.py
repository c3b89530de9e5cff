"""Keys and values of the tokens seen so far: a row of positions for each slot, or pages that slots are given.

A slot is a running sequence. Memory that holds nothing of a sequence is never read for it, whatever is there: attention
looks at the sequence's own positions up to the query's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.ops.batch import LayerCache

PAGE_SIZE = 16  # positions of a page where nothing else is asked for
PAGE_SIZES = (8, 16, 32, 64, 128)


class KVCache(ABC):
    """What forward passes need of a cache: `slots` sequences of up to `capacity` positions each, in every layer.

    `k[layer]` and `v[layer]` are [rows, positions, Hk, D]. With `head_major` they are views of [rows, Hk, positions,
    D], where a head's keys lie one after another. `table` says on which row a slot's positions are; None: on its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: tuple[int, int],  # rows, positions
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        head_major: bool,
    ) -> None:
        if slots < 1 or capacity < 1:
            raise ValueError(f"a cache of {slots} slots × {capacity} positions; at least 1 × 1 is needed")
        self.slots, self.capacity = slots, capacity
        self.table: Tensor | None = None
        (rows, positions), heads = shape, config.num_key_value_heads
        places = (heads, positions) if head_major else (positions, heads)
        stored = (2, config.num_hidden_layers, rows, *places, config.head_dim)
        self._storage: Tensor = _zeros(stored, dtype, torch.device(device))
        shown = self._storage.transpose(3, 4) if head_major else self._storage
        self.k = list(shown[0])
        self.v = list(shown[1])

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    def layer(self, index: int) -> LayerCache:
        """Keys and values of one layer, as the operations take them."""
        return LayerCache(self.k[index], self.v[index], self.table)

    @abstractmethod
    def idle_slots(self, count: int, taken: Collection[int]) -> list[int]:
        """`count` slots, fewer where there are not as many, in which to compute what nobody needs beside those in
        slots `taken`, without disturbing them."""


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in the CPU's memory, of which the system gives what is written to, not all of it now."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


class ContiguousCache(KVCache):
    """One row of `capacity` positions a slot: `k[layer]` and `v[layer]` are [slots, capacity, Hk, D].

    Raises:
        ValueError: No slots or no capacity.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        head_major: bool = False,
    ) -> None:
        super().__init__(config, (slots, capacity), slots, capacity, dtype, device, head_major)

    def idle_slots(self, count: int, taken: Collection[int]) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in taken][:count]


class PagedCache(KVCache):
    """Pages of `page_size` positions, which slots are given as their sequences grow.

    `k[layer]` and `v[layer]` are [pages + 1, page_size, Hk, D], a page's positions next to each other for each head.
    Position p of slot s is place p % page_size of page table[s, p // page_size]; `table` is int32 [slots + 1,
    ceil(capacity / page_size)] on the device, where it stays: graphs keep its address and read what it holds when they
    are replayed.

    The last page is spare: no sequence is given it. Where a slot has no page, and everywhere in the last row of the
    table, it stands in: what a pass computes beyond a sequence's pages, or for no sequence, is written there, and is
    read for nothing else.

    Raises:
        ValueError: No pages, slots or capacity, or a page size that is none of PAGE_SIZES.
    """

    table: Tensor

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if pages < 1:
            raise ValueError(f"a cache of {pages} pages; at least 1 is needed")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"pages of {page_size} positions; one of {PAGE_SIZES} is needed")
        super().__init__(config, (pages + 1, page_size), slots, capacity, dtype, device, head_major=True)
        self.pages, self.page_size = pages, page_size
        shape = (slots + 1, -(-capacity // page_size))
        self.table = torch.full(shape, pages, dtype=torch.int32, device=device)
        self._held: list[list[int]] = [[] for _ in range(slots)]  # pages of each slot, as the table has them

    def idle_slots(self, count: int, taken: Collection[int]) -> list[int]:
        return [self.slots] * count

    @torch.inference_mode()
    def assign(self, pages_of: Mapping[int, Sequence[int]]) -> None:
        """Slot s has the pages pages_of[s], in the order of its positions, and no others, for passes enqueued later.

        Raises:
            ValueError: A slot or page that does not exist, or more pages than `capacity` takes; nothing has changed.
        """
        width = self.table.shape[1]
        for slot, pages in pages_of.items():
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot}; the cache has {self.slots}")
            if len(pages) > width:
                raise ValueError(f"slot {slot} is given {len(pages)} pages; {self.capacity} positions take {width}")
            self._check_pages(pages)
        places: list[int] = []  # in the table, row after row, and what is to be there
        entries: list[int] = []
        for slot, pages in pages_of.items():
            held, pages = self._held[slot], list(pages)
            known = len(held) if pages[: len(held)] == held else 0  # a sequence that has grown: its new pages alone
            end = max(len(held), len(pages))
            places += range(slot * width + known, slot * width + end)
            entries += pages[known:] + [self.pages] * (end - len(pages))
            self._held[slot] = pages
        if not places:
            return
        # One copy of both, places as int64: from pinned memory it does not wait for the GPU.
        split = 2 * len(places)
        packed = torch.empty(split + len(places), dtype=torch.int32, pin_memory=self.table.is_cuda)
        words = packed.numpy()
        words[:split].view(np.int64)[:] = places
        words[split:] = entries
        sent = packed.to(self.table.device, non_blocking=True)
        self.table.view(-1).index_copy_(0, sent[:split].view(torch.int64), sent[split:])

    @torch.inference_mode()
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (from, to) each, in all layers; every one is read before any is written.

        Raises:
            ValueError: A page that does not exist; nothing has changed.
        """
        if not pairs:
            return
        self._check_pages([page for pair in pairs for page in pair])
        sent = torch.tensor(pairs, pin_memory=self.table.is_cuda).to(self.table.device, non_blocking=True)
        self._storage[:, :, sent[:, 1]] = self._storage[:, :, sent[:, 0]]

    def _check_pages(self, pages: Sequence[int]) -> None:
        for page in (min(pages), max(pages)) if pages else ():
            if not 0 <= page < self.pages:
                raise ValueError(f"page {page}; the cache has {self.pages}")
