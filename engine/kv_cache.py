"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig


class ContiguousCache:
    """One row of `capacity` positions a slot (a running sequence), for every layer.

    `k[layer]` and `v[layer]` are [slots, capacity, Hk, D]. What a slot holds beyond the positions written since it was
    given to a sequence is never read: attention looks at positions up to the query's own.
    """

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if slots < 1 or capacity < 1:
            raise ValueError(f"a cache of {slots} slots × {capacity} positions; at least 1 × 1 is needed")
        self.slots, self.capacity = slots, capacity
        shape = (config.num_hidden_layers, slots, capacity, config.num_key_value_heads, config.head_dim)
        self._storage: Tensor = torch.zeros((2, *shape), dtype=dtype, device=device)
        self.k = list(self._storage[0])
        self.v = list(self._storage[1])

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes
