"""`afs quantize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.options import DEFAULT_MODEL, one_line_errors

if TYPE_CHECKING:
    from engine.model.quant.recipe import Recipe

BUNDLED_TEXT = Path(DEFAULT_MODEL, "calibration.txt")


@one_line_errors
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint folder of 16 bits, or its name on the hub.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, which does not exist yet.")],
    method: Annotated[str, typer.Option(help="rtn, gptq, awq, nf4 or autoround.")] = "autoround",
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or -1 for all of a row.")
    ] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Give every group a zero point of its own.")] = False,
    form: Annotated[
        str | None,
        typer.Option("--format", help="compressed-tensors (default) or gptq; nf4 is always stored as bitsandbytes."),
    ] = None,
    order: Annotated[
        str, typer.Option(help="Of columns, by gptq: groups, none, or columns (with --format gptq alone).")
    ] = "groups",
    calibration: Annotated[
        Path | None,
        typer.Option(help=f"Text, or a folder of it, to calibrate on. Default: {BUNDLED_TEXT}, code and its docs."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of the text, at most.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 2048,
    steps: Annotated[int, typer.Option(help="Gradient steps for a layer, by autoround.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of which sequences are taken.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is a GPU.")] = None,
) -> None:
    """Make a checkpoint of 4-bit weights, which this engine, transformers and vLLM load.

    One layer at a time is in memory. A run that was ended goes on where it was when the same command is given again;
    what it was made with is in OUT/quantization.json.
    """
    import torch

    from engine.model.config import ModelConfig
    from engine.model.hub import find_model
    from engine.model.quant.quantise import quantise
    from engine.model.quant.recipe import Recipe
    from engine.runtime.progress import progress

    recipe = Recipe(
        method=method,  # type: ignore[arg-type]
        group_size=group_size,
        symmetric=not asymmetric,
        form=form or ("bitsandbytes" if method == "nf4" else "compressed-tensors"),  # type: ignore[arg-type]
        order=order,  # type: ignore[arg-type]
        samples=samples,
        length=length,
        steps=steps,
        seed=seed,
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    directory = find_model(model)
    tokens = _tokens(directory, calibration, recipe)
    layers = ModelConfig.from_file(directory).num_hidden_layers
    with progress(f"{method}, layers", layers) as done:
        quantise(directory, out, recipe, tokens, device, done)
    typer.echo(f"{out}: {_size(out)}")


def _tokens(directory: Path, calibration: Path | None, recipe: "Recipe") -> list[int] | None:
    """Of the calibration text, in the model's own vocabulary, texts apart by its end of sequence."""
    if not recipe.calibrates:
        if calibration is not None:
            raise ValueError(f"method = {recipe.method!r} takes no calibration text; leave --calibration out")
        return None
    from engine.model.quant.calibration import read_texts
    from engine.text.tokenizer import Tokenizer

    path = calibration or BUNDLED_TEXT
    if calibration is None and not path.exists():
        raise ValueError(
            f"{path} is not in {Path.cwd()}: run this in the folder of the repository, or give --calibration"
        )
    tokenizer = Tokenizer(directory)
    tokens: list[int] = []
    for text in read_texts(path):
        tokens += [*tokenizer.encode(text), *tokenizer.eos_ids]
    return tokens


def _size(out: Path) -> str:
    from engine.model.safetensors import read_index

    stored = sum(entry.nbytes for entry in read_index(out).values())
    return f"{stored:,} bytes of weights"
