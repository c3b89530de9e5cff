"""Functions that kernels share: element access by dtype, elementary functions, parts of a norm, sums over a block.

Every function here runs on the GPU (inlined) and under the simulator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kernels import ptx
from kernels.cuda import SIMULATED, cuda, device_function, float32, float64, uint16, uint32

DTYPES = ("bf16", "f16", "f32")
CHAINS = 8


@device_function
def _load_bf16(pointer, index):
    return ptx.f32_from_bf16(pointer[index])


@device_function
def _store_bf16(pointer, index, value):
    pointer[index] = ptx.cvt_rn_bf16_f32(value)


@device_function
def _round_bf16(value):
    return ptx.f32_from_bf16(ptx.cvt_rn_bf16_f32(value))


@device_function
def _load_f16(pointer, index):
    return ptx.f32_from_f16(pointer[index])


@device_function
def _store_f16(pointer, index, value):
    pointer[index] = ptx.cvt_rn_f16_f32(value)


@device_function
def _round_f16(value):
    return ptx.f32_from_f16(ptx.cvt_rn_f16_f32(value))


@device_function
def _load_f32(pointer, index):
    return pointer[index]


@device_function
def _store_f32(pointer, index, value):
    pointer[index] = value


@device_function
def _round_f32(value):
    return value


def load(dtype: str) -> Callable[[Any, int], Any]:
    """`load(dtype)(pointer, index)`: the element as float32. dtype: one of DTYPES."""
    return {"bf16": _load_bf16, "f16": _load_f16, "f32": _load_f32}[dtype]


def store(dtype: str) -> Callable[[Any, int, Any], None]:
    """`store(dtype)(pointer, index, value)`: write a float32, rounded to nearest even. dtype: one of DTYPES."""
    return {"bf16": _store_bf16, "f16": _store_f16, "f32": _store_f32}[dtype]


def rounding(dtype: str) -> Callable[[Any], Any]:
    """`rounding(dtype)(value)`: the float32 after a trip through dtype."""
    return {"bf16": _round_bf16, "f16": _round_f16, "f32": _round_f32}[dtype]


# math's functions are double and raise on overflow in Python; on the GPU they are libdevice's float32.
if SIMULATED:
    exp, log, log1p = np.exp, np.log, np.log1p
else:
    exp, log, log1p = math.exp, math.log, math.log1p


@functools.cache
def dot(first: str, second: str) -> Callable[[Any, int, Any, int, int], Any]:
    """`dot(first, second)(a, i, b, j, length)`: the sum of a[i + n] * b[j + n] over n < length, as float32.

    a and b hold elements of the dtypes `first` and `second`. Where both are "f32": one float64 chain over n from 0 up,
    rounded once. Else: CHAINS float32 chains of fused multiply-adds, chain c over n = c, c + CHAINS, c + 2 CHAINS …
    from 0, added by a tree, the upper half onto the lower. Why: docs/decisions.md.
    """
    load_first, load_second = load(first), load(second)

    @device_function
    def dot_wide(a, i, b, j, length):
        total = float64(0.0)
        for n in range(length):
            total = total + float64(load_first(a, i + n)) * float64(load_second(b, j + n))
        return float32(total)

    if first == second == "f32":
        return dot_wide

    @device_function
    def dot(a, i, b, j, length):
        chains = cuda.local.array(CHAINS, float32)
        for c in range(CHAINS):
            chains[c] = float32(0.0)
        n = 0
        while n + CHAINS <= length:
            for c in range(CHAINS):
                chains[c] = ptx.fma_rn_f32(load_first(a, i + n + c), load_second(b, j + n + c), chains[c])
            n += CHAINS
        for c in range(CHAINS):
            if n + c < length:
                chains[c] = ptx.fma_rn_f32(load_first(a, i + n + c), load_second(b, j + n + c), chains[c])
        for c in range(4):
            chains[c] = ptx.add_rn_f32(chains[c], chains[c + 4])
        return ptx.add_rn_f32(ptx.add_rn_f32(chains[0], chains[2]), ptx.add_rn_f32(chains[1], chains[3]))

    return dot


@device_function
def silu(value):
    """value / (1 + exp(-value)) in float32."""
    return ptx.div_rn_f32(value, float32(1.0) + exp(-value))


@device_function
def is_common(value):
    """Whether common_silu may be taken."""
    return (abs(value) >= float32(2.0**-60)) & (abs(value) <= float32(60.0))


@device_function
def common_silu(value):
    """silu, bit by bit, of a value that is_common: the division as div.rn does it where nothing comes near the limits
    of float32, without the branch to where it does."""
    divisor = float32(1.0) + exp(-value)
    guess = ptx.rcp_approx_f32(divisor)
    inverse = ptx.fma_rn_f32(guess, ptx.fma_rn_f32(-divisor, guess, float32(1.0)), guess)
    quotient = ptx.mul_rn_f32(value, inverse)
    # Twice: after the first a quotient next to the middle between two float32 may still be the wrong one.
    quotient = ptx.fma_rn_f32(inverse, ptx.fma_rn_f32(-divisor, quotient, value), quotient)
    return ptx.fma_rn_f32(inverse, ptx.fma_rn_f32(-divisor, quotient, value), quotient)


# |a| and b of `quotient`: no intermediate result is subnormal or overflows.
LEAST, MOST = 2.0**-90, 2.0**90
LEAST_DIVISOR, MOST_DIVISOR = 2.0**-30, 2.0**30


@device_function
def quotient(a, b, inverse):
    """a / b, rounded once, where `inverse` is 1 / b rounded once: what divides many by one.

    LEAST <= |a| <= MOST and LEAST_DIVISOR <= b <= MOST_DIVISOR. Source: Markstein, "Computation of elementary functions
    on the IBM RISC System/6000 processor", 1990. All 2^23 divisors were tried with 24 dividends each.
    """
    q = ptx.mul_rn_f32(a, inverse)
    return ptx.fma_rn_f32(ptx.fma_rn_f32(-b, q, a), inverse, q)


@device_function
def _low_bf16(pair):
    return ptx.f32_from_bits(uint32(pair << uint32(16)))


@device_function
def _high_bf16(pair):
    return ptx.f32_from_bits(uint32(pair & uint32(0xFFFF0000)))


@device_function
def _low_f16(pair):
    return ptx.f32_from_f16(uint16(pair & uint32(0xFFFF)))


@device_function
def _high_f16(pair):
    return ptx.f32_from_f16(uint16(pair >> uint32(16)))


class Half(NamedTuple):
    """Functions that differ between the kernels of one 16-bit dtype and those of another.

    low, high: float32 of the lower or upper element of a pair in a uint32. pack(high, low): two float32 rounded to a
    pair. rounded: the 16 bits of a float32. mma: m16n8k16 of kernels.ptx. wgmma: what makes its m64k16. suffix: of a
    kernel's name, nothing for "bf16".
    """

    low: Callable[[Any], Any]
    high: Callable[[Any], Any]
    pack: Callable[[Any, Any], Any]
    rounded: Callable[[Any], Any]
    mma: Callable[..., Any]
    wgmma: Callable[..., Any]
    suffix: str


HALVES = {
    "bf16": Half(
        _low_bf16, _high_bf16, ptx.cvt_rn_bf16x2_f32, ptx.cvt_rn_bf16_f32, ptx.mma_m16n8k16_bf16,
        ptx.wgmma_m64k16_bf16, "",
    ),
    "f16": Half(
        _low_f16, _high_f16, ptx.cvt_rn_f16x2_f32, ptx.cvt_rn_f16_f32, ptx.mma_m16n8k16_f16, ptx.wgmma_m64k16_f16,
        "_f16",
    ),
}  # fmt: skip


@functools.cache
def add_squares(dtype: str) -> Callable[[Any, Any], Any]:
    """`add_squares(dtype)(total, pair)`: total plus the squares of a pair of a 16-bit dtype, in order."""
    low, high = HALVES[dtype].low, HALVES[dtype].high

    @device_function
    def add_squares(total, pair):
        first, second = low(pair), high(pair)
        return ptx.fma_rn_f32(second, second, ptx.fma_rn_f32(first, first, total))

    return add_squares


@device_function
def inverse_rms(squares, width, eps):
    """1 / sqrt(squares / width + eps): what a row of `width` elements with this sum of squares is multiplied with."""
    mean = ptx.div_rn_f32(squares, float32(width))
    return ptx.div_rn_f32(float32(1.0), ptx.sqrt_rn_f32(ptx.add_rn_f32(mean, eps)))


@functools.cache
def normalised(dtype: str, twice: bool) -> Callable[[Any, Any, Any], Any]:
    """`normalised(dtype, twice)(pair, weights, scale)`: a pair of a 16-bit dtype after the norm, with a rounding before
    the weights too where `twice`."""
    low, high, pack = HALVES[dtype].low, HALVES[dtype].high, HALVES[dtype].pack

    @device_function
    def normalised(pair, weights, scale):
        first, second = ptx.mul_rn_f32(low(pair), scale), ptx.mul_rn_f32(high(pair), scale)
        if twice:
            rounded = pack(second, first)
            first, second = low(rounded), high(rounded)
        return pack(ptx.mul_rn_f32(second, high(weights)), ptx.mul_rn_f32(first, low(weights)))

    return normalised


@device_function
def block_sum(shared, thread, value, threads):
    """Sum of `value` over the block's threads, the same bits in all of them: a tree, the upper half onto the lower.

    shared: float32 array of `threads` elements; threads: a power of two. Barriers before and after.
    """
    shared[thread] = value
    cuda.syncthreads()
    half = threads >> 1
    while half > 0:
        if thread < half:
            shared[thread] = ptx.add_rn_f32(shared[thread], shared[thread + half])
        cuda.syncthreads()
        half >>= 1
    total = shared[0]
    cuda.syncthreads()
    return total


@device_function
def block_max(shared, thread, value, threads):
    """Largest `value` over the block's threads; as `block_sum`. No value may be NaN."""
    shared[thread] = value
    cuda.syncthreads()
    half = threads >> 1
    while half > 0:
        if thread < half:
            shared[thread] = max(shared[thread], shared[thread + half])
        cuda.syncthreads()
        half >>= 1
    largest = shared[0]
    cuda.syncthreads()
    return largest
