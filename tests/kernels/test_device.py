"""Functions that kernels share, where no kernel's own test would see them fail."""

import torch
from kernel_numerics import DEVICE

from kernels import device, ptx
from kernels.cuda import SIMULATED, cuda, float32
from kernels.launch import Kernel, kernel_factory


@kernel_factory
def quotients():
    """a, b -> a / b by division and by `quotient`, f32[n]; n; grid (n / 256,)."""

    def kernel(a, b, exact, branchless, count):
        i = cuda.blockIdx.x * 256 + cuda.threadIdx.x
        if i < count:
            exact[i] = ptx.div_rn_f32(a[i], b[i])
            branchless[i] = device.quotient(a[i], b[i], ptx.div_rn_f32(float32(1.0), b[i]))

    return Kernel("test_quotients", kernel, ("f32*", "f32*", "f32*", "f32*", "i32"), 256)


def test_a_quotient_without_branches_has_the_same_bits():
    count = 4096 if SIMULATED else 1 << 26
    # All exponents that it is for, any mantissa; then divisors and dividends next to powers of two and each other.
    a = torch.ldexp(1 + torch.rand(count, device=DEVICE), torch.randint(-90, 90, (count,), device=DEVICE))
    b = torch.ldexp(1 + torch.rand(count, device=DEVICE), torch.randint(-30, 30, (count,), device=DEVICE))
    a *= torch.randint(0, 2, (count,), device=DEVICE) * 2 - 1
    edges = torch.tensor([1.0, 1 + 2**-23, 2 - 2**-23, 1.5, 3.0, device.LEAST, device.MOST], device=DEVICE)
    a[:7], b[:7] = edges, edges[:5].repeat(2)[:7]
    b[7 : count // 4] = (a[7 : count // 4].abs().clamp(2.0**-29, 2.0**29) * (1 + 2**-23)).clamp(2.0**-30, 2.0**30)
    exact, branchless = torch.zeros(count, device=DEVICE), torch.ones(count, device=DEVICE)
    quotients().launch((count // 256,), a, b, exact, branchless, count)
    assert torch.equal(exact, branchless)
