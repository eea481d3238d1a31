"""Tiny data sets in the exact file formats of MovieLens, made up for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

GENRES = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
]
GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War"]
GENRES += ["Western"]


@dataclass(frozen=True)
class Movie:
    """A movie as GroupLens (`title`) and as RecBole (`short`, `year`) write it."""

    item: int
    title: str
    short: str
    year: str
    genres: tuple[str, ...]
    text: str


# One of each oddity of the real files: an accent, no title, "(V)", a blank at the end, an entity, genre "unknown".
MOVIES = (
    Movie(
        1,
        "Toy Story (1995)",
        "Toy Story",
        "1995",
        ("Animation", "Comedy"),
        "Toy Story (1995); Animation, Comedy",
    ),
    Movie(
        2, "Misérables, Les (1995)", "Misérables, Les", "1995", ("Drama",), "Misérables, Les (1995); Drama"
    ),
    Movie(3, "unknown", "unkonwn", "unkonwn", ("unknown",), ""),
    Movie(9, "Land (1995) (V)", "Land (1995)", "V", ("Children's",), "Land (1995); Children's"),
    Movie(
        10, "Two  Friends (1986) ", "Two Friends", "1986", ("Drama", "War"), "Two Friends (1986); Drama, War"
    ),
    Movie(11, "Fish &amp; Chips (1990)", "Fish & Chips", "1990", ("Comedy",), "Fish & Chips (1990); Comedy"),
    Movie(100, "Good Morning (1971)", "Good Morning", "1971", ("unknown",), "Good Morning (1971)"),
    Movie(101, "Casino (1995)", "Casino", "1995", ("Crime", "Drama"), "Casino (1995); Crime, Drama"),
)

Rating = tuple[int, int, int, int]  # user, item, rating, timestamp


def some_ratings(num_users: int = 12, seed: int = 0) -> list[Rating]:
    """Every user rates every movie once, in a random order, with many equal times; the lines are shuffled."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, num_users + 1):
        items = rng.permutation([movie.item for movie in MOVIES])
        times = np.sort(rng.integers(0, 6, items.size)) + 3 * user
        ratings = rng.integers(1, 6, items.size)
        rows += [(user, int(i), int(r), int(t)) for i, r, t in zip(items, ratings, times)]
    return [rows[i] for i in rng.permutation(len(rows))]


def write_100k(folder: Path, ratings: list[Rating]) -> Path:
    """`u.data`, `u.item` and `u.user` as GroupLens writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in ratings]
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    movies = []
    for movie in MOVIES:
        flags = ["1" if genre in movie.genres else "0" for genre in GENRES]
        movies.append("|".join([str(movie.item), movie.title, "01-Jan-1995", "", "http://x", *flags]))
    (folder / "u.item").write_text("\n".join(movies) + "\n", encoding="latin-1")
    users = [f"{user}|{age}|{gender}|writer|00000" for user, gender, age in _users(ratings)]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    return folder


def write_recbole(folder: Path, ratings: list[Rating]) -> Path:
    """`ml-100k.inter`, `ml-100k.item` and `ml-100k.user` as RecBole writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in ratings]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    lines += [f"{movie.item}\t{movie.short}\t{movie.year}\t{' '.join(movie.genres)}" for movie in MOVIES]
    (folder / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    lines += [f"{user}\t{age}\t{gender}\twriter\t00000" for user, gender, age in _users(ratings)]
    (folder / "ml-100k.user").write_text("\n".join(lines) + "\n")
    return folder


def write_1m(folder: Path, ratings: list[Rating]) -> Path:
    """`ratings.dat`, `movies.dat` and `users.dat` as GroupLens writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
    lines = [f"{movie.item}::{movie.title}::{'|'.join(movie.genres)}\n" for movie in MOVIES]
    (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")
    users = [
        f"{user}::{gender}::{25 if age < 35 else 35}::20::00000\n" for user, gender, age in _users(ratings)
    ]
    (folder / "users.dat").write_text("".join(users))
    return folder


def _users(ratings: list[Rating]) -> list[tuple[int, str, int]]:
    """Id, gender and age of every user."""
    return [(user, "FM"[user % 2], 20 + user % 40) for user in sorted({row[0] for row in ratings})]
