"""embedding: rows of the table, and what it refuses."""

import pytest
import torch
from kernel_numerics import assert_equal, ints, poisoned, randn

from kernels import embedding


@pytest.mark.parametrize("width", [1, 5, 130, 300])
def test_embedding_copies_rows(dtype, width):
    table = randn(7, width, dtype=dtype)
    tokens = ints(6, 0, 3, 3, 1)
    out = poisoned(5, width, dtype=dtype)
    assert embedding.embedding(tokens, table, out) is out
    assert_equal(out, embedding.reference(tokens, table))


def test_embedding_of_no_tokens(dtype):
    out = embedding.embedding(ints(), randn(4, 8, dtype=dtype), poisoned(0, 8, dtype=dtype))
    assert out.shape == (0, 8)


def test_refusals_name_the_argument():
    with pytest.raises(TypeError, match=r"embedding: tokens is torch.int64: torch.int32 needed"):
        embedding.embedding(ints(1, dtype=torch.int64), randn(2, 4), randn(1, 4))
    with pytest.raises(ValueError, match=r"embedding: table has shape \(4,\): \[V, H\] needed"):
        embedding.embedding(ints(1), randn(4), randn(1, 4))
