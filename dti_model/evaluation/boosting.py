"""Gradient boosting on what an engineer would count in an hour: the strongest of the baselines.

A row counts what stands *before* it in the global (time, user, item, file) order, in whatever split that is, as a model's context does.
So labels of earlier validation and test interactions are counted, and an item is known as it was at the time of the row: the item means
of the other baselines stop at the training targets. Rows to fit on count no validation or test interaction at all, although a split per
user puts some before them: nothing that is fitted has seen such a label. Interactions that are context only are counted, not fitted.

With g the base rate of the training targets, e labels, means as (sum + 5 g) / (count + 5) and residuals as sum / (count + 5):

    item         count, mean i, residual r of e - u, residual R of e - (g + s)
    user         count, mean u, residual s of e - i, residual S of e - (g + r)
    both         g + R + S
    last         mean of e over the user's last 1, 2, 5, 20, and of e - i over the last 5, 20
    categories   mean, over those of the item, of the user's residual of e - (g + R + S) in the category, with 3 instead of 5
    time         gap to the user's last interaction, how many of the user share the instant so far, hour of day (UTC) where it is known

Categories are parts of the item text behind the title, cut at ";" and ",": "Toy Story (1995); Animation, Comedy" has two.

Sums are of integers, 2^-30 each: what a row may not count changes no bit of its features, not even by rounding. One thread fits: scores
are the same on all machines of a kind, and many threads on processors that others use as well wait for each other, 20 times as long.
Cost: N log N in N interactions, 3 s of one AMD EPYC thread for 100,000 and 13 s for 490,000. At most the last MOST_TARGETS training
targets are fitted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from dti_model.data import UNITS, Clock, ItemCategories, PreparedData, categories_of

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]

MOST_TARGETS = 1_000_000
PRIOR, CATEGORY_PRIOR = 5.0, 3.0
WINDOWS, RESIDUAL_WINDOWS = (1, 2, 5, 20), (5, 20)
# Categories: the most frequent ones among the training targets, of at least so many items.
MOST_CATEGORIES, FEWEST_ITEMS = 64, 2
_ONE = 2**30  # of sums: exact for 2^33 values of at most 1
_CHUNK = 1_000_000  # rows that are scored at once: scikit-learn copies them as float64


class GradientBoosting:
    """Fitted to the training targets of a data set."""

    def __init__(self, data: PreparedData) -> None:
        """Count and fit; the training targets have both classes."""
        self._data = data
        train = data.targets("train")
        self._base_rate = float(data.label[train].mean())
        self._categories = _Categories(data, train)
        fitted = train[-MOST_TARGETS:]
        known = np.ones(data.label.size, bool)
        for split in ("val", "test"):
            known[data.targets(split)] = False
        self._model = _classifier(len(fitted))
        features = self._features(np.flatnonzero(known), fitted)
        with threadpool_limits(1, user_api="openmp"):
            self._model.fit(features, data.label[fitted])

    def scores(self, rows: Rows) -> Floats:
        """(S,) click probabilities of the targets `rows`, in any order."""
        features = self._features(np.arange(self._data.label.size), rows)
        chunks = [features[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        with threadpool_limits(1, user_api="openmp"):
            found = [self._model.predict_proba(chunk)[:, 1] for chunk in chunks]
        return np.concatenate([np.empty(0), *found])

    def _features(self, counted: Rows, rows: Rows) -> Features:
        """(S, F) of `rows`, which are among the ascending `counted`; of these alone each counts the earlier ones."""
        places = np.searchsorted(counted, rows)
        history = _History(self._data, counted, self._base_rate, self._categories)
        return np.stack([column[places].astype(np.float32) for column in history.columns()], axis=1)


def _classifier(num_targets: int) -> HistGradientBoostingClassifier:
    """Settings that validation chose on ML-100K and half of ML-1M; fewer and smaller trees where there is less to learn from."""
    return HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=int(np.clip(num_targets // 100, 30, 300)),
        max_leaf_nodes=15,
        min_samples_leaf=int(np.clip(num_targets // 200, 5, 100)),
        l2_regularization=1.0,
        max_features=0.5,
        early_stopping=False,
        random_state=0,
    )


class _History:
    """What rows of a data set count of one another; arrays are (R,), aligned with the rows."""

    def __init__(self, data: PreparedData, rows: Rows, base_rate: float, categories: _Categories) -> None:
        self._base_rate, self._categories = base_rate, categories
        self._label = data.label[rows].astype(np.float64)
        self._item = data.item[rows]
        self._time = data.timestamp[rows]
        self._hour = _hour(Clock.of(data.stats))
        user = data.users_of(rows)  # rows are user after user, each in order
        self._of_user = _Groups(user, np.arange(rows.size))
        by_time = np.argsort(data.order[rows])
        self._of_item = _Groups(self._item, by_time[np.argsort(self._item[by_time], kind="stable")])
        self._user = user

    def columns(self) -> Iterator[Floats]:
        """The features, one after another."""
        label, g = self._label, self._base_rate
        of_user, of_item = self._of_user, self._of_item
        yield from (of_item.num_earlier(), of_user.num_earlier())
        item_mean = g + of_item.residual(label - g, PRIOR)
        user_mean = g + of_user.residual(label - g, PRIOR)
        yield from (item_mean, user_mean)
        by_user = of_user.residual(label - item_mean, PRIOR)
        by_item = of_item.residual(label - user_mean, PRIOR)
        yield from (by_user, by_item)
        for last in RESIDUAL_WINDOWS:
            yield of_user.mean(label - item_mean, last)
        for last in WINDOWS:
            yield of_user.mean(label, last)
        item_beside_user = of_item.residual(label - _probability(g + by_user), PRIOR)
        user_beside_item = of_user.residual(label - _probability(g + by_item), PRIOR)
        both = g + item_beside_user + user_beside_item
        yield from (item_beside_user, user_beside_item, both)
        if self._categories.num:
            yield self._categories.mean_residual(self._user, self._item, label - _probability(both))
        yield from self._times()

    def _times(self) -> Iterator[Floats]:
        first = self._of_user.num_earlier() == 0
        gap = np.diff(self._time.astype(np.float64), prepend=0.0)
        gap[first] = -1.0
        yield gap
        place = np.arange(first.size)
        another = first | (np.diff(self._time, prepend=0) != 0)
        yield place - np.maximum.accumulate(np.where(another, place, 0)).astype(np.float64)
        if self._hour:
            yield (self._time // self._hour % 24).astype(np.float64)


class _Groups:
    """Sums over the earlier entries of an entry's group."""

    def __init__(self, keys: npt.NDArray[np.integer], order: Rows) -> None:
        """`order`: the (R,) entries, group after group, each in its order."""
        self._order, self._place = order, np.arange(order.size)
        sorted_keys = keys[order]
        first = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])
        self._start = np.maximum.accumulate(np.where(first, self._place, 0))

    def residual(self, values: Floats, prior: float) -> Floats:
        """Sum of the earlier values, each at most 1 and at least -1, over their number and `prior`."""
        return self._sums(values, self._start) / (self.num_earlier() + prior)

    def mean(self, values: Floats, last: int) -> Floats:
        """Mean of the last earlier values; 0 where there is none."""
        start = np.maximum(self._start, self._place - last)
        num = self._unsorted(self._place - start)
        return np.asarray(self._sums(values, start) / np.maximum(num, 1))

    def num_earlier(self) -> Floats:
        return self._unsorted(self._place - self._start)

    def _sums(self, values: Floats, start: Rows) -> Floats:
        fixed = np.rint(values * _ONE).astype(np.int64)
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(fixed[self._order])])
        return self._unsorted(sums[:-1] - sums[start]) / _ONE

    def _unsorted(self, values: Rows) -> Floats:
        found = np.empty(values.size)
        found[self._order] = values
        return found


class _Categories:
    """The `num` categories that count."""

    def __init__(self, data: PreparedData, train: Rows) -> None:
        names = [categories_of(text) for text in data.item_texts]
        targets = np.bincount(data.item[train], minlength=data.num_items)
        items_of: dict[str, int] = {}
        targets_of: dict[str, int] = {}
        for of_item, num in zip(names, targets.tolist()):
            for name in of_item:
                items_of[name] = items_of.get(name, 0) + 1
                targets_of[name] = targets_of.get(name, 0) + num
        # One that all items have tells nothing apart.
        kept = [
            name
            for name, num in items_of.items()
            if FEWEST_ITEMS <= num < data.num_items and targets_of[name]
        ]
        kept = sorted(kept, key=lambda name: (-targets_of[name], name))[:MOST_CATEGORIES]
        self._of_items = ItemCategories.of(names, kept)
        self.num = self._of_items.num

    def mean_residual(self, user: Rows, item: npt.NDArray[np.int32], values: Floats) -> Floats:
        """Mean over the row's categories of the user's residual in each; 0 where the item has none.

        Args:
            user: (R,) of rows, user after user.
            item: (R,) of the rows.
            values: (R,) to count.
        """
        row, category = self._of_items.of_rows(item)
        if row.size == 0:
            return np.zeros(item.size)
        keys = user[row] * self.num + category
        residual = _Groups(keys, np.argsort(keys, kind="stable")).residual(values[row], CATEGORY_PRIOR)
        sums = np.bincount(row, weights=residual, minlength=item.size)
        return np.asarray(sums / np.maximum(self._of_items.lengths[item], 1))


def _hour(clock: Clock) -> int | None:
    """An hour in time stamps; None where nobody knows their unit."""
    unit = clock.likely if clock.said not in UNITS else clock.said
    return None if unit is None else 3_600 * UNITS[unit] * clock.scale


def _probability(values: Floats) -> Floats:
    return np.clip(values, 0.0, 1.0)
