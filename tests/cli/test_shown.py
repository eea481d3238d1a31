"""Texts that others wrote, on terminals and in errors: escaped, bounded, on one line, in every command that reads files."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_model.cli import main
from dti_model.data import DataError
from dti_model.data.texts import Template, template_text
from dti_model.scorer.items import ItemError
from dti_model.shown import MAX_VALUE_CHARS, one_line, shown

ODD = "\x1b[2J\x07\n\u2028\u202e\ud83d\0é"
ESCAPED = r"\x1b[2J\x07\n\u2028\u202e\ud83d\x00é"


class Loud:
    """Its repr clears the terminal."""

    def __repr__(self) -> str:
        return "\x1b[2J" * 1000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (ODD, f"'{ESCAPED}'"),
        ("x" * 60_000, f"'{'x' * 200}'... (60,000 characters)"),
        (b"x" * 60_000, f"b'{'x' * 200}'... (60,000 bytes)"),
        (10**300, f"1{'0' * 199}... (301 digits)"),
        ([10**5000], "[an integer of thousands of digits]"),
        (UserDict({"a": 10**5000}), "{'a': an integer of thousands of digits}"),
        ([[[[[[1]]]]]], "[[[[[...]]]]]"),
        (list(range(99)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]"),
        (float("nan"), "nan"),
    ],
    ids=["odd", "text", "bytes", "digits", "thousands of digits", "mapping", "nested", "list", "nan"],
)
def test_values(value: Any, expected: str) -> None:
    assert shown(value) == expected


def test_one_line() -> None:
    assert one_line(Path(f"a{ODD}")) == f"a{ESCAPED}"
    assert one_line("x" * 50, 10) == "xxxxxxxxxx... (50 characters)"
    assert shown(Loud()).startswith(r"\x1b[2J")


VALUES = st.recursive(
    st.text() | st.binary() | st.floats() | st.integers() | st.just("\ud83d" * 500) | st.builds(Loud),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=30,
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(value=VALUES)
def test_whatever_is_shown_is_short_and_printable(value: Any) -> None:
    text = shown(value)
    assert text.isprintable()
    assert len(text) < 12 * MAX_VALUE_CHARS, "an escape has ten characters at most"
    assert one_line(text, len(text)) == text


@pytest.mark.parametrize("kind", [DataError, ItemError])
def test_errors_are_one_line(kind: type[ValueError]) -> None:
    assert str(kind(ODD)) == ESCAPED
    assert len(str(kind("x" * 10**6))) < 2_100


def test_fields_of_an_item_are_cut() -> None:
    """A request of 60 MB was copied whole into the output and onto the terminal."""
    template = Template("{title}; {year}")
    for fields in ({"title": "x", "more": "y" * 10**6}, {"title": {"a": "y" * 10**6}}, {1: "a", "b": 2}, {}):
        with pytest.raises(DataError) as raised:
            template_text(template, fields, 200)
        assert len(str(raised.value)) < 1_500
        assert "y" * 1_000 not in str(raised.value)


@pytest.mark.parametrize(
    ("log", "items", "expected"),
    [
        ("\x1b[2Juser,item,timestamp,liked\n", "item,title\na,A\n", r"there are \x1b[2Juser, item"),
        ("user,item,timestamp,liked\nu,a,1,\x1b[31mx\n", "item,title\na,A\n", r"log.csv:2: liked must be 0 or 1 (or true, false, yes, no), but is \x1b[31mx"),
        ("user,item,timestamp,liked\nu,a,\x1b]0;x\x07,1\nu,a,1,1\n", "item,title\na,A\n", r"but is \x1b]0;x\x07"),
        ("user,item,timestamp,liked\nu,\x1b[2J,1,1\n", "item,title\na,A\n", r"such as '\x1b[2J'"),
    ],
)  # fmt: skip
def test_what_prepare_says_of_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log: str, items: str, expected: str
) -> None:
    """Names of columns, ids and rejected rows reached the terminal as they were."""
    folder = tmp_path / "\x1b[1mfolder"
    folder.mkdir()
    (folder / "log.csv").write_text(log)
    (folder / "items.csv").write_text(items)
    files = [
        f"--interactions={folder / 'log.csv'}",
        f"--items={folder / 'items.csv'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert main(["prepare", "custom", "--text={title}", "--label=liked", *files]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.removesuffix("\n").isprintable()


def test_what_prepare_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first rejected rows were printed raw, and a label column with braces in its name was a KeyError."""
    (tmp_path / "log.csv").write_text("user,item,timestamp,{0}\nu,a,1,\x1b[31mx\nu,a,2,1\nu,a,3,0\n")
    (tmp_path / "items.csv").write_text("item,title\na,A\n")
    files = [
        f"--interactions={tmp_path / 'log.csv'}",
        f"--items={tmp_path / 'items.csv'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert (
        main(
            [
                "prepare",
                "custom",
                "--text={title}",
                "--label={0}",
                "--max-rejected=1",
                "--min-context=0",
                *files,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert r"but is \x1b[31mx" in out
    assert "a click is {0} = 1" in out
    assert out.replace("\n", "").isprintable()
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["click"] == "{0} = 1"


def test_what_score_says_of_lines(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in\x1b[2J\n.jsonl", tmp_path / "out\x1b[2J\n.jsonl"
    line = {"user": ODD[:-3], "candidates": ["\x1b[2J", "1"]}
    source.write_text(json.dumps(line) + "\n" + json.dumps({"user": "5", "candidates": ["1"]}))
    command = [
        "score",
        f"--run={run_folder}",
        f"--input={source}",
        f"--output={output}",
        "--progress=false",
        "--device=cpu",
        "--precision=fp32",
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.removesuffix("\n").isprintable()
    assert r"in\x1b[2J\n.jsonl:1: " in error
    output.with_name(f"{output.name}.partial").unlink()
    assert main([*command, "--bad-lines=skip"]) == 0
    printed = capsys.readouterr()
    assert r"out\x1b[2J\n.jsonl: 1 of 2 lines scored" in printed.out
    assert (printed.out + printed.err).replace("\n", "").isprintable()
