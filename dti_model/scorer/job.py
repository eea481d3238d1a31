"""A scoring job on disk, which survives kills, full disks and flipped bits: OUTPUT.partial, OUTPUT.job, and OUTPUT at its end.

    OUTPUT.job       sealed JSON: what decides the scores (input, weights, tokenizer, settings), by sha256
    OUTPUT.partial   chunk after chunk: its records as JSON lines, then {"lines": N, "sha256": "..."}

N counts the lines so far, and the digest is that of the chunk after the digest before it; the first follows the job's. So a chunk that
was cut short or changed, or that belongs to another job, is recognised, and the job goes on from the last good one.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dti_model.files import (
    DamagedFileError,
    WriteError,
    read_sealed,
    remove_leftovers,
    sha256_of,
    sha256_of_json,
    whole_file,
    write_sealed,
)
from dti_model.scorer.lines import is_parquet
from dti_model.shown import one_line

OUTPUT_SCHEMA = pa.schema(
    {"line": pa.int64(), "user": pa.string(), "probabilities": pa.list_(pa.float64()), "error": pa.string()}
)
_GROUP_ROWS = 1024  # of the Parquet output
_MAX_CHUNK_BYTES = 1 << 30  # bounds the memory that a damaged file without line ends takes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Job:
    """One output file in the making. Its user holds the output's lock.

    Attributes:
        output: the file to make.
        partial: finished chunks.
        job: the identity of the job.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], skip_bad_lines: bool) -> None:
        """Name a job.

        Args:
            output: the file to make, `.jsonl` or `.parquet`.
            identity: by name, everything that decides the output, as JSON knows it.
            skip_bad_lines: bad lines become records of errors; False: they stop the job.
        """
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.job = output.with_name(output.name + ".job")
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._skip_bad_lines = skip_bad_lines
        self._chain = sha256_of_json(self._identity)
        self._num_lines = 0

    def is_finished(self) -> bool:
        """Whether the output is there and is this job's: an earlier call was killed right before it removed `.job`.

        Raises:
            FileExistsError: the output is there, and another one; or something that is no file of a job has the place of one.
        """
        for path in (self.partial, self.job):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise FileExistsError(
                    f"{one_line(path)} must be a regular file of `dti score`, or not be there, but is a link or something else: move it away, "
                    "or choose another --output"
                )
        if not self.output.exists():
            return False
        if self.job.is_file():
            told = self._told()
            if told.get("identity") == self._identity and told.get("output") == _facts(self.output):
                remove_leftovers(self.output)
                self.drop()
                return True
        raise FileExistsError(f"{one_line(self.output)} exists: choose another --output, or delete it")

    def resume(self) -> int:
        """Begin, or go on behind the last good chunk of an interrupted call; bytes behind that chunk are cut off.

        Returns:
            Lines that are done.

        Raises:
            FileExistsError: the files belong to another job, and the message says what differs; or they are somebody's own.
            DamagedFileError: OUTPUT.job is not what was written.
        """
        if self.partial.exists() and not self.job.exists():
            raise FileExistsError(
                f"{one_line(self.partial)} exists without {one_line(self.job.name)}: delete it to start anew"
            )
        if self.partial.exists():
            self._check_same()
        elif self.job.exists() and not self._is_ours():
            raise FileExistsError(
                f"{one_line(self.job)} exists and is not a file of `dti score`: move it away, or choose another --output"
            )
        write_sealed(self.job, {"identity": self._identity, "skip_bad_lines": self._skip_bad_lines})
        self.partial.touch()
        kept = sum(sum(map(len, chunk)) + len(trailer) for chunk, trailer in self._chunks())
        os.truncate(self.partial, kept)
        return self._num_lines

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the records of the next lines.

        Raises:
            WriteError: the disk is full; earlier chunks are kept.
        """
        lines = [json.dumps(record, allow_nan=False).encode() + b"\n" for record in records]
        num_lines, chain = self._num_lines + len(lines), _next(self._chain, lines)
        try:
            with open(self.partial, "ab", opener=_no_link) as file:
                file.write(b"".join((*lines, _trailer(num_lines, chain))))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise WriteError(
                f"{one_line(self.partial)} cannot be written ({error.strerror}). Earlier scores are kept: make room and give the same "
                "command again"
            ) from error
        self._num_lines, self._chain = num_lines, chain

    def publish(self, num_lines: int) -> None:
        """Check that every line has its record, in order, and make the output of them; it appears complete or not at all.

        Raises:
            DamagedFileError: OUTPUT.partial is not what was written.
            FileExistsError: something came in the place of the output; it stays, and so does the job.
            WriteError: the disk is full; the job is kept.
        """
        with whole_file(self.output, replace=False) as temporary:
            if is_parquet(self.output):
                with pq.ParquetWriter(temporary, OUTPUT_SCHEMA) as writer:
                    records = (json.loads(line) for line in self._checked_lines(num_lines))
                    while group := list(itertools.islice(records, _GROUP_ROWS)):
                        writer.write_table(pa.Table.from_pylist(group, OUTPUT_SCHEMA))
            else:
                with temporary.open("wb") as file:
                    file.writelines(self._checked_lines(num_lines))
            # A kill behind the renaming leaves this: the next call then knows the output for its own.
            finished = {"identity": self._identity, "output": _facts(temporary)}
            write_sealed(self.job, {**finished, "skip_bad_lines": self._skip_bad_lines})
        self.drop()

    def drop(self) -> None:
        """Remove all but the output."""
        self.partial.unlink(missing_ok=True)
        self.job.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        try:
            return "identity" in self._told()
        except DamagedFileError:
            return False

    def _told(self) -> dict[str, Any]:
        return read_sealed(self.job, f"Delete it and {one_line(self.partial.name)} to start anew")

    def _check_same(self) -> None:
        told = self._told()
        before, others = told.get("identity", {}), []
        for name, value in self._identity.items():
            if before.get(name) != value:
                scalar = isinstance(value, (int, str)) and len(str(value)) < 60
                others.append(f"{name} ({before.get(name)}, not {value})" if scalar else name)
        if told.get("skip_bad_lines") and not self._skip_bad_lines:
            others.append("--bad-lines (skip, not stop)")
        if others or before.keys() != self._identity.keys():
            raise FileExistsError(
                f"{one_line(self.partial)} belongs to a job with another {', '.join(others) or 'version of this program'}: delete it and "
                f"{one_line(self.job.name)} to start anew, or choose another --output"
            )

    def _chunks(self) -> Iterator[tuple[list[bytes], bytes]]:
        """Good chunks from the first on, with their trailers; the state follows them."""
        chunk: list[bytes] = []
        num_bytes = 0
        with self.partial.open("rb") as file:
            while line := file.readline(_MAX_CHUNK_BYTES):
                if not line.startswith(b'{"lines": '):
                    chunk.append(line)
                    num_bytes += len(line)
                    if num_bytes > _MAX_CHUNK_BYTES:
                        return
                    continue
                num_lines, chain = self._num_lines + len(chunk), _next(self._chain, chunk)
                if line != _trailer(num_lines, chain):
                    return
                self._num_lines, self._chain = num_lines, chain
                yield chunk, line
                chunk, num_bytes = [], 0

    def _checked_lines(self, num_lines: int) -> Iterator[bytes]:
        """All records, read back from the disk."""
        again = Job(self.output, self._identity, self._skip_bad_lines)
        number = 0
        for chunk, _ in again._chunks():
            for line in chunk:
                number += 1
                if json.loads(line)["line"] != number:
                    raise DamagedFileError(
                        f"{one_line(self.partial)} has another record in the place of line {number:,}'s: delete it and {one_line(self.job.name)} to "
                        "start anew"
                    )
                yield line
        if number != num_lines or again._chain != self._chain:
            raise DamagedFileError(
                f"{one_line(self.partial)} is damaged behind line {number:,} of {num_lines:,}. Give the same command again, which goes on there"
            )


def _next(chain: str, lines: Sequence[bytes]) -> str:
    digest = hashlib.sha256(chain.encode())
    for line in lines:
        digest.update(line)
    return digest.hexdigest()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _trailer(num_lines: int, chain: str) -> bytes:
    return json.dumps({"lines": num_lines, "sha256": chain}).encode() + b"\n"


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
