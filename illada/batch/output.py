"""The file of answers: a line is written once, whatever happens in between."""

import json
import os
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from .lines import Line, dump

SECONDS_BETWEEN_FLUSHES = 1.0


class OutputFile:
    """A context manager: the file in which each line's record is written, begun or continued.

    The records themselves say which lines are done, so a process may be killed at any moment: of the last record there
    may be a part, which is cut off. Beside the file there is `<name>.run.json`, the settings that it was begun with,
    and while it is written to, `.<name>.lock`. Records are with the system at once, and on the disk within a second.

    Args:
        path (`Path`): of the file.
        settings (`dict`): what the answers depend on, by argument; JSON.

    Raises:
        ValueError: if there is a file that was not begun by such a run, or by one of other settings.
        OSError: if another process is writing to it, or it cannot be written.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, json.loads(dump(settings))
        self.run_path = path.with_name(f"{path.name}.run.json")
        self.lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        self.digests = array("Q")  # by line; 0 for one that has no record
        self.num_done = self.num_failed = 0

    def __enter__(self) -> "OutputFile":
        try:
            self.lock.acquire()
        except Timeout:
            raise OSError(f"`output` {str(self.path)!r} is being written by another process.") from None
        try:
            if self.path.exists() and self.path.stat().st_size:
                self._check_settings()
                self._read_records()
            else:
                partial = self.run_path.with_name(f"{self.run_path.name}.partial")
                partial.write_bytes(dump(self.settings) + b"\n")
                partial.rename(self.run_path)
            self.file, self.flushed_at = self.path.open("ab"), time.monotonic()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *exception):
        try:
            with self.file:
                self._flush()
        finally:
            self._unlock()

    def write(self, record: dict):
        """Adds the record of a line, unless the line has one."""
        if not self._add(record):
            return
        self.file.write(dump(record) + b"\n")
        self.file.flush()
        if time.monotonic() - self.flushed_at > SECONDS_BETWEEN_FLUSHES:
            self._flush()

    def has(self, line: Line) -> bool:
        """Whether there is a record of the line."""
        return line.number < len(self.digests) and self.digests[line.number] == line.digest

    def check_lines(self, lines: Iterable[Line]) -> int:
        """How many lines there are, with those that are done.

        Raises:
            ValueError: if a line that is done is another one now.
        """
        total = num_same = 0
        for line in lines:
            total += 1
            if line.number < len(self.digests) and self.digests[line.number]:
                if not self.has(line):
                    self._refuse(f"line {line.number} of `input` has changed since {str(self.path)!r} was begun")
                num_same += 1
        if num_same < self.num_done:
            self._refuse(f"`input` has no more all the lines that {str(self.path)!r} answers")
        return total

    def _add(self, record: dict) -> bool:
        number, digest = record["line"], int(record["id"].removeprefix("batch_req_"), 16)
        if number < 1 or not digest:
            raise ValueError
        if number >= len(self.digests):
            self.digests.frombytes(bytes(8 * (number + 1 - len(self.digests))))
        if self.digests[number]:
            return False
        self.digests[number] = digest
        self.num_done += 1
        self.num_failed += record["response"] is None or record["response"]["status_code"] != 200
        return True

    def _check_settings(self):
        try:
            begun_with = json.loads(self.run_path.read_bytes())
        except FileNotFoundError:
            self._refuse("it exists, and was not begun by `illada batch`")
        except ValueError:
            self._refuse(f"{str(self.run_path)!r} is damaged")
        for name in sorted({*begun_with, *self.settings}):
            old, new = begun_with.get(name), self.settings.get(name)
            if old != new:
                raise ValueError(
                    f"`{name}` must be {old!r}, with which {str(self.path)!r} was begun, or `output` another file; "
                    f"got {new!r}."
                )

    def _read_records(self):
        """What is done; a last line that has no end is cut off."""
        end = 0
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break
                end += len(text)
                try:
                    is_new = self._add(json.loads(text))
                except (ValueError, LookupError, TypeError, AttributeError):
                    self._refuse(f"its line {number} is no record of `illada batch`")
                if not is_new:
                    self._refuse(f"its line {number} answers a line of `input` for a second time")
        os.truncate(self.path, end)

    def _refuse(self, reason: str):
        raise ValueError(f"`output` {str(self.path)!r} cannot be continued: {reason}.")

    def _flush(self):
        os.fsync(self.file.fileno())
        self.flushed_at = time.monotonic()

    def _unlock(self):
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()
