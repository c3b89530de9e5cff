"""The bundled model: its folder is complete and consistent, it was trained, and its recipe's parts do what they say."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.train_tiny import (
    EOS,
    SETTINGS,
    Settings,
    build_config,
    choose_prompts,
    choose_sample,
    distinct_ngrams,
    document_loss,
    learning_rate,
    read_batches,
    read_documents,
    render_readme,
    repeated_next,
    round_int4,
)

MODEL = Path(__file__).parents[2] / "data/models/olmo2-tiny"


def read_json(name: str) -> dict:
    return json.loads((MODEL / name).read_bytes())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_config_is_the_recipes_and_leaves_nothing_to_defaults(model: Any) -> None:
    written = read_json("config.json")
    assert written == build_config(SETTINGS)
    assert written["hidden_size"] == 128 * written["num_attention_heads"]
    assert written["hidden_size"] % 128 == written["intermediate_size"] % 128 == 0
    assert model.config.rope_parameters["rope_theta"] == 500000
    assert (model.config.rms_norm_eps, model.config.tie_word_embeddings) == (1e-6, False)
    assert (model.config.eos_token_id, model.config.bos_token_id) == (4094, None)
    assert model.config.max_position_embeddings >= 1024


def test_shards_hold_exactly_what_the_index_says(model: Any) -> None:
    index = read_json("model.safetensors.index.json")
    shards = sorted(path.name for path in MODEL.glob("*.safetensors"))
    assert len(shards) >= 2
    size = 0
    for shard in shards:
        with safe_open(MODEL / shard, "pt") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all()
                size += tensor.nbytes
    assert size == index["metadata"]["total_size"] == 2 * model.num_parameters()
    assert set(index["weight_map"]) == set(model.state_dict())


def test_folder_is_small_enough_to_be_bundled() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 25e6


def test_training_was_long_enough(model: Any) -> None:
    training = read_json("training.json")
    assert training["parameters"] == model.num_parameters()
    assert training["tokens"] >= 50 * training["parameters"]
    assert len(training["corpus"]["sha256"]) == 64


def test_recorded_figures_pass_the_gates() -> None:
    evaluation = read_json("evaluation.json")
    assert evaluation["heldout"]["bits_per_byte"] <= 1.35
    assert evaluation["distinct_ngrams"]["sampled"]["mean"] >= 0.7
    assert evaluation["heldout_int4"]["loss"] > evaluation["heldout"]["loss"] + 0.01


def test_readme_is_what_the_records_render_to() -> None:
    assert (MODEL / "README.md").read_text() == render_readme(read_json("evaluation.json"), read_json("training.json"))


def test_heldout_text_is_predicted_well(model: Any, tokenizer: Any) -> None:
    text = max((MODEL / "heldout.txt").read_bytes().decode().split(EOS), key=len)[:6000]
    nats = document_loss(model, tokenizer(text)["input_ids"], model.config.eos_token_id, 1024)
    assert nats / math.log(2) / len(text.encode()) <= 1.2


def test_windows_only_shorten_the_context(model: Any, tokenizer: Any) -> None:
    tokens = tokenizer((MODEL / "heldout.txt").read_text()[:1500])["input_ids"]
    whole, windowed = (document_loss(model, tokens, model.config.eos_token_id, w) for w in (2048, 128))
    ids = torch.tensor([[model.config.eos_token_id, *tokens]])
    assert whole == pytest.approx(model(ids, labels=ids).loss.item() * len(tokens), rel=1e-4)
    assert whole < windowed < 1.5 * whole


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn  x\n", "naïve café 😀👩‍💻", "日本語と中文。", " 12345\r\n\n\n  end ", ""]
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= token < 4094 for token in ids)


def test_special_tokens_are_the_last_ids(tokenizer: Any) -> None:
    assert len(tokenizer) == 4096
    assert tokenizer(f"a{EOS}b")["input_ids"][1] == tokenizer.eos_token_id == 4094
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (4095, None)


def test_chat_template_renders(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    expected = f"<|system|>\nS\n<|user|>\nA\n<|assistant|>\nB{EOS}\n<|user|>\nC\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer.apply_chat_template(chat[:3], tokenize=False).endswith(f"B{EOS}")


def test_prompts_are_openings_of_heldout_files() -> None:
    prompts = json.loads((MODEL / "prompts.json").read_bytes())
    assert len(prompts) == len(set(prompts)) == 20
    assert all(isinstance(prompt, str) and len(prompt) >= 400 for prompt in prompts)


def test_documents_are_filtered_deduplicated_and_split_by_path(tmp_path: Path) -> None:
    body = "x = 1\n" * 20
    files = {"a.py": body, "b.py": body, "c.rst.txt": body + "y", "d.c": body + "z", "lib/encodings/e.py": body + "w"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9" * 50)
    documents = read_documents(tmp_path, SETTINGS)
    assert sorted(document["text"] for document in documents) == sorted([body, body + "y"])
    assert documents == read_documents(tmp_path, SETTINGS)
    assert {document["split"] for document in documents} <= {"train", "heldout"}


def test_sample_and_prompts_keep_their_limits() -> None:
    assert choose_sample(["a" * 30_000, "b" * 40_000, "c" * 30_000], SETTINGS) == ["a" * 30_000, "c" * 30_000]
    documents = [{"path": f"{i}.py", "text": "line of code\n" * 10} for i in range(3)]
    assert choose_prompts(documents, 2, 20) == ["line of code\nline of code"] * 2


def test_batches_predict_a_token_at_most_once_a_pass() -> None:
    settings = Settings(context=8, batch_rows=3)
    tokens = np.array([99, *range(4), 99, *range(10, 23), 99, *range(30, 40), 99], dtype=np.uint16)
    batch = next(read_batches(tokens, 99, settings))
    assert batch.shape == (3, 9) and batch.dtype == np.int64
    targets = [token for token in batch[:, 1:].flatten().tolist() if token != 99]
    assert len(targets) == len(set(targets)) >= 24 - 3
    assert (batch == next(read_batches(tokens, 99, settings))).all()


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, 1000, SETTINGS) for step in range(1001)]
    assert max(rates) == rates[200] == SETTINGS.learning_rate
    assert rates[0] < rates[100] and rates[1000] == pytest.approx(SETTINGS.final_learning_rate)


def test_repeated_next_finds_the_token_a_loop_would_add() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 5]])
    assert repeated_next(rows, 3, 256).tolist() == [[-1, -1, -1, -1, -1, -1, 4, -1, -1, -1, -1]]
    assert (repeated_next(rows, 3, 3) == -1).all()


def test_distinct_ngrams() -> None:
    assert distinct_ngrams(list(range(128)), 4) == 1
    assert distinct_ngrams([7] * 128, 4) == 1 / 125
    assert distinct_ngrams([1, 2, 3, 1, 2, 3, 1], 4) == 3 / 4


def test_round_int4_rounds_to_sixteen_levels_a_group() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    rounded = round_int4(weight, 128)
    for before, after in zip(weight.view(8, 128), rounded.view(8, 128), strict=True):
        step = before.abs().max() / 7
        assert len(after.unique()) <= 16
        assert (before - after).abs().max() <= step / 2 * 1.0001
    assert torch.equal(round_int4(torch.zeros(2, 128), 128), torch.zeros(2, 128))
