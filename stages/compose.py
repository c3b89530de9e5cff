"""Composes `conf/` with Hydra.

`python -m stages.compose` writes params.yaml (`make params`), `--check` compares it, `--show key=value …` prints what
these overrides compose to and says what is wrong with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stages.exits import reported
from stages.params import CONF, PARAMS, Gpu, Model, ParamsError, Weeks, Workload, check_choice, select_all

if TYPE_CHECKING:
    from omegaconf import DictConfig

GROUPS = ("gpu", "model", "workload")


def compose_conf(overrides: list[str] | None = None) -> DictConfig:
    """`conf/config.yaml` of the working directory with Hydra `overrides`, resolved and read-only.

    No run directory, no change of directory, no logging. Raises ParamsError on one line for an unknown choice or key
    and for a group file that lacks `name:` or says another name than its own.
    """
    # Hydra takes a third of a second to import, and a stage run by DVC needs none of it.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    if not (CONF / "config.yaml").is_file():
        raise ParamsError(f"{CONF}/config.yaml is not here: run from the repository's root")
    for override in overrides or []:
        group, _, value = override.partition("=")
        if group in GROUPS:
            check_choice(group, value)
        group, _, key = group.lstrip("+").partition(".")
        if group in GROUPS and key == "name":
            raise ParamsError(f"'{override}' would rename what another {group} is made of: say {group}={value}")
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base=None):
            composed = compose("config", overrides=overrides or [], return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        with open_dict(composed):
            del composed["hydra"]
        OmegaConf.resolve(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ParamsError(" ".join(str(error).split())) from None
    for group, choice in choices.items():
        key = group.partition("@")[2] or group
        if key.startswith("hydra"):
            continue
        name = OmegaConf.select(composed, f"{key}.name")
        file = CONF / group.partition("@")[0] / f"{choice}.yaml"
        if name is None:
            raise ParamsError(f"{file} has no `name:`")
        if name != choice:
            raise ParamsError(f"{file} says `name: {name}`; it should be `{choice}`")
    OmegaConf.set_readonly(composed, True)
    return composed


def as_dict(composed: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain dicts and lists."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def dump(composed: DictConfig) -> str:
    """The text of params.yaml, the same that `dvc exp run` writes."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(composed)


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """params.yaml as plain dicts and lists; ParamsError where it is absent or not YAML."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} is not here: run from the repository's root, `make params` writes it") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise ParamsError(f"{path} holds no sections")
    return params


def main(arguments: list[str]) -> int:
    """Writes params.yaml. With `--check` returns 1 and names the remedy where it is not what `conf/` composes to; with
    `--show` prints what `conf/` and the overrides after it compose to. Wrong parameters: one line, 2."""
    command, overrides = (arguments or [""])[0], arguments[1:]
    if command not in ("", "--check", "--show") or (overrides and command != "--show"):
        print("usage: python -m stages.compose [--check | --show [key=value ...]]", file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    try:
        composed = compose_conf(overrides)
        if command == "--show":
            print(dump(composed), end="", flush=True)
        select_all((Gpu, Model, Workload, Weeks), as_dict(composed), None)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if command == "--show":
        return 0
    text = dump(composed)
    current = PARAMS.read_text(encoding="utf-8") if PARAMS.exists() else None
    if command == "--check":
        if current != text:
            print(f"error: {PARAMS} is not what {CONF}/ composes to; run `make params`", file=sys.stderr)
        return int(current != text)
    if current != text:
        PARAMS.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    with reported("compose"):
        sys.exit(main(sys.argv[1:]))
