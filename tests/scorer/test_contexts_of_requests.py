"""Requests with contexts and profiles: they score as evaluation does, and every missing or wrong field is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dti_model.data import CLICK_UNITS, PreparedData
from dti_model.evaluation.scoring import score_targets
from dti_model.scorer import ItemError, Scorer, score_file
from tests.data.text_logs import GENRES, text_data
from tests.model.test_prompt_texts import TEMPLATE, WINDOW, run_over
from tests.numerics import FLOAT64_RELATIVE

RATES = {"item_rate": [7, 10], "item_ctr": [7, 10]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return text_data(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def scorer(data: PreparedData) -> Scorer:
    run = run_over(data, TEMPLATE)
    run.model.double()
    return Scorer(run, precision="fp32")


def device_of(data: PreparedData, row: int) -> str:
    assert data.contexts is not None
    return data.contexts.of_row(row)[1]


def test_stored_users_score_as_in_evaluation(scorer: Scorer, data: PreparedData) -> None:
    """The last interaction of every user as a candidate: in one pass, from a state, and from a state that grew by one."""
    run = scorer.run
    rows = data.history_offsets[1:] - 1
    expected = score_targets(run.model, run.config.dti, run.builder, rows)
    assert np.ptp(expected) > 0.01
    for user, row, wanted in zip(data.user_ids, rows.tolist(), expected):
        history, last = scorer.history_of(user), data.item_ids[data.item[row]]
        *before, (_, _, context) = history
        found = scorer.score(before, [last], user=user, context=context)
        assert found[0] == pytest.approx(wanted, rel=FLOAT64_RELATIVE)
        state = scorer.append(scorer.encode(before[:-1], user=user), *before[-1])
        assert scorer.score(state, [last], context=context)[0] == pytest.approx(wanted, rel=FLOAT64_RELATIVE)


def test_facts_follow_from_time_stamps(scorer: Scorer, data: PreparedData) -> None:
    """With a time stamp and a device, the scorer makes hour, weekday, gap and the user's rate itself; the item's rate and the affinity are given."""
    assert data.contexts is not None
    for user in range(4):
        first, stop = data.history_offsets[user : user + 2].tolist()
        raw = [
            (
                data.item_ids[data.item[row]],
                int(data.label[row]),
                {
                    "timestamp": int(data.timestamp[row]),
                    "device": device_of(data, row),
                    "item_rate": data.contexts.of_row(row)[3],
                    "item_ctr": data.contexts.of_row(row)[5].split()[0],
                    "affinity": data.contexts.of_row(row)[6],
                },
            )
            for row in range(first, stop)
        ]
        *before, (item, _, context) = raw
        *stored, (_, _, whole) = scorer.history_of(data.user_ids[user])
        expected = scorer.score(stored, [item], user=data.user_ids[user], context=whole)
        assert scorer.score(before, [item], user=data.user_ids[user], context=context) == expected
        age = {"gender": "FM"[user % 2], "age": 20 + user}
        assert scorer.score(before, [item], profile=age, context=context) == expected
        assert scorer.score(before, [item], context=context) != expected  # without a profile
        candidate = {
            "item": item,
            "context": {name: context[name] for name in ("item_rate", "item_ctr", "affinity")},
        }
        shared = {name: context[name] for name in ("timestamp", "device")}
        assert scorer.score(before, [candidate], profile=age, context=shared) == expected


def test_item_rates_are_those_of_all_data(scorer: Scorer, data: PreparedData) -> None:
    of_item = data.item == data.item_ids.index("i03")
    counts = [int(data.label[of_item].sum()), int(of_item.sum())]
    context = {"device": "phone", "timestamp": 1_600_000_000}
    known = scorer.score([], ["i03"], context=context)
    given = {**context, "item_rate": counts, "item_ctr": counts}
    assert known == scorer.score([], ["i03"], context=given)
    new = {"title": "Film 3", "genres": GENRES[3]}
    assert scorer.score([], [new], context=context) == scorer.score(
        [], ["i03"], context={**context, "item_rate": "new", "item_ctr": "new"}
    )
    assert scorer.score([], [new], context=context) != known


def test_affinities_follow_from_the_whole_history(scorer: Scorer, data: PreparedData) -> None:
    """Also from what lies before the window, not from the two of the candidate's own second; expected are the rates of all data, .5 of new items."""
    clicks = np.bincount(data.item, data.label)
    expected = (clicks + 1) / (np.bincount(data.item) + 2)
    rates = dict.fromkeys(("item_rate", "user_rate", "item_ctr", "user_ctr"), "new")
    context = {"device": "phone", **rates, "gap": 5, "hour": 3, "weekday": "Friday"}
    new = {"title": "Heat", "genres": "Crime"}
    assert data.item_texts[1] == "Film 1; Comedy, Drama"
    history = [("i01", 1), ("i00", 0), (new, 1)] + [("i02", 1)] * 7
    surplus = {
        "Drama": (1 - expected[1]) - expected[0],
        "Comedy": (1 - expected[1]) + 7 * (1 - expected[2]),
        "Crime": 0.5 + 7 * (1 - expected[2]),
    }
    counts = {"Drama": 2, "Comedy": 8, "Crime": 8}
    assert scorer.run.model is not None
    assert len(history) > scorer.run.config.window
    past = [(item, label, {**context, "affinity": "new", "timestamp": 5}) for item, label in history]
    now = {**context, "timestamp": 9}
    last = [("i02", 0, {**now, "affinity": "new"}), ("i01", 1, {**now, "affinity": "new"})]
    for item in ("i00", "i01", "i02", "i03"):
        genres = GENRES[int(item[1:])].split(", ") if GENRES[int(item[1:])] else []
        number = sum(counts[name] for name in genres)
        share = sum(surplus[name] for name in genres) / (number + 3)
        text = f"{2 * round(share * 50):+}" if number else "new"
        wanted = scorer.score([*past, *last], [item], context={**context, "affinity": text})
        assert scorer.score([*past, *last], [item], context=now) == wanted
        state = scorer.append(scorer.append(scorer.encode(past), *last[0]), *last[1])
        assert scorer.score(state, [item], context=now) == pytest.approx(wanted, rel=FLOAT64_RELATIVE)
        later = scorer.score([*past, *last], [item], context={**context, "timestamp": 10})
        assert (later == wanted) == (not genres)
    short = scorer.append(scorer.append(scorer.encode(past[:1]), *past[1]), *last[0])
    assert short.origin == "extended"
    assert short.facts.surplus(["Drama"], 10)[0] == pytest.approx(surplus["Drama"] * CLICK_UNITS)
    # Of the two names and those of the last time stamp.
    assert (
        short.num_bytes - sum(layer.num_bytes for layer in short.layers)
        == 3 * 192 + 5 + 6 + 5 + 2 * 192 + 5 + 6
    )


def test_a_held_state_stays_as_it_is(scorer: Scorer) -> None:
    """What is appended is of the new state; interactions without a time stamp all count."""
    context = {"device": "phone", "hour": 3, "weekday": "Friday", "gap": 5}
    state = scorer.encode([("i01", 1, context)])
    before, facts = scorer.score(state, ["i00"], context=context), dict(state.facts.categories)
    first, second = (scorer.append(state, "i01", label, context) for label in (0, 1))
    assert state.facts.categories == facts
    assert (scorer.score(state, ["i00"], context=context) == before).all()
    assert [one.facts.surplus(["Drama"], None)[1] for one in (state, first, second)] == [1, 2, 2]
    assert second.facts.surplus(["Drama"], None)[0] - first.facts.surplus(["Drama"], None)[0] == CLICK_UNITS
    long = {"text": "x; " + ", ".join(f"{number}" + "a" * 300 for number in range(20))}
    counted = scorer.append(state, long, 1, context).facts.categories.keys() - facts.keys()
    assert sorted(map(len, counted)) == [200] * 8


def test_affinities_without_prepared_data_are_given(data: PreparedData, tmp_path: Path) -> None:
    """Rates of items are not known there, and one half would say another thing than in training."""
    run_over(data, TEMPLATE).save_model(tmp_path / "model")
    scorer = Scorer.from_export(tmp_path / "model", precision="fp32")
    item, context = {"text": "Heat; Crime"}, {"device": "phone", "timestamp": 1_600_000_000}
    for name, known in (("item_rate", {}), ("item_ctr", {"item_rate": [7, 10]}), ("affinity", RATES)):
        with pytest.raises(ItemError, match=f"context lacks {name}, which follows from prepared data: load"):
            scorer.score([], [item], context={**context, **known})
    context |= RATES
    history = [("never read", 1, {**context, "affinity": "new"})] * 2
    history += [(item, 1, {**context, "affinity": "+4"})] * WINDOW
    assert 0 < scorer.score(history, [item], context={**context, "affinity": "+12"})[0] < 1


def test_what_is_refused(scorer: Scorer) -> None:
    good = {"device": "phone", "timestamp": 1_600_000_000}
    cases = [
        ({"context": None}, r"candidates\[0\]: context lacks weekday, or a timestamp"),
        ({"context": {"timestamp": 5}}, "context lacks device: the context of an interaction here is"),
        ({"context": {**good, "devise": 1}}, "context has a field 'devise', which no template names"),
        ({"context": {**good, "timestamp": "noon"}}, "context timestamp must be an integer in the unit"),
        ({"context": {**good, "timestamp": 10**13}}, "is not of the years 1970 to 3058"),
        ({"context": {**good, "item_rate": [10**30, 10**30]}}, r"must be \(clicks, interactions\) or a text"),
        ({"context": {**good, "item_rate": 0.7}}, r"or a text such as '70% of 10'"),
        ({"context": {**good, "affinity": [1, 2]}}, r"affinity must be 'new' or a text of -100 to"),
        ({"context": {**good, "item_ctr": "72% of 20"}}, r"or 'new' or a text of 0 to 100 in steps of 2"),
        ({"context": {**good, "affinity": "12"}}, "affinity must be 'new' or a text of -100 to"),
        ({"context": {**good, "gap": -5}}, "context gap must be seconds, or words such as 'minutes later'"),
        ({"context": {**good, "gap": float("nan")}}, "context gap must be seconds"),
        ({"context": {**good, "hour": 99}}, "context hour must be 0 to 23"),
        ({"context": {**good, "weekday": "Freitag"}}, "context weekday must be Monday to Sunday"),
        (
            {"context": {"text": [*"abcdefg"], "device": "x"}},
            "context has finished parts, text, and also 'device'",
        ),
        ({"context": {**good, "item_rate": [3, 2]}}, r"must be \(clicks, interactions\) or a text"),
        ({"context": {"text": ["a"]}}, "context text must be a list of 7 texts"),
        ({"context": {"text": ["a" * 5000, *"bcdefg"]}}, "a part of a context has at most 4,096 characters"),
        ({"context": {"text": ["\ud800", *"bcdefg"]}}, "half a surrogate pair"),
        ({"context": {**good, "device": "\ud800"}}, "half a surrogate pair"),
        ({"context": {**good, "device": {"a": 1}}}, "context: the field device must be a text or a number"),
        ({"context": good, "profile": {"age": "\ud800"}}, "half a surrogate pair"),
        ({"context": "phone"}, "context must be fields by name"),
        ({"context": good, "profile": {"agee": 3}}, "profile has a field 'agee', but a profile here is"),
        ({"context": good, "profile": "F"}, "profile must be fields by name"),
    ]
    for arguments, message in cases:
        with pytest.raises(ItemError, match=message):
            scorer.score([], ["i01"], **arguments)
    with pytest.raises(ItemError, match=r"history\[0\]: context lacks weekday"):
        scorer.score([("i01", 1)], ["i02"], context=good)
    entry = ("i01", 1, {"text": [""] * 7})
    with pytest.raises(ItemError, match="context lacks gap, or a timestamp .and of the interaction before"):
        scorer.score([entry], ["i02"], context=good)
    later = ("i01", 1, {**good, "timestamp": 1_600_000_001})
    with pytest.raises(ItemError, match="1600000000 is earlier than that of the interaction before"):
        scorer.score([later], ["i02"], context=good)
    with pytest.raises(ItemError, match=r"candidates\[0\]: context must be fields by name"):
        scorer.score([], [{"item": "i01", "context": {}}], context=[1])  # type: ignore[arg-type]
    with pytest.raises(ItemError, match="user and profile belong to the history"):
        scorer.score(scorer.encode([]), ["i01"], user="u01", context=good)
    assert scorer.score([], ["i01"], user="somebody", context=good) == scorer.score([], ["i01"], context=good)


def test_models_without_texts_refuse_them(run_scorer: Scorer) -> None:
    with pytest.raises(ItemError, match="context: interactions of this model have none"):
        run_scorer.score([], ["1"], context={"device": "phone"})
    with pytest.raises(ItemError, match="profile: users of this model have none"):
        run_scorer.score([], ["1"], profile={"age": 3})


def test_a_file_of_requests_carries_them(scorer: Scorer, tmp_path: Path) -> None:
    context = {"device": "phone", "timestamp": 1_700_000_000}
    lines = [
        {"user": "u03", "context": context, "candidates": ["i01", "i02"]},
        {"user": "u03", "profile": {"age": 7}, "context": context, "candidates": ["i01"]},
        {
            "history": [{"item": "i01", "label": 1, "context": context}],
            "context": context,
            "candidates": ["i01"],
        },
        {"user": "u03", "candidates": ["i01"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_file(scorer, tmp_path / "in.jsonl", tmp_path / "out.jsonl", skip_bad_lines=True, progress=False)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    stored = scorer.history_of("u03")
    assert found[0]["probabilities"] == pytest.approx(
        scorer.score(stored, ["i01", "i02"], user="u03", context=context), abs=1e-8
    )
    assert found[1]["probabilities"] != found[0]["probabilities"][:1]
    assert found[2]["probabilities"] == pytest.approx(
        scorer.score([("i01", 1, context)], ["i01"], context=context), abs=1e-8
    )
    assert "context lacks" in found[3]["error"]
