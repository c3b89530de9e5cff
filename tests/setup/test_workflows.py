"""The workflows: what they force to be measured, and what the comparison's step decides for what it finds."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTION = ROOT / ".github/actions/compare/action.yml"


def load(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true.
    return yaml.safe_load(re.sub(r"^on:", '"on":', path.read_text(), flags=re.MULTILINE))


def steps(path: Path) -> list[dict[str, Any]]:
    content = load(path)
    jobs = [content["runs"]] if "runs" in content else content["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def comparison(job: dict[str, Any]) -> dict[str, str]:
    (found,) = [step["with"] for step in job["steps"] if step.get("uses") == "./.github/actions/compare"]
    return found


def test_a_push_runs_the_gate_on_both_pythons_and_measures_anew():
    job = load(ROOT / ".github/workflows/ci.yml")["jobs"]["run"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert "bash .ci/run" in commands(job) and job["env"]["AFS_REMEASURE"] == "1"
    assert job["env"]["PYTHONS"] == "python${{ matrix.python }}"
    assert job["env"]["TORCH_INDEX_URL"].endswith("/cpu")
    assert "fail" not in comparison(job), "a hosted runner's noise is no reason to reject a push"


def test_every_night_measures_anew_on_a_hosted_cpu_and_a_gpu_of_one_s_own():
    workflow = load(ROOT / ".github/workflows/nightly.yml")
    assert "schedule" in workflow["on"] and workflow["env"]["AFS_REMEASURE"] == "1"
    cpu, gpu = workflow["jobs"]["cpu"], workflow["jobs"]["gpu"]
    assert "dvc repro --force" in commands(cpu) and "dvc exp run --force" in commands(gpu)
    assert "git config user.email" in commands(gpu), "dvc exp run refuses to run without an identity"
    assert gpu["runs-on"] == ["self-hosted", "gpu"] and gpu["if"] == "vars.GPU_RUNNER == 'true'"
    assert comparison(cpu)["fail"] == comparison(gpu)["fail"] == "true"
    assert comparison(cpu)["comment"] == comparison(gpu)["comment"] == "true"


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.stem)
def test_actions_are_given_what_they_take(path):
    declared = load(ACTION)["inputs"]
    for step in steps(path):
        used = step.get("uses", "")
        assert not used or used.startswith("./") or re.search(r"@v\d+$", used), used
        if used == "./.github/actions/compare":
            assert set(step["with"]) <= set(declared)
            assert {name for name, about in declared.items() if about.get("required")} <= set(step["with"])


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.stem)
def test_targets_and_modules_they_run_are_there(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps(path):
        script = step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", script)) <= targets
        for module in re.findall(r"-m (stages\.\w+)", script):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        for file in re.findall(r"bash (\S+)", script):
            assert (ROOT / file).exists()


def run_step(script: str, folder: Path, **environment: str) -> tuple[int, dict[str, str]]:
    """The exit status and the outputs of a step, run as GitHub runs it."""
    output = folder / "output"
    output.write_text("")
    fixed = {"PATH": os.environ["PATH"], "RUNNER_TEMP": str(folder), "GITHUB_OUTPUT": str(output)}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script], cwd=folder, check=False,
        env=fixed | {"GITHUB_STEP_SUMMARY": str(folder / "summary")} | environment,
    )  # fmt: skip
    return done.returncode, dict(line.split("=", 1) for line in output.read_text().splitlines())


@pytest.mark.parametrize(
    "earlier, text, status, expected",
    [
        (False, "", 0, (0, "0", "false")),
        (True, "## 0 worse, 0 better, 9 others", 0, (0, "0", "false")),
        (True, "## 0 worse, 2 better, 9 others", 0, (0, "0", "true")),
        (True, "## 1 worse, 0 better, 9 others", 1, (0, "1", "true")),
        (True, "", 2, (2, None, None)),
    ],
)
def test_what_the_comparison_leads_to(tmp_path, earlier, text, status, expected):
    (script,) = [step["run"] for step in steps(ACTION) if step.get("id") == "compare"]
    (tmp_path / ".earlier").mkdir()
    if earlier:
        (tmp_path / ".earlier/bench.parquet").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\necho "$*" >called\nprintf "{text}\\n"\nexit {status}\n')
    python.chmod(0o755)
    code, outputs = run_step(script, tmp_path, OLD=".earlier", FLOOR="0.25")
    assert (code, outputs.get("worse"), outputs.get("changed")) == expected
    if earlier:
        assert (tmp_path / "called").read_text() == "-m stages.compare .earlier reports/metrics --floor 0.25\n"
    if code == 0:
        assert Path(outputs["file"]).read_text() == (tmp_path / "summary").read_text()
        assert (text or "no earlier run") in (tmp_path / "summary").read_text()


def test_what_was_recorded_before_is_found_in_git(tmp_path):
    (script,) = [step["run"] for step in steps(ROOT / ".github/workflows/nightly.yml") if step.get("id") == "record"]
    folder = "reports/recorded/nvidia-h200/olmo2_tiny"
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "bench.parquet").write_text("old")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nmkdir -p "{folder}"\necho new >"{folder}/bench.parquet"\necho "{folder}"\n')
    python.chmod(0o755)
    assert run_step(script, tmp_path) == (0, {"folder": folder})
    assert (tmp_path / "before" / folder / "bench.parquet").read_text() == "old"
    # A GPU that was never recorded.
    python.write_text(python.read_text().replace("h200", "a100"))
    assert run_step(script, tmp_path)[0] == 0
    assert list((tmp_path / "before").iterdir()) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint(path):
    if not shutil.which("actionlint"):
        pytest.skip("actionlint is not installed")
    done = subprocess.run(["actionlint", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
