"""Folders, patterns and iterables of images. Run with `pytest tests/video/test_image_folder.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv.video.sources.opening import open_source
from tests.helpers.clips import encode_jpeg, write_clip
from tests.helpers.sources import IMAGES, frame_numbers, image_folder, read

NATURAL = ["img1.jpg", "img2.jpg", "Img3.JPG", "img10.jpeg", "img010b.jpg", "other.jpg"]


def test_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    image_folder(tmp_path, NATURAL)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.jpg").mkdir()
    source, frames = read(tmp_path)
    assert frame_numbers(frames) == list(range(6))
    assert (source.live, source.fps, source.frame_count, source.resolution_wh) == (False, None, 6, (128, 64))
    assert [frame.time for frame in frames] == pytest.approx([number / 30 for number in range(6)])


def test_glob_selects_images(tmp_path: Path) -> None:
    image_folder(tmp_path, NATURAL)
    assert frame_numbers(read(str(tmp_path / "img*.jp*g"))[1]) == [0, 1, 3, 4]
    assert frame_numbers(read(tmp_path / "img?.jpg")[1]) == [0, 1]
    assert frame_numbers(read(tmp_path.parent / "**" / tmp_path.name / "img10.*")[1]) == [3]
    (tmp_path / "take[1].jpg").write_bytes(encode_jpeg(IMAGES[9]))
    assert frame_numbers(read(tmp_path / "take[1].jpg")[1]) == [9]  # a name, not a pattern


def test_damaged_image_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path, NATURAL)
    (tmp_path / "img2.jpg").write_bytes(b"no image")
    source, frames = read(tmp_path)
    assert frame_numbers(frames) == [0, 2, 3, 4, 5]
    assert source.problems == 1
    assert "img2.jpg" in caplog.text


def test_single_image_is_one_frame(tmp_path: Path) -> None:
    source, frames = read(image_folder(tmp_path, ["a.png"]) / "a.png")
    assert (frame_numbers(frames), source.frame_count) == ([0], 1)


def _numbered_files(folder: Path, template: str, numbers: list[int]) -> Path:
    for number in numbers:
        target = folder / (template % number)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode_jpeg(IMAGES[number % 31]))
    return folder / template


@pytest.mark.parametrize(
    ("template", "there", "expected"),
    [
        ("%04d.jpg", [0, 1, 2], [0, 1, 2]),
        ("%04d.jpg", [7, 8, 9, 10], [7, 8, 9, 10]),  # does not start at 0 or 1
        ("img_%d.jpg", [8, 9, 10, 11], [8, 9, 10, 11]),
        ("%03d.jpg", [998, 999, 1000], [6, 7, 8]),  # more digits than the width
        ("cam%d/frame.jpg", [2, 10], [2, 10]),
        ("100%% of %02d.jpg", [1, 2], [1, 2]),
        ("[a]%d*.jpg", [1, 2], [1, 2]),  # glob characters are literal
    ],
)
def test_numbered_pattern_reads_files_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, there: list[int], expected: list[int]
) -> None:
    pattern = _numbered_files(tmp_path, template, there)
    _numbered_files(tmp_path, "other%d.jpg", [5])
    (tmp_path / "5.jpg").write_bytes(encode_jpeg(IMAGES[30]))
    source, frames = read(pattern)
    assert frame_numbers(frames) == expected
    assert (source.frame_count, source.problems) == (len(there), 0)
    assert caplog.records == []
    assert frame_numbers(read(str(pattern))[1]) == expected


def test_pattern_width_requires_leading_zeros(tmp_path: Path) -> None:
    for number, name in enumerate(["1.jpg", "02.jpg", "003.jpg", "0004.jpg", "12.jpg", "123.jpg"]):
        (tmp_path / name).write_bytes(encode_jpeg(IMAGES[number]))
    assert frame_numbers(read(tmp_path / "%d.jpg")[1]) == [0, 4, 5]
    assert frame_numbers(read(tmp_path / "%02d.jpg")[1]) == [1, 4, 5]
    assert frame_numbers(read(tmp_path / "%03d.jpg")[1]) == [2, 5]


def test_gaps_in_numbers_log_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, frames = read(_numbered_files(tmp_path, "%04d.jpg", [3, 4, 7, 8, 12]), fps=10)
    assert frame_numbers(frames) == [3, 4, 7, 8, 12]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    (record,) = caplog.records
    assert "gaps in the numbers from 3 to 12, 5 missing, the first is 5;" in record.message


def test_regular_steps_between_numbers_log_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert frame_numbers(read(_numbered_files(tmp_path, "%03d.jpg", [0, 10, 20, 30]))[1]) == [0, 10, 20, 30]
    assert caplog.records == []


def test_existing_file_takes_precedence_over_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "%04d.jpg").write_bytes(encode_jpeg(IMAGES[9]))
    _numbered_files(tmp_path, "%04d.jpg", [1])
    assert frame_numbers(read(tmp_path / "%04d.jpg")[1]) == [9]


@pytest.mark.parametrize("fps", [5, 12.5, 29.97])
def test_fps_sets_frame_times_of_images_and_iterables(tmp_path: Path, fps: float) -> None:
    image_folder(tmp_path, NATURAL)
    single = tmp_path / NATURAL[0]
    for given in (tmp_path, tmp_path / "*.jpg", IMAGES[:4], (image for image in IMAGES[:4])):
        source, frames = read(given, fps=fps)
        assert len(frames) >= 4
        assert source.fps == fps
        assert [frame.time for frame in frames] == pytest.approx([frame.index / fps for frame in frames])
    assert read(single, fps=fps)[0].fps == fps


def test_frames_keep_their_times_if_fps_is_set(tmp_path: Path) -> None:
    clip = open_source(write_clip(tmp_path / "clip.mp4", IMAGES[:4]))
    _, frames = read(clip_frames := list(clip), fps=7)
    assert [frame.time for frame in frames] == [frame.time for frame in clip_frames]


def test_generator_is_read_lazily() -> None:
    taken = []

    def images() -> Iterator[np.ndarray]:
        for image in IMAGES:
            taken.append(1)
            yield image

    source = open_source(images())
    assert len(taken) == 1
    np.testing.assert_array_equal(next(source).image, IMAGES[0])
    np.testing.assert_array_equal(next(source).image, IMAGES[1])
    assert len(taken) == 2
    assert (source.fps, source.frame_count, source.live) == (None, None, False)


def test_iterables_accept_all_image_types(tmp_path: Path) -> None:
    file = image_folder(tmp_path, ["a.jpg"]) / "a.jpg"
    pil_image = Image.fromarray(IMAGES[1][..., ::-1].copy())
    gray = np.full((4, 6), 7, np.uint8)
    source, frames = read([IMAGES[0], pil_image, gray, file, file.read_bytes()])
    np.testing.assert_array_equal(frames[0].image, IMAGES[0])
    np.testing.assert_array_equal(frames[1].image, IMAGES[1])
    assert frames[2].image.shape == (4, 6, 3)
    assert frame_numbers(frames[3:]) == [0, 0]
    assert source.frame_count == 5
    assert frame_numbers(read(np.stack(IMAGES[:3]))[1]) == [0, 1, 2]


def test_frames_are_copies_of_reused_buffers() -> None:
    buffer = np.empty_like(IMAGES[0])

    def images() -> Iterator[np.ndarray]:
        for image in IMAGES:
            buffer[:] = image
            yield buffer

    assert frame_numbers(read(images())[1]) == list(range(31))


def test_frames_of_another_source_keep_their_times(tmp_path: Path) -> None:
    clip = open_source(write_clip(tmp_path / "clip.mp4", IMAGES))
    source, frames = read(frame for frame in clip if frame.index % 10 == 5)
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.4, 0.8])
    assert open_source(source) is source


def test_invalid_items_are_skipped_and_iterator_errors_propagate() -> None:
    source, frames = read([IMAGES[0], None, IMAGES[1]])
    assert (frame_numbers(frames), source.problems) == ([0, 1], 1)

    def failing() -> Iterator[np.ndarray]:
        yield IMAGES[0]
        raise KeyError("of the caller's own")

    source = open_source(failing())
    next(source)
    with pytest.raises(KeyError, match="own"):
        next(source)
    assert list(source) == []
