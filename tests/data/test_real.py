"""The real files: published counts, the splits of the protocol, and both sources of ML-100K beside each other."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dti_model.data import AmazonFiles, DataError, PreparedData, prepare
from dti_model.data.sources.movielens import load_1m, load_100k
from dti_model.evaluation.baselines import baseline_metrics
from dti_model.prompts import context_text


def _folder(real_data_dir: Path, name: str) -> Path:
    if not (real_data_dir / name).is_dir():
        pytest.skip(f"no real data: {real_data_dir} has no {name}/")
    return real_data_dir / name


@pytest.fixture(scope="module")
def ml_100k(real_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    out = tmp_path_factory.mktemp("real") / "ml-100k"
    prepare("ml-100k", out, _folder(real_data_dir, "ml-100k"))
    return PreparedData.open(out)


@pytest.fixture(scope="module")
def ml_1m_half(real_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    raw = _folder(real_data_dir, "ml-1m-half")
    out = tmp_path_factory.mktemp("real") / "ml-1m-half"
    start = time.perf_counter()
    prepare("ml-1m", out, raw, subset=True)
    assert time.perf_counter() - start < 30  # takes about 1.5 s
    return PreparedData.open(out)


def test_ml_100k_counts_and_global_split(ml_100k: PreparedData) -> None:
    stats = ml_100k.stats
    assert (stats["users"], stats["items"], stats["interactions"]) == (943, 1_682, 100_000)
    assert [stats["splits"][name]["targets"] for name in ("train", "val", "test")] == [76_228, 9_528, 9_529]
    assert (stats["base_rate"], stats["missing_titles"], stats["duplicate_pairs"]) == (0.55375, 1, 0)
    assert ml_100k.item_texts[0] == "Toy Story (1995); Animation, Children's, Comedy"
    assert ml_100k.item_texts[542] == "Misérables, Les (1995); Drama, Musical"
    test_users = ml_100k.users_of(ml_100k.targets("test"))
    train_users = ml_100k.users_of(ml_100k.targets("train"))
    assert np.isin(test_users, train_users).mean() == pytest.approx(0.145, abs=0.0005)


def test_time_honesty_of_ml_100k(ml_100k: PreparedData, real_data_dir: Path) -> None:
    """Three of four ratings were given in the same second as another of their user: the order of those is not known."""
    lines = (_folder(real_data_dir, "ml-100k") / "u.data").read_text().splitlines()
    seconds = Counter((line.split("\t")[0], line.split("\t")[3]) for line in lines)
    shared = sum(count for count in seconds.values() if count > 1)
    assert ml_100k.stats["sharing_time"] == shared == 75_772
    assert ml_100k.stats["splits"]["train_after_test"] == 0


def test_facts_of_the_quickstart_are_a_token_each(real_data_dir: Path, tmp_path: Path) -> None:
    """Of 99 in 100 interactions: texts that are learnt once each fall into digits."""
    raw, context = _folder(real_data_dir, "ml-100k"), "{item_ctr}; {affinity}; {item_rate}"
    prepare("ml-100k", tmp_path / "out", raw, context_text=context)
    data = PreparedData.open(tmp_path / "out")
    assert data.contexts is not None
    tokenizer = Tokenizer.from_file(str(data.tokenizer_dir / "tokenizer.json"))
    lengths = np.array([len(tokenizer.encode(context_text(text)).ids) for text in data.contexts.texts])
    shares = [[(lengths[codes] == number).mean() for number in (1, 3)] for codes in data.contexts.codes]
    assert shares[0][0] > 0.99
    assert shares[1][0] > 0.99
    assert shares[2][1] > 0.9


def test_ml_1m_half_counts_and_global_split(ml_1m_half: PreparedData, real_data_dir: Path) -> None:
    stats = ml_1m_half.stats
    found = (stats["users"], stats["items"], stats["items_listed"], stats["interactions"])
    assert found == (2_999, 3_615, 3_883, 487_650)
    assert stats["splits"]["test"]["targets"] == 47_266
    assert stats["splits"]["test"]["base_rate"] == pytest.approx(0.5418, abs=0.00005)
    assert stats["source"]["subset"]
    assert stats["sharing_time"] == 377_990  # 77.5 %
    with pytest.raises(
        DataError, match=r"ratings\.dat:487650: 487,650 interactions .* has 1,000,209.*--subset"
    ):
        load_1m(real_data_dir / "ml-1m-half").check_facts()


def test_recbole_copy_of_ml_100k_is_the_same(real_data_dir: Path) -> None:
    """Item by item and row by row; the pinned digest says the same of every RecBole copy that is prepared."""
    recbole = Path(os.environ.get("DTI_RECBOLE_DIR", real_data_dir / "ml-100k-recbole"))
    if not (recbole / "ml-100k.inter").is_file():
        pytest.skip("no RecBole copy: set DTI_RECBOLE_DIR to the folder with ml-100k.inter and ml-100k.item")
    ours, theirs = load_100k(_folder(real_data_dir, "ml-100k")), load_100k(recbole)
    assert (ours.route, theirs.route) == ("grouplens", "recbole")
    assert ours.items.sort("item").equals(theirs.items.sort("item"))
    keys = ["user", "item", "timestamp", "rating"]
    assert ours.rows().sort(keys).equals(theirs.rows().sort(keys))


def test_amazon_gift_cards(real_data_dir: Path, tmp_path: Path) -> None:
    """The real v2 format: its counts before pruning, nothing rejected, no markup left."""
    raw = _folder(real_data_dir, "amazon-giftcards-v2")
    files = AmazonFiles(raw / "Gift_Cards_5.json.gz", raw / "meta_Gift_Cards.json.gz")
    whole = prepare(files, tmp_path / "whole", min_item_count=1)
    assert (whole["interactions"], whole["users"], whole["items"]) == (2_972, 458, 148)
    assert (whole["duplicate_pairs"], whole["duplicate_interactions"]) == (6, 7)
    assert whole["rows_in_files"] == {"interactions": 2_972, "items": 1_547}
    assert whole["rejected"] == {"interactions": 0, "items": 0, "first": []}
    assert whole["base_rate"] == 2_752 / 2_972
    pruned = prepare(files, tmp_path / "pruned")
    assert pruned["interactions"] + pruned["interactions_pruned"] == 2_972
    assert pruned["min_item_count"] == 5
    texts = PreparedData.open(tmp_path / "whole").item_texts
    assert "Noodles & Company Gift Card; Gift Cards; Noodles & Company" in texts
    assert not [text for text in texts if re.search("&[a-z#]|<", text)]


# AUC, or AUC and log loss, as published beside the protocol.
GLOBAL_100K = {"item_mean": (0.7054,), "item_user_mean": (0.7399, 0.5956), "logistic_regression": (0.7463,)}
USER_100K = {"item_mean": (0.7258,), "item_user_mean": (0.7767, 0.5749), "logistic_regression": (0.7884,)}
GLOBAL_1M_HALF = {
    "item_mean": (0.7349,),
    "item_user_mean": (0.7797, 0.5655),
    "logistic_regression": (0.7735,),
}


def _check_lines(data: PreparedData, published: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """Metrics of the strongest line."""
    found = baseline_metrics(data, "test")
    for name, figures in published.items():
        for metric, figure in zip(("auc", "log_loss"), figures):
            assert found[name][metric] == pytest.approx(figure, abs=0.0002), (name, metric)
    by_auc = sorted(found, key=lambda name: -found[name]["auc"])
    assert by_auc[:2] == ["gradient_boosting", "item_user_residual"]
    assert min(found, key=lambda name: found[name]["log_loss"]) == "gradient_boosting"
    return found["gradient_boosting"]


def test_lines_of_ml_100k_global(ml_100k: PreparedData) -> None:
    """The README tells the figures; trees of other versions of scikit-learn are a little different."""
    boosted = _check_lines(ml_100k, GLOBAL_100K)
    for name, figure in {"auc": 0.788, "log_loss": 0.548, "gauc": 0.725}.items():
        assert boosted[name] == pytest.approx(figure, abs=0.002), name


def test_lines_of_ml_100k_per_user(real_data_dir: Path, tmp_path: Path) -> None:
    stats = prepare("ml-100k", tmp_path / "out", _folder(real_data_dir, "ml-100k"), split="user")
    assert stats["splits"]["train"]["targets"] == 75_847
    assert stats["splits"]["train_after_test"] == 75_051  # what a split per user hides
    _check_lines(PreparedData.open(tmp_path / "out"), USER_100K)


def test_lines_of_ml_1m_half_global(ml_1m_half: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient boosting is the strongest with an eighth of the training targets too, which are quicker to fit."""
    monkeypatch.setattr("dti_model.evaluation.boosting.MOST_TARGETS", 50_000)
    _check_lines(ml_1m_half, GLOBAL_1M_HALF)
