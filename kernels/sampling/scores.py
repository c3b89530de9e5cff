"""Scores, their order, and the noise that draws among them."""

from __future__ import annotations

from kernels import device, ptx
from kernels.cuda import device_function, float32, uint32, uint64

NOTHING = 0x7FFFFFFF  # no token


@device_function
def philox_word(counter0, counter1, counter2, counter3, key0, key1):
    """First word of Philox4x32-10; counters and key are uint64 below 2**32."""
    c0, c1, c2, c3 = counter0, counter1, counter2, counter3
    k0, k1 = key0, key1
    low = uint64(0xFFFFFFFF)
    shift = uint64(32)
    for _ in range(10):
        first = uint64(0xD2511F53) * c0
        second = uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ k0, second & low, (first >> shift) ^ c3 ^ k1, first & low
        k0 = (k0 + uint64(0x9E3779B9)) & low
        k1 = (k1 + uint64(0xBB67AE85)) & low
    return c0


@device_function
def gumbel(token, position, seed):
    """The draw of (seed, position, token) from the standard Gumbel distribution: -log(-log(1 - u)).

    u = (word + 1/2) / 2**32 has its finest steps near 0, where the draws are that win.
    """
    low = uint64(0xFFFFFFFF)
    word = philox_word(uint64(token), uint64(0), uint64(position), uint64(0), seed & low, seed >> uint64(32))
    u = (float32(word) + float32(0.5)) * float32(2.0**-32)
    return -device.log(-device.log1p(-u))


@device_function
def score(logit, largest, inverse):
    """(logit - largest) / temperature, by its inverse: 0 for the largest, be it infinite or the temperature tiny."""
    if logit == largest:
        return float32(0.0)
    return ptx.mul_rn_f32(ptx.add_rn_f32(logit, -largest), inverse)


@device_function
def ordered(value):
    """uint32 that orders as the float does, 0 and -0 alike (NaN must not come)."""
    bits = ptx.bits_from_f32(ptx.add_rn_f32(value, float32(0.0)))
    if bits & uint32(0x80000000):
        return uint32(bits ^ uint32(0xFFFFFFFF))
    return uint32(bits | uint32(0x80000000))
