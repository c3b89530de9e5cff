"""kv_write: keys and values at their places, and nothing else."""

import pytest
import torch
from kernel_numerics import ints, randn

from kernels import kv_write


@pytest.mark.parametrize("fused", [False, True])
def test_kv_write_touches_its_places_only(dtype, fused):
    heads, width, capacity = 2, 48, 6
    qkv = randn(3, 3 * heads * width, dtype=dtype)
    _, k, v = (part.unflatten(1, (heads, width)) for part in qkv.split(heads * width, dim=1))
    if not fused:
        k, v = k.contiguous(), v.contiguous()
    slots, positions = ints(1, 0, 1), ints(5, 0, 0)
    k_cache, v_cache = randn(2, capacity, heads, width, dtype=dtype), randn(2, capacity, heads, width, dtype=dtype)
    expected = k_cache.clone(), v_cache.clone()
    kv_write.reference(k, v, *expected, slots, positions)
    kv_write.kv_write(k, v, k_cache, v_cache, slots, positions)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
