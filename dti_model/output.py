"""Standard output and error that may break, as in `dti train ... | head` or on a full disk, without ending what is printed about.

Nor does a character that their encoding lacks: `±` is printed as `\\xb1` where the locale knows ASCII only.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Output:
    """A stream whose first failed write is its last: what comes after goes nowhere.

    Attributes:
        error: of that write; None: all was written so far.
    """

    def __init__(self, stream: Any) -> None:
        """`stream`: text stream to write to; None, as Python has it for a closed descriptor: nowhere."""
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115  # as long as the process
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a text stream's; characters that it cannot encode are written as escapes."""
        self._try(self._write, text)
        return len(text)

    def flush(self) -> None:
        """As a text stream's."""
        self._try(self._stream.flush)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._break(error)
        except ValueError as error:  # somebody has closed it
            self._break(OSError(errno.EBADF, str(error)))

    def _break(self, error: OSError) -> None:
        self.error = error
        # Python writes what is still in the buffer when it ends, and would fail again.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def unbreakable_output() -> Iterator[Output]:
    """Let nothing that is printed meanwhile raise an error; gives standard output, whose `error` says whether it broke."""
    before = sys.stdout, sys.stderr
    stdout, stderr = (stream if isinstance(stream, Output) else Output(stream) for stream in before)
    sys.stdout, sys.stderr = stdout, stderr  # all that print and tqdm ask of a stream
    try:
        yield stdout
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout, sys.stderr = before
