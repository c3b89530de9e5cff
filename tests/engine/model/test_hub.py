"""Models by name: what is fetched, what is taken from the cache, and what is said where there is no such model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_checkpoints import Reference
from fake_hub import REPO, SHA, FakeHub, environment_for
from hypothesis import given
from hypothesis import strategies as st

from engine.model.hub import HubError, find_model, model_name, parse_id

ROOT = Path(__file__).resolve().parents[3]
NOWHERE = "http://127.0.0.1:9"
SNAPSHOT = f"hf/hub/models--tiny--model/snapshots/{SHA}"
# Tells of each name the folder or the error, as the client reads its environment once in a process.
FIND = """
import json, sys
from engine.model.hub import HubError, find_model
for name in sys.argv[2:]:
    try:
        print(json.dumps(str(find_model(name, sys.argv[1]))))
    except HubError as error:
        print(json.dumps("error: " + str(error)))
"""
NEEDED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A model in two shards beside files in other formats and in folders."""
    folder = tmp_path / "hub"
    for name in NEEDED | {"README.md", "pytorch_model.bin", "consolidated.safetensors", "model.gguf"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of the model")
    for name in ("onnx/model.onnx", "original/model.safetensors"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("another format")
    shards = {f"tensor{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x" * 200_000)
    fake = FakeHub(folder)
    yield fake
    fake.server.shutdown()


def find(
    tmp_path: Path, url: str, *names: str, part: str = "model", script: str = FIND, **environment: str
) -> tuple[list[str], str]:
    """What a process says of each name on stdout, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", script, part, *names], capture_output=True, text=True, check=False, timeout=60,
        env=environment_for(url, tmp_path) | {"PYTHONPATH": str(ROOT)} | environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_what_an_engine_needs_is_fetched_once(hub: FakeHub, tmp_path: Path):
    found, said = find(tmp_path, hub.url, REPO)
    assert found == [str(tmp_path / SNAPSHOT)] and said == ""  # no progress where nobody looks
    assert {path.name for path in (tmp_path / SNAPSHOT).iterdir()} == NEEDED == hub.served.keys()
    assert (tmp_path / SNAPSHOT / "tokenizer.json").read_text() == "tokenizer.json of the model"
    assert find(tmp_path, hub.url, REPO, f"{REPO}@main", f"{REPO}@{SHA}") == (found * 3, "")
    assert set(hub.served.values()) == {1}
    hub.asked.clear()
    assert find(tmp_path, hub.url, f"{REPO}@{SHA}") == (found, "")
    assert hub.asked == []  # a commit does not change


@pytest.mark.parametrize(("part", "names"), [("config", {"config.json"}), ("tokenizer", {
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"})])  # fmt: skip
def test_a_part(hub: FakeHub, tmp_path: Path, part: str, names: set[str]):
    assert find(tmp_path, hub.url, REPO, part=part)[0] == [str(tmp_path / SNAPSHOT)]
    assert hub.served.keys() == names
    # It is no model yet, and is fetched when the model is.
    (error,), _ = find(tmp_path, NOWHERE, REPO)
    assert f"{REPO} cannot be fetched, the hub is out of reach (ConnectError)" in error
    find(tmp_path, hub.url, REPO)
    assert hub.served == dict.fromkeys(NEEDED, 1)


def test_without_a_network(hub: FakeHub, tmp_path: Path):
    offline = {"HF_HUB_OFFLINE": "1"}
    folder = [str(tmp_path / SNAPSHOT)]
    (unreachable,), _ = find(tmp_path, NOWHERE, REPO)
    assert "run again online to fetch or resume, or give a folder that holds the model" in unreachable
    (forbidden,), _ = find(tmp_path, hub.url, REPO, **offline)
    assert f"not whole, in the hub's cache ({tmp_path / 'hf/hub'}), and HF_HUB_OFFLINE is set: unset it" in forbidden
    assert "or give a folder" in forbidden and hub.asked == []
    find(tmp_path, hub.url, REPO)
    hub.asked.clear()
    assert find(tmp_path, hub.url, REPO, f"{REPO}@{SHA}", **offline) == (folder * 2, "") and hub.asked == []
    found, said = find(tmp_path, NOWHERE, REPO)
    assert found == folder and said.count("\n") == 1 and said.startswith(f"{REPO} cannot be fetched, the hub is out of")
    (tmp_path / SNAPSHOT / "model-00002-of-00002.safetensors").unlink()
    assert find(tmp_path, NOWHERE, REPO)[0] == [unreachable]
    assert find(tmp_path, hub.url, REPO, **offline)[0] == [forbidden]
    assert find(tmp_path, hub.url, f"{REPO}@{SHA}")[0] == folder  # what is lacking is linked again


def test_a_cache_that_an_older_client_filled(hub: FakeHub, tmp_path: Path):
    """It has no listing of what is in the repository: the index says which shards there must be."""
    repo = tmp_path / "hf/hub/models--tiny--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(SHA)
    shutil.copytree(hub.folder, repo / "snapshots" / SHA)
    for name in (REPO, f"{REPO}@{SHA}"):
        assert find(tmp_path, NOWHERE, name)[0] == [str(tmp_path / SNAPSHOT)]
    (repo / "snapshots" / SHA / "model-00001-of-00002.safetensors").unlink()
    for name in (REPO, f"{REPO}@{SHA}"):
        assert "the hub is out of reach" in find(tmp_path, NOWHERE, name)[0][0]


def test_what_the_hub_does_not_give(hub: FakeHub, tmp_path: Path):
    expected = {
        "tiny/other": r"tiny/other is not on the hub, or private: check the name, log in with `hf auth login`",
        "tiny/private": "tiny/private is not on the hub, or private: check the name, log in with `hf auth login`",
        "tiny/gated": f"tiny/gated is gated: accept its licence at {hub.url}/tiny/gated, then log in with",
        "tiny/forbidden": "the hub refuses tiny/forbidden (HTTP 403): log in with `hf auth login`",
        f"{REPO}@v9": f"{REPO} has no revision v9: it must be a branch, a tag or a commit on the hub",
    }
    found, said = find(tmp_path, hub.url, *expected)
    for answer, message in zip(found, expected.values(), strict=True):
        assert answer.startswith(f"error: {message}") and "\n" not in answer
    assert said == "" and hub.served == {}
    # A copy stays of use when the hub no longer gives the model.
    find(tmp_path, hub.url, REPO)
    shutil.copytree(tmp_path / "hf/hub/models--tiny--model", tmp_path / "hf/hub/models--tiny--gated", symlinks=True)
    (folder,), said = find(tmp_path, hub.url, "tiny/gated")
    assert folder.endswith(f"models--tiny--gated/snapshots/{SHA}") and said == (
        "tiny/gated is gated: the copy in the hub's cache is used\n"
    )


def test_a_hub_that_fails(hub: FakeHub, tmp_path: Path):
    (error,), _ = find(tmp_path, hub.url, "tiny/broken")
    assert "tiny/broken cannot be fetched, the hub answers HTTP 503: run again later, or give a folder" in error


@pytest.mark.parametrize(("lost", "message"), [
    ("config.json", "holds no config.json"), ("*.safetensors", "holds no safetensors files")])  # fmt: skip
def test_a_repository_in_another_format(hub: FakeHub, tmp_path: Path, lost: str, message: str):
    for path in hub.folder.glob(lost):
        path.unlink()
    assert f"{REPO} {message}: the engine reads" in find(tmp_path, hub.url, REPO)[0][0] and hub.served == {}


def test_a_disk_without_room(hub: FakeHub, tmp_path: Path):
    sized = "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=100_000)\n"
    (error,), _ = find(tmp_path, hub.url, REPO, script=sized + FIND)
    assert f"{REPO} takes 0.0 GB, and 0.0 GB are free in the hub's cache ({tmp_path / 'hf/hub'}): make room" in error
    assert hub.served == {}


@pytest.mark.parametrize(("raised", "message"), [
    ("OSError(28, 'No space left on device')", "the disk is full: make room, or set HF_HUB_CACHE"),
    ("RuntimeError('Data processing error: No space left on device (os error 28)')", "the disk is full: make room"),
    ("OSError('Consistency check failed')", "cannot be fetched, Consistency check failed: run again to resume, or"),
    ("PermissionError(13, 'Permission denied')", "Permission denied: set HF_HUB_CACHE to a folder that can be written"),
])  # fmt: skip
def test_a_download_that_breaks_off(hub: FakeHub, tmp_path: Path, raised: str, message: str):
    failing = f"""
from huggingface_hub import file_download
def http_get(*args, **kwargs):
    raise {raised}
file_download.http_get = http_get
"""
    (error,), _ = find(tmp_path, hub.url, REPO, script=failing + FIND)
    assert error.startswith(f"error: {REPO} ") and message in error
    assert find(tmp_path, hub.url, REPO)[0] == [str(tmp_path / SNAPSHOT)]


def test_killed_while_fetching(hub: FakeHub, tmp_path: Path):
    hub.chunk_delay = 0.2
    command = [sys.executable, "-c", FIND, "model", REPO]
    environment = environment_for(hub.url, tmp_path) | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while hub.served.keys() != NEEDED or not any((tmp_path / "hf").rglob("*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "the hub is out of reach" in find(tmp_path, NOWHERE, REPO)[0][0]
    hub.chunk_delay = 0.0
    assert find(tmp_path, hub.url, REPO)[0] == [str(tmp_path / SNAPSHOT)]
    shard = "model-00002-of-00002.safetensors"
    assert (tmp_path / SNAPSHOT / shard).read_bytes() == (hub.folder / shard).read_bytes()


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("allenai/OLMo", "models/olmo@v1", "single"):
        Path(name).mkdir(parents=True)
        assert find_model(name) == find_model(Path(name)) == Path(name)
    assert find_model(f"{tmp_path}/allenai/OLMo/") == tmp_path / "allenai/OLMo"
    assert model_name("allenai/OLMo") == "OLMo" and model_name("models/olmo@v1") == "olmo@v1"
    assert model_name(".") == tmp_path.name
    assert model_name("allenai/Other@main") == "allenai/Other"


@pytest.mark.parametrize(
    "name",
    ["", "/no/where", "./here", "../there", "olmo", "a/b/c", "foo bar", "a/b@", "@main", "a/b--c", "a/", "a/b/c@d"],
)
def test_neither_folder_nor_id(name: str):
    with pytest.raises(HubError) as refused:
        find_model(name)
    assert str(refused.value) == (
        f"there is no folder {name!r}, and it is no hub id: these are OWNER/NAME or OWNER/NAME@REVISION, as "
        "allenai/OLMo-2-0425-1B-Instruct"
    )


def test_a_file_is_no_model(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        HubError, match=r"config\.json is a file: name the folder that holds it, or a hub id as allenai/"
    ):
        find_model(tmp_path / "config.json")


NAME = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,20}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda name: "--" not in name and ".." not in name and not name.endswith(".git")
)


@given(NAME, NAME, st.none() | st.text(min_size=1, max_size=12))
def test_ids(owner: str, name: str, revision: str | None):
    text = f"{owner}/{name}" + ("" if revision is None else f"@{revision}")
    assert parse_id(text) == (f"{owner}/{name}", revision)


@given(st.text(max_size=20))
def test_any_text_is_an_id_or_a_hub_error(text: str):
    try:
        repo, revision = parse_id(text)
    except HubError as error:
        assert repr(text) in str(error)
    else:
        assert text == (repo if revision is None else f"{repo}@{revision}") and repo.count("/") == 1


# --- the command -----------------------------------------------------------------------------------------------------


def test_generate_by_name(olmo2: Reference, tmp_path: Path):
    hub = FakeHub(olmo2.path)
    command = [
        sys.executable,
        "-m",
        "engine.cli",
        "generate",
        f"{REPO}@main",
        "--prompt",
        "the",
        "--max-new-tokens",
        "3",
    ]
    environment = environment_for(hub.url, tmp_path) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    hub.server.shutdown()
    assert done.returncode == 0 and done.stderr.startswith("1 prompt tokens, "), done.stderr
    assert "model.safetensors" in hub.served and done.stderr.count("\n") == 1
