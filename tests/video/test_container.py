"""Video files and finite videos behind URLs. Run with `pytest tests/video/test_container.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv.errors import VideoError
from moondream_cv.video.sources import container as container_module
from moondream_cv.video.sources.opening import open_source
from tests.helpers.clips import (
    HTTPReply,
    corrupt_frame,
    frame_number,
    http_server,
    numbered_image,
    set_display_matrix,
    truncate,
    write_clip,
)
from tests.helpers.sources import IMAGES, frame_numbers, read


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mp4", "libx264", {}),  # threads and B-frames
        ("clip.mkv", "libx264", {}),
        ("clip.ts", "libx264", {}),
        ("clip.h264", "libx264", {}),  # no container
        ("clip.mp4", "mpeg4", {"bf": "2"}),
        ("clip.avi", "mpeg4", {"bf": "2"}),  # no presentation times
        ("12:30 clip %03d.mp4", "libx264", {}),  # neither a URL nor a pattern
    ],
)
def test_every_frame_of_a_file_is_read_once_in_order(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "clip", IMAGES, codec=codec, codec_options=options, container_format=_format(name)).rename(
        tmp_path / name
    )
    monkeypatch.chdir(tmp_path)
    source, frames = read(name)
    assert frame_numbers(frames) == list(range(31))
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
def test_short_files_are_read_completely(tmp_path: Path, count: int) -> None:
    source, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES[:count]))
    assert frame_numbers(frames) == list(range(count))
    assert source.frame_count == count
    assert frames[0].time == 0


def test_variable_frame_times_are_kept(tmp_path: Path) -> None:
    ticks = [500, 600, 650, 1500, 1540]
    source, frames = read(write_clip(tmp_path / "clip.mp4", IMAGES[:5], ticks=ticks))
    assert frame_numbers(frames) == list(range(5))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.15, 1.0, 1.04], abs=2e-3)
    assert source.fps is not None


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a phone in portrait orientation
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
    ],
)
def test_frames_are_rotated_upright(tmp_path: Path, matrix: tuple[int, int, int, int], expected: Any) -> None:
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


def test_size_and_clock_may_change_within_a_file(tmp_path: Path) -> None:
    first = write_clip(tmp_path / "1.ts", IMAGES[:5])
    second = write_clip(tmp_path / "2.ts", [numbered_image(number, (64, 64)) for number in range(5, 9)])
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    source, frames = read(tmp_path / "both.ts")
    assert frame_numbers(frames) == list(range(9))
    assert [frame.image.shape for frame in frames] == [(64, 128, 3)] * 5 + [(64, 64, 3)] * 4
    assert source.resolution_wh == (128, 64)
    assert [frame.time for frame in frames] == pytest.approx([number / 25 for number in range(9)], abs=1e-6)


@pytest.mark.parametrize("number", [1, 15, 30])
@pytest.mark.parametrize(("name", "codec"), [("clip.avi", "mjpeg"), ("clip.mp4", "mpeg4")])
def test_damaged_frame_is_skipped_and_counted(
    tmp_path: Path, name: str, codec: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    source, frames = read(corrupt_frame(write_clip(tmp_path / name, IMAGES, codec=codec), number))
    assert frame_numbers(frames) == [other for other in range(31) if other != number]
    assert source.problems == 1
    (warning,) = [record for record in caplog.records if "skipped" in record.message]
    assert name in warning.message


@pytest.mark.parametrize("number", [15, 28, 29, 30])
def test_threaded_decoding_loses_only_the_damaged_frame(tmp_path: Path, number: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", IMAGES, codec_options={"bf": "0", "g": "1"})
    source, frames = read(corrupt_frame(clip, number))
    assert frame_numbers(frames) == [other for other in range(31) if other != number]
    assert source.problems == 1


def test_several_damaged_frames_log_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = write_clip(tmp_path / "clip.avi", IMAGES, codec="mjpeg")
    for number in (3, 9, 20):
        corrupt_frame(clip, number)
    source, frames = read(clip)
    assert (len(frames), source.problems) == (28, 3)
    assert len([record for record in caplog.records if "skipped" in record.message]) == 1


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_truncated_file_yields_its_complete_frames(
    tmp_path: Path, name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    clip = write_clip(tmp_path / name, IMAGES, faststart=True, codec_options={"bf": "0"})
    size = [packet.size for packet in _packets(clip)]
    start = next(packet.pos for packet in _packets(clip))
    whole = int(clip.stat().st_size * share) - start
    complete = int((np.cumsum(size) <= whole).sum())
    _, frames = read(truncate(clip, share))
    assert complete - 1 <= len(frames) <= complete + 1  # partial frames may decode; Matroska has headers in between
    assert frame_numbers(frames)[: complete - 1] == list(range(complete - 1))
    if share < 0.8:
        assert any("truncated" in record.message and name in record.message for record in caplog.records)


def _packets(clip: Path) -> list[Any]:
    import av

    with av.open(str(clip)) as opened:
        return [packet for packet in opened.demux(video=0) if packet.size]


def test_complete_file_logs_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("clip.mp4", "clip.mkv", "clip.ts", "clip.avi"):
        read(write_clip(tmp_path / name, IMAGES))
    read(write_clip(tmp_path / "slow.mp4", IMAGES[:3], ticks=[0, 40, 5000]))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_file_without_index_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"clip\.mp4' cannot be opened as a video: .*its index is missing"):
        open_source(truncate(write_clip(tmp_path / "clip.mp4", IMAGES), 0.7))


def test_repeated_container_errors_end_the_file(
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
    assert frame_numbers(frames) == list(range(31))
    assert any("is damaged (torn)" in record.message for record in caplog.records)


@pytest.mark.parametrize("faststart", [True, False])
def test_http_video_loses_no_frames(tmp_path: Path, faststart: bool) -> None:
    content = write_clip(tmp_path / "clip.mp4", IMAGES, faststart=faststart).read_bytes()
    with http_server(lambda reply: reply.send_file(content, "video/mp4")) as address:
        source, frames = read(f"{address}/clip.mp4", open_timeout=120, read_timeout=120)
    assert frame_numbers(frames) == list(range(31))
    assert (source.live, source.fps, source.frame_count) == (False, 25.0, 31)
    assert source.name == f"{address}/clip.mp4"


def test_stalled_http_video_raises_after_read_timeout(tmp_path: Path) -> None:
    content = write_clip(tmp_path / "clip.mp4", IMAGES * 8, faststart=True).read_bytes()
    assert len(content) > 80_000

    def answer(reply: HTTPReply) -> None:
        reply.start("video/mp4", Content_Length=str(len(content)))
        reply.handler.wfile.write(content[:70_000])
        reply.handler.wfile.flush()
        reply.stopping.wait(240)

    with http_server(answer) as address, open_source(address, open_timeout=120, read_timeout=1.0) as source:
        found: list[int] = []
        with pytest.raises(VideoError, match=rf"{address} failed: no answer in time"):
            found.extend(frame_number(frame.image) for frame in source)
        assert found == [number % 31 for number in range(len(found))]
        assert len(found) > 20
    assert source.live is False


def test_http_error_names_status_without_password() -> None:
    with (
        http_server(lambda reply: reply.start("text/plain", 404)) as address,
        pytest.raises(VideoError, match=r"^http://127\.0\.0\.1:\d+/gone cannot be opened as a video: .*404") as raised,
    ):
        open_source(address.replace("://", "://me:secret@") + "/gone")
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__  # the cause contains the password
