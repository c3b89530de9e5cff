"""Download: every source, only what is missing, and nothing half taken for whole."""

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fake_hub import SHA, FakeHub, environment_for
from safetensors.torch import load_file, save_file

from stages import download, sources
from stages.compose import read_params
from stages.exits import StageError
from stages.params import Model, ParamsError, parse
from stages.sources import BUNDLED, Random, make_source
from stages.stage import Run

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = '{"model": "tiny"}'
ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "eos_token_id": 62,
    "pad_token_id": 63,
}
SMALL = [f"model.architecture.{key}={value}" for key, value in ARCHITECTURE.items()]
SNAPSHOT = Path("outputs/download/data/hf/hf_snapshot/olmo2_tiny")
MANIFEST = Path("outputs/download/data/hf/olmo2_tiny.manifest.json")


@pytest.fixture
def checkout(workspace, monkeypatch) -> Path:
    """A working directory with a bundled model of a few kilobytes, in two shards."""
    monkeypatch.setattr("stages.sources.SHARD_BYTES", 40_000)
    architecture = read_params()["model"]["architecture"] | ARCHITECTURE
    BUNDLED.mkdir(parents=True)
    (BUNDLED / "tokenizer.json").write_text(TOKENIZER)
    (BUNDLED / "training.json").write_text("not part of the checkpoint")
    (BUNDLED / "LICENSE").write_text("licence")
    source = Random(architecture, 0, False)
    for _ in source.place([name for name in source.names() if name != "tokenizer.json"], BUNDLED):
        pass
    return workspace


def bring(*overrides: str) -> dict:
    """Runs the stage by hand and returns the manifest."""
    download.main([*SMALL, *overrides])
    return json.loads(MANIFEST.read_text())


def refused(capsys, *overrides: str, status: int = 1) -> str:
    """The one line of a run that fails and leaves no manifest."""
    with pytest.raises(SystemExit) as exit:
        bring(*overrides)
    assert exit.value.code == status
    assert not MANIFEST.exists()
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def checksums(folder: Path) -> dict:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }


def fetched(capsys) -> list[str]:
    """The names of the files the last run brought."""
    return [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]


def test_bundled(checkout, capsys):
    manifest = bring()
    assert manifest["source"] == {"weights": "bundled", "path": "data/models/olmo2-tiny"}
    assert manifest["files"] == checksums(SNAPSHOT)
    assert "training.json" not in manifest["files"]
    assert all((SNAPSHOT / name).samefile(BUNDLED / name) for name in manifest["files"])
    data = Path("outputs/download/data/hf")
    kinds = {kind: sorted(path.name for path in (data / kind / "olmo2_tiny").iterdir()) for kind in download.KINDS}
    assert kinds == {
        "raw_weights": [
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        ],
        "raw_tokenizer": ["tokenizer.json"],
        "metadata": ["LICENSE", "config.json", "generation_config.json"],
    }  # fmt: skip
    assert sorted(fetched(capsys)) == sorted(manifest["files"])


def test_the_second_run_brings_and_reads_nothing(checkout, capsys, monkeypatch):
    bring()
    before = MANIFEST.read_bytes()
    fetched(capsys)
    monkeypatch.setattr(download, "sha256", lambda path: pytest.fail(f"read {path}"))
    bring()
    assert fetched(capsys) == []
    assert MANIFEST.read_bytes() == before


def test_only_what_is_missing_or_changed_is_brought(checkout, capsys):
    before = bring()
    (SNAPSHOT / "config.json").unlink()
    weights = SNAPSHOT / "model-00002-of-00002.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + b"x")
    (SNAPSHOT / "stale.bin").write_text("from another source")
    fetched(capsys)
    assert bring() == before
    assert fetched(capsys) == ["config.json", "model-00002-of-00002.safetensors"]
    assert not (SNAPSHOT / "stale.bin").exists()


def test_force_brings_everything(checkout, capsys):
    before = bring()
    fetched(capsys)
    assert bring("model.force=true") == before
    assert sorted(fetched(capsys)) == sorted(before["files"])


def test_a_changed_source_is_brought_again(checkout, capsys):
    bring()
    fetched(capsys)
    (BUNDLED / "LICENSE").unlink()
    (BUNDLED / "LICENSE").write_text("another licence")
    assert bring()["files"] == checksums(SNAPSHOT)
    assert fetched(capsys) == ["LICENSE"]
    assert (SNAPSHOT / "LICENSE").read_text() == "another licence"


def test_path(checkout, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in BUNDLED.iterdir():
        (mine / file.name).symlink_to(file.resolve())
    manifest = bring("model.weights=path", f"model.path={mine}")
    assert manifest["source"] == {"weights": "path", "path": str(mine)}
    assert not any(path.is_symlink() for path in SNAPSHOT.iterdir())


def test_copies_across_devices(checkout, monkeypatch):
    def other_device(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(sources.os, "link", other_device)
    files = bring()["files"]
    assert files == checksums(SNAPSHOT)
    assert not any((SNAPSHOT / name).samefile(BUNDLED / name) for name in files)


def test_random(checkout):
    files = bring("model.weights=random")["files"]
    assert files == checksums(SNAPSHOT)
    assert (SNAPSHOT / "tokenizer.json").read_text() == TOKENIZER
    config = json.loads((SNAPSHOT / "config.json").read_text())
    assert config["hidden_size"] == 32 and config["architectures"] == ["Olmo2ForCausalLM"]
    first = load_file(SNAPSHOT / "model-00001-of-00002.safetensors")
    assert 0.01 < float(first["model.embed_tokens.weight"].float().std()) < 0.03
    assert abs(float(first["model.layers.0.self_attn.q_norm.weight"].float().mean()) - 1) < 0.1


def test_random_is_decided_by_the_seed(checkout):
    def weights(*overrides: str) -> dict:
        files = bring("model.weights=random", *overrides)["files"]
        return {name: record for name, record in files.items() if name.endswith(".safetensors")}

    before = weights()
    assert weights("model.seed=1") != before
    assert weights() == before


def test_random_after_bundled_leaves_nothing_of_it(checkout):
    bring()
    files = bring("model.weights=random")["files"]
    assert "LICENSE" not in files and files == checksums(SNAPSHOT)


@pytest.mark.parametrize(
    ("overrides", "status", "words"),
    [
        (["model.weights=hub"], 2, "model olmo2_tiny is not on the hub"),
        (["model.weights=hub", "model.hub_id=a/b"], 2, "model.revision=<40-digit commit of a/b>"),
        (["model.weights=path", "model.path=null"], 2, "model.path=FOLDER"),
        (["model.path=null"], 2, "it is not bundled"),
        (["model.weights=path", "model.path=/no/such"], 1, "model.path = '/no/such': should be a folder"),
        (["model.architecture.hidden_size=64"], 1, "is another model than olmo2_tiny: model.embed_tokens.weight is"),
        (["model.architecture.model_type=gpt2"], 2, "model.architecture.model_type = 'gpt2'"),
        (["model.weights=random", "model.path=/x"], 2, "model.path = '/x' changes nothing with model.weights = random"),
    ],
)
def test_bad_parameters(checkout, capsys, overrides, status, words):
    assert words in refused(capsys, *overrides, status=status)


def test_an_empty_folder_is_no_checkpoint(checkout, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, "model.weights=path", f"model.path={tmp_path / 'empty'}")


@pytest.mark.parametrize("what", ["refused", "absent", "cut"])
def test_what_is_not_whole_is_not_taken_by_a_later_stage(checkout, capsys, monkeypatch, what):
    """Neither an earlier download by hand nor the pipeline's own gives way to a newer one that failed."""
    shutil.copytree(BUNDLED, "data/hf/hf_snapshot/olmo2_tiny")
    Path("data/hf/olmo2_tiny.manifest.json").touch()
    run = Run("bench", by_hand=True)
    if what == "refused":
        refused(capsys, "model.weights=path", "model.path=/no/such")
        assert not SNAPSHOT.exists()
    elif what == "absent":
        monkeypatch.setattr(Random, "place", lambda *_: iter(()).__next__())
        with pytest.raises(StopIteration):
            bring("model.weights=random")
        assert not SNAPSHOT.exists()
    else:
        bring()
        assert run.find_snapshot("olmo2_tiny") == SNAPSHOT
        place = Random.place

        def stop(*given):
            yield next(place(*given))
            raise StageError("the line is cut")

        monkeypatch.setattr(Random, "place", stop)
        refused(capsys, "model.weights=random")
    assert run.find_snapshot("olmo2_tiny") == Path("data/hf/hf_snapshot/olmo2_tiny")


def test_a_truncated_shard_is_not_taken(checkout, capsys):
    shard = BUNDLED / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    assert "model-00001-of-00002.safetensors" in refused(capsys)


def test_an_index_without_its_shard_is_not_taken(checkout, capsys):
    (BUNDLED / "model-00002-of-00002.safetensors").unlink()
    assert "the shard is absent" in refused(capsys)


def test_a_disk_too_small_is_found_before_writing(checkout, capsys, monkeypatch):
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = refused(capsys, "model.weights=random")
    assert "olmo2_tiny does not fit this machine: 45.6 kB of disk (1.0 kB free): its weights" in error
    assert not SNAPSHOT.exists()


def test_a_disk_that_fills_up_leaves_no_half_file(checkout, capsys, monkeypatch):
    disk = SimpleNamespace(full=True)

    def save(tensors, path, metadata):
        if disk.full and "model-00002" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    assert "the disk is full" in refused(capsys, "model.weights=random")
    assert [path.name for path in SNAPSHOT.iterdir() if "safetensors" in path.name and path.suffix != ".json"] == [
        "model-00001-of-00002.safetensors"
    ]
    disk.full = False
    assert bring("model.weights=random")["files"] == checksums(SNAPSHOT)
    assert "model-00001-of-00002.safetensors" not in fetched(capsys)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(checkout, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in BUNDLED.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"another format")
    fake = FakeHub(folder)
    yield fake
    fake.server.shutdown()


def hub_command(tmp_path: Path, url: str, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """The stage in a process of its own, because the hub's client reads its environment when it is imported."""
    arguments = [*SMALL, "model.weights=hub", "model.hub_id=tiny/model", f"model.revision={SHA}", *overrides]
    environment = environment_for(url, tmp_path) | {"PYTHONPATH": str(ROOT), "AFS_CACHE": str(tmp_path / "cache")}
    return [sys.executable, "-m", "stages.download", *arguments], environment


def run_hub(tmp_path: Path, url: str, *overrides: str) -> subprocess.CompletedProcess:
    command, environment = hub_command(tmp_path, url, *overrides)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_hub(hub, tmp_path):
    done = run_hub(tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(MANIFEST.read_text())
    assert manifest["source"] == {"weights": "hub", "hub_id": "tiny/model", "revision": SHA}
    assert manifest["files"] == checksums(SNAPSHOT)
    assert {"pytorch_model.bin", "training.json"}.isdisjoint(manifest["files"])
    blobs = {path.stat().st_ino for path in (tmp_path / "hf/hub").rglob("blobs/*")}
    assert {path.stat().st_ino for path in SNAPSHOT.iterdir()} <= blobs
    # What is whole needs no network, not even in another working directory.
    hub.server.shutdown()
    (SNAPSHOT / "config.json").unlink()
    done = run_hub(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert json.loads(MANIFEST.read_text()) == manifest


def test_a_file_that_is_not_what_the_hub_says(hub, tmp_path):
    hub.corrupt = "model-00002-of-00002.safetensors"
    done = run_hub(tmp_path, hub.url)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{hub.corrupt} has sha256" in done.stderr and "run again to fetch it" in done.stderr
    assert not MANIFEST.exists() and not (SNAPSHOT / hub.corrupt).exists()
    hub.corrupt = ""
    hub.served.clear()
    assert run_hub(tmp_path, hub.url).returncode == 0
    # What came before it is there; what was on its way beside it may have to be fetched again.
    assert "model-00002-of-00002.safetensors" in hub.served
    assert {"config.json", "model-00001-of-00002.safetensors"}.isdisjoint(hub.served)


def test_killed_while_downloading(hub, tmp_path):
    hub.chunk_delay = 0.5
    command, environment = hub_command(tmp_path, hub.url)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "hf").rglob("*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not MANIFEST.exists()
    assert list(SNAPSHOT.glob("*.safetensors")) == []
    hub.chunk_delay = 0.0
    done = run_hub(tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(MANIFEST.read_text())["files"] == checksums(SNAPSHOT)


def test_interrupted_while_downloading(hub, tmp_path):
    """One line and status 130, at once: not when the files that are on their way are there."""
    hub.chunk_delay = 60.0
    command, environment = hub_command(tmp_path, hub.url)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "hf").rglob("*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.endswith("error: download: interrupted\n") and "Traceback" not in said
    assert not MANIFEST.exists() and not any(SNAPSHOT.glob("*.safetensors"))


def test_no_network(checkout, tmp_path):
    done = run_hub(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the hub is out of reach" in done.stderr and "model.weights=random" in done.stderr
    assert not MANIFEST.exists()


def test_no_such_repository(hub, tmp_path):
    done = run_hub(tmp_path, hub.url, "model.hub_id=tiny/other")
    assert done.returncode == 1 and "tiny/other is not on the hub, or private" in done.stderr


def test_hub_needs_a_pinned_commit():
    fields = yaml.safe_load((ROOT / "conf/model/olmo2_7b.yaml").read_text()) | {"revision": None}
    with pytest.raises(ParamsError, match="40-digit commit of allenai/OLMo-2-1124-7B"):
        make_source(parse(Model, fields, "model"), gpu=False)


def test_random_shard_does_not_depend_on_those_before_it(checkout, tmp_path):
    source = Random(read_params()["model"]["architecture"] | ARCHITECTURE, 3, False)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert list(source.place(source.names(), tmp_path / "a")) == source.names()
    name = "model-00002-of-00002.safetensors"
    assert list(source.place([name], tmp_path / "b")) == [name]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_listing_without_weights_is_refused(tmp_path, monkeypatch):
    source = sources.Hub("tiny/model", SHA, False)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="README.md", size=1, lfs=None, blob_id="0" * 40)])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    with pytest.raises(StageError, match="holds no safetensors files"):
        source.names()
