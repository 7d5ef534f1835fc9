"""Files, folders, iterables and URLs of finite videos. Run with `pytest tests/video/test_sources.py`."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from PIL.TiffImagePlugin import AppendingTiffWriter

from moondream_cv.errors import VideoError
from moondream_cv.images import to_rgb
from moondream_cv.video.sources import container as container_module
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.sources.opening import Source, open_source, url_name
from tests.helpers.clips import (
    HTTPReply,
    corrupt_frame,
    encode_jpeg,
    frame_number,
    http_server,
    numbered_image,
    set_display_matrix,
    truncate,
    write_clip,
)

IMAGES = [numbered_image(number) for number in range(31)]


def read(source: Any, **settings: float | None) -> tuple[Source, list[Frame]]:
    with open_source(source, **settings) as opened:
        return opened, list(opened)


def numbers(frames: list[Frame]) -> list[int]:
    return [frame_number(frame.image) for frame in frames]


# Video files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mp4", "libx264", {}),  # threads and B-frames
        ("clip.mkv", "libx264", {}),
        ("clip.ts", "libx264", {}),
        ("clip.h264", "libx264", {}),  # no container
        ("clip.mp4", "mpeg4", {"bf": "2"}),
        ("clip.avi", "mpeg4", {"bf": "2"}),  # no presentation times
        ("12:30 clip %03d.mp4", "libx264", {}),  # neither a protocol nor a pattern
    ],
)
def test_every_frame_of_a_file_comes_once_and_in_order(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "clip", IMAGES, codec=codec, codec_options=options, container_format=_format(name)).rename(
        tmp_path / name
    )
    monkeypatch.chdir(tmp_path)
    source, frames = read(name)
    assert numbers(frames) == list(range(31))
    assert [frame.index for frame in frames] == list(range(31))
    assert [frame.time for frame in frames] == pytest.approx([number / 25 for number in range(31)], abs=2e-3)
    assert (source.live, source.fps, source.resolution_wh, source.problems) == (False, 25.0, (128, 64), 0)
    assert source.frame_count in (31, None)
    image = frames[0].image
    assert image.dtype == np.uint8
    assert image.shape == (64, 128, 3)
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert image[56, 8, 2] > 200 > 60 > image[56, 8, 0]  # red, in BGR


def _format(name: str) -> str:
    return {"mkv": "matroska", "ts": "mpegts"}.get(suffix := name.rpartition(".")[2], suffix)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_short_files(tmp_path: Path, count: int) -> None:
    source, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES[:count]))
    assert numbers(frames) == list(range(count))
    assert source.frame_count == count
    assert frames[0].time == 0


def test_variable_frame_rate(tmp_path: Path) -> None:
    ticks = [500, 600, 650, 1500, 1540]
    source, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES[:5], ticks=ticks))
    assert numbers(frames) == list(range(5))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.15, 1.0, 1.04], abs=2e-3)
    assert source.fps is not None


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a telephone held upright
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
    ],
)
def test_frames_are_turned_upright(tmp_path: Path, matrix: tuple[int, int, int, int], expected: Any) -> None:
    clip = write_clip(tmp_path / "clip.mp4", IMAGES[:3])
    _, lying = read(clip)
    source, frames = read(set_display_matrix(clip, matrix))
    for upright, before in zip(frames, lying, strict=True):
        np.testing.assert_array_equal(upright.image, expected(before.image))
        assert upright.image.flags.c_contiguous
    assert source.resolution_wh == frames[0].image.shape[1::-1]


def test_rotation_agrees_with_pyav(tmp_path: Path) -> None:
    import av

    clip = write_clip(tmp_path / "clip.mp4", IMAGES[:1])
    _, (lying,) = read(clip)
    with av.open(str(set_display_matrix(clip, (0, 1, -1, 0)))) as opened:
        rotation = next(opened.decode(video=0)).rotation
    assert rotation != 0
    _, (upright,) = read(clip)
    np.testing.assert_array_equal(upright.image, np.rot90(lying.image, rotation // 90))  # both counter-clockwise


def test_size_and_clock_may_change_in_mid_stream(tmp_path: Path) -> None:
    first = write_clip(tmp_path / "1.ts", IMAGES[:5])
    second = write_clip(tmp_path / "2.ts", [numbered_image(number, (64, 64)) for number in range(5, 9)])
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    source, frames = read(tmp_path / "both.ts")
    assert numbers(frames) == list(range(9))
    assert [frame.image.shape for frame in frames] == [(64, 128, 3)] * 5 + [(64, 64, 3)] * 4
    assert source.resolution_wh == (128, 64)
    assert [frame.time for frame in frames] == pytest.approx([number / 25 for number in range(9)], abs=1e-6)


# Damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 15, 30])
@pytest.mark.parametrize(("name", "codec"), [("clip.avi", "mjpeg"), ("clip.mp4", "mpeg4")])
def test_a_damaged_frame_is_skipped_and_the_rest_stays(
    tmp_path: Path, name: str, codec: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    source, frames = read(corrupt_frame(write_clip(tmp_path / name, IMAGES, codec=codec), number))
    assert numbers(frames) == [other for other in range(31) if other != number]
    assert source.problems == 1
    (warning,) = [record for record in caplog.records if "skipped" in record.message]
    assert name in warning.message


@pytest.mark.parametrize("number", [15, 28, 29, 30])
def test_threads_lose_no_frame_beside_a_damaged_one(tmp_path: Path, number: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", IMAGES, codec_options={"bf": "0", "g": "1"})
    source, frames = read(corrupt_frame(clip, number))
    assert numbers(frames) == [other for other in range(31) if other != number]
    assert source.problems == 1


def test_several_damaged_frames_warn_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = write_clip(tmp_path / "clip.avi", IMAGES, codec="mjpeg")
    for number in (3, 9, 20):
        corrupt_frame(clip, number)
    source, frames = read(clip)
    assert (len(frames), source.problems) == (28, 3)
    assert len([record for record in caplog.records if "skipped" in record.message]) == 1


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_file_that_is_cut_off_gives_what_is_there(
    tmp_path: Path, name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    clip = write_clip(tmp_path / name, IMAGES, faststart=True, codec_options={"bf": "0"})
    size = [packet.size for packet in _packets(clip)]
    start = next(packet.pos for packet in _packets(clip))
    whole = int(clip.stat().st_size * share) - start
    complete = int((np.cumsum(size) <= whole).sum())
    _, frames = read(truncate(clip, share))
    assert complete - 1 <= len(frames) <= complete + 1  # a part of a frame may do; Matroska has headers in between
    assert numbers(frames)[: complete - 1] == list(range(complete - 1))
    if share < 0.8:
        assert any("cut off" in record.message and name in record.message for record in caplog.records)


def _packets(clip: Path) -> list[Any]:
    import av

    with av.open(str(clip)) as opened:
        return [packet for packet in opened.demux(video=0) if packet.size]


def test_a_whole_file_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("clip.mp4", "clip.mkv", "clip.ts", "clip.avi"):
        read(write_clip(tmp_path / name, IMAGES))
    read(write_clip(tmp_path / "slow.mp4", IMAGES[:3], ticks=[0, 40, 5000]))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_file_without_its_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"clip\.mp4' cannot be opened as a video: .*its index is missing"):
        open_source(truncate(write_clip(tmp_path / "clip.mp4", IMAGES), 0.7))


def test_a_container_that_fails_again_and_again_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import av

    opened = container_module.open_container

    class Failing:
        def __init__(self, container: Any) -> None:
            self.container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def demux(self, stream: Any) -> Iterator[Any]:
            for packet in self.container.demux(stream):
                if packet.dts is None:
                    raise av.error.InvalidDataError(1, "torn")
                yield packet
                if packet.pts % 3 == 0:
                    raise av.error.InvalidDataError(1, "scratched")

    monkeypatch.setattr(container_module, "open_container", lambda *a, **k: Failing(opened(*a, **k)))
    _, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES, codec="mpeg4"))
    assert numbers(frames) == list(range(31))
    assert any("is damaged (torn)" in record.message for record in caplog.records)


# What is refused ---------------------------------------------------------------------------------------------------


def _no_frames(folder: Path) -> Path:
    return write_clip(folder / "none.mp4", [])


def _undecodable(folder: Path) -> Path:
    return corrupt_frame(write_clip(folder / "none.avi", IMAGES[:1], codec="mjpeg"), 0)


def _text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("hello\n" * 100)
    return folder / "notes.txt"


def _disguised_text(folder: Path) -> Path:
    return _text(folder).rename(folder / "notes.mp4")


def _empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def _sound(folder: Path) -> Path:
    import av

    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return folder / "sound.wav"


def _music_with_cover(folder: Path) -> Path:
    import av

    with av.open(str(folder / "bare.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        for start in range(0, 44100, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    body = b"\0image/jpeg\0\3\0" + encode_jpeg(IMAGES[0])
    picture = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    (folder / "song.mp3").write_bytes(b"ID3\3\0\0" + size + picture + (folder / "bare.mp3").read_bytes())
    return folder / "song.mp3"


def _bad_image(folder: Path) -> Path:
    (folder / "bad.png").write_bytes(b"nothing of the kind")
    return folder / "bad.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.mp4", r"missing\.mp4': no such file or folder"),
        (lambda folder: str(folder / "missing.mp4"), r"missing\.mp4': no such file or folder"),
        (lambda folder: folder, r"holds no images; a folder needs files that end in \.avif, .* or \.webp"),
        (lambda folder: folder / "*.jpg", r"\*\.jpg' matches no file"),
        (lambda folder: _text(folder).parent / "*", r"\*' matches 1 files, none of which ends in"),
        (lambda folder: folder / "%04d.png", r"%04d\.png' matches no file; the folder has no images"),
        (
            lambda folder: _bad_image(folder).parent / "%d.png",
            r"matches no file; the folder has 1 images, such as 'bad",
        ),
        (lambda folder: folder / "none" / "%04d.png", r"matches no file; there is no folder '.*none'"),
        (lambda folder: folder / "cam%d" / "%04d.png", r"has several numbers; use one %d, or a glob"),
        (lambda folder: folder / "100%done.mp4", r"100%done\.mp4': no such file or folder"),
        (lambda folder: folder / "%f.png", r"%f\.png': no such file or folder"),
        (_text, r"notes\.txt' is text, not a video"),
        (_disguised_text, r"notes\.mp4' cannot be opened as a video: .*is it a video\?"),
        (_empty, r"empty\.mp4' cannot be opened as a video: .*the file is empty"),
        (_no_frames, r"none\.mp4' has no frames"),
        (_undecodable, r"none\.avi' has no frames; 1 could not be decoded"),
        (_sound, r"sound\.wav' holds no video, only audio"),
        (_music_with_cover, r"song\.mp3' holds no video, only audio"),
        (_bad_image, r"bad\.png' has no frames that can be read: .*not an image"),
        (lambda folder: "", "the path of the video is empty"),
        (lambda folder: "a\0b.mp4", "is not a path|no such file"),
        (lambda folder: "/dev/null", "is not a regular file"),
        (lambda folder: "file:///a.mp4", r"file:///a\.mp4 cannot be read; of URLs, http, .* can\. Pass files as paths"),
        (lambda folder: "s3://me:word@bucket/a.mp4", r"^s3://bucket/a\.mp4 cannot be read"),
        (lambda folder: [], "the list of frames has no frames"),
        (lambda folder: ["a.png", None], r"no frames that can be read: 'a\.png'"),
    ],
)
def test_what_has_no_frames_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        open_source(make(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (-1, "a webcam's index is 0 or more, not -1"),
        (True, "not bool"),
        (None, "not NoneType"),
        (b"clip.mp4", "not bytes"),
        ({"a": 1}, "not dict"),
        (IMAGES[0], r"array of shape \(64, 128, 3\) is not a sequence of frames"),
    ],
)
def test_what_is_no_source_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


@pytest.mark.parametrize(
    "settings", [{"open_timeout": 0}, {"read_timeout": -1.0}, {"reconnect_for": -1}, {"read_timeout": float("nan")}]
)
def test_times_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        open_source(IMAGES, **settings)


# Images and iterables ----------------------------------------------------------------------------------------------


def _folder(path: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (path / name).write_bytes(encode_jpeg(IMAGES[number]))
    return path


NATURAL = ["img1.jpg", "img2.jpg", "Img3.JPG", "img10.jpeg", "img010b.jpg", "other.jpg"]


def test_a_folder_of_images_in_natural_order(tmp_path: Path) -> None:
    _folder(tmp_path, NATURAL)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.jpg").mkdir()
    source, frames = read(tmp_path)
    assert numbers(frames) == list(range(6))
    assert (source.live, source.fps, source.frame_count, source.resolution_wh) == (False, None, 6, (128, 64))
    assert [frame.time for frame in frames] == pytest.approx([number / 30 for number in range(6)])


def test_a_glob(tmp_path: Path) -> None:
    _folder(tmp_path, NATURAL)
    assert numbers(read(str(tmp_path / "img*.jp*g"))[1]) == [0, 1, 3, 4]
    assert numbers(read(tmp_path / "img?.jpg")[1]) == [0, 1]
    assert numbers(read(tmp_path.parent / "**" / tmp_path.name / "img10.*")[1]) == [3]
    (tmp_path / "take[1].jpg").write_bytes(encode_jpeg(IMAGES[9]))
    assert numbers(read(tmp_path / "take[1].jpg")[1]) == [9]  # a name, not a pattern


def test_a_damaged_image_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _folder(tmp_path, NATURAL)
    (tmp_path / "img2.jpg").write_bytes(b"no image")
    source, frames = read(tmp_path)
    assert numbers(frames) == [0, 2, 3, 4, 5]
    assert source.problems == 1
    assert "img2.jpg" in caplog.text


def test_a_single_image(tmp_path: Path) -> None:
    source, frames = read(_folder(tmp_path, ["a.png"]) / "a.png")
    assert (numbers(frames), source.frame_count) == ([0], 1)


# Patterns and frame rates


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
        ("[a]%d*.jpg", [1, 2], [1, 2]),  # characters of a glob, literally
    ],
)
def test_a_pattern_with_a_number_gives_the_files_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, there: list[int], expected: list[int]
) -> None:
    pattern = _numbered_files(tmp_path, template, there)
    _numbered_files(tmp_path, "other%d.jpg", [5])
    (tmp_path / "5.jpg").write_bytes(encode_jpeg(IMAGES[30]))
    source, frames = read(pattern)
    assert numbers(frames) == expected
    assert (source.frame_count, source.problems) == (len(there), 0)
    assert caplog.records == []
    assert numbers(read(str(pattern))[1]) == expected


def test_the_width_of_a_pattern_decides_about_leading_zeros(tmp_path: Path) -> None:
    for number, name in enumerate(["1.jpg", "02.jpg", "003.jpg", "0004.jpg", "12.jpg", "123.jpg"]):
        (tmp_path / name).write_bytes(encode_jpeg(IMAGES[number]))
    assert numbers(read(tmp_path / "%d.jpg")[1]) == [0, 4, 5]
    assert numbers(read(tmp_path / "%02d.jpg")[1]) == [1, 4, 5]
    assert numbers(read(tmp_path / "%03d.jpg")[1]) == [2, 5]


def test_gaps_in_the_numbers_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, frames = read(_numbered_files(tmp_path, "%04d.jpg", [3, 4, 7, 8, 12]), fps=10)
    assert numbers(frames) == [3, 4, 7, 8, 12]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    (record,) = caplog.records
    assert "gaps in the numbers from 3 to 12, 5 missing, the first is 5;" in record.message


def test_every_tenth_number_is_no_gap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert numbers(read(_numbered_files(tmp_path, "%03d.jpg", [0, 10, 20, 30]))[1]) == [0, 10, 20, 30]
    assert caplog.records == []


def test_a_file_that_is_named_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "%04d.jpg").write_bytes(encode_jpeg(IMAGES[9]))
    _numbered_files(tmp_path, "%04d.jpg", [1])
    assert numbers(read(tmp_path / "%04d.jpg")[1]) == [9]


@pytest.mark.parametrize("fps", [5, 12.5, 29.97])
def test_fps_is_the_clock_of_images_and_iterables(tmp_path: Path, fps: float) -> None:
    _folder(tmp_path, NATURAL)
    single = tmp_path / NATURAL[0]
    for given in (tmp_path, tmp_path / "*.jpg", IMAGES[:4], (image for image in IMAGES[:4])):
        source, frames = read(given, fps=fps)
        assert len(frames) >= 4
        assert source.fps == fps
        assert [frame.time for frame in frames] == pytest.approx([frame.index / fps for frame in frames])
    assert read(single, fps=fps)[0].fps == fps


def test_frames_with_times_keep_them_despite_fps(tmp_path: Path) -> None:
    clip = open_source(write_clip(tmp_path / "clip.mp4", IMAGES[:4]))
    _, frames = read(clip_frames := list(clip), fps=7)
    assert [frame.time for frame in frames] == [frame.time for frame in clip_frames]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9, True, "30"])
def test_a_frame_rate_out_of_range_is_an_error(fps: Any) -> None:
    with pytest.raises(ValueError, match=r"fps must be between 0\.001 and 1000, got "):
        open_source(IMAGES, fps=fps)


def _animated(folder: Path) -> Path:
    return animation(folder / "a.gif", [100, 100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: write_clip(folder / "clip.mp4", IMAGES[:2]), r"clip\.mp4' has frame times, so leave fps out"),
        (_animated, r"a\.gif' has frame times"),
        (lambda folder: 0, "webcam 0 is live"),
        (lambda folder: "1", "webcam 1 is live"),
        (lambda folder: "rtsp://me:secret@cam/live", "rtsp://cam/live has frame times"),
        (lambda folder: open_source(IMAGES), "list of frames is open already"),
    ],
)
def test_fps_for_a_source_with_a_clock_is_an_error(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^fps=10 is for images and iterables, which have no clock; .*{message}"):
        open_source(make(tmp_path), fps=10)


# Animations --------------------------------------------------------------------------------------------------------

DURATIONS = [100, 250, 40, 1000]
ANIMATED = ["a.gif", "a.webp", "a.png", "a.apng"] + (["a.avif"] if features.check("avif") else [])


def pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., ::-1].copy())


def animation(path: Path, durations: list[int], images: list[Image.Image] | None = None, **options: Any) -> Path:
    images = images or [pil(IMAGES[number]) for number in range(len(durations))]
    kind = {".apng": "PNG"}.get(path.suffix)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=durations, **{**lossless, **options})
    return path


@pytest.mark.parametrize("name", ANIMATED)
def test_an_animation_gives_all_its_frames_with_their_times(tmp_path: Path, name: str) -> None:
    source, frames = read(animation(tmp_path / name, DURATIONS, loop=3))
    assert numbers(frames) == [0, 1, 2, 3]  # once, whatever the loop count
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.35, 0.39])
    assert [frame.duration for frame in frames] == pytest.approx([0.1, 0.25, 0.04, 1.0])
    assert (source.live, source.frame_count, source.resolution_wh, source.problems) == (False, 4, (128, 64), 0)
    if not name.endswith("avif"):
        assert source.fps == pytest.approx(4 / 1.39)
        for frame, image in zip(frames, IMAGES, strict=False):
            assert np.abs(frame.image.astype(int) - image).max() <= (0 if name != "a.gif" else 24)  # 256 colors


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
@pytest.mark.parametrize("duration", [0, 10])
def test_durations_that_browsers_replace_are_replaced(tmp_path: Path, name: str, duration: int) -> None:
    source, frames = read(animation(tmp_path / name, [duration, 500, duration]))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.6])
    assert frames[2].duration == pytest.approx(0.1)
    assert source.fps == pytest.approx(3 / 0.7)


def test_an_animated_webp_gives_the_frames_that_pillow_composes(tmp_path: Path) -> None:
    images = [pil(numbered_image(number, (320, 192))).convert("RGBA") for number in range(20)]
    path = animation(tmp_path / "a.webp", [100] * 20, images, lossless=False, quality=60)
    source, frames = read(path)
    with Image.open(path) as picture:
        assert len(frames) == picture.n_frames == 20
        for number, frame in enumerate(frames):
            picture.seek(number)
            np.testing.assert_array_equal(frame.image, np.asarray(picture.convert("RGB"))[..., ::-1])
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(20)])
    assert source.fps == pytest.approx(10)


def _sprite(number: int) -> Image.Image:
    """A red square on a transparent ground, whose color is hidden."""
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
def test_transparent_animations_are_shown_on_white(tmp_path: Path, name: str, options: dict[str, int]) -> None:
    _, frames = read(animation(tmp_path / name, [100] * 4, [_sprite(number) for number in range(4)], **options))
    for number, frame in enumerate(frames):
        expected = np.full((32, 64, 3), 255)
        expected[8:18, 4 + 12 * number : 14 + 12 * number] = (30, 30, 200)  # BGR; the square before is gone
        assert np.abs(frame.image - expected).max() <= 8


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    images = [Image.new("RGBA", (8, 8), (0, number, 0, 128)) for number in (0, 100)]
    for name in ("a.png", "a.webp"):
        _, frames = read(animation(tmp_path / name, [100, 100], images, **({"blend": 0} if name == "a.png" else {})))
        assert [frame.image[4, 4].tolist() for frame in frames] == [[127, 127, 127], [127, 177, 127]]


def test_the_default_image_of_an_animated_png_is_not_a_frame(tmp_path: Path) -> None:
    images = [pil(IMAGES[number]) for number in (30, 0, 1, 2)]
    source, frames = read(animation(tmp_path / "a.png", [100] * 3, images, default_image=True))
    assert numbers(frames) == [0, 1, 2]
    assert source.frame_count == 3
    assert frame_number(to_rgb(tmp_path / "a.png")[..., ::-1]) == 30  # but it is the still image


@pytest.mark.parametrize("name", [*ANIMATED, "a.tif"])
def test_still_images_are_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    path = animation(tmp_path / name, DURATIONS)
    assert frame_number(to_rgb(path)[..., ::-1]) == 0


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_an_image_with_one_frame_is_one_frame_at_any_rate(tmp_path: Path, name: str) -> None:
    pil(IMAGES[7]).save(tmp_path / name)
    source, frames = read(tmp_path / name, fps=4)
    assert (numbers(frames), source.fps, frames[0].duration) == ([7], 4, None)


def test_the_pages_of_a_tiff_are_separate_images(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.tif", [100] * 4)
    source, frames = read(path)
    assert numbers(frames) == [0, 1, 2, 3]
    assert (source.fps, source.frame_count) == (None, 4)
    assert [frame.time for frame in frames] == pytest.approx([0, 1 / 30, 2 / 30, 0.1])
    assert [frame.time for frame in read(path, fps=2)[1]] == pytest.approx([0, 0.5, 1, 1.5])


def _tiff_with_thumbnail(path: Path, numbers: list[int]) -> Path:
    """A TIFF in which each page is followed by a thumbnail of it."""
    with AppendingTiffWriter(str(path), new=True) as writer:
        for number in numbers:
            for image, kind in ((pil(IMAGES[number]), 0), (pil(IMAGES[number]).resize((16, 8)), 1)):
                image.save(writer, "TIFF", tiffinfo={254: kind})
                writer.newFrame()
    return path


def test_thumbnails_in_a_tiff_are_not_pages(tmp_path: Path) -> None:
    assert numbers(read(_tiff_with_thumbnail(tmp_path / "a.tif", [3, 4]))[1]) == [3, 4]
    source, frames = read(_tiff_with_thumbnail(tmp_path / "b.tif", [5]), fps=3)
    assert (numbers(frames), source.fps) == ([5], 3)


def test_a_damaged_page_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = animation(tmp_path / "a.tif", [100] * 3, compression="tiff_deflate")
    with Image.open(path) as picture:
        picture.seek(1)
        (offset,) = picture.tag_v2[273]  # StripOffsets
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = bytes(20)
    path.write_bytes(content)
    source, frames = read(path)
    assert (numbers(frames), source.problems) == ([0, 2], 1)
    assert "page 2 of" in caplog.text


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
@pytest.mark.parametrize("share", np.linspace(0.1, 0.99, 20).tolist())
def test_a_truncated_animation_ends_with_a_warning(
    tmp_path: Path, name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    path = animation(tmp_path / name, [100] * 12, [Image.fromarray(image) for image in noise])
    source, frames = read(truncate(path, share))
    assert int(12 * share) - 1 <= len(frames) <= int(12 * share) + 1
    assert source.problems == 1
    assert f"ends after {len(frames)} of" in caplog.text


@pytest.mark.parametrize("share", [0.12, 0.3, 0.6])
def test_a_truncated_tiff_gives_its_whole_pages_and_a_warning(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = animation(tmp_path / "a.tif", [100] * 12)
    source, frames = read(truncate(path, share))
    assert numbers(frames) == list(range(int(12 * share)))
    assert source.problems >= 1
    assert "page" in caplog.text


def test_a_truncated_webp_is_an_error(tmp_path: Path) -> None:
    path = truncate(animation(tmp_path / "a.webp", DURATIONS), 0.6)  # libwebp reads nothing of it
    with pytest.raises(VideoError, match=r"a\.webp' has no frames that can be read: .* is truncated or damaged"):
        open_source(path)


def test_an_animation_is_decoded_one_frame_at_a_time(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp", [100] * 200, [Image.new("RGB", (500, 400), (i, 0, 0)) for i in range(200)])
    tracemalloc.start()
    try:
        with open_source(path) as source:
            assert sum(1 for _ in source) == 200
        assert tracemalloc.get_traced_memory()[1] < 20 * 500 * 400 * 3
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_every_frame_is_checked_against_the_largest_size(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = animation(tmp_path / name, [100, 100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 64 // 3)  # an error from twice that on
    with pytest.raises(VideoError, match="too large"):
        open_source(path)


def test_a_large_page_after_a_small_one_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large = Image.new("1", (8, 8)), Image.new("1", (20_000, 10_000))
    small.save(tmp_path / "a.tif", save_all=True, append_images=[large, small], compression="group4")
    source, frames = read(tmp_path / "a.tif")
    assert (len(frames), source.problems) == (2, 1)
    assert "page 2 of" in caplog.text
    assert "too large" in caplog.text


def test_in_a_folder_an_animation_is_one_frame_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _folder(tmp_path, ["1.jpg", "2.jpg"])
    for name in ("3.webp", "4.png"):
        animation(tmp_path / name, DURATIONS, [pil(IMAGES[number]) for number in (2, 8, 9, 10)])
    _, frames = read(tmp_path)
    assert numbers(frames) == [0, 1, 2, 2]
    (record,) = caplog.records
    assert "only the first of 4 frames of" in record.message
    assert "3.webp" in record.message


def test_a_video_that_is_called_gif_is_a_video(tmp_path: Path) -> None:
    _, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES[:5]).rename(tmp_path / "clip.gif"))
    assert numbers(frames) == list(range(5))


def test_an_animation_keeps_its_name_from_deciding(tmp_path: Path) -> None:
    for number, kind in enumerate(["gif", "webp", "png"]):
        path = animation(tmp_path / f"{number}.{kind}", DURATIONS).rename(tmp_path / f"{number}.dat")
        assert numbers(read(path)[1]) == [0, 1, 2, 3]


def test_a_generator_is_read_only_as_far_as_needed() -> None:
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


def test_an_iterable_of_any_images(tmp_path: Path) -> None:
    file = _folder(tmp_path, ["a.jpg"]) / "a.jpg"
    pil = Image.fromarray(IMAGES[1][..., ::-1].copy())
    grey = np.full((4, 6), 7, np.uint8)
    source, frames = read([IMAGES[0], pil, grey, file, file.read_bytes()])
    np.testing.assert_array_equal(frames[0].image, IMAGES[0])
    np.testing.assert_array_equal(frames[1].image, IMAGES[1])
    assert frames[2].image.shape == (4, 6, 3)
    assert numbers(frames[3:]) == [0, 0]
    assert source.frame_count == 5
    assert numbers(read(np.stack(IMAGES[:3]))[1]) == [0, 1, 2]


def test_frames_are_not_views_of_a_buffer_that_is_used_again() -> None:
    buffer = np.empty_like(IMAGES[0])

    def images() -> Iterator[np.ndarray]:
        for image in IMAGES:
            buffer[:] = image
            yield buffer

    assert numbers(read(images())[1]) == list(range(31))


def test_frames_of_another_source_keep_their_times(tmp_path: Path) -> None:
    clip = open_source(write_clip(tmp_path / "clip.mp4", IMAGES))
    source, frames = read(frame for frame in clip if frame.index % 10 == 5)
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.4, 0.8])
    assert open_source(source) is source


def test_what_is_no_image_is_skipped_and_errors_are_passed_on() -> None:
    source, frames = read([IMAGES[0], None, IMAGES[1]])
    assert (numbers(frames), source.problems) == ([0, 1], 1)

    def failing() -> Iterator[np.ndarray]:
        yield IMAGES[0]
        raise KeyError("of the caller's own")

    source = open_source(failing())
    next(source)
    with pytest.raises(KeyError, match="own"):
        next(source)
    assert list(source) == []


# Closing -----------------------------------------------------------------------------------------------------------


def test_closing_ends_the_iteration(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", IMAGES)
    for source in (open_source(clip), open_source(IMAGES)):
        with source:
            assert next(iter(source)).index == 0
            assert next(iter(source)).index == 1
        assert list(source) == []
        source.close()
    with open_source(clip):  # before the first frame was fetched
        pass


def test_closing_from_another_thread(tmp_path: Path) -> None:
    go_on, taken = threading.Event(), threading.Event()

    def images() -> Iterator[np.ndarray]:
        yield IMAGES[0]
        taken.set()
        go_on.wait(240)
        yield IMAGES[1]

    source = open_source(images())
    next(source)
    closer = threading.Thread(target=lambda: (taken.wait(240), threading.Timer(0.1, go_on.set).start(), source.close()))
    closer.start()
    assert list(source) == []
    closer.join(240)
    assert not closer.is_alive()

    video = open_source(write_clip(tmp_path / "clip.mp4", IMAGES * 20))
    threading.Timer(0.02, video.close).start()
    assert len(list(video)) <= 620


# URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faststart", [True, False])
def test_a_finite_video_over_http_loses_no_frame(tmp_path: Path, faststart: bool) -> None:
    content = write_clip(tmp_path / "clip.mp4", IMAGES, faststart=faststart).read_bytes()
    with http_server(lambda reply: reply.send_file(content, "video/mp4")) as address:
        source, frames = read(f"{address}/clip.mp4", open_timeout=120, read_timeout=120)
    assert numbers(frames) == list(range(31))
    assert (source.live, source.fps, source.frame_count) == (False, 25.0, 31)
    assert source.name == f"{address}/clip.mp4"


def test_a_finite_video_whose_server_stalls_is_an_error(tmp_path: Path) -> None:
    content = write_clip(tmp_path / "clip.mp4", IMAGES * 8, faststart=True).read_bytes()
    assert len(content) > 80_000

    def answer(reply: HTTPReply) -> None:
        reply.start("video/mp4", Content_Length=str(len(content)))
        reply.handler.wfile.write(content[:70_000])
        reply.handler.wfile.flush()
        reply.stopping.wait(240)

    with http_server(answer) as address, open_source(address, open_timeout=120, read_timeout=1.0) as source:
        found: list[int] = []
        with pytest.raises(VideoError, match=rf"{address} broke off: no answer in time"):
            found.extend(frame_number(frame.image) for frame in source)
        assert found == [number % 31 for number in range(len(found))]
        assert len(found) > 20
    assert source.live is False


def test_http_errors_are_named() -> None:
    with (
        http_server(lambda reply: reply.start("text/plain", 404)) as address,
        pytest.raises(VideoError, match=r"^http://127\.0\.0\.1:\d+/gone cannot be opened as a video: .*404") as raised,
    ):
        open_source(address.replace("://", "://me:secret@") + "/gone")
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__  # the cause names the password


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://cam.local:554/live", "rtsp://cam.local:554/live"),
        ("rtsp://admin:pass@cam.local:554/live", "rtsp://cam.local:554/live"),
        ("rtsp://admin:p@ss@cam.local/live", "rtsp://cam.local/live"),
        ("rtsp://admin:pa/ss@cam.local/live", "rtsp://..."),
        ("rtsp://admin:pa?ss@cam.local/live", "rtsp://..."),
        ("http://host:8080/@me/a.mp4", "http://host:8080/@me/a.mp4"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("udp://@:1234", "udp://:1234"),
        ("rtsp://h/c?channel=1&subtype=0", "rtsp://h/c?channel=1&subtype=0"),
        ("http://h/c?user=me&channel=1&pwd=x&access_token=y", "http://h/c?user=...&channel=1&pwd=...&access_token=..."),
    ],
)
def test_names_of_urls_hold_no_secrets(url: str, name: str) -> None:
    assert url_name(url) == name


def test_importing_loads_neither_opencv_nor_pyav() -> None:
    code = "import sys, moondream_cv.video.sources.opening; print(sorted({'av', 'cv2', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
