"""Frames of videos as JPEG files, extracted so that an interrupted extraction continues.

Next to the frames of a video, a hidden file contains the identity of the video and the numbers of its frames, so a
complete video is not decoded again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moondream_cv.durable_files import write_file
from moondream_cv.errors import VideoError
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.file_listing import shown
from moondream_cv.video.sources.opening import ASSUMED_FPS, Source, open_source
from moondream_cv.video.tracking.scene_cuts import SceneCutDetector

if TYPE_CHECKING:
    from moondream_cv.video.sources.frame import Frame

QUALITY = 95
"""JPEG quality of the frames."""

_HASHED_BYTES = 2**20  # at both ends of a video


@dataclass(frozen=True)
class Video:
    """A video whose frames are extracted.

    Attributes:
        path: Absolute path of the file.
        stem: Start of the names of its frames, unique among the inputs.
    """

    path: str
    stem: str


@dataclass(frozen=True)
class FrameChoice:
    """Frames that are extracted from a video. Its first frame is always among them.

    Attributes:
        every: Interval in frames; None without `on_scene_change`: about one frame per second.
        on_scene_change: Whether to include the first frame of each scene.
    """

    every: int | None = None
    on_scene_change: bool = False

    def select(self, source: Source) -> Iterator[tuple[Frame, bool]]:
        """Yield the frames of a source, each with whether it is chosen.

        Args:
            source: Open video.
        """
        every = self.every
        if every is None and not self.on_scene_change:
            every = max(1, round(source.fps or ASSUMED_FPS))
        is_cut = SceneCutDetector() if self.on_scene_change else None
        for frame in source:
            cut = is_cut is not None and is_cut(frame.image)
            yield frame, frame.index == 0 or cut or (every is not None and frame.index % every == 0)


def extract_frames(
    videos: Sequence[Video],
    folder: Path,
    choice: FrameChoice,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """Write the chosen frames of videos as `STEM__NUMBER.jpg`, in which the first frame has the number 000000.

    Existing frames are not written again.

    Args:
        videos: Videos.
        folder: Folder of the frames. It is created if necessary.
        choice: Frames to extract.
        progress: Function that receives the number of decoded frames, and an estimate of their total.

    Returns:
        File names of the frames of each video, in order.

    Raises:
        LabelingError: A video cannot be opened, or the folder contains frames of another video with the same stem; no
            frame was written.
        OSError: A frame cannot be written.
    """
    # Check all videos
    extractions = [_Extraction(video, folder, choice) for video in videos]
    total = 0
    for extraction in extractions:
        total += extraction.check()

    # Extract the missing frames
    done = 0
    for extraction in extractions:
        for _ in extraction.run():
            done += 1
            if progress is not None:
                progress(done, max(done, total))
    return [extraction.names for extraction in extractions]


class _Extraction:
    """The extraction of one video's frames."""

    def __init__(self, video: Video, folder: Path, choice: FrameChoice) -> None:
        self._video, self._folder, self._choice = video, folder, choice
        self._state_path = folder / f".{video.stem}.json"
        self._state: dict[str, Any] = {
            "video": _identity(video),
            "every": choice.every,
            "on_scene_change": choice.on_scene_change,
            "frames": None,
        }

    @property
    def names(self) -> list[str]:
        """File names of the chosen frames, after `run`."""
        return [self._name(number) for number in self._state["frames"]]

    def check(self) -> int:
        """Open the video unless all its frames exist, and return the estimated number of frames to decode."""
        state = self._read_state()
        if state is not None and state["video"] != self._state["video"]:
            raise LabelingError(
                f"{shown(self._folder)} contains frames of another video with the name {shown(self._video.stem)} than "
                f"{shown(self._video.path)}; rename the video, or choose another folder for the dataset"
            )
        if state is not None and {**state, "frames": None} == self._state and state["frames"] is not None:
            names = [self._name(number) for number in state["frames"]]
            if all((self._folder / name).exists() for name in names):
                self._state = state
                return 0
        with self._opened() as source:
            return source.frame_count or 0

    def run(self) -> Iterator[None]:
        """Write the missing frames, and yield after each decoded frame."""
        if self._state["frames"] is not None:
            return
        numbers = []
        try:
            write_file(self._state_path, json.dumps(self._state).encode())
            with self._opened() as source:
                for frame, is_chosen in self._choice.select(source):
                    if is_chosen:
                        numbers.append(frame.index)
                        path = self._folder / self._name(frame.index)
                        if not path.exists():
                            write_file(path, _jpeg(frame.image))
                    yield
            self._state["frames"] = numbers
            write_file(self._state_path, json.dumps(self._state).encode())
        except VideoError as error:
            raise LabelingError(f"{shown(self._video.path)}: the video cannot be read: {error}") from error

    def _name(self, number: int) -> str:
        return f"{self._video.stem}__{number:06}.jpg"

    def _opened(self) -> Source:
        try:
            return open_source(Path(self._video.path))
        except VideoError as error:
            raise LabelingError(f"{error}; remove it from the inputs, or convert it") from error

    def _read_state(self) -> dict[str, Any] | None:
        """Return the content of the hidden file; None if it does not exist or is not valid."""
        try:
            state = json.loads(self._state_path.read_bytes())
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and state.keys() == self._state.keys() else None


def _identity(video: Video) -> str:
    """Return a hash of the size and of both ends of a video."""
    try:
        with open(video.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            content = file.read(_HASHED_BYTES)
            file.seek(max(0, size - _HASHED_BYTES))
            content += file.read(_HASHED_BYTES)
    except OSError as error:
        raise LabelingError(f"{shown(video.path)} cannot be read: {error.strerror}") from error
    return hashlib.sha256(b"%d " % size + content).hexdigest()


def _jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    """Return a BGR image as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
