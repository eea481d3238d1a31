"""Fields of items in requests: what `dti prepare` makes of a column with such values, or an error; never a guess."""

from __future__ import annotations

import datetime
import json
import math
import re
import zoneinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_model.cli import main
from dti_model.data import CustomFiles
from dti_model.data.errors import DataError
from dti_model.data.sources.item_frames import as_text
from dti_model.data.texts import Template, template_text
from dti_model.scorer import Scorer
from dti_model.scorer.items import ItemError, ItemTokens
from dti_model.scorer.lines import InputFile, fields_of, request_of

NOON = datetime.datetime(2020, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
COLUMNS: dict[str, list[Any]] = {
    "whole": [1995, 0, None],
    "float": [1995.0, 4.5, float("nan")],
    "flag": [True, False, None],
    "day": [datetime.date(2020, 1, 1), None, None],
    "moment": [datetime.datetime(2020, 1, 1, 12), datetime.datetime(1999, 12, 31, 1, 2, 3, 456000), None],
    "zoned": [NOON, None, None],
    "price": [Decimal("10.50"), Decimal("10.00"), Decimal("-0.5")],
    "words": [["a", None, "b"], [], None],
    "figures": [[1.0, 2.5, float("nan")], [None], [3.0]],
    "flags": [[True], [False, None], None],
}


def custom(tmp_path: Path, text: str, items: pl.DataFrame) -> CustomFiles:
    items.write_parquet(tmp_path / "items.parquet")
    (tmp_path / "log.csv").write_text("user,item,timestamp,label\nu,0,1,1\nu,1,2,0\nu,2,3,1\n")
    return CustomFiles(tmp_path / "log.csv", tmp_path / "items.parquet", text, label="label")


def test_a_field_s_text_is_that_of_a_column_with_its_value(tmp_path: Path) -> None:
    """True was "True" in requests and "true" in training, 1995.0 was "1995.0", and nulls in lists were "None"."""
    template = Template("; ".join(f"{{{name}}}" for name in ("title", *COLUMNS)))
    frame = pl.DataFrame({"item": ["0", "1", "2"], "title": ["A", "B", "C"], **COLUMNS}, strict=False)
    trained = custom(tmp_path, template.template, frame).load().items["text"].to_list()
    for row, expected in zip(frame.drop("item").to_dicts(), trained, strict=True):
        assert template_text(template, row, max_chars=200) == expected
    times = "2020-01-01; 2020-01-01 12:00:00.000000; 2020-07-01 12:00:00.000000+02:00"
    assert trained[0] == f"A; 1995; 1995; true; {times}; 10.5; a, b; 1, 2.5; true"


# Tiny and huge floats are left out: versions of Polars write their exponents in different ways.
FLOATS = st.floats(1e-4, 1e15) | st.floats(-1e15, -1e-4) | st.floats(2**-9, 2**49, width=32).map(np.float32)
WHOLE = (
    st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(2**53), 2**53).map(float)
    | st.sampled_from([-0.0, math.inf])
)


@settings(deadline=None)
@given(FLOATS | WHOLE | st.dates() | st.datetimes())
def test_a_value_s_text_is_that_of_a_column(value: Any) -> None:
    """Requests are put into text without Polars."""
    expected = as_text(pl.Series([value]))[0]
    assert template_text(Template("{title}"), {"title": value}, max_chars=200) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5e-7, "1.5e-7"),
        (1e-5, "0.00001"),
        (2.0**63, "9.223372036854776e+18"),
        (2**64, "18446744073709551616"),
        (Fraction(1, 3), "0.3333333333333333"),
        (Decimal("1E+3"), "1000"),
        (datetime.time(3, 4, 5, 6), "03:04:05"),
        (datetime.datetime(2020, 1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))), "2019-12-31 23:00:00.000000+00:00"),
    ],
)  # fmt: skip
def test_texts_of_rare_values(value: Any, text: str) -> None:
    assert template_text(Template("{title}"), {"title": value}, 200) == text


@pytest.mark.parametrize(
    "value", [{"a": 1}, [{"a": 1}], [["a"]], b"a", [b"a"], object(), 2**200, Decimal("NaN"), Decimal("1E+50")]
)
def test_values_that_no_column_has_are_named(value: Any) -> None:
    """Their Python spelling became the item's text."""
    with pytest.raises(DataError, match="the field genres must be a text or a number"):
        template_text(Template("{title}; {genres}"), {"title": "X", "genres": value}, 200)


def test_zero_and_false_are_values() -> None:
    """An item with nothing but a 0 counted as one without any value."""
    for value, expected in ((0, "0"), (False, "false"), (0.0, "0")):
        assert template_text(Template("{title}"), {"title": value}, 200) == expected


def test_genres_of_movies(run_scorer: Scorer) -> None:
    """A null was the genre "None"."""

    def text(genres: Any) -> str:
        return run_scorer.text_of({"title": "X", "genres": genres})

    assert text([None, "Drama"]) == text(["Drama"]) == text("Drama") == "X; Drama"
    assert text([None]) == text([]) == "X"
    for odd in (["Drama"], {"name": "Drama"}):
        with pytest.raises(
            ItemError,
            match=re.escape(
                f"an entry of the field genres must be a text or a number that a column can hold, or a list of them, but is {odd}"
            ),
        ):
            text(["Drama", odd])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"user": "1", "user": "2", "candidates": ["1"]}', "user"),
        ('{"user": "1", "candidates": ["1"], "candidates": ["1"]}', "candidates"),
        ('{"user": "1", "candidates": [{"title": "X", "title": "Y"}]}', "title"),
        ('{"user": "1", "candidates": [{"title": "X", "title": null}]}', "title"),
    ],
)
def test_a_field_that_stands_twice_is_named(line: str, name: str) -> None:
    """The last one counted."""
    with pytest.raises(ItemError, match=f"^the field '{name}' stands twice in one object$"):
        fields_of(line.encode())


def test_a_parquet_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    """The last one counted, also of a struct's fields."""
    path = tmp_path / "in.parquet"
    texts = pa.array([["1"]])
    pq.write_table(pa.Table.from_arrays([texts, texts], names=["candidates", "candidates"]), path)
    with pytest.raises(ValueError, match=r"in\.parquet has two columns candidates"):
        InputFile(path)
    pair = pa.StructArray.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["item", "item"])
    history = pa.ListArray.from_arrays(pa.array([0, 1]), pair)
    pq.write_table(pa.Table.from_arrays([texts, history], names=["candidates", "history"]), path)
    with pytest.raises(ValueError, match=r"in\.parquet has two columns item"):
        InputFile(path)
    pq.write_table(pa.Table.from_arrays([texts, texts], names=["candidates", "history"]), path)
    with InputFile(path) as opened:
        assert opened.num_lines == 1
    pq.write_table(pa.table({}), path)
    with InputFile(path) as opened:
        assert opened.num_lines == 0


def test_a_template_column_called_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """{"text": ...} in a request was a finished text, whatever the column was: titles went missing without a word."""
    arguments = ["--interactions=a.csv", "--items=b.csv", "--label=label", f"--out={tmp_path / 'out'}"]
    assert main(["prepare", "custom", "--text={title}; {text}", *arguments]) == 2
    error = capsys.readouterr().err
    assert "names a column text" in error
    assert "rename that column" in error
    assert error.count("\n") == 1


def test_data_that_was_prepared_with_such_a_column(run_scorer: Scorer) -> None:
    """By an older version: a request that could mean both is refused; with another field it is the column."""
    model = run_scorer.click_model
    rule = {"text": "{title}; {text}", "max_chars": 50}
    items = ItemTokens(model.tokenizer, model.prompt.max_item_tokens, rule, None)
    with pytest.raises(ItemError, match="is a finished text and also a column"):
        items.text({"text": "Drama"})
    assert items.text({"title": "X", "text": "Drama"}) == "X; Drama"


@pytest.mark.parametrize("text", [3, ["a"], {"a": 1}, True])
def test_a_finished_text_is_a_text(run_scorer: Scorer, text: Any) -> None:
    with pytest.raises(ItemError, match=r"candidates\[0\]: a finished text must be a text"):
        request_of(
            run_scorer, fields_of(json.dumps({"history": [], "candidates": [{"text": text}]}).encode())
        )


def test_pairs_are_requests(run_scorer: Scorer) -> None:
    """They gave an AttributeError."""
    pairs = [([("1", 1)], ["2", "9"]), ([], ["10"]), (run_scorer.encode([("1", 1)]), ["2"])]
    made = [run_scorer.request(*pair) for pair in pairs]
    for one, other in zip(run_scorer.score_many(pairs), run_scorer.score_many(made), strict=True):
        assert one.tolist() == other.tolist()
    with pytest.raises(ItemError, match=r"requests\[1\]: candidates\[0\]: no item with id '777'"):
        run_scorer.score_many([made[0], ([], ["777"])])
    odd: Any
    for odd in ("12", {"history": [], "candidates": []}, ([],), 3):
        with pytest.raises(
            TypeError, match=r"requests\[0\] must be .* scorer\.request\(history, candidates\)"
        ):
            run_scorer.score_many([odd])
