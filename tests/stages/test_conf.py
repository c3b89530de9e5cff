"""conf/ and params.yaml: in step, complete, and true to what is published."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from engine.config import EngineConfig
from engine.model.config import ModelConfig
from engine.model.tensors import parameter_count, tensor_shapes
from stages.compose import as_dict, compose_conf, dump, read_params
from stages.compose import main as compose_main
from stages.params import Gpu, Model, Weeks, Workload, list_choices, select, thaw
from stages.sources import SHARD_BYTES, count_bytes, plan_shards
from stages.validate import check_model

ROOT = Path(__file__).resolve().parents[2]
GROUP_FILES = sorted((ROOT / "conf").glob("*/*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))
PARAMETERS = {
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b_instruct": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(group: str, choice: str) -> dict:
    return yaml.safe_load((ROOT / "conf" / group / f"{choice}.yaml").read_text())


def architecture(model: str) -> dict:
    return load("model", model)["architecture"]


def test_params_yaml_is_what_conf_composes_to():
    assert Path("params.yaml").read_text() == dump(compose_conf()), "run `make params`"


def test_params_yaml_is_what_dvc_would_write(tmp_path):
    from dvc.utils.hydra import compose_and_dump

    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", str(tmp_path), [])
    assert (tmp_path / "params.yaml").read_text() == Path("params.yaml").read_text()


def test_check_finds_params_yaml_out_of_step(workspace, capsys):
    assert compose_main(["--check"]) == 0
    conf = Path("conf/workload/smoke.yaml")
    conf.write_text(conf.read_text().replace("new_tokens: 16", "new_tokens: 17"))
    assert compose_main(["--check"]) == 1
    assert "run `make params`" in capsys.readouterr().err
    assert compose_main([]) == 0
    assert compose_main(["--check"]) == 0
    assert yaml.safe_load(Path("params.yaml").read_text())["workload"]["new_tokens"] == 17


def test_what_overrides_compose_to_is_shown(workspace, capsys):
    before = Path("params.yaml").read_text()
    assert compose_main(["--show"]) == 0
    assert capsys.readouterr().out == before
    assert compose_main(["--show", "model=olmo2_7b", "model.weights=random", "workload.repeats=9"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["name"], shown["model"]["weights"], shown["workload"]["repeats"]) == (
        "olmo2_7b",
        "random",
        9,
    )
    # It shows what is wrong, too.
    assert compose_main(["--show", "workload.repeats=0", "+foo=1"]) == 2
    shown, said = capsys.readouterr()
    assert yaml.safe_load(shown)["workload"]["repeats"] == 0
    assert "foo = 1: unknown key" in said and "workload.repeats = 0" in said
    assert compose_main(["--show", "model=olmo9"]) == 2
    assert "unknown model 'olmo9'" in capsys.readouterr().err
    assert Path("params.yaml").read_text() == before


@pytest.mark.parametrize("arguments", [["gpu=cpu"], ["--check", "gpu=cpu"], ["--shwo"]])
def test_nothing_is_written_for_arguments_that_are_none(workspace, capsys, arguments):
    Path("params.yaml").unlink()
    assert compose_main(arguments) == 2
    assert "usage: python -m stages.compose" in capsys.readouterr().err
    assert not Path("params.yaml").exists()


@pytest.mark.parametrize("file", GROUP_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_group_files(file):
    content = yaml.safe_load(file.read_text())
    assert content["name"] == file.stem
    assert "${" not in file.read_text(), "a resolver would make params.yaml depend on when or where it was composed"


@pytest.mark.parametrize("group", ["gpu", "model", "workload"])
def test_every_choice_is_a_valid_section(group):
    section = {"gpu": Gpu, "model": Model, "workload": Workload}[group]
    for choice in list_choices(group):
        assert select(section, {group: load(group, choice)}, None).name == choice


def test_every_week_file_is_in_the_config():
    weeks = select(Weeks, read_params(), None).weeks
    assert sorted(weeks) == list(weeks) == list_choices("week")


def test_a_week_says_only_what_it_adds():
    """Its file repeats nothing of the week that it builds on, an earlier one."""
    weeks = read_params()["weeks"]
    for name in weeks:
        if before := load("week", name).get("defaults"):
            earlier, itself = before
            assert itself == "_self_" and earlier < name
            assert find_repeated(load("week", name), weeks[earlier], name) == []


def find_repeated(delta: dict, base: dict, where: str) -> list[str]:
    """The keys of `delta` whose values `base` has too."""
    found = []
    for key, value in delta.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found += find_repeated(value, base[key], f"{where}.{key}")
        elif key in base and base[key] == value:
            found.append(f"{where}.{key}")
    return found


def test_weeks_name_all_that_they_switch_on():
    """What the engine chooses where nothing is said changes no week."""
    for week in select(Weeks, read_params(), None).weeks.values():
        if week.engine is not None:
            settings = week.engine.settings(gpu=False, max_positions=2048)
            assert settings.keys() == {field.name for field in dataclasses.fields(EngineConfig)}
            assert EngineConfig(**settings).kv_cache != "auto"


def test_the_groups_the_project_promises():
    assert set(list_choices("gpu")) >= {"cpu", "auto", "rtx4090", "rtx5090", "a100_80g", "h100", "h200", "l40s"}
    assert set(list_choices("model")) >= {"olmo2_tiny", *PARAMETERS}
    assert set(list_choices("workload")) >= {"smoke", "standard"}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_fetched_and_run(model):
    """Pinned where the hub has it, and of an architecture that the engine takes."""
    assert list(check_model(select(Model, {"model": load("model", model)}, None))) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("revision", "null", "model.revision"),
        ("hub_id", "null", "not on the hub"),
        ("hidden_act", "gelu", "hidden_act"),
    ],
)
def test_a_model_that_cannot_is_refused(workspace, field, value, said):
    file = Path("conf/model/mistral_7b.yaml")
    file.write_text(re.sub(rf"( *{field}): .*", rf"\1: {value}", file.read_text()))
    model = select(Model, as_dict(compose_conf(["model=mistral_7b"])), None)
    assert [said in error for error in check_model(model)] == [True]


@pytest.mark.parametrize("model", list(PARAMETERS))
def test_architectures_have_their_published_sizes(model):
    assert parameter_count(ModelConfig.from_dict(architecture(model))) == PARAMETERS[model]


def test_13b_instruct_is_sharded_as_the_hub_has_it():
    shapes = tensor_shapes(ModelConfig.from_dict(architecture("olmo2_13b_instruct")))
    shards = plan_shards(shapes, 2, SHARD_BYTES)
    assert list(shards) == [f"model-{number:05d}-of-00006.safetensors" for number in range(1, 7)]
    assert len(shapes) == 443
    assert sum(count_bytes(part, 2) for part in shards.values()) == 27_432_396_800
    # Layer 14's query is the last tensor of the second shard, its key the first of the third.
    assert list(shards["model-00002-of-00006.safetensors"])[-1] == "model.layers.14.self_attn.q_proj.weight"
    assert next(iter(shards["model-00003-of-00006.safetensors"])) == "model.layers.14.self_attn.k_proj.weight"


def test_llama3_is_sharded_as_the_hub_has_it():
    shards = plan_shards(tensor_shapes(ModelConfig.from_dict(architecture("llama3_8b"))), 2, SHARD_BYTES)
    assert len(shards) == 4


def test_olmo2_tiny_is_the_bundled_model():
    model = select(Model, read_params(), None)
    bundled = Path(model.path) / "config.json"
    if not bundled.exists():
        pytest.skip("the bundled model is not here")
    assert {key: value for key, value in json.loads(bundled.read_text()).items() if key != "transformers_version"} == (
        thaw(model.architecture)
    )


def test_weights_random_needs_no_other_key():
    params = as_dict(compose_conf(["model=olmo2_7b", "model.weights=random"]))
    assert select(Model, params, None).weights == "random"
