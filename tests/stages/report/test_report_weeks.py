"""Progress and week over week: intervals from the samples, days from git, nothing compared that does not compare."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest

from stages import metrics
from stages.host import Device, Host
from stages.params import Week
from stages.report import read_plan
from stages.report.parts import Cell, Inputs, Planned, Row, Table, Text, median_interval
from stages.report.weeks import compare_section, compare_table, plan_section

CPU = Host("a CPU", 2, 24, "Linux x86_64", "3.12")
H200 = dataclasses.replace(CPU, driver="580.1", cuda="13.0", gpus=(Device("NVIDIA H200", "sm_90", 150_000_000_000),))
RUN = "nvidia-h200/m"


def make_row(samples: Sequence[float], **fields: Any) -> Row:
    """A decode step's row of w04."""
    rows = metrics.Rows("bench", fields.pop("week", "w04"), "m", fields.pop("host", H200))
    rows.rows.clear()
    given: dict[str, Any] = {
        "suite": "standard_decode", "case": "decode", "metric": "tpot_ms", "value": None, "unit": "ms",
        "better": "lower", "batch": 1, "prompt_tokens": 128, "backend": "cuda", "dtype": "bfloat16",
    }  # fmt: skip
    commit = fields.pop("commit", "c" * 40)
    given |= {"samples": samples} | fields
    rows.add(**given)
    return Row(**rows.rows[0] | {"commit": commit}, run=RUN, source="")


def make_week(name: str, parity: tuple[str, ...] = ()) -> Week:
    return Week(name, f"title of {name}", "milestone", None, parity, ("standard_decode",))


@pytest.mark.parametrize(
    ("samples", "low", "high", "coverage"),
    [
        ([3, 1], 1, 3, 0.5), ([1, 2, 3, 4, 50], 1, 50, 0.9375), (range(6), 0, 5, 0.96875),
        # The tables of order statistics: ranks 2 and 8 of 9 hold 96.1 %, 6 and 15 of 20 hold 95.9 %.
        (range(1, 10), 2, 8, 0.9609), (range(1, 21), 6, 15, 0.9586),
    ],
)  # fmt: skip
def test_the_interval_of_a_median(samples: Sequence[float], low: float, high: float, coverage: float) -> None:
    found = median_interval(make_row(list(samples)))
    assert found and (found.low, found.high) == (low, high)
    assert found.coverage == pytest.approx(coverage, abs=1e-4)


def test_what_is_no_median_has_no_interval() -> None:
    assert median_interval(make_row([1.0])) is None
    assert median_interval(make_row([1.0, 2.0, 3.0], value=2.97, metric="ttft_ms_p99")) is None


def lines(rows: Sequence[Row]) -> list[list[Cell]]:
    table = compare_table(Inputs(rows, {}), RUN, folded=False)
    assert table
    return [list(line) for line in table.rows]


def test_a_week_is_compared_where_the_intervals_part() -> None:
    slow = make_row([9.0, 10.0, 11.0], week="w04")
    near = make_row([8.0, 9.5, 10.0], week="w05")
    fast = make_row([1.9, 2.0, 2.1], week="w06")
    ((_, _, first, second, third),) = lines([slow, near, fast])
    assert (first.text, first.small) == ("10 ms", "9 to 11")
    assert second.small == "8 to 10; within the noise of w04"
    assert third.small == "1.90 to 2.10; 4.75 × w05"


def test_throughput_is_better_when_higher() -> None:
    few = make_row([10.0, 10.1], week="w04", metric="output_throughput", better="higher", unit="tokens/s")
    many = make_row([40.0, 41.0], week="w05", metric="output_throughput", better="higher", unit="tokens/s")
    assert lines([few, many])[0][3].small.endswith("4.03 × w04")


def test_one_sample_is_said_and_another_host_not_compared() -> None:
    one = make_row([10.0], week="w04")
    ((_, _, _, second),) = lines([one, make_row([5.0, 5.1, 4.9], week="w05")])
    assert second.small == "4.90 to 5.10; 2 × w04, one sample"
    other = dataclasses.replace(H200, driver="570.0")
    ((_, _, _, second),) = lines([one, make_row([5.0, 5.1, 4.9], week="w05", host=other)])
    assert second.small == "4.90 to 5.10"


def test_a_mixed_table_says_so_and_each_week_names_its_commit() -> None:
    table = compare_table(Inputs([make_row([1.0]), make_row([1.0], week="w05", commit="d" * 40)], {}), RUN, False)
    assert table and table.note.startswith("Mixed: ")
    assert [name[-10:] for name in table.columns[2:]] == ["c" * 10, "d" * 10]


def test_nothing_measured_is_said() -> None:
    (block,) = compare_section(Inputs([], {})).blocks
    assert isinstance(block, Text) and block.text.startswith("Not measured")


# --- progress -------------------------------------------------------------------------------------------------------


def progress(rows: Sequence[Row], weeks: Sequence[Week], dates: dict[str, str]) -> tuple[Text, dict[str, list[Cell]]]:
    plan = {name: Planned(f"plan of {name}", day) for name, day in (("w04", "2026-12-18"), ("w05", "2026-12-25"))}
    inputs = Inputs(rows, {week.name: week for week in weeks}, dates, plan=plan)
    text, table = plan_section(inputs).blocks
    assert isinstance(text, Text) and isinstance(table, Table)
    return text, {line[0].text: list(line) for line in table.rows}


def test_done_is_the_day_of_the_first_whole_run() -> None:
    early, late = make_row([1.0]), make_row([1.0], commit="d" * 40)._replace(run="nvidia-a100/m")
    dates = {"c" * 40: "2026-12-01", "d" * 40: "2027-01-01"}
    text, table = progress([late, early], [make_week("w04")], dates)
    assert (text.text, text.share) == ("1 of 2 weeks done: 50 %.", 0.5)
    assert [cell.text for cell in table["w04"][:4]] == ["w04", "2026-12-18", "2026-12-01", "title of w04"]
    assert [cell.text for cell in table["w05"][:4]] == ["w05", "2026-12-25", "not built", "plan of w05"]
    _, table = progress([late], [make_week("w04")], dates)
    assert (table["w04"][2].text, table["w04"][2].small) == ("2027-01-01", "late")


def test_a_day_that_git_does_not_know_is_not_invented() -> None:
    _, table = progress([make_row([1.0])], [make_week("w04")], {})
    assert table["w04"][2].text == "day not known"


def test_half_a_week_and_a_failed_one_are_not_done() -> None:
    measured, dates = make_row([1.0]), {"c" * 40: "2026-12-01"}
    text, table = progress([measured], [make_week("w04", parity=("layers",))], dates)
    assert text.text.startswith("0 of 2") and table["w04"][2].text == "no"
    failed = measured._replace(stage="parity", status="failed", note="4 times the 1.25 allowed")
    text, table = progress([measured, failed], [make_week("w04", parity=("layers",))], dates)
    assert table["w04"][2].text == "no" and table["w04"][4].text == "failed: 1 rows"


def test_the_plan_has_the_weeks_in_order_with_days() -> None:
    plan = read_plan()
    assert list(plan) == sorted(plan) and all(re.fullmatch(r"w\d\d", name) for name in plan)
    days = [week.target for week in plan.values()]
    assert days == sorted(days) and all(len(day) == 10 for day in days)
