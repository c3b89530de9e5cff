"""Options that commands share, and how an error ends a command."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

DEFAULT_MODEL = "data/models/olmo2-tiny"
F = TypeVar("F", bound=Callable[..., None])

_MODEL_HELP = (
    "Checkpoint folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub where there is no such folder. "
    f"Default: {DEFAULT_MODEL}, which comes with the repository."
)
ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
MeasuredArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"{_MODEL_HELP} With --weights random a config.json, or a file of conf/model/, will do.",
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.")]
BackendOption = Annotated[str, typer.Option(help="cuda (our kernels), reference (torch), or auto: cuda on a GPU.")]
DtypeOption = Annotated[
    str,
    typer.Option(help="bfloat16, float16, float32, or auto: float16 where the checkpoint is stored so, else bfloat16."),
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="paged, contiguous, or none: the whole text again at every token. Default: paged where it can."),
]
LengthOption = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer; default: the model's.")]
NewTokensOption = Annotated[int, typer.Option(help="Most tokens to generate.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the most likely token each time.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 = all.")]
TopPOption = Annotated[float, typer.Option(help="Keep the most likely tokens that make up this probability.")]
MinPOption = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 makes tokens already in the text less likely.")]
WeightsOption = Annotated[str, typer.Option(help="checkpoint or random.")]
FormatOption = Annotated[str, typer.Option("--format", help="table, json, csv or markdown.")]
CountOption = Annotated[int, typer.Option(help="Requests of a run.")]
PromptTokensOption = Annotated[str, typer.Option(help="Random tokens of each prompt: 512, or 32-1024 for any from to.")]
AskedOption = Annotated[int | None, typer.Option(help="Tokens to generate; default: 128, with --sharegpt as many as "
                                                      "the answer has.")]  # fmt: skip
PrefixOption = Annotated[int, typer.Option(help="Tokens that all prompts begin with, before their own.")]
ShareGptOption = Annotated[Path | None, typer.Option(help="Take prompts from this JSON file, not random tokens.")]
LoadSeedOption = Annotated[int, typer.Option(help="Of lengths, tokens and arrivals.")]
RateOption = Annotated[str, typer.Option(help="Requests a second, as 1,2,4 for a run each; inf is all at once.")]
ArrivalsOption = Annotated[str, typer.Option(help="poisson, or fixed: one every 1/rate seconds.")]
SeedOption = Annotated[int | None, typer.Option(help="Repeats the same draw; default: a fresh one.")]


def one_line_errors(command: F) -> F:
    """Turn what the user got wrong, or the machine lacks, into one line on stderr and exit status 2."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader of stdout has gone; the command line library ends quietly
            raise
        except (ValueError, ArithmeticError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            typer.echo("error: " + " ".join((str(error) or type(error).__name__).split()), err=True)
            raise typer.Exit(2) from None

    return wrapper  # type: ignore[return-value]


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def one_model(argument: str | None, option: str | None) -> str:
    """The model that the user names by either, or the default one."""
    if argument is not None and option is not None and argument != option:
        raise ValueError(f"MODEL is {argument!r} and --model is {option!r}; give one of them")
    name = argument if argument is not None else option
    if name is None and not Path(DEFAULT_MODEL).exists():
        raise ValueError(
            f"no model is named, and the default, {DEFAULT_MODEL}, is not in {Path.cwd()}: run this in the folder of "
            "the repository, which it comes with, or name a folder or a hub id as allenai/OLMo-2-0425-1B-Instruct"
        )
    return DEFAULT_MODEL if name is None else name


def check_format(form: str) -> None:
    from engine.bench.workloads import FORMATS

    if form not in FORMATS:
        raise ValueError(f"format = {form!r}; it must be one of {', '.join(FORMATS)}")


def numbers(name: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} = {text!r}; it must be positive integers with commas between them")
    return [int(part) for part in parts]
