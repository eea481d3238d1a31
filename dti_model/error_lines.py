"""An error as one line: short, printable, with its place, for whoever gave the command."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

from dti_model.shown import one_line

# Of an error's own words; libraries may write pages, and a path may have thousands of characters.
MOST_CHARACTERS = 600
_HOME = Path(__file__).parents[1]  # of both packages
_PACKAGES = (_HOME / "dti_model", _HOME / "dti_kernels")


def joined(text: str) -> str:
    """Lines joined, what no terminal shows as it is written as escapes, and the middle of long ones left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    plain = one_line(" ".join(lines) if len(lines) > 1 else text, max_chars=len(text))
    if len(plain) <= MOST_CHARACTERS:
        return plain
    # The end of a message says the way out.
    return f"{plain[:300]} ... ({len(plain) - 500:,} characters) ... {plain[-200:]}"


def reason_of(error: BaseException) -> str:
    """An error's first line, and the next one if that ends in a colon: validation errors of transformers say there what is wrong."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ".join([first, *more[: first.endswith(":")]])


def line_of(error: BaseException) -> str:
    """The line about an error of the user's, or of the machine's."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    kind = type(error).__name__
    # PyTorch has two more ways to say it.
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory{f' ({joined(text)})' if text else ''}: use a smaller model or token budget"
    if isinstance(error, OSError) or _is_ours(error):
        return joined(text or kind)
    return f"{joined(text or kind)} ({kind} of a library; --debug shows where)"


def line_of_bug(error: BaseException) -> str:
    """The line about an error that no input should cause."""
    place = next((frame for frame in reversed(_frames(error)) if _in_package(frame)), None)
    where = (
        f" at {Path(place.filename).relative_to(_HOME).as_posix()}:{place.lineno}"
        if place is not None
        else ""
    )
    return (
        f"a bug in dti, {type(error).__name__}{where}: {joined(str(error)) or 'without a message'}. Run the command again "
        "with --debug, which shows all of it, and report that"
    )


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A question to put behind a message about an unknown name; empty: no name resembles it."""
    close = difflib.get_close_matches(word, sorted(names), 1)
    return f": did you mean {close[0]}?" if close and close[0] != word else ""


def _is_ours(error: BaseException) -> bool:
    """Whether the package itself raised it, in words of its own."""
    frames = _frames(error)
    return bool(frames) and _in_package(frames[-1])


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__, limit=-100))


def _in_package(frame: traceback.FrameSummary) -> bool:
    return any(Path(frame.filename).is_relative_to(package) for package in _PACKAGES)
