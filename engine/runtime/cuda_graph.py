"""CUDA graphs: work that the host launches once for all of its kernels."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def new_pool(device: torch.device) -> Any:
    """Memory pool that the graphs of one owner share. Raises ValueError for a device that is not a GPU."""
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph of a model on {device.type!r}; it needs a GPU")
    return torch.cuda.graph_pool_handle()


@contextmanager
def collector_off() -> Iterator[None]:
    """Hold off the collector of garbage: an old graph that is freed while another is captured spoils it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def capture(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture `run` as a graph: the graph and its result, which a replay fills anew. Kernels load in a run before.

    pool: from `new_pool`; None: one of the graph's own.
    """
    graph = torch.cuda.CUDAGraph()
    with collector_off(), torch.cuda.graph(graph, pool=pool):
        result = run()
    # Kernels may have sent what they need to the device on other streams meanwhile.
    torch.cuda.synchronize()
    return graph, result
