"""The rows that the report cites, as pages: every number of the report links to its row of Parquet."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.metrics import KNOBS
from stages.report.parts import Row, Section, Table, host_of, slug

PLACE = re.compile(r"(.+)\.parquet, row (\d+)")


def name_page(source: str) -> str:
    """The page of a row, relative to the site, with the row's place in it; "" where `source` names no row."""
    found = PLACE.fullmatch(source)
    if not found:
        return ""
    return f"rows/{slug(found[1].removeprefix('reports/'))}.html#r{found[2]}"


def cited(sections: Iterable[Section]) -> set[str]:
    """The sources of all cells."""
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    return {cell.source for table in tables for line in table.rows for cell in line if cell.source}


def list_pages(rows: Sequence[Row], sources: set[str]) -> dict[str, dict[str, Any]]:
    """Path of a page -> what its template shows: a file's cited rows, in its order."""
    files: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for row in rows:
        if row.source in sources and (found := PLACE.fullmatch(row.source)):
            files[f"{found[1]}.parquet"].append((int(found[2]), row))
    pages = {}
    for file, placed in files.items():
        path = name_page(placed[0][1].source).partition("#")[0]
        hosts = sorted({name_host(row) for _, row in placed})
        lines = [describe(place, row, mixed=len(hosts) > 1) for place, row in placed]
        pages[path] = {"file": file, "hosts": hosts, "lines": lines}
    return pages


def name_host(row: Row) -> str:
    return f"{host_of(row)}; commit {row.commit or 'not recorded'}"


def describe(place: int, row: Row, mixed: bool) -> Mapping[str, Any]:
    """A row in full, numbers as they are; with host and commit where the page has several."""
    knobs = {"model": row.model} | {knob: getattr(row, knob) for knob in KNOBS if knob != "kernel_versions"}
    knobs |= json.loads(row.kernel_versions or "{}")
    if mixed:
        knobs["measured on"] = name_host(row)
    limit = "" if row.limit is None else f"{row.limit:.9g} {row.unit}: {row.limit_kind}"
    return {
        "place": place,
        "what": " / ".join(filter(None, (row.stage, row.week, row.suite, row.case))),
        "metric": row.metric,
        "value": row.status.replace("_", " ") if row.value is None else f"{row.value:.9g} {row.unit}",
        "samples": [f"{sample:.6g}" for sample in row.samples or []],
        "limit": limit,
        "knobs": ", ".join(f"{knob} {value}" for knob, value in knobs.items() if value is not None),
        "note": row.note or "",
    }
