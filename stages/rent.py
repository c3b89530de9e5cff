"""Rents the GPU of a `gpu` group, runs the experiment there and brings its measurements back.

    python -m stages.rent gpu=h200 workload=standard                               the plan; nothing is rented
    python -m stages.rent gpu=h200 workload=standard --max-hourly-cost 5 --yes     rents, runs, fetches, gives back

SkyPilot (the command `sky`, from an environment of its own) finds the cheapest offer of the clouds that `sky check`
shows. The task is setup/rent/task.yaml. What it measured lies under outputs/rent/<name>/, from where `python -m
stages.record` keeps it. The machine is given back whatever happens.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from stages.arguments import positive
from stages.compose import as_dict, compose_conf
from stages.exits import StageError
from stages.params import Gpu, ParamsError, select
from stages.stage import OUTPUTS, write_whole
from stages.validate import check_params

TASK = Path("setup/rent/task.yaml")
# What SkyPilot's catalogues call them; it takes the cheapest offer of any.
ACCELERATORS = {
    "a100_80g": ("A100-80GB", "A100-80GB-SXM"),
    "h100": ("H100", "H100-SXM"),
    "h200": ("H200", "H200-SXM"),
    "l40s": ("L40S",),
    "rtx4090": ("RTX4090",),
    "rtx5090": ("RTX5090",),
}
TRIES = 3


def make_task(overrides: Sequence[str], max_hourly_cost: float | None) -> dict[str, Any]:
    """The SkyPilot task that runs the experiment of `overrides`.

    Raises ParamsError for what `conf/` does not have and for a `gpu` group that is no GPU to rent.
    """
    for override in overrides:
        if "=" not in override or any(character.isspace() for character in override):
            raise ParamsError(f"'{override}' is not an override: say key=value, without spaces")
    params = as_dict(compose_conf(list(overrides)))
    check_params(params)
    gpu = select(Gpu, params, None)
    if gpu.name not in ACCELERATORS:
        raise ParamsError(f"gpu={gpu.name} is no GPU to rent; there are: {', '.join(ACCELERATORS)}")
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    task["resources"]["accelerators"] = {name: gpu.count for name in ACCELERATORS[gpu.name]}
    if max_hourly_cost is not None:
        task["resources"]["max_hourly_cost"] = max_hourly_cost
    task["envs"]["OVERRIDES"] = " ".join(overrides)
    task["name"] = f"afs-{gpu.name.replace('_', '-')}"
    return task


def list_commands(name: str, task: Path, folder: Path) -> dict[str, list[str]]:
    """Commands that are run here, in this order: launch, fetch (into `folder`), down."""
    wanted = [f"{name}:sky_workdir/./{path}" for path in ("reports/metrics", "data/host.json")]
    return {
        "launch": ["sky", "launch", "--yes", "--cluster", name, str(task)],
        "fetch": ["rsync", "--archive", "--relative", *wanted, f"{folder}/"],
        "down": ["sky", "down", "--yes", name],
    }


def rent(name: str, task: dict[str, Any], hours: float) -> Path:
    """Rents, runs, fetches and gives back; returns the folder of the results.

    What a failed experiment measured is fetched too. Raises StageError, after giving the machine back, where the
    experiment failed or took longer than `hours`, or the results could not be fetched.
    """
    for command in ("sky", "rsync"):
        if shutil.which(command) is None:
            raise StageError(f"`{command}` is not here: docs/setup.md, 'Renting a GPU', says how to install it")
    folder = OUTPUTS / "rent" / name
    part = folder.with_name(f".{name}.part")
    part.mkdir(parents=True)
    write_whole(part / "task.yaml", yaml.safe_dump(task, sort_keys=False))
    commands = list_commands(name, part / "task.yaml", part)
    try:
        with on_signals(lambda number, _: sys.exit(128 + number)):
            try:
                failure = "the experiment failed" if run(commands["launch"], timeout=hours * 3600) else ""
            except subprocess.TimeoutExpired:
                failure = f"the experiment was not done after {hours:g} hours"
            if any(run(commands["fetch"]) == 0 for _ in range(TRIES)):
                part.rename(folder)
    finally:
        with on_signals(signal.SIG_IGN):
            give_back(commands["down"])
        shutil.rmtree(part, ignore_errors=True)
    if not folder.exists():
        raise StageError(f"{name}: nothing could be fetched{failure and f'; {failure}'}")
    if failure:
        raise StageError(f"{name}: {failure}; what it measured before is in {folder}")
    return folder


@contextlib.contextmanager
def on_signals(action: Any) -> Iterator[None]:
    """Has `action` done, within the block, where this process is told to end; Ctrl-C raises as ever, or is ignored."""
    numbers = [signal.SIGTERM, signal.SIGHUP, *([signal.SIGINT] if action is signal.SIG_IGN else [])]
    before = {number: signal.signal(number, action) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: list[str], timeout: float | None = None) -> int:
    """The exit status of a command, which is shown first."""
    print(f"+ {shlex.join(command)}", flush=True)
    return subprocess.run(command, timeout=timeout, check=False).returncode


def give_back(command: list[str]) -> None:
    """Ends the rent, or says loudly that it could not."""
    if not any(run(command) == 0 for _ in range(TRIES)):
        print(f"error: THE MACHINE MAY STILL BE RENTED AND COST MONEY. Run: {shlex.join(command)}", file=sys.stderr)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m stages.rent", description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="the experiment: gpu=… and more, as of dvc exp run -S"
    )
    parser.add_argument("--yes", action="store_true", help="rent; without it the plan is printed")
    parser.add_argument(
        "--max-hourly-cost", type=positive, metavar="USD", help="take no offer above this; --yes needs it"
    )
    parser.add_argument("--hours", type=positive, default=4.0, help="give the machine back after this (default: 4)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Prints the plan, or with --yes carries it out. Exit status: 0; 1 where something failed; 2 for wrong input."""
    given = parse_arguments(arguments)
    try:
        task = make_task(given.overrides, given.max_hourly_cost)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = f"{task['name']}-{uuid.uuid4().hex[:6]}"
    limit = given.max_hourly_cost
    cost = limit and f"at most {given.hours:g} h of ${limit:g}: ${given.hours * limit:g}"
    if not given.yes:
        print(yaml.safe_dump(task, sort_keys=False))
        for command in list_commands(name, Path("task.yaml"), OUTPUTS / "rent" / name).values():
            print(f"+ {shlex.join(command)}")
        print(f"\nnothing was rented. To rent ({cost or 'say --max-hourly-cost'}): the same with --yes")
        return 0
    if limit is None:
        print("error: --yes needs --max-hourly-cost USD: what an hour may cost", file=sys.stderr)
        return 2
    print(f"rents {name}, {cost}", flush=True)
    try:
        folder = rent(name, task, given.hours)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    print(f"{folder}\nto keep it: python -m stages.record {folder / 'reports' / 'metrics'}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sys.exit(main(sys.argv[1:]))
