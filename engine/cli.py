"""The command `afs`: generate, chat, serve, build, check-gpu, inspect, bench latency, bench throughput, bench serve.

Heavy modules are imported inside the commands, so that `afs --help` answers at once.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.engine_config import EngineConfig
    from engine.llm import LLM, Completion
    from engine.sampling import SamplingParams
    from engine.tokenizer import Tokenizer

app = typer.Typer(
    help="Run and look at language models with the from-scratch engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure the engine on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")
SERVED_STEP_TOKENS = 2048  # of a server's passes: longer ones keep those waiting that decode
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


def _one_line_errors(command: F) -> F:
    """What the user got wrong, or the machine lacks, is one line on stderr and exit status 2."""

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


def _one_model(argument: str | None, option: str | None) -> str:
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


def _load(
    model: str, backend: str, dtype: str, kv_cache: str | None, max_model_len: int | None, max_batch: int = 1
) -> "LLM":
    from engine.llm import LLM, EngineConfig

    engine = EngineConfig.for_machine(
        backend, dtype=dtype, kv_cache=kv_cache or "auto", max_batch=max_batch, max_model_len=max_model_len
    )
    return LLM(model, engine)


def _print_stream(pieces: Iterator[str]) -> "Completion":
    """Write pieces to stdout as they come; the finished completion."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            sys.stdout.write("\n")
            sys.stdout.flush()
            return end.value
        sys.stdout.write(piece)
        sys.stdout.flush()


def _print_timing(done: "Completion") -> None:
    rest = done.itl_ms
    speed = f", then {1e3 * len(rest) / sum(rest):.1f} tokens/s" if rest else ""
    typer.echo(
        f"{len(done.prompt_token_ids)} prompt tokens, first token after {done.ttft_ms:.0f} ms{speed}; "
        f"{len(done.token_ids)} tokens in {done.e2e_ms:.0f} ms, ended by {done.finish_reason}",
        err=True,
    )


@app.command()
@_one_line_errors
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    argument: ModelArgument = None,
    model: ModelOption = None,
    max_new_tokens: NewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at end-of-sequence tokens.")] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache: CacheOption = None,
    max_model_len: LengthOption = None,
) -> None:
    """Continue a text: the continuation goes to stdout as it is generated, a line of timings to stderr."""
    from engine.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    llm = _load(_one_model(argument, model), backend, dtype, kv_cache, max_model_len)
    _print_timing(_print_stream(llm.stream(prompt, params)))


@app.command()
@_one_line_errors
def chat(
    argument: ModelArgument = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="A system message that opens the conversation.")] = None,
    max_new_tokens: NewTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: LengthOption = None,
) -> None:
    """Talk with a model that has a chat template. An empty line is skipped; end with Ctrl-D or /exit."""
    from engine.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    llm = _load(_one_model(argument, model), backend, dtype, None, max_model_len)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        done = _reply(llm, messages, params)
        messages.append({"role": "assistant", "content": done.text})
        _print_timing(done)


def _reply(llm: "LLM", messages: list[dict[str, Any]], params: "SamplingParams") -> "Completion":
    if llm.tokenizer is None:
        raise ValueError("this model has no tokenizer.json")
    prompt = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return _print_stream(llm.stream(llm.tokenizer.encode(prompt, add_special_tokens=False), params))


@app.command()
@_one_line_errors
def serve(
    argument: ModelArgument = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback, set an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one; the log says which.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the model in the API; may be given more than once. Default: the folder's, or the hub id."
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="AFS_API_KEY", help="Key that requests must bring.")] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.")] = 1024,
    max_model_len: LengthOption = None,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of one forward pass; longer prompts take several. Default: 256 on a CPU, else 2048."),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in the KV cache; default: what a GPU's memory has room for, on a CPU 1 GiB."),
    ] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take.")] = None,
    max_body: Annotated[int, typer.Option(help="Bytes that a request's body may have.")] = 8 * 2**20,
    grace: Annotated[float, typer.Option(help="Seconds that requests have to end in when the server is to stop.")] = 30,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Site whose pages may ask; may be given more than once.")
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Names under which the server may be asked, as example.com or *.example.com, separated by commas; "
            "against pages that give their own name to this address. May be given more than once. Default: any."
        ),
    ] = None,
    keep_alive: Annotated[
        float, typer.Option(help="Seconds that a connection stays open without a request; longer than a proxy's.")
    ] = 75,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[
        str, typer.Option(help="json, text, or auto: text where stderr is a terminal, else json.")
    ] = "auto",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "checkpoint",
) -> None:
    """Serve a model over OpenAI's API, with a page to chat with it at /. Ends on Ctrl-C or SIGTERM."""
    from engine.hub import model_name
    from engine.llm import EngineConfig
    from engine.server.app import Settings
    from engine.server.serve import serve as run

    name = _one_model(argument, model)
    settings = Settings(
        models=tuple(served_model_name or [model_name(name)]),
        api_key=api_key,
        max_waiting=max_waiting,
        max_body=max_body,
        request_timeout=request_timeout,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(name for names in allowed_hosts or () for name in names.split(",")),
        keep_alive=keep_alive,
        log_prompts=log_prompts,
    )
    engine = EngineConfig.for_machine(
        backend,
        dtype=dtype,
        kv_tokens=kv_tokens,
        max_batch=max_batch,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
    )
    if max_step_tokens is None:
        engine = dataclasses.replace(engine, max_step_tokens=min(SERVED_STEP_TOKENS, engine.step_tokens))
    run(lambda: _make(name, weights, engine), settings, host, port, grace, log_level, log_format)


@app.command()
@_one_line_errors
def build(
    argument: ModelArgument = None,
    model: ModelOption = None,
    arch: Annotated[
        str | None, typer.Option(help="Architectures, as sm_90a,sm_120. Default: this machine's GPU's, or all.")
    ] = None,
    multiprocessors: Annotated[
        int | None,
        typer.Option(help="Of the GPU, where it is another than the usual one; products are tiled by them.", min=1),
    ] = None,
    dtype: DtypeOption = "auto",
    max_batch: Annotated[int, typer.Option(help="Requests that will run together, at most.")] = 256,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass, at most.")] = 8192,
) -> None:
    """Compile what a model needs ahead of time, with no GPU: images, CI and rented hosts then start at once.

    MODEL may also be a file of conf/model/. The kernels are kept in $AFS_CACHE (default ~/.cache/afs); on a GPU host of
    the same architecture nothing is left to compile.
    """
    import torch

    from engine.engine_config import EngineConfig
    from engine.progress import compile_kernels
    from engine.startup import kernels_of
    from kernels.architectures import ARCHITECTURES, MULTIPROCESSORS
    from kernels.cubins import cache_directory
    from kernels.launch import machine_of

    config = _read_config(_one_model(argument, model))
    here = dict([machine_of(0)]) if torch.cuda.is_available() else {}
    archs = arch.split(",") if arch else [*here] or [*ARCHITECTURES]
    if unknown := [name for name in archs if name not in ARCHITECTURES]:
        raise ValueError(f"arch = {unknown[0]!r}; it must be one or more of {', '.join(ARCHITECTURES)}")
    count = 0
    for name in archs:
        machine = name, multiprocessors or here.get(name) or MULTIPROCESSORS[name]
        kernels = {}
        for cache in ("auto", "contiguous"):
            engine = EngineConfig.for_machine(
                "cuda", device="cuda", dtype=dtype, kv_cache=cache, max_batch=max_batch, max_step_tokens=max_step_tokens
            ).for_dtype(_dtype_of(config))
            kernels |= {kernel.name: kernel for kernel in kernels_of(config, engine, machine=machine)}
        count += len(compile_kernels([*kernels.values()], [name]))
    typer.echo(f"{count} kernels for {', '.join(archs)} are in {cache_directory()}")


@app.command("check-gpu")
@_one_line_errors
def check_gpu() -> None:
    """Show the driver, each GPU and the kernels it can run. Exit status 1 and the reason when there is none."""
    import torch
    from rich.console import Console
    from rich.table import Table

    driver, reason = _driver()
    if reason is None and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    if reason is None and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU under driver {driver}"
    if reason is not None:
        typer.echo(f"no GPU: {reason}", err=True)
        raise typer.Exit(1)

    from kernels.architectures import ARCHITECTURES

    table = Table(title=f"driver {driver}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for heading in ("GPU", "name", "sm", "SMs", "memory", "kernels"):
        table.add_column(heading)
    usable = False
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        paths = _kernel_paths((device.major, device.minor), ARCHITECTURES)
        usable |= bool(paths)
        table.add_row(
            str(index),
            device.name,
            f"sm_{device.major}{device.minor}",
            str(device.multi_processor_count),
            f"{device.total_memory / 2**30:.1f} GiB",
            ", ".join(paths) or "none: older than sm_80",
        )
    Console().print(table)
    if not usable:
        typer.echo("no GPU here can run the kernels; they need sm_80 (Ampere) or newer", err=True)
        raise typer.Exit(1)


def _driver() -> tuple[str, str | None]:
    """The driver's version, and why there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return "", f"no NVIDIA driver answers ({error})"
    try:
        if not pynvml.nvmlDeviceGetCount():
            return "", "the NVIDIA driver is there, but it lists no GPU"
        return pynvml.nvmlSystemGetDriverVersion(), None
    finally:
        pynvml.nvmlShutdown()


def _kernel_paths(capability: tuple[int, int], architectures: tuple[str, ...]) -> list[str]:
    """Which of the architectures we compile for a GPU of compute `capability` can run, best first.

    A cubin runs on the same major version with the same or a later minor; one marked "a" only on exactly its own.
    """
    found = []
    for name in architectures:
        digits = name.removeprefix("sm_").rstrip("a")
        major, minor = int(digits[:-1]), int(digits[-1])
        exact = name.endswith("a")
        if capability == (major, minor) or (not exact and capability[0] == major and capability[1] >= minor):
            found.append(name)
    return found[::-1]


@app.command()
@_one_line_errors
def inspect(argument: ModelArgument = None, model: ModelOption = None) -> None:
    """Show a checkpoint's architecture: parameters and bytes by role, and what a token takes in the KV cache.

    Of a model on the hub only the configuration is fetched.
    """
    from rich.console import Console
    from rich.table import Table

    from engine.config import ModelConfig
    from engine.cost import kv_bytes_per_token, weight_bytes
    from engine.hub import find_model

    name = _one_model(argument, model)
    directory = find_model(name, "config")
    config = ModelConfig.from_file(directory)
    console = Console()
    facts = Table(title=f"{name}: {config.architecture}", show_header=False)
    kv_heads = config.num_key_value_heads
    for name, value in {
        "layers": str(config.num_hidden_layers),
        "hidden size": str(config.hidden_size),
        "intermediate size": str(config.intermediate_size),
        "heads": f"{config.num_attention_heads} query, {kv_heads} key/value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, {'tied to' if config.tie_word_embeddings else 'apart from'} the head",
        "positions": str(config.max_position_embeddings),
        "norms": f"{config.norm_placement}, rounded {config.norm_rounding}; q and k: {config.qk_norm}",
        "rotary embedding": f"{config.rope.type}, theta {config.rope.theta:g}",
        "window": str(config.sliding_window or "none"),
        "end of sequence": ", ".join(map(str, config.eos_token_ids)) or "none",
    }.items():
        facts.add_row(name, value)
    console.print(facts)

    table = Table(title="parameters by role")
    for heading in ("role", "parameters", "share", "bytes (16 bits)"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    total = config.parameter_count()
    for role, count in _parameters_by_role(config).items():
        table.add_row(role, f"{count:,}", f"{count / total:.1%}", f"{2 * count:,}")
    table.add_section()
    table.add_row("all", f"{total:,}", "", f"{2 * total:,}")
    console.print(table)
    console.print(f"weight bytes read a token (16 bits, batch 1): {weight_bytes(config, 'bfloat16'):,}")
    console.print(f"KV cache bytes a token (16 bits): {kv_bytes_per_token(config, 'bfloat16'):,}")
    console.print(_stored(directory, config))


def _parameters_by_role(config: "ModelConfig") -> dict[str, int]:
    import math

    roles = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "head": 0}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            role = "norms"
        elif "self_attn" in name:
            role = "attention"
        elif "mlp" in name:
            role = "mlp"
        else:
            role = "head" if name.startswith("lm_head") else "embedding"
        roles[role] += math.prod(shape)
    return roles


def _stored(directory: Path, config: "ModelConfig") -> str:
    """One line on the checkpoint's tensors, or that there are none."""
    from engine.safetensors_io import INDEX_NAME, SINGLE_NAME, read_index

    if not any((directory / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return "no weights in this folder"
    entries = read_index(directory)
    expected = config.tensor_shapes()
    wrong = [name for name in entries.keys() | expected.keys() if name not in entries or name not in expected]
    wrong += [name for name, entry in entries.items() if entry.shape != expected.get(name, entry.shape)]
    if wrong:
        raise ValueError(f"{directory}: tensors do not match config.json: {', '.join(sorted(wrong)[:5])}")
    shards = len({entry.shard for entry in entries.values()})
    stored = sum(entry.nbytes for entry in entries.values())
    dtypes = ", ".join(sorted({entry.dtype for entry in entries.values()}))
    return f"stored: {len(entries)} tensors, {stored:,} bytes, {dtypes}, {shards} file{'s' if shards > 1 else ''}"


@bench.command()
@_one_line_errors
def latency(
    argument: MeasuredArgument = None,
    model: ModelOption = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time, as 1,8.")] = "1",
    context: Annotated[str, typer.Option(help="Prompt lengths, which are also the contexts of decoding.")] = "128",
    new_tokens: Annotated[int, typer.Option(help="Decode steps of a run.")] = 64,
    tests: Annotated[str | None, typer.Option(help="As llama-bench names them, pp512,tg128,tg128@d1024, in place of "
                                                   "--context and --new-tokens.")] = None,
    repetitions: Annotated[int, typer.Option(help="Runs of each test.")] = 5,
    form: FormatOption = "table",
    weights: WeightsOption = "checkpoint",
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="Capture decode steps, on a GPU.")] = True,
) -> None:  # fmt: skip
    """Time prompts (pp) and decode steps (tg) in llama-bench's columns, each beside what the machine allows at best."""
    from engine.latency import COLUMNS, Case, TooLarge, lines, measure, measure_ceilings, records, render

    _check_format(form)
    if repetitions < 1 or new_tokens < 1:
        raise ValueError(f"{repetitions} repetitions of {new_tokens} new tokens; at least 1 of 1 is needed")
    batches, contexts = _numbers("batch", batch), _numbers("context", context)
    if tests is None:
        wanted = [Case(length, 0, 0) for length in contexts] + [Case(0, new_tokens, depth) for depth in contexts]
    else:
        wanted = [Case.parse(name) for name in tests.split(",")]
    name, most = _one_model(argument, model), max(batches)
    # The caches and graphs are the measurement's own: the engine takes none.
    llm = _load_shaped(name, weights, backend, dtype, cuda_graph=False, kv_cache="contiguous", max_batch=most)
    engine = dataclasses.replace(llm.engine, cuda_graph=cuda_graph)
    ceilings = measure_ceilings(llm.weights.device)
    chunk, results = engine.step_tokens, []
    for test in wanted:
        for size in batches:
            try:
                results.append(measure(llm.model, test, size, repetitions, engine.captures, chunk, ceilings))
            except TooLarge as reason:
                typer.echo(f"left out: {test.name}, batch {size}: {reason}", err=True)
    described = _describe_measured(llm, name, weights)
    device = described["gpu_info"]
    rows = records(
        results,
        **described,
        n_batch=chunk,
        cuda_graph=engine.captures,
        copy_bandwidth=ceilings.bandwidth,
        matrix_rate=ceilings.matrix_rate,
    )
    if form != "table":
        typer.echo(render(rows, form))
        return
    from rich.console import Console
    from rich.table import Table

    assert ceilings.bandwidth is not None and ceilings.matrix_rate is not None
    table = Table(
        title=f"{device}: copy {ceilings.bandwidth / 1e12:.3g} TB/s, matrix {ceilings.matrix_rate / 1e12:.3g} TFLOP/s"
    )
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in COLUMNS[:4] else "right", no_wrap=True)
    for line in lines(rows):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@bench.command()
@_one_line_errors
def throughput(
    argument: MeasuredArgument = None,
    model: ModelOption = None,
    num_prompts: CountOption = 64,
    prompt_tokens: PromptTokensOption = "32-1024",
    new_tokens: AskedOption = None,
    prefix_tokens: PrefixOption = 0,
    sharegpt: ShareGptOption = None,
    seed: LoadSeedOption = 1,
    request_rate: RateOption = "inf",
    arrivals: ArrivalsOption = "poisson",
    max_batch: Annotated[int, typer.Option(help="Requests that run together.")] = 256,
    kv_cache: Annotated[str, typer.Option(help="paged, contiguous: a row of the longest length each, or auto: paged "
                                               "where it can.")] = "auto",
    form: FormatOption = "table",
    weights: WeightsOption = "checkpoint",
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    cuda_graph: Annotated[bool, typer.Option(help="Capture decode steps, on a GPU.")] = True,
) -> None:  # fmt: skip
    """Requests a second and tokens a second, with latencies, beside the floor of what the machine allows."""
    from engine.latency import measure_ceilings
    from engine.throughput import bench
    from engine.workloads import Mix, make_source, parse_range, parse_schedules, print_tables, render

    _check_format(form)
    schedules = parse_schedules(request_rate, arrivals, seed)
    low, high = parse_range("prompt-tokens", prompt_tokens)
    mix = Mix(num_prompts, low, high, new_tokens or 128, seed, prefix_tokens)
    name = _one_model(argument, model)
    llm = _load_shaped(name, weights, backend, dtype, cuda_graph, kv_cache=kv_cache, max_batch=max_batch)
    limits = {"new_tokens": new_tokens, "max_total": min(2048, llm.max_model_len)}
    draw = make_source(mix, llm.config.vocab_size, llm.tokenizer, sharegpt, **limits)
    ceilings = measure_ceilings(llm.weights.device)
    engine = llm.engine
    described = _describe_measured(llm, name, weights)
    device = described["gpu_info"]
    records = bench(
        llm,
        draw,
        schedules,
        ceilings,
        **described,
        kv_cache=engine.kv_cache,
        max_batch=engine.max_batch,
        n_batch=engine.step_tokens,
        cuda_graph=engine.captures,
        detokenized=llm.tokenizer is not None,
        copy_bandwidth=ceilings.bandwidth,
        matrix_rate=ceilings.matrix_rate,
    )
    for record in records:
        if record["late_kernels"] or record["late_graphs"]:
            late = (
                f"{record['late_kernels']} kernels were compiled or loaded and {record['late_graphs']} graphs captured"
            )
            typer.echo(f"{record['run']}: {late} while it was measured: its times hold this", err=True)
    if form != "table":
        typer.echo(render(records, form))
        return
    assert ceilings.bandwidth is not None and ceilings.matrix_rate is not None
    title = (
        f"{name} ({engine.dtype}, {engine.backend}) on {device}: copy {ceilings.bandwidth / 1e12:.3g} TB/s, "
        f"matrix {ceilings.matrix_rate / 1e12:.3g} TFLOP/s"
    )
    print_tables(records, title, None if sys.stdout.isatty() else 160)


@bench.command("serve")
@_one_line_errors
def bench_serve(
    url: Annotated[str, typer.Argument(help="The server's root.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its name; default: the first that the server lists.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id with the served model's tokenizer.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="In its place, for completions of random token ids.")] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    num_prompts: CountOption = 64,
    prompt_tokens: PromptTokensOption = "32-1024",
    new_tokens: AskedOption = None,
    prefix_tokens: PrefixOption = 0,
    sharegpt: ShareGptOption = None,
    seed: LoadSeedOption = 1,
    request_rate: RateOption = "inf",
    arrivals: ArrivalsOption = "poisson",
    clients: Annotated[str | None, typer.Option(help="Requests at a time at most, as 8,32 for a run each; default: as "
                                                     "many as arrive.")] = None,
    goodput: Annotated[str | None, typer.Option(help="Count requests within, as 'ttft_ms:500 tpot_ms:50'.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for all tokens; not every server knows this field.")] = True,
    extra_body: Annotated[str | None, typer.Option(help="More fields of every request, as a JSON object.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="AFS_API_KEY", help="Sent as a bearer token.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    form: FormatOption = "table",
) -> None:  # fmt: skip
    """Load an OpenAI-compatible server, ours or another's: throughput, latencies, goodput, errors by kind."""
    import asyncio

    from engine.client import Server, bench, make_body, make_schedules
    from engine.hub import find_model
    from engine.tokenizer import Tokenizer
    from engine.workloads import (
        Mix,
        make_source,
        parse_goodput,
        parse_range,
        parse_schedules,
        print_tables,
        render,
        with_text,
    )

    _check_format(form)
    objectives = parse_goodput(goodput) if goodput else None
    timed = parse_schedules(request_rate, arrivals, seed)
    schedules = make_schedules(timed, _numbers("clients", clients) if clients else [])
    low, high = parse_range("prompt-tokens", prompt_tokens)
    mix = Mix(num_prompts, low, high, new_tokens or 128, seed, prefix_tokens)
    loaded = Tokenizer(find_model(tokenizer, "tokenizer")) if tokenizer else None
    if loaded is None and (vocab_size is None or api == "chat"):
        raise ValueError("--tokenizer MODEL is needed (or --vocab-size N, for completions of random token ids)")
    count = functools.partial(_count_tokens, loaded) if loaded else None
    server = Server(url, model or "", api, api_key, timeout, make_body(ignore_eos, extra_body), count)
    ids = vocab_size or (loaded.vocab_size if loaded else 0)
    draw = make_source(mix, ids, loaded, sharegpt, new_tokens=new_tokens)
    texts = (lambda run: with_text(draw(run), loaded)) if loaded and api == "chat" else draw
    records = asyncio.run(bench(server, texts, schedules, objectives))
    if form == "table":
        print_tables(records, f"{records[0]['model']} at {url}, {api}", None if sys.stdout.isatty() else 160)
    else:
        typer.echo(render(records, form))
    for record in records:
        for kind, detail in record["error_details"].items():
            typer.echo(f"{record['run']}: {record['errors'][kind]} of {mix.count} failed, {kind}: {detail}", err=True)
    if not all(record["completed"] for record in records):
        raise typer.Exit(1)


def _count_tokens(tokenizer: "Tokenizer", text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _check_format(form: str) -> None:
    from engine.workloads import FORMATS

    if form not in FORMATS:
        raise ValueError(f"format = {form!r}; it must be one of {', '.join(FORMATS)}")


def _numbers(name: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} = {text!r}; it must be positive integers with commas between them")
    return [int(part) for part in parts]


def _describe_measured(llm: "LLM", model: str, weights: str) -> dict[str, Any]:
    """What every record of a measurement begins with, named as llama-bench names it."""
    import torch

    engine = llm.engine
    return {
        "model_filename": model,
        "model_type": f"{llm.config.architecture.removesuffix('ForCausalLM')} {engine.dtype}",
        "model_size": llm.weights.nbytes,
        "model_n_params": llm.config.parameter_count(),
        "weights": weights,
        "backends": engine.backend,
        "gpu_info": torch.cuda.get_device_name() if engine.device == "cuda" else "CPU",
    }


def _load_shaped(model: str, weights: str, backend: str, dtype: str, cuda_graph: bool, **settings: Any) -> "LLM":
    """The model, or one of its shapes: random weights need no more than a configuration. settings: of EngineConfig."""
    from engine.engine_config import EngineConfig

    engine = EngineConfig.for_machine(backend, dtype=dtype, cuda_graph=cuda_graph, **settings)
    return _make(model, weights, engine)


def _make(model: str, weights: str, engine: "EngineConfig") -> "LLM":
    from engine.llm import LLM
    from engine.weights import random_weights

    if weights not in ("checkpoint", "random"):
        raise ValueError(f"weights = {weights!r}; it must be checkpoint or random")
    if weights == "checkpoint":
        if Path(model).suffix == ".yaml":
            raise ValueError(f"{model} says a model's shapes alone; use it with --weights random")
        return LLM(model, engine)
    config = _read_config(model)
    engine = engine.for_dtype(_dtype_of(config))
    return LLM((config, random_weights(config, engine.device, engine.torch_dtype, seed=0)), engine)


def _read_config(model: str) -> "ModelConfig":
    """A model's configuration: of a file of conf/model/, a config.json, a folder with one, or the hub's."""
    from engine.config import ModelConfig
    from engine.hub import find_model

    path = Path(model)
    if path.suffix == ".yaml":
        import yaml

        return ModelConfig.from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))["architecture"])
    return ModelConfig.from_file(path if path.is_file() else find_model(model, "config"))


def _dtype_of(config: "ModelConfig") -> str:
    """What a model without files runs in where no dtype is asked for."""
    return "float16" if config.dtype == "float16" else "bfloat16"


if __name__ == "__main__":
    app()
