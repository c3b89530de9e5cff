"""What a run is compared with from one to the next: an alarm stays, a drift shows, no attempt judges itself."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from metrics_files import host, write

from stages import kept
from stages.kept import host_key


class Nights:
    """Runs that hand a folder on, as the workflows do; each is a TPOT in ms of one case, or of several."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.kept, self.new, self.summary = folder / "kept", folder / "new", folder / "comparison.md"
        self.capsys = capsys

    def run(self, number: int, *options: str, on: Any = None, **values: float) -> dict[str, bool]:
        """The verdict on run `number`, which measured `values`, a case each."""
        rows = [{"case": case, "value": value} for case, value in values.items()]
        write(self.new / "bench_w05.parquet", *rows, on=on)
        arguments = ["judge", str(self.kept), str(self.new), "--run", str(number), "--summary", str(self.summary)]
        assert kept.main([*arguments, "--floor", "0.25", *(options or ["--keep"])]) == 0
        found = dict(re.findall(r"^(\w+)=(true|false)$", self.capsys.readouterr().out, re.MULTILINE))
        assert list(found) == ["worse", "changed", "kept"]
        return {name: value == "true" for name, value in found.items()}

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.kept)) for path in self.kept.rglob("*.parquet"))


@pytest.fixture
def nights(tmp_path, capsys) -> Nights:
    return Nights(tmp_path, capsys)


NEW = {"worse": False, "changed": False, "kept": True}
SAME = NEW
WORSE = {"worse": True, "changed": True, "kept": False}


def test_a_first_run_has_nothing_to_be_compared_with_and_is_kept(nights):
    assert nights.run(1, c=10) == NEW
    assert nights.files() == ["anchor/1.parquet", "runs/1.parquet"]
    assert nights.summary.read_text().count("Nothing there is comparable with this run.") == 2
    assert nights.run(2, c=10.5) == SAME
    assert nights.summary.read_text().count("## 0 worse, 0 better, 1 others") == 2


def test_what_is_worse_is_worse_again_the_next_night(nights):
    nights.run(1, c=10)
    assert nights.run(2, c=20) == WORSE
    assert nights.run(3, c=20) == WORSE
    assert nights.files() == ["anchor/1.parquet", "runs/1.parquet"]
    assert nights.run(4, c=10) == SAME


def test_a_drift_that_is_noise_every_night_is_found_beside_the_anchor(nights):
    assert nights.run(1, c=10) == NEW
    assert nights.run(2, c=12) == SAME
    assert nights.run(3, c=14) == WORSE  # 17 % beside the last, 40 % beside the first
    beside_last, beside_anchor = nights.summary.read_text().split("# Beside the anchor")
    assert "## 0 worse" in beside_last and "## 1 worse" in beside_anchor
    assert nights.run(4, c=14) == WORSE


def test_what_is_better_moves_the_last_run_and_not_the_anchor(nights):
    nights.run(1, c=10)
    assert nights.run(2, c=5) == {"worse": False, "changed": True, "kept": True}
    assert nights.run(3, c=10) == WORSE


def test_another_attempt_is_not_compared_with_itself(nights):
    nights.run(1, c=10)
    nights.run(2, c=12)
    # The second attempt at run 2 has what the first one left.
    nights.run(2, c=12.2, d=1)
    assert "| tpot_ms" not in nights.summary.read_text()
    assert nights.run(2, c=20, d=1) == WORSE
    assert nights.run(2, c=12, d=50) == SAME, "d is new in this run, whatever an earlier attempt measured"
    assert nights.files() == ["anchor/1.parquet", "anchor/2.parquet", "runs/1.parquet", "runs/2.parquet"]
    assert nights.run(3, c=12, d=99) == WORSE


def test_another_attempt_at_the_first_run_has_nothing_to_be_compared_with(nights):
    nights.run(1, c=10)
    assert nights.run(1, c=99) == NEW
    assert "## " not in nights.summary.read_text()
    assert nights.run(2, c=99) == SAME


def test_what_has_no_row_in_common_is_kept_and_can_be_compared_with(nights):
    nights.run(1, c=10)
    other = host("NVIDIA A100")
    assert nights.run(2, on=other, c=50) == NEW
    assert nights.run(3, on=other, c=100) == WORSE
    assert nights.run(4, c=20) == WORSE, "the anchor still has the first"


def test_what_a_run_measures_first_joins_the_anchor(nights):
    nights.run(1, c=10)
    nights.run(2, c=10, d=10)
    nights.run(3, c=10, d=12)
    assert nights.run(4, c=10, d=14) == WORSE
    assert nights.files() == ["anchor/1.parquet", "anchor/2.parquet", "runs/2.parquet", "runs/3.parquet"]


def test_files_of_another_schema_are_as_none(nights):
    nights.run(1, c=10)
    for path in nights.kept.rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["note"]), path)
    assert nights.run(2, c=50) == NEW
    assert nights.files() == ["anchor/2.parquet", "runs/2.parquet"]


def test_what_is_accepted_is_what_counts_from_then_on(nights):
    nights.run(1, c=10)
    assert nights.run(2, "--accept", c=20) == {"worse": False, "changed": True, "kept": True}
    assert nights.files() == ["anchor/2.parquet", "runs/2.parquet"]
    assert nights.run(3, c=20) == SAME


def test_a_run_that_is_not_to_be_kept_leaves_nothing(nights):
    nights.run(1, c=10)
    assert nights.run(2, "--spread", "3", c=11) == {"worse": False, "changed": False, "kept": False}
    assert nights.files() == ["anchor/1.parquet", "runs/1.parquet"]


def test_a_recorded_run_takes_the_anchor_s_place(nights, tmp_path):
    write(tmp_path / "recorded/bench_w05.parquet", {"case": "c", "value": 10})
    recorded = ["--keep", "--anchor", str(tmp_path / "recorded")]
    assert nights.run(1, *recorded, c=20) == WORSE
    assert nights.run(2, *recorded, c=11) == {"worse": False, "changed": False, "kept": True}
    assert nights.run(3, *recorded, c=13) == WORSE
    # A GPU that was never recorded.
    assert nights.run(4, "--keep", "--anchor", str(tmp_path / "none"), c=13) == SAME
    assert [path.name for path in (tmp_path / "recorded").iterdir()] == ["bench_w05.parquet"]


def test_a_run_that_cannot_be_read_is_an_error(nights, tmp_path, capsys):
    arguments = ["judge", str(nights.kept), str(tmp_path), "--run", "1", "--summary", str(nights.summary), "--keep"]
    assert kept.main(arguments) == 2
    assert "no metrics there" in capsys.readouterr().err
    assert not nights.kept.exists() and not nights.summary.exists()


def test_kinds_of_machines_have_keys_of_their_own(capsys):
    assert host_key(host()) == host_key(host(driver="590.1", packages={"torch": "3"}))
    assert host_key(host()) != host_key(host("NVIDIA A100"))
    assert re.fullmatch(r"3\.11-[0-9a-f]{12}", host_key(host()))
    assert kept.main(["key"]) == 0
    assert re.fullmatch(r"3\.\d+-[0-9a-f]{12}\n", capsys.readouterr().out)
