"""docs/extending.md, walked: names are in the files that their items name, and what is made by the lists is taken."""

import re
from pathlib import Path

import pytest
import yaml

from stages.compose import as_dict, compose_conf, read_params
from stages.compose import main as compose_main
from stages.params import Gpu, Model, Week, Weeks, list_choices, select
from stages.stage import resolve
from stages.validate import check_gpu, check_model, check_weeks

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/extending.md").read_text()
CODE = re.compile(r"`([^`]+)`")


def items() -> dict[str, str]:
    """The items of all lists, each by its section and its number there."""
    found = {}
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for number, item in enumerate(re.findall(r"^- \[ \] ((?:.+\n)+?)(?=- \[ \] |\n)", section, re.MULTILINE), 1):
            found[f"{title} {number}"] = item
    return found


def read(path: Path) -> str:
    return "\n".join(file.read_text() for file in (path.rglob("*.py") if path.is_dir() else [path]))


def test_every_kind_has_a_list_and_what_holds_it():
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        assert f"[{title[0].lower()}{title[1:]}](#" in TEXT, title
        assert "- [ ] " in section and re.search(r"`tests/[\w/]+/test_\w+\.py`", section), title


@pytest.mark.parametrize("item", items().values(), ids=items())
def test_the_names_of_an_item_are_in_its_files(item):
    spans = CODE.findall(item)
    files = [ROOT / span for span in spans if "/" in span and (ROOT / span).exists()]
    text = "\n".join(read(path) for path in files)
    for span in spans if files else []:
        name = span.removeprefix("@")
        # What is written like a name of the code; `wNN`, `config.json` and `mma.sync` are not.
        if re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)?|_\w+", name) and re.search(r"[A-Z_]", name) and "NN" not in name:
            for word in name.split("."):
                assert re.search(rf"\b{word}\b", text), f"`{span}` is in none of {[str(f) for f in files]}"


def test_a_model_is_taken(workspace):
    text = Path("conf/model/olmo2_1b.yaml").read_text()
    Path("conf/model/new.yaml").write_text(text.replace("name: olmo2_1b", "name: new"))
    model = select(Model, as_dict(compose_conf(["model=new"])), None)
    assert model.name == "new" and list(check_model(model)) == []


def test_a_gpu_is_taken(workspace):
    text = Path("conf/gpu/h100.yaml").read_text()
    Path("conf/gpu/new.yaml").write_text(re.sub("count: .*", "count: 3", text.replace("name: h100", "name: new")))
    gpu = select(Gpu, as_dict(compose_conf(["gpu=new"])), None)
    assert gpu.count == 3 and list(check_gpu(gpu)) == []


def test_a_week_is_taken(workspace):
    before, new = list_choices("week")[-1], "w99"
    content = {"defaults": [before, "_self_"], "name": new, "title": "A week", "milestone": "x", "bench": ["load"]}
    Path(f"conf/week/{new}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    config = Path("conf/config.yaml")
    config.write_text(config.read_text().replace("  - _self_", f"  - week@weeks.{new}: {new}\n  - _self_"))
    assert compose_main(["--check"]) == 1 and compose_main([]) == 0 and compose_main(["--check"]) == 0
    weeks = select(Weeks, read_params(), None)
    assert list(weeks.weeks)[-1] == new and list(check_weeks(weeks)) == []
    (week,) = resolve((Week,), [f"week={new}", f"weeks.{new}.engine.max_batch=4"], by_hand=True)
    assert week.bench == ("load",) and week.parity == weeks.weeks[before].parity and week.engine.max_batch == 4
