"""Version split: the draw, over the logits that the filters keep."""

from __future__ import annotations

import math

from kernels import device, ptx
from kernels.cuda import cuda, float32, int32, int64, uint32, uint64
from kernels.launch import Kernel, kernel_factory
from kernels.sampling.blocks import FLOOR, LARGEST, LOGITS, PROGRAMMATIC, ROW, SPLIT_THREADS, WARPS, finish
from kernels.sampling.scores import NOTHING, gumbel, score


@kernel_factory
def split_sample(dtype: str) -> Kernel:
    """logits [B, V], temperature, min_p, seed, position [B], out i32[B], workspace, V; grid (blocks a row, B). After
    `split_floor` on the same workspace. dtype: "bf16" or "f16"."""
    logit_of = LOGITS[dtype].of

    def sample(logits, temperatures, min_ps, seeds, positions, out, workspace, vocabulary):
        ptx.griddepcontrol_launch_dependents()
        values = cuda.shared.array(WARPS, float32)
        tokens = cuda.shared.array(WARPS, uint32)
        last = cuda.shared.array(1, int32)
        thread = int64(cuda.threadIdx.x)
        batch = int64(cuda.blockIdx.y)
        base, row = batch * ROW, batch * vocabulary
        vectors = int64(vocabulary) // 8
        best, best_token = float32(-math.inf), uint32(NOTHING)
        ptx.griddepcontrol_wait()
        temperature, min_p = temperatures[batch], min_ps[batch]
        position, seed = positions[batch], uint64(seeds[batch])
        greedy = temperature <= float32(0.0)
        inverse = float32(1.0)
        floor, largest = float32(-math.inf), float32(0.0)
        if not greedy:
            inverse = ptx.div_rn_f32(float32(1.0), temperature)
            floor = ptx.f32_from_bits(ptx.ld_global_b32(workspace, base + FLOOR))
            largest = ptx.f32_from_bits(ptx.ld_global_b32(workspace, base + LARGEST))
        vector = int64(cuda.blockIdx.x) * SPLIT_THREADS + thread
        while vector < vectors:
            words = ptx.ld_global_v4(logits, row + vector * 8)
            for e in range(4):
                for upper in range(2):
                    value = logit_of(words[e], upper)
                    kept = value >= floor  # never a NaN
                    if kept and not greedy:
                        value = score(value, largest, inverse)
                        if min_p > float32(0.0):
                            kept = device.exp(value) >= min_p
                    if kept:
                        token = vector * 8 + 2 * e + upper
                        if not greedy:
                            value = ptx.add_rn_f32(value, gumbel(token, position, seed))
                        if value > best or (value == best and best_token == uint32(NOTHING)):
                            best, best_token = value, uint32(token)
            vector += int64(cuda.gridDim.x) * SPLIT_THREADS
        finish(values, tokens, last, workspace, base, thread, best, best_token, out)

    kinds = (f"{dtype}*", "f32*", "f32*", "i64*", "i32*", "i32*", "i32*", "i32")
    return Kernel(f"sample_split_{dtype}", sample, kinds, SPLIT_THREADS, options=PROGRAMMATIC)
