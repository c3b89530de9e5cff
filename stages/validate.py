"""Faults of a whole configuration: names, suites, and what one section must know of another.

`stages.params` holds what each section knows of itself. Provision, which runs before all other stages, asks both; so
does whatever takes a configuration elsewhere (`stages.pack`, `stages.rent`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from engine.model.config import ModelConfig
from kernels.architectures import ARCHITECTURES
from stages.bench.suite import Suite
from stages.bench.suites import SUITES
from stages.params import CONF, Gpu, Model, ParamsError, Week, Weeks, Workload, list_choices, parse, select_all, thaw
from stages.parity.check import Check
from stages.parity.checks import CHECKS
from stages.sources import make_source, read_architecture

Suites = Mapping[str, Check | Suite]


def check_params(params: Mapping[str, Any]) -> None:
    """Raises ParamsError, in one line, with all that is wrong with composed parameters."""
    check(*select_all((Gpu, Model, Weeks, Workload), params, None))


def check(gpu: Gpu, model: Model, weeks: Weeks, workload: Workload) -> None:
    """Raises ParamsError, in one line, with all that is wrong with sections that are right each for itself."""
    wrong = [*check_gpu(gpu), *check_model(model), *check_workload(workload)]
    with contextlib.suppress(ParamsError):  # check_model has said so
        wrong += check_lengths(read_architecture(model), weeks, workload)
    wrong += check_weeks(weeks)
    if wrong:
        raise ParamsError("; ".join(wrong))


def check_gpu(gpu: Gpu) -> Iterator[str]:
    """Say what is wrong with the name of a GPU and its datasheet."""
    if renamed := find_renamed(gpu, [field.name for field in dataclasses.fields(gpu) if field.name != "name"]):
        yield renamed
        return
    datasheet = read_choice(gpu)
    for field, told in dataclasses.asdict(datasheet).items():
        given = getattr(gpu, field)
        if given is None and told is not None:
            yield f"gpu.{field} = null: should be given of gpu={gpu.name}, whose datasheet says {told}"
        if given is not None and told is None:
            yield f"gpu.{field} = {given!r}: should be null with gpu={gpu.name}"
    if gpu.sm is not None and gpu.sm not in ARCHITECTURES:
        yield f"gpu.sm = {gpu.sm!r}: should be one of {', '.join(ARCHITECTURES)}"


def check_model(model: Model) -> Iterator[str]:
    """Say what is wrong with a model's name and with where its weights come from."""
    if renamed := find_renamed(model, ["architecture"]):
        yield renamed
    for read in (read_architecture, functools.partial(make_source, gpu=False)):
        try:
            read(model)
        except ParamsError as error:
            yield str(error)


def check_workload(workload: Workload) -> Iterator[str]:
    """Say what is wrong with a workload's name."""
    if renamed := find_renamed(workload, [f.name for f in dataclasses.fields(workload) if f.name != "name"]):
        yield renamed


def read_choice(section: Any, name: str | None = None) -> Any:
    """The section as `conf/` has it under its own name, or another."""
    group = type(section).__name__.lower()
    path = CONF / group / f"{name or section.name}.yaml"
    return parse(type(section), yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def find_renamed(section: Any, fields: Iterable[str]) -> str | None:
    """Says so where `fields` of a section are those of another choice of its group than its name tells."""
    group = type(section).__name__.lower()

    def content(of: Any) -> list[Any]:
        return [thaw(getattr(of, field)) for field in fields]

    if content(section) == content(read_choice(section)):
        return None
    for other in list_choices(group):
        if content(section) == content(read_choice(section, other)):
            return (
                f"{group}.name = {section.name!r}: should be {other!r}, which the rest of the section is; to have the "
                f"other one say {group}={section.name}"
            )
    return None


def check_weeks(weeks: Weeks) -> Iterator[str]:
    """Say what is wrong with the names of the weeks and of their suites."""
    known = list_choices("week")
    for name in [name for name in weeks.weeks if name not in known]:
        yield f"weeks.{name}: unknown week; there are: {', '.join(known)}"
    for name in [name for name in known if name not in weeks.weeks]:
        yield f"weeks.{name} is missing from the parameters"
    for week in weeks.weeks.values():
        yield from check_suites(week, "parity", week.parity, CHECKS)
        yield from check_suites(week, "bench", week.bench, SUITES)


def check_suites(week: Week, kind: str, names: tuple[str, ...], known: Suites) -> Iterator[str]:
    """Say what is wrong with a week's list of suites."""
    for index, name in enumerate(names):
        key = f"weeks.{week.name}.{kind}.{index} = {name!r}"
        if name not in known:
            yield f"{key}: unknown suite; there are: {', '.join(known)}"
        elif name in names[:index]:
            yield f"{key}: is there twice"
        elif known[name].needs_engine and week.engine is None:
            yield f"{key}: needs an engine, and weeks.{week.name}.engine is null"


def check_lengths(config: ModelConfig, weeks: Weeks, workload: Workload) -> Iterator[str]:
    """Find what is longer than the model has positions, or an engine's cache has room."""
    positions = config.max_position_embeddings
    if workload.new_tokens >= positions:
        yield f"workload.new_tokens = {workload.new_tokens}: should be below the model's {positions} positions"
    for week in weeks.weeks.values():
        if (engine := week.engine) is None:
            continue
        longest, where = engine.max_model_len or positions, f"weeks.{week.name}.engine"
        if longest > positions:
            yield f"{where}.max_model_len = {longest}: should be at most the model's {positions} positions"
        room = engine.kv_tokens and -(-engine.kv_tokens // engine.page_size) * engine.page_size
        if engine.kv_cache == "paged" and room is not None and room < longest:
            yield (
                f"{where}.kv_tokens = {engine.kv_tokens}: should be room for a request of {longest} tokens; raise it "
                f"or lower {where}.max_model_len"
            )
