"""stages/baseline.py, stages/hf.py and stages/reference.py on a tiny random model."""

from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch

from stages import baseline, reference
from stages.hf import greedy, load_model, load_tokenizer, observe, timed_generate
from stages.reference import Bundle, BundleError, GreedyReference, Prompt, write_bundle

SNAPSHOT = f"data/hf/hf_snapshot/{tiny.NAME}"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tiny.pipeline()
    monkeypatch.chdir(directory)
    return directory


def test_rows_are_measured_on_the_cpu_and_gpu_rows_are_null(here: Path):
    frame = tiny.read("reports/metrics/baseline.parquet")
    decode = frame[(frame.suite == "standard_decode") & (frame.metric == "tpot_ms")]
    assert sorted(decode.batch) == [1, 1, 2, 2] and sorted(set(decode.context)) == [8, 20]
    assert (decode.value > 0).all() and (decode.status == "ok").all() and (decode.limit > 0).all()
    assert all(len(samples) == tiny.WORKLOAD.repeats for samples in decode.samples)
    assert set(frame.backend) == {"transformers"}
    for metric in ("peak_memory_bytes", "gpu_utilisation"):
        rows = frame[frame.metric == metric]
        assert len(rows) and rows.value.isna().all() and set(rows.status) == {"not_measured"}
    assert (frame[frame.metric == "cpu_utilisation"].value > 0).all()
    assert set(frame[frame.suite == "workload_prompts"].batch) == {1, 2}


def test_bundle_holds_what_transformers_computes(here: Path):
    bundle = Bundle(here / "data/reference" / tiny.NAME)
    tokenizer = load_tokenizer(SNAPSHOT)
    model = load_model(SNAPSHOT, torch.float32, "cpu", attention="eager")
    for index, prompt in enumerate(bundle.prompts):
        assert prompt.token_ids == tokenizer(prompt.text)["input_ids"]
        with torch.no_grad():
            out = model(torch.tensor([prompt.token_ids]), output_hidden_states=True)
        seen = bundle.activations("float32", index)
        assert list(seen) and torch.equal(seen["logits"], out.logits[0])
        assert torch.equal(seen["embedding"], out.hidden_states[0][0])
        assert torch.equal(seen["layers.0"], out.hidden_states[1][0])
        assert torch.equal(seen["norm"], out.hidden_states[-1][0])
        found = prompt.greedy["float32"]
        assert found.text == tokenizer.decode(found.token_ids, skip_special_tokens=True)
        assert [row[0] for row in found.candidates] == found.token_ids
        torch.testing.assert_close(torch.tensor(found.logits), torch.tensor(found.float32), atol=1e-4, rtol=0)


def test_observe_sees_every_layer_before_the_final_norm(here: Path):
    model = load_model(SNAPSHOT, torch.bfloat16, "cpu", attention="eager")
    seen = observe(model, [1, 2, 3])
    assert set(seen) == {"embedding", "norm", "logits", *(f"layers.{index}" for index in range(4))}
    assert torch.equal(model.model.norm(seen["layers.3"]), seen["norm"])
    assert not model.model.layers[0]._forward_hooks


def test_timing_makes_all_tokens_even_past_an_end_of_sequence(here: Path):
    model = load_model(SNAPSHOT, torch.float32, "cpu")
    ids = torch.tensor([[5, 6, 7]])
    first = greedy(model, [5, 6, 7], 1).token_ids[0]
    model.generation_config.eos_token_id = first
    assert greedy(model, [5, 6, 7], 4).token_ids == [first]
    seconds = timed_generate(model, ids, torch.ones_like(ids), 4)
    assert len(seconds) == 4 and seconds == sorted(seconds)


def test_prompts_without_a_tokenizer_depend_on_their_text_alone():
    first = baseline.encode_prompts(None, ("one text", "another" * 100), 320)
    assert first == baseline.encode_prompts(None, ("one text", "another" * 100), 320)
    assert first[0] != first[1][: len(first[0])] and len(first[1]) == baseline.OBSERVED_TOKENS
    assert all(0 <= token < 320 for ids in first for token in ids)


def test_a_killed_write_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = tmp_path / "reference"
    step = GreedyReference([1], "x", [[1, 2]], [[1.0, 0.5]], [[1.0, 0.5]])
    prompts = [Prompt("text", [1, 2], True, {"float32": step})]
    tensors = {"float32": {"0/logits": torch.ones(2, 4)}, "bfloat16": {"0/logits": torch.ones(2, 4).bfloat16()}}
    write_bundle(directory, "old", prompts, tensors, {})

    def killed(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference.json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(directory, "new", prompts, tensors, {})
    monkeypatch.undo()
    bundle = Bundle(directory, "old")
    assert bundle.prompts == prompts
    assert torch.equal(bundle.activations("bfloat16", 0)["logits"], torch.ones(2, 4))
    write_bundle(directory, "new", prompts, tensors, {})
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_a_bundle_of_other_weights_is_refused(here: Path, tmp_path: Path):
    with pytest.raises(BundleError, match="other weights"):
        Bundle(here / "data/reference" / tiny.NAME, "0" * 64)
    with pytest.raises(BundleError, match="absent"):
        Bundle(tmp_path)
    with pytest.raises(BundleError, match="absent"):
        reference.checkpoint_id(tmp_path / "manifest.json")
