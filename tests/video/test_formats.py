"""Real files of many formats through `annotate_video`: outputs keep the frames, times, colors and sound.

The inputs are made by ffmpeg. Each has a white flash and a beep once a second, and patches of color. The outputs are
read by PyAV, OpenCV and ffprobe. Run with `pytest tests/video/test_formats.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv.video import Summary, annotate_video, open_source
from tests.helpers.clips import set_display_matrix

pytestmark = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")),
    reason="ffmpeg and ffprobe, which make and read the files, are not installed (apt-get install ffmpeg)",
)

FPS, SECONDS, RATE = 25, 4, 48_000
FRAME = 1 / FPS
FLASHES = (1, 2, 3)  # seconds; each lasts 0.2 s
COLORS = [(40, 40, 200), (60, 170, 60), (190, 70, 40), (40, 180, 220), (128, 128, 128)]  # BGR
NO_OBJECTS = sv.Detections.empty()


@dataclass(frozen=True)
class Format:
    """Format of an input file.

    Attributes:
        suffix: Suffix of the input, which selects the container.
        video: Options of the video encoder.
        audio: Name of the audio encoder; None for a file without audio.
        kept: Frames of the clip in the file. The others are dropped, which leaves gaps.
        size: Width and height.
        sample_aspect_ratio: Aspect ratio of a pixel.
        rotation: Degrees by which players rotate the video.
        audio_start: Start of the audio in seconds after the first frame.
        output: Suffix of the output.
    """

    suffix: str
    video: tuple[str, ...] = ("-c:v", "libx264", "-bf", "3")
    audio: str | None = "aac"
    kept: tuple[int, ...] = tuple(range(FPS * SECONDS))
    size: tuple[int, int] = (160, 96)
    sample_aspect_ratio: Fraction = Fraction(1)
    rotation: int = 0
    audio_start: float = 0.0
    output: str = ".mp4"
    color: tuple[str, ...] = field(default=())

    @property
    def times(self) -> list[float]:
        """Times of the frames after the first one, in seconds."""
        return [(index - self.kept[0]) * FRAME for index in self.kept]

    @property
    def duration(self) -> float:
        return self.times[-1] + FRAME


NO_B = ("-c:v", "libx264", "-bf", "0")
GAP = tuple(index for index in range(FPS * SECONDS) if not 35 <= index < 48)
VARIABLE = tuple(index for index in range(FPS * SECONDS) if index < 30 or index % 5 == 0)
SLIDES = tuple(range(0, FPS * SECONDS, 5))
ANAMORPHIC = Fraction(64, 45)
FORMATS = {
    "mp4": Format(".mp4"),
    "mp4 to mkv": Format(".mp4", output=".mkv"),
    "mp4 to mov": Format(".mp4", output=".mov"),
    "mp4 without B-frames": Format(".mp4", NO_B),
    "mp4, gap": Format(".mp4", kept=GAP),
    "mp4, gap, to mkv": Format(".mp4", kept=GAP, output=".mkv"),
    "mp4, variable": Format(".mp4", kept=VARIABLE),
    "mp4, slides": Format(".mp4", kept=SLIDES, output=".mov"),
    "mp4, turned by 90": Format(".mp4", rotation=90),
    "mp4, turned by 180": Format(".mp4", NO_B, rotation=180, kept=GAP),
    "mp4, turned by 270, anamorphic": Format(".mp4", rotation=270, sample_aspect_ratio=ANAMORPHIC),
    "mp4, anamorphic": Format(".mp4", sample_aspect_ratio=ANAMORPHIC),
    "mp4, late sound": Format(".mp4", audio_start=0.6),
    "mp4, MPEG-4": Format(".mp4", ("-c:v", "mpeg4", "-bf", "2")),
    "mp4, H.265": Format(".mp4", ("-c:v", "libx265", "-x265-params", "log-level=none"), kept=VARIABLE),
    "mp4, HD": Format(".mp4", NO_B, size=(1280, 720)),
    "mp4, tagged": Format(".mp4", color=("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")),
    "mov": Format(".mov", kept=VARIABLE, output=".mkv"),
    "mov, anamorphic": Format(".mov", NO_B, sample_aspect_ratio=ANAMORPHIC, audio_start=0.3),
    "mov, ProRes": Format(".mov", ("-c:v", "prores_ks"), audio="pcm_s16le", output=".mov"),
    "mkv": Format(".mkv"),
    "mkv to mkv": Format(".mkv", audio="libopus", output=".mkv"),
    "mkv, gap": Format(".mkv", kept=GAP, output=".mkv"),
    "mkv, anamorphic, variable": Format(".mkv", NO_B, kept=VARIABLE, sample_aspect_ratio=ANAMORPHIC, output=".mkv"),
    "mkv, late sound": Format(".mkv", audio_start=0.6, output=".mkv"),
    "webm": Format(".webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime"), audio="libopus"),
    "avi, B-frames": Format(".avi", audio="libmp3lame"),
    "avi, B-frames, to mkv": Format(".avi", audio="libmp3lame", output=".mkv"),
    "avi, no B-frames": Format(".avi", NO_B, audio="pcm_s16le", output=".mov"),  # MP3 would shift all but frame 0
    "avi, MPEG-4": Format(".avi", ("-c:v", "mpeg4", "-bf", "2"), audio="libmp3lame"),
    "avi, Motion JPEG": Format(".avi", ("-c:v", "mjpeg", "-q:v", "2"), audio="pcm_s16le", output=".mov"),
    "ts": Format(".ts"),
    "ts, gap": Format(".ts", kept=GAP, output=".mkv"),
    "ts, late sound": Format(".ts", NO_B, audio_start=0.6),
    "mpg": Format(".mpg", ("-c:v", "mpeg2video", "-bf", "2", "-q:v", "2"), audio="mp2"),
    "flv": Format(".flv", audio="aac"),
    "without sound": Format(".mp4", audio=None),
}


def images(size: tuple[int, int]) -> list[np.ndarray]:
    """Return the frames of the clip, BGR. The upper half flashes, and the lower half has color patches."""
    width, height = size
    ground = np.full((height, width, 3), 30, np.uint8)
    for number, color in enumerate(COLORS):
        ground[height // 2 :, number * width // 5 : (number + 1) * width // 5] = color
    flash = ground.copy()
    flash[: height // 2] = 235
    # Frame numbers, because 1.2 is less than 1 + 0.2.
    lit = {FPS * second + frame for second in FLASHES for frame in range(FPS // 5)}
    return [flash if number in lit else ground for number in range(FPS * SECONDS)]


def make(path: Path, given: Format) -> None:
    """Write an input with ffmpeg."""
    width, height = given.size
    beep = "+".join(f"between(t,{second},{second + 0.2})" for second in FLASHES)
    command = ["ffmpeg", "-v", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "bgr24", "-s", f"{width}x{height}", "-r", str(FPS), "-i", "-"]
    if given.audio:
        command += ["-itsoffset", str(given.audio_start), "-f", "lavfi"]
        # A late track beeps at the same times in the clip.
        beep = beep.replace("between(t", f"between(t+{given.audio_start}")
        seconds = SECONDS - given.audio_start
        command += ["-i", f"aevalsrc='0.6*sin(2*PI*1000*t)*({beep})':s={RATE}:d={seconds}"]
        command += ["-c:a", given.audio, *(("-b:a", "96k") if given.audio != "pcm_s16le" else ())]
    chosen = "+".join(f"eq(n,{number})" for number in given.kept)
    ratio = given.sample_aspect_ratio
    matrix = "bt709" if given.color or width >= 1280 else "bt601"
    filters = [f"setsar={ratio.numerator}/{ratio.denominator}", f"scale=out_color_matrix={matrix}"]
    filters += ["format=yuv422p10le" if "prores_ks" in given.video else "format=yuv420p"]
    if len(given.kept) < FPS * SECONDS:
        filters.insert(0, f"select='{chosen}'")
    command += ["-vf", ",".join(filters), "-fps_mode", "vfr" if len(given.kept) < FPS * SECONDS else "cfr"]
    command += [*given.video, *given.color, "-g", "12", str(path)]
    raw = b"".join(image.tobytes() for image in images(given.size))
    done = subprocess.run(command, input=raw, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()
    if given.rotation:
        matrices = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
        set_display_matrix(path, matrices[given.rotation])


def no_objects(image: np.ndarray, classes: list[str]) -> sv.Detections:
    return NO_OBJECTS


def annotated(source: Path, suffix: str) -> tuple[Path, Summary]:
    target = source.with_name(f"output{suffix}")
    return target, annotate_video(source, target, "dog", model=no_objects, annotate="none", every=10)


def beeps(path: Path) -> list[float]:
    """Return the start times of the beeps in the first audio track, in seconds on the clock of the file."""
    starts: list[float] = []
    quiet_until = -1.0
    with av.open(str(path)) as opened:
        for frame in opened.decode(audio=0):
            samples = av.AudioResampler("flt", "mono").resample(frame)[0].to_ndarray().ravel()
            for loud in np.flatnonzero(np.abs(samples) > 0.1):
                at = float(frame.time) + loud / frame.sample_rate
                if at > quiet_until:
                    starts.append(at)
                quiet_until = at + 0.1
    return starts


def video_frames(path: Path) -> tuple[list[float], list[int]]:
    """Return the times of all frames in seconds on the clock of the file, and the indices at which flashes start."""
    times, flashes, was_lit = [], [], False
    with av.open(str(path)) as opened:
        for number, frame in enumerate(opened.decode(video=0)):
            times.append(float(frame.time or 0))
            gray = frame.to_ndarray(format="gray")
            is_lit = bool(np.percentile(gray, 90) > 215)
            if is_lit and not was_lit:
                flashes.append(number)
            was_lit = is_lit
    return times, flashes


def probed(path: Path) -> dict[str, Any]:
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", str(path)]
    result = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=240).stdout)
    (stream,) = (stream for stream in result["streams"] if stream["codec_type"] == "video")
    return {**stream, "format_duration": float(result["format"]["duration"])}


def opencv_frames(path: Path) -> tuple[float, list[np.ndarray]]:
    capture = cv2.VideoCapture(str(path))
    rate, found = capture.get(cv2.CAP_PROP_FPS), []
    while True:
        is_read, image = capture.read()
        if not is_read:
            capture.release()
            return rate, found
        found.append(image)


def patches(image: np.ndarray, rotation: int) -> np.ndarray:
    """Return the mean colors of the patches in an upright frame, [5, 3]."""
    image = np.rot90(image, rotation // 90)
    height, width = image.shape[:2]
    rows = slice(height * 5 // 8, height * 7 // 8)
    middles = [(2 * number + 1) * width // 10 for number in range(len(COLORS))]
    return np.array([image[rows, middle - width // 32 : middle + width // 32].mean((0, 1)) for middle in middles])


@pytest.mark.parametrize("given", FORMATS.values(), ids=FORMATS)
def test_output_has_the_frames_times_colors_and_sound_of_the_input(
    tmp_path: Path, given: Format, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / f"input{given.suffix}"
    make(source, given)
    target, summary = annotated(source, given.output)
    assert summary.problems == 0
    assert not caplog.records

    # Frames and times
    times, flashes = video_frames(target)
    stream = probed(target)
    rate, by_opencv = opencv_frames(target)
    count = len(given.kept)
    assert (summary.frames, len(times), int(stream["nb_read_frames"]), len(by_opencv)) == (count,) * 4
    assert np.subtract(times, times[0]) == pytest.approx(given.times, abs=FRAME / 2)
    assert times[0] == pytest.approx(0, abs=1e-3)
    assert stream["format_duration"] == pytest.approx(given.duration, abs=FRAME)
    assert float(stream.get("duration", given.duration)) == pytest.approx(given.duration, abs=FRAME)
    # The average rate, or the rate outside gaps with an older PyAV.
    assert rate in (pytest.approx(count / given.duration, rel=0.1), pytest.approx(FPS))

    # Shape and colors
    ratio = given.sample_aspect_ratio if given.rotation % 180 == 0 else 1 / given.sample_aspect_ratio
    assert Fraction(stream["sample_aspect_ratio"].replace(":", "/")) == pytest.approx(ratio, rel=1e-3)
    wide = given.size if given.rotation % 180 == 0 else given.size[::-1]
    assert (stream["width"], stream["height"]) == wide
    assert (
        np.abs(patches(by_opencv[0], given.rotation) - patches(opencv_frames(source)[1][0], given.rotation)).max() <= 4
    )
    with open_source(target) as opened:
        assert np.abs(patches(next(opened).image, given.rotation) - COLORS).max() <= 4

    # Audio
    with av.open(str(target)) as opened_target:
        assert len(opened_target.streams.audio) == (given.audio is not None)
    if given.audio:
        first = 0.0 if given.suffix == ".avi" else video_frames(source)[0][0]  # PyAV's times of AVI are wrong
        expected = [beep - first for beep in beeps(source)]
        assert beeps(target) == pytest.approx(expected, abs=0.02)
        lit = [times[number] for number in flashes]
        assert len(lit) == len(expected) == len(FLASHES)
        assert np.subtract(beeps(target), lit) == pytest.approx(np.subtract(expected, FLASHES), abs=0.04)
