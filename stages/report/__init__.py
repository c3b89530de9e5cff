"""Makes reports of Parquet: of the recorded runs, of this host, and a page of both.

reports/REPORT.md with its figures, and README.md's results, are of reports/recorded/ alone: the same on every machine,
and in git. reports/local/ is the same of what this host measured, and the page, reports/site/, has all rows of both;
git ignores them. The same Parquet gives the same bytes: no clock, host or network enters. What was not measured is
shown with its reason, and every table names the host and the commit of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
import pandas as pd
import yaml

from stages import metrics
from stages.commit import find_day, read_days
from stages.exits import StageError
from stages.host import HOST, Host
from stages.params import Week, Weeks
from stages.report.figures import standalone
from stages.report.glance import first_screen, glance_table
from stages.report.parts import LOCAL, Figures, Inputs, Planned, Row, Section
from stages.report.rows import cited, list_pages, name_page
from stages.report.sections import SECTIONS
from stages.stage import Run, stage, write_whole

TEMPLATES = Path(__file__).with_name("templates")
METRICS, RECORDED, README = Path("reports/metrics"), Path("reports/recorded"), Path("README.md")
ARCHITECTURE = Path("reports/architecture.csv")
REPORTS = Path("reports"), Path("reports/local")
"""Where REPORT.md and figures/ are: of the recorded runs, of this host."""
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


def read_dates(local: Sequence[Row]) -> dict[str, str]:
    """Commit -> its day: of recorded rows as it was recorded, of local ones as git says, where it knows them."""
    recorded = read_days(RECORDED)
    commits = sorted({row.commit for row in local if row.commit and row.commit not in recorded})
    return recorded | {commit: day for commit in commits if (day := find_day(commit))}


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


def split(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """The recorded runs' part of the inputs, and this host's."""
    local, recorded = ([row for row in inputs.rows if (row.run == LOCAL) is here] for here in (True, False))
    hosts = {run: host for run, host in inputs.hosts.items() if run != LOCAL}
    ours = {run: host for run, host in inputs.hosts.items() if run == LOCAL}
    return (
        replace(inputs, rows=recorded, dates=read_days(RECORDED), architecture={}, hosts=hosts),
        replace(inputs, rows=local, hosts=ours),
    )


def render_report(inputs: Inputs, folder: Path) -> dict[str, str]:
    """Path -> content of REPORT.md and its figures under `folder`: what a person reads, without the page's details."""
    sections = [shorten(section) for make in SECTIONS if not (section := make(inputs)).page_only]
    context = {"sections": sections, "screen": first_screen(inputs), "local": folder == REPORTS[1]}
    files = {f"{folder}/REPORT.md": environment(False).get_template("report.md.j2").render(context)}
    palette = read_style().partition("/* page */")[0]
    for block in (block for section in sections for block in section.blocks if isinstance(block, Figures)):
        files |= {f"{folder}/figures/{figure.name}.svg": standalone(figure.svg, palette) for figure in block.figures}
    return files


def shorten(section: Section) -> Section:
    """The section without the tables that the page folds, and without the figures of other runs than the first."""
    return replace(section, blocks=[block for block in section.blocks if not getattr(block, "folded", False)])


def read_style() -> str:
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


def render_page(inputs: Inputs) -> dict[str, str]:
    """Path -> content of the page and of the rows that it cites."""
    sections, screen, style = [make(inputs) for make in SECTIONS], first_screen(inputs), read_style()
    pages = environment(True)
    context = {"sections": sections, "screen": screen, "style": style}
    files = {f"{SITE}/index.html": pages.get_template("index.html.j2").render(context)}
    sources = cited(sections) | {card["source"] for card in screen["cards"]}
    template = pages.get_template("rows.html.j2")
    for path, page in list_pages(inputs.rows, sources).items():
        files[f"{SITE}/{path}"] = template.render(page=page, style=style)
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
    dates = read_dates([row for row in rows if row.run == LOCAL])
    inputs = Inputs(rows, weeks.weeks, dates, read_architecture(run), read_hosts(run), read_plan())
    files = render_page(inputs)
    for of, folder in zip(split(inputs), REPORTS, strict=True):
        files |= render_report(of, folder) if of.rows or folder == REPORTS[0] else {}
    for path, content in files.items():
        write_whole(run.out(path), content)
    made = {run.out(path) for path in files}
    for folder in (*(folder / "figures" for folder in REPORTS), ROWS):
        for stale in set(run.out(folder / "any").parent.iterdir()) - made:
            stale.unlink()
    if README.exists():
        write_whole(run.out(README), fill_readme(README.read_text("utf-8"), readme_block(recorded, weeks.weeks)))
    print(f"wrote {', '.join(str(path) for path in sorted(made) if path.name in ('REPORT.md', 'index.html'))}")
