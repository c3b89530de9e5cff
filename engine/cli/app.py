"""The command `afs`: generate, chat, serve, build, quantize, check-gpu, inspect, bench latency, throughput, serve.

A file a command. Heavy modules are imported inside the commands, so that `afs --help` answers at once.
"""

import typer

from engine.cli.bench_latency import latency
from engine.cli.bench_serve import bench_serve
from engine.cli.bench_throughput import throughput
from engine.cli.build import build
from engine.cli.check_gpu import check_gpu
from engine.cli.generate import chat, generate
from engine.cli.inspect import inspect
from engine.cli.quantize import quantize
from engine.cli.serve import serve

app = typer.Typer(
    help="Run and look at language models with the from-scratch engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure the engine on this machine.", no_args_is_help=True, rich_markup_mode=None)
for command in (generate, chat, serve, build, quantize):
    app.command()(command)
app.command("check-gpu")(check_gpu)
app.command()(inspect)
app.add_typer(bench, name="bench")
bench.command()(latency)
bench.command()(throughput)
bench.command("serve")(bench_serve)
