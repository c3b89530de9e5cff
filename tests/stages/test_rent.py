"""Renting: the plan; nothing without a yes and a price; the machine is given back whatever happens."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stages import rent
from stages.compose import as_dict, compose_conf
from stages.params import Gpu, ParamsError, list_choices, select

ROOT = Path(__file__).resolve().parents[2]
YES = ("gpu=h200", "--yes", "--max-hourly-cost", "5")
# Stand-ins that write what they are called with; $FAIL names the ones that fail, as `sky launch`.
SKY = """#!/bin/bash
echo "sky $*" >>calls
[[ $1 != launch ]] || cp "${@: -1}" launched.yaml
[[ $1 != "$SLOW" ]] || { touch started; exec sleep 30; }
[[ $FAIL != *"sky $1"* ]]
"""
RSYNC = """#!/bin/bash
echo "rsync $*" >>calls
[[ $FAIL != *rsync* ]] || exit 1
target=${@: -1}
mkdir -p "$target/reports/metrics" "$target/data"
touch "$target/reports/metrics/baseline.parquet" "$target/data/host.json"
"""


@pytest.fixture
def fakes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace with the task and stand-ins for sky and rsync."""
    shutil.copytree(ROOT / "setup/rent", "setup/rent")
    (workspace / "bin").mkdir()
    for name, script in (("sky", SKY), ("rsync", RSYNC)):
        (workspace / "bin" / name).write_text(script)
        (workspace / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{workspace / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", "")
    monkeypatch.setenv("SLOW", "")
    (workspace / "calls").touch()
    return workspace


def calls(folder: Path) -> list[str]:
    """The commands, by their first words."""
    return [
        " ".join(line.split()[: 2 if line.startswith("sky") else 1])
        for line in (folder / "calls").read_text().splitlines()
    ]


def test_every_gpu_group_can_be_rented():
    rentable = {
        name for name in list_choices("gpu") if select(Gpu, as_dict(compose_conf([f"gpu={name}"])), None).count
    }  # fmt: skip
    assert set(rent.ACCELERATORS) == rentable


def test_the_task_is_the_group_s(fakes):
    task = rent.make_task(["gpu=a100_80g", "workload=standard", "workload.repeats=3"], 2.5)
    assert task["name"] == "afs-a100-80g"
    assert task["resources"]["accelerators"] == {"A100-80GB": 1, "A100-80GB-SXM": 1}
    assert task["resources"]["max_hourly_cost"] == 2.5
    assert task["resources"]["autostop"] == {"idle_minutes": 10, "down": True}
    assert task["envs"] == {"OVERRIDES": "gpu=a100_80g workload=standard workload.repeats=3"}
    assert rent.make_task(["gpu=a100_80g", "gpu.count=4"], None)["resources"]["accelerators"]["A100-80GB"] == 4


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["gpu=auto"], "gpu=auto is no GPU to rent; there are: a100_80g"),
        (["workload=standard"], "gpu=auto is no GPU"),
        (["gpu=h900"], "unknown gpu 'h900'"),
        (["gpu=h200", "model=gpt"], "unknown model 'gpt'"),
        (["gpu=h200", "workload.repeats=x"], "workload.repeats"),
        (["gpu=h200", "weeks.w05.bench=[pears]"], "weeks.w05.bench.0 = 'pears'"),
        (["h200"], "'h200' is not an override"),
        (["gpu=h200", "model.path=a b"], "without spaces"),
    ],
)
def test_wrong_overrides_are_named_before_anything_is_rented(fakes, capsys, overrides, message):
    with pytest.raises(ParamsError, match=message):
        rent.make_task(overrides, None)
    assert rent.main([*overrides, "--yes", "--max-hourly-cost", "1"]) == 2
    assert message in capsys.readouterr().err and calls(fakes) == []


def test_the_task_does_what_it_says(fakes, tmp_path):
    """Its shell code, with stand-ins for make and dvc."""
    task = rent.make_task(["gpu=h200", "workload=standard"], None)
    assert "git config --global user.email" in task["setup"], "dvc exp run refuses to run without an identity"
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/activate").touch()
    for name in ("make", "dvc"):
        (fakes / "bin" / name).write_text(
            f'#!/bin/bash\necho "{name} $* $AFS_REMEASURE" >>calls; [[ $FAIL != {name} ]]\n'
        )
        (fakes / "bin" / name).chmod(0o755)
    subprocess.run(["bash", "-c", task["run"]], env=os.environ | task["envs"], check=True)
    assert (fakes / "calls").read_text() == (
        "make test-gpu \ndvc exp run --force -S gpu=h200 -S workload=standard 1\n"
    )  # fmt: skip
    for failing in ("make", "dvc"):
        environment = os.environ | task["envs"] | {"FAIL": failing}
        assert subprocess.run(["bash", "-c", task["run"]], env=environment, check=False).returncode != 0


def test_without_a_yes_and_a_price_nothing_is_rented(fakes, capsys):
    assert rent.main(["gpu=h200", "--max-hourly-cost", "5", "--hours", "2"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was rented" in shown and "at most 2 h of $5: $10" in shown
    assert "H200: 1" in shown and "+ sky launch" in shown and "+ sky down" in shown
    assert rent.main(["gpu=h200", "--yes"]) == 2
    assert "--yes needs --max-hourly-cost" in capsys.readouterr().err
    for wrong in ("0", "-1", "x", "inf", "nan"):
        with pytest.raises(SystemExit):
            rent.main(["gpu=h200", "--yes", "--max-hourly-cost", wrong])
    assert calls(fakes) == [] and not Path("outputs").exists()


def test_rents_runs_fetches_and_gives_back(fakes, capsys):
    assert rent.main([*YES, "workload=standard"]) == 0
    assert calls(fakes) == ["sky launch", "rsync", "sky down"]
    task = yaml.safe_load(Path("launched.yaml").read_text())
    assert task["envs"]["OVERRIDES"] == "gpu=h200 workload=standard" and task["resources"]["max_hourly_cost"] == 5
    (folder,) = Path("outputs/rent").iterdir()
    assert (folder / "reports/metrics/baseline.parquet").exists() and (folder / "data/host.json").exists()
    assert f"python -m stages.record {folder}/reports/metrics" in capsys.readouterr().out
    names = {line.split()[-1] if "down" in line else line.split()[4] for line in
             (fakes / "calls").read_text().splitlines() if line.startswith("sky")}  # fmt: skip
    assert names == {folder.name}


@pytest.mark.parametrize(
    "fail, expected, message",
    [
        ("sky launch", ["sky launch", "rsync", "sky down"], "failed; what it measured before is in outputs/rent/"),
        ("rsync", ["sky launch", *["rsync"] * 3, "sky down"], "nothing could be fetched"),
        ("sky launch rsync", ["sky launch", *["rsync"] * 3, "sky down"], "be fetched; the experiment failed"),
        ("sky down", ["sky launch", "rsync", *["sky down"] * 3], "THE MACHINE MAY STILL BE RENTED"),
    ],
)  # fmt: skip
def test_gives_back_after_a_failure(fakes, monkeypatch, capsys, fail, expected, message):
    monkeypatch.setenv("FAIL", fail)
    assert rent.main([*YES]) == (0 if fail == "sky down" else 1)
    assert calls(fakes) == expected
    assert message in capsys.readouterr().err
    assert bool(list(Path("outputs/rent").iterdir())) == ("rsync" not in fail)


def test_gives_back_after_too_long(fakes, monkeypatch, capsys):
    monkeypatch.setenv("SLOW", "launch")
    assert rent.main([*YES, "--hours", "0.0001"]) == 1
    assert calls(fakes)[-1] == "sky down"
    assert "was not done after 0.0001 hours" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_gives_back_when_it_is_told_to_end(fakes, number):
    environment = os.environ | {"SLOW": "launch", "PYTHONPATH": str(ROOT)}
    # A shell's background job, as CI may be, ignores SIGINT, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-m", "stages.rent", *YES], env=environment, cwd=fakes, preexec_fn=heed)
    try:
        for _ in range(200):
            if Path("started").exists():
                break
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=20) != 0
    finally:
        process.kill()
    assert calls(fakes)[-1] == "sky down"
    assert list(Path("outputs/rent").iterdir()) == []


def test_says_what_is_missing(fakes, monkeypatch, capsys):
    (fakes / "bin/sky").unlink()
    monkeypatch.setenv("PATH", str(fakes / "bin"))
    assert rent.main([*YES]) == 1
    assert "`sky` is not here: docs/setup.md" in capsys.readouterr().err
    assert calls(fakes) == []
