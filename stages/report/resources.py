"""Resources that each kernel needs, by architecture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from stages.report.parts import (
    LOCAL,
    Cell,
    Inputs,
    Row,
    Section,
    Table,
    Text,
    number,
    provenance,
    run_title,
    value_cell,
)

MIX_ARCH = "sm_90a"
MIX_TOP = 8


def kernel_section(inputs: Inputs) -> Section:
    """Registers, spills, shared memory, occupancy and instructions by architecture: this host's, whose code is the
    report's, else those of the first run that has them."""
    run = next((run for run in [LOCAL, *inputs.runs] if inputs.of(run, "build")), None)
    if run is None:
        absent = [Text("Not measured: no run has the build stage.")]
        return Section("kernels", "Kernels by architecture", absent, page_only=True)
    rows = [row for row in inputs.of(run, "build") if row.suite in ("resources", "instructions")]
    found: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        kernel, _, arch = row.case.rpartition(" ")
        # A version for one architecture says so at the end of its name, too.
        found[kernel.removesuffix(f"_{arch}"), arch][row.metric] = row
    kernels = sorted({kernel for kernel, _ in found})
    archs = sorted({arch for _, arch in found}, key=lambda arch: int(re.sub(r"\D", "", arch) or 0))
    note = f"{run_title(run)}. {provenance(rows)[0]}"
    lines = [[Cell(kernel), *(resource_cell(found.get((kernel, arch), {})) for arch in archs)] for kernel in kernels]
    summary = Table(["kernel", *archs], lines, "Registers a thread · theoretical occupancy", note)
    metrics = list(dict.fromkeys(row.metric for row in rows if row.suite != "instructions"))
    detail = [
        [Cell(kernel), Cell(arch), *(value_cell(of[name]) if name in of else Cell("") for name in metrics)]
        for (kernel, arch), of in sorted(found.items(), key=lambda item: (item[0][0], archs.index(item[0][1])))
    ]
    resources = Table(["kernel", "architecture", *metrics], detail, "All resources", note, folded=True)
    arch = MIX_ARCH if MIX_ARCH in archs else archs[-1]
    mix = [[Cell(kernel), *mix_cells(found.get((kernel, arch), {}))] for kernel in kernels]
    mixed = Table(["kernel", "instructions", "most frequent"], mix, f"PTX instruction mix, {arch}", note, folded=True)
    said = (
        "ptxas' own figures, which need no GPU. Spilled bytes are named where there are any. Instructions are counted "
        "in the code, not as executed."
    )
    return Section("kernels", "Kernels by architecture", [Text(said), summary, resources, mixed], page_only=True)


def resource_cell(found: Mapping[str, Row]) -> Cell:
    """ "40 · 67 %", and the spilled bytes; a dash where the kernel is not for the architecture."""
    if not found:
        return Cell("–", numeric=True, tone="mute")
    parts = []
    if "registers" in found and found["registers"].value is not None:
        parts.append(number(found["registers"].value))
    if "theoretical_occupancy" in found and found["theoretical_occupancy"].value is not None:
        parts.append(f"{found['theoretical_occupancy'].value * 100:.0f} %")
    spilled = found["spill_bytes"].value if "spill_bytes" in found else None
    text = " · ".join(parts) + (f", spills {number(spilled)} B" if spilled else "")
    source = found["registers"].source if "registers" in found else ""
    return Cell(text or "not measured", numeric=bool(text), tone="warn" if spilled else "", source=source)


def mix_cells(found: Mapping[str, Row]) -> list[Cell]:
    counts = [
        (name.partition(".")[2], row.value) for name, row in found.items() if row.suite == "instructions" and row.value
    ]
    counts.sort(key=lambda pair: (-pair[1], pair[0]))
    total = number(sum(count for _, count in counts)) if counts else "not measured"
    return [Cell(total, numeric=True), Cell(", ".join(f"{name} {number(count)}" for name, count in counts[:MIX_TOP]))]
