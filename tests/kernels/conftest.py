"""Fixtures of the kernel tests, and the rule that tests marked gpu need one."""

import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=DTYPES)
def dtype(request):
    """torch.bfloat16, then torch.float32."""
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
