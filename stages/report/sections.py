"""Sections of the report, in order: rows of the metrics' table in, sections of tables, plots and paragraphs out.

No section reads or writes a file.
"""

from collections.abc import Callable

from stages.report.glance import glance_section
from stages.report.host import checkpoint_section, host_section, missing_section
from stages.report.layers import layer_section
from stages.report.load import load_section
from stages.report.memory import memory_section
from stages.report.methods import methods_section
from stages.report.parity import invariance_section, parity_section
from stages.report.parts import Inputs, Section
from stages.report.resources import kernel_section
from stages.report.results import results_section
from stages.report.roofline import roofline_section
from stages.report.steps import decode_section, prefill_section
from stages.report.weeks import compare_section, plan_section

SECTIONS: tuple[Callable[[Inputs], Section], ...] = (
    glance_section,
    plan_section,
    compare_section,
    results_section,
    roofline_section,
    layer_section,
    prefill_section,
    decode_section,
    load_section,
    memory_section,
    parity_section,
    invariance_section,
    kernel_section,
    checkpoint_section,
    host_section,
    missing_section,
    methods_section,
)
