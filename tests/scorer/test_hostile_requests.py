"""Lines and Python objects that nobody should send: scored, or refused in one record that names them; never another end."""

from __future__ import annotations

import codecs
import gzip
import json
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_model.scorer import Scorer
from dti_model.scorer.items import CHARS_PER_TOKEN, ItemError
from dti_model.scorer.lines import InputFile
from tests.scorer.scoring_jobs import score

GOOD = b'{"user": "5", "candidates": ["1"]}'
FULL = b'{"user": "5", "history": [["1", 1], [{"text": "x"}, 0.0]], "candidates": ["9", {"title": "A", "genres": ["War"]}]}'
BAD = {
    b"\xff": "not valid UTF-8 (invalid start byte, byte 1 of 1)",
    b'{"user": "\xed\xa0\xbd", "candidates": []}': "not valid UTF-8 (invalid continuation byte, byte 11 of 33)",
    b'{"user": "\0", "candidates": []}': "not valid JSON (Invalid control character at, character 11 of 31)",
    b"\0": "not valid JSON (Expecting value, character 1 of 1)",
    b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD: "not valid JSON (Unexpected UTF-8 BOM",
    b'{"user": "5", "candidates": [-' + b"9" * 4_301 + b"]}": "an integer of more than 4,300 digits",
    b'{"history": [["1", 1e999]], "candidates": []}': "history[0]: a label must be 0 or 1, got inf",
    b'{"history": [["1", 1e-999999]], "candidates": [""]}': "candidates[0]: no item with id ''",
    b'{"history": [["1", "1"]], "candidates": []}': "history[0]: a label must be 0 or 1, got '1'",
    b'{"history": [["1", 2.0]], "candidates": []}': "history[0]: a label must be 0 or 1, got 2.0",
    b'{"user": -99999999999999999999, "candidates": []}': "no user with id -99999999999999999999",
    b'{"user": "' + b"u" * 100_000 + b'", "history": [], "candidates": []}': "a user's id has at most 4,096 characters, got 'uuu",
    b'{"user": "5", "candidates": [{"title": "A", "' + b"x" * 100_000 + b'": 1}]}': "... (100,000 characters)",
    b'{"user": "5", "candidates": [{"text": ""}]}': "candidates[0]: an item text must not be empty",
    b'{"user": "5", "candidates": ["1"]} \xe2\x80\xa8': "not valid JSON (Extra data",
}  # fmt: skip
FINE = [
    GOOD,
    b"\xef\xbb\xbf" + GOOD,
    GOOD + b"\r",
    b" \t" + GOOD,
    b'{"user": 5, "candidates": [1]}',
    b'{"user": "5", "candidates": ["1"], "history": null}',
]


def records(scorer: Scorer, folder: Path, content: bytes) -> list[dict[str, Any]]:
    (folder / "in.jsonl").write_bytes(content)
    output = folder / "out.jsonl"
    output.unlink(missing_ok=True)
    score(scorer, folder / "in.jsonl", output, skip_bad_lines=True)
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def test_every_bad_line_is_one_record(run_scorer: Scorer, tmp_path: Path) -> None:
    """And the lines around it are scored."""
    lines = [line for bad in BAD for line in (bad, GOOD)]
    found = records(run_scorer, tmp_path, b"\n".join(lines))
    assert [record["line"] for record in found] == list(range(1, len(lines) + 1))
    for record, problem in zip(found[::2], BAD.values(), strict=True):
        assert problem in record["error"]
        assert len(json.dumps(record)) < 6_000
    assert {"error" in record for record in found[1::2]} == {False}


def test_lines_of_every_editor(run_scorer: Scorer, tmp_path: Path) -> None:
    """A byte order mark, CR LF, blanks, ids as numbers, no line feed at the end."""
    found = records(run_scorer, tmp_path, b"\n".join(FINE))
    assert [record.get("error") for record in found] == [None] * len(FINE)
    assert np.ptp([record["probabilities"] for record in found]) < 1e-6


def test_a_line_separator_in_a_text_ends_no_line(run_scorer: Scorer, tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\x85b", "a\x0bb\x1cc", "a\u2029b", "a\0b", "﷽\u202e🎬"]
    line = json.dumps({"history": [], "candidates": [{"text": text} for text in texts]}, ensure_ascii=False)
    (record,) = records(
        run_scorer,
        tmp_path,
        line.replace("\0", "\\u0000").replace("\x0b", "\\u000b").replace("\x1c", "\\u001c").encode(),
    )
    assert len(record["probabilities"]) == len(texts)


FRAGMENTS = [
    b"\xff",
    b"\xed\xa0\xbd",
    b"\xef\xbb\xbf",
    b"\0",
    b"\r",
    b"\x1b[2J",
    b"\\ud83d",
    b"\\u0000",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"9" * 5_000,
]
FRAGMENTS += [
    b"0.5",
    b"true",
    b"null",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"[" * 600,
    b'{"text": " "}',
    b'"[SUM]"',
    b"\\",
    b"!" * 500,
    b"\x85",
    b'"user": 7,',
]
CHANGE = st.tuples(st.floats(0, 1), st.integers(0, 6), st.sampled_from(FRAGMENTS))


def changed(line: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for at, length, fragment in changes:
        place = int(at * len(line))
        line = line[:place] + fragment + line[place + length :]
    return line


@settings(
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lines=st.lists(
        st.builds(changed, st.sampled_from([GOOD, FULL]), st.lists(CHANGE, max_size=3)),
        min_size=20,
        max_size=40,
    )
)
def test_damaged_lines_are_one_record_each(run_scorer: Scorer, tmp_path: Path, lines: list[bytes]) -> None:
    found = records(run_scorer, tmp_path, b"\n".join([*lines, GOOD]))
    assert [record["line"] for record in found] == list(range(1, len(lines) + 2))
    for record in found:
        assert ("error" in record) != ("probabilities" in record)
        assert record.get("error", "").isprintable()
        assert len(record.get("error", "")) < 2_100
    assert "error" not in found[-1]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (codecs.BOM_UTF16_LE + GOOD.decode().encode("utf-16-le"), "UTF-16"),
        (codecs.BOM_UTF16_BE + GOOD.decode().encode("utf-16-be"), "UTF-16"),
        (gzip.compress(GOOD, mtime=0), r"compressed \(gzip\)"),
        (b"PAR1", "Parquet"),
    ],
    ids=["UTF-16 LE", "UTF-16 BE", "gzip", "Parquet"],
)
def test_files_that_are_no_json_lines(tmp_path: Path, content: bytes, kind: str) -> None:
    """Each of their lines was a bad one."""
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"in.jsonl is {kind}, not JSON lines in UTF-8: convert it"):
        InputFile(tmp_path / "in.jsonl")


def test_rows_of_parquet_that_are_no_text(run_scorer: Scorer, tmp_path: Path) -> None:
    """A UnicodeDecodeError without file or row, at every try."""
    users = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"5\xff5")
    )
    pq.write_table(pa.table({"user": users, "candidates": [["1"]] * 3}), tmp_path / "in.parquet")
    score(run_scorer, tmp_path / "in.parquet", tmp_path / "out.jsonl", skip_bad_lines=True)
    first, bad, last = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert "a value cannot be read ('utf-8' codec can't decode byte 0xff" in bad["error"]
    assert first["probabilities"] == pytest.approx(last["probabilities"], abs=1e-6)


@pytest.mark.parametrize(
    "label", [1, 1.0, True, np.int8(1), np.float32(1), np.bool_(True), Decimal("1.0"), Fraction(1)]
)
def test_labels(run_scorer: Scorer, label: Any) -> None:
    assert run_scorer.score([("2", label)], ["9"]) == run_scorer.score([("2", 1)], ["9"])


@pytest.mark.parametrize(
    "label",
    [
        0.5,
        2.0,
        -1,
        float("nan"),
        float("inf"),
        "1",
        "yes",
        None,
        Decimal("sNaN"),
        Decimal("NaN"),
        1 + 0j,
        [1],
        np.array([1]),
        torch.tensor(1),
    ],
)
def test_what_is_no_label(run_scorer: Scorer, label: Any) -> None:
    """A signalling NaN was an InvalidOperation."""
    with pytest.raises(ItemError, match=r"history\[0\]: a label must be 0 or 1, got "):
        run_scorer.score([("2", label)], ["9"])


def test_long_texts_are_cut_before_they_are_encoded(run_scorer: Scorer) -> None:
    """The pieces of 100,000 exclamation marks took two minutes to find."""
    limit = run_scorer.click_model.prompt.max_item_tokens * CHARS_PER_TOKEN
    lengths, encode = [], run_scorer._reader.items.encoder.encode
    run_scorer._reader.items.encoder.encode = lambda text: lengths.append(len(text)) or encode(text)  # type: ignore[func-returns-value,method-assign]
    try:
        run_scorer.score([], [{"text": "! " * 10**6}, {"text": "Drama"}])
    finally:
        del run_scorer._reader.items.encoder.encode
    assert lengths == [limit, 5]


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
LEAVES: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    2,
    1.0,
    0.5,
    float("nan"),
    1e308,
    10**30,
    10**5000,
    "",
    "1",
    "9",
    "caf\ud83d",
    "\0",
    "[SUM]",
    "!" * 50_000,
]
LEAVES += [
    b"1",
    bytearray(b"1"),
    Decimal("sNaN"),
    Decimal("1E+999999"),
    Fraction(10**400, 3),
    1j,
    np.int64(1),
    np.str_("1"),
    np.array([1, 2]),
]
LEAVES += [
    np.datetime64("NaT"),
    torch.tensor([1.0, 2.0]),
    range(3),
    {"a", "b"},
    deep(5000),
    CYCLE,
    object(),
    int,
    Path("x"),
    memoryview(b"ab"),
]
LEAVES += [
    {"text": "y"},
    {"text": 1},
    {1: "a", "title": "x"},
    {None: 1, "b": 2},
    MappingProxyType({"title": "x"}),
    {"title": CYCLE},
    {"title": 10**5000},
]


def made_up(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return rng.choice(LEAVES)
    if kind < 0.9:
        inner = [made_up(rng, depth - 1) for _ in range(rng.randrange(3))]
        return inner if kind < 0.7 else tuple(inner)
    return {name: made_up(rng, depth - 1) for name in ("title", "genres", "text") if rng.random() < 0.5}


def refusal(call: Callable[[], object]) -> str:
    """Why an item, a label or a user is refused; "" where none is."""
    try:
        call()
    except ItemError as error:
        return str(error)
    return ""


def test_odd_objects_are_refused(run_scorer: Scorer) -> None:
    """Huge integers, cycles and keys of several kinds were other errors than the documented one."""
    rng, refused = random.Random(0), 0
    for _ in range(600):
        history, candidates = made_up(rng, 2), made_up(rng, 2)
        if rng.random() < 0.7:
            history, candidates = [(made_up(rng, 1), made_up(rng, 0))], [made_up(rng, 2)]
        for call in (
            lambda: run_scorer.score(history, candidates),  # noqa: B023  # called right here
            lambda: run_scorer.history_of(candidates),  # noqa: B023
            lambda: run_scorer.text_of(history),  # noqa: B023
        ):
            message = refusal(call)
            refused += message != ""
            assert message.isprintable()
            assert len(message) < 2_100
    assert 1_000 < refused < 1_800


def test_a_state_is_a_state(run_scorer: Scorer) -> None:
    state: Any = "state"
    with pytest.raises(TypeError, match="a state is what encode or append returns, got 'state'"):
        run_scorer.append(state, "1", 1)
