"""setup/Dockerfile and compose.yaml: what they copy and run exists, make finds the environment, the GPU is reserved."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "setup/Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def test_the_base_is_cuda_of_the_lock():
    version = re.search(r"^CUDA_VERSION=(\d+\.\d+)", of("ARG")[0])
    locked = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert version and locked and version[1] == locked[1]
    assert of("FROM") == ["nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04"]
    assert of("ARG")[1].endswith(f"/cu{locked[1].replace('.', '')}")


def test_bootstrap_takes_what_the_build_gives_it(tmp_path):
    """The command of the image, as a dry run."""
    (command,) = [run for run in of("RUN") if "bootstrap.sh" in run]
    arguments = re.search(r"setup/bootstrap\.sh (.*?) &&", command)
    assert arguments and "--system none --cuda-toolkit none" in arguments[1]
    index = of("ARG")[1].partition("=")[2]
    done = subprocess.run(
        ["bash", "-c", f"bash setup/bootstrap.sh --dry-run {arguments[1]}"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "AFS_VENV": str(tmp_path / "venv"), "TORCH_INDEX_URL": index}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"VENV={tmp_path}/venv" in done.stdout and "whl/cu130 env" in done.stdout


def test_the_environment_is_found_by_make_and_by_hand():
    environment = " ".join(of("ENV"))
    assert "AFS_VENV=/opt/venv" in environment and "PATH=/opt/venv/bin:$PATH" in environment
    done = subprocess.run(
        ["make", "-n", "-o", "/opt/venv/installed", "repro"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "AFS_VENV": "/opt/venv"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == 'PATH="/opt/venv/bin:$PATH" dvc repro'


def test_the_context_holds_what_the_build_needs():
    wanted = [line[1:] for line in (ROOT / "setup/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    assert all((ROOT / path).exists() for path in wanted)
    packages = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert packages and set(re.findall(r"\w+", packages[1])) <= set(wanted)
    assert {"Makefile", "pyproject.toml", "requirements.lock", "README.md", "setup/bootstrap.sh"} <= set(wanted)


def test_an_older_image_does_not_install_everything_again(tmp_path):
    """The entry point makes the environment newer than the mounted checkout, and runs its command as given."""
    command = yaml.safe_load(of("ENTRYPOINT")[0])
    done = subprocess.run(
        [*command, "printf", "%s|", "a b", "c"], env={"PATH": "/usr/bin:/bin", "AFS_VENV": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "a b|c|" and (tmp_path / "installed").exists()


def test_compose_reserves_the_gpu_and_mounts_the_workspace():
    composed = yaml.safe_load((ROOT / "setup/compose.yaml").read_text())
    service = composed["services"]["afs"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert (ROOT / "setup" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert set(service["build"]["args"]) <= {argument.partition("=")[0] for argument in of("ARG")}
    assert f"..:{service['working_dir']}" in service["volumes"] and of("WORKDIR") == [service["working_dir"]]
    assert {volume.partition(":")[0] for volume in service["volumes"]} - {".."} == set(composed["volumes"])


def test_hadolint():
    hadolint = shutil.which("hadolint", path=f"{os.environ['PATH']}:{Path(sys.executable).parent}")
    if not hadolint:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(ROOT / "setup/Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
