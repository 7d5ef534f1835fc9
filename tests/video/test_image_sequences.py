"""Image sequences and animations through `annotate_video`. Run with `pytest tests/video/test_image_sequences.py`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, features

from moondream_cv.video import annotate_video, track, track_streams
from tests.helpers.clips import MovingObject, ScriptedDetector, encode_jpeg, frame_number, numbered_image

DURATIONS = [100, 250, 40, 600]
IMAGES = [numbered_image(number) for number in range(8)]


def detector() -> ScriptedDetector:
    return ScriptedDetector(MovingObject("dog", (30, 30)))


def shown(path: Path) -> tuple[list[int], list[float], float]:
    """Return the frame numbers and times of a video, and its duration in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame_number(frame.to_ndarray(format="bgr24")), frame.time) for frame in container.decode(stream)]
        assert stream.duration is not None
        duration = float(stream.duration * (stream.time_base or Fraction(1)))
    return [number for number, _ in frames], [float(time or 0) for _, time in frames], duration


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", *(["a.avif"] if features.check("avif") else [])])
@pytest.mark.parametrize("every", [1, 3, "auto"])
def test_animation_keeps_its_times_and_last_duration(tmp_path: Path, name: str, every: Any) -> None:
    images = [Image.fromarray(image[..., ::-1].copy()) for image in IMAGES[:4]]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=DURATIONS)
    summary = annotate_video(
        tmp_path / name, tmp_path / "out.mp4", "dog", model=detector(), every=every, annotate="none"
    )
    numbers, times, duration = shown(tmp_path / "out.mp4")
    assert numbers == [0, 1, 2, 3]
    assert times == pytest.approx([0, 0.1, 0.35, 0.39], abs=1e-3)
    assert duration == pytest.approx(0.99, abs=1e-3)
    assert (summary.frames, summary.frame_count) == (4, 4)
    assert summary.seconds == pytest.approx(0.39)


def test_very_slow_animation_can_be_written(tmp_path: Path) -> None:
    images = [Image.fromarray(image[..., ::-1].copy()) for image in IMAGES[:2]]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[4_000_000, 4_000_000])
    annotate_video(tmp_path / "a.webp", tmp_path / "out.mp4", "dog", model=detector(), every=1, annotate="none")
    numbers, times, _ = shown(tmp_path / "out.mp4")
    assert numbers == [0, 1]
    assert times == pytest.approx([0, 4000])


@pytest.mark.parametrize("fps", [4, 29.97])
def test_output_of_images_has_their_frame_rate(tmp_path: Path, fps: float) -> None:
    for number, image in enumerate(IMAGES):
        (tmp_path / f"{number:04d}.jpg").write_bytes(encode_jpeg(image))
    for source in (tmp_path / "%04d.jpg", tmp_path, IMAGES):
        summary = annotate_video(
            source, tmp_path / "out.mp4", "dog", model=detector(), every=5, annotate="none", fps=fps
        )
        numbers, times, duration = shown(tmp_path / "out.mp4")
        assert numbers == list(range(8))
        assert times == pytest.approx([number / fps for number in range(8)], abs=1e-4)
        assert duration == pytest.approx(8 / fps, abs=1e-3)
        assert summary.seconds == pytest.approx(7 / fps)


def test_track_and_track_streams_accept_fps() -> None:
    with track_streams([IMAGES, list(IMAGES)], "dog", model=detector(), every=2, fps=4) as stream:
        times = [(tracked.source, tracked.frame.time) for tracked in stream]
    expected = [(source, number / 4) for source in (0, 1) for number in range(8)]
    assert np.array(sorted(times)) == pytest.approx(np.array(expected))
    assert len(list(track(IMAGES, "dog", model=detector(), fps=4))) == 8
    with pytest.raises(ValueError, match=r"fps must be between 0\.001 and 1000, got 0"):
        track(IMAGES, "dog", model=detector(), fps=0)
