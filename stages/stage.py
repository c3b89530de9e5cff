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
from stages.params import ParamsError, Week, list_choices, select

OUTPUTS = Path("outputs")


class StageError(RuntimeError):
    """A stage cannot do its work, or found what it checks to be wrong: reported on one line, exit status 1."""


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

    def find(self, path: str | Path) -> Path:
        """Where to read what the pipeline knows as `path`, a file or folder.

        By hand, what some stage last wrote by hand is taken where it is newer than the pipeline's own. Raises
        StageError where there is none.
        """
        places = [Path(path)]
        if self.by_hand:
            places += sorted(OUTPUTS.glob(f"*/{path}"))
        there = [place for place in places if place.exists()]
        if not there:
            raise StageError(f"{path} is not here: run the stage that makes it first (`dvc repro`, or by hand)")
        newest = max(there, key=lambda place: place.stat().st_mtime)
        if newest != Path(path):
            print(f"reads {newest}")
        return newest


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

    Exit status: 0; 1 for a StageError; 2 for a ParamsError. Both are one line on stderr. The function itself stays
    reachable as `__wrapped__`, the sections as `sections`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        name = Path(function.__code__.co_filename).stem

        @functools.wraps(function)
        def main(arguments: list[str] | None = None) -> None:
            arguments = sys.argv[1:] if arguments is None else arguments
            if {"-h", "--help"} & set(arguments):
                print(_usage(name, sections, options or {}, function))
                return
            try:
                run = Run(name, by_hand="DVC_STAGE" not in os.environ)
                given, rest = take_options(options or {}, arguments) if run.by_hand else ({}, arguments)
                function(run, *resolve(sections, rest, run.by_hand), **given)
            except ParamsError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            except StageError as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                sys.exit(1)

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
    return [select(section, params, weeks[0] if weeks else None) for section in sections]


def _usage(
    name: str, sections: tuple[type, ...], options: Mapping[str, Sequence[str]], function: Callable[..., None]
) -> str:
    about = (sys.modules[function.__module__].__doc__ or "").strip()
    lines = [f"python -m stages.{name} [key=value ...]", "", about, ""]
    declared = [section.__name__.lower() for section in sections]
    choices = {group: list_choices(group) for group in declared} | dict(options)
    return "\n".join(lines + [f"{name}={'|'.join(values)}" for name, values in choices.items() if values])
