"""add_norm and norm: against float64, the order of summation to the bit, each row alone, and what they refuse."""

import numpy as np
import pytest
import torch
from kernel_numerics import assert_as_good_as_torch, assert_equal, poisoned, randn

from kernels import add_norm, rms_norm

BF16 = torch.bfloat16
ROUNDINGS, PLACEMENTS = ("once", "twice"), ("pre", "post")


def inputs(count, width, dtype=BF16):
    """x, y, weight."""
    x, y = randn(count, width, dtype=dtype), randn(count, width, dtype=dtype, scale=3.0)
    weight = randn(width, dtype=dtype)
    if weight.is_cuda:
        torch.cuda.synchronize()  # the kernel ahead must not be the one that writes the weight
    return x, y, weight


def run(x, y, weight, rounding, placement, added=None):
    """(stream, normed) into poisoned tensors."""
    stream = poisoned(*x.shape, dtype=x.dtype)
    normed = poisoned(*x.shape, dtype=x.dtype) if placement == "pre" else None
    return add_norm.add_norm(x, y, weight, 1e-6, rounding, placement, stream, normed, added)


def modelled_norm(x, weight, eps, rounding):
    """One row's norm in NumPy, in the order the module's docstring gives."""
    values = x.float().cpu().numpy()
    padded = np.zeros(-(-len(values) // 2048) * 2048, np.float32)
    padded[: len(values)] = values
    # [vectors of a thread, thread, element]
    vectors = padded.reshape(-1, 256, 8).astype(np.float64)
    sums = np.zeros(256, np.float32)
    for vector in vectors:
        for e in range(8):
            sums = (vector[:, e] * vector[:, e] + sums.astype(np.float64)).astype(np.float32)
    lanes, numbers = sums.reshape(8, 32), np.arange(32)
    for by in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, numbers ^ by]
    total = lanes[0, 0]
    for w in range(1, 8):
        total = total + lanes[w, 0]
    scale = np.float32(1) / np.sqrt(total / np.float32(len(values)) + np.float32(eps))
    normalised = torch.from_numpy(values * scale)
    if rounding == "twice":
        normalised = normalised.to(weight.dtype).float()
    return (normalised * weight.float().cpu()).to(weight.dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("width", [8, 264, 2056])
def test_against_float64(half, width, placement, rounding):
    x, y, weight = inputs(2, width, half)
    stream, normed = run(x, y, weight, rounding, placement)
    if placement == "pre":
        assert_equal(stream, x + y)
        source, result = stream, normed
    else:
        assert normed is stream
        # Where little is added to much the sum says nothing of the norm: the norm itself is what is compared.
        result = add_norm.norm(y, weight, 1e-6, rounding, poisoned(2, width, dtype=half))
        source = y
        assert_equal(stream, x + result)
    exact = rms_norm.reference(source.double(), weight.double(), 1e-6)
    assert_as_good_as_torch(result, rms_norm.reference(source, weight, 1e-6, rounding), exact)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_agrees_with_the_reference(placement):
    x, y, weight = inputs(3, 512)
    for ours, theirs in zip(
        run(x, y, weight, "once", placement),
        add_norm.reference(x, y, weight, 1e-6, "once", placement),
        strict=True,
    ):
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("width", [40, 2048, 5120])
def test_bits_are_those_of_the_order_given(half, width, rounding):
    _, y, weight = inputs(1, width, half)
    expected = modelled_norm(y[0], weight, 1e-5, rounding)
    out = add_norm.norm(y, weight, 1e-5, rounding, poisoned(1, width, dtype=half))
    assert_equal(out[0].cpu(), expected)


def test_one_norm_for_all_kinds():
    x, y, weight = inputs(2, 136)
    added = poisoned(2, 136, dtype=BF16)
    stream, _ = run(x, y, weight, "twice", "post", added)
    assert_equal(added, add_norm.norm(y, weight, 1e-6, "twice", poisoned(2, 136, dtype=BF16)))
    assert_equal(stream, x + added)
    assert_equal(stream, run(x, y, weight, "twice", "post")[0])
    stream, normed = run(x, y, weight, "twice", "pre")
    assert_equal(normed, add_norm.norm(stream, weight, 1e-6, "twice", poisoned(2, 136, dtype=BF16)))


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_alone_and_in_place(half, placement):
    x, y, weight = inputs(3, 72, half)
    stream, normed = run(x, y, weight, "once", placement)
    for i in range(3):
        alone = run(x[i : i + 1].clone(), y[i : i + 1].clone(), weight, "once", placement)
        assert torch.equal(alone[0], stream[i : i + 1]) and torch.equal(alone[1], normed[i : i + 1])
    kept = y.clone()
    target = y if placement == "pre" else None
    in_place = add_norm.add_norm(x, y, weight, 1e-6, "once", placement, x, target)
    assert in_place[0] is x and torch.equal(x, stream)
    assert torch.equal(in_place[1], normed) and (placement == "pre" or torch.equal(y, kept))
    given = stream.clone()
    expected = add_norm.norm(given, weight, 1e-6, "once", poisoned(3, 72, dtype=half))
    assert_equal(add_norm.norm(given, weight, 1e-6, "once", given), expected)


def test_small_rows_lean_on_eps():
    x, _, weight = inputs(1, 16)
    zero = torch.zeros_like(x)
    assert_equal(run(x, zero, weight, "once", "post")[0], x)
    assert_equal(add_norm.norm(zero, weight, 1e-6, "once", poisoned(1, 16, dtype=BF16)), zero)


def test_sums_beyond_fp16_are_infinite():
    """As torch's: in bf16 nothing comes near its limit."""
    x = torch.full((1, 8), 60000.0, device=poisoned(1, dtype=BF16).device).half()
    stream, normed = run(x, x, torch.ones_like(x[0]), "once", "pre")
    assert torch.equal(stream, x + x) and stream.isinf().all() and normed.isnan().all()


def test_no_tokens():
    x, y, weight = inputs(0, 16)
    assert run(x, y, weight, "once", "pre")[1].shape == (0, 16)


def test_refusals():
    x, y, weight = inputs(2, 16)
    other = torch.empty_like(x)
    with pytest.raises(ValueError, match="add_norm: rounding is 'thrice': 'once' or 'twice' needed"):
        add_norm.add_norm(x, y, weight, 1e-6, "thrice", "post", x)
    with pytest.raises(ValueError, match="add_norm: placement is 'mid': 'pre' or 'post' needed"):
        add_norm.add_norm(x, y, weight, 1e-6, "once", "mid", x)
    with pytest.raises(ValueError, match="add_norm: normed is missing"):
        add_norm.add_norm(x, y, weight, 1e-6, "once", "pre", x)
    with pytest.raises(ValueError, match="add_norm: normed is a tensor of its own"):
        add_norm.add_norm(x, y, weight, 1e-6, "once", "post", x, other)
    with pytest.raises(ValueError, match="add_norm: added is given"):
        add_norm.add_norm(x, y, weight, 1e-6, "once", "pre", x, other, other)
    with pytest.raises(ValueError, match=r"add_norm: y has shape \(1, 16\): \(2, 16\) needed"):
        add_norm.add_norm(x, y[:1], weight, 1e-6, "once", "post", x)
    with pytest.raises(ValueError, match=r"add_norm: added has shape \(1, 16\): \(2, 16\) needed"):
        add_norm.add_norm(x, y, weight, 1e-6, "once", "post", x, None, other[:1])
    with pytest.raises(TypeError, match=r"add_norm: stream is torch.float32: torch.bfloat16 needed"):
        add_norm.add_norm(x, y, weight, 1e-6, "once", "post", x.float())
    with pytest.raises(TypeError, match=r"add_norm: weight is torch.bfloat16: torch.float16 needed"):
        add_norm.add_norm(x.half(), y.half(), weight, 1e-6, "once", "post", x.half())
    with pytest.raises(TypeError, match=r"norm: x is torch.float32: torch.bfloat16 or torch.float16 needed"):
        add_norm.norm(x.float(), weight, 1e-6, "once", other)
    with pytest.raises(ValueError, match="norm: rows of 12 elements: a multiple of 8 up to 16384 needed"):
        add_norm.norm(randn(2, 12, dtype=BF16), weight, 1e-6, "once", other)
    with pytest.raises(ValueError, match=r"norm: weight .*rows at multiples of 16 bytes needed"):
        add_norm.norm(x, randn(17, dtype=BF16)[1:], 1e-6, "once", other)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("width", [2048, 4096, 5120, 8192, 16384])
def test_real_sizes(half, width, placement):
    x, y, weight = inputs(64, width, half)
    stream, normed = run(x, y, weight, "once", placement)
    for i in (0, 17, 63):
        alone = run(x[i : i + 1], y[i : i + 1], weight, "once", placement)
        assert torch.equal(alone[0], stream[i : i + 1]) and torch.equal(alone[1], normed[i : i + 1])
    source = stream if placement == "pre" else y
    out = add_norm.norm(source, weight, 1e-6, "once", poisoned(64, width, dtype=half))
    assert torch.equal(normed, out) if placement == "pre" else torch.equal(stream, x + out)
    exact = rms_norm.reference(source.double(), weight.double(), 1e-6)
    assert_as_good_as_torch(out, rms_norm.reference(source, weight, 1e-6), exact)
