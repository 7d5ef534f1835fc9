"""Animations and images with several pages. Run with `pytest tests/video/test_animations.py`."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from PIL.TiffImagePlugin import AppendingTiffWriter

from moondream_cv.errors import VideoError
from moondream_cv.images import to_rgb
from moondream_cv.video.sources.opening import open_source
from tests.helpers.clips import frame_number, numbered_image, truncate, write_clip
from tests.helpers.sources import DURATIONS, IMAGES, frame_numbers, image_folder, read, to_pil, write_animation

ANIMATED = ["a.gif", "a.webp", "a.png", "a.apng"] + (["a.avif"] if features.check("avif") else [])


@pytest.mark.parametrize("name", ANIMATED)
def test_animation_frames_have_times_and_durations(tmp_path: Path, name: str) -> None:
    source, frames = read(write_animation(tmp_path / name, DURATIONS, loop=3))
    assert frame_numbers(frames) == [0, 1, 2, 3]  # once, independent of the loop count
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.35, 0.39])
    assert [frame.duration for frame in frames] == pytest.approx([0.1, 0.25, 0.04, 1.0])
    assert (source.live, source.frame_count, source.resolution_wh, source.problems) == (False, 4, (128, 64), 0)
    if not name.endswith("avif"):
        assert source.fps == pytest.approx(4 / 1.39)
        for frame, image in zip(frames, IMAGES, strict=False):
            assert np.abs(frame.image.astype(int) - image).max() <= (0 if name != "a.gif" else 24)  # 256 colors


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
@pytest.mark.parametrize("duration", [0, 10])
def test_short_durations_become_100_ms_as_in_browsers(tmp_path: Path, name: str, duration: int) -> None:
    source, frames = read(write_animation(tmp_path / name, [duration, 500, duration]))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.6])
    assert frames[2].duration == pytest.approx(0.1)
    assert source.fps == pytest.approx(3 / 0.7)


def test_animated_webp_frames_equal_those_of_pillow(tmp_path: Path) -> None:
    images = [to_pil(numbered_image(number, (320, 192))).convert("RGBA") for number in range(20)]
    path = write_animation(tmp_path / "a.webp", [100] * 20, images, lossless=False, quality=60)
    source, frames = read(path)
    with Image.open(path) as picture:
        assert len(frames) == picture.n_frames == 20
        for number, frame in enumerate(frames):
            picture.seek(number)
            np.testing.assert_array_equal(frame.image, np.asarray(picture.convert("RGB"))[..., ::-1])
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(20)])
    assert source.fps == pytest.approx(10)


def _sprite(number: int) -> Image.Image:
    """Return a red square on a transparent background, whose color is hidden."""
    image = Image.new("RGBA", (64, 32), (0, 90, 0, 0))
    image.paste((200, 30, 30, 255), (4 + 12 * number, 8, 14 + 12 * number, 18))
    return image


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.gif", {"disposal": 2}),
        ("a.gif", {"disposal": 3}),
        ("a.webp", {}),
        ("a.png", {"disposal": 0, "blend": 0}),
        ("a.png", {"disposal": 1, "blend": 1}),
        ("a.png", {"disposal": 2, "blend": 1}),
    ],
)
def test_transparent_animations_have_a_white_background(tmp_path: Path, name: str, options: dict[str, int]) -> None:
    _, frames = read(write_animation(tmp_path / name, [100] * 4, [_sprite(number) for number in range(4)], **options))
    for number, frame in enumerate(frames):
        expected = np.full((32, 64, 3), 255)
        expected[8:18, 4 + 12 * number : 14 + 12 * number] = (30, 30, 200)  # BGR, without the previous square
        assert np.abs(frame.image - expected).max() <= 8


def test_half_transparent_pixels_are_blended_with_white(tmp_path: Path) -> None:
    images = [Image.new("RGBA", (8, 8), (0, number, 0, 128)) for number in (0, 100)]
    for name in ("a.png", "a.webp"):
        _, frames = read(
            write_animation(tmp_path / name, [100, 100], images, **({"blend": 0} if name == "a.png" else {}))
        )
        assert [frame.image[4, 4].tolist() for frame in frames] == [[127, 127, 127], [127, 177, 127]]


def test_default_image_of_an_apng_is_not_a_frame(tmp_path: Path) -> None:
    images = [to_pil(IMAGES[number]) for number in (30, 0, 1, 2)]
    source, frames = read(write_animation(tmp_path / "a.png", [100] * 3, images, default_image=True))
    assert frame_numbers(frames) == [0, 1, 2]
    assert source.frame_count == 3
    assert frame_number(to_rgb(tmp_path / "a.png")[..., ::-1]) == 30  # but it is the still image


@pytest.mark.parametrize("name", [*ANIMATED, "a.tif"])
def test_to_rgb_returns_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    path = write_animation(tmp_path / name, DURATIONS)
    assert frame_number(to_rgb(path)[..., ::-1]) == 0


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_image_with_one_frame_accepts_fps(tmp_path: Path, name: str) -> None:
    to_pil(IMAGES[7]).save(tmp_path / name)
    source, frames = read(tmp_path / name, fps=4)
    assert (frame_numbers(frames), source.fps, frames[0].duration) == ([7], 4, None)


def test_tiff_pages_are_separate_frames(tmp_path: Path) -> None:
    path = write_animation(tmp_path / "a.tif", [100] * 4)
    source, frames = read(path)
    assert frame_numbers(frames) == [0, 1, 2, 3]
    assert (source.fps, source.frame_count) == (None, 4)
    assert [frame.time for frame in frames] == pytest.approx([0, 1 / 30, 2 / 30, 0.1])
    assert [frame.time for frame in read(path, fps=2)[1]] == pytest.approx([0, 0.5, 1, 1.5])


def _tiff_with_thumbnail(path: Path, numbers: list[int]) -> Path:
    """Write a TIFF in which a thumbnail follows each page."""
    with AppendingTiffWriter(str(path), new=True) as writer:
        for number in numbers:
            for image, kind in ((to_pil(IMAGES[number]), 0), (to_pil(IMAGES[number]).resize((16, 8)), 1)):
                image.save(writer, "TIFF", tiffinfo={254: kind})
                writer.newFrame()
    return path


def test_tiff_thumbnails_are_skipped(tmp_path: Path) -> None:
    assert frame_numbers(read(_tiff_with_thumbnail(tmp_path / "a.tif", [3, 4]))[1]) == [3, 4]
    source, frames = read(_tiff_with_thumbnail(tmp_path / "b.tif", [5]), fps=3)
    assert (frame_numbers(frames), source.fps) == ([5], 3)


def test_damaged_page_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_animation(tmp_path / "a.tif", [100] * 3, compression="tiff_deflate")
    with Image.open(path) as picture:
        picture.seek(1)
        (offset,) = picture.tag_v2[273]  # StripOffsets
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = bytes(20)
    path.write_bytes(content)
    source, frames = read(path)
    assert (frame_numbers(frames), source.problems) == ([0, 2], 1)
    assert "page 2 of" in caplog.text


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
@pytest.mark.parametrize("share", np.linspace(0.1, 0.99, 20).tolist())
def test_truncated_animation_ends_with_a_warning(
    tmp_path: Path, name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    path = write_animation(tmp_path / name, [100] * 12, [Image.fromarray(image) for image in noise])
    source, frames = read(truncate(path, share))
    assert int(12 * share) - 1 <= len(frames) <= int(12 * share) + 1
    assert source.problems == 1
    assert f"ends after {len(frames)} of" in caplog.text


@pytest.mark.parametrize("share", [0.12, 0.3, 0.6])
def test_truncated_tiff_yields_its_complete_pages(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_animation(tmp_path / "a.tif", [100] * 12)
    source, frames = read(truncate(path, share))
    assert frame_numbers(frames) == list(range(int(12 * share)))
    assert source.problems >= 1
    assert "page" in caplog.text


def test_truncated_webp_is_rejected(tmp_path: Path) -> None:
    path = truncate(write_animation(tmp_path / "a.webp", DURATIONS), 0.6)  # libwebp reads no frame of it
    with pytest.raises(VideoError, match=r"a\.webp' has no frames that can be read: .* is truncated or damaged"):
        open_source(path)


def test_animation_is_decoded_one_frame_at_a_time(tmp_path: Path) -> None:
    path = write_animation(
        tmp_path / "a.webp", [100] * 200, [Image.new("RGB", (500, 400), (i, 0, 0)) for i in range(200)]
    )
    tracemalloc.start()
    try:
        with open_source(path) as source:
            assert sum(1 for _ in source) == 200
        assert tracemalloc.get_traced_memory()[1] < 20 * 500 * 400 * 3
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_every_frame_is_checked_against_the_size_limit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_animation(tmp_path / name, [100, 100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 64 // 3)  # Pillow raises above twice this limit
    with pytest.raises(VideoError, match="too large"):
        open_source(path)


def test_page_above_the_size_limit_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large = Image.new("1", (8, 8)), Image.new("1", (20_000, 10_000))
    small.save(tmp_path / "a.tif", save_all=True, append_images=[large, small], compression="group4")
    source, frames = read(tmp_path / "a.tif")
    assert (len(frames), source.problems) == (2, 1)
    assert "page 2 of" in caplog.text
    assert "too large" in caplog.text


def test_animation_in_a_folder_is_one_frame_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path, ["1.jpg", "2.jpg"])
    for name in ("3.webp", "4.png"):
        write_animation(tmp_path / name, DURATIONS, [to_pil(IMAGES[number]) for number in (2, 8, 9, 10)])
    _, frames = read(tmp_path)
    assert frame_numbers(frames) == [0, 1, 2, 2]
    (record,) = caplog.records
    assert "only the first of 4 frames of" in record.message
    assert "3.webp" in record.message


def test_video_with_gif_suffix_is_read_as_video(tmp_path: Path) -> None:
    _, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES[:5]).rename(tmp_path / "clip.gif"))
    assert frame_numbers(frames) == list(range(5))


def test_animations_are_recognized_by_content(tmp_path: Path) -> None:
    for number, kind in enumerate(["gif", "webp", "png"]):
        path = write_animation(tmp_path / f"{number}.{kind}", DURATIONS).rename(tmp_path / f"{number}.dat")
        assert frame_numbers(read(path)[1]) == [0, 1, 2, 3]
