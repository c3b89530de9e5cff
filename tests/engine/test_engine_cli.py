"""The command `afs`: text on stdout, timings on stderr, one line and status 2 for errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_checkpoints import Reference
from typer.testing import CliRunner, Result

from engine.cli import _fastest, _kernel_paths, app
from engine.llm import LLM, EngineConfig
from engine.sampling import SamplingParams

ROOT = Path(__file__).resolve().parents[2]


def afs(*args: str | int | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def failed(result: Result, message: str, status: int = 2) -> None:
    assert result.exit_code == status and result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def llm(olmo2: Reference) -> LLM:
    return LLM(olmo2.path, EngineConfig(**_fastest("auto")))


def test_generate(olmo2: Reference, llm: LLM):
    result = afs("generate", "--model", olmo2.path, "--prompt", "the quick", "--max-new-tokens", 12, "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    expected = llm.generate("the quick", SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True))[0]
    assert result.stdout == expected.text + "\n"
    assert re.fullmatch(
        r"\d+ prompt tokens, first token after \d+ ms, then [\d.]+ tokens/s; 12 tokens in \d+ ms, ended by length\n",
        result.stderr,
    )


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
        (["--model", "/nowhere"], r"error: /nowhere/config.json: there is no such file"),
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
    assert f"KV cache bytes a token (bfloat16): {2 * 3 * heads * 2:,}" in result.stdout
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


def test_kernel_paths():
    names = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
    assert _kernel_paths((9, 0), names) == ["sm_90a"]
    assert _kernel_paths((8, 6), names) == ["sm_86", "sm_80"]
    assert _kernel_paths((8, 7), names) == ["sm_86", "sm_80"]
    assert _kernel_paths((10, 3), names) == ["sm_100"]
    assert _kernel_paths((7, 5), names) == []


def test_as_a_process(olmo2: Reference):
    """No traceback, nothing but text on stdout, and help without loading torch."""
    script = "import sys; from engine.cli import app; sys.argv[0] = 'afs'; app()"
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
