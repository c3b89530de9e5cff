"""The decorator that makes a function a stage of the pipeline.

    @stage(Gpu, Model, Week)
    def main(run: Run, gpu: Gpu, model: Model, week: Week) -> None: ...

    if __name__ == "__main__":
        main()

Run by DVC (`DVC_STAGE` is set) a stage reads params.yaml, which is what `dvc exp run -S` changes, and writes the
pipeline's own paths. Run by hand, `python -m stages.bench week=w03 model=olmo2_tiny`, it composes `conf/` with the
command line's overrides and writes under `outputs/<stage>/`, which git ignores. Either way it gets only the sections it
declared, typed and read-only.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.compose import as_dict, compose_conf, read_params
from stages.exits import StageError, is_full, reported
from stages.params import SECTIONS, ParamsError, StagedModel, Week, list_choices, select_all

OUTPUTS = Path("outputs")
HF = Path("data/hf")
"""Where download stages checkpoints."""


@dataclass(frozen=True)
class Run:
    """One run of a stage: where it reads and writes. Paths are the pipeline's, relative to the working directory."""

    stage: str
    by_hand: bool = False

    def out(self, path: str | Path) -> Path:
        """Where to write the pipeline's `path`: itself, or by hand `outputs/<stage>/<path>`. Makes its folder."""
        path = OUTPUTS / self.stage / path if self.by_hand else Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def find(self, path: str | Path, last: str | Path | None = None) -> Path:
        """Where to read what the pipeline knows as `path`, a file or folder.

        By hand, what some stage last wrote by hand is taken where it is newer than the pipeline's own. `last` is what
        is written after all of a folder: where it is not, the folder is not whole, and its time is the folder's. Raises
        StageError where there is none.
        """
        roots = [Path(), *(sorted(OUTPUTS.glob("*/")) if self.by_hand else [])]
        there = [root for root in roots if (root / path).exists() and (root / (last or path)).exists()]
        if not there:
            half = next((root / path for root in roots if (root / path).exists()), None)
            what = f"{half} is not whole" if half else f"{path} is not here"
            raise StageError(f"{what}: run the stage that makes it first (`dvc repro`, or by hand)")
        newest = max(there, key=lambda root: (root / (last or path)).stat().st_mtime) / path
        if newest != Path(path):
            print(f"reads {newest}")
        return newest

    def find_snapshot(self, model: str) -> Path:
        """The folder of the checkpoint that download has staged of `model`. Raises StageError."""
        return self.find(f"{HF}/hf_snapshot/{model}", last=f"{HF}/{model}.manifest.json")


def cache_folder(name: str) -> Path:
    """The folder of this name under $AFS_CACHE (default ~/.cache/afs), where stages keep what outlives a checkout.

    Raises StageError where it cannot be made or written.
    """
    folder = Path(os.environ.get("AFS_CACHE") or Path.home() / ".cache" / "afs") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if is_full(error):
            raise
        raise StageError(
            f"{folder} cannot be written ({error.strerror}): set AFS_CACHE to a folder that can be"
        ) from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes `path` beside its place and renames it: a reader, or a killed run, never leaves or sees half of it."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def stage(
    *sections: type, options: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes `function(run, *sections)` an entry point without arguments that reads them, runs it and exits.

    By hand the command line may also give each of `options`, which are no parameters, one of its values: a keyword
    argument of `function`, to do something else with the same sections.

    Errors end in one line, as `reported` has it. The function itself stays reachable as `__wrapped__`, the sections as
    `sections`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        file = Path(function.__code__.co_filename)
        name = file.parent.name if file.stem == "__init__" else file.stem

        @functools.wraps(function)
        def main(arguments: list[str] | None = None) -> None:
            arguments = sys.argv[1:] if arguments is None else arguments
            if {"-h", "--help"} & set(arguments):
                print(_usage(name, sections, options or {}, function))
                return
            with reported(name):
                run = Run(name, by_hand="DVC_STAGE" not in os.environ)
                given, rest = take_options(options or {}, arguments) if run.by_hand else ({}, arguments)
                function(run, *resolve(sections, rest, run.by_hand), **given)

        main.sections = sections  # type: ignore[attr-defined]
        return main

    return decorate


def take_options(options: Mapping[str, Sequence[str]], arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options among `arguments`, and the others. Raises ParamsError."""
    given: dict[str, str] = {}
    rest = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in options:
            rest.append(argument)
        elif name in given:
            raise ParamsError(f"one {name} at a time, not {given[name]}, {value}")
        elif value not in options[name]:
            raise ParamsError(f"{name} = '{value}': should be one of {', '.join(options[name])}")
        else:
            given[name] = value
    return given, rest


def resolve(sections: tuple[type, ...], arguments: list[str], by_hand: bool) -> list[Any]:
    """The declared sections: params.yaml's under DVC, by hand `conf/` with `arguments`. Raises ParamsError."""
    weeks = [argument.partition("=")[2] for argument in arguments if argument.startswith("week=")]
    overrides = [argument for argument in arguments if not argument.startswith("week=")]
    if len(weeks) > 1:
        raise ParamsError(f"one week at a time, not {', '.join(weeks)}")
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ParamsError(f"'{override}' is not an override: say key=value")
    if overrides and not by_hand:
        raise ParamsError(
            f"'{overrides[0]}' given to a stage run by DVC: params.yaml decides there; use `dvc exp run -S`"
        )
    if weeks and Week not in sections:
        raise ParamsError("this stage takes no week")
    if overrides and not sections:
        raise ParamsError(f"'{overrides[0]}' given to a stage without parameters")
    if not sections:
        return []
    params = as_dict(compose_conf(overrides)) if by_hand else read_params()
    selected = select_all(sections, params, weeks[0] if weeks else None)
    for override in overrides:
        check_used(override, sections, weeks[0] if weeks else None)
    return selected


def check_used(override: str, sections: Sequence[type], week: str | None) -> None:
    """Raises ParamsError for an override of what a stage of these sections does not read."""
    key = override.partition("=")[0].lstrip("+~").rpartition("@")[2]
    top, _, rest = key.partition(".")
    read = sorted({"weeks" if section is Week else SECTIONS[section] for section in sections})
    if top not in read:
        raise ParamsError(f"'{override}' changes nothing here: this stage reads {', '.join(read)}")
    if rest and top == "model" and StagedModel in sections:
        raise ParamsError(
            f"'{override}' changes nothing here: this stage takes the model as it was staged, by its name alone; say "
            f"model=NAME, and give {key} to stages.download"
        )
    if Week in sections and top == "weeks" and rest.partition(".")[0] != week:
        raise ParamsError(f"'{override}' changes nothing here: this is week {week}")


def _usage(
    name: str, sections: tuple[type, ...], options: Mapping[str, Sequence[str]], function: Callable[..., None]
) -> str:
    about = (sys.modules[function.__module__].__doc__ or "").strip()
    lines = [f"python -m stages.{name} [key=value ...]", "", about, ""]
    declared = [section.__name__.lower() for section in sections]
    choices = {group: list_choices(group) for group in declared} | dict(options)
    return "\n".join(lines + [f"{name}={'|'.join(values)}" for name, values in choices.items() if values])
