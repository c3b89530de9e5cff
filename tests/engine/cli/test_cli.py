"""The command `afs`: text on stdout, timings on stderr, one line and status 2 for errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_checkpoints import Reference
from typer.testing import CliRunner, Result

from engine.cli.app import app
from engine.llm import LLM, EngineConfig
from engine.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[3]


def afs(*args: str | int | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def failed(result: Result, message: str, status: int = 2) -> None:
    assert result.exit_code == status and result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def llm(olmo2: Reference) -> LLM:
    return LLM(olmo2.path)


def test_generate(olmo2: Reference, llm: LLM):
    result = afs("generate", "--model", olmo2.path, "--prompt", "the quick", "--max-new-tokens", 12, "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    expected = llm.generate("the quick", SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True))[0]
    assert result.stdout == expected.text + "\n"
    assert re.fullmatch(
        r"\d+ prompt tokens, first token after \d+ ms, then [\d.]+ tokens/s; 12 tokens in \d+ ms, ended by length\n",
        result.stderr,
    )


def test_generate_in_fp16(olmo2: Reference):
    asked = ("generate", "--model", olmo2.path, "--prompt", "the quick", "--max-new-tokens", 4, "--ignore-eos")
    result = afs(*asked, "--dtype", "float16")
    assert result.exit_code == 0, result.stderr
    llm = LLM(olmo2.path, EngineConfig.for_machine(dtype="float16"))
    expected = llm.generate("the quick", SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True))[0]
    assert result.stdout == expected.text + "\n"


def test_generate_options(olmo2: Reference, llm: LLM):
    options = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01,
               "repetition_penalty": 1.1, "seed": 4}  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = afs("generate", "--model", olmo2.path, "--prompt", "x", *flags, "--stop", "zzz", "--kv-cache", "none")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == llm.generate("x", SamplingParams(**options))[0].text + "\n"  # type: ignore[arg-type]
    one = afs("generate", "--model", olmo2.path, "--prompt", "x", "--max-new-tokens", 1)
    assert "tokens/s" not in one.stderr and one.exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "/nowhere"], r"error: there is no folder '/nowhere', and it is no hub id: these are OWNER/NAME"),
        (["--temperature", "-1"], r"error: temperature = -1.0; it must be"),
        (["--top-p", "0"], r"error: top_p = 0.0"),
        (["--max-new-tokens", "600"], r"error: prompt 0 has \d+ tokens .* above the limit of 512"),
        (["--max-model-len", "9999"], r"error: max_model_len = 9999 is above"),
        (["--backend", "x"], r"error: backend = 'x'; it must be auto, reference or cuda"),
        (["--dtype", "int8"], r"error: dtype = 'int8'"),
        (["--prompt", ""], r"error: prompt 0 is empty"),
    ],
)
def test_errors_are_one_line(olmo2: Reference, args: list[str], message: str):
    failed(afs("generate", "--model", olmo2.path, "--prompt", "hello", *args), message)


# --- which model ------------------------------------------------------------------------------------------------------

COMMANDS = [
    ("generate", "--prompt", "x"),
    ("chat",),
    ("serve",),
    ("inspect",),
    ("bench", "latency"),
    ("bench", "throughput"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_model_is_an_argument_or_an_option(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    failed(afs(*command, "a", "--model", "b"), "error: MODEL is 'a' and --model is 'b'; give one of them")
    for named in (["./a"], ["--model", "./a"], ["./a", "--model", "./a"]):
        failed(afs(*command, *named), r"error: there is no folder '\./a', and it is no hub id")
    default = (
        r"error: no model is named, and the default, data/models/olmo2-tiny, is not in .*: run this in the folder of"
    )
    failed(afs(*command), default)


def test_a_model_given_twice_alike(olmo2: Reference):
    once = afs("inspect", "--model", olmo2.path)
    assert once.exit_code == 0 and afs("inspect", olmo2.path, "--model", olmo2.path).stdout == once.stdout


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], ("NAME",)),
        (["--served-model-name", "mine", "--served-model-name", "also"], ("mine", "also")),
    ],
)
def test_served_names(olmo2: Reference, monkeypatch: pytest.MonkeyPatch, args: list[str], names: tuple[str, ...]):
    served = []
    monkeypatch.setattr("engine.server.serve.serve", lambda llm, settings, *_: served.append(settings.models))
    result = afs("serve", olmo2.path, *args)
    assert result.exit_code == 0, result.stderr
    assert served == [tuple(olmo2.path.name if name == "NAME" else name for name in names)]


def test_models_of_the_hub(olmo2: Reference, monkeypatch: pytest.MonkeyPatch):
    """What each command asks of the hub, and what it calls the model."""
    asked: list[tuple[str, str]] = []

    def find_model(name: str, part: str = "model") -> Path:
        asked.append((name, part))
        return olmo2.path

    for module in ("engine.model.hub", "engine.llm"):
        monkeypatch.setattr(f"{module}.find_model", find_model)

    def serve(load: Any, settings: Any, *_: Any) -> None:
        load()
        asked.append(("named", *settings.models))

    monkeypatch.setattr("engine.server.serve.serve", serve)
    assert "allenai/OLMo@v1: Olmo2ForCausalLM" in afs("inspect", "allenai/OLMo@v1").stdout
    assert afs("serve", "allenai/OLMo@v1").exit_code == 0
    found = throughput("allenai/OLMo", "--weights", "random", "--format", "json")
    assert json.loads(found.stdout)[0]["model_filename"] == "allenai/OLMo"
    failed(afs("bench", "serve", "http://127.0.0.1:1", "--tokenizer", "allenai/OLMo"), "http://127.0.0.1:1/v1/models: ")
    assert asked == [
        ("allenai/OLMo@v1", "config"), ("allenai/OLMo@v1", "model"), ("named", "allenai/OLMo"),
        ("allenai/OLMo", "config"), ("allenai/OLMo", "tokenizer"),
    ]  # fmt: skip


def test_shapes_alone_are_measured_with_random_weights():
    shapes = ROOT / "conf/model/olmo2_tiny.yaml"
    failed(throughput(shapes), r"olmo2_tiny\.yaml says a model's shapes alone; use it with --weights random")
    assert throughput(shapes, "--weights", "random", "--format", "csv").exit_code == 0


def test_wrong_usage():
    result = afs("generate")
    assert result.exit_code == 2 and "--prompt" in result.stderr
    assert afs("generate", "--prompt", "x", "--top-k", "many").exit_code == 2
    assert afs("nothing").exit_code == 2


def test_chat(olmo2: Reference):
    args = ("chat", "--model", olmo2.path, "--temperature", 0, "--max-new-tokens", 5, "--system", "be brief")
    result = afs(*args, stdin="hello\n\nand?\n/exit\n")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("prompt tokens") == 2
    lengths = [int(n) for n in re.findall(r"(\d+) prompt tokens", result.stderr)]
    assert lengths[1] > lengths[0]  # the second prompt holds the first turn
    assert afs(*args, stdin="").exit_code == 0


def test_chat_without_template(olmo2: Reference, tmp_path: Path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(olmo2.path / name)
    result = afs("chat", "--model", tmp_path, stdin="hello\n")
    assert result.exit_code == 2 and "error: this tokenizer has no chat template" in result.stderr


def test_inspect(reference: Reference, tmp_path: Path):
    result = afs("inspect", reference.path)
    assert result.exit_code == 0, result.stderr
    count = sum(p.numel() for p in reference.model.parameters())
    assert f"{count:,}" in result.stdout
    assert (
        f"stored: {len(list(reference.model.parameters()))} tensors, {4 * count:,} bytes, F32, 1 file" in result.stdout
    )
    heads = reference.model.config.num_key_value_heads * getattr(reference.model.config, "head_dim", 32)
    assert f"KV cache bytes a token (16 bits): {2 * 3 * heads * 2:,}" in result.stdout
    (tmp_path / "config.json").symlink_to(reference.path / "config.json")
    assert "no weights in this folder" in afs("inspect", tmp_path).stdout


def test_inspect_damage(olmo2: Reference, tmp_path: Path):
    (tmp_path / "config.json").symlink_to(olmo2.path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 8)
    result = afs("inspect", tmp_path)
    assert result.exit_code == 2 and "model.safetensors: the header starts with" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_gpu_without_a_gpu():
    failed(afs("check-gpu"), r"^no GPU: .*(driver|CUDA)", status=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_check_gpu():
    result = afs("check-gpu")
    assert result.exit_code == 0 and torch.cuda.get_device_properties(0).name.split()[-1] in result.stdout


def test_check_gpu_says_which_kernels_a_gpu_runs(monkeypatch: pytest.MonkeyPatch):
    def show(*gpus: tuple[int, int]) -> Result:
        properties = [
            SimpleNamespace(name="GPU", major=major, minor=minor, multi_processor_count=1, total_memory=2**34)
            for major, minor in gpus
        ]
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("engine.cli.check_gpu._driver", lambda: ("580", None))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        return afs("check-gpu")

    both = show((9, 0), (7, 5))
    assert both.exit_code == 0 and "sm_90a" in both.stdout and "none: compute capability 7.5" in both.stdout
    old = show((7, 5))
    assert old.exit_code == 1 and old.stderr.startswith("no GPU here can run the kernels")


def test_as_a_process(olmo2: Reference):
    """No traceback, nothing but text on stdout, and help without loading torch."""
    script = "import sys; from engine.cli.app import app; sys.argv[0] = 'afs'; app()"
    command = [
        sys.executable,
        "-c",
        script,
        "generate",
        "--model",
        str(olmo2.path),
        "--prompt",
        "a",
        "--max-new-tokens",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.startswith("1 prompt tokens, "), done.stderr
    light = f"{script[:-5]}\ntry:\n    app(['--help'])\nfinally:\n    assert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", light], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "check-gpu" in done.stdout, done.stderr


# --- build ------------------------------------------------------------------------------------------------------------


def test_build_of_one_kernel(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-m", "engine.cli", "build", "--kernel", "residual_naive_f32", "--arch", "sm_80"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"AFS_CACHE": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    line = r"residual_naive_f32 sm_80: \d+ registers, 0 B of spills, .* occupancy 1\.00\n"
    assert done.returncode == 0 and re.fullmatch(line, done.stdout), done.stderr


def test_build_refuses_kernels_that_are_none():
    failed(afs("build", "--kernel", "soften"), "'soften': no kernel of the catalogue has that in its name; .*, rope, ")
    failed(afs("build", "--kernel", "wgmma", "--arch", "sm_80"), "'wgmma': these kernels are for sm_90a, not sm_80")
    failed(afs("build", "--arch", "sm_75"), "arch = 'sm_75'; it must be one or more of sm_80, ")


# --- bench throughput, bench serve ------------------------------------------------------------------------------------


def throughput(*args: str | int | Path) -> Result:
    few = ("--num-prompts", 3, "--prompt-tokens", "4-8", "--new-tokens", 2, "--max-batch", 2)
    return afs("bench", "throughput", *few, *args)


def test_bench_throughput(olmo2: Reference, tmp_path: Path):
    result = throughput(olmo2.path, "--request-rate", "inf,50", "--arrivals", "fixed", "--format", "json")
    assert result.exit_code == 0, result.stderr
    at_once, timed = json.loads(result.stdout)
    assert [at_once["run"], timed["run"]] == ["all at once", "50 requests/s"] and at_once["max_batch"] == 2
    for record in (at_once, timed):
        assert (record["completed"], record["failed"], record["new_tokens"]) == (3, 0, 6)
        assert record["output_throughput"] == pytest.approx(6 / record["duration_s"])
    assert at_once["floor_share"] > 0 and timed["floor_share"] is None
    assert [phase["phase"] for phase in at_once["phases"]] == ["prompts", "decode"]

    (tmp_path / "config.json").write_text((olmo2.path / "config.json").read_text())
    table = throughput(tmp_path, "--weights", "random", "--prefix-tokens", 40)
    assert table.exit_code == 0 and "all at once" in table.stdout and "TTFT" in table.stdout, table.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--format", "x"), "format = 'x'; it must be one of table, json, csv, markdown"),
        (("--prompt-tokens", "9-x"), "prompt-tokens = '9-x'; it must be a number of tokens"),
        (("--prompt-tokens", "9-3"), "from 9 to 3"),
        (("--request-rate", "0"), "request rate '0'"),
        (("--arrivals", "burst"), "arrivals = 'burst'; they must be poisson or fixed"),
        (("--prompt-tokens", "512"), "has 512 tokens and asks for 2: 514 is above the model's 512"),
        (("--sharegpt", "no.json"), "no.json"),
    ],
)
def test_bench_throughput_refuses(olmo2: Reference, args: tuple[str, ...], message: str):
    failed(throughput(olmo2.path, *args), message)


def test_bench_serve_refuses():
    failed(afs("bench", "serve"), "--tokenizer MODEL is needed")
    ids = ("bench", "serve", "http://127.0.0.1:1", "--vocab-size", 99, "--num-prompts", 1)
    failed(afs(*ids, "--api", "chat"), "--tokenizer MODEL is needed")
    failed(afs(*ids), r"http://127.0.0.1:1/v1/models: ")
    failed(afs(*ids, "--model", "m"), "does not answer a request: ClientConnectorError")
    failed(afs(*ids, "--goodput", "itl:5"), "goodput 'itl:5'")
    failed(afs(*ids, "--extra-body", "[1]"), "extra-body = ")
    failed(afs(*ids, "--clients", "0"), "clients = '0'; it must be positive integers")


class Answers(BaseHTTPRequestHandler):
    """A model that says "a" as often as it is asked to, and refuses prompts of more than 6 tokens."""

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if len(asked["prompt"]) > 6:
            self.answer(b"too long", 400)
            return
        count = asked["max_tokens"]
        chunks: list[Any] = [{"choices": [{"text": "a", "finish_reason": None}]}] * (count - 1)
        chunks.append({"choices": [{"text": "a", "finish_reason": "length"}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": len(asked["prompt"]), "completion_tokens": count}})
        self.answer("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + b"data: [DONE]\n\n")

    def answer(self, body: bytes, status: int = 200):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any):
        pass


def test_bench_serve():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        few = ("bench", "serve", url, "--vocab-size", 99, "--num-prompts", 6, "--new-tokens", 3)
        found = afs(*few, "--prompt-tokens", 4, "--clients", "1,4", "--goodput", "ttft:1e6", "--format", "json")
        some = afs(*few, "--prompt-tokens", "6-8", "--seed", 2)
        server.shutdown()
    assert found.exit_code == 0, found.stderr
    records = json.loads(found.stdout)
    assert [(record["run"], record["completed"]) for record in records] == [("1 clients", 6), ("4 clients", 6)]
    assert all(record["goodput"] == pytest.approx(6 / record["duration_s"]) for record in records)
    assert some.exit_code == 0 and "HTTP 400" in some.stdout and "of 6 failed, HTTP 400: too long" in some.stderr
