"""A small log whose interactions have a device, and whose users have a profile, made up for the tests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from dti_model.data import CustomFiles, PreparedData, prepare

CONTEXT = "{weekday}, {hour}; {device}; {gap}; {item_rate}; {user_rate}; {item_ctr} {user_ctr}; {affinity}"
PROFILE = "{gender}, {age}"
NUM_USERS, LENGTH, NUM_ITEMS = 16, 14, 12
GENRES = ("Drama", "Comedy, Drama", "Crime, Comedy", "")  # of item after item
DEVICES = ("phone", "laptop", "")
Row = dict[str, Any]


def some_rows(seed: int = 0) -> list[Row]:
    """Every user's interactions, a third of them in the second of the one before."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(NUM_USERS):
        time = 1_600_000_000 + int(rng.integers(10**6))
        for _ in range(LENGTH):
            time += int(rng.choice([0, 0, 45, 7_000, 200_000]))
            rows.append(
                {
                    "user": f"u{user:02}",
                    "item": f"i{rng.integers(NUM_ITEMS):02}",
                    "timestamp": time,
                    "liked": int(rng.integers(2)),
                    "device": DEVICES[rng.integers(3)],
                }
            )
    return rows


def some_users() -> list[Row]:
    """A profile for each user but the last, and one for a user whom the log does not have."""
    users = [{"user": f"u{i:02}", "gender": "FM"[i % 2], "age": 20 + i} for i in range(NUM_USERS - 1)]
    return [*users, {"user": "nobody", "gender": "F", "age": 99}]


def write_csv(path: Path, rows: list[Row]) -> Path:
    """Rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def text_files(folder: Path, rows: list[Row] | None = None, users: list[Row] | None = None) -> CustomFiles:
    """The files of such a log in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        {"item": f"i{i:02}", "title": f"Film {i}", "genres": GENRES[i % len(GENRES)]}
        for i in range(NUM_ITEMS)
    ]
    return CustomFiles(
        write_csv(folder / "log.csv", some_rows() if rows is None else rows),
        write_csv(folder / "items.csv", items),
        "{title}; {genres}",
        label="liked",
        users=write_csv(folder / "users.csv", some_users() if users is None else users),
        user_text=PROFILE,
    )


def text_data(folder: Path, files: CustomFiles | None = None, **settings: Any) -> PreparedData:
    """The prepared folder of such a log."""
    settings = {"context_text": CONTEXT, "min_context": 2, "vocab_size": 400, **settings}
    prepare(files or text_files(folder / "raw"), folder / "data", **settings)
    return PreparedData.open(folder / "data")
