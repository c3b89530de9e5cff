"""PTX instructions as functions for kernels, each named as PTX names it and each with its twin.

The body of a function here is the twin: what runs under the simulator. On a GPU `@instruction` puts the PTX in its
place. A warp-wide twin meets the lanes of its warp, computes with NumPy and hands every lane its result.
Source: PTX ISA 9.0, sections 9.7 (instructions) and 9.7.15 (matrix fragments).

Registers are uint32 here where PTX says .b32; a pair of bf16 or f16 in one has the lower index in the lower half.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.cuda import SIMULATED, cgutils, device_function, intrinsic, ir, types, uint32, uint64
from kernels.simulated_memory import SharedMemory, SimulationError, simulated_tensor_map
from kernels.simulator import current

FULL_MASK = 0xFFFFFFFF

# Operand kinds: constraint letter of the inline assembly. "p" is a pointer and an element index, "a" an array.
_LETTERS = {"u16": "h", "u32": "r", "s32": "r", "u64": "l", "f32": "f"}


def instruction(
    asm: str, returns: str | tuple[str, ...] | None, *operands: str, memory: bool = False, collective: bool = False
) -> Any:
    """Decorator: on a GPU the function is the inline assembly `asm`, under the simulator it is itself.

    returns, operands: kinds "u16", "u32", "s32", "u64", "f32"; several results come back as a tuple. An operand "p" is
    two arguments, a pointer and the index of an element: the assembly gets the element's address. An operand "a" is a
    shared array: the assembly gets its generic address. Results are $0… and operands follow.
    memory: it reads or writes memory or synchronises, so no access to memory may move across it. collective: all lanes
    must execute it together, so it may not move into or out of a branch.
    """
    if SIMULATED:
        return lambda twin: twin

    results = (returns,) if isinstance(returns, str) else returns or ()
    llvm = {"u16": ir.IntType(16), "u32": ir.IntType(32), "s32": ir.IntType(32), "u64": ir.IntType(64)}
    llvm["f32"] = ir.FloatType()
    scalars = {"u16": types.uint16, "u32": types.uint32, "s32": types.int32, "u64": types.uint64, "f32": types.float32}
    address = ir.IntType(64)
    constraints = ["=" + _LETTERS[kind] for kind in results] + [_LETTERS.get(kind, "l") for kind in operands]
    if memory:
        constraints.append("~{memory}")

    def decorate(twin: Callable[..., Any]) -> Any:
        def typing(typingctx: Any, *given: Any) -> Any:
            accepted, pending = [], list(given)
            for kind in operands:
                if kind == "p":
                    accepted += [pending.pop(0), types.int64]
                    pending.pop(0)
                elif kind == "a":
                    accepted.append(pending.pop(0))
                else:
                    accepted.append(scalars[kind])
                    pending.pop(0)
            if len(results) > 1:
                returned = types.UniTuple(scalars[results[0]], len(results))
            else:
                returned = scalars[results[0]] if results else types.void
            return returned(*accepted), generate

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            arguments, kinds, place = [], [], 0
            for kind in operands:
                if kind == "p":
                    element = builder.gep(values[place], [values[place + 1]])
                    arguments.append(builder.ptrtoint(element, address))
                    place += 1
                elif kind == "a":
                    array = context.make_array(signature.args[place])(context, builder, values[place])
                    arguments.append(builder.ptrtoint(array.data, address))
                else:
                    arguments.append(values[place])
                kinds.append(llvm.get(kind, address))
                place += 1
            if len(results) > 1:
                returned = ir.LiteralStructType([llvm[kind] for kind in results])
            else:
                returned = llvm[results[0]] if results else ir.VoidType()
            function = ir.FunctionType(returned, kinds)
            assembly = ir.InlineAsm(function, asm, ",".join(constraints), side_effect=memory or collective)
            called = builder.call(assembly, arguments)
            if len(results) > 1:
                parts = [builder.extract_value(called, i) for i in range(len(results))]
                return cgutils.pack_array(builder, parts)
            return called if results else context.get_dummy_value()

        return _as_intrinsic(typing, twin)

    return decorate


def array_instruction(asm: str, element: str, count: int, *operands: str) -> Any:
    """Decorator as `instruction`, for assembly that works on registers in place: the function's first argument is a
    `cuda.local.array` of `count` elements of kind `element` ("f32" or "u32"), $0 … in the assembly; operands follow.

    Its accesses to memory and its place among other such instructions are kept.
    """
    if SIMULATED:
        return lambda twin: twin

    llvm = {"u32": ir.IntType(32), "u64": ir.IntType(64), "f32": ir.FloatType()}
    scalars = {"u32": types.uint32, "u64": types.uint64}
    constraints = ["=" + _LETTERS[element]] * count + [_LETTERS[kind] for kind in operands]
    constraints += [*map(str, range(count)), "~{memory}"]

    def decorate(twin: Callable[..., Any]) -> Any:
        def typing(typingctx: Any, *given: Any) -> Any:
            return types.void(given[0], *(scalars[kind] for kind in operands)), generate

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, values[0])
            places = [builder.gep(array.data, [ir.Constant(ir.IntType(32), i)]) for i in range(count)]
            kinds = [llvm[kind] for kind in operands] + [llvm[element]] * count
            function = ir.FunctionType(ir.LiteralStructType([llvm[element]] * count), kinds)
            assembly = ir.InlineAsm(function, asm, ",".join(constraints), side_effect=True)
            called = builder.call(assembly, [*values[1:], *map(builder.load, places)])
            for i, place in enumerate(places):
                builder.store(builder.extract_value(called, i), place)
            return context.get_dummy_value()

        return _as_intrinsic(typing, twin)

    return decorate


def _as_intrinsic(typing: Any, twin: Callable[..., Any]) -> Any:
    """An intrinsic with the twin's name, and its argument names behind the typing context: Numba maps by them."""
    context_first = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = inspect.signature(twin).parameters.values()
    typing.__signature__ = inspect.Signature(
        [context_first, *(p.replace(annotation=inspect.Parameter.empty) for p in named)]
    )
    typing.__name__ = twin.__name__
    typing.__doc__ = twin.__doc__
    return intrinsic(typing)


# --- numbers ---------------------------------------------------------------------------------------------------------

# Of all 16-bit patterns.
_BF16_VALUES = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32) if SIMULATED else None
_F16_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32) if SIMULATED else None


def _round_to_bf16(value: Any) -> int:
    """Bits of the bf16 nearest to `value`, ties to even; NaN becomes 0x7fff, as cvt.rn.bf16.f32 has it."""
    bits = int(value.view(np.uint32))
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _round_to_f16(value: Any) -> int:
    """Bits of the f16 nearest to `value`, ties to even, infinity from 65520 on; NaN as `_round_to_bf16`."""
    return 0x7FFF if value != value else int(np.float16(value).view(np.uint16))


@instruction("{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "f32", "u16")
def f32_from_bf16(bits: Any) -> Any:
    """float32 of a bf16's 16 bits: exact."""
    return _BF16_VALUES[bits]  # type: ignore[index]


@instruction("cvt.rn.bf16.f32 $0, $1;", "u16", "f32")
def cvt_rn_bf16_f32(value: Any) -> Any:
    """The 16 bits of the bf16 nearest to a float32, ties to even."""
    return np.uint16(_round_to_bf16(value))


@instruction("cvt.rn.bf16x2.f32 $0, $1, $2;", "u32", "f32", "f32")
def cvt_rn_bf16x2_f32(high: Any, low: Any) -> Any:
    """Two float32 rounded to bf16 and packed: the first argument in the upper half, as PTX orders them."""
    return np.uint32(_round_to_bf16(high) << 16 | _round_to_bf16(low))


@instruction("cvt.f32.f16 $0, $1;", "f32", "u16")
def f32_from_f16(bits: Any) -> Any:
    """float32 of an f16's 16 bits: exact."""
    return _F16_VALUES[bits]  # type: ignore[index]


@instruction("cvt.rn.f16.f32 $0, $1;", "u16", "f32")
def cvt_rn_f16_f32(value: Any) -> Any:
    """The 16 bits of the f16 nearest to a float32, ties to even; infinity from 65520 on."""
    return np.uint16(_round_to_f16(value))


@instruction("cvt.rn.f16x2.f32 $0, $1, $2;", "u32", "f32", "f32")
def cvt_rn_f16x2_f32(high: Any, low: Any) -> Any:
    """Two float32 rounded to f16 and packed, as `cvt_rn_bf16x2_f32`."""
    return np.uint32(_round_to_f16(high) << 16 | _round_to_f16(low))


@instruction("mov.b32 $0, $1;", "u32", "f32")
def bits_from_f32(value: Any) -> Any:
    """The 32 bits of a float32."""
    return value.view(np.uint32)


@instruction("mov.b32 $0, $1;", "f32", "u32")
def f32_from_bits(bits: Any) -> Any:
    """The float32 of 32 bits."""
    return bits.view(np.float32)


@instruction("add.rn.f32 $0, $1, $2;", "f32", "f32", "f32")
def add_rn_f32(a: Any, b: Any) -> Any:
    """a + b, rounded; the compiler never fuses it into another operation."""
    return a + b


@instruction("mul.rn.f32 $0, $1, $2;", "f32", "f32", "f32")
def mul_rn_f32(a: Any, b: Any) -> Any:
    """a * b, rounded; the compiler never fuses it into another operation."""
    return a * b


@instruction("fma.rn.f32 $0, $1, $2, $3;", "f32", "f32", "f32", "f32")
def fma_rn_f32(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once.

    The twin rounds to float64 in between: where only bits beyond the 53rd break a tie, it may go the other way.
    """
    return np.float32(float(a) * float(b) + float(c))


@instruction("div.rn.f32 $0, $1, $2;", "f32", "f32", "f32")
def div_rn_f32(a: Any, b: Any) -> Any:
    """a / b, rounded correctly."""
    return a / b


@instruction("rcp.approx.ftz.f32 $0, $1;", "f32", "f32")
def rcp_approx_f32(a: Any) -> Any:
    """1 / a for a normal a, up to one unit in the last place wrong; the twin's is rounded correctly."""
    return np.float32(1.0) / a


@instruction("max.f32 $0, $1, $2;", "f32", "f32", "f32")
def max_f32(a: Any, b: Any) -> Any:
    """The larger one; where one is NaN, the other."""
    return np.fmax(a, b)


@instruction("sqrt.rn.f32 $0, $1;", "f32", "f32")
def sqrt_rn_f32(a: Any) -> Any:
    """Square root, rounded correctly."""
    return np.sqrt(a)


@instruction("ex2.approx.ftz.f32 $0, $1;", "f32", "f32")
def ex2_approx_f32(a: Any) -> Any:
    """2 ** a within 2 ** -22 of itself; subnormal results are 0. The twin is exact to the last bit or so instead."""
    result = np.exp2(a)
    return np.float32(0) if result < np.float32(2.0**-126) else result


# --- between the lanes of a warp -------------------------------------------------------------------------------------


def _shuffle(mode: str, kind: str, source: Callable[[int, int], int]) -> Any:
    # The last operand but one is the clamp: lane 31 for all modes but up, which stops at lane 0.
    asm = f"shfl.sync.{mode}.b32 $0, $2, $3, {0 if mode == 'up' else 31}, $1;"

    def shuffle(mask: Any, value: Any, by: Any) -> Any:
        def exchange(lanes: dict[int, Any]) -> dict[int, Any]:
            results = {}
            for lane, (_, amount) in lanes.items():
                other = source(lane, int(amount))
                other = other if 0 <= other < 32 else lane
                if other not in lanes:
                    raise SimulationError(f"shfl.sync.{mode}: lane {lane} reads lane {other}, which is not in the mask")
                results[lane] = lanes[other][0]
            return results

        return current().collective(f"shfl.sync.{mode}", int(mask), (value, by), exchange)

    shuffle.__name__ = f"shfl_sync_{mode}_{kind}"
    return instruction(asm, kind, "u32", kind, "u32", collective=True)(shuffle)


# shfl_sync_<mode>_<kind>(mask, value, by): every lane of mask gives value and gets that of lane ^ by (bfly), lane + by
# (down), lane - by (up), its own where there is no such lane, or lane by (idx).
shfl_sync_bfly_f32 = _shuffle("bfly", "f32", lambda lane, by: lane ^ by)
shfl_sync_down_f32 = _shuffle("down", "f32", lambda lane, by: lane + by)
shfl_sync_up_f32 = _shuffle("up", "f32", lambda lane, by: lane - by)
shfl_sync_idx_f32 = _shuffle("idx", "f32", lambda lane, by: by & 31)
shfl_sync_bfly_u32 = _shuffle("bfly", "u32", lambda lane, by: lane ^ by)
shfl_sync_down_u32 = _shuffle("down", "u32", lambda lane, by: lane + by)
shfl_sync_up_u32 = _shuffle("up", "u32", lambda lane, by: lane - by)
shfl_sync_idx_u32 = _shuffle("idx", "u32", lambda lane, by: by & 31)


# --- memory ----------------------------------------------------------------------------------------------------------


@instruction("{ .reg .u64 wide; cvta.to.shared.u64 wide, $1; cvt.u32.u64 $0, wide; }", "u32", "a")
def shared_address(array: Any) -> Any:
    """32-bit address of a shared array's first element in the shared window, as the instructions below take it."""
    return np.uint32(current().block.shared.address(array))


@instruction("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", ("u32", "u32", "u32", "u32"), "p")
def ld_global_nc_v4(pointer: Any, index: Any) -> Any:
    """The 16 bytes at pointer[index], at a multiple of 16, as four uint32, past L1. No one may write them meanwhile."""
    return tuple(pointer.bytes(index, 16).view(np.uint32))


def _cp_async(size: int, cache: str) -> Any:
    asm = f"cp.async.{cache}.shared.global [$0], [$1], {size};"

    def cp_async(target: Any, pointer: Any, index: Any) -> None:
        current().copy_async(int(target), size, pointer.bytes(index, size))

    cp_async.__name__ = f"cp_async_{cache}_{size}"
    return instruction(asm, None, "u32", "p", memory=True)(cp_async)


# cp_async_<cache>_<bytes>(shared address, pointer, index): start copying bytes from pointer[index] to shared memory,
# both at multiples of the size. What arrives may be read after a wait, and by other threads after a barrier too. The
# twin copies at the wait and not before.
cp_async_ca_4 = _cp_async(4, "ca")
cp_async_ca_8 = _cp_async(8, "ca")
cp_async_cg_16 = _cp_async(16, "cg")


@instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", None, "u32", "p", "u32", memory=True)
def cp_async_cg_16_zfill(target: Any, pointer: Any, index: Any, size: Any) -> None:
    """As cp_async_cg_16, but only the first `size` bytes are read and the others become 0."""
    source = np.zeros(16, np.uint8)
    if size:
        source[:size] = pointer.bytes(index, 16)[:size]
    current().copy_async(int(target), 16, source)


@instruction(
    "{.reg .pred p; setp.ne.u32 p, $0, 0; @p cp.async.cg.shared.global [$1], [$2], 16, $3;}",
    None, "u32", "u32", "p", "u32", memory=True,
)  # fmt: skip
def cp_async_cg_16_zfill_if(wanted: Any, target: Any, pointer: Any, index: Any, size: Any) -> None:
    """As cp_async_cg_16_zfill where `wanted` is not 0, else nothing: no branch, which code would be moved into."""
    if wanted:
        cp_async_cg_16_zfill(target, pointer, index, size)


@instruction("cp.async.commit_group;", None, memory=True)
def cp_async_commit_group() -> None:
    """Close the group of copies this thread started since the last commit."""
    current().copies.append([])


@functools.cache
def cp_async_wait_group(pending: int) -> Any:
    """A function without arguments that waits until at most `pending` of this thread's newest groups are under way."""

    def wait() -> None:
        worker = current()
        while len(worker.copies) - 1 > pending:
            worker.end_copies(worker.copies.pop(0))

    wait.__name__ = f"cp_async_wait_group_{pending}"
    return instruction(f"cp.async.wait_group {pending};", None, memory=True)(wait)


@instruction("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", ("u32", "u32", "u32", "u32"), "p", memory=True)
def ld_global_v4(pointer: Any, index: Any) -> Any:
    """The 16 bytes at pointer[index], at a multiple of 16, as four uint32."""
    return tuple(pointer.bytes(index, 16).view(np.uint32))


@instruction("st.global.v4.b32 [$0], {$1, $2, $3, $4};", None, "p", "u32", "u32", "u32", "u32", memory=True)
def st_global_v4(pointer: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four uint32 to the 16 bytes at pointer[index], at a multiple of 16."""
    pointer.written(index, 16).view(np.uint32)[:] = (a, b, c, d)


@instruction("st.global.b32 [$0], $1;", None, "p", "u32", memory=True)
def st_global_b32(pointer: Any, index: Any, value: Any) -> None:
    """A uint32, such as a pair of 16-bit floats, to the 4 bytes at pointer[index], at a multiple of 4."""
    pointer.written(index, 4).view(np.uint32)[0] = value


@instruction("ld.global.b32 $0, [$1];", "u32", "p", memory=True)
def ld_global_b32(pointer: Any, index: Any) -> Any:
    """The 4 bytes at pointer[index], at a multiple of 4, such as a pair of 16-bit floats, as a uint32."""
    return pointer.bytes(index, 4).view(np.uint32)[0]


@instruction("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", ("u32", "u32", "u32", "u32"), "u32", memory=True)
def ld_shared_v4(address: Any) -> Any:
    """The 16 bytes at a shared address, a multiple of 16, as four uint32."""
    return tuple(current().read_shared(int(address), 16).view(np.uint32))


@instruction("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", None, "u32", "u32", "u32", "u32", "u32", memory=True)
def st_shared_v4(address: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four uint32 to the 16 bytes at a shared address, a multiple of 16."""
    current().write_shared(int(address), a, b, c, d)


@instruction("st.shared.b32 [$0], $1;", None, "u32", "u32", memory=True)
def st_shared_b32(address: Any, value: Any) -> None:
    """A uint32 to the 4 bytes at a shared address, a multiple of 4."""
    current().write_shared(int(address), value)


@instruction("atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;", "u32", "p", "u32", memory=True)
def atom_add_acq_rel_u32(pointer: Any, index: Any, value: Any) -> Any:
    """Add to pointer[index] and return what was there. What the thread wrote before is visible to whoever sees the sum,
    and the other way round; a block's other threads need a barrier before it, or after it."""
    old = np.uint32(pointer[index])
    pointer[index] = old + value
    return old


@instruction("red.relaxed.gpu.global.add.u32 [$0], $1;", None, "p", "u32", memory=True)
def red_add_relaxed_u32(pointer: Any, index: Any, value: Any) -> None:
    """Add to pointer[index] in one step, in no order with other accesses."""
    pointer[index] = np.uint32(pointer[index]) + value


@instruction("griddepcontrol.wait;", None, memory=True)
def griddepcontrol_wait() -> None:
    """Wait until the kernels ahead of a programmatic launch have finished and what they wrote is visible.

    Before sm_90, and in a launch that is not programmatic, nothing.
    """
    current().block.launch.unlock()


@instruction("griddepcontrol.launch_dependents;", None, memory=True)
def griddepcontrol_launch_dependents() -> None:
    """Let the kernel behind this one start once every block has said so or ended. Before sm_90 nothing."""


# --- memory barriers and the bulk tensor copy ------------------------------------------------------------------------


@instruction("mbarrier.init.shared.b64 [$0], $1;", None, "u32", "u32", memory=True)
def mbarrier_init(address: Any, count: Any) -> None:
    """Make the 8 bytes at a shared address a barrier whose phase 0 ends after `count` arrivals (and their bytes)."""
    current().block.phases.init(int(address), int(count))


@instruction("fence.mbarrier_init.release.cluster;", None, memory=True)
def fence_mbarrier_init() -> None:
    """Make initialised barriers visible to the copy engine (sm_90 and later)."""
    current().block.phases.unfenced.clear()


@instruction("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }", None, "u32", memory=True)
def mbarrier_arrive(address: Any) -> None:
    """One arrival."""
    current().block.phases.arrive(int(address))


@instruction(
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [there]; }",
    None, "u32", "u32", memory=True,
)  # fmt: skip
def mbarrier_arrive_at(address: Any, rank: Any) -> None:
    """One arrival at the barrier that lies at this address in the cluster's block `rank`."""
    raise SimulationError("an arrival at another block's barrier: clusters are not simulated")


@instruction("mov.u32 $0, %cluster_ctarank;", "u32")
def cluster_ctarank() -> Any:
    """This block's number in its cluster."""
    raise SimulationError("a block's number in its cluster: clusters are not simulated")


@instruction("barrier.cluster.arrive; barrier.cluster.wait;", None, memory=True)
def cluster_sync() -> None:
    """Wait for all threads of the cluster's blocks, and see what they wrote."""
    raise SimulationError("a barrier of a cluster: clusters are not simulated")


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", None, "u32", "u32", memory=True)
def mbarrier_arrive_expect_tx(address: Any, size: Any) -> None:
    """One arrival, after which the phase also waits for `size` bytes of bulk copies (sm_90 and later)."""
    current().block.phases.arrive(int(address), expected=int(size))


@instruction("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", None, "u32", memory=True)
def cp_async_mbarrier_arrive(address: Any) -> None:
    """One arrival, made when all cp.async that this thread has started are done."""
    worker = current()
    for group in worker.copies:
        worker.end_copies(group)
    worker.block.phases.arrive(int(address))


def _mbarrier_wait(mode: str, twin: Callable[[Any, Any], Any]) -> Any:
    asm = f"{{ .reg .pred p; mbarrier.{mode}.parity.shared.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }}"
    return instruction(asm, "u32", "u32", "u32", memory=True)(twin)


def _await_phase(address: Any, parity: Any) -> Any:
    return current().wait_for_phase(int(address), int(parity))


def _phase_has_ended(address: Any, parity: Any) -> Any:
    return int(current().block.phases.is_seen(int(address), int(parity)))


# mbarrier_<test|try>_wait(address, parity): 1 once the phase of this parity has ended, else 0, to be asked again; try
# (sm_90 and later) may first wait a while. The twins wait until it is 1; that of mbarrier_test does not, and says 0 for
# a bulk copy that nobody has waited for.
mbarrier_test_wait = _mbarrier_wait("test_wait", _await_phase)
mbarrier_try_wait = _mbarrier_wait("try_wait", _await_phase)
mbarrier_test = _mbarrier_wait("test_wait", _phase_has_ended)


@instruction(
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    " [$0], [$1, {$3, $4}], [$2], $5;",
    None, "u32", "p", "u32", "s32", "s32", "u64", memory=True,
)  # fmt: skip
def cp_async_bulk_tensor_2d(
    target: Any, tensor_map: Any, map_index: Any, barrier: Any, column: Any, row: Any, policy: Any
) -> None:
    """Start copying the box of a tensor map (`kernels.tensor_maps`) whose first element is [row, column] to a shared
    address at a multiple of 1024; its bytes count towards `barrier`. Beyond the tensor are zeros. From sm_90 on.

    policy: how L2 keeps it, EVICT_NORMAL, EVICT_FIRST or EVICT_LAST.
    """
    _copy_box(target, tensor_map, map_index, barrier, int(row), int(column))


@instruction(
    "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    " [$0], [$1, {$3, $4, $5}], [$2], $6;",
    None, "u32", "p", "u32", "s32", "s32", "s32", "u64", memory=True,
)  # fmt: skip
def cp_async_bulk_tensor_3d(
    target: Any, tensor_map: Any, map_index: Any, barrier: Any, column: Any, row: Any, outer: Any, policy: Any
) -> None:
    """As `cp_async_bulk_tensor_2d` of a tensor of three dimensions: the box's first element is [outer, row, column]."""
    _copy_box(target, tensor_map, map_index, barrier, int(outer), int(row), int(column))


@instruction(
    "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    " [$0], [$1, {$3, $4, $5, $6}], [$2], $7;",
    None, "u32", "p", "u32", "s32", "s32", "s32", "s32", "u64", memory=True,
)  # fmt: skip
def cp_async_bulk_tensor_4d(
    target: Any, tensor_map: Any, map_index: Any, barrier: Any, column: Any, row: Any, inner: Any, outer: Any,
    policy: Any,
) -> None:  # fmt: skip
    """As `cp_async_bulk_tensor_2d` of a tensor of four dimensions: the box's first element is
    [outer, inner, row, column]."""
    _copy_box(target, tensor_map, map_index, barrier, int(outer), int(inner), int(row), int(column))


@instruction(
    "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    " [$0], [$1, {0, $3, 0, $4, $5}], [$2], $6;",
    None, "u32", "p", "u32", "s32", "s32", "s32", "u64", memory=True,
)  # fmt: skip
def cp_async_bulk_weight(
    target: Any, tensor_map: Any, map_index: Any, barrier: Any, part: Any, group: Any, box: Any, policy: Any
) -> None:
    """As `cp_async_bulk_tensor_2d` of a weight (`kernels.tiles.boxes_of`): the box's first element is
    [box, group, 0, part, 0]."""
    _copy_box(target, tensor_map, map_index, barrier, int(box), int(group), 0, int(part), 0)


@instruction(
    "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
    " [$0], [$1, {0, $3, 0, $4, $5}], [$2], $6, $7;",
    None, "u32", "p", "u32", "s32", "s32", "s32", "u16", "u64", memory=True,
)  # fmt: skip
def cp_async_bulk_weight_multicast(
    target: Any, tensor_map: Any, map_index: Any, barrier: Any, part: Any, group: Any, box: Any, blocks: Any,
    policy: Any,
) -> None:  # fmt: skip
    """As `cp_async_bulk_weight`, to the same place in each block of the cluster whose bit in `blocks` is set; the bytes
    count towards each one's own barrier."""
    raise SimulationError("a copy to several blocks: clusters are not simulated")


@instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    None, "u32", "p", "u32", "u32", memory=True,
)  # fmt: skip
def cp_async_bulk(target: Any, pointer: Any, index: Any, size: Any, barrier: Any) -> None:
    """Start copying `size` bytes, a multiple of 16, from an element at a multiple of 16 to such a shared address; they
    count towards `barrier`. From sm_90 on."""
    step = 16 // pointer.array.itemsize
    content = np.concatenate([pointer.bytes(int(index) + i * step, 16) for i in range(int(size) // 16)])
    current().block.phases.copy(int(barrier), int(target), content)


def _copy_box(target: Any, tensor_map: Any, map_index: Any, barrier: Any, *first: int) -> None:
    number = int.from_bytes(bytes(tensor_map.bytes(map_index, 16)[:8]), "little")
    box = simulated_tensor_map(number).box(*first)
    if int(target) % 1024:
        raise SimulationError(f"a box at shared address {target}, which is not a multiple of 1024")
    # The 16-byte chunk j of row i lies at place j ^ (i % 8).
    places = np.arange(8) ^ np.arange(len(box))[:, None] % 8
    content = np.take_along_axis(box.reshape(-1, 8, 16), places[:, :, None], axis=1).ravel()
    current().block.phases.copy(int(barrier), int(target), content)


@instruction("fence.proxy.async.shared::cta;", None, memory=True)
def fence_proxy_async_shared() -> None:
    """What this thread has written to shared memory is visible to wgmma and bulk copies that come after a barrier."""
    races = current().block.races
    if races:
        races.fence_proxy()


@instruction("bar.warp.sync 0xffffffff;", None, memory=True, collective=True)
def bar_warp_sync() -> None:
    """Meet the other lanes of the warp; what they wrote before is visible after."""
    worker = current()

    def meet(lanes: dict[int, Any]) -> dict[int, Any]:
        if worker.block.races:
            first = worker.thread_id & ~31
            worker.block.races.join([first + lane for lane in lanes])
        return dict.fromkeys(lanes)

    worker.collective("bar.warp.sync", FULL_MASK, None, meet)


EVICT_NORMAL = 0x1000000000000000
EVICT_FIRST = 0x12F0000000000000
EVICT_LAST = 0x14F0000000000000


# --- tensor cores ----------------------------------------------------------------------------------------------------


def _ldmatrix(count: int, transposed: bool) -> Any:
    trans = ".trans" if transposed else ""
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
    outputs = ", ".join(f"${i}" for i in range(count))

    def ldmatrix(address: Any) -> Any:
        def gather(lanes: dict[int, Any]) -> dict[int, Any]:
            worker = current()
            first = worker.thread_id & ~31
            rows = [worker.read_shared(int(lanes[i]), 16, first + i).view(np.uint16) for i in range(8 * count)]
            matrices = np.array(rows).reshape(count, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(count, 32)
            return {lane: pairs[0, lane] if count == 1 else tuple(pairs[:, lane]) for lane in lanes}

        return current().collective(name, FULL_MASK, address, gather)

    ldmatrix.__name__ = f"ldmatrix_x{count}{'_trans' if transposed else ''}"
    return instruction(f"{name} {{{outputs}}}, [${count}];", ("u32",) * count, "u32", memory=True)(ldmatrix)


# ldmatrix_x<n>[_trans](address): n matrices of 8 x 8 16-bit elements from shared memory into the warp's registers.
# Lane 8 i + r gives the address of row r of matrix i (a multiple of 16). Lane l gets of each matrix elements 2 (l % 4)
# and the next of row l / 4, or with trans of column l / 4, in one uint32 (x1) or a tuple of them.
ldmatrix_x1 = _ldmatrix(1, False)
ldmatrix_x2 = _ldmatrix(2, False)
ldmatrix_x4 = _ldmatrix(4, False)
ldmatrix_x1_trans = _ldmatrix(1, True)
ldmatrix_x2_trans = _ldmatrix(2, True)
ldmatrix_x4_trans = _ldmatrix(4, True)


def _mma(dtype: str) -> Any:
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    asm = f"{name} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"

    def mma(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
        def multiply(lanes: dict[int, Any]) -> dict[int, Any]:
            # Of each register, the lanes' two elements one after another are a matrix [8, 8].
            words = np.array([held[:6] for held in lanes.values()], np.uint32)
            parts = _values(dtype, words.view(np.uint16)).reshape(8, 4, 6, 2).transpose(2, 0, 1, 3).reshape(6, 8, 8)
            a = np.block([[parts[0], parts[2]], [parts[1], parts[3]]])
            b = np.hstack([parts[4], parts[5]]).T
            c = np.array([held[6:] for held in lanes.values()], np.float64)
            c = c.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
            d = (a @ b + c).astype(np.float32).reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4)
            return dict(zip(lanes, map(tuple, d), strict=True))

        return current().collective(name, FULL_MASK, [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3], multiply)

    mma.__name__ = f"mma_m16n8k16_{dtype}"
    return instruction(asm, ("f32",) * 4, *("u32",) * 6, *("f32",) * 4, collective=True)(mma)


def _values(dtype: str, bits: np.ndarray) -> np.ndarray:
    """float64 of the 16 bits of elements, "bf16" or "f16"."""
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# mma_m16n8k16_<dtype>(a0 … a3, b0, b1, c0 … c3): c + a b for a [16, 16], b [16, 8], c [16, 8] spread over a warp; four
# float32 of the result. With g = lane / 4 and t = 2 (lane % 4): a0 holds a[g, t:t+2], a1 a[g+8, t:t+2], a2
# a[g, t+8:t+10], a3 a[g+8, t+8:t+10]; b0 b[t:t+2, g], b1 b[t+8:t+10, g]; c0, c1 c[g, t:t+2], c2, c3 c[g+8, t:t+2].
# Products are exact and sums fp32, in an order PTX leaves open; the twin rounds once.
mma_m16n8k16_bf16 = _mma("bf16")
mma_m16n8k16_f16 = _mma("f16")


# --- warpgroups (sm_90a) ---------------------------------------------------------------------------------------------

WARPGROUP = 128


@device_function
def wgmma_descriptor(address: Any, leading: Any, stride: Any) -> Any:
    """uint64 that tells wgmma of a matrix in shared memory under the 128-byte swizzle, at a multiple of 1024.

    "k": rows of 64 elements of K, 8 of them 1024 bytes; the next 8 rows lie `stride` bytes on; leading is not used.
    "n": columns of 64 elements of N, 8 of K 1024 bytes; the next 8 of K lie `stride`, the next 64 of N `leading` bytes
    on. Adding bytes >> 4 moves it on within the matrix: 32 bytes are the next 16 of K in "k".
    """
    fixed = uint64(1 << 62) | uint64(address >> uint32(4))
    return fixed | (uint64(leading >> uint32(4)) << uint64(16)) | (uint64(stride >> uint32(4)) << uint64(32))


@instruction("wgmma.fence.sync.aligned;", None, memory=True, collective=True)
def wgmma_fence() -> None:
    """Order what the warpgroup has done to its registers before the wgmma that follow. Needed before the first one."""
    current().products.fenced = True


@instruction("wgmma.commit_group.sync.aligned;", None, memory=True, collective=True)
def wgmma_commit_group() -> None:
    """The wgmma issued since the last commit are a group."""
    current().products.committed += 1


@functools.cache
def wgmma_wait_group(pending: int) -> Any:
    """The instruction, without arguments, that waits until at most `pending` of the latest groups are unfinished."""

    def wgmma_wait() -> None:
        current().wait_for_products(pending)

    return instruction(f"wgmma.wait_group.sync.aligned {pending};", None, memory=True, collective=True)(wgmma_wait)


def _operand(dtype: str, descriptor: Any, rows: int, major: str, readers: list[Any]) -> np.ndarray:
    """The matrix [rows, 16] of `dtype` that a descriptor tells of, as float64. readers: each warp's first thread."""
    bits = int(descriptor)
    start, leading, stride = ((bits >> place & 0x3FFF) << 4 for place in (0, 16, 32))
    row, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    if major == "k":
        place = start + row // 8 * stride + row % 8 * 128 + k * 2
    else:
        place = start + row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * 2
    place ^= (place >> 7 & 7) << 4
    begin, end = int(place.min()) & ~15, (int(place.max()) | 15) + 1
    worker = current()
    races, group = worker.block.races, worker.thread_id // WARPGROUP * WARPGROUP
    if races:
        words = np.unique(place - SharedMemory.BASE >> 2)
        races.begin_operand(words, range(group, group + WARPGROUP, 32))
        for reader in readers:
            reader.products.read(words)
    return _values(dtype, worker.block.shared.span(begin, end).view(np.uint16)[place - begin >> 1])


@functools.cache
def _wgmma_m64k16(dtype: str, n: int, a: str = "shared", b_major: str = "k") -> Any:
    count = n // 2
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype}"
    registers = ", ".join(f"${i}" for i in range(count))
    transposed = int(b_major == "n")
    if a == "shared":
        kinds = ("u64", "u64", "u32")
        matrices, layout = f"${count}, ${count + 1}", f"0, {transposed}"
    else:
        kinds = ("u32", "u32", "u32", "u32", "u64", "u32")
        matrices = "{" + ", ".join(f"${count + i}" for i in range(4)) + f"}}, ${count + 4}"
        layout = f"{transposed}"
    scale = f"${count + len(kinds) - 1}"
    asm = f"{{ .reg .pred p; setp.ne.b32 p, {scale}, 0; {name} {{{registers}}}, {matrices}, p, 1, 1, {layout}; }}"

    def multiply(acc: np.ndarray, fragments: list[Any] | Any, b_descriptor: Any, scale: Any) -> None:
        def compute(lanes: dict[int, Any]) -> dict[int, Any]:
            readers = [lanes[lane][2] for lane in range(0, WARPGROUP, 32)]
            b = _operand(dtype, b_descriptor, n, b_major, readers)
            if a == "shared":
                left = _operand(dtype, fragments, 64, "k", readers)
            else:
                words = np.array([held for _, held, _ in lanes.values()], np.uint32)
                left = _values(dtype, words.view(np.uint16)).reshape(4, 8, 4, 2, 2, 2)
                left = left.transpose(0, 4, 1, 3, 2, 5).reshape(64, 16)
            added = (left @ b.T).reshape(4, 2, 8, n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(WARPGROUP, count)
            for row, (sums, _, worker) in zip(added, lanes.values(), strict=True):
                worker.products.add(sums, row, bool(scale))
            return dict.fromkeys(lanes)

        every, worker = (1 << WARPGROUP) - 1, current()
        worker.collective(name, every, (acc, fragments, worker), compute, WARPGROUP)

    def from_shared(acc: Any, a_descriptor: Any, b_descriptor: Any, scale: Any) -> None:
        multiply(acc, a_descriptor, b_descriptor, scale)

    def from_registers(acc: Any, a0: Any, a1: Any, a2: Any, a3: Any, b_descriptor: Any, scale: Any) -> None:
        multiply(acc, [a0, a1, a2, a3], b_descriptor, scale)

    return array_instruction(asm, "f32", count, *kinds)(from_shared if a == "shared" else from_registers)


# wgmma_m64k16_<dtype>(n, a="shared", b_major="k"): the instruction of a warpgroup that adds a [64, 16] times b [16, n]
# to its accumulators, without waiting for it. It takes (acc, a_descriptor, b_descriptor, scale), or with a =
# "registers" (acc, a0, a1, a2, a3, b_descriptor, scale): acc a local array of n / 2 float32; scale uint32, 0 where acc
# is to be overwritten. n is a multiple of 8 up to 256. b lies in shared memory with K next to each other, or with
# b_major "n" N. Warp w has rows 16 w …: its lanes hold of a, and of acc's columns 8 i …, in acc[4 i] …, what they hold
# in mma_m16n8k16. Sums are in its order: the bits are equal.
wgmma_m64k16_bf16 = functools.partial(_wgmma_m64k16, "bf16")
wgmma_m64k16_f16 = functools.partial(_wgmma_m64k16, "f16")


def _keep(element: str) -> Any:
    @functools.cache
    def keep(count: int) -> Any:
        def kept(array: Any) -> None:
            """Nothing."""

        return array_instruction("", element, count)(kept)

    return keep


# keep_<kind>(n)(array): its n elements are in registers here, with every change to them made: nothing that the compiler
# would move between wgmma, which ptxas answers by waiting for each of them.
keep_f32 = _keep("f32")
keep_u32 = _keep("u32")


def _setmaxnreg(mode: str) -> Any:
    @functools.cache
    def factory(registers: int) -> Any:
        def setmaxnreg() -> None:
            """The twin has as many as it likes."""

        asm = f"setmaxnreg.{mode}.sync.aligned.u32 {registers};"
        return instruction(asm, None, memory=True, collective=True)(setmaxnreg)

    return factory


# setmaxnreg_<inc|dec>(n)(): the warpgroup's threads get more, or give some back, to have n registers each.
setmaxnreg_inc = _setmaxnreg("inc")
setmaxnreg_dec = _setmaxnreg("dec")


@instruction("bar.sync $0, $1;", None, "u32", "u32", memory=True, collective=True)
def bar_sync(barrier: Any, threads: Any) -> None:
    """Arrive at named barrier 1 … 15 of `threads` threads and wait until all of them have."""
    current().named_barrier(int(barrier), int(threads), True)


@instruction("bar.arrive $0, $1;", None, "u32", "u32", memory=True, collective=True)
def bar_arrive(barrier: Any, threads: Any) -> None:
    """Arrive at named barrier 1 … 15 of `threads` threads and go on."""
    current().named_barrier(int(barrier), int(threads), False)
