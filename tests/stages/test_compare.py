"""Comparing two runs: the noise band, what counts as worse, what is joined, and what is printed."""

from pathlib import Path
from typing import Any

import pytest
from metrics_files import host, write

from stages import compare


def compare_runs(old: Path, new: Path, floor: float = 0.05, width: float = 3) -> tuple[str, bool]:
    """The Markdown of two runs with rows in common, and whether anything is worse."""
    found = compare.compare(compare.read_run(old), compare.read_run(new), floor, width)
    assert found is not None
    return found.text, found.worse > 0


def compare_rows(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any], floor: float = 0.05, width: float = 3
) -> str:
    """`worse`, `better` or `same`."""
    text, worse = compare_runs(write(tmp_path / "old.parquet", old), write(tmp_path / "new.parquet", new), floor, width)
    assert worse == text.startswith("## 1 worse")
    return "worse" if worse else "better" if text.startswith("## 0 worse, 1 better") else "same"


@pytest.mark.parametrize(
    "old, new, expected",
    [
        # No samples: the floor, 5 %.
        ({"value": 10}, {"value": 10.4}, "same"),
        ({"value": 10}, {"value": 10.6}, "worse"),
        ({"value": 10}, {"value": 9.4}, "better"),
        ({"value": 10, "better": "higher"}, {"value": 9.4, "better": "higher"}, "worse"),
        ({"value": 10, "better": "higher"}, {"value": 10.6, "better": "higher"}, "better"),
        ({"value": 10, "better": None}, {"value": 20, "better": None}, "same"),
        ({"value": -10}, {"value": -9.6}, "same"),
        ({"value": -10}, {"value": -9.4}, "worse"),
        # Nothing is 5 % of nothing.
        ({"value": 0}, {"value": 0}, "same"),
        ({"value": 0}, {"value": 0.001}, "worse"),
        # Samples: MAD 0.5, s = 0.74 in each run, band 3 * 0.74 * √2 = 3.15.
        ({"samples": [9, 9.5, 10, 10.5, 11]}, {"samples": [12, 12.5, 13, 13.5, 14]}, "same"),
        ({"samples": [9, 9.5, 10, 10.5, 11]}, {"samples": [12.2, 12.7, 13.2, 13.7, 14.2]}, "worse"),
        # One of the two is noisy.
        ({"samples": [10, 10, 10]}, {"samples": [10, 12, 14]}, "same"),
        ({"samples": [10, 10, 10]}, {"samples": [11.9, 12, 12.1]}, "worse"),
        # A single outlier is not noise.
        ({"samples": [10, 10, 10, 10, 100]}, {"samples": [12, 12, 12, 12, 12]}, "worse"),
        # Two samples have no spread to speak of.
        ({"samples": [5, 15]}, {"samples": [10, 12]}, "worse"),
        # What has no number.
        ({"value": 10}, {"value": 10, "status": "failed", "note": "differs"}, "worse"),
        ({"value": 10}, {"reason": "no GPU"}, "worse"),
        ({"value": 10, "status": "failed", "note": "differs"}, {"value": 10}, "better"),
        ({"reason": "no GPU"}, {"value": 10}, "better"),
        ({"reason": "no GPU"}, {"value": 10, "status": "failed", "note": "differs"}, "worse"),
        ({"reason": "no GPU"}, {"reason": "no driver"}, "same"),
        ({"value": 10, "status": "failed", "note": "a"}, {"value": 99, "status": "failed", "note": "b"}, "same"),
    ],
)  # fmt: skip
def test_what_is_worse(tmp_path, old, new, expected):
    assert compare_rows(tmp_path, old, new) == expected


def test_the_band_is_set_on_the_command_line(tmp_path, capsys):
    old = write(tmp_path / "old.parquet", {"samples": [9, 10, 11]})
    new = write(tmp_path / "new.parquet", {"samples": [12, 13, 14]})
    paths = [str(old), str(new)]
    assert compare.main(paths) == 0
    assert compare.main([*paths, "--spread", "1"]) == 1
    assert compare.main([*paths, "--spread", "1", "--floor", "0.5"]) == 0
    assert "Noise: 50% of the old value, or 1 times" in capsys.readouterr().out
    for wrong in ("-1", "x", "inf", "nan"):
        with pytest.raises(SystemExit) as stopped:
            compare.main([*paths, "--floor", wrong])
        assert stopped.value.code == 2
        assert f"'{wrong}': should be a number of 0 or more" in capsys.readouterr().err


def test_rows_are_joined_on_their_identity(tmp_path):
    write(
        tmp_path / "old/bench_w05.parquet",
        {"value": 10, "batch": 1},
        {"value": 20, "batch": 8},
        {"value": 1, "case": "gone"},
    )
    write(tmp_path / "old/bench_w06.parquet", {"value": 10, "batch": 1}, week="w06")
    write(tmp_path / "new/bench_w05.parquet", {"value": 20, "batch": 1}, {"value": 20, "batch": 8})
    write(
        tmp_path / "new/bench_w06.parquet", {"value": 5, "batch": 1}, {"value": 9, "batch": 1, "case": "d"}, week="w06"
    )
    text, worse = compare_runs(tmp_path / "old", tmp_path / "new", 0.05, 3)
    assert worse and text.startswith("## 1 worse, 1 better, 1 others\n")
    assert "| w05 | decode | c (batch 1) | tpot_ms [ms] | 10 | 20 | +100.0% | ± 0.5 |" in text
    assert "| w06 | decode | c | tpot_ms [ms] | 10 | 5 | -50.0% | ± 0.5 |" in text
    assert "Only in the old run: 1 rows; only in the new one: 1." in text


def test_a_failed_check_s_file_takes_the_passed_one_s_place(tmp_path):
    write(tmp_path / "old/parity_w05.parquet", {"value": 1})
    write(tmp_path / "new/parity_w05.parquet", {"value": 1})
    write(tmp_path / "new/parity_w05.failed.parquet", {"value": 9, "status": "failed", "note": "a|b"})
    text, worse = compare_runs(tmp_path / "old", tmp_path / "new", 0.05, 3)
    assert worse and "| 1 | failed: a\\|b |  |  |" in text


def test_what_else_differs_is_said(tmp_path):
    old = write(tmp_path / "old.parquet", {"value": 1})
    new = write(
        tmp_path / "new.parquet", {"value": 1}, on=host(driver="590.2", packages={"torch": "2.14", "numba": "1"})
    )
    text, _ = compare_runs(old, new, 0.05, 3)
    assert "| driver | 580.1 | 590.2 |\n| torch | 2.13 | 2.14 |\n| numba | – | 1 |\n" in text
    assert "| | old" not in compare_runs(old, old, 0.05, 3)[0]


def test_the_largest_come_first_and_not_all_of_many(tmp_path):
    rows = [{"case": f"case {number}", "value": 10} for number in range(compare.SHOWN + 7)]
    old = write(tmp_path / "old.parquet", *rows)
    new = write(tmp_path / "new.parquet", *(row | {"value": 11 + number} for number, row in enumerate(rows)))
    text, _ = compare_runs(old, new, 0.05, 3)
    assert text.count("| decode |") == compare.SHOWN and "… and 7 more." in text
    assert text.index(f"case {len(rows) - 1} ") < text.index(f"case {len(rows) - 2} ") and "case 6 " not in text


def test_what_cannot_be_compared_is_an_error_of_its_own(tmp_path, capsys):
    old = write(tmp_path / "old/bench.parquet", {"value": 1})
    assert compare.main([str(old.parent), str(old.parent)]) == 0
    assert compare.main([str(old.parent), str(tmp_path)]) == 2
    assert f"{tmp_path}: no metrics there" in capsys.readouterr().err
    other = write(tmp_path / "other.parquet", {"value": 1}, on=host("NVIDIA A100"))
    assert compare.main([str(old), str(other)]) == 2
    error = capsys.readouterr().err
    assert "(NVIDIA H200)" in error and "(NVIDIA A100)" in error and "no measurement in common" in error
    (tmp_path / "not.parquet").write_text("x")
    assert compare.main([str(old), str(tmp_path / "not.parquet")]) == 2
    assert "is not Parquet" in capsys.readouterr().err


@pytest.mark.parametrize("folder", sorted(Path(__file__).resolve().parents[2].glob("reports/recorded/*/*")), ids=str)
def test_a_recorded_run_is_no_worse_than_itself(folder):
    if not folder.is_dir():
        pytest.skip("no recorded run")
    text, worse = compare_runs(folder, folder, 0, 0)
    assert not worse and text.startswith("## 0 worse, 0 better")
