"""Frames of videos: which are extracted, under which names, and the continuation of an interrupted extraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.inputs import list_inputs
from moondream_cv.scenes import render_scene
from tests.helpers.clips import frame_number, numbered_image, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clip of 60 numbered frames at 25 frames per second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", map(numbered_image, range(60)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(folder: Path) -> dict[str, int]:
    """Return the frame numbers that the extracted frames show, by file name."""
    return {path.name: frame_number(np.asarray(Image.open(path))[..., ::-1]) for path in sorted(folder.glob("*.jpg"))}


def test_every_nth_frame_is_extracted_with_its_number(tmp_path: Path, clip: Path) -> None:
    frames = tmp_path / "dataset" / "frames"
    images = list_inputs([clip], frames, every=25)
    assert [(image.name, image.source, image.group) for image in images] == [
        (f"clip__{number:06}.jpg", f"frames/clip__{number:06}.jpg", "clip") for number in (0, 25, 50)
    ]
    assert [image.open() for image in images] == [frames / image.name for image in images]
    assert numbers(frames) == {f"clip__{number:06}.jpg": number for number in (0, 25, 50)}
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        list_inputs([clip], frames, every=0)


def test_default_is_one_frame_per_second(tmp_path: Path, clip: Path) -> None:
    list_inputs([clip], tmp_path / "dataset" / "frames")
    assert list(numbers(tmp_path / "dataset" / "frames").values()) == [0, 25, 50]


def test_first_frame_of_each_scene_is_extracted(tmp_path: Path) -> None:
    scenes = [render_scene(seed, resolution_wh=(256, 192)).image[..., ::-1] for seed in (1, 2, 3)]
    path = write_clip(tmp_path / "cuts.mp4", [scene for scene in scenes for _ in range(8)], fps=8)
    images = list_inputs([path], tmp_path / "dataset" / "frames", on_scene_change=True)
    assert [image.name for image in images] == [f"cuts__{number:06}.jpg" for number in (0, 8, 16)]
    both = list_inputs([path], tmp_path / "dataset" / "frames", on_scene_change=True, every=12)
    assert [image.name for image in both] == [f"cuts__{number:06}.jpg" for number in (0, 8, 12, 16)]


def test_videos_in_folders_are_named_below_the_folder(tmp_path: Path, clip: Path) -> None:
    folder = tmp_path / "in"
    (folder / "cam").mkdir(parents=True)
    (folder / "cam" / "day.MP4").write_bytes(clip.read_bytes())
    (folder / "a.jpg").touch()
    (folder / "z.jpg").touch()
    images = list_inputs([folder], tmp_path / "dataset" / "frames", every=50)
    assert [(image.name, image.group) for image in images] == [
        ("a.jpg", None),
        ("cam__day__000000.jpg", "cam__day"),
        ("cam__day__000050.jpg", "cam__day"),
        ("z.jpg", None),
    ]
    (folder / "cam__day__000050.png").touch()
    with pytest.raises(LabelingError, match="would have the same name in the dataset"):
        list_inputs([folder], tmp_path / "dataset" / "frames", every=50)


def test_interrupted_extraction_continues_without_writing_frames_again(tmp_path: Path, clip: Path) -> None:
    complete, interrupted = tmp_path / "complete", tmp_path / "interrupted"
    expected = list_inputs([clip], complete, every=10)

    def interrupt(done: int, total: int) -> None:
        assert total == 60
        if done == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list_inputs([clip], interrupted, every=10, progress=interrupt)
    written = {path: path.stat().st_mtime_ns for path in interrupted.glob("*.jpg")}
    assert len(written) == 4
    images = list_inputs([clip], interrupted, every=10)
    assert [image.name for image in images] == [image.name for image in expected]
    assert contents(interrupted) == contents(complete)
    assert {path: path.stat().st_mtime_ns for path in written} == written

    # A complete video is not decoded again, unless a frame is missing
    calls: list[int] = []
    assert list_inputs([clip], interrupted, every=10, progress=lambda done, total: calls.append(done)) == images
    assert not calls
    (interrupted / "clip__000040.jpg").unlink()
    assert list_inputs([clip], interrupted, every=10, progress=lambda done, total: calls.append(done)) == images
    assert calls == list(range(1, 61))
    assert contents(interrupted) == contents(complete)


def test_unsuitable_videos_are_rejected_before_frames_are_written(tmp_path: Path, clip: Path) -> None:
    frames = tmp_path / "dataset" / "frames"
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"not a video")
    with pytest.raises(
        LabelingError, match=r"damaged\.mp4' cannot be opened as a video: .*; remove it from the inputs"
    ):
        list_inputs([clip, damaged], frames, every=10)
    assert not frames.parent.exists()

    list_inputs([clip], frames, every=30)
    before = contents(frames)
    other = write_clip(tmp_path / "clip.mp4", map(numbered_image, range(100, 110)))
    with pytest.raises(LabelingError, match="contains frames of another video with the name"):
        list_inputs([other], frames, every=5)
    assert contents(frames) == before
