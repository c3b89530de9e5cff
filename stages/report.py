"""Joins the Parquet of this host and of every recorded run into REPORT.md, a page and figures, all under reports/.

The same Parquet gives the same bytes: no clock, host or network enters. What was not measured is shown with its reason,
and every table names the host and the commit of its rows. README.md's results are written from the recorded runs alone.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
import yaml

from stages import metrics
from stages.host import HOST, Host
from stages.params import Week, Weeks
from stages.report_figures import standalone
from stages.report_parts import LOCAL, Figures, Inputs, Planned, Row
from stages.report_rows import cited, list_pages, name_page
from stages.report_sections import SECTIONS, glance_table, headline
from stages.stage import Run, StageError, stage, write_whole

TEMPLATES = Path(__file__).with_name("report_templates")
METRICS, RECORDED, README = Path("reports/metrics"), Path("reports/recorded"), Path("README.md")
ARCHITECTURE, FIGURES = Path("reports/architecture.csv"), Path("reports/figures")
SITE, ROWS = Path("reports/site"), Path("reports/site/rows")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def read_rows(path: Path, run: str, name: str) -> list[Row]:
    """The rows of a metrics file, with None for what it leaves empty. Raises MetricsError for any other."""
    records = metrics.read_table(path).to_pylist()
    return [Row(**record, run=run, source=f"{name}, row {place}") for place, record in enumerate(records)]


def read_local(run: Run) -> list[Row]:
    """This host's metrics. A run whose check failed leaves `<name>.failed.parquet`, which is read in its place."""
    names = {path.name for path in METRICS.glob("*.parquet")}
    if run.by_hand:
        names |= {path.name for path in Path("outputs").glob(f"*/{METRICS}/*.parquet")}
    names -= {name.replace(".failed.", ".") for name in names if ".failed." in name}
    return [row for name in sorted(names) for row in read_rows(run.find(METRICS / name), LOCAL, f"{METRICS}/{name}")]


def read_recorded(root: Path = RECORDED) -> list[Row]:
    """The rows of every reports/recorded/<gpu>/<model>/*.parquet."""
    return [
        row
        for path in sorted(root.glob("*/*/*.parquet"))
        for row in read_rows(path, path.parent.relative_to(root).as_posix(), path.as_posix())
    ]


def read_dates(rows: Sequence[Row]) -> dict[str, str]:
    """Commit -> the day git says it was made, for the rows' commits that git knows."""
    dates = {}
    for commit in sorted({row.commit for row in rows if row.commit}):
        command = ["git", "show", "--no-patch", "--format=%cs", commit.removesuffix("-dirty"), "--"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found:
            dates[commit] = found
    return dates


def read_architecture(run: Run) -> dict[str, str]:
    """The inventory stage's summary, property -> value; empty where it has not run."""
    if not ARCHITECTURE.exists() and not (run.by_hand and list(Path("outputs").glob(f"*/{ARCHITECTURE}"))):
        return {}
    frame = pd.read_csv(run.find(ARCHITECTURE), dtype=str, keep_default_na=False)
    return dict(zip(frame["property"], frame["value"], strict=True))


def read_hosts(run: Run) -> dict[str, Host]:
    """Run -> the machine: this host's host.json and those beside the recorded rows, where they are."""
    hosts = {}
    if HOST.exists() or (run.by_hand and list(Path("outputs").glob(f"*/{HOST}"))):
        hosts[LOCAL] = Host.from_file(run.find(HOST))
    for path in sorted(RECORDED.glob("*/*/host.json")):
        hosts[path.parent.relative_to(RECORDED).as_posix()] = Host.from_file(path)
    return hosts


def read_plan() -> dict[str, Planned]:
    """Week -> what was planned."""
    plan = yaml.safe_load((TEMPLATES / "plan.yaml").read_text(encoding="utf-8"))
    return {name: Planned(**week) for name, week in plan.items()}


def environment(autoescape: bool) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["cell"] = markdown_cell
    made.filters["href"] = name_page
    made.filters["markdown"] = lambda cell: f"{cell.text} ({cell.small})" if cell.small else cell.text
    return made


def markdown_cell(text: str) -> str:
    """`text` so that it stays in its cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def render(inputs: Inputs) -> dict[str, str]:
    """Path -> content of the report, the page and the figures: a function of `inputs` alone."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    sections = [make(inputs) for make in SECTIONS]
    context = {"sections": sections, "headline": headline(inputs), "style": style}
    pages = environment(True)
    files = {
        "reports/REPORT.md": environment(False).get_template("report.md.j2").render(context),
        f"{SITE}/index.html": pages.get_template("index.html.j2").render(context),
    }
    sources = cited(sections) | {card["source"] for card in context["headline"]["cards"]}
    template = pages.get_template("rows.html.j2")
    for path, page in list_pages(inputs.rows, sources).items():
        files[f"{SITE}/{path}"] = template.render(page=page, style=style)
    palette = style.partition("/* page */")[0]
    for block in (block for section in sections for block in section.blocks if isinstance(block, Figures)):
        files |= {f"{FIGURES}/{figure.name}.svg": standalone(figure.svg, palette) for figure in block.figures}
    return files


def readme_block(recorded: Sequence[Row], weeks: Mapping[str, Week]) -> str:
    """README.md's results with their markers, a function of the recorded rows alone."""
    inputs = Inputs(recorded, weeks)
    text = environment(False).get_template("readme.md.j2").render(table=glance_table(inputs, inputs.runs))
    return f"{BEGIN}\n{text.strip()}\n{END}"


def fill_readme(readme: str, block: str) -> str:
    """`readme` with `block` as its results. Raises StageError unless each marker is there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise StageError(f"{README} should have '{BEGIN}' and after it '{END}', each once")
    return readme[: readme.index(BEGIN)] + block + readme[readme.index(END) + len(END) :]


@stage(Weeks)
def main(run: Run, weeks: Weeks) -> None:
    recorded = read_recorded()
    rows = read_local(run) + recorded
    if not rows:
        raise StageError(f"no Parquet under {METRICS} or {RECORDED}: run the stages that measure first (`dvc repro`)")
    inputs = Inputs(rows, weeks.weeks, read_dates(rows), read_architecture(run), read_hosts(run), read_plan())
    files = render(inputs)
    for path, content in files.items():
        write_whole(run.out(path), content)
    made = {run.out(path) for path in files}
    for folder in (FIGURES, ROWS):
        for stale in set(run.out(folder / "any").parent.iterdir()) - made:
            stale.unlink()
    if README.exists():
        write_whole(run.out(README), fill_readme(README.read_text("utf-8"), readme_block(recorded, weeks.weeks)))
    print(f"wrote {run.out('reports/REPORT.md')} and {run.out('reports/site/index.html')}")


if __name__ == "__main__":
    main()
