"""setup/bootstrap.sh in a throwaway root: every decision, what it runs for it, and that running again does nothing."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "bash", "cat", "chmod", "cut", "date", "dirname", "env", "git", "grep", "head", "ls", "make", "mkdir", "mktemp",
    "paste", "realpath", "rm", "sed", "sort", "tail", "tee", "touch",
)  # fmt: skip
INDEXES = "https://download.pytorch.org/whl"

# Each stand-in writes its command line to $CALLS, unless it is only asked something.
NVIDIA_SMI = """
case "$*" in
  *name*) printf '{names}\\n' ;;
  *compute_cap*) printf '{sm}\\n' ;;
  *driver_version*) printf '{driver}\\n' ;;
  *) printf '| NVIDIA-SMI {driver}   Driver Version: {driver}   {header} |\\n' ;;
esac
"""
PYTHON = """
case "$1 $2" in
  "-c "*) [[ $2 == *version_info* || $2 == *ensurepip* ]] ;;
  "--version "*) echo Python 3.12.1 ;;
  "-m venv") echo "venv ${@:3}" >>"$CALLS"
    rm -rf "$4" && mkdir -p "$4/bin" && cp "$FAKES/venv-python" "$4/bin/python" ;;
esac
"""
# The torch that pip finds by itself is $PYPI_TORCH's build; an index has what its name says, or $INDEX_TORCH.
VENV_PYTHON = """
torch=${0%/bin/python}/torch
if [[ $1 == -c ]]; then cat "$torch"; exit; fi
args=("${@:6}") # after: -m pip install --quiet --disable-pip-version-check
file=${args[*]: -1}
whole=
[[ ! -e $file ]] || ! grep -q ^torch== "$file" || whole=1
[[ $file != /dev/fd/* ]] || args[-1]="the lock${whole:+ with torch}"
echo "pip ${args[*]}" >>"$CALLS"
[[ -z $FAIL_PIP ]] || exit 1
case "$*" in
  *--extra-index-url*) index=${args[*]: -2:1}; echo "${INDEX_TORCH:-${index##*/}}" >"$torch" ;;
  *-e*) ;;
  *) [[ -z $whole || -e $torch ]] || echo "$PYPI_TORCH" >"$torch" ;;
esac
"""
DPKG_QUERY = 'for last; do :; done; [[ " $INSTALLED " == *" $last "* ]] && echo install ok installed'
APT_CACHE = '[[ " $PACKAGED " == *" $2 "* ]]'
RECORD = 'echo "$(basename "$0") $*" >>"$CALLS"'
APT_PACKAGES = "ca-certificates curl gcc git make"


@dataclass
class Machine:
    """A checkout and a PATH that holds nothing but what the script may use, stand-ins for the rest."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def fake(self, name: str, script: str, folder: str = "bin") -> None:
        path = self.folder / folder / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)

    def add_gpu(self, driver: str, header: str = "", sm: str = "9.0", names: str = "NVIDIA H200") -> None:
        self.fake("nvidia-smi", NVIDIA_SMI.format(driver=driver, header=header, sm=sm, names=names))

    def add_pci_device(self, vendor: str, kind: str) -> None:
        device = self.folder / "root/sys/bus/pci/devices/0000:01:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").write_text("")
        fixed = {
            "PATH": str(self.folder / "bin"), "FAKES": str(self.folder / "fakes"), "CALLS": str(self.folder / "calls"),
            "BOOTSTRAP_ROOT": str(self.folder / "root"), "HOME": str(self.folder), "INSTALLED": APT_PACKAGES,
            "PACKAGED": "python3", "PYPI_TORCH": "cu130", "FAIL_PIP": "",
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(self.checkout / "setup/bootstrap.sh"), *arguments], cwd=self.folder, text=True, timeout=60,
            env=fixed | self.environment | environment, capture_output=True, check=False,
        )  # fmt: skip

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().replace(str(self.checkout), "HERE").splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    for folder in ("bin", "fakes", "checkout/setup", "root/etc"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "setup/bootstrap.sh"):
        shutil.copy(ROOT / name, made.checkout / name)
    for name in TOOLS:
        tool = shutil.which(name)
        assert tool, name
        (tmp_path / "bin" / name).symlink_to(tool)
    # The Makefile names its shell by path, and a rule of it copies the stand-in.
    for name in ("cp", "basename"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    made.fake("id", "echo 0")
    made.fake("dpkg-query", DPKG_QUERY)
    made.fake("apt-cache", APT_CACHE)
    made.fake("python3.12", PYTHON)
    made.fake("venv-python", VENV_PYTHON, "fakes")
    for name in ("apt-get", "dpkg", "curl"):
        made.fake(name, RECORD)
    made.fake("sudo", 'echo "sudo $*" >>"$CALLS"')
    (tmp_path / "root/etc/os-release").write_text('ID=ubuntu\nVERSION_ID="24.04"\n')
    return made


def installed(calls: list[str]) -> list[str]:
    """The Debian packages that were installed."""
    return [name for call in calls if "install --yes" in call for name in call.split("recommends ")[1].split()]


# --- the decisions ----------------------------------------------------------------------------------------------------

LOCK_ONLY = ["-r HERE/requirements.lock"]


def from_index(build: str) -> list[str]:
    return [f"--extra-index-url {INDEXES}/{build} torch==2.13.0+{build}", "-r the lock"]


@pytest.mark.parametrize(
    "gpu, arguments, environment, toolkit, pip, build",
    [
        # What the driver runs, read from nvidia-smi's header.
        (("580.95.05", "CUDA Version: 13.0"), (), {}, "13-0", LOCK_ONLY, "cu130"),
        (("[N/A]", "CUDA UMD Version: 13.2"), (), {}, "13-0", LOCK_ONLY, "cu130"),
        (("570.86.10", "CUDA Version: 12.8"), (), {}, "12-8", from_index("cu126"), "cu126"),
        (("580.95.05", "CUDA Version: 13.0", "12.0"), (), {}, "13-0", LOCK_ONLY, "cu130"),
        (("575.51", "CUDA Version: 12.9"), (), {}, "12-8", from_index("cu126"), "cu126"),
        (("560.35", "CUDA Version: 12.6"), (), {}, "12-6", from_index("cu126"), "cu126"),
        # The header does not say: from the driver's own version.
        (("580.95.05", "CUDA Version: N/A"), (), {}, "13-0", LOCK_ONLY, "cu130"),
        (("570.86.10", ""), (), {}, "12-8", from_index("cu126"), "cu126"),
        # Nothing says: as 12.8.
        (("[N/A]", ""), (), {}, "12-8", from_index("cu126"), "cu126"),
        # What is asked for goes before what was found.
        (("580.95.05", "CUDA Version: 13.0"), ("--cuda-toolkit", "12.8"), {}, "12-8", LOCK_ONLY, "cu130"),
        (("580.95.05", "CUDA Version: 13.0"), ("--cuda-toolkit", "none"), {}, None, LOCK_ONLY, "cu130"),
        (("580.95.05", "CUDA Version: 13.0"), (), {"SKIP_CUDA_TOOLKIT": "1"}, None, LOCK_ONLY, "cu130"),
        (("580.1", "CUDA Version: 13.0"), (), {"TORCH_INDEX_URL": f"{INDEXES}/cpu"}, "13-0", from_index("cpu"), "cpu"),
        # Without a GPU.
        (None, (), {}, None, LOCK_ONLY, "cu130"),
        (None, (), {"TORCH_INDEX_URL": f"{INDEXES}/cpu/"}, None, from_index("cpu"), "cpu"),
        (None, ("--cuda-toolkit", "13.0"), {}, "13-0", LOCK_ONLY, "cu130"),
        # Only a mirror with torch's CPU build at hand.
        (None, (), {"PYPI_TORCH": "cpu"}, None, LOCK_ONLY, "cpu"),
        (("580.1", "CUDA Version: 13.0"), (), {"PYPI_TORCH": "cpu"}, "13-0", LOCK_ONLY + from_index("cu130"), "cu130"),
    ],
)  # fmt: skip
def test_toolkit_and_torch_for_the_driver(machine, gpu, arguments, environment, toolkit, pip, build):
    if gpu:
        machine.add_gpu(*gpu)
    done = machine.run(*arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = machine.calls()
    assert installed(calls) == ([f"cuda-toolkit-{toolkit}"] if toolkit else [])
    assert [call[4:] for call in calls if call.startswith("pip") and " -e ." not in call] == pip
    assert (machine.checkout / ".venv/torch").read_text().strip() == build
    assert ("need a driver of CUDA 13" in done.stdout) == (build == "cu126")
    assert done.stdout.splitlines()[-1] == f"source {machine.checkout}/.venv/bin/activate"


@pytest.mark.parametrize(
    "gpu, message",
    [
        (("535.54", "CUDA Version: 12.2"), r"the driver runs CUDA 12\.2; torch 2\.13\.0 is built for 13\.0 12\.6"),
        (("570.86", "CUDA Version: 12.8", "12.0"), r"NVIDIA H200 \(sm_120\) needs torch for CUDA 13\.0"),
    ],
)
def test_a_driver_that_no_build_of_torch_fits(machine, gpu, message):
    machine.add_gpu(*gpu)
    done = machine.run("--cuda-toolkit", "none")
    assert done.returncode == 1 and re.search(f"error: .*{message}", done.stdout)
    assert "580" in done.stdout and f"TORCH_INDEX_URL={INDEXES}/cpu" in done.stdout
    assert machine.calls() == [] and not (machine.checkout / ".venv").exists()
    assert "activate" not in done.stdout
    assert machine.run("--cuda-toolkit", "none", TORCH_INDEX_URL=f"{INDEXES}/cpu").returncode == 0


@pytest.mark.parametrize(
    "vendor, kind, found", [("0x10de", "0x030200", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)]
)
def test_a_gpu_without_a_driver_is_taken_as_12_8(machine, vendor, kind, found):
    machine.add_pci_device(vendor, kind)
    machine.fake("nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    done = machine.run()
    assert done.returncode == 0, done.stdout
    assert ("whose driver does not answer, CUDA unknown: taken as 12.8" in done.stdout) == found
    assert installed(machine.calls()) == (["cuda-toolkit-12-8"] if found else [])


def test_an_old_gpu_is_said(machine):
    machine.add_gpu("580.95", "CUDA Version: 13.0", sm="7.5", names="Tesla T4\nTesla T4")
    done = machine.run()
    assert "Tesla T4 is sm_75: the CUDA kernels need sm_80" in done.stdout


@pytest.mark.parametrize(
    "python, has, packaged, expected",
    [
        ("3.12", APT_PACKAGES, "", []),
        ("3.12", "git make", "", ["ca-certificates", "curl", "gcc"]),
        ("none", APT_PACKAGES, "python3 python3.12 python3.11", ["python3.12", "python3.12-venv", "python3.12-dev"]),
        ("none", APT_PACKAGES, "python3 python3.11", ["python3.11", "python3.11-venv", "python3.11-dev"]),
        ("bare", APT_PACKAGES, "python3", ["python3.12-venv", "python3.12-dev"]),
    ],
)
def test_packages_that_are_missing(machine, python, has, packaged, expected):
    if python == "none":
        (machine.folder / "bin/python3.12").unlink()
    if python == "bare":
        machine.fake("python3.12", PYTHON.replace(" || $2 == *ensurepip*", ""))
    machine.environment |= {"INSTALLED": has, "PACKAGED": packaged}
    machine.run()
    calls = machine.calls()
    assert installed(calls) == expected
    assert ("apt-get update" in calls) == bool(expected)
    machine.run(SKIP_SYSTEM_PACKAGES="1")
    assert not any("apt-get" in call for call in machine.calls())
    machine.run("--system", "none")
    assert not any("apt-get" in call for call in machine.calls())


def test_a_fresh_image_gets_its_list_of_packages_first(machine):
    (machine.folder / "bin/python3.12").unlink()
    machine.fake("apt-get", RECORD + '; [[ $1 != update ]] || touch "$HOME/updated"')
    machine.fake("apt-cache", "[[ -e $HOME/updated && $2 == python3* ]]")
    machine.run()
    assert machine.calls()[0] == "apt-get update"
    assert installed(machine.calls()) == ["python3.12", "python3.12-venv", "python3.12-dev"]


def test_no_fitting_python_is_said_before_and_by_make(machine):
    (machine.folder / "bin/python3.12").unlink()
    done = machine.run()
    assert done.returncode != 0
    assert (
        "warning: Python 3.11 or 3.12 is not here" in done.stdout and "error: needs Python 3.11 or 3.12" in done.stdout
    )


def test_root_by_sudo_or_not_at_all(machine):
    machine.fake("id", "echo 1000")
    machine.environment |= {"INSTALLED": "git make gcc curl"}
    assert machine.run().returncode == 0
    assert [call for call in machine.calls() if "apt" in call] == [
        "sudo apt-get update",
        "sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates",
    ]
    (machine.folder / "bin/sudo").unlink()
    done = machine.run()
    assert done.returncode == 1 and "error: apt-get needs root and sudo is not here" in done.stdout
    (machine.folder / "bin/apt-get").unlink()
    done = machine.run()
    assert done.returncode == 1 and "error: apt-get is not here: install ca-certificates" in done.stdout
    assert machine.run(SKIP_SYSTEM_PACKAGES="1").returncode == 0


@pytest.mark.parametrize(
    "release, repository",
    [
        ('ID=ubuntu\nVERSION_ID="22.04"', "ubuntu2204"),
        ('ID=debian\nVERSION_ID="12"', "debian12"),
        ('ID=fedora\nVERSION_ID="42"', None),
    ],
)
def test_nvidia_s_repository(machine, release, repository):
    (machine.folder / "root/etc/os-release").write_text(release)
    machine.add_gpu("580.95", "CUDA Version: 13.0")
    done = machine.run()
    fetched = [call for call in machine.calls() if call.startswith("curl")]
    if repository:
        assert f"/cuda/repos/{repository}/x86_64/cuda-keyring_1.1-1_all.deb" in fetched[0]
    else:
        assert done.returncode == 1 and "install CUDA 13.0 yourself, then set SKIP_CUDA_TOOLKIT=1" in done.stdout


# --- running again, and going wrong -----------------------------------------------------------------------------------


def test_running_again_does_nothing(machine):
    machine.add_gpu("580.95", "CUDA Version: 13.0")
    assert machine.run().returncode == 0
    nvcc = machine.folder / "root/usr/local/cuda-13.0/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    done = machine.run()
    assert done.returncode == 0 and "13.0, there already" in done.stdout
    assert machine.calls() == []


def test_a_cpu_build_is_replaced_where_there_is_a_gpu(machine):
    assert machine.run(TORCH_INDEX_URL=f"{INDEXES}/cpu").returncode == 0
    machine.add_gpu("580.95", "CUDA Version: 13.0")
    done = machine.run("--cuda-toolkit", "none")
    assert "has torch's cpu build: made anew with cu130" in done.stdout
    assert (machine.checkout / ".venv/torch").read_text() == "cu130\n"
    machine.run("--cuda-toolkit", "none")
    assert machine.calls() == []


def test_an_index_without_the_build_is_an_error(machine):
    machine.add_gpu("580.95", "CUDA Version: 13.0")
    done = machine.run("--cuda-toolkit", "none", PYPI_TORCH="cpu", INDEX_TORCH="cpu")
    assert done.returncode == 1 and "has torch's cpu build, wanted is cu130" in done.stdout


def test_a_failed_install_is_made_anew(machine):
    done = machine.run(FAIL_PIP="1")
    assert done.returncode != 0 and "activate" not in done.stdout
    assert not (machine.checkout / ".venv/installed").exists()
    assert machine.run().returncode == 0
    assert machine.calls()[0].startswith("venv")


def test_another_environment_and_lock(machine):
    lock = machine.folder / "other.lock"
    lock.write_text("numpy==2\ntorch==2.13.1\n")
    done = machine.run("--python-env", "env", "--lock", "other.lock", TORCH_INDEX_URL=f"{INDEXES}/cpu")
    assert done.returncode == 0, done.stdout
    assert f"pip --extra-index-url {INDEXES}/cpu torch==2.13.1+cpu" in machine.calls()
    assert done.stdout.splitlines()[-1] == f"source {machine.folder}/env/bin/activate"
    assert not (machine.checkout / ".venv").exists()


def test_an_environment_of_someone_else_is_not_cleared(machine):
    (machine.folder / "conda").mkdir()
    (machine.folder / "conda/kept").touch()
    done = machine.run("--python-env", "conda")
    assert done.returncode == 1 and "was not made by this script" in done.stderr
    assert (machine.folder / "conda/kept").exists() and machine.calls() == []


def test_dry_run_does_nothing_and_says_all(machine):
    machine.add_gpu("570.86", "CUDA Version: 12.8")
    done = machine.run("--dry-run", INSTALLED="git make")
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [] and not (machine.checkout / "logs").exists()
    assert not (machine.checkout / ".venv").exists()
    for expected in (
        "NVIDIA H200, CUDA 12.8", "ca-certificates curl gcc", "CUDA toolkit  12.8", "2.13.0, build cu126",
        "+ apt-get update", "cuda-toolkit-12-8", f"TORCH_INDEX_URL={INDEXES}/cu126 env",
    ):  # fmt: skip
        assert expected in done.stdout
    assert done.stdout.splitlines()[-1].startswith("source ")


def test_the_log_holds_what_was_printed(machine):
    done = machine.run()
    (log,) = (machine.checkout / "logs").iterdir()
    assert re.fullmatch(r"bootstrap_\d{8}-\d{6}\.log", log.name)
    assert done.stdout == log.read_text() + "".join(line + "\n" for line in done.stdout.splitlines()[-2:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--system", "some"), "--system 'some': should be auto or none"),
        (("--cuda-toolkit", "new"), "--cuda-toolkit 'new': should be auto, none or a version as 12.8"),
        (("--lock", "no.lock"), "--lock 'no.lock': no such file"),
        (("--lock", "calls"), "pins no torch (a line torch==VERSION)"),
        (("--python-env", "a b"), "paths must not contain spaces"),
        (("--python-env",), "--python-env needs a value"),
        (("--systems", "none"), "'--systems' is not an option; see --help"),
    ],
)
def test_wrong_arguments_are_named(machine, arguments, message):
    done = machine.run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert machine.calls() == []


def test_help_names_every_option_the_script_reads(machine):
    done = machine.run("--help")
    assert done.returncode == 0
    script = (ROOT / "setup/bootstrap.sh").read_text()
    read = set(re.findall(r"^ +(--[a-z-]+)\)", script, re.MULTILINE))
    assert read and all(option in done.stdout for option in read)
    for name in ("SKIP_SYSTEM_PACKAGES", "SKIP_CUDA_TOOLKIT", "TORCH_INDEX_URL"):
        assert name in done.stdout


def test_the_first_build_is_what_the_lock_resolves_to():
    """numba-cuda's toolkit, pinned in the lock, is of the CUDA version whose torch needs no index of its own."""
    script = (ROOT / "setup/bootstrap.sh").read_text()
    first = re.search(r"^TORCH_BUILDS=\((\S+)", script, re.MULTILINE)
    toolkit = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert first and toolkit and first[1] == toolkit[1]


@pytest.mark.parametrize("script", ["setup/bootstrap.sh", "setup/lock.sh"])
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{os.environ['PATH']}:{Path(sys.executable).parent}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
