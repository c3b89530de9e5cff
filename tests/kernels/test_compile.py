"""Many kernels compiled by processes beside each other, and what becomes of these when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_numerics import ROOT, run_compiled

BUILT = """
import json, sys
import ptx_kernels
from kernels import catalogue
from kernels.architectures import ARCHITECTURES
from kernels.compile import build_all

seen = []
kernels, archs = {kernels}
builds = build_all(kernels, archs, workers=2, progress=lambda *args: seen.append(args))
print(json.dumps({{
    "names": [kernel.name for kernel in kernels for arch in archs if arch in kernel.architectures],
    "builds": [{{**vars(build), "cubin": build.cubin.hex()}} for build in builds],
    "progress": seen,
}}))
"""


def assert_fits(builds):
    for build in builds:
        name = f"{build['kernel']} on {build['arch']}"
        spills = build["spill_stores"] + build["spill_loads"]
        assert spills == 0, f"{name} spills {spills} bytes"
        # A block that fills shared memory on purpose is alone on its SM and may have all registers.
        alone = build["dynamic_shared"] > 48 << 10
        assert 0 < build["registers"] <= (255 if alone else 128), f"{name}: {build['registers']} registers"
        assert alone or build["occupancy"] >= 0.4, f"{name}: occupancy {build['occupancy']}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Small kernels and every PTX instruction, built in two processes from an empty cache, two kernels twice."""
    small = (
        "(kernels := [k for k in catalogue(('bf16',)) if 'naive' in k.name]) + ptx_kernels.everything() + kernels[:2]"
    )
    code = BUILT.format(kernels=f"{small}, ['sm_80']")
    folder = str(tmp_path_factory.mktemp("built"))
    return {**json.loads(run_compiled(code, AFS_CACHE=folder)), "folder": folder}


@pytest.mark.xdist_group("built")
def test_building_in_processes(built):
    assert [build["kernel"] for build in built["builds"]] == built["names"]
    total = len(set(built["names"]))
    assert [done for done, _, _ in built["progress"]] == list(range(total + 1))
    assert {name.removesuffix(" sm_80") for _, _, name in built["progress"][1:]} == set(built["names"])
    assert [b["cubin"] for b in built["builds"][-2:]] == [b["cubin"] for b in built["builds"][:2]]


@pytest.mark.xdist_group("built")
def test_every_ptx_instruction_assembles_for_the_oldest_architecture(built):
    mixes = {build["kernel"]: build["instructions"] for build in built["builds"] if build["kernel"].startswith("test_")}
    wanted = {"shfl": "shfl.sync", "mma": "mma.sync", "cp_async": "cp.async", "ldmatrix": "ldmatrix", "ex2": "ex2"}
    for name, mix in mixes.items():
        for start, family in wanted.items():
            if name.startswith(f"test_{start}"):
                assert mix.get(family), f"{name} has no {family}: {mix}"
        assert "ld.local" not in mix and "st.local" not in mix
    assert mixes["test_fma"]["fma"] == 1 and len(mixes) > 20


NO_TOOLKIT = """
from cuda import pathfinder

def find(name):
    if name in ("nvvm", "nvJitLink"):
        raise pathfinder.DynamicLibNotFoundError(f'Failure finding "lib{name}.so"')
    return load(name)

load, pathfinder.load_nvidia_dynamic_lib = pathfinder.load_nvidia_dynamic_lib, find
from kernels import residual
from kernels.architectures import BuildError
from kernels.compile import build_all

print(*(build.kernel for build in build_all([residual.naive("bf16")], ["sm_80"])))
try:
    build_all([residual.naive("bf16")], ["sm_89"])
except BuildError as error:
    print(error)
"""


@pytest.mark.xdist_group("built")
def test_without_a_toolkit_kept_cubins_are_taken_and_others_are_said_to_be_missing(built):
    kept, said = run_compiled(NO_TOOLKIT, AFS_CACHE=built["folder"]).splitlines()
    assert kept == "residual_naive_bf16"
    assert said == (
        'residual_naive_bf16: does not compile for sm_89: Failure finding "libnvvm.so"; '
        "libnvvm comes with pip install 'numba-cuda[cu13]'"
    )


# f16 differs from bf16 in conversions and the products' type alone.
COMPILED = {
    "sm_90a": "catalogue(('bf16', 'f32'))",
    "sm_80": "[k for k in catalogue(('bf16', 'f32')) if 'sm_90a' not in k.architectures]",
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", COMPILED)
def test_every_kernel_compiles(arch):
    """With wgmma, and what takes its place without. Kept cubins are taken: it is seconds where nothing has changed."""
    builds = json.loads(run_compiled(BUILT.format(kernels=f"{COMPILED[arch]}, ['{arch}']"), timeout=580))["builds"]
    assert builds
    assert_fits(builds)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", range(6))
def test_the_catalogue_compiles_without_spills(place):
    """A sixth of it for each architecture; `stages.build` compiles all for all, and refuses spills."""
    code = BUILT.format(kernels=f"catalogue()[{place}::6], ARCHITECTURES[{place}:{place + 1}]")
    builds = json.loads(run_compiled(code, timeout=800))["builds"]
    assert builds
    assert_fits(builds)


FAILING = """
import os, pathlib, sys
sys.path.insert(0, "tests/kernels")
from kernels import compile, residual
from kernels.architectures import BuildError
import compile_kernels

try:
    compile.build_all([residual.naive("bf16"), compile_kernels.{kernel}()], ["sm_80"], workers=2)
except BuildError as error:
    print(error)
"""


def line_of(text):
    """Where compile_kernels.py has the line."""
    path = ROOT / "tests/kernels/compile_kernels.py"
    (number,) = (i for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip() == text)
    return f"{path}:{number}"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("broken", f"{line_of('x[0] = x.nothing')}: Unknown attribute 'nothing' of type float32*"),
        (
            "broken_within",
            f"{line_of('return x.nothing')}: Unknown attribute 'nothing' of type float32, called at "
            f"{line_of('x[0] = _nothing_of(x[0])')}",
        ),
    ],
)
def test_an_error_names_the_kernel_and_the_line(kernel, said, tmp_path):
    printed = run_compiled(FAILING.format(kernel=kernel), AFS_CACHE=str(tmp_path))
    assert printed == f"{kernel}: does not compile for sm_80: {said}\n"


def test_an_error_names_the_kernel_whose_process_died(tmp_path):
    said = "deadly: the process that compiled it for sm_80 was ended by signal SIGKILL"
    assert run_compiled(FAILING.format(kernel="deadly"), AFS_CACHE=str(tmp_path)).startswith(said)


def test_processes_die_with_their_parent(tmp_path):
    """A build that is killed, in a script without a guard around its main part."""
    script = tmp_path / "script.py"
    script.write_text(
        "from kernels.compile import build_all\nfrom compile_kernels import endless\n"
        "print('begun', flush=True)\nbuild_all([endless(0), endless(1)], ['sm_80'], workers=2)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    path = [str(ROOT), str(ROOT / "tests/kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "AFS_CACHE": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout and parent.stdout.readline() == "begun\n"
    marks = [tmp_path / f"endless-{number}" for number in range(2)]
    wait_for(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    workers = [int(mark.read_text()) for mark in marks]
    assert parent.stdout.read(0) == "" and all(alive(worker) for worker in workers)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(alive(worker) for worker in workers))
    assert not list(tmp_path.glob("*.json"))


def alive(pid: int) -> bool:
    """Whether the process runs: one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


TWO = """
import json, os, subprocess, sys
from kernels import residual, swiglu
code = "from kernels import residual, swiglu; from kernels.compile import build_all; " \\
    "build_all([residual.naive('bf16'), swiglu.naive('bf16')], ['sm_80'], workers=1)"
processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
assert [process.wait() for process in processes] == [0, 0]
kept = [kernel.kept("sm_80") for kernel in (residual.naive("bf16"), swiglu.naive("bf16"))]
print(json.dumps([build.kernel for build in kept]))
"""


def test_two_processes_fill_one_cache(tmp_path):
    assert json.loads(run_compiled(TWO, AFS_CACHE=str(tmp_path))) == ["residual_naive_bf16", "swiglu_naive_bf16"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".cubin", ".cubin", ".json", ".json"]
