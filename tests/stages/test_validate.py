"""Wrong configurations, each with the key, the value and what would be right; and the lists that `validate` repeats."""

import copy
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import EngineConfig
from engine.model.kv_cache import PAGE_SIZES
from stages.params import Engine, ParamsError
from stages.validate import check_params

ROOT = Path(__file__).resolve().parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def change(**changes: Any) -> dict[str, Any]:
    """params.yaml's content with other values at dotted keys, written with `__`."""
    params = copy.deepcopy(PARAMS)
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        place = params
        for parent in parents:
            place = place[parent]
        place[key] = value
    return params


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Sections that are none, and keys that no section has.
        ({"foo": 1}, "foo = 1: unknown key; there are gpu, model, workload, weeks"),
        ({"gpu": None}, "gpu = None: should be a section of keys"),
        ({"weeks": []}, "weeks = []: should hold a section for each week"),
        ({"workload__load__users": 3}, "workload.load.users: unknown key"),
        # Types and ranges.
        ({"workload__repeats": 0}, "workload.repeats = 0: input should be greater than or equal to 1"),
        ({"workload__repeats": "abc"}, "workload.repeats = 'abc': input should be a valid integer"),
        ({"workload__repeats": 3.0}, "workload.repeats = 3.0: input should be a valid integer"),
        ({"workload__warmup": yaml.safe_load("2026-11-28")}, "workload.warmup = 2026-11-28: should be a number"),
        ({"workload__batch_sizes": []}, "workload.batch_sizes = []: tuple should have at least 1 item"),
        ({"workload__prompts": ["a", ""]}, "workload.prompts.1 = '': string should have at least 1 character"),
        ({"workload__requests__prompt_tokens": [9, 3]}, "prompt_tokens = [9, 3]: should be the least, then the most"),
        ({"workload__new_tokens": 2048}, "workload.new_tokens = 2048: should be below the model's 2048 positions"),
        # The engine's switches, alone and together.
        ({"weeks__w05__engine__attention": "flahs"}, "engine.attention = 'flahs': input should be 'naive' or 'flash'"),
        ({"weeks__w06__engine__page_size": 24}, "weeks.w06.engine.page_size = 24: input should be 8, 16, 32"),
        ({"weeks__w03__engine__cuda_graph": True}, "weeks.w03.engine: cuda_graph = True needs kv_cache = contiguous"),
        ({"weeks__w04__engine__max_model_len": 4096}, "max_model_len = 4096: should be at most the model's 2048 pos"),
        ({"weeks__w08__engine__kv_tokens": 512}, "weeks.w08.engine.kv_tokens = 512: should be room for a request"),
        # Suites.
        ({"weeks__w05__bench": ["kernles"]}, "weeks.w05.bench.0 = 'kernles': unknown suite; there are: baseline"),
        ({"weeks__w05__parity": ["layer"]}, "weeks.w05.parity.0 = 'layer': unknown suite; there are: tokenizer"),
        ({"weeks__w05__bench": ["kernels", "kernels"]}, "weeks.w05.bench.1 = 'kernels': is there twice"),
        ({"weeks__w05__engine": None}, "weeks.w05.parity.0 = 'layers': needs an engine, and weeks.w05.engine is null"),
        # Names that are not what they name.
        ({"weeks__w99": PARAMS["weeks"]["w01"] | {"name": "w99"}}, "weeks.w99: unknown week; there are: w01, w02"),
        ({"gpu__name": "h200"}, "gpu.name = 'h200': should be 'auto', which the rest of the section is; to have the"),
        ({"gpu__name": "h200", "gpu__count": 1}, "gpu.sm = null: should be given of gpu=h200, whose datasheet says"),
        ({"gpu__memory_gb": 80}, "gpu.memory_gb = 80.0: should be null with gpu=auto"),
        ({"model__name": "olmo2_7b"}, "model.name = 'olmo2_7b': should be 'olmo2_tiny', which the rest"),
        ({"workload__name": "standard"}, "workload.name = 'standard': should be 'smoke', which the rest"),
        # The model and where it comes from.
        ({"model__architecture__hidden_size": -1}, "model.architecture.hidden_size = -1 is not at least 1"),
        ({"model__architecture": {}}, "model.architecture.architectures is missing"),
        ({"model__weights": "hub"}, "model olmo2_tiny is not on the hub"),
        ({"model__path": None}, "model.weights=bundled of olmo2_tiny has no model.path"),
        ({"model__seed": 7}, "model.seed = 7 changes nothing with model.weights = bundled: say model.weights=random"),
        ({"model__path": "/x", "model__weights": "random"}, "model.path = '/x' changes nothing with"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(changes, words):
    with pytest.raises(ParamsError) as refused:
        check_params(change(**changes))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ParamsError) as refused:
        check_params(change(weeks__w05__bench=["pears"], model__seed=7, gpu__count=3))
    assert all(key in str(refused.value) for key in ("weeks.w05.bench.0", "model.seed", "gpu.count"))


@pytest.mark.parametrize(
    ("group", "choice"),
    [(path.parent.name, path.stem) for path in sorted(ROOT.glob("conf/[gmw]*/*.yaml")) if path.parent.name != "week"],
)
def test_every_choice_of_conf_is_right(group, choice):
    check_params(PARAMS | {group: yaml.safe_load(Path(f"conf/{group}/{choice}.yaml").read_text())})


def test_values_of_one_s_own_are_right():
    check_params(
        change(
            workload__repeats=9, weeks__w08__engine__kv_tokens=4096, weeks__w05__bench=[], weeks__w05__engine=None,
            weeks__w05__parity=["tokenizer"], model__architecture__vocab_size=5000,
        )
    )  # fmt: skip


def test_a_configuration_is_checked_without_torch():
    code = "import sys, stages.validate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_engine_s_switches_are_those_that_the_engine_has():
    ours, theirs = typing.get_type_hints(Engine), typing.get_type_hints(EngineConfig)
    for name in ("attention", "linear", "sampling", "kv_cache", "batching"):
        choices = set(typing.get_args(theirs[name])) - {"auto"}  # a week says what it runs
        assert set(typing.get_args(ours[name])) == choices, name
    assert typing.get_args(ours["page_size"]) == PAGE_SIZES
