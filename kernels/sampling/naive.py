"""Version naive: one block a row, filters by a search for the threshold over the 32 bits of a logit.

Order of summation: thread i sums elements i, i + THREADS, … in order, then a tree over the threads (upper half onto the
lower). Sums of subsets use the same tree, so that a larger subset never sums to less.
"""

from __future__ import annotations

import math

import torch

from kernels import check, device, ptx
from kernels.cuda import SIMULATED, cuda, device_function, float32, int32, int64, uint32, uint64
from kernels.launch import Kernel, kernel_factory
from kernels.sampling.scores import NOTHING, gumbel, ordered, score
from kernels.sampling.settings import check_settings

# The simulator pays for every thread at every barrier.
THREADS = 8 if SIMULATED else 512


@device_function
def _best(values, tokens, thread, value, token, threads):
    """Token of the block's largest value, the lowest token of equal ones; NOTHING where no thread has one."""
    values[thread] = value
    tokens[thread] = token
    cuda.syncthreads()
    half = threads >> 1
    while half > 0:
        if thread < half:
            other, other_token = values[thread + half], tokens[thread + half]
            if other > values[thread] or (other == values[thread] and other_token < tokens[thread]):
                values[thread] = other
                tokens[thread] = other_token
        cuda.syncthreads()
        half >>= 1
    return tokens[0]


@kernel_factory
def naive_argmax(dtype: str) -> Kernel:
    """logits [B, V], out i32[B], V; grid (B,)."""
    load = device.load(dtype)

    def argmax(logits, out, vocabulary):
        values = cuda.shared.array(THREADS, float32)
        tokens = cuda.shared.array(THREADS, int32)
        thread = cuda.threadIdx.x
        row = int64(cuda.blockIdx.x) * vocabulary
        best = float32(-math.inf)
        best_token = NOTHING
        i = thread
        while i < vocabulary:
            value = load(logits, row + i)
            if value > best or (value == best and best_token == NOTHING):
                best = value
                best_token = i
            i += THREADS
        winner = _best(values, tokens, thread, best, best_token, THREADS)
        if thread == 0:
            out[cuda.blockIdx.x] = -1 if winner == NOTHING else winner

    return Kernel(f"argmax_naive_{dtype}", argmax, (f"{dtype}*", "i32*", "i32"), THREADS)


@kernel_factory
def naive_sample(dtype: str) -> Kernel:
    """logits [B, V], temperature, top_k, top_p, min_p, seed, position [B], out i32[B], V; grid (B,)."""
    load = device.load(dtype)

    @device_function
    def weight_from(logits, row, vocabulary, inverse, largest, floor, by_mass, shared, thread):
        """Sum over the tokens at or above `floor` of their likelihood relative to the likeliest's, or of 1 each."""
        total = float32(0.0)
        i = thread
        while i < vocabulary:
            logit = load(logits, row + i)
            if logit == logit and ordered(logit) >= floor:
                total = total + (device.exp(score(logit, largest, inverse)) if by_mass else float32(1.0))
            i += THREADS
        return device.block_sum(shared, thread, total, THREADS)

    def sample(logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, out, vocabulary):
        shared = cuda.shared.array(THREADS, float32)
        tokens = cuda.shared.array(THREADS, int32)
        thread = cuda.threadIdx.x
        batch = cuda.blockIdx.x
        row = int64(batch) * vocabulary
        greedy = temperatures[batch] <= float32(0.0)
        inverse = float32(1.0)
        if not greedy:
            inverse = ptx.div_rn_f32(float32(1.0), temperatures[batch])

        largest = float32(-math.inf)
        i = thread
        while i < vocabulary:
            logit = load(logits, row + i)
            if logit > largest:  # never a NaN
                largest = logit
            i += THREADS
        largest = device.block_max(shared, thread, largest, THREADS)

        # Each filter finds the greatest floor above which there still lies enough: k tokens, or a share p of the mass
        # that is left. A floor found bit by bit is a logit of the row, and all equal to it stay. Pass 0 measures what
        # is left, passes 1 to 32 try a bit each.
        floor = uint32(0)
        for by_mass in range(2):
            by_count = by_mass == 0 and 0 < top_ks[batch] < vocabulary
            if not greedy and (by_count or (by_mass == 1 and top_ps[batch] < float32(1.0))):
                wanted = float32(top_ks[batch])
                found = uint32(0)
                for step in range(33):
                    trial = found
                    if step > 0:
                        trial = uint32(found | (uint32(1) << uint32(32 - step)))
                    reached = weight_from(
                        logits, row, vocabulary, inverse, largest, max(trial, floor), by_mass, shared, thread
                    )
                    if step == 0:
                        if by_mass:
                            wanted = reached * max(top_ps[batch], float32(2.0**-126))
                    elif reached >= wanted:
                        found = trial
                floor = max(found, floor)

        best = float32(-math.inf)
        best_token = NOTHING
        i = thread
        while i < vocabulary:
            value = load(logits, row + i)
            kept = value == value
            if kept and not greedy:
                kept = ordered(value) >= floor
                value = score(value, largest, inverse)
                if kept:
                    kept = device.exp(value) >= min_ps[batch]
            if kept:
                if not greedy:
                    value = ptx.add_rn_f32(value, gumbel(i, positions[batch], uint64(seeds[batch])))
                if value > best or (value == best and best_token == NOTHING):
                    best = value
                    best_token = i
            i += THREADS
        winner = _best(shared, tokens, thread, best, best_token, THREADS)
        if thread == 0:
            out[batch] = -1 if winner == NOTHING else winner

    kinds = (f"{dtype}*", "f32*", "i32*", "f32*", "f32*", "i64*", "i32*", "i32*", "i32")
    return Kernel(f"sample_naive_{dtype}", sample, kinds, THREADS, blocks_per_sm=2)


@kernel_factory
def naive_repetition_penalty(dtype: str) -> Kernel:
    """logits [B, V], seen u8[B, V], penalty f32[B], V; grid (B, V / THREADS)."""
    load, store = device.load(dtype), device.store(dtype)

    def repetition_penalty(logits, seen, penalties, vocabulary):
        batch = int64(cuda.blockIdx.x)
        token = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if token < vocabulary:
            i = batch * vocabulary + token
            if seen[i] != 0:
                value = load(logits, i)
                if value < float32(0.0):
                    store(logits, i, ptx.mul_rn_f32(value, penalties[batch]))
                else:
                    store(logits, i, ptx.div_rn_f32(value, penalties[batch]))

    kinds = (f"{dtype}*", "u8*", "f32*", "i32")
    return Kernel(f"repetition_penalty_naive_{dtype}", repetition_penalty, kinds, THREADS)


def argmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[b] = the token of the largest logit of row b: the lowest of equal ones, never a NaN, -1 where all are NaN.

    logits [B, V] bf16, fp16 or fp32 contiguous, out i32[B]. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("argmax", "logits", logits)
    count, vocabulary = check.dimensions("argmax", "logits", logits, "B, V")
    check.tensor("argmax", "logits", logits, (count, vocabulary), logits.dtype)
    check.tensor("argmax", "out", out, (count,), torch.int32)
    if count:
        naive_argmax(dtype).launch((count,), logits, out, vocabulary)
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """out[b] = a token drawn from row b's filtered distribution; -1 where all its logits are NaN.

    logits [B, V] bf16, fp16 or fp32 contiguous. temperature f32[B], finite: scores are the logits less the largest of
    the row, multiplied by 1 / temperature, and 0 for the largest, infinite ones too; temperature 0 is argmax. Then, in
    this order: top_k i32[B] keeps the k largest (0: all), top_p f32[B] the fewest likeliest tokens of at least that
    mass (1: all), min_p f32[B] those at least that share as likely as the likeliest (0: all). Tokens equal to the last
    kept are kept. The draw is the largest score plus Gumbel noise by Philox4x32-10, its counter (token, 0, position,
    0), its key the seed: seed i64[B], position i32[B]. A NaN is never drawn; where there are logits of +inf, only they
    are, each as likely as the others. out i32[B]. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("sample", "logits", logits)
    count, vocabulary = check.dimensions("sample", "logits", logits, "B, V")
    check.tensor("sample", "logits", logits, (count, vocabulary), logits.dtype)
    check_settings("sample", count, temperature, top_k, top_p, min_p, seed, position)
    check.tensor("sample", "out", out, (count,), torch.int32)
    if count:
        kernel = naive_sample(dtype)
        kernel.launch((count,), logits, temperature, top_k, top_p, min_p, seed, position, out, vocabulary)
    return out


def repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """In place: logits of seen tokens are multiplied by the row's penalty where negative, else divided by it.

    logits [B, V] bf16, fp16 or fp32 contiguous, seen uint8 or bool [B, V], penalty f32[B] (1: no change). Returns
    logits. Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("repetition_penalty", "logits", logits)
    count, vocabulary = check.dimensions("repetition_penalty", "logits", logits, "B, V")
    check.tensor("repetition_penalty", "logits", logits, (count, vocabulary), logits.dtype)
    if seen.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"repetition_penalty: seen is {seen.dtype}: torch.uint8 or torch.bool needed")
    check.tensor("repetition_penalty", "seen", seen, (count, vocabulary), seen.dtype)
    check.tensor("repetition_penalty", "penalty", penalty, (count,), torch.float32)
    if count and vocabulary:
        grid = (count, -(-vocabulary // THREADS))
        naive_repetition_penalty(dtype).launch(grid, logits, seen, penalty, vocabulary)
    return logits
