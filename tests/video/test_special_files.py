"""Files with unusual features or faults. Run with `pytest tests/video/test_special_files.py`.

`tests/data/video/h264_b.avi` has B-frames in a container without presentation times. `sync_cut.ts` begins inside a
group of pictures, 233 ms before the first image that can be decoded.
"""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from moondream_cv.errors import VideoError
from moondream_cv.video import annotate_video, open_source
from moondream_cv.video.writers.video_file import VideoWriter
from tests.helpers.clips import numbered_image, write_clip
from tests.video.test_formats import (
    FLASHES,
    FORMATS,
    SECONDS,
    annotated,
    beeps,
    make,
    no_objects,
    opencv_frames,
    probed,
    video_frames,
)

DATA = Path(__file__).parents[1] / "data" / "video"
HAS_TONE_MAPPING = int(av.__version__.partition(".")[0]) >= 16  # with FFmpeg 8

needs_ffmpeg = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")),
    reason="ffmpeg and ffprobe, which make and read the files, are not installed (apt-get install ffmpeg)",
)


def ffmpeg(*arguments: object, data: bytes | None = None) -> None:
    command = ["ffmpeg", "-v", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()


# Times --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_b_frames_in_avi_keep_count_and_times(tmp_path: Path, suffix: str) -> None:
    source = Path(shutil.copy(DATA / "h264_b.avi", tmp_path))
    target, summary = annotated(source, suffix)
    times, _ = video_frames(target)
    assert (summary.frames, summary.problems) == (180, 0)
    assert times == pytest.approx([index / 30 for index in range(180)], abs=2e-3)
    with av.open(str(target)) as opened:
        assert opened.duration / 1e6 == pytest.approx(6.0, abs=1 / 30)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_audio_stays_in_sync_if_a_recording_starts_within_a_gop(tmp_path: Path, suffix: str) -> None:
    target, _ = annotated(Path(shutil.copy(DATA / "sync_cut.ts", tmp_path)), suffix)
    times, flashes = video_frames(target)
    heard = beeps(target)
    assert len(flashes) == 8
    assert np.subtract(heard[-8:], [times[number] for number in flashes]) == pytest.approx([0] * 8, abs=0.04)


@pytest.mark.slow
def test_writer_finds_the_first_image_of_its_audio_source(tmp_path: Path) -> None:
    with (
        open_source(DATA / "sync_cut.ts") as source,
        VideoWriter(tmp_path / "a.mp4", fps=30, audio_from=DATA / "sync_cut.ts") as writer,
    ):
        for frame in source:
            writer.write(frame, no_objects(frame.image, []))
    times, flashes = video_frames(tmp_path / "a.mp4")
    offsets = np.subtract(beeps(tmp_path / "a.mp4")[-8:], [times[number] for number in flashes])
    assert offsets == pytest.approx([0] * 8, abs=0.04)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_long_frame_durations_are_kept(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"slides{suffix}"
    every_fifth_second = "select='eq(mod(n,125),0)'"
    clip = "testsrc=s=128x96:r=25:d=21"
    ffmpeg("-f", "lavfi", "-i", clip, "-vf", every_fifth_second, "-fps_mode", "vfr", "-c:v", "libx264", source)
    assert probed(source)["format_duration"] == pytest.approx(20.04)
    for output in (".mp4", ".mov", ".mkv"):
        target, _ = annotated(source, output)
        assert video_frames(target)[0] == pytest.approx([0, 5, 10, 15, 20], abs=2e-3)
        assert probed(target)["format_duration"] == pytest.approx(20.04, abs=0.04)


@needs_ffmpeg
def test_more_than_1000_fps(tmp_path: Path) -> None:
    source = tmp_path / "fast.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=128x96:r=1200:d=0.2", "-c:v", "libx264", source)
    target, summary = annotated(source, ".mp4")
    times, _ = video_frames(target)
    assert summary.frames == len(times) == 240
    assert times == pytest.approx([index / 1200 for index in range(240)], abs=1e-4)
    assert cv2.VideoCapture(str(target)).get(cv2.CAP_PROP_FPS) == pytest.approx(1200)


def test_mkv_output_has_the_frame_rate_and_is_readable(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "a.mp4", [numbered_image(number) for number in range(50)], fps=25)
    once, _ = annotated(source, ".mkv")
    assert opencv_frames(once)[0] == pytest.approx(25)
    with open_source(once) as opened:
        assert opened.fps == pytest.approx(25)
    again, summary = annotated(Path(shutil.move(once, tmp_path / "b.mkv")), ".mkv")
    assert (summary.frames, len(opencv_frames(again)[1])) == (50, 50)


def test_implausible_frame_rate_of_a_container_is_ignored(tmp_path: Path) -> None:
    """Write an .mkv file like earlier versions of this package."""
    path = tmp_path / "clock.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=Fraction(30_000))
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30_000)
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(numbered_image(number), format="bgr24")
            frame.pts, frame.time_base = number * 1200, Fraction(1, 30_000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with av.open(str(path)) as claimed:
        assert claimed.streams.video[0].average_rate == 30_000
    with open_source(path) as source:
        assert source.fps == pytest.approx(25, rel=0.01)
    target, _ = annotated(path, ".mp4")
    assert video_frames(target)[0] == pytest.approx([number / 25 for number in range(20)], abs=2e-3)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("kind", ["ts", "mpg"])
def test_audio_stays_in_sync_in_a_file_of_two_recordings(
    tmp_path: Path, kind: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Concatenate two files like `cat a.ts b.ts`: the clock restarts in the middle."""
    make(tmp_path / f"one.{kind}", FORMATS[kind])
    source = tmp_path / f"two.{kind}"
    source.write_bytes(2 * (tmp_path / f"one.{kind}").read_bytes())
    target, summary = annotated(source, suffix)
    assert not caplog.records
    times, flashes = video_frames(target)
    expected = [*FLASHES, *(SECONDS + second for second in FLASHES)]
    assert summary.frames == len(times) == 200
    assert [times[number] for number in flashes] == pytest.approx(expected, abs=0.02)
    assert beeps(target) == pytest.approx(expected, abs=0.04)
    assert probed(target)["format_duration"] == pytest.approx(2 * SECONDS, abs=0.04)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_streams_that_start_within_a_file_are_read(tmp_path: Path, suffix: str) -> None:
    """Write a file whose second program has other stream indices, as after a change of the channel."""
    make(tmp_path / "one.ts", FORMATS["ts"])
    renumbered = ["-mpegts_start_pid", "0x300", "-mpegts_pmt_start_pid", "0x500", "-output_ts_offset", "4"]
    ffmpeg("-i", tmp_path / "one.ts", "-c", "copy", *renumbered, tmp_path / "other.ts")
    source = tmp_path / "two.ts"
    source.write_bytes((tmp_path / "one.ts").read_bytes() + (tmp_path / "other.ts").read_bytes())
    target, summary = annotated(source, suffix)
    assert summary.frames == 100
    assert beeps(target) == pytest.approx(FLASHES, abs=0.04)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_repeated_frames_extend_durations(tmp_path: Path, suffix: str) -> None:
    """Theora stores an empty packet for a repeated frame."""
    source = tmp_path / "still.ogv"
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=128x96:r=25:d=3", "-c:v", "libtheora", "-g", "25", source)
    with av.open(str(source)) as opened:
        sizes = [packet.size for packet in opened.demux(video=0) if packet.dts is not None]
    assert sizes.count(0) > 20
    target, summary = annotated(source, suffix)
    assert (summary.problems, summary.frames) == (0, len(sizes) - sizes.count(0))
    assert probed(target)["format_duration"] == pytest.approx(len(sizes) / 25, abs=0.04)


# Audio and subtitles ------------------------------------------------------------------------------------------------


def with_tracks(folder: Path) -> Path:
    """Write a clip with two audio tracks and subtitles. MOV cannot store the second track, nor MP4 the subtitles."""
    (folder / "a.srt").write_text(
        "1\n00:00:00,500 --> 00:00:01,500\nfirst\n\n2\n00:00:02,000 --> 00:00:03,000\nsecond\n", encoding="utf-8"
    )
    path = folder / "input.mkv"
    sounds = [part for pitch in (440, 880) for part in ("-f", "lavfi", "-i", f"sine={pitch}:d=4")]
    maps = ["-map", "0", "-map", "1", "-map", "2", "-map", "3"]
    tags = [
        *("-metadata:s:a:0", "language=eng", "-metadata:s:a:1", "language=deu"),
        *("-metadata:s:a:1", "title=Kommentar", "-metadata:s:s:0", "language=fra"),
    ]
    clip = ["-f", "lavfi", "-i", "testsrc=s=128x96:r=25:d=4"]
    codecs = ["-c:v", "libx264", "-c:a:0", "aac", "-c:a:1", "libopus", "-c:s", "srt"]
    ffmpeg(*sounds, *clip, "-i", folder / "a.srt", *maps, *codecs, *tags, path)
    return path


@needs_ffmpeg
def test_all_audio_and_subtitle_tracks_are_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, _ = annotated(with_tracks(tmp_path), ".mkv")
    assert not caplog.records
    with av.open(str(target)) as opened:
        assert [stream.metadata["language"] for stream in opened.streams.audio] == ["eng", "deu"]
        assert opened.streams.audio[1].metadata["title"] == "Kommentar"
        assert opened.streams.subtitles[0].metadata["language"] == "fra"
        for stream in opened.streams.audio:
            opened.seek(0)
            packets = [packet for packet in opened.demux(stream) if packet.size]
            assert float(packets[-1].pts * packets[-1].time_base) == pytest.approx(4, abs=0.05)
        opened.seek(0)
        texts = [packet for packet in opened.demux(opened.streams.subtitles[0]) if packet.size]
        assert [float(packet.pts * packet.time_base) for packet in texts] == pytest.approx([0.5, 2.0], abs=0.01)
        assert [float(packet.duration * packet.time_base) for packet in texts] == pytest.approx([1, 1], abs=0.01)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("suffix", "kept", "left_out"),
    [(".mp4", 2, "subtitles (srt, fra)"), (".mov", 1, "audio (opus, deu), subtitles (srt, fra)")],
)
def test_unsupported_tracks_are_logged(
    tmp_path: Path, suffix: str, kept: int, left_out: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = with_tracks(tmp_path)
    target, _ = annotated(source, suffix)
    with av.open(str(target)) as opened:
        assert len(opened.streams.audio) == kept
    assert [record.getMessage() for record in caplog.records] == [
        f"{target} is written without the {left_out} of {source}, which its format does not support; write a .mkv file "
        "to keep them"
    ]


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_audio_with_non_monotonic_times_is_copied(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "input.mp4", FORMATS["mp4"])
    source = tmp_path / "fragments.mp4"
    ffmpeg("-i", tmp_path / "input.mp4", "-c", "copy", "-movflags", "empty_moov+delay_moov+frag_every_frame", source)
    with av.open(str(source)) as opened:
        stamps = [packet.dts for packet in opened.demux(audio=0) if packet.dts is not None]
    assert min(np.diff(stamps)) == 0
    target, _ = annotated(source, suffix)
    assert not caplog.records
    assert beeps(target) == pytest.approx(FLASHES, abs=0.04)


@needs_ffmpeg
def test_damaged_audio_packet_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "input.ts"
    make(source, FORMATS["ts"])
    content = bytearray(source.read_bytes())
    header = content.index(b"\xff\xf1", len(content) // 2)  # header of an AAC packet
    content[header + 2] |= 0x3C  # an invalid sampling rate
    source.write_bytes(content)
    target, _ = annotated(source, ".mp4")
    assert [record.getMessage() for record in caplog.records] == [
        f"{source}: 1 damaged packets of audio or subtitles were skipped"
    ]
    assert beeps(target) == pytest.approx(FLASHES, abs=0.04)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["12:30.mp4", "file:a.mp4"])
def test_relative_path_that_looks_like_a_url(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("a.mp4").absolute(), FORMATS["mp4"])
    Path("a.mp4").rename(name)
    annotate_video(name, f"out of {name}", "dog", model=no_objects, every=10)
    assert beeps(tmp_path / f"out of {name}") == pytest.approx(FLASHES, abs=0.04)


@needs_ffmpeg
def test_languages_are_kept_in_mov(tmp_path: Path) -> None:
    """FFmpeg writes only one of two language codes to MOV."""
    codes = {"deu": "ger", "ger": "ger", "fra": "fra", "fre": "fra", "nld": "dut", "eng": "eng"}
    sounds = [part for _ in codes for part in ("-f", "lavfi", "-i", "sine=d=1")]
    maps = [part for number in range(len(codes) + 1) for part in ("-map", number)]
    tags = [part for number, code in enumerate(codes) for part in (f"-metadata:s:a:{number}", f"language={code}")]
    clip = ["-f", "lavfi", "-i", "testsrc=s=128x96:r=25:d=1"]
    ffmpeg(*sounds, *clip, *maps, *tags, "-c:v", "libx264", "-c:a", "aac", tmp_path / "input.mkv")
    target, _ = annotated(tmp_path / "input.mkv", ".mov")
    with av.open(str(target)) as opened:
        assert [stream.metadata["language"] for stream in opened.streams.audio] == list(codes.values())


@needs_ffmpeg
def test_subtitle_that_starts_before_the_first_frame_is_trimmed(tmp_path: Path) -> None:
    source = with_tracks(tmp_path)
    with open_source(source) as opened, VideoWriter(tmp_path / "a.mkv", fps=25, audio_from=source) as writer:
        for frame in opened:
            if frame.time > 0.98:
                writer.write(frame, no_objects(frame.image, []))
    with av.open(str(tmp_path / "a.mkv")) as written:
        texts = [packet for packet in written.demux(written.streams.subtitles[0]) if packet.size]
        assert [float(packet.pts * packet.time_base) for packet in texts] == pytest.approx([0, 1], abs=0.01)
        assert [float(packet.duration * packet.time_base) for packet in texts] == pytest.approx([0.5, 1], abs=0.01)


# Shape --------------------------------------------------------------------------------------------------------------


@needs_ffmpeg
@pytest.mark.parametrize("ratio", ["32767/1", "1/300"])
def test_implausible_sample_aspect_ratio_is_ignored(tmp_path: Path, ratio: str) -> None:
    source = tmp_path / "input.mkv"
    clip = f"testsrc=s=128x96:r=25:d=0.2,setsar={ratio}:max=100000"
    ffmpeg("-f", "lavfi", "-i", clip, "-c:v", "mpeg4", source)
    assert probed(source)["sample_aspect_ratio"] == ratio.replace("/", ":")
    target, _ = annotated(source, ".mp4")
    assert probed(target)["sample_aspect_ratio"] == "1:1"


# Closing ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_second_interrupt_while_closing_logs_the_missing_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    source = DATA / "sync_cut.ts"
    writer = VideoWriter(tmp_path / "a.mp4", fps=30, audio_from=source)
    with open_source(source) as opened:
        for frame in opened:
            writer.write(frame, no_objects(frame.image, []))
    monkeypatch.setattr("moondream_cv.video.writers.video_file.remux", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.mp4'} was interrupted while closing; it is playable, without an index at the front and the "
        f"audio of {source}"
    ]
    assert len(video_frames(tmp_path / "a.mp4")[0]) == writer.saved_frames == 255
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


# Colors -------------------------------------------------------------------------------------------------------------

NITS = (0.1, 5, 26, 50, 100, 203, 400, 1000)  # 203 is SDR white within HDR, by ITU-R BT.2408


def pq(nits: np.ndarray) -> np.ndarray:
    """Return the signal from 0 to 1 for a luminance, by SMPTE ST 2084."""
    power = (nits / 10_000) ** (2610 / 16_384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(nits: np.ndarray) -> np.ndarray:
    """Return the signal from 0 to 1 for gray on a display of 1000 nits, by ITU-R BT.2100."""
    scene = (nits / 1000) ** (1 / 1.2)
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def hdr_clip(path: Path, transfer: str) -> Path:
    """Write gray patches of known luminance, with 10 bits."""
    signal = {"smpte2084": pq, "arib-std-b67": hlg}[transfer](np.array(NITS))
    luma = np.repeat(np.rint(64 + 876 * signal).astype("<u2"), 40)
    frame = np.concatenate([np.tile(luma, 64), np.full(luma.size * 64 // 2, 512, "<u2")])
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc"]
    x265 = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc:lossless=1"
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p10le", "-s", f"{luma.size}x64", "-r", "25", "-i", "-"]
    ffmpeg(*raw, "-c:v", "libx265", "-x265-params", x265, *tags, path, data=frame.tobytes() * 3)
    return path


@needs_ffmpeg
@pytest.mark.skipif(not HAS_TONE_MAPPING, reason="this PyAV has an FFmpeg before 8, which cannot map HDR to SDR")
@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_mapped_to_sdr(tmp_path: Path, transfer: str) -> None:
    source = hdr_clip(tmp_path / "input.mp4", transfer)
    target, _ = annotated(source, ".mp4")
    stream = probed(target)
    assert (stream["color_transfer"], stream["color_primaries"]) == ("bt709", "bt709")
    image = opencv_frames(target)[1][0].astype(int)
    patches = image[32, 20::40]
    assert np.ptp(patches, axis=1).max() <= 4  # still gray
    levels = patches.mean(1)
    assert (np.diff(levels) > 0).all()
    assert levels[0] < 16
    assert 140 < levels[NITS.index(203)] < levels[-1] <= 255
    # In the SDR curve, 26 nits (50 % gray) have a level of about 100 if white is 100 nits.
    assert 70 < levels[NITS.index(26)] < 130


@needs_ffmpeg
@pytest.mark.skipif(HAS_TONE_MAPPING, reason="this PyAV maps HDR to SDR")
def test_unsupported_hdr_is_rejected(tmp_path: Path) -> None:
    source = hdr_clip(tmp_path / "input.mp4", "smpte2084")
    with pytest.raises(VideoError, match=r"input\.mp4' is HDR video \(PQ\), and PyAV .* cannot convert it to SDR"):
        open_source(source)
