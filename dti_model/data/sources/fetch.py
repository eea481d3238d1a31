"""Raw files of MovieLens: from GroupLens, else out of RecBole's wheel from the Python package index.

The wheel of RecBole 1.2.1 carries ML-100K, so a machine that reaches only a package index gets the same data. The loader checks the files
again, by line, count and content digest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dti_model.data.errors import DataError
from dti_model.downloads import FetchError, by_first_route, download, extract, wheel_from_index

RECBOLE = "recbole==1.2.1"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
RECBOLE_FILES = (
    "recbole/dataset_example/ml-100k/ml-100k.inter",
    "recbole/dataset_example/ml-100k/ml-100k.item",
    "recbole/dataset_example/ml-100k/ml-100k.user",
)
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/{name}.zip"
# As GroupLens publishes them beside the archives.
GROUPLENS_MD5 = {"ml-100k": "0e33842e24a9c977be4e0107933c0723", "ml-1m": "c4d9eecfca2ab87c1945afe126590906"}
GROUPLENS_FILES = {
    "ml-100k": ("u.data", "u.item", "u.user"),
    "ml-1m": ("ratings.dat", "movies.dat", "users.dat"),
}


def fetch(name: str, folder: Path) -> Path:
    """Fetch the raw files of a MovieLens set.

    Args:
        name: "ml-100k" or "ml-1m".
        folder: an existing folder for the archive and its files.

    Returns:
        The folder with the raw files.

    Raises:
        DataError: every route failed; the message names each with its reason.
    """
    routes: dict[str, Callable[[], Path]] = {"GroupLens": lambda: _from_grouplens(name, folder)}
    if name == "ml-100k":
        routes["the package index"] = lambda: extract(
            wheel_from_index(RECBOLE, RECBOLE_SHA256, folder), RECBOLE_FILES, folder
        )
    try:
        return by_first_route(routes)[1]
    except FetchError as error:
        files = " and ".join(GROUPLENS_FILES[name][:2])
        raise DataError(
            f"{name} could not be fetched. {error}. Put the files {files} into a folder and name it with raw_dir (--raw-dir)."
        ) from None


def _from_grouplens(name: str, folder: Path) -> Path:
    url = GROUPLENS_URL.format(name=name)
    archive = download(url, folder / f"{name}.zip", GROUPLENS_MD5[name])
    return extract(archive, tuple(f"{name}/{file}" for file in GROUPLENS_FILES[name]), folder)
