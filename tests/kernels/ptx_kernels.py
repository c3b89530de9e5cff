"""One small kernel for each PTX instruction: run by test_ptx.py, compiled by test_launch.py."""

from kernels import ptx
from kernels.cuda import cuda, float32, int32, uint8, uint32, uint64
from kernels.launch import Kernel, kernel_factory

UNARY = {
    "f32_from_bits": "i32*",
    "sqrt_rn_f32": "f32*",
    "ex2_approx_f32": "f32*",
    "rcp_approx_f32": "f32*",
}
BINARY = ("add_rn_f32", "mul_rn_f32", "div_rn_f32")


@kernel_factory
def unary(name):
    """x, out f32[n], n; grid (n / 32,)."""
    operation = getattr(ptx, name)
    bits = UNARY[name] == "i32*"

    def kernel(x, out, count):
        i = cuda.blockIdx.x * 32 + cuda.threadIdx.x
        if i < count:
            out[i] = operation(uint32(x[i]) if bits else x[i])

    return Kernel(f"test_{name}", kernel, (UNARY[name], "f32*", "i32"), 32)


@kernel_factory
def binary(name):
    """x, y, out f32[n], n; grid (n / 32,)."""
    operation = getattr(ptx, name)

    def kernel(x, y, out, count):
        i = cuda.blockIdx.x * 32 + cuda.threadIdx.x
        if i < count:
            out[i] = operation(x[i], y[i])

    return Kernel(f"test_{name}", kernel, ("f32*", "f32*", "f32*", "i32"), 32)


@kernel_factory
def fma():
    """x, y, z, out f32[n], n; grid (n / 32,)."""

    def kernel(x, y, z, out, count):
        i = cuda.blockIdx.x * 32 + cuda.threadIdx.x
        if i < count:
            out[i] = ptx.fma_rn_f32(x[i], y[i], z[i])

    return Kernel("test_fma", kernel, ("f32*", "f32*", "f32*", "f32*", "i32"), 32)


@kernel_factory
def convert(dtype):
    """x f32[n] -> rounded bf16[n] or f16[n], widened f32[n], pairs i32[n] of (x, -x), bits i32[n]; n; grid
    (n / 32,)."""
    rounded_of, widened_of = getattr(ptx, f"cvt_rn_{dtype}_f32"), getattr(ptx, f"f32_from_{dtype}")
    pair_of = getattr(ptx, f"cvt_rn_{dtype}x2_f32")

    def kernel(x, rounded, widened, pairs, bits, count):
        i = cuda.blockIdx.x * 32 + cuda.threadIdx.x
        if i < count:
            rounded[i] = rounded_of(x[i])
            widened[i] = widened_of(rounded[i])
            pairs[i] = int32(pair_of(-x[i], x[i]))
            bits[i] = int32(ptx.bits_from_f32(x[i]))

    return Kernel(f"test_convert_{dtype}", kernel, ("f32*", f"{dtype}*", "f32*", "i32*", "i32*", "i32"), 32)


@kernel_factory
def shuffle(mode, kind, by):
    """x, out [64] of f32 or i32; grid (1,)."""
    exchange = getattr(ptx, f"shfl_sync_{mode}_{kind}")
    cast = float32 if kind == "f32" else uint32
    back = float32 if kind == "f32" else int32

    def kernel(x, out):
        i = cuda.threadIdx.x
        out[i] = back(exchange(uint32(0xFFFFFFFF), cast(x[i]), uint32(by)))

    pointer = "f32*" if kind == "f32" else "i32*"
    return Kernel(f"test_shfl_{mode}_{kind}_{by}", kernel, (pointer, pointer), 64)


@kernel_factory
def half_warp_sum():
    """x, out f32[32]: lanes 0 to 15 add theirs up with a mask of their own; grid (1,)."""

    def kernel(x, out):
        i = cuda.threadIdx.x
        value = x[i]
        if i < 16:
            for by in (8, 4, 2, 1):
                value += ptx.shfl_sync_bfly_f32(uint32(0xFFFF), value, uint32(by))
        out[i] = value

    return Kernel("test_half_warp_sum", kernel, ("f32*", "f32*"), 32)


@kernel_factory
def wide_load():
    """x i32[n], out i32[n], n a multiple of 4: copied 16 bytes at a time; grid (1,)."""

    def kernel(x, out, count):
        i = cuda.threadIdx.x * 4
        if i < count:
            got = ptx.ld_global_nc_v4(x, i)
            for j in range(4):
                out[i + j] = int32(got[j])

    return Kernel("test_wide_load", kernel, ("i32*", "i32*", "i32"), 32)


@kernel_factory
def asynchronous_copy(name, size, waits):
    """x, early, out u8[2 * 32 * size]: two groups of copies into shared memory, waited for one after the other; early
    gets what the first group left in shared memory before the second wait. grid (1,)."""
    copy = getattr(ptx, name)
    wait_first, wait_all = ptx.cp_async_wait_group(1), ptx.cp_async_wait_group(0)
    half, both = 32 * size, 64 * size

    def kernel(x, early, out):
        staged = cuda.shared.array(both, uint8)
        i = cuda.threadIdx.x * size
        address = ptx.shared_address(staged)
        copy(uint32(address + uint32(i)), x, i)
        ptx.cp_async_commit_group()
        copy(uint32(address + uint32(half + i)), x, half + i)
        ptx.cp_async_commit_group()
        if waits:
            wait_first()
        for j in range(size):
            early[i + j] = staged[i + j]
        wait_all()
        for j in range(size):
            out[i + j] = staged[i + j]
            out[half + i + j] = staged[half + i + j]

    return Kernel(f"test_{name}_{waits}", kernel, ("u8*", "u8*", "u8*"), 32)


@kernel_factory
def load_matrices(count, transposed):
    """x i32 of 8 * count rows of 4, out i32[count, 32]: rows into dynamic shared memory, then ldmatrix; grid (1,)."""
    load = getattr(ptx, f"ldmatrix_x{count}{'_trans' if transposed else ''}")
    rows = 8 * count

    def kernel(x, out):
        staged = cuda.shared.array(0, uint32)
        lane = cuda.threadIdx.x
        if lane < rows:
            for j in range(4):
                staged[lane * 4 + j] = uint32(x[lane * 4 + j])
        cuda.syncthreads()
        got = load(uint32(ptx.shared_address(staged) + uint32(lane % rows * 16)))
        if count == 1:
            out[lane] = int32(got)
        else:
            for j in range(count):
                out[j * 32 + lane] = int32(got[j])

    name = f"test_ldmatrix_x{count}{'_trans' if transposed else ''}"
    return Kernel(name, kernel, ("i32*", "i32*"), 32, dynamic_shared=16 * rows)


@kernel_factory
def multiply(dtype):
    """a i32[4, 32], b i32[2, 32], c, d f32[4, 32]: registers of a warp, mma, registers; grid (1,)."""
    mma = getattr(ptx, f"mma_m16n8k16_{dtype}")

    def kernel(a, b, c, d):
        lane = cuda.threadIdx.x
        got = mma(
            uint32(a[lane]),
            uint32(a[lane + 32]),
            uint32(a[lane + 64]),
            uint32(a[lane + 96]),
            uint32(b[lane]),
            uint32(b[lane + 32]),
            c[lane],
            c[lane + 32],
            c[lane + 64],
            c[lane + 96],
        )
        for j in range(4):
            d[lane + 32 * j] = got[j]

    return Kernel(f"test_mma_{dtype}", kernel, ("i32*", "i32*", "f32*", "f32*"), 32)


@kernel_factory
def box(rows):
    """Tensor map, out i32 of `rows` rows of 32, row, column: a box by the bulk tensor copy, sm_90; grid (1,)."""

    def kernel(tensor_map, out, row, column):
        memory = cuda.shared.array(0, uint8)
        start = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        barrier = start + uint32(rows * 128)
        lane = int32(cuda.threadIdx.x)
        if lane == 0:
            ptx.mbarrier_init(barrier, uint32(1))
            ptx.fence_mbarrier_init()
            ptx.mbarrier_arrive_expect_tx(barrier, uint32(rows * 128))
            ptx.cp_async_bulk_tensor_2d(
                start, tensor_map, 0, barrier, int32(column), int32(row), uint64(ptx.EVICT_FIRST)
            )
        ptx.bar_warp_sync()
        while ptx.mbarrier_try_wait(barrier, uint32(0)) == 0:
            pass
        for i in range(rows // 4):
            line, chunk = i * 4 + lane // 8, lane % 8
            got = ptx.ld_shared_v4(start + uint32(line * 128 + ((chunk ^ (line & 7)) * 16)))
            for j in range(4):
                out[line * 32 + chunk * 4 + j] = int32(got[j])

    kinds = ("u8*", "i32*", "i32", "i32")
    return Kernel(
        f"test_box_{rows}", kernel, kinds, 32, 1024 + rows * 128 + 8, architectures=("sm_90a", "sm_100", "sm_120")
    )


@kernel_factory
def handover(rounds):
    """x, out i32[32 * rounds]: one warp copies into shared memory by cp.async, another adds 1 and writes out, through a
    ring of two places guarded by memory barriers; grid (1,)."""

    def kernel(x, out):
        memory = cuda.shared.array(0, uint8)
        ring = ptx.shared_address(memory)
        full, empty = ring + uint32(1024), ring + uint32(1040)
        thread = int32(cuda.threadIdx.x)
        lane = thread & 31
        if thread == 0:
            for s in range(2):
                ptx.mbarrier_init(full + uint32(8 * s), uint32(8))
                ptx.mbarrier_init(empty + uint32(8 * s), uint32(32))
        cuda.syncthreads()
        for i in range(rounds):
            place, parity = i % 2, i // 2 % 2
            if thread >= 32:
                if lane < 8:
                    while ptx.mbarrier_test_wait(empty + uint32(8 * place), uint32(parity ^ 1)) == 0:
                        pass
                    ptx.cp_async_cg_16(ring + uint32(place * 512 + lane * 16), x, i * 32 + lane * 4)
                    ptx.cp_async_mbarrier_arrive(full + uint32(8 * place))
            else:
                while ptx.mbarrier_test_wait(full + uint32(8 * place), uint32(parity)) == 0:
                    pass
                got = ptx.ld_shared_v4(ring + uint32(place * 512 + lane // 4 * 16))
                for j in range(4):
                    if lane % 4 == j:
                        out[i * 32 + lane] = int32(got[j]) + 1
                ptx.mbarrier_arrive(empty + uint32(8 * place))

    return Kernel(f"test_handover_{rounds}", kernel, ("i32*", "i32*"), 64, dynamic_shared=1056)


@kernel_factory
def phases():
    """out i32[4]: whether a memory barrier's phases of parity 0 and 1 have ended, before and after its arrival; grid
    (1,)."""

    def kernel(out):
        memory = cuda.shared.array(0, uint8)
        barrier = ptx.shared_address(memory)
        if cuda.threadIdx.x == 0:
            ptx.mbarrier_init(barrier, uint32(1))
            out[0] = int32(ptx.mbarrier_test(barrier, uint32(0)))
            out[1] = int32(ptx.mbarrier_test(barrier, uint32(1)))
            ptx.mbarrier_arrive(barrier)
            out[2] = int32(ptx.mbarrier_test(barrier, uint32(0)))
            out[3] = int32(ptx.mbarrier_test(barrier, uint32(1)))

    return Kernel("test_phases", kernel, ("i32*",), 32, dynamic_shared=16)


@kernel_factory
def wide_stores():
    """x, out i32[128], counter i32[1]: through shared memory 16 bytes at a time; counter gets the sum of the lanes'
    numbers; grid (1,)."""

    def kernel(x, out, counter):
        memory = cuda.shared.array(0, uint8)
        start = ptx.shared_address(memory)
        lane = int32(cuda.threadIdx.x)
        ptx.griddepcontrol_launch_dependents()
        ptx.griddepcontrol_wait()
        a = ptx.ld_global_v4(x, lane * 4)
        ptx.st_shared_v4(start + uint32(lane * 16), a[0], a[1], a[2], a[3])
        ptx.bar_warp_sync()
        b = ptx.ld_shared_v4(start + uint32((31 - lane) * 16))
        ptx.st_global_v4(out, lane * 4, b[0], b[1], b[2], b[3])
        ptx.st_global_b32(out, lane * 4, b[0] + uint32(1))
        ptx.atom_add_acq_rel_u32(counter, 0, uint32(lane))

    return Kernel("test_wide_stores", kernel, ("i32*", "i32*", "i32*"), 32, dynamic_shared=512)


@kernel_factory
def warpgroup_multiply(n, a, b_major, dtype):
    """Tensor maps of a [64, 64] and of b [n, 64] ("k") or [64, n] ("n"), out f32 [64, n] = 2 a b; grid (1,)."""
    b_boxes, b_bytes = (n // 64, 64 * 128) if b_major == "n" else (1, n * 128)
    along = 2048 if b_major == "n" else 32  # bytes to the next 16 of K
    count = n // 2
    wgmma, wait = getattr(ptx, f"wgmma_m64k16_{dtype}")(n, a, b_major), ptx.wgmma_wait_group(0)
    keep = ptx.keep_f32(count)

    def kernel(a_map, b_map, out):
        memory = cuda.shared.array(0, uint8)
        start = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        b_at = start + uint32(8192)
        barrier = b_at + uint32(b_boxes * b_bytes)
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            ptx.mbarrier_init(barrier, uint32(1))
            ptx.fence_mbarrier_init()
            ptx.mbarrier_arrive_expect_tx(barrier, uint32(8192 + b_boxes * b_bytes))
            ptx.cp_async_bulk_tensor_2d(start, a_map, 0, barrier, int32(0), int32(0), uint64(ptx.EVICT_FIRST))
            for i in range(b_boxes):
                ptx.cp_async_bulk_tensor_2d(
                    b_at + uint32(i * b_bytes), b_map, 0, barrier, int32(i * 64), int32(0), uint64(ptx.EVICT_LAST)
                )
        if thread < 64:
            ptx.bar_arrive(uint32(1), uint32(128))
        else:
            ptx.bar_sync(uint32(1), uint32(128))
        cuda.syncthreads()
        while ptx.mbarrier_try_wait(barrier, uint32(0)) == 0:
            pass
        acc = cuda.local.array(count, float32)
        for i in range(count):
            acc[i] = float32(99.0)
        warp, lane = thread >> 5, thread & 31
        a_descriptor = ptx.wgmma_descriptor(start, uint32(16), uint32(1024))
        b_descriptor = ptx.wgmma_descriptor(b_at, uint32(b_bytes), uint32(1024))
        for twice in range(2):
            for i in range(4):
                scale = uint32(0) if twice + i == 0 else uint32(1)
                if a == "shared":
                    keep(acc)
                    ptx.wgmma_fence()
                    wgmma(acc, a_descriptor + uint64(i * 2), b_descriptor + uint64(i * along >> 4), scale)
                else:
                    row, chunk = warp * 16 + (lane & 15), i * 2 + (lane >> 4)
                    held = ptx.ldmatrix_x4(start + uint32(row * 128 + ((chunk ^ (row & 7)) * 16)))
                    keep(acc)
                    ptx.wgmma_fence()
                    wgmma(acc, held[0], held[1], held[2], held[3], b_descriptor + uint64(i * along >> 4), scale)
                ptx.wgmma_commit_group()
                wait()
        keep(acc)
        for i in range(count):
            row, column = warp * 16 + lane // 4 + i % 4 // 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
            out[row * n + column] = acc[i]

    size = 1024 + 8192 + b_boxes * b_bytes + 8
    kinds = ("u8*", "u8*", "f32*")
    return Kernel(f"test_wgmma_{n}_{a}_{b_major}_{dtype}", kernel, kinds, 128, size, architectures=("sm_90a",))


SHUFFLES = [(mode, kind, 3) for mode in ("bfly", "down", "up", "idx") for kind in ("f32", "u32")]
COPIES = [("cp_async_ca_4", 4), ("cp_async_ca_8", 8), ("cp_async_cg_16", 16)]
WARPGROUPS = [
    (8, "shared", "k", "bf16"),
    (24, "shared", "k", "bf16"),
    (256, "registers", "k", "bf16"),
    (128, "registers", "n", "bf16"),
    (64, "shared", "n", "bf16"),
    (24, "shared", "k", "f16"),
    (128, "registers", "n", "f16"),
]
MATRICES = [(count, transposed) for count in (1, 2, 4) for transposed in (False, True)]


def everything():
    """Every kernel above."""
    return [
        *(unary(name) for name in UNARY),
        *(binary(name) for name in BINARY),
        fma(),
        convert("bf16"),
        convert("f16"),
        *(shuffle(*arguments) for arguments in SHUFFLES),
        half_warp_sum(),
        wide_load(),
        *(asynchronous_copy(*arguments, True) for arguments in COPIES),
        *(load_matrices(*arguments) for arguments in MATRICES),
        multiply("bf16"),
        multiply("f16"),
        handover(5),
        wide_stores(),
        *(warpgroup_multiply(*arguments) for arguments in WARPGROUPS),
    ]
