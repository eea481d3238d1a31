"""What `dti prepare` prints of splits and of time, and how it refuses what divides nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_model.cli import main
from tests.cli.commands import refused
from tests.data.log_files import CATALOGUE
from tests.data.movielens_files import some_ratings, write_1m

NEW_YEAR = 1_577_836_800  # 2020-01-01 00:00 UTC


def custom(tmp_path: Path, rows: list[str], *options: str) -> list[str]:
    (tmp_path / "log.csv").write_text("user,item,timestamp,liked,part\n" + "\n".join(rows) + "\n")
    (tmp_path / "items.csv").write_text(CATALOGUE)
    files = ["--interactions", str(tmp_path / "log.csv"), "--items", str(tmp_path / "items.csv")]
    given = ["--text", "{title}", "--label", "liked", "--out", str(tmp_path / "out"), "--vocab-size", "270"]
    return ["prepare", "custom", *files, *given, *options]


def test_the_per_user_split_says_what_it_hides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_1m(tmp_path / "raw", some_ratings())
    command = ["prepare", "ml-1m", "--raw-dir", str(raw), "--subset", "--vocab-size", "270", "--split"]
    assert main([*command, "user", "--out", str(tmp_path / "user"), "--min-context", "1"]) == 0
    text = capsys.readouterr().out
    assert "  50 of 60 training targets are later than the first test target: training learns" in text
    assert (
        "from 1970-01-01 00:00:04 UTC to 1970-01-01 00:00:41 UTC; 70.8% of the interactions share their second with"
        in text
    )
    assert main([*command, "global", "--out", str(tmp_path / "global"), "--min-context", "1"]) == 0
    assert "later than the first test target" not in capsys.readouterr().out


def test_a_split_by_date_and_splits_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times in milliseconds: their ties are of time stamps."""
    times = [NEW_YEAR * 1000 + 3_600_000 * (hour // 2) for hour in range(8)]
    rows = [f"1,{'ab'[i % 2]},{time},{int(i in (1, 6, 7))}," for i, time in enumerate(times)]
    dates = ("--val-from", "2020-01-01T02:00", "--test-from", "2020-01-01T04:00+01:00")
    assert main(custom(tmp_path, rows, *dates, "--min-context", "0")) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  val            2 targets, base rate 0.0000")
    assert (
        lines[at + 1] == "  warning: val has no click, so that it has no AUC and training refuses the folder"
    )
    at = lines.index("  test           2 targets, base rate 1.0000")
    assert (
        lines[at + 1]
        == "  warning: test has clicks only, so that it has no AUC and training refuses the folder"
    )
    assert (
        lines[at + 2]
        == "  split by date: val from 2020-01-01 02:00:00 UTC, test from 2020-01-01 03:00:00 UTC"
    )
    assert (
        "; 100.0% of the interactions share their time stamp with another of the same user" in lines[at + 3]
    )
    assert sum("warning" in line for line in lines) == 2


def test_a_split_of_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "train", "val", "test", "train", "val", "test"]
    rows = [f"1,{'ab'[i % 2]},{i},{i % 2},{word}" for i, word in enumerate(words)]
    command = custom(tmp_path, rows, "--split-column", "part", "--min-context")
    assert main([*command, "3"]) == 0
    text = capsys.readouterr().out
    assert (
        "  column part names 2 train, 1 val rows that have fewer than 3 earlier interactions of their user and are context only; "
        "--min-context 0 keeps all"
    ) in text
    assert "  1 of 1 training targets are later than the first test target" in text
    assert "  from 0 to 6; 0.0% of the interactions share their time stamp" in text
    assert main([*command, "0"]) == 0
    assert "column part names" not in capsys.readouterr().out


WRONG = {
    "one date": (["--val-from", "2020-01-01"], "--val-from needs test_from (--test-from) beside it: validation begins"),
    "no date": (
        ["--val-from=soon", "--test-from=2020-01-01"],
        "--val-from must be a date or date-time of ISO 8601, such as 2024-05-31 or 2024-05-31T18:00+02:00, or a number in the unit of the "
        "time stamps, but is soon",
    ),
    "an empty one": (["--val-from=", "--test-from=2020-01-01"], "--val-from must be a date"),
    "dates and shares": (
        ["--val-from=2020-01-01", "--test-from=2020-01-02", "--split=user"],
        "split (--split) and --val-from with --test-from each divide the targets: keep one of them",
    ),
    "a column and shares": (
        ["--split-column=part", "--split=user"],
        "split (--split) and --split-column each divide",
    ),
    "a date for counts": (
        ["--val-from=2020-01-01", "--test-from=2020-01-02"],
        "log.csv: the time stamps, 0 to 5, are of 1980 to 2100 neither as seconds nor as milliseconds, microseconds, nanoseconds since 1970, "
        "so they cannot be read as dates. Say their unit with timestamp_unit (--timestamp-unit), or give numbers like theirs instead of dates",
    ),
    "milliseconds where seconds are said": (
        ["--timestamp-unit=seconds"],
        "log.csv: the time stamps, 1577836800000 to 1577836805000, are milliseconds, not seconds: as seconds the last would be of the year "
        "51969. Say --timestamp-unit = milliseconds of a log of your own, or mend the file",
    ),
    "another unit": (["--timestamp-unit=days"], "--timestamp-unit must be"),
    "another column": (["--split-column=fold"], "log.csv: there is no column fold; there are user, item, timestamp, liked, part. Say"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_divides_nothing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    options, message = WRONG[case]
    first = NEW_YEAR if case.startswith("milliseconds") else 0
    rows = [f"1,{'ab'[i % 2]},{1000 * (first + i) if first else i},{i % 2}," for i in range(6)]
    assert message in refused(custom(tmp_path, rows, *options), capsys)
    assert not (tmp_path / "out").exists()
