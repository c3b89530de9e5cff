import pytest
import torch
from kernel_numerics import DEVICE

from kernels import read
from kernels.cuda import SIMULATED

HAS_BULK = SIMULATED or torch.cuda.get_device_capability()[0] in (9, 10)


def words(count):
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32).to(DEVICE)


def poisoned(blocks):
    return torch.full((blocks, 128, 4), 0x5A5A5A5A, dtype=torch.int32, device=DEVICE)


def test_reference_is_the_exclusive_or_of_all():
    source = words(4 * 7)
    expected = torch.zeros(4, dtype=torch.int32)
    for word in source.cpu().view(-1, 4):
        expected ^= word
    assert torch.equal(read.reference(source), expected)


@pytest.mark.skipif(not HAS_BULK, reason="the bulk copy needs sm_90")
@pytest.mark.parametrize(("pieces", "blocks"), [(1, 2), (9, 2), (12, 1)])
def test_a_ring_reads_everything_once(pieces, blocks):
    source, out = words(pieces * 1024), poisoned(blocks)
    read.bulk(3, 4096).launch((blocks,), source, out, pieces)
    assert torch.equal(read.reference(out), read.reference(source))


@pytest.mark.parametrize("count", [4, 512, 4 * 128 * 2 * 8 + 20])
def test_vectors_read_everything_once(count):
    source, out = words(count), poisoned(2)
    read.vectors().launch((2,), source, out, count // 4)
    assert torch.equal(read.reference(out), read.reference(source))


@pytest.mark.slow
def test_read():
    source = words(5 * read.STAGE // 4)
    assert torch.equal(read.reference(read.read(source, poisoned(2))), read.reference(source))


def test_what_does_not_fit_is_refused():
    source = words(read.STAGE // 4)
    with pytest.raises(TypeError, match=r"source is torch\.float32"):
        read.read(source.float(), poisoned(1))
    with pytest.raises(ValueError, match=r"out has shape \(1, 64, 4\)"):
        read.read(source, poisoned(1)[:, :64])
    with pytest.raises(ValueError, match="a multiple of 16384 needed"):
        read.read(source[:1024], poisoned(1))


@pytest.mark.parametrize(
    ("machine", "expected"), [(("sm_90a", 132), 132), (("sm_100", 148), 148), (("sm_80", 108), 864)]
)
def test_blocks_fill_the_gpu(machine, expected, monkeypatch):
    monkeypatch.setattr(read, "machine_of", lambda device: machine)
    assert read.blocks(0) == expected
