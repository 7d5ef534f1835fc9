"""The log of a run, `labels.jsonl`: batches of lines are appended, and an interrupted batch is cut.

Batches can be written out of order: later ones wait in files until all earlier ones are in the log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from typing_extensions import Self

from moondream_cv.durable_files import PART_SUFFIX, find_complete_lines, sync_folder, write_file
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.layout import LABELS, WORK

_SYNC_SECONDS = 1.0  # a power failure costs the batches of this time; a killed process loses none


class LabelLog:
    """`labels.jsonl` of one run. Use it in a `with` statement, in one thread.

    Attributes:
        num_lines: Number of lines in the log.
    """

    def __init__(self, folder: Path, batches: Sequence[range]) -> None:
        """Open or create the log, and cut it to its last complete batch.

        Args:
            folder: Folder of the dataset.
            batches: Indices of the images of each batch; together 0 to the number of images.

        Raises:
            LabelingError: The log has more lines than there are images.
            OSError: The log cannot be read or written.
        """
        self._path, self._waiting = folder / LABELS, folder / WORK / "batches"
        self._batches = batches
        ends = {batch.stop: number + 1 for number, batch in enumerate(batches)} | {0: 0}
        self._file = open(self._path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            num_lines, num_bytes = self._complete(ends)
            self._file.truncate(num_bytes)
            self._file.seek(0, os.SEEK_END)
            sync_folder(folder)
        except BaseException:
            self._file.close()
            raise
        self.num_lines, self._synced = num_lines, time.monotonic()
        self._next = ends[num_lines]  # number of the next batch
        self._append_waiting()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._sync()
        finally:
            self._file.close()

    @property
    def missing(self) -> list[int]:
        """Numbers of the batches that have not been written."""
        waiting = {int(path.stem) for path in self._waiting_files()}
        return [number for number in range(self._next, len(self._batches)) if number not in waiting]

    def write(self, number: int, lines: Iterable[str]) -> None:
        """Write a batch. After a crash, the log contains all of it or nothing.

        Args:
            number: Number of the batch. A batch that has been written is ignored.
            lines: One line per image, with line breaks.

        Raises:
            OSError: The log cannot be written. It has not changed.
        """
        content = "".join(lines).encode()
        waiting = self._waiting / f"{number:08}.jsonl"
        if number > self._next and not waiting.exists():
            write_file(waiting, content)
        elif number == self._next:
            self._append(content)
            self._append_waiting()

    def _complete(self, ends: dict[int, int]) -> tuple[int, int]:
        """Return the number of lines and bytes of the complete batches in the file."""
        complete = find_complete_lines(self._file, ends.__contains__)
        if complete.num_found > max(ends):
            raise LabelingError(
                f"{self._path} has more lines than there are images, {complete.num_found}; choose another folder, or "
                "remove it"
            )
        return complete.num_lines, complete.num_bytes

    def _append(self, content: bytes) -> None:
        position = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(content)
            self._file.flush()
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self._sync()
        except OSError:
            self._file.truncate(position)
            raise
        self.num_lines = self._batches[self._next].stop
        self._next += 1

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _append_waiting(self) -> None:
        """Append the batches that wait for no other one."""
        while (path := self._waiting / f"{self._next:08}.jsonl").is_file():
            self._append(path.read_bytes())
            self._sync()
            path.unlink()
        for path in self._waiting_files():
            if int(path.stem) < self._next:  # appended before a crash
                path.unlink()

    def _waiting_files(self) -> list[Path]:
        if not self._waiting.is_dir():
            return []
        return sorted(path for path in self._waiting.iterdir() if not path.name.endswith(PART_SUFFIX))
