"""The report: the same bytes from the same Parquet, nothing invented, nothing mixed, nothing fetched."""

import dataclasses
import html
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline as tiny

from stages import metrics
from stages.bench.graphs import GRAPHS
from stages.compose import as_dict, compose_conf, read_params
from stages.exits import StageError
from stages.host import Device, Host
from stages.params import Weeks, select
from stages.report import BEGIN, END, fill_readme, load, main, parity, read_plan, read_recorded, readme_block, steps
from stages.report import weeks as report_weeks
from stages.report.parts import Figures, Inputs, Row, Table, Text, number, percent, share_of_limit, show
from stages.report.results import results_section
from stages.standard import Case, Latency, add_latency, list_rows

ROOT = Path(__file__).parents[3]
PACKAGES = {"torch": "2.13.0", "transformers": "5.17.0"}
CPU = Host("a CPU", 2, 24, "Linux x86_64", "3.12", packages=PACKAGES)
H200 = dataclasses.replace(CPU, driver="580.1", cuda="13.0", gpus=(Device("NVIDIA H200", "sm_90", 150_000_000_000),))
LIMITS: dict[str, tuple[float | None, str | None]] = {
    "ttft_ms": (2.0, "matrix rate"), "tpot_ms": (0.5, "read bandwidth"), "output_throughput": (1900.0, "both"),
}  # fmt: skip
PLANNED = len({*read_params(ROOT / "params.yaml")["weeks"], *read_plan()})
DONE = f"3 of {PLANNED} weeks done: {3 / PLANNED * 100:.0f} %"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


@pytest.fixture(scope="module")
def weeks() -> Weeks:
    return select(Weeks, as_dict(compose_conf()), None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository with the real params.yaml, as DVC runs a stage in it."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "report")
    # The figures take most of the time; `full` has real ones.
    for module, name in ((load, "plot_weeks"), (report_weeks, "plot_weeks"), (parity, "plot_heat")):
        monkeypatch.setattr(module, name, lambda *_: "<svg></svg>")
    return tmp_path


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the commit that rows are written with."""

    def choose(name: str) -> None:
        monkeypatch.setattr(metrics, "read_commit", lambda: name * 8)

    choose("12345")
    return choose


def latency(case: Case, scale: float) -> Latency:
    made = Latency()
    for jitter in (1.0, 0.97, 1.05):
        first = scale * jitter * 4e-5 * case.prompt_tokens
        step = scale * jitter * 1e-3 * (1 + case.batch / 16)
        made.record(case, [first + step * token for token in range(case.new_tokens)])
    return made


def write_speed(path: Path, week: str, host: Host, model: str, scale: float, stage: str = "bench") -> None:
    rows = metrics.Rows(stage, week, model, host)
    backend = "transformers" if week == "w01" else ("cuda" if host.gpus else "reference")
    knobs = {"backend": backend, "dtype": "bfloat16", "tensor_parallel": 1}
    for prompt in (32, 128):
        cases = [Case("standard_prefill", 1, prompt, 1)]
        cases += [Case("standard_decode", batch, prompt, 32) for batch in (1, 8)]
        for case in cases:
            if week == "w03" and case.suite == "standard_decode":
                rows.add_missing(list_rows(case), "w03 does not measure standard_decode", **knobs)
                continue
            limits = LIMITS if host.gpus else {}
            measured = latency(case, scale)
            if host.gpus:
                measured.peak_memory_bytes.append(3.2e8)
            no_memory = None if host.gpus else "no GPU on this host"
            add_latency(rows, case, measured, limits, no_memory, **knobs)
    rows.write(path)


def write_parity(path: Path, week: str, host: Host, model: str, layers: int = 6) -> None:
    rows = metrics.Rows("parity", week, model, host)
    backend = "cuda" if host.gpus else "reference"
    names = ["embedding", *(f"layers.{index}" for index in range(layers)), "norm", "logits"]
    models = (("layers", model, backend), ("layers", "llama_shape", backend), ("simulator", "micro", "cuda simulator"))
    for suite, of, engine in models:
        for place, name in enumerate(names):
            knobs: dict[str, Any] = {"model": of, "backend": engine}
            rows.add(
                suite=suite, case=name, metric="mean_abs_error", value=1e-7 * (place + 1), unit="1", better="lower",
                limit=1e-3, limit_kind="absolute", dtype="float32", **knobs,
            )  # fmt: skip
            rows.add(
                suite=suite, case=name, metric="error_ratio", value=0.9 + 0.03 * place, unit="1", better="lower",
                limit=1.25, limit_kind="1.25 x transformers' own bf16 error", dtype="bfloat16", **knobs,
            )  # fmt: skip
    for case in ("a batch of 4", "decoded token by token", "20 repeats"):
        rows.add(
            suite="invariance", case=case, metric="unequal_logits", value=0, unit="1", better="lower", limit=0.0,
            limit_kind="one reduction order: no bit may differ", dtype="bfloat16", backend=backend,
        )  # fmt: skip
    for index in range(60):
        rows.add(
            suite="tensors", case=f"model.layers.{index}.weight", metric="mean_abs_difference", value=0.0, unit="1",
            better="lower", limit=0.0, limit_kind="the checkpoint's own numbers", dtype="bfloat16",
        )  # fmt: skip
    rows.write(path)


def write_build(path: Path, host: Host) -> None:
    rows = metrics.Rows("build", None, None, host)
    for place, kernel in enumerate(("attention_naive_bf16", "linear_naive_bf16", "rope_naive_f32")):
        for arch in ARCHITECTURES:
            shared: dict[str, Any] = {"case": f"{kernel} {arch}", "backend": "cuda", "better": None}
            rows.add(suite="resources", metric="registers", value=24 + 8 * place, unit="1", **shared)
            rows.add(suite="resources", metric="spill_bytes", value=0, unit="B", **shared)
            rows.add(suite="resources", metric="shared_bytes_static", value=512 * place, unit="B", **shared)
            rows.add(suite="resources", metric="theoretical_occupancy", value=1 - 0.125 * place, unit="1", **shared)
            for family, count in (("ld.global", 6), ("fma", 40), ("st.global", 2), ("mov", 22)):
                rows.add(suite="instructions", metric=f"instructions.{family}", value=count, unit="1", **shared)
    rows.write(path)


def write_provision(path: Path, host: Host) -> None:
    rows = metrics.Rows("provision", None, None, host)
    shared: dict[str, Any] = {"suite": "ceilings", "better": "higher"}
    for metric, backend in (("read_bandwidth", "reference"), ("copy_bandwidth", None)):
        samples = [2.1e10, 2.2e10, 2.15e10]
        rows.add(case="cpu", metric=metric, value=None, samples=samples, unit="B/s", backend=backend, **shared)
    if host.gpus:
        known: dict[str, Any] = {"limit": 4.8e12, "limit_kind": "datasheet of h200"}
        rows.add(case="gpu", metric="read_bandwidth", value=4.6e12, unit="B/s", backend="cuda", **known, **shared)
        rows.add(case="gpu", metric="copy_bandwidth", value=4.2e12, unit="B/s", **known, **shared)
        rows.add(case="gpu", metric="matrix_rate", value=7.4e14, unit="FLOP/s", dtype="bfloat16", **shared)
    else:
        for metric in ("read_bandwidth", "copy_bandwidth"):
            rows.missing(case="gpu", metric=metric, unit="B/s", reason="no usable GPU on this host", **shared)
    rows.write(path)


def write_run(folder: Path, host: Host, model: str, scale: float) -> None:
    """A run's Parquet, as the stages write it."""
    folder.mkdir(parents=True)
    write_provision(folder / "provision.parquet", host)
    write_build(folder / "build.parquet", host)
    write_speed(folder / "baseline.parquet", "w01", host, model, scale, stage="baseline")
    for week, factor in (("w01", 1.0), ("w03", 6.0), ("w04", 3.0)):
        write_speed(folder / f"bench_{week}.parquet", week, host, model, scale * factor)
    for week in ("w03", "w04"):
        write_parity(folder / f"parity_{week}.parquet", week, host, model)


def files(root: Path) -> dict[str, bytes]:
    """All the report wrote under `root`."""
    made = [
        *(root / "reports").rglob("REPORT.md"),
        *(root / "reports").rglob("figures/*.svg"),
        *(root / "reports/site").rglob("*.html"),
    ]
    made += [path for path in [root / "README.md"] if path.exists()]
    return {str(path.relative_to(root)): path.read_bytes() for path in made}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of this host, a CPU, and of two recorded runs; not to be changed."""
    root = tmp_path_factory.mktemp("full")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (root / "data").mkdir()
    (root / "data/host.json").write_text(CPU.as_json())
    (root / "reports/architecture.csv").parent.mkdir()
    (root / "reports/architecture.csv").write_text("property,value\nlayers,6\ntied_embeddings,False\n")
    (root / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_STAGE", "report")
        patch.setattr(metrics, "read_commit", lambda: "12345" * 8)
        write_run(root / "reports/metrics", CPU, "olmo2_tiny", 8.0)
        write_run(root / "reports/recorded/nvidia-h200/olmo2_tiny", H200, "olmo2_tiny", 1.0)
        write_run(root / "reports/recorded/nvidia-h200/olmo2_7b", H200, "olmo2_7b", 4.0)
        main([])
    return root


def test_the_same_parquet_gives_the_same_bytes(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: Callable[[str], None]
) -> None:
    first = files(full)
    pages = [path for path in first if path.startswith("reports/site/rows/")]
    # README, two reports, the page; three plots by week and a heat map a report; a page a file that is cited.
    assert len(first) == 4 + 2 * (3 + 1) + len(pages) and len(pages) > 3 * 5
    shutil.copytree(full, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    monkeypatch.setenv("DVC_STAGE", "report")
    shutil.rmtree("reports/figures")
    Path("reports/site/rows/of-an-older-run.html").write_text("")
    main([])
    assert files(tmp_path / "again") == first


def read_page(root: Path) -> str:
    """The page's text, a bar between elements."""
    text = re.sub(
        r"<style>.*?</style>|<svg.*?</svg>", "", (root / "reports/site/index.html").read_text(), flags=re.DOTALL
    )
    return re.sub(r"[|\s]*\|[|\s]*", "|", re.sub(r"<[^>]+>", "|", html.unescape(text)))


def test_runs_stay_apart_and_tables_name_host_and_commit(full: Path) -> None:
    said = {"REPORT.md": "Measured on NVIDIA H200, driver 580.1, CUDA 13.0;", "local/REPORT.md": "Measured on a CPU "}
    for name, runs in (("REPORT.md", 2), ("local/REPORT.md", 1)):
        text = (full / "reports" / name).read_text()
        tables = re.findall(r"((?:^\|.*\n)+)\n(.*)", text, re.MULTILINE)
        glance, *results = [table + note for table, note in tables if "| TTFT |" in table.split("\n")[0]]
        assert glance.count("| 1234512345 |") == runs
        # The largest run's; others' are on the page.
        assert len(results) == 1 and "commit 1234512345." in results[0] and said[name] in results[0]
        assert DONE in text  # w02 has no rows here
    assert read_page(full).count("Measured on NVIDIA H200, driver 580.1, CUDA 13.0; commit 1234512345.|") > 10


def test_the_report_in_git_knows_nothing_of_this_host(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(full, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DVC_STAGE", "report")
    for path in ("reports/metrics", "reports/local", "data", "reports/architecture.csv"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    main([])
    here, there = files(full), files(tmp_path / "elsewhere")
    kept = [path for path in here if path in ("README.md", "reports/REPORT.md") or path.startswith("reports/figures")]
    assert len(kept) == 6 and all(here[path] == there[path] for path in kept)
    assert not any("local" in path for path in there)


def test_the_report_in_git_is_read_in_ten_minutes() -> None:
    assert len((ROOT / "reports/REPORT.md").read_text().splitlines()) <= 400


def test_commits_are_not_mixed_silently(place: Path, commit: Callable[[str], None]) -> None:
    write_run(place / "reports/metrics", CPU, "olmo2_tiny", 1.0)
    commit("abcde")
    write_speed(place / "reports/metrics/bench_w04.parquet", "w04", CPU, "olmo2_tiny", 1.0)
    main([])
    text = (place / "reports/local/REPORT.md").read_text()
    assert "Mixed: not one run but 2 hosts or commits." in text
    table = next(part for part in text.split("###") if part.startswith(" This host\n\n| case"))
    rows = [line for line in table.splitlines() if line.startswith("| decode") or line.startswith("| prefill")]
    assert rows and all(("abcdeabcde" in line) == ("| w04 (" in line) for line in rows)


def test_another_hosts_rows_are_not_compared(place: Path, commit: Callable[[str], None]) -> None:
    write_run(place / "reports/metrics", H200, "olmo2_tiny", 1.0)
    other = dataclasses.replace(H200, driver="570.0")
    for stage, name in (("baseline", "baseline"), ("bench", "bench_w01")):
        write_speed(place / f"reports/metrics/{name}.parquet", "w01", other, "olmo2_tiny", 1.0, stage)
    main([])
    assert "no comparable row" in (place / "reports/local/REPORT.md").read_text()


def test_what_was_not_measured_says_why(full: Path) -> None:
    text = read_page(full)
    assert "not measured: no usable GPU on this host" in text
    assert "peak memory: not measured: no GPU on this host." in text
    assert "not measured: w03 does not measure standard_decode." in text
    missing = text[text.index("|What could not be measured|") :]
    assert "|this host|bench w03|not measured|no GPU on this host|" in missing


def test_the_first_screen_says_what_where_how_fast_and_against_whom(full: Path) -> None:
    text = (full / "reports/REPORT.md").read_text()
    first = text[: text.index("## At a glance")]
    assert "**olmo2_7b on one NVIDIA H200 (cuda, bfloat16), as of w04 (prefill, decode, sampling)**" in first
    assert re.search(
        r"^- [\d.]+ ms per output token \([\d.]+ to [\d.]+\): 32-token prompt, .* of the limit, ", first, re.M
    )
    assert "Hugging Face's speed" in first
    assert "- Against: Hugging Face transformers 5.17.0 on the same machine" in first
    assert "- The limit: read bandwidth 4.60 TB/s, bfloat16 matrix rate 740 TFLOP/s: measured on this GPU" in first
    assert "Limits of what moves bytes" not in text
    assert "- Same bits: 3 of 3 other ways" in first and "of 114 limits on the distance" in first
    assert f"- Since: w04, measured at commit 1234512345; {DONE}" in first


def test_limits_of_before_are_said_to_be_of_the_copy_bandwidth(
    place: Path, commit: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(place / "reports/recorded/nvidia-h200/olmo2_tiny", H200, "olmo2_tiny", 1.0)
    with monkeypatch.context() as patch:
        patch.setitem(LIMITS, "tpot_ms", (0.5, "copy bandwidth over weight + KV bytes"))
        write_run(place / "reports/recorded/nvidia-h200/olmo2_7b", H200, "olmo2_7b", 4.0)
        write_speed(place / "reports/recorded/nvidia-h200/olmo2_tiny/bench_w04.parquet", "w04", H200, "olmo2_tiny", 1.0)
    main([])
    text = (place / "reports/REPORT.md").read_text()
    assert "as those of nvidia-h200/olmo2_7b (w01, w04), nvidia-h200/olmo2_tiny (w04) still are" in text
    assert "- The limit: copy bandwidth 4.20 TB/s, bfloat16" in text


def test_machine_and_architecture_are_shown(full: Path) -> None:
    text = (full / "reports/local/REPORT.md").read_text()
    assert "| this host | none | – | – | a CPU | 2 | 24 GiB | Linux x86_64, Python 3.12 |" in text
    assert "|tied_embeddings|False|" in read_page(full)


def test_failed_rows_are_shown_as_failed(place: Path, commit: Callable[[str], None]) -> None:
    metrics_folder = place / "reports/metrics"
    metrics_folder.mkdir(parents=True)
    rows = metrics.Rows("parity", "w03", "olmo2_tiny", CPU)
    rows.add(
        suite="layers", case="layers.2", metric="error_ratio", value=5.0, unit="1", better="lower", limit=1.25,
        limit_kind="1.25 x", dtype="bfloat16", backend="reference", status="failed", note="4 times the 1.25 allowed",
    )  # fmt: skip
    # An earlier good run of the same week must not hide it.
    write_parity(metrics_folder / "parity_w03.parquet", "w03", CPU, "olmo2_tiny")
    rows.write_parquet(metrics_folder / "parity_w03.failed.parquet")
    main([])
    text = (place / "reports/local/REPORT.md").read_text()
    assert "failed: 1 rows" in text and "4 times the 1.25 allowed" in text and "| embedding |" not in text


def test_what_ran_beside_a_measurement_is_said(
    place: Path, commit: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place / "reports/metrics"
    folder.mkdir(parents=True)
    for week, share in (("w03", 0.1), ("w04", 0.62)):
        monkeypatch.setattr(metrics, "OtherLoad", lambda share=share: SimpleNamespace(share=lambda: share))
        write_speed(folder / f"bench_{week}.parquet", week, CPU, "olmo2_tiny", 1.0)
    main([])
    text = (place / "reports/local/REPORT.md").read_text()
    busy = text[text.index("Measured on a busy machine") :]
    assert "| this host | bench@w04 | 62% |" in busy and "bench@w03 |" not in busy


@pytest.mark.parametrize("kept", ["provision", "build", "parity_w03", "bench_w03", "baseline"])
def test_one_file_alone_makes_a_report(place: Path, commit: Callable[[str], None], kept: str) -> None:
    write_run(place / "all", CPU, "olmo2_tiny", 1.0)
    (place / "reports/metrics").mkdir(parents=True)
    shutil.copy(place / f"all/{kept}.parquet", place / "reports/metrics")
    main([])
    assert "No run on a named GPU has been recorded yet." in (place / "reports/REPORT.md").read_text()


def test_recorded_runs_alone_make_a_report(place: Path, commit: Callable[[str], None]) -> None:
    write_run(place / "reports/recorded/nvidia-h200/olmo2_tiny", H200, "olmo2_tiny", 1.0)
    main([])
    assert "NVIDIA H200" in (place / "reports/site/index.html").read_text()


def test_no_parquet_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 1
    assert "no Parquet under reports/metrics or reports/recorded" in capsys.readouterr().err


def test_a_foreign_parquet_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "reports/metrics").mkdir(parents=True)
    (place / "reports/metrics/bench_w04.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SystemExit):
        main([])
    assert "reports/metrics/bench_w04.parquet is not Parquet" in capsys.readouterr().err


class Page(HTMLParser):
    """Checks that tags nest and collects ids and everything a browser would fetch."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_the_page_is_whole_and_fetches_nothing(full: Path) -> None:
    text = (full / "reports/site/index.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    inside = [reference for reference in page.references if reference.startswith("#")]
    assert inside and all(reference[1:] in page.ids for reference in inside)
    assert all(re.match(r"#|rows/[a-z0-9-]+\.html#r\d+$", reference) for reference in page.references)
    assert "@import" not in text and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_every_number_links_to_its_row(full: Path) -> None:
    page = Page()
    page.feed((full / "reports/site/index.html").read_text())
    links = {reference for reference in page.references if reference.startswith("rows/")}
    pages: dict[str, Page] = {}
    for path in (full / "reports/site/rows").glob("*.html"):
        pages[f"rows/{path.name}"] = Page()
        pages[f"rows/{path.name}"].feed(path.read_text())
        assert not pages[f"rows/{path.name}"].open
    assert len(links) > 300
    for link in links:
        path, _, place = link.partition("#")
        assert place in pages[path].ids
    # No page and no row that nothing links to.
    assert {f"{path}#{place}" for path, found in pages.items() for place in found.ids} == links


def test_a_link_leads_to_the_row_of_the_number(full: Path) -> None:
    text = (full / "reports/site/index.html").read_text()
    page, place, shown = re.findall(r'<li><b><a href="rows/([^"#]+)#r(\d+)">([^<]+)</a>', text)[0]
    assert page == "recorded-nvidia-h200-olmo2-7b-bench-w04.html"
    row = metrics.read(full / "reports/recorded/nvidia-h200/olmo2_7b/bench_w04.parquet").iloc[int(place)]
    assert shown == show(row["value"], row["unit"])
    line = re.search(rf'<tr id="r{place}">.*', (full / "reports/site/rows" / page).read_text())
    assert line and f"{row['value']:.9g} tokens/s" in line[0] and f"{row['samples'][0]:.6g}" in line[0]


def test_figures_stand_alone_in_light_and_dark(full: Path) -> None:
    for path in (full / "reports/figures").glob("*.svg"):
        text = path.read_text()
        used = set(re.findall(r"var\(--(\w+)\)", text))
        assert used and all(text.count(f"--{name}:") == 2 for name in used)
        assert not re.search(r"#0a00\d\d|<dc:date>", text)


def test_markup_in_a_note_stays_text(place: Path, commit: Callable[[str], None]) -> None:
    (place / "reports/metrics").mkdir(parents=True)
    rows = metrics.Rows("parity", "w03", None, CPU)
    rows.add(
        suite="text", case="a|b", metric="m", value=2.0, unit="1", better=None, status="failed",
        note="<script>alert(1)</script>\n| x",
    )  # fmt: skip
    rows.write(place / "reports/metrics/parity_w03.parquet")
    main([])
    assert "<script>" not in (place / "reports/site/index.html").read_text()
    line = next(line for line in (place / "reports/local/REPORT.md").read_text().splitlines() if "a\\|b" in line)
    assert "<script>" not in line and "/script>\\n" not in line and line.endswith("|")


def test_readme_is_filled_from_recorded_rows_alone(full: Path, weeks: Weeks, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (full / "README.md").read_text()
    assert readme.startswith("# Title\n") and readme.endswith("\n\nmore\n") and "old" not in readme
    assert readme.count("| NVIDIA H200 (recorded) |") == 2 and "CPU" not in readme
    monkeypatch.chdir(full)
    assert fill_readme(readme, readme_block(read_recorded(), weeks.weeks)) == readme


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_markers_is_an_error(text: str) -> None:
    with pytest.raises(StageError, match="results:begin"):
        fill_readme(text, "block")


def test_the_repositorys_readme_is_in_step_with_its_recorded_runs(weeks: Weeks) -> None:
    readme = (ROOT / "README.md").read_text()
    recorded = read_recorded(ROOT / "reports/recorded")
    assert fill_readme(readme, readme_block(recorded, weeks.weeks)) == readme, "run `python -m stages.report`"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "1", "0"), (12.345, "ms", "12.3 ms"), (1.5, "1", "1.50"), (9999.6, "tokens/s", "10,000 tokens/s"),
        (0.000123, "1", "1.2e-04"), (4.2e12, "B/s", "4.20 TB/s"), (1.378e10, "B", "13.8 GB"), (12.0, "B", "12 B"),
    ],
)  # fmt: skip
def test_values_read_as_text(value: float, unit: str, text: str) -> None:
    assert show(value, unit) == text


def test_shares_of_the_limit() -> None:
    empty = Row(**dict.fromkeys(metrics.COLUMNS), run="", source="")
    row = empty._replace(stage="bench", value=4.0, limit=1.0, better="lower")
    assert share_of_limit(row) == 0.25
    assert share_of_limit(row._replace(value=0.5, better="higher")) == 0.5
    assert share_of_limit(row._replace(stage="parity")) is None
    assert share_of_limit(row._replace(value=None)) is None
    assert [percent(share) for share in (0.0001, 0.0123, 0.5, 1.02)] == ["< 0.1 %", "1.2 %", "50 %", "102 %"]
    assert number(1234567.0) == "1,234,567"


def test_the_decode_step_has_tables_of_its_own(weeks: Weeks) -> None:
    rows = metrics.Rows("bench", "w06", "m", H200)
    knobs: dict[str, Any] = {"backend": "cuda", "dtype": "bfloat16", "batch": 1, "context": 128}
    values = {
        ("kernels", "qkv, batch 1 context 128", "call_us", "µs", 25.0, 20.0),
        ("kernels", "qkv, batch 1 context 128", "step_share", "1", 0.22, None),
        ("decode_step", "batch 1 context 128", "step_ms", "ms", 3.7, 3.3),
    }
    for suite, case, metric, unit, value, limit in values:
        rows.add(
            suite=suite, case=case, metric=metric, value=value, unit=unit, better="lower", limit=limit,
            limit_kind="read bandwidth" if limit else None, **knobs,
        )  # fmt: skip
    listed = GRAPHS.rows(tiny.make_context(rows, None), True)
    rows.add_missing(listed, "no GPU on this host", backend="cuda", dtype="bfloat16")
    inputs = Inputs([Row(**row, run="h200/m", source="") for row in rows.rows], weeks.weeks)
    whole, kernels, graphs = steps.decode_section(inputs).blocks[1:]
    assert isinstance(whole, Table) and isinstance(kernels, Table)
    assert [cell.text for cell in whole.rows[0]] == ["batch 1 context 128", "w06", "3.70 ms"]
    assert whole.rows[0][2].small == "89 %" and kernels.rows[0][2].small == "80 %"
    assert list(kernels.columns) == ["case", "week", "a call", "share of the step"]
    assert kernels.rows[0][3].text == "22 %"
    assert isinstance(graphs, Text) and "no GPU on this host" in graphs.text
    assert "step_ms" not in str(results_section(inputs))


def test_many_requests_have_tables_of_their_own(weeks: Weeks) -> None:
    made = []
    for week, output, seconds in (("w06", 2000.0, (20.0, 4.0)), ("w08", 5400.0, (3.0, 3.2))):
        rows = metrics.Rows("bench", week, "m", H200)
        knobs: dict[str, Any] = {"suite": "throughput", "backend": "cuda", "dtype": "bfloat16", "batch": 256}
        floor: dict[str, Any] = {"limit_kind": "prompts, then decode steps"}
        rows.add(case="256 at once", metric="output_throughput", value=output, unit="tokens/s", better="higher",
                 samples=[output, output + 9], limit=6000.0, **knobs, **floor)  # fmt: skip
        rows.add(case="256 at once", metric="ttft_ms_p99", value=900.0, unit="ms", better="lower", **knobs)
        for phase, spent, least in zip(("prompts", "decode"), seconds, (2.7, 2.4), strict=True):
            rows.add(case=f"256 at once: {phase}", metric="phase_s", value=spent, unit="s", better="lower", limit=least,
                     note="144420 prompt tokens", **knobs, **floor)  # fmt: skip
        shared = knobs | {"suite": "serve", "batch": 8}
        rows.missing(case="8 clients", metric="ttft_ms", unit="ms", better="lower", reason="no GPU", **shared)
        made += [Row(**row, run="h200/m", source="") for row in rows.rows]
    inputs = Inputs(made, weeks.weeks)
    _, figures, speed, server, phases = load.load_section(inputs).blocks
    assert isinstance(figures, Figures) and figures.figures[0].name == "load-h200-m"
    assert isinstance(speed, Table) and isinstance(phases, Table)
    assert list(speed.columns) == ["case", "week", "against the week before", "output", "TTFT p99"]
    assert [[cell.text for cell in line] for line in speed.rows] == [
        ["256 at once", "w06", "", "2,000 tokens/s", "900 ms"],
        ["256 at once", "w08", "2.70 ×", "5,400 tokens/s", "900 ms"],
    ]
    assert [line[3].small for line in speed.rows] == ["33 %", "90 %"]
    assert isinstance(server, Text) and "no GPU" in server.text
    assert [(line[0].text, line[1].text, line[2].text, line[2].small) for line in phases.rows] == [
        ("w06", "256 at once: prompts", "20 s", "14 %"),
        ("w06", "256 at once: decode", "4 s", "60 %"),
        ("w08", "256 at once: prompts", "3 s", "90 %"),
        ("w08", "256 at once: decode", "3.20 s", "75 %"),
    ]
    assert phases.rows[0][3].text == "2.70 s"
    assert "output_throughput" not in str(results_section(inputs))
