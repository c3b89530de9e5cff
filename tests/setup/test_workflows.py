"""The workflows: what they measure, what they hand to the comparison, what may write, and what is pinned."""

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
    return [step for job in jobs for step in job.get("steps", [])]


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
    assert comparison(job)["keep"] == "${{ github.ref_name == github.event.repository.default_branch }}"


def test_every_night_measures_anew_on_a_hosted_cpu_and_a_gpu_of_one_s_own():
    workflow = load(ROOT / ".github/workflows/nightly.yml")
    assert "schedule" in workflow["on"] and workflow["env"]["AFS_REMEASURE"] == "1"
    cpu, gpu = workflow["jobs"]["cpu"], workflow["jobs"]["gpu"]
    assert "dvc repro --force" in commands(cpu) and "dvc exp run --force" in commands(gpu)
    assert "git config user.email" in commands(gpu), "dvc exp run refuses to run without an identity"
    assert gpu["runs-on"] == ["self-hosted", "gpu"] and gpu["if"] == "vars.GPU_RUNNER == 'true'"
    assert comparison(cpu)["fail"] == comparison(gpu)["fail"] == "true"
    assert comparison(cpu)["keep"] == comparison(gpu)["keep"] == "true"
    assert comparison(cpu)["comment"] != comparison(gpu)["comment"]
    assert "anchor" not in comparison(cpu) and "steps.record.outputs.folder" in comparison(gpu)["anchor"]


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.stem)
def test_actions_are_given_what_they_take(path):
    declared = load(ACTION)["inputs"]
    for step in steps(path):
        used = step.get("uses", "")
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


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_and_say_of_which_version(path):
    for used in re.findall(r"uses: (.*)", path.read_text()):
        assert used.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), used


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.stem)
def test_nothing_is_pasted_into_a_script(path):
    """What someone else may have written comes by the environment."""
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step
        # Unquoted it would be split, and match names of files.
        assert not re.search(r"(in|=|<<<) *\$[A-Z_]+\b(?!\")", step.get("run", "")), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_only_the_comment_may_write_and_it_runs_nothing_of_the_repository(path):
    workflow = load(path)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for name, job in workflow["jobs"].items():
        if path.stem == "comment" or name == "comment":
            assert job["permissions"] == {"contents": "write"}
            assert not any("checkout" in step.get("uses", "") for step in job.get("steps", []))
        else:
            assert "permissions" not in job
        for step in job.get("steps", []):
            if "actions/checkout@" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_what_is_kept_is_a_job_s_own_and_each_attempt_s():
    """A push keeps nothing that the night is compared with, and an attempt does not look for its own file."""
    (host,) = [step for step in steps(ACTION) if step.get("id") == "host"]
    assert host["env"]["JOB"] == "${{ github.workflow }}-${{ github.job }}" and "$JOB" in host["run"]
    restore, save = [step["with"] for step in steps(ACTION) if "actions/cache/" in step.get("uses", "")]
    assert restore["key"] == save["key"]
    assert restore["key"].endswith("${{ github.run_id }}-${{ github.run_attempt }}")
    assert restore["path"] == save["path"] == ".kept"
    assert restore["restore-keys"] == "${{ steps.host.outputs.key }}"


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ({}, ""),
        ({"KEEP": "true"}, " --keep"),
        ({"KEEP": "true", "ACCEPT": "true"}, " --accept"),
        ({"KEEP": "false", "ANCHOR": "/t/be fore"}, " --anchor /t/be fore"),
    ],
)
def test_what_the_comparison_is_asked(tmp_path, inputs, options):
    (script,) = [step["run"] for step in steps(ACTION) if step.get("id") == "compare"]
    make_python(tmp_path, 'echo "$*" >called; echo "# Beside" >comparison.md; echo worse=true; echo kept=false')
    environment = {"FLOOR": "0.25", "ANCHOR": "", "KEEP": "", "ACCEPT": "", "GITHUB_RUN_ID": "7"} | inputs
    assert run_step(script, tmp_path, **environment) == (0, {"worse": "true", "kept": "false"})
    called = "-m stages.kept judge .kept reports/metrics --run 7 --floor 0.25 --summary comparison.md"
    assert (tmp_path / "called").read_text() == f"{called}{options}\n"
    assert (tmp_path / "summary").read_text() == "# Beside\n"


def test_a_comparison_that_fails_is_no_verdict(tmp_path):
    (script,) = [step["run"] for step in steps(ACTION) if step.get("id") == "compare"]
    make_python(tmp_path, "exit 2")
    environment = {"FLOOR": "0.25", "ANCHOR": "", "KEEP": "true", "ACCEPT": "", "GITHUB_RUN_ID": "7"}
    assert run_step(script, tmp_path, **environment) == (2, {})
    (script,) = [step["run"] for step in steps(ACTION) if step.get("id") == "host"]
    assert run_step(script, tmp_path, JOB="nightly-cpu") == (2, {})
    make_python(tmp_path, "echo 3.12-0123456789ab")
    assert run_step(script, tmp_path, JOB="nightly-cpu") == (0, {"key": "kept-nightly-cpu-3.12-0123456789ab-"})


def make_python(folder: Path, script: str, name: str = "python") -> None:
    """A stand-in for a command of the environment."""
    command = folder / ".venv/bin" / name
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(f"#!/bin/bash\n{script}\n")
    command.chmod(0o755)


@pytest.mark.parametrize("file", [".github/workflows/nightly.yml", "setup/rent/task.yaml"])
def test_overrides_are_split_at_spaces_and_match_no_files(tmp_path, file):
    if file.endswith("task.yaml"):
        script = yaml.safe_load((ROOT / file).read_text())["run"].replace("make test-gpu", "")
    else:
        (script,) = [step["run"] for step in steps(ROOT / file) if step.get("name") == "measure"]
    make_python(tmp_path, 'printf "%s\\n" "$@" >called', "dvc")
    (tmp_path / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"')
    (tmp_path / "workload.batch_sizes=1").touch()  # what the pattern below matches
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    overrides = "model=olmo2_tiny  workload.batch_sizes=[1,8] $(touch evil)"
    assert run_step(script, tmp_path, OVERRIDES=overrides)[0] == 0
    given = (tmp_path / "called").read_text().split("\n")[:-1]
    words = ["model=olmo2_tiny", "workload.batch_sizes=[1,8]", "$(touch", "evil)"]
    assert given == ["exp", "run", "--force", *(part for word in words for part in ("-S", word))]
    assert not (tmp_path / "evil").exists()


def test_what_was_recorded_before_is_found_in_git(tmp_path):
    (script,) = [step["run"] for step in steps(ROOT / ".github/workflows/nightly.yml") if step.get("id") == "record"]
    folder = "reports/recorded/nvidia-h200/olmo2_tiny"
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "bench.parquet").write_text("old")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    script_of = f'mkdir -p "{folder}"\necho new >"{folder}/bench.parquet"\necho "{folder}"'
    make_python(tmp_path, script_of)
    assert run_step(script, tmp_path) == (0, {"folder": folder})
    assert (tmp_path / "before" / folder / "bench.parquet").read_text() == "old"
    # A GPU that was never recorded.
    make_python(tmp_path, script_of.replace("h200", "a100"))
    assert run_step(script, tmp_path)[0] == 0
    assert list((tmp_path / "before").iterdir()) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint(path):
    if not shutil.which("actionlint"):
        pytest.skip("actionlint is not installed")
    done = subprocess.run(["actionlint", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
