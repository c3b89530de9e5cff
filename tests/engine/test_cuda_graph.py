"""The collector of garbage is held off while a graph is captured."""

import gc

import pytest
import torch

from engine.runtime import cuda_graph


class Holder:
    """A graph in a cycle, so that only the collector frees it."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph, self.itself = graph, self


def test_needs_a_gpu():
    with pytest.raises(ValueError, match="'cpu'; it needs a GPU"):
        cuda_graph.new_pool(torch.device("cpu"))


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_as_it_was(enabled):
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="inside"), cuda_graph.collector_off():
            assert not gc.isenabled()
            raise RuntimeError("inside")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.gpu
def test_an_old_graph_does_not_spoil_a_capture():
    device = torch.device("cuda")
    pool, x = cuda_graph.new_pool(device), torch.ones(8, device=device)

    def run() -> torch.Tensor:
        [[] for _ in range(100_000)]  # enough that the collector would run
        return x + 1

    for _ in range(3):
        graph, y = cuda_graph.capture(run, pool)
        Holder(graph)
    graph, y = cuda_graph.capture(run, pool)
    graph.replay()
    assert torch.equal(y, x + 1)
