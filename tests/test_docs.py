"""The documentation against the tree: what it links to, and the files, names and commands it mentions."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# What is read beside the code, and must therefore say nothing that is not there.
NAMING = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in ("architecture", "extending", "reading"))]
# Written by stages, or by whoever follows the text.
MADE = ("data/", "outputs/", "reports/local", "reports/site", "reports/metrics", ".venv")
PLACEHOLDER = re.compile(r"NAME|\w*OPERATION|\bw?(NN|MM)\b|_wNN|[‹›*…{}$<>]")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def text_of(doc: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```(?s:.*?)^```|^(    .*\n)+", "", doc.read_text(), flags=re.MULTILINE)


def anchors_of(doc: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(doc), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def tree() -> list[str]:
    """Every file that git has or would take."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@functools.cache
def words() -> frozenset[str]:
    """Every word in the tree's code and configuration, and in the names of its files."""
    code = [name for name in tree() if name.endswith((".py", ".yaml", ".toml", ".sh", "Makefile"))]
    text = "\n".join([*tree(), *((ROOT / name).read_text() for name in code if name != "tests/test_docs.py")])
    return frozenset(re.findall(r"\w+", text))


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_links_lead_somewhere(doc: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(doc)):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue
        file = (doc.parent / path).resolve() if path else doc
        assert file.exists(), f"{doc.name}: {target}"
        assert not anchor or file.suffix != ".md" or anchor in anchors_of(file), f"{doc.name}: {target}"


def test_every_decision_is_found_by_its_topic() -> None:
    decisions = ROOT / "docs/decisions.md"
    index, *entries = re.split(r"^## ", decisions.read_text().partition("\n## By topic\n")[2], flags=re.MULTILINE)
    titles = [entry.partition("\n")[0] for entry in entries]
    assert sorted(re.findall(r"^- \[(.+)\]\(#", index, re.MULTILINE)) == sorted(titles)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## The tree\n")[2].partition("\n## ")[0]
    listed, folder = [], ""
    for indent, name, said in re.findall(r"^    ( *)(\S+) +(.*)$", section, re.MULTILINE):
        folder = folder if indent else name
        listed.append(folder + name if indent else name)
        assert (ROOT / listed[-1]).exists() and said, listed[-1]
    for folder in ("engine", "kernels", "stages"):
        rooms = {
            f"{folder}/" + re.sub(r"/.*", "/", name.removeprefix(f"{folder}/"))
            for name in tree()
            if name.startswith(f"{folder}/")
        }
        assert rooms - {f"{folder}/__init__.py"} == {
            name for name in listed if name.startswith(folder) and name != f"{folder}/"
        }


@pytest.mark.parametrize("doc", NAMING, ids=lambda doc: doc.name)
def test_files_that_are_named_exist(doc: Path) -> None:
    for span in CODE.findall(text_of(doc)):
        if not re.fullmatch(r"\.?[\w.\-]+(/[\w.\-]+)*/?", span) or PLACEHOLDER.search(span) or span.startswith(MADE):
            continue
        if "/" in span or re.search(r"\.(py|yaml|md|toml|csv|sh|lock)$", span):
            ends = f"/{span.rstrip('/')}"
            there = any(f"/{name}".endswith(ends) or f"{ends}/" in f"/{name}" for name in tree())
            assert there, f"{doc.name}: `{span}`"


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_commands_that_are_named_exist(doc: Path) -> None:
    from engine.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = doc.read_text()
    said = "\n".join([*CODE.findall(text), *re.findall(r"^```(?s:.*?)^```|^    .*$", text, re.MULTILINE)])
    for command, further in re.findall(r"^\W*afs ([a-z][a-z-]*)(?: ([a-z]+))?", said, re.MULTILINE):
        assert command in commands, f"{doc.name}: afs {command}"
        assert command != "bench" or not further or further in commands["bench"].commands, (
            f"{doc.name}: afs bench {further}"
        )
    for target in re.findall(r"^\W*make ([a-z][a-z-]*)", said, re.MULTILINE):
        assert target in targets, f"{doc.name}: make {target}"
    for module in re.findall(r"python -m ((?:stages|engine|tests)\.[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        there = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert there or module == "stages.STAGE", f"{doc.name}: python -m {module}"


@pytest.mark.parametrize(
    "doc", [path for path in NAMING if path.stem in ("extending", "reading")], ids=lambda d: d.name
)
def test_names_that_are_named_exist(doc: Path) -> None:
    for span in CODE.findall(text_of(doc)):
        for name in re.findall(r"[A-Za-z_]\w+", PLACEHOLDER.sub(" ", span)):
            plain = name.islower() and "_" not in name and not re.search(r"[.(/]", span)
            assert plain or name in words(), f"{doc.name}: `{span}`: {name} is nowhere in the code"
