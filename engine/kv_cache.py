"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig


class ContiguousCache:
    """One row of `capacity` positions a slot (a running sequence), for every layer.

    `k[layer]` and `v[layer]` are [slots, capacity, Hk, D]. What a slot holds beyond the positions written since it was
    given to a sequence is never read: attention looks at positions up to the query's own. With `head_major` they are
    views of [slots, Hk, capacity, D], where a head's keys lie one after another.
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
        if slots < 1 or capacity < 1:
            raise ValueError(f"a cache of {slots} slots × {capacity} positions; at least 1 × 1 is needed")
        self.slots, self.capacity = slots, capacity
        places = (config.num_key_value_heads, capacity) if head_major else (capacity, config.num_key_value_heads)
        shape = (2, config.num_hidden_layers, slots, *places, config.head_dim)
        self._storage: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        shown = self._storage.transpose(3, 4) if head_major else self._storage
        self.k = list(shown[0])
        self.v = list(shown[1])

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes
