"""Fixtures of the kernel tests. On a GPU all are the GPU's (`make test-gpu`); without one, those marked gpu wait."""

from pathlib import Path

import pytest
import torch

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
DTYPES = HALVES | {"f32": torch.float32}


def pytest_collection_modifyitems(items):
    # pytest hands every test of the run to this hook, not this folder's alone.
    for item in (item for item in items if item.path.is_relative_to(Path(__file__).parent)):
        if torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=DTYPES)
def dtype(request):
    """torch.bfloat16, torch.float16, then torch.float32."""
    return DTYPES[request.param]


@pytest.fixture(params=HALVES)
def half(request):
    """torch.bfloat16, then torch.float16: what the fast kernels are for."""
    return HALVES[request.param]


@pytest.fixture
def races():
    """Races in shared memory are errors, where the simulator runs."""
    if torch.cuda.is_available():
        yield
    else:
        from kernels.simulator import detecting_races

        with detecting_races():
            yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
