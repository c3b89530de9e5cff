"""The operations as CUDA kernels."""

from typing import Literal

import torch
from torch import Tensor

from kernels import embedding, kv_write, residual, rms_norm, rope, sampling, swiglu
from kernels.attention import naive as naive_attention
from kernels.cuda import SIMULATED
from kernels.linear import naive as naive_linear

ATTENTION = {"naive": naive_attention.attention}
LINEAR = {"naive": naive_linear.linear}


class CudaOps:
    """`engine.ops.Ops` over the launchers in `kernels/`, which say what each computes.

    Args:
        device: A CUDA device; or the CPU when NUMBA_ENABLE_CUDASIM=1, where the same kernels run in the simulator.
        attention, linear: Versions of those two operations.

    Raises:
        ValueError: The device is the CPU without the simulator, or the other way round.
    """

    def __init__(self, device: torch.device | str = "cuda", attention: str = "naive", linear: str = "naive") -> None:
        self.device = torch.device(device)
        if (self.device.type == "cpu") != SIMULATED:
            raise ValueError(
                f"device = {self.device.type!r} with the cuda backend and NUMBA_ENABLE_CUDASIM={int(SIMULATED)}; "
                "a GPU needs 0, and the simulator runs on 'cpu' with 1 set before the start"
            )
        self._attention, self._linear = ATTENTION[attention], LINEAR[linear]

    def embedding(self, tokens: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        out = table.new_empty((tokens.shape[0], table.shape[1])) if out is None else out
        embedding.embedding(tokens, table, out)
        return out

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, rounding: Literal["once", "twice"], out: Tensor | None = None
    ) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        rms_norm.rms_norm(x, weight, eps, rounding, out)
        return out

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        rope.rope(q, k, cos, sin, positions)

    def linear(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        out = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
        self._linear(x, weight, out)
        return out

    def swiglu(self, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)) if out is None else out
        swiglu.swiglu(gate_up, out)
        return out

    def add(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        residual.add(x, y, out)
        return out

    def kv_write(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        kv_write.kv_write(k, v, k_cache, v_cache, slots, positions)

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float,
        window: int, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        self._attention(q, k_cache, v_cache, slots, positions, scale, window, out)
        return out

    def repetition_penalty(self, logits: Tensor, seen: Tensor, penalty: Tensor) -> None:
        sampling.repetition_penalty(logits, seen, penalty)

    def argmax(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device) if out is None else out
        sampling.argmax(logits, out)
        return out

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
        position: Tensor, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device) if out is None else out
        sampling.sample(logits, temperature, top_k, top_p, min_p, seed, position, out)
        return out
