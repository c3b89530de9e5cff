"""Residual addition and RMS norm in one pass, for decoding at the speed of memory: `add_norm`, and `norm` alone.

| version | what it does |
|---|---|
| fused | one block of 256 threads a token, all 16-byte loads under way at once, the row in registers, one barrier |

Arithmetic, bf16 or fp16 in and out:
    post   n = norm(y), stream = round(x + n)               OLMo-2: the branch is normed, then added
    pre    stream = round(x + y), normed = norm(stream)     Llama: the sum is normed for the branch that comes next
    norm   normed = norm(y)
norm(v) = v * (1 / sqrt(mean(v²) + eps)) * weight in fp32, each operation rounded by itself, rounded to the dtype
as `kernels/rms_norm.py` says: "once", or "twice" with a rounding before the weight too.

Order of summation: thread i of 256 takes the vectors of eight elements i, i + 256, … and adds the squares in order, one
chain of fp32 fused multiply-adds from 0; within a warp the sums are added by xor shuffles of 16, 8, 4, 2, 1; then
w0 + w1 + … + w7 over the warps. It depends on the row's width alone.
"""

from __future__ import annotations

import torch

from kernels import check, ptx, rms_norm
from kernels.cuda import cuda, device_function, float32, int64, uint32
from kernels.device import HALVES, add_squares, inverse_rms, normalised
from kernels.launch import Kernel, LaunchOptions, kernel_factory

THREADS = 256
WARPS = THREADS // 32
# Vectors of eight elements that a thread keeps in registers, at most.
OWNED = 8
WIDEST = OWNED * THREADS * 8


def reference(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str, placement: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stream, normed) of x, y [T, H] and weight [H] in torch, as transformers computes them, in their dtype."""
    if placement == "post":
        stream = x + rms_norm.reference(y, weight, eps, rounding)
        return stream, stream
    stream = x + y
    return stream, rms_norm.reference(stream, weight, eps, rounding)


@kernel_factory
def fused(dtype: str, owned: int, kind: str, twice: bool, observed: bool = False) -> Kernel:
    """x, y, weight, stream, normed, H, eps; grid (T,).

    dtype: "bf16" or "f16". owned: vectors a thread takes, H <= owned * 2048. kind: "post" (normed is written where
    observed: it gets what was added), "pre", or "norm" (x and stream unused).
    """
    words = 4 * owned
    post, pre, alone = kind == "post", kind == "pre", kind == "norm"
    low, high, pack = HALVES[dtype].low, HALVES[dtype].high, HALVES[dtype].pack
    squares, normalise = add_squares(dtype), normalised(dtype, twice)

    @device_function
    def pair_sum(a, b):
        """a + b of two pairs, each sum rounded once."""
        return pack(ptx.add_rn_f32(high(a), high(b)), ptx.add_rn_f32(low(a), low(b)))

    def add_norm(x, y, weight, stream, normed, width, eps):
        ptx.griddepcontrol_launch_dependents()
        sums = cuda.shared.array(WARPS, float32)
        x_words = cuda.local.array(words, uint32)
        y_words = cuda.local.array(words, uint32)
        weights = cuda.local.array(words, uint32)
        thread = int64(cuda.threadIdx.x)
        row = int64(cuda.blockIdx.x) * width
        vectors = int64(width) // 8
        for v in range(owned):
            vector = thread + v * THREADS
            if vector < vectors:
                loaded = ptx.ld_global_v4(weight, vector * 8)
                for e in range(4):
                    weights[4 * v + e] = loaded[e]
        ptx.griddepcontrol_wait()
        for v in range(owned):
            vector = thread + v * THREADS
            for e in range(4):
                x_words[4 * v + e] = uint32(0)
                y_words[4 * v + e] = uint32(0)
            if vector < vectors:
                loaded = ptx.ld_global_v4(y, row + vector * 8)
                for e in range(4):
                    y_words[4 * v + e] = loaded[e]
                if not alone:
                    loaded = ptx.ld_global_v4(x, row + vector * 8)
                    for e in range(4):
                        x_words[4 * v + e] = loaded[e]

        # Past the row's end all is 0, which changes no sum of squares.
        total = float32(0.0)
        for i in range(words):
            if pre:
                y_words[i] = pair_sum(x_words[i], y_words[i])
            total = squares(total, y_words[i])
        for step in range(5):
            total = ptx.add_rn_f32(total, ptx.shfl_sync_bfly_f32(ptx.FULL_MASK, total, uint32(16 >> step)))
        if thread & 31 == 0:
            sums[thread >> 5] = total
        cuda.syncthreads()
        total = sums[0]
        for w in range(1, WARPS):
            total = ptx.add_rn_f32(total, sums[w])
        scale = inverse_rms(total, width, eps)

        for v in range(owned):
            vector = thread + v * THREADS
            if vector < vectors:
                place = row + vector * 8
                i = 4 * v
                n0 = normalise(y_words[i], weights[i], scale)
                n1 = normalise(y_words[i + 1], weights[i + 1], scale)
                n2 = normalise(y_words[i + 2], weights[i + 2], scale)
                n3 = normalise(y_words[i + 3], weights[i + 3], scale)
                if post:
                    ptx.st_global_v4(
                        stream, place, pair_sum(x_words[i], n0), pair_sum(x_words[i + 1], n1),
                        pair_sum(x_words[i + 2], n2), pair_sum(x_words[i + 3], n3),
                    )  # fmt: skip
                elif pre:
                    ptx.st_global_v4(stream, place, y_words[i], y_words[i + 1], y_words[i + 2], y_words[i + 3])
                if not post or observed:
                    ptx.st_global_v4(normed, place, n0, n1, n2, n3)

    name = f"add_norm_{kind}{'_observed' if observed else ''}{'_twice' if twice else ''}_v{owned}_{dtype}"
    kinds = (*(f"{dtype}*",) * 5, "i32", "f32")
    # At most 64 registers, for a place beside a linear kernel's block; wider rows would spill, fp16 sums first.
    fit = 4 if owned <= (2 if dtype == "f16" and pre else 3) else 0
    options = LaunchOptions(programmatic=True)
    return Kernel(name, add_norm, kinds, THREADS, blocks_per_sm=fit, options=options, early=("weight",))


def _owned(operation: str, width: int) -> int:
    """Vectors a thread takes of a row of so many elements. Raises ValueError."""
    if width % 8 or not 8 <= width <= WIDEST:
        raise ValueError(f"{operation}: rows of {width} elements: a multiple of 8 up to {WIDEST} needed")
    return -(-width // (8 * THREADS))


def _check_rows(operation: str, name: str, given: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check.tensor(operation, name, given, shape, dtype)
    check.aligned(operation, name, given)


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rounding: str,
    placement: str,
    stream: torch.Tensor,
    normed: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch y to the residual stream x, with the norm before ("post") or after ("pre") the addition.

    x, y, stream [T, H], weight [H], bf16 or fp16, contiguous and at multiples of 16 bytes; H a multiple of 8 up to
    WIDEST. weight is read while the kernel ahead still runs, so that one must not write it. rounding: "once" or "twice"
    as `kernels.rms_norm`. placement "post": stream = x + norm(y), normed must be None or stream itself; added [T, H],
    where given, receives norm(y). "pre": stream = x + y, normed [T, H] receives norm(stream); what is added is y, so
    added must be None. stream may be x. Returns (stream, normed).
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    if rounding not in ("once", "twice"):
        raise ValueError(f"add_norm: rounding is {rounding!r}: 'once' or 'twice' needed")
    dtype = check.half_name("add_norm", "x", x)
    count, width = check.dimensions("add_norm", "x", x, "T, H")
    owned, shape = _owned("add_norm", width), (count, width)
    _check_rows("add_norm", "x", x, shape, x.dtype)
    _check_rows("add_norm", "y", y, shape, x.dtype)
    _check_rows("add_norm", "weight", weight, (width,), x.dtype)
    _check_rows("add_norm", "stream", stream, shape, x.dtype)
    if placement == "post":
        if normed is not None and normed is not stream:
            raise ValueError("add_norm: normed is a tensor of its own: with placement 'post' it is stream, or None")
        result, normed = stream, stream if added is None else added
        _check_rows("add_norm", "added", normed, shape, x.dtype)
    elif placement == "pre":
        if normed is None or normed is stream:
            raise ValueError("add_norm: normed is missing: placement 'pre' needs a tensor beside stream")
        if added is not None:
            raise ValueError("add_norm: added is given: with placement 'pre' it is y")
        result = normed
        _check_rows("add_norm", "normed", normed, shape, x.dtype)
    else:
        raise ValueError(f"add_norm: placement is {placement!r}: 'pre' or 'post' needed")
    if count:
        kernel = fused(dtype, owned, placement, rounding == "twice", added is not None)
        kernel.launch((count,), x, y, weight, stream, normed, width, eps)
    return stream, result


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: str, out: torch.Tensor) -> torch.Tensor:
    """out = norm(x), what `kernels.rms_norm` computes in this file's order of summation.

    x, out [T, H], weight [H], bf16 or fp16, contiguous and at multiples of 16 bytes; H a multiple of 8 up to WIDEST;
    out may be x; weight as for `add_norm`. rounding: "once" or "twice". Returns out.
    Raises TypeError or ValueError, naming the argument, where something does not fit.
    """
    if rounding not in ("once", "twice"):
        raise ValueError(f"norm: rounding is {rounding!r}: 'once' or 'twice' needed")
    dtype = check.half_name("norm", "x", x)
    count, width = check.dimensions("norm", "x", x, "T, H")
    owned = _owned("norm", width)
    _check_rows("norm", "x", x, (count, width), x.dtype)
    _check_rows("norm", "weight", weight, (width,), x.dtype)
    _check_rows("norm", "out", out, (count, width), x.dtype)
    if count:
        fused(dtype, owned, "norm", rounding == "twice").launch((count,), x, x, weight, out, out, width, eps)
    return out
