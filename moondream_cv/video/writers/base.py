"""`Writer`: the protocol of all writers of frames and detections, and the base of text writers.

The writers are `video_file` (H.264), `json_lines`, `mot` and `window`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.frame import Frame

if TYPE_CHECKING:
    import supervision as sv

logger = logging.getLogger(__name__)

STANDARD_OUTPUT = "-"

_Self = TypeVar("_Self", bound="Writer")


class Writer(Protocol):
    """Protocol of objects that accept frames with their detections.

    As a context manager, a writer closes itself, also after an exception. Subclasses inherit this.
    """

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Write one frame.

        Args:
            frame: Frame with the annotated image.
            detections: Detections on the frame, in pixels, with `data["class_name"]`.

        Raises:
            VideoError: The frame cannot be written. The message has the name of the target.
        """
        ...

    def close(self) -> None:
        """Complete the output. A second call does nothing.

        Raises:
            VideoError: The output cannot be completed. After a failed `write`, this is not raised again.
        """
        ...

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except VideoError as second:
            if error is None:
                raise
            logger.warning("%s", second)  # the first error is more informative


class TextTarget:
    """A text file, standard output or a text stream, flushed after every write."""

    def __init__(self, target: str | Path | TextIO) -> None:
        """Open the target. An existing file is overwritten.

        Args:
            target: Path (`~` is expanded), "-" for standard output, or text stream, which is not closed.

        Raises:
            VideoError: The file cannot be written.
        """
        self._closed = self._failed = False
        if target == STANDARD_OUTPUT:
            self.name, self._stream, self._owned = "standard output", sys.stdout, False
        elif isinstance(target, (str, Path)):
            self.name, self._owned = str(target), True
            try:
                self._stream = Path(target).expanduser().open("w", encoding="utf-8", newline="\n")
            except (OSError, RuntimeError, ValueError) as error:  # "~nobody", a NUL in the path
                raise VideoError(f"{self.name} {cannot_be_written(Path(target), error)}") from error
        else:
            self.name, self._stream, self._owned = str(getattr(target, "name", "the text stream")), target, False

    def write(self, text: str) -> None:
        """Write lines, each of which ends with a newline.

        Raises:
            VideoError: The lines cannot be written, or the target is closed.
        """
        if self._closed:
            raise VideoError(f"{self.name} is closed; create a new writer")
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the caller has closed the stream
            self._failed = True
            raise VideoError(f"{self.name} cannot be written to: {reason(error)}") from error

    def close(self) -> None:
        """Close the file; streams of the caller stay open. A second call does nothing.

        Raises:
            VideoError: The file cannot be completed, and no `write` has failed before.
        """
        if self._closed:
            return
        self._closed = True
        if not self._owned:
            return
        try:
            self._stream.close()
        except OSError as error:
            if not self._failed:
                raise VideoError(f"{self.name} cannot be completed: {reason(error)}") from error


class TextWriter(Writer):
    """Base of writers of text lines."""

    def __init__(self, target: str | Path | TextIO) -> None:
        """Open the target. An existing file is overwritten.

        Args:
            target: Path, "-" for standard output, or text stream, which is flushed but not closed.

        Raises:
            VideoError: The file cannot be written.
        """
        self._target = TextTarget(target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target.name!r})"

    def close(self) -> None:
        """Close the file. A second call does nothing.

        Raises:
            VideoError: The file cannot be completed, and no `write` has failed before.
        """
        self._target.close()


def cannot_be_written(path: Path, error: Exception | None = None) -> str:
    """Return the reason why a file cannot be written and a fix, to follow the file name in a message.

    Args:
        path: Path of the file.
        error: Error of the attempt; None if the target is not a regular file.
    """
    full = os.path.expanduser(path)  # os.path: methods of Path raise if a name is too long
    folder = os.path.dirname(full) or "."
    if os.path.isdir(full):
        return f"is a folder; pass a file in it, such as {path / 'output'}{path.suffix}"
    if not os.path.lexists(folder) and "\0" not in full:
        return f"cannot be written: there is no folder {folder}; create it first (mkdir -p)"
    if not os.path.isdir(folder):
        return f"cannot be written: {folder} is not a folder; choose another path"
    why = "it is not a regular file" if error is None else reason(error)
    return f"cannot be written: {why}; choose another path, or fix the permissions of {folder}"


def reason(error: BaseException) -> str:
    """Return the text of an error without its path."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text or type(error).__name__
