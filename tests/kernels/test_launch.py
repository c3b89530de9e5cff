"""Compiling, kept cubins, resources: with the real compiler, in processes of their own."""

import json
import pickle

import pytest
from kernel_numerics import run_compiled

from kernels import catalogue, residual
from kernels.architectures import LIMITS, BuildError, architecture_of
from kernels.cubins import instruction_mix, resources
from kernels.launch import Kernel, LaunchOptions


def test_architecture_of_a_device():
    expected = {
        (8, 0): "sm_80",
        (8, 7): "sm_86",
        (8, 9): "sm_89",
        (9, 0): "sm_90a",
        (10, 3): "sm_100",
        (12, 1): "sm_120",
    }
    assert {capability: architecture_of(capability) for capability in expected} == expected
    for capability in ((7, 5), (11, 0), (9, 1)):
        with pytest.raises(
            BuildError, match=f"{capability[0]}.{capability[1]} is not supported: kernels are for sm_80"
        ):
            architecture_of(capability)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        # By threads, by blocks, by registers (rounded to 8 a thread, 4 warps an allocation), by shared memory.
        ("sm_90a", 256, 32, 0, 8),
        ("sm_90a", 32, 16, 0, 32),
        ("sm_86", 32, 16, 0, 16),
        ("sm_80", 256, 128, 0, 2),
        ("sm_80", 384, 168, 0, 1),
        ("sm_80", 128, 33, 0, 12),
        ("sm_90a", 128, 32, 100 << 10, 2),
        ("sm_89", 128, 32, 99 << 10, 1),
        ("sm_80", 1024, 65, 0, 0),
    ],
)
def test_blocks_an_sm_holds(arch, threads, registers, shared, blocks):
    assert LIMITS[arch].blocks_per_sm(threads, registers, shared) == blocks


def test_reading_the_assemblers_report():
    report = """ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, used 0 barriers
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    24 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 4096 bytes smem
"""
    expected = {"registers": 40, "spill_stores": 16, "spill_loads": 12, "stack": 24, "static_shared": 4096}
    assert resources(report, "kernel") == expected
    with pytest.raises(BuildError, match="kernel: no register count in the assembler's report"):
        resources("nothing", "kernel")


def test_instruction_mix():
    ptx = """.version 9.0
.visible .entry k(.param .u64 p)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<2>;
	ld.param.u64 	%rd2, [p];
	@%p1 bra 	$L__BB0_2;
	ld.global.u16 	%rs1, [%rd10]; // a comment; with ld.local.u32
	{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 %f2, {zero, %rs1}; }
	ld.global.nc.L1::no_allocate.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f3};
	cp.async.cg.shared.global [%r1], [%rd1], 16;
$L__BB0_2:
	@!%p2 st.shared.f32 	[%rd14], %f1;
	bar.sync 	0;
	ret;
}"""
    assert instruction_mix(ptx) == {
        "ld.param": 1,
        "bra": 1,
        "ld.global": 2,
        "mov": 2,
        "mma.sync": 1,
        "cp.async": 1,
        "st.shared": 1,
        "bar.sync": 1,
        "ret": 1,
    }


def test_a_kernel_comes_back_from_a_pickle():
    kernel = residual.naive("bf16")
    assert pickle.loads(pickle.dumps(kernel)) is kernel
    with pytest.raises(TypeError, match="only a kernel made by a @kernel_factory"):
        pickle.dumps(Kernel("loose", print, (), 32))


def test_catalogue_names_are_unique():
    names = [kernel.name for kernel in catalogue(head_dims=(64, 128))]
    assert len(set(names)) == len(names) > 26
    assert [kernel.name for kernel in catalogue(("f32",), ())] == [n for n in names if n.endswith("f32")]


CACHE = """
import json, os, pathlib, re
import logging
from kernels import cubins, launch, residual
from kernels.architectures import BuildError
from kernels.launch import Kernel

warned = []
class Keep(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("kernels").addHandler(Keep())
folder = pathlib.Path(os.environ["AFS_CACHE"])
kernel = residual.naive("bf16")
said = {}

def shown(build):
    return {**{k: str(v) for k, v in vars(build).items()}, "cubin": build.cubin.hex()}

def attempt(work):
    try:
        return shown(work())
    except BuildError as error:
        return str(error)

said["first"] = shown(kernel.build("sm_90a"))
said["files"] = sorted(path.suffix for path in folder.iterdir())

# A kept cubin needs no compiler and no assembler.
real_ptx, real_assemble = launch.cuda.compile_ptx, cubins.assemble
def missing(*_):
    raise RuntimeError("no toolkit here")
launch.cuda.compile_ptx = cubins.assemble = missing
toolchain = cubins._toolchain()
cubins._toolchain = lambda: dict.fromkeys(toolchain, "")
said["kept"] = shown(kernel.build("sm_90a"))
cubins._toolchain = lambda: toolchain
said["kept_with_toolchain"] = shown(kernel.build("sm_90a"))
cubins._toolchain = lambda: {**toolchain, "numba-cuda": "0.0"}
said["other_toolchain"] = attempt(lambda: kernel.build("sm_90a"))
cubins._toolchain = lambda: toolchain
said["other_arch"] = attempt(lambda: kernel.build("sm_80"))
launch.cuda.compile_ptx, cubins.assemble = real_ptx, real_assemble

# Damage of every kind is noticed and repaired.
entry, = folder.glob("*.json")
cubin, = folder.glob("*.cubin")
whole_entry, whole_cubin = entry.read_bytes(), cubin.read_bytes()
said["repaired"] = []
for path, content in (
    (cubin, whole_cubin[:-1]), (cubin, bytes([whole_cubin[0] ^ 1]) + whole_cubin[1:]), (cubin, b""),
    (entry, whole_entry[:50]), (entry, b"[]"), (entry, b"\\xff"), (entry, whole_entry.replace(b"registers", b"regs")),
):
    path.write_bytes(content)
    said["repaired"].append(shown(kernel.build("sm_90a")) == said["first"])
cubin.unlink()
said["repaired"].append(shown(kernel.build("sm_90a")) == said["first"])
said["left"] = sorted(path.suffix for path in folder.iterdir())
said["warned"], warned[:] = list(warned), []

# What a process that was killed had begun to write goes away; what somebody may be writing stays.
old, new = folder / ".writing-old", folder / ".writing-new"
for path in (old, new):
    path.write_bytes(b"half")
os.utime(old, (0, 0))
cubins._clear_abandoned.cache_clear()
kernel.keep(kernel.build("sm_90a"))
said["abandoned"] = [old.exists(), new.exists()]
new.unlink()

# A folder that cannot be written, or has no room, costs the keeping alone, and that is said once.
(folder.parent / "file").write_text("")
os.environ["AFS_CACHE"] = str(folder.parent / "file" / "cache")
said["unwritable"] = [shown(kernel.build("sm_90a")) == said["first"] for _ in range(2)]
os.environ["AFS_CACHE"] = str(folder.parent / "full")
def full(path, content):
    raise OSError(28, "No space left on device")
real_write, cubins._write = cubins._write, full
said["full"] = shown(kernel.build("sm_90a")) == said["first"]
cubins._write = real_write
os.environ["AFS_CACHE"] = str(folder)
said["not_kept"], warned[:] = list(warned), []

# What a kernel closes over, and what it calls, is part of its identity.
def closing_over(number):
    def kernel(x):
        x[0] = number
    return Kernel("closing", kernel, ("f32*",), 32)
def calling(function):
    def kernel(x):
        x[0] = function(x[1])
    return Kernel("calling", kernel, ("f32*",), 32)
def same(number):
    return launch.cuda.device_function(lambda value: value + number)
keys = [closing_over(n).entry("sm_80") for n in (1, 1, 2)]
keys += [calling(same(n)).entry("sm_80") for n in (1, 1, 2)]
said["keys"] = [keys.index(key) for key in keys]

# Errors that say what to do.
said["unknown_arch"] = attempt(lambda: kernel.build("sm_75"))
def untypable(x):
    x[0] = x.nothing
said["uncompilable"] = attempt(lambda: Kernel("broken", untypable, ("f32*",), 32).build("sm_80"))
said["shared"] = attempt(lambda: Kernel("large", closing_over(3).fn, ("f32*",), 32, 100 << 10).build("sm_86"))
ptx = kernel.ptx("sm_80")
def assembled(text):
    try:
        _, report, assembler = cubins.assemble(text, "sm_80", "other")
        return {"assembler": assembler, **cubins.resources(report, "residual_naive_bf16")}
    except BuildError as error:
        return str(error)
said["newest"] = assembled(re.sub(r"^.version .*", ".version 99.9", ptx, flags=re.MULTILINE))
said["refused"] = assembled(ptx.replace("add.", "nonsense."))
cubins._assemblers = lambda: []
said["without_ptxas"] = assembled(ptx)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return json.loads(run_compiled(CACHE, AFS_CACHE=str(tmp_path_factory.mktemp("cache") / "afs")))


def test_a_build_says_what_the_kernel_needs(said):
    build = said["first"]
    assert bytes.fromhex(build["cubin"])[:4] == b"\x7fELF"
    assert build["kernel"] == "residual_naive_bf16" and build["threads"] == "128" and build["arch"] == "sm_90a"
    assert 4 < int(build["registers"]) < 40 and build["spill_stores"] == build["stack"] == "0"
    assert build["occupancy"] == "1.0" and build["blocks_per_sm"] == "16"
    assert "'ld.global': 2" in build["instructions"] and "'st.global': 1" in build["instructions"]
    assert said["files"] == [".cubin", ".json"]


def test_a_kept_cubin_needs_no_toolkit(said):
    assert said["kept"] == said["first"] and said["kept_with_toolchain"] == said["first"]


def test_another_toolchain_or_architecture_is_built_anew(said):
    assert "does not compile for sm_90a: no toolkit here" in said["other_toolchain"]
    assert "does not compile for sm_80: no toolkit here" in said["other_arch"]


def test_damaged_entries_are_built_anew(said):
    assert said["repaired"] == [True] * 8
    assert said["left"] == [".cubin", ".json"]


def test_damage_is_said(said):
    # Of the eight a cubin that is not there is none.
    assert len(said["warned"]) == 7 and "residual_naive_bf16-sm_90a" in said["warned"][0]
    assert "is damaged: it is compiled anew" in said["warned"][0]


def test_what_a_killed_process_left_goes_away(said):
    assert said["abandoned"] == [False, True]


def test_a_folder_that_cannot_be_written_costs_the_keeping_alone(said):
    assert said["unwritable"] == [True, True] and said["full"] is True
    assert len(said["not_kept"]) == 2, said["not_kept"]
    assert "cannot be kept in" in said["not_kept"][0] and "AFS_CACHE names another" in said["not_kept"][0]
    assert "No space left on device" in said["not_kept"][1]


def test_the_key_knows_closures_and_what_they_call(said):
    assert said["keys"] == [0, 0, 2, 3, 3, 5]


def test_errors_name_the_kernel_and_the_way_out(said):
    assert said["unknown_arch"].startswith("residual_naive_bf16: architecture 'sm_75' is unknown: known are sm_80")
    assert said["uncompilable"].startswith("broken: does not compile for sm_80: ") and "nothing" in said["uncompilable"]
    assert said["shared"] == "large: 102400 bytes of shared memory a block: sm_86 has 101376"
    assert "other: ptxas for sm_80 refuses the kernel" in said["refused"]
    assert said["newest"].startswith("other: nothing here assembles PTX 99.9 for sm_80. Tried: ")
    assert "pip install 'nvidia-cuda-nvcc==13.*' 'nvidia-nvjitlink==13.*'" in said["newest"]


def test_nvjitlink_takes_over_without_ptxas(said):
    linked = said["without_ptxas"]
    if isinstance(linked, str):
        pytest.skip(linked)
    assert linked["assembler"].startswith("nvJitLink 13.")
    assert linked["registers"] > 4 and linked["spill_stores"] == 0


def test_grids_that_do_not_fit_are_refused():
    kernel = residual.naive("f32")
    for grid in ((), (0,), (1, 70000), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"residual_naive_f32: grid .* one to three extents from 1"):
            kernel._configure(grid, LaunchOptions())
    with pytest.raises(ValueError, match=r"grid \(3, 1, 1\) is not a multiple of the cluster \(2, 1, 1\)"):
        kernel._configure((3,), LaunchOptions(cluster=(2, 1, 1)))
