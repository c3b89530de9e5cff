"""The checkpoint, the machines, and what could not be measured on them."""

from __future__ import annotations

import json
from collections import defaultdict

from stages.metrics import BUSY
from stages.report.parts import (
    WITHOUT_WEEK,
    Block,
    Cell,
    Inputs,
    Row,
    Section,
    Table,
    Text,
    host_of,
    list_rows,
    run_title,
    show,
)


def checkpoint_section(inputs: Inputs) -> Section:
    blocks: list[Block] = []
    if inputs.architecture:
        lines = [[Cell(name), Cell(value, numeric=True)] for name, value in inputs.architecture.items()]
        blocks.append(Table(["property", "value"], lines, "This host: architecture"))
    for run in inputs.runs:
        rows = inputs.of(run, "download", "inventory")
        if rows:
            blocks.append(list_rows(f"{run_title(run)}: inventory", rows, WITHOUT_WEEK, folded=True))
    absent = [Text("Not measured: no run has the download and inventory stages.")]
    return Section("checkpoint", "Checkpoint", blocks or absent, page_only=True)


def host_section(inputs: Inputs) -> Section:
    blocks: list[Block] = []
    machines = []
    for run in inputs.runs:
        if host := inputs.hosts.get(run):
            gpus = ", ".join(f"{gpu.name} ({gpu.sm}, {show(gpu.memory_bytes, 'B')})" for gpu in host.gpus) or "none"
            words = (
                run,
                gpus,
                host.driver or "–",
                host.cuda or "–",
                host.cpu,
                f"{host.cores}",
                f"{host.memory_gib} GiB",
            )
            machines.append([Cell(word) for word in (*words, f"{host.system}, Python {host.python}")])
    if machines:
        columns = ("run", "GPU", "driver", "CUDA", "CPU", "cores", "memory", "system")
        blocks.append(Table(columns, machines, "Machines"))
    for run in inputs.runs:
        rows = inputs.of(run, "provision")
        if rows:
            blocks.append(list_rows(f"{run_title(run)}: ceilings and checks", rows, WITHOUT_WEEK, folded=True))
    lines = []
    for run in inputs.runs:
        for host, packages in sorted({(host_of(row), row.packages or "{}") for row in inputs.of(run)}):
            said = ", ".join(f"{name} {version}" for name, version in sorted(json.loads(packages).items()))
            lines.append([Cell(run), Cell(host), Cell(said or "not recorded")])
    blocks.append(Table(["run", "host", "packages"], lines, "Software"))
    if busy := list_busy(inputs):
        blocks.append(
            Table(["run", "measured", "other processes' share of the cores"], busy, "Measured on a busy machine")
        )
    return Section("host", "Hosts and ceilings", blocks)


def list_busy(inputs: Inputs) -> list[list[Cell]]:
    """Measurements that other processes were in the way of: run, stage and week, their share of the cores."""
    found = {
        (run, f"{row.stage}@{row.week}" if row.week else row.stage): row.other_load
        for run in inputs.runs
        for row in inputs.of(run)
        if row.other_load is not None and row.other_load > BUSY
    }
    return [
        [Cell(run), Cell(measured), Cell(f"{share:.0%}", numeric=True, tone="warn")]
        for (run, measured), share in sorted(found.items())
    ]


def missing_section(inputs: Inputs) -> Section:
    """Everything that has no value or has failed, by reason."""
    lines = []
    for run in inputs.runs:
        groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
        for row in inputs.of(run):
            if row.status != "ok":
                groups[row.status, row.stage, row.week or "", row.note or ""].append(row)
        for (status, name, week, note), rows in sorted(groups.items()):
            state = Cell("failed", tone="bad") if status == "failed" else Cell("not measured", tone="mute")
            metrics = ", ".join(sorted({row.metric for row in rows}))
            lines.append(
                [Cell(run), Cell(f"{name} {week}".strip()), state, Cell(note), Cell(f"{len(rows)} rows: {metrics}")]
            )
    table = Table(["run", "stage", "state", "why", "what"], lines)
    blocks: list[Block] = [table if lines else Text("Every row has a value.")]
    return Section("missing", "What could not be measured", blocks, page_only=True)
