"""Inventory: every tensor listed, every byte verified, every damage named."""

import json
import struct
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from engine.model.config import ModelConfig
from engine.model.tensors import parameter_count, tensor_shapes
from stages import inventory, metrics
from stages.inventory import COLUMNS, place
from stages.sources import Random, plan_shards
from stages.stage import Run

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "eos_token_id": 62,
    "pad_token_id": 63,
    "max_position_embeddings": 64,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def snapshot(workspace, monkeypatch) -> Path:
    """A staged checkpoint of a small OLMo-2 in two shards, as the pipeline has it; provision has not run."""
    from stages.compose import read_params

    architecture = read_params()["model"]["architecture"] | SMALL
    folder = Run("download").out("data/hf/hf_snapshot/olmo2_tiny")
    folder.mkdir()
    monkeypatch.setattr("stages.sources.SHARD_BYTES", 40_000)
    source = Random(architecture, 0, False)
    assert len(list(source.place(source.names(), folder))) == 5
    Run("download").out("data/hf/olmo2_tiny.manifest.json").write_text(json.dumps({"source": source.describe()}))
    monkeypatch.setenv("DVC_STAGE", "inventory")
    return folder


def refused(capsys) -> str:
    """The one line of a run that fails, having written nothing."""
    with pytest.raises(SystemExit) as exit:
        inventory.main([])
    assert exit.value.code == 1
    assert not Path("reports").exists() or not list(Path("reports").rglob("*.*"))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def split(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict, data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_what_is_written(snapshot, capsys):
    inventory.main([])
    frame: Any = pd.read_csv("reports/inventory.csv")
    assert list(frame.columns) == list(COLUMNS) == [
        "tensor_number", "tensor_name", "num_parameters", "shape", "shard_file", "data_offset_bytes", "dtype", "bytes",
        "layer", "role",
    ]  # fmt: skip
    config = ModelConfig.from_file(snapshot)
    assert list(frame["tensor_name"]) == sorted(tensor_shapes(config))
    assert list(frame["tensor_number"]) == list(range(1, len(frame) + 1))
    assert frame["num_parameters"].sum() == parameter_count(config)
    assert set(frame["dtype"]) == {"BF16"} and frame["bytes"].sum() == 2 * parameter_count(config)
    assert set(frame["shard_file"]) == set(SHARDS)
    assert frame.set_index("tensor_name").loc["lm_head.weight", "shape"] == "64x32"
    parquet = pd.read_parquet("reports/inventory.parquet")
    assert list(parquet.columns) == list(COLUMNS) and len(parquet) == len(frame)
    out = capsys.readouterr().out
    assert "Olmo2ForCausalLM" in out and "embedding" in out


def test_a_tensor_can_be_extracted_by_the_list(snapshot):
    from safetensors import safe_open

    inventory.main([])
    frame = pd.read_csv("reports/inventory.csv").set_index("tensor_name")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        row = frame.loc[name]
        _, data = split(snapshot / row["shard_file"])
        raw = data[row["data_offset_bytes"] : row["data_offset_bytes"] + row["bytes"]]
        tensor = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(*map(int, row["shape"].split("x")))
        with safe_open(snapshot / row["shard_file"], framework="pt") as library:
            assert torch.equal(tensor, library.get_tensor(name))


def test_architecture_and_metrics(snapshot):
    inventory.main([])
    rows = metrics.read("reports/metrics/inventory.parquet").set_index("metric")
    assert rows.loc["tensors_verified", "note"] == "random weights, seed 0"
    facts = pd.read_csv("reports/architecture.csv", dtype=str).set_index("property")["value"]
    assert (facts["layers"], facts["norm_placement"], facts["qk_norm"], facts["shards"]) == ("2", "post", "full", "2")
    frame = metrics.read("reports/metrics/inventory.parquet").set_index(["case", "metric"])
    config = ModelConfig.from_file(snapshot)
    assert frame.loc[("checkpoint", "parameters"), "value"] == parameter_count(config)
    assert frame.loc[("checkpoint", "tensors_verified"), "value"] == len(tensor_shapes(config))


def test_the_same_checkpoint_gives_the_same_files(snapshot):
    inventory.main([])
    files = [*Path("reports").rglob("inventory.*"), Path("reports/architecture.csv")]
    before = {file: file.read_bytes() for file in files}
    inventory.main([])
    assert {file: file.read_bytes() for file in files} == before


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.layers.12.self_attn.q_norm.weight", 12, "self_attn.q_norm"),
        ("model.layers.0.post_feedforward_layernorm.weight", 0, "post_feedforward_layernorm"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("lm_head.weight", None, "lm_head"),
        ("model.norm.weight", None, "final_norm"),
        ("vision.patch.weight", None, "vision.patch"),
    ],
)
def test_place(name, layer, role):
    assert place(name) == (layer, role)


def test_truncated_shard(snapshot, capsys):
    path = snapshot / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert SHARDS[1] in refused(capsys)


def test_header_length_beyond_the_file(snapshot, capsys):
    path = snapshot / SHARDS[0]
    path.write_bytes(struct.pack("<Q", 10_000_000) + path.read_bytes()[8:])
    assert "header length 10000000 reaches beyond" in refused(capsys)


def test_overlapping_offsets(snapshot, capsys):
    header, data = split(snapshot / SHARDS[0])
    name = sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])[1]
    header[name]["data_offsets"] = [offset - 2 for offset in header[name]["data_offsets"]]
    join(snapshot / SHARDS[0], header, data)
    error = refused(capsys)
    assert name in error and "overlaps" in error


def test_offsets_out_of_range(snapshot, capsys):
    header, data = split(snapshot / SHARDS[0])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [len(data), len(data) + 64]
    join(snapshot / SHARDS[0], header, data)
    assert name in refused(capsys)


def test_hole_between_tensors(snapshot, capsys):
    header, data = split(snapshot / SHARDS[1])
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 8, end + 8]
    join(snapshot / SHARDS[1], header, data[:begin] + bytes(8) + data[begin:])
    assert "hole" in refused(capsys)


def test_index_naming_an_absent_shard(snapshot, capsys):
    (snapshot / SHARDS[1]).unlink()
    assert "the shard is absent" in refused(capsys)


def test_index_naming_an_absent_tensor(snapshot, capsys):
    path = snapshot / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARDS[0]
    path.write_text(json.dumps(index))
    assert "lacks tensor 'model.layers.9.mlp.up_proj.weight'" in refused(capsys)


def rewrite(snapshot: Path, change) -> None:
    """Saves the checkpoint's tensors anew, in one file, after `change` has edited them."""
    from safetensors.torch import load_file

    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(snapshot / shard).items()}
    change(tensors)
    for file in (*SHARDS, "model.safetensors.index.json"):
        (snapshot / file).unlink()
    save_file(tensors, snapshot / "model.safetensors")


def test_missing_tensor(snapshot, capsys):
    rewrite(snapshot, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))
    assert "tensor 'model.layers.1.self_attn.q_norm.weight' is missing" in refused(capsys)


def test_extra_tensor(snapshot, capsys):
    rewrite(snapshot, lambda tensors: tensors.update(bias=torch.zeros(3)))
    assert "tensor 'bias' is not in the config's architecture" in refused(capsys)


def test_misshapen_tensor(snapshot, capsys):
    rewrite(snapshot, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert "tensor 'model.norm.weight' has shape [31]; the config asks for [32]" in refused(capsys)


def test_unknown_architecture(snapshot, capsys):
    path = snapshot / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    assert "gpt2" in refused(capsys).lower()


def test_bytes_that_differ_from_the_library_s_are_named(snapshot, capsys, monkeypatch):
    read = inventory.read_tensor_bytes

    def off_by_one(folder, entry):
        raw = read(folder, entry)
        return raw[:-1] + bytes([raw[-1] ^ 1]) if entry.name == "model.norm.weight" else raw

    monkeypatch.setattr(inventory, "read_tensor_bytes", off_by_one)
    assert "tensor 'model.norm.weight' extracted by hand differs" in refused(capsys)


def test_nothing_staged(workspace, monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "inventory")
    assert "data/hf/hf_snapshot/olmo2_tiny is not here" in refused(capsys)


def test_plan_keeps_a_tensor_larger_than_the_limit_alone():
    assert plan_shards({"a": (4,), "b": (100,), "c": (4,)}, 2, 50) == {
        "model-00001-of-00003.safetensors": {"a": (4,)},
        "model-00002-of-00003.safetensors": {"b": (100,)},
        "model-00003-of-00003.safetensors": {"c": (4,)},
    }
