"""dvc.yaml against the code it runs, and what DVC does with it: run, skip, experiment, compare, go on after a kill."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.code import FOLDER, STAGES
from stages.params import SECTIONS, StagedModel, Week, list_choices

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stages", "engine", "kernels")
# What of the model decides a stage's result beyond the files that download's manifest covers.
MODEL_PARAMS = {"model.name"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


KINDS = ("outs", "metrics", "plots")


def pipeline() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def paths(stage: dict, *kinds: str) -> list[str]:
    """The paths of a stage's deps, outs, metrics or plots, whether plain or with flags."""
    entries = [entry for kind in kinds for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


# --- the file against the code ----------------------------------------------------------------------------------------


def stage_modules() -> dict[str, str]:
    """Stage → its module, of the stages that are run by name."""
    found = {name: re.findall(r"python -m (\S+)", str(stage["cmd"])) for name, stage in pipeline().items()}
    return {name: modules[0] for name, modules in found.items() if name != "train_tiny"}


def test_the_stages_are_there_in_order():
    assert list(pipeline()) == [
        "code", "provision", "download", "inventory", "baseline", "build", "parity", "bench", "report", "train_tiny",
    ]  # fmt: skip


def test_every_stage_depends_on_its_own_code_and_on_no_other():
    always = {name for name, stage in pipeline().items() if stage.get("always_changed")}
    assert set(STAGES) == set(stage_modules()) - always - {"code"}
    assert paths(pipeline()["code"], "outs") == [f"{FOLDER}/{name}.json" for name in STAGES]
    assert set(paths(pipeline()["code"], "deps")) == set(PACKAGES)
    for name, stage in pipeline().items():
        code = {dep for dep in paths(stage, "deps") if dep.split("/")[0] in PACKAGES or dep.startswith(f"{FOLDER}/")}
        if name in STAGES:
            # The report's templates are no Python.
            assert code - {"stages/report/templates"} == {f"{FOLDER}/{name}.json"}, name


def test_nothing_depends_on_a_file_that_says_which_commit_wrote_it():
    """A commit alone repeats nothing: Parquet's rows carry it, their JSON does not."""
    for name, stage in pipeline().items():
        parquet = {dep for dep in paths(stage, "deps") if dep.startswith("reports/") and dep.endswith(".parquet")}
        # bench@w01 shows the baseline's own rows, which only another baseline changes; the report is quickly made.
        assert name == "report" or parquet <= {"reports/metrics/baseline.parquet"}, name


def test_dependencies_exist_or_are_made():
    made = {out for stage in pipeline().values() for out in paths(stage, *KINDS)}
    made |= {out.replace("${item.week}", week) for out in made for week in list_choices("week")}
    for name, stage in pipeline().items():
        for dep in paths(stage, "deps"):
            assert dep in made or (ROOT / dep).exists(), f"dvc.yaml, {name}: nothing makes {dep}"


@pytest.mark.parametrize(
    "name", ["provision", "download", "inventory", "baseline", "build", "parity", "bench", "report"]
)
def test_params_are_what_the_stage_declares(name):
    declared = importlib.import_module(stage_modules()[name]).main.sections
    expected = set()
    for section in declared:
        if section is Week:
            expected.add("weeks.${item.week}")
        elif section is StagedModel:
            expected |= MODEL_PARAMS
        else:
            expected.add(SECTIONS[section])
    assert set(pipeline()[name].get("params", [])) == expected


def test_matrix_stages_run_every_week():
    for name in ("parity", "bench"):
        assert pipeline()[name]["matrix"] == {"week": list_choices("week")}
        assert pipeline()[name]["cmd"].endswith("week=${item.week}")


def test_the_report_reads_every_metrics_file_and_no_folder_of_them():
    made = {
        out.replace("${item.week}", week)
        for name, stage in pipeline().items()
        for out in paths(stage, "outs")
        if out.startswith("reports/metrics/") and out.endswith(".parquet")
        for week in list_choices("week")
    }
    deps = paths(pipeline()["report"], "deps")
    assert {dep for dep in deps if dep.startswith("reports/metrics")} == made


def test_what_measures_depends_on_the_host():
    for name in ("inventory", "baseline", "build", "parity", "bench"):
        assert "data/host.json" in paths(pipeline()[name], "deps")


def test_what_is_cached_is_ignored_by_git_and_the_rest_is_not():
    for stage in pipeline().values():
        for entry in stage.get("outs", []) + stage.get("metrics", []) + stage.get("plots", []):
            path = next(iter(paths({"outs": [entry]}, "outs"))).replace("${item.week}", "w01")
            in_git = isinstance(entry, dict) and next(iter(entry.values())).get("cache") is False
            ignored = subprocess.run(["git", "check-ignore", "-q", path], check=False).returncode == 0
            assert ignored != in_git, path


def test_nothing_turns_the_run_cache_off_but_the_report():
    for name, stage in pipeline().items():
        dicts = [out for out in stage.get("outs", []) if isinstance(out, dict)]
        uncached = [out for out in dicts if next(iter(out.values())).get("cache") is False]
        assert not uncached or name in ("report", "train_tiny"), (
            f"dvc.yaml, {name}: {uncached} under outs, not metrics or plots"
        )


def test_dvc_s_settings():
    config = (ROOT / ".dvc/config").read_text()
    for line in ("analytics = false", "check_update = false", "autostage = false", "enabled = true"):
        assert line in config


def test_what_always_runs_keeps_what_it_made_when_it_refuses():
    for name in ("provision", "download"):
        for entry in pipeline()[name]["outs"] + pipeline()[name].get("metrics", []):
            assert next(iter(entry.values())).get("persist") is True, f"dvc.yaml, {name}: {entry}"


def test_provision_runs_before_all_other_stages():
    """It refuses what is wrong before DVC takes away what another stage has made."""
    made = {path: name for name, stage in pipeline().items() for path in paths(stage, *KINDS)}
    needs = {name: {made.get(dep) for dep in paths(stage, "deps")} for name, stage in pipeline().items()}
    after = {"provision"}
    for _ in needs:
        after |= {name for name, before in needs.items() if before & after}
    assert after == set(needs) - {"code", "train_tiny"}


def test_only_provision_and_download_always_run():
    assert [name for name, stage in pipeline().items() if stage.get("always_changed")] == ["provision", "download"]
    assert [name for name, stage in pipeline().items() if stage.get("frozen")] == ["train_tiny"]


def read_hidden() -> str:
    """What `make experiments` hides."""
    found = re.search(r"^HIDDEN \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found[1]


# --- what DVC does with it --------------------------------------------------------------------------------------------

STUB = '''
"""Stands in for a stage: writes every output dvc.yaml declares, a function of params.yaml's gpu."""
import os, re, signal, sys, yaml
from pathlib import Path

name = Path(sys.argv[0]).stem
week = dict(argument.split("=") for argument in sys.argv[1:]).get("week", "")
if os.environ.get("REFUSE") == name:
    sys.exit(2)
params = yaml.safe_load(Path("params.yaml").read_text())
stage = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][name]
seed = len(params["gpu"]["name"]) if name not in ("code", "provision", "download") else 0
for entry in stage.get("outs", []) + stage.get("metrics", []) + stage.get("plots", []):
    path = entry if isinstance(entry, str) else next(iter(entry))
    path = Path(path.replace("${item.week}", week).replace("${model.name}", params["model"]["name"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        place = week if name == "bench" else name
        path.write_text('{"%s": {"decode_b1": {"ttft_ms": %d, "missing": null}}}' % (place, seed))
    elif path.suffix == ".csv":
        path.write_text("case,role,num_parameters,ttft_ms,tpot_ms,output_throughput\\nbatch 1,a,1,%d,2,3\\n" % seed)
    elif path.suffix:
        path.write_text(str(seed))
    else:
        path.mkdir(exist_ok=True)
        (path / "file").write_text(str(seed))
    if os.environ.get("KILL") == name:
        os.kill(os.getpid(), signal.SIGKILL)
'''


class Checkout:
    """A git repository with the project's dvc.yaml and conf/, stand-ins for its stages, and one week."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """stdout and stderr of a command in the repository, which has to succeed unless `check` is false."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        base = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))}
        done = subprocess.run(
            command, cwd=self.folder, env=base | {"PATH": path} | environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def ran(self, output: str) -> list[str]:
        return re.findall(r"^Running stage '(.+)':", output, re.MULTILINE)

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x")


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    folder = tmp_path / "checkout"
    (folder / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "conf", folder / "conf")
    text = (ROOT / "dvc.yaml").read_text()
    text = re.sub(r"week: \[.*\]", "week: [w04]", text)
    others = r"^ +(- )?reports/metrics/(parity|bench)_w(?!04)\d\d\.(parquet|csv: case)\n"
    text = re.sub(others, "", text, flags=re.MULTILINE)
    (folder / "dvc.yaml").write_text(text)
    for stage in yaml.safe_load(text)["stages"].values():
        for dep in paths(stage, "deps"):
            path = folder / dep
            if (
                dep.split("/")[0] in (*PACKAGES, "data", "tools")
                and "$" not in dep
                and path.suffix not in (".json", ".parquet")
            ):
                file = path if path.suffix else path / "file.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("")
    (folder / "stages").mkdir(exist_ok=True)
    for name in yaml.safe_load(text)["stages"]:
        (folder / f"stages/{name}.py").write_text(STUB)
    (folder / "reports/recorded").mkdir(parents=True)
    (folder / "reports/recorded/README.md").write_text("")
    made = Checkout(folder)
    made.run("git", "init", "-q", "-b", "main")
    made.run("git", "config", "user.name", "a")
    made.run("git", "config", "user.email", "a@b")
    made.commit()
    return made


@pytest.mark.slow
def test_run_skip_experiment_compare(checkout):
    every = [
        "code", "provision", "download", "inventory", "baseline", "build", "parity@w04", "bench@w04", "report",
    ]  # fmt: skip
    assert sorted(checkout.ran(checkout.run("dvc", "repro"))) == sorted(every)
    checkout.commit()

    again = checkout.run("dvc", "repro")
    assert checkout.ran(again) == ["provision", "download"]
    assert checkout.run("git", "status", "--porcelain") == ""

    experiment = checkout.run("dvc", "exp", "run", "-S", "gpu=rtx5090")
    assert {"baseline", "build", "parity@w04", "bench@w04", "report"} <= set(checkout.ran(experiment))
    params = yaml.safe_load((checkout.folder / "params.yaml").read_text())
    assert params["gpu"]["name"] == "rtx5090" and params["gpu"]["sm"] == "sm_120"

    difference = checkout.run("dvc", "metrics", "diff", "main")
    assert re.search(r"bench_w04\.json\s+w04\.decode_b1\.ttft_ms\s+4\s+7\s+3", difference), difference
    assert "file://" in checkout.run("dvc", "plots", "diff")
    page = (checkout.folder / "dvc_plots/index.html").read_text()
    assert "Time to first token" in page and "batch 1" in page
    shown = checkout.run("dvc", "exp", "show", "--csv", "--only-changed", "--drop", read_hidden())
    assert "rtx5090" in shown and "w04.decode_b1.ttft_ms" in shown and "parquet" not in shown and "gpu.sm" not in shown

    # Going back to what was measured before restores it.
    back = checkout.run("dvc", "exp", "run")
    assert checkout.ran(back) == ["provision", "download", "report"], back
    assert '"ttft_ms": 4' in (checkout.folder / "reports/metrics/bench_w04.json").read_text()


@pytest.mark.slow
def test_a_killed_stage_is_run_again_and_a_fresh_clone_just_runs(checkout, tmp_path):
    killed = checkout.run("dvc", "repro", check=False, KILL="baseline")
    assert "failed to reproduce 'baseline'" in killed
    ran = checkout.ran(checkout.run("dvc", "repro"))
    assert "inventory" not in ran and {"baseline", "bench@w04", "report"} <= set(ran)
    checkout.commit()

    checkout.run("git", "clone", "-q", ".", str(tmp_path / "clone"))
    clone = Checkout(tmp_path / "clone")
    clone.run("dvc", "repro")
    assert (clone.folder / "reports/metrics/bench_w04.parquet").exists()


@pytest.mark.slow
def test_what_provision_refuses_costs_nothing(checkout):
    checkout.run("dvc", "repro")
    made = {path for path in checkout.folder.glob("*/**/*") if path.is_file() and ".dvc" not in path.parts}
    params = checkout.folder / "params.yaml"
    params.write_text(params.read_text().replace("repeats: 3", "repeats: 0"))
    refused = checkout.run("dvc", "repro", check=False, REFUSE="provision")
    assert checkout.ran(refused) == ["provision"], refused
    assert [path for path in made if not path.exists()] == []


def test_an_unknown_name_is_refused_before_anything_runs(checkout):
    output = checkout.run("dvc", "exp", "run", "-S", "gpu=rtx6090", check=False)
    assert checkout.ran(output) == []
    assert "rtx6090" in output and "rtx5090" in output
    assert checkout.run("git", "status", "--porcelain") == ""
