"""The same requests through a week's server, from clients.

    python -m stages.bench.serve <checkpoint> <EngineConfig's fields as JSON> <port>

is that server, on loopback: the suite starts it as a process of its own, loads it and stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.bench.workloads import arrive
from stages.bench.context import Context
from stages.bench.requests import RUN, add_run, list_metrics, mix_knobs, name_mix, read_requests
from stages.bench.suite import Suite, engine_knobs
from stages.exits import StageError
from stages.metrics import Listed

if TYPE_CHECKING:
    from engine.bench import client
    from engine.llm import LLM

NAME = "serve"
MODEL = "model"  # what the server calls it
READY_SECONDS = 900.0  # that the server may take to load its model and compile its kernels
STOP_SECONDS = 60.0


def list_loads(context: Context) -> list[tuple[str, int | None, float]]:
    """(case, clients at a time, requests a second), a run each."""
    load = context.workload.load
    return [
        *((f"{clients} clients", clients, math.inf) for clients in load.clients),
        *((f"{rate:g} requests/s", None, rate) for rate in load.rates),
        (f"{name_mix(read_requests(context))}, at once", None, math.inf),
    ]


def rows(context: Context, gpu: bool) -> list[Listed]:
    knobs = mix_knobs(read_requests(context))
    return [
        row
        for case, clients, _ in list_loads(context)
        for row in list_metrics(NAME, case, (*RUN, "failed"), **knobs | {"batch": clients})
    ]


def measure(context: Context) -> None:
    """Adds the rows. This suite comes before the engine is loaded in this process: a GPU may not hold both."""
    with serving(server_command(context.path, context.settings)) as url:
        bench_server(context, url)
        context.add_late(NAME, read_stats(url))


def bench_server(context: Context, url: str) -> None:
    """Adds the rows of every load against the server at `url`, each with requests of its own."""
    from engine.bench.client import Endpoint, run

    server, mix, vocabulary = Endpoint(url, MODEL), read_requests(context), context.config.vocab_size
    # Kernels are loaded and graphs captured.
    asyncio.run(run(server, mix.requests(vocabulary)))
    for index, (name, clients, rate) in enumerate(list_loads(context), start=1):
        requests = arrive(mix.requests(vocabulary, index), rate, seed=index)
        result: client.LoadResult = asyncio.run(run(server, requests, clients))
        fields: dict[str, Any] = context.knobs | mix_knobs(mix) | {"batch": clients}
        if clients is None:
            fields["note"] = f"each sent at most {max(result.late_ms):.1f} ms after its time"
        add_run(context.rows, NAME, name, [(result.outcomes, result.seconds)], (*RUN, "failed"), **fields)


def read_stats(url: str) -> dict[str, Any]:
    """The engine's statistics, as the server at `url` gives them."""
    import httpx

    answer = httpx.get(f"{url}/stats", timeout=30.0, trust_env=False)
    answer.raise_for_status()
    return answer.json()


@contextlib.contextmanager
def serving(command: Callable[[int], Sequence[str]], ready_seconds: float = READY_SECONDS) -> Iterator[str]:
    """The address of a server that `command`, given a free port on loopback, starts; it is stopped at the end.

    Raises:
        StageError: It ends, or does not answer /health in `ready_seconds`; says what it last wrote.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(process, url, ready_seconds, log)
            yield url
            if process.poll() is not None:
                raise StageError(f"the server ended with status {process.returncode}: {last_lines(log)}")
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float, log: IO[str]) -> None:
    import httpx

    end = time.monotonic() + seconds
    while True:
        if process.poll() is not None:
            raise StageError(f"the server ended with status {process.returncode}: {last_lines(log)}")
        # Nobody listens yet, or it is not ready.
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                return
        if time.monotonic() > end:
            raise StageError(f"the server was not ready after {seconds:g} s: {last_lines(log)}")
        time.sleep(0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and end it where it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_lines(log: IO[str]) -> str:
    log.seek(0)
    return " | ".join(log.read().strip().splitlines()[-3:]) or "it wrote nothing"


def server_command(path: Path, settings: dict[str, Any]) -> Callable[[int], list[str]]:
    """Make a function of a port that gives the command of our server for a checkpoint with EngineConfig's fields."""
    return lambda port: [
        sys.executable, "-m", "stages.bench.serve", str(path), json.dumps(settings), str(port)
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    from engine.llm import LLM, EngineConfig
    from engine.model.tensors import parameter_count
    from engine.server.app import Settings
    from engine.server.serve import serve
    from stages.hf import set_threads

    path, settings, port = arguments

    def load() -> LLM:
        llm = LLM(path, EngineConfig(**json.loads(settings)))
        set_threads(parameter_count(llm.config))
        # As the engine is measured without it: text is left out, and requests are token ids.
        llm.tokenizer = None
        return llm

    # Every request of a run may wait.
    serve(load, Settings(models=(MODEL,), max_waiting=1 << 16), port=int(port), log_level="warning")


SERVE = Suite(NAME, measure, "engine", rows, engine_knobs)

if __name__ == "__main__":
    main(sys.argv[1:])
