"""The typed sections of params.yaml: what a stage can declare, and the strict reading of it.

Each section is one group of `conf/` (`gpu`, `model`, `workload`) or one week of `weeks`. Unknown, missing and mistyped
keys are refused by name; what a stage gets is resolved and read-only.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

CONF = Path("conf")
PARAMS = Path("params.yaml")

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ParamsError(ValueError):
    """The parameters are wrong: found before any work, reported on one line, exit status 2."""


def freeze(value: Any) -> Any:
    """A read-only copy of nested dicts (mapping proxies) and lists (tuples)."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: freeze(item) for key, item in value.items()})
    return tuple(freeze(item) for item in value) if isinstance(value, list | tuple) else value


def thaw(value: Any) -> Any:
    """The plain dicts and lists of what `freeze` made, for JSON."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, list | tuple) else value


ReadOnly = Annotated[Mapping[str, Any], AfterValidator(freeze)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def _ordered(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError("should be the least, then the most")
    return ends


Span = Annotated[tuple[Count, Count], AfterValidator(_ordered)]
"""The least and the most of something, both included."""


@dataclass(frozen=True, config=STRICT)
class Gpu:
    """The GPU that is wanted, by its datasheet; null for `auto` (what there is) and `cpu` (none, even if there is)."""

    name: Name
    sm: Annotated[str, Field(pattern=r"^sm_\d+a?$")] | None
    memory_gb: Positive | None
    bandwidth_gbs: Positive | None
    """GB/s (10^9 bytes) of one GPU's memory."""
    bf16_tflops: Positive | None
    """Dense bf16 with fp32 accumulation, without sparsity, of one GPU."""
    count: Annotated[int, Field(ge=0)] | None


@dataclass(frozen=True, config=STRICT)
class Model:
    """A model and where its weights come from."""

    name: Name
    hub_id: str | None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    """The commit on the hub, 40 hexadecimal digits; a branch name would not pin anything."""
    weights: Literal["hub", "path", "bundled", "random"]
    path: str | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    force: bool
    architecture: ReadOnly
    """The fields of config.json."""


class StagedModel(Model):
    """The model as a stage declares it that reads what download has staged: nothing of it counts but its name."""


@dataclass(frozen=True, config=STRICT)
class Engine:
    """Switches of a week's engine: `engine.llm.EngineConfig` with `auto` for what depends on the host."""

    backend: Literal["auto", "reference", "cuda"]
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["bfloat16", "float16", "float32"]
    attention: Literal["naive", "flash"]
    linear: Literal["naive", "streamed", "tiled"]
    sampling: Literal["naive", "split"]
    kv_cache: Literal["none", "contiguous", "paged"]
    page_size: Literal[8, 16, 32, 64, 128]
    kv_tokens: Count | None
    """Tokens that a paged cache has room for; null is what max_batch requests take, or the GPU's memory has."""
    prefix_cache: bool
    cuda_graph: bool
    batching: Literal["inflight", "continuous"]
    max_batch: Count
    max_step_tokens: Count
    max_model_len: Count | None
    """Tokens of prompt and answer together; null is the model's own maximum."""

    def __post_init__(self) -> None:
        if self.cuda_graph and self.kv_cache == "none":
            raise ValueError("cuda_graph = True needs kv_cache = contiguous or paged, not none")

    def settings(self, gpu: bool, max_positions: int) -> dict[str, Any]:
        """`EngineConfig`'s arguments on a host with or without a GPU, for a model of `max_positions` positions."""
        fields = dataclasses.asdict(self)
        if self.device == "auto":
            fields["device"] = "cuda" if gpu else "cpu"
        if self.backend == "auto":
            fields["backend"] = "cuda" if fields["device"] == "cuda" else "reference"
        if self.max_model_len is None:
            fields["max_model_len"] = max_positions
        return fields


@dataclass(frozen=True, config=STRICT)
class Week:
    """One week: a configuration of the same code, what is checked of it and what is measured of it."""

    name: Name
    title: str
    milestone: str
    engine: Engine | None
    parity: tuple[str, ...]
    bench: tuple[str, ...]


@dataclass(frozen=True, config=STRICT)
class Weeks:
    """All weeks, in order, for a stage that joins them."""

    weeks: dict[str, Week]


@dataclass(frozen=True, config=STRICT)
class Requests:
    """Requests of random tokens: lengths are random.Random(seed).randint of `prompt_tokens`, one after another."""

    count: Count
    prompt_tokens: Span
    """The shortest and the longest that may be drawn."""
    new_tokens: Count
    seed: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class SharedPrefix:
    """Requests whose prompts begin with the same tokens."""

    count: Count
    prefix_tokens: Count
    own_tokens: Span
    """The least and the most that a prompt has of its own, after the prefix."""
    new_tokens: Count


@dataclass(frozen=True, config=STRICT)
class Load:
    """How `requests` come to a server, a run for each."""

    clients: tuple[Count, ...]
    """So many at a time, the next when one is done."""
    rates: tuple[Positive, ...]
    """So many a second, whether or not the others are done."""


@dataclass(frozen=True, config=STRICT)
class Workload:
    """Prompts and requests that are generated when something is measured or compared."""

    name: Name
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    prompt_tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    new_tokens: Count
    repeats: Count
    warmup: Annotated[int, Field(ge=0)]
    requests: Requests
    shared_prefix: SharedPrefix
    load: Load


Section = TypeVar("Section")
SECTIONS: dict[type, str] = {
    Gpu: "gpu", Model: "model", StagedModel: "model", Workload: "workload", Week: "week", Weeks: "weeks",
}  # fmt: skip
TOP = ("gpu", "model", "workload", "weeks")
"""The keys of params.yaml."""


def list_choices(group: str) -> list[str]:
    """The names a group of `conf/` offers; none where there is no `conf/`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def check_choice(group: str, value: object) -> None:
    """Raises ParamsError naming `value` and the choices unless `conf/<group>/<value>.yaml` exists."""
    choices = list_choices(group)
    if value not in choices:
        raise ParamsError(f"unknown {group} '{value}'; there are: {', '.join(choices)}")


def parse(section: type[Section], value: Any, where: str) -> Section:
    """`value` (plain dicts and lists) as the frozen dataclass `section`.

    Raises ParamsError naming each unknown, missing or mistyped key by its full path under `where`.
    """
    if strange := _find_strange(value, where):
        raise ParamsError(f"{strange[0]} = {strange[1]}: should be a number, text, true, false, null, list or section")
    try:
        # JSON's strictness: a list may become a tuple, but neither "8" a number nor 1 a truth value.
        return TypeAdapter(section).validate_json(json.dumps(value))
    except ValidationError as error:
        raise ParamsError("; ".join(_explain(item, where) for item in error.errors() if _is_told(item))) from None


def _find_strange(value: Any, where: str) -> tuple[str, Any] | None:
    """The first value, with its key, that YAML has and JSON has not: a date, a set, bytes."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return next(filter(None, (_find_strange(item, f"{where}.{key}") for key, item in items)), None)
    return None if value is None or isinstance(value, str | bool | int | float) else (where, value)


def _is_told(error: Any) -> bool:
    """Whether an error is one of its own: a list whose wrong items were left out is not too short for that."""
    return error["type"] != "too_short" or len(error["input"]) == error["ctx"]["actual_length"]


def _explain(error: Any, where: str) -> str:
    key = ".".join([where, *(str(part) for part in error["loc"])])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    said = error["msg"].removeprefix("Value error, ")
    # A rule of the whole section names its keys itself, and its input is all of them.
    given = "" if isinstance(error["input"], Mapping) or error["type"] == "dataclass_type" else f" = {error['input']!r}"
    if error["type"] == "dataclass_type":
        return f"{key} = {error['input']!r}: should be a section of keys"
    return f"{key}{given}: {said[0].lower()}{said[1:]}"


def select_all(sections: Sequence[type], params: Mapping[str, Any], week: str | None) -> list[Any]:
    """The sections of composed `params`, as `select` gives each.

    Raises ParamsError with all that is wrong with them, and for a key that is no section.
    """
    selected, wrong = (
        [],
        [f"{key} = {params[key]!r}: unknown key; there are {', '.join(TOP)}" for key in params if key not in TOP],
    )
    for section in sections:
        try:
            selected.append(select(section, params, week))
        except ParamsError as error:
            wrong.append(str(error))
    if wrong:
        raise ParamsError("; ".join(wrong))
    return selected


def select(section: type, params: Mapping[str, Any], week: str | None) -> Any:
    """The section of composed `params`; `week` names the one a `Week` is.

    Raises ParamsError for a missing section, an unknown name, and what `parse` refuses.
    """
    if section in (Week, Weeks):
        weeks = params.get("weeks")
        if not isinstance(weeks, Mapping) or not weeks:
            raise ParamsError(
                f"weeks = {weeks!r}: should hold a section for each week"
                if "weeks" in params
                else "weeks is missing from the parameters"
            )
        if section is Weeks:
            return Weeks({name: select(Week, params, name) for name in weeks})
        if week is None:
            raise ParamsError(f"which week? say week=NAME with one of: {', '.join(weeks)}")
        if week not in weeks:
            raise ParamsError(f"unknown week '{week}'; there are: {', '.join(weeks)}")
        return _named(parse(Week, weeks[week], f"weeks.{week}"), week, f"weeks.{week}")
    group = SECTIONS[section]
    if group not in params:
        raise ParamsError(f"{group} is missing from the parameters")
    parsed = parse(Model if section is StagedModel else section, params[group], group)
    check_choice(group, parsed.name)
    return parsed


def _named(week: Week, name: str, where: str) -> Week:
    if week.name != name:
        raise ParamsError(f"{where}.name = '{week.name}': should be '{name}'")
    return week
