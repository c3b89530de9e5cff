"""Version split: argmax by many blocks a row, the last one to finish ends it."""

from __future__ import annotations

import math

from kernels import ptx
from kernels.cuda import cuda, float32, int32, int64, uint32
from kernels.launch import Kernel, kernel_factory
from kernels.sampling.blocks import HEAD, LOGITS, PROGRAMMATIC, SPLIT_THREADS, WARPS, finish
from kernels.sampling.scores import NOTHING


@kernel_factory
def split_argmax(dtype: str) -> Kernel:
    """logits [B, V], out i32[B], workspace, V; grid (blocks a row, B). dtype: "bf16" or "f16"."""
    logit_of = LOGITS[dtype].of

    def argmax(logits, out, workspace, vocabulary):
        ptx.griddepcontrol_launch_dependents()
        values = cuda.shared.array(WARPS, float32)
        tokens = cuda.shared.array(WARPS, uint32)
        last = cuda.shared.array(1, int32)
        thread = int64(cuda.threadIdx.x)
        row = int64(cuda.blockIdx.y) * vocabulary
        vectors = int64(vocabulary) // 8
        best, best_token = float32(-math.inf), uint32(NOTHING)
        ptx.griddepcontrol_wait()
        vector = int64(cuda.blockIdx.x) * SPLIT_THREADS + thread
        while vector < vectors:
            words = ptx.ld_global_v4(logits, row + vector * 8)
            for e in range(4):
                for upper in range(2):
                    value = logit_of(words[e], upper)
                    if value > best or (value == best and best_token == uint32(NOTHING)):
                        best, best_token = value, uint32(vector * 8 + 2 * e + upper)
            vector += int64(cuda.gridDim.x) * SPLIT_THREADS
        finish(values, tokens, last, workspace, int64(cuda.blockIdx.y) * HEAD, thread, best, best_token, out)

    kinds = (f"{dtype}*", "i32*", "i32*", "i32")
    return Kernel(f"argmax_split_{dtype}", argmax, kinds, SPLIT_THREADS, options=PROGRAMMATIC)
