"""`annotate_video` from files to annotated files. Run with `pytest tests/video/test_pipeline.py`."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import supervision as sv

from moondream_cv import loading
from moondream_cv.errors import VideoError
from moondream_cv.scenes.clips import render_clip
from moondream_cv.video import Summary, Tracking, Zones, annotate_video, track
from moondream_cv.video.sources.live import LiveReader
from tests.helpers.clips import MovingObject, ScriptedDetector, frame_number, numbered_image, truncate, write_clip
from tests.helpers.color_model import ColorModel

SIZE = (320, 192)
CLASSES = ["dog", "cat", "horse"]
FRAMES = 48
FPS = 25


# With every=5, tracked on 48 frames, on 21 (10 to 30) and on 21 (20 to 40).
OBJECTS = (
    MovingObject("dog", (40, 150), (4, 0)),
    MovingObject("dog", (260, 120), (-1, 0), range(8, 33), 0.75),
    MovingObject("cat", (160, 120), (0, 0), range(20, 41)),
)


def with_sound(path: Path, images: Sequence[np.ndarray]) -> Path:
    """Video with a tone of the same length."""
    rate, done = 48_000, 0
    with av.open(str(path), "w") as output:
        sound = output.add_stream("aac", rate=rate)
        sound.layout = "mono"
        stream = output.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], images[0].shape[0], "yuv420p"
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        tone = np.sin(np.arange(1024) * 0.1).astype(np.float32)[None] / 2
        while done < len(images) / FPS * rate:
            samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            samples.sample_rate, samples.time_base, samples.pts = rate, Fraction(1, rate), done
            done += 1024
            output.mux(sound.encode(samples))
        output.mux(sound.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [numbered_image(number, SIZE) for number in range(FRAMES)]
    return with_sound(tmp_path_factory.mktemp("clips") / "street.mp4", images)


def images_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as opened:
        return [frame.to_ndarray(format="bgr24") for frame in opened.decode(video=0)]


def numbers_of(path: Path) -> list[int]:
    return [frame_number(image[: SIZE[1], : SIZE[0]]) for image in images_of(path)]


def times_of(path: Path) -> list[float]:
    with av.open(str(path)) as opened:
        return [float(frame.time or 0.0) for frame in opened.decode(video=0)]


def sound_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as opened:
        return [bytes(packet) for packet in opened.demux(audio=0) if packet.size] if opened.streams.audio else []


def only(folder: Path, *names: str) -> bool:
    """Return whether a folder contains exactly these files, and no parts."""
    return sorted(os.listdir(folder)) == sorted(names)


# Video output --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5, 1000, "auto"])
@pytest.mark.compat
def test_output_has_all_frames_and_audio(every: Any, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    summary = annotate_video(clip, target, CLASSES, model=ScriptedDetector(*OBJECTS), every=every)
    assert numbers_of(target) == list(range(FRAMES))
    np.testing.assert_allclose(times_of(target), np.arange(FRAMES) / FPS, atol=1e-3)
    assert sound_of(target) == sound_of(clip)
    assert images_of(target)[0].shape == (SIZE[1], SIZE[0], 3)
    assert (summary.frames, summary.frame_count) == (FRAMES, FRAMES)
    assert only(tmp_path, "out.mp4")


def test_boxes_are_drawn_around_objects(clip: Path, tmp_path: Path) -> None:
    annotate_video(clip, tmp_path / "none.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5, annotate="none")
    tracking = Tracking(bridge_seconds=0.3)
    model = ScriptedDetector(*OBJECTS)
    annotate_video(clip, tmp_path / "blur.mp4", CLASSES, model=model, every=5, annotate="blur", tracking=tracking)
    originals, plain = images_of(clip), images_of(tmp_path / "none.mp4")
    for number, blurred in enumerate(images_of(tmp_path / "blur.mp4")):
        left, top, right, bottom = OBJECTS[2].box(number).astype(int)
        noise = [image[top + 4 : bottom - 4, left + 4 : right - 4].std() for image in (plain[number], blurred)]
        assert (noise[1] < noise[0] / 2) == (13 <= number <= 47)  # detected on 20 to 40, at 25 frames per second
        assert np.abs(plain[number].astype(int) - originals[number]).mean() < 8


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
def test_mov_and_mkv_targets(suffix: str, clip: Path, tmp_path: Path) -> None:
    annotate_video(str(clip), str(tmp_path / f"out{suffix}"), "dog", model=ScriptedDetector(OBJECTS[0]), every=15)
    assert numbers_of(tmp_path / f"out{suffix}") == list(range(FRAMES))
    assert sound_of(tmp_path / f"out{suffix}")[-80:] == sound_of(clip)[-80:]


def test_audio_can_be_omitted(clip: Path, tmp_path: Path) -> None:
    annotate_video(clip, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=15, audio=False)
    assert sound_of(tmp_path / "out.mp4") == []
    assert len(images_of(tmp_path / "out.mp4")) == FRAMES


def test_odd_frame_sizes(tmp_path: Path) -> None:
    images = [numbered_image(number, (161, 97)) for number in range(13)]
    summary = annotate_video(images, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(), every=5)
    found = images_of(tmp_path / "out.mp4")
    assert [frame_number(image) for image in found] == list(range(13))
    assert found[0].shape == (98, 162, 3)
    assert (summary.frames, summary.frame_count) == (13, 13)


def test_changing_frame_sizes(tmp_path: Path) -> None:
    images = [numbered_image(n, SIZE if n % 20 < 10 else (160, 96)) for n in range(40)]
    summary = annotate_video(images, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(), every=5, panel=True)
    assert summary.frames == len(images_of(tmp_path / "out.mp4")) == 40


def test_panel_widens_the_video(clip: Path, tmp_path: Path) -> None:
    annotate_video(
        clip, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5, panel=True, color_by="id"
    )
    found = images_of(tmp_path / "out.mp4")
    assert found[0].shape[0] == SIZE[1]
    assert found[0].shape[1] > SIZE[0]
    assert numbers_of(tmp_path / "out.mp4") == list(range(FRAMES))


def test_video_of_one_frame(tmp_path: Path) -> None:
    write_clip(tmp_path / "one.mp4", [numbered_image(7, SIZE)])
    summary = annotate_video(tmp_path / "one.mp4", tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(OBJECTS[0]))
    assert numbers_of(tmp_path / "out.mp4") == [7]
    assert (summary.frames, summary.detections_run, summary.classes["dog"].objects) == (1, 1, 1)


def test_source_may_be_the_target(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "same.mp4"
    path.write_bytes(clip.read_bytes())
    annotate_video(path, path, CLASSES, model=ScriptedDetector(*OBJECTS), every=5)
    assert numbers_of(path) == list(range(FRAMES))
    assert sound_of(path) == sound_of(clip)
    assert path.read_bytes() != clip.read_bytes()
    assert only(tmp_path, "same.mp4")


def test_tiny_model_annotates_a_video(tmp_path: Path) -> None:
    scene = render_clip(3, num_frames=8, num_objects=3, num_classes=2, resolution_wh=(240, 160))
    pictures = [image[..., ::-1] for image, _ in scene.frames()]
    summary = annotate_video(
        pictures, tmp_path / "out.mp4", scene.class_names, model="tiny", device="cpu", every=3, confidence=0.1
    )
    assert summary.frames == len(images_of(tmp_path / "out.mp4")) == 8
    assert summary.detections_run == 4  # 0, 3, 6 and the last frame


# Text and summary --------------------------------------------------------------------------------------------------


def test_json_and_mot_contain_the_detections_of_track(clip: Path, tmp_path: Path) -> None:
    expected = [d for _, d in track(clip, CLASSES, model=ScriptedDetector(*OBJECTS), every=5)]
    stream = io.StringIO()
    annotate_video(
        clip,
        None,
        CLASSES,
        model=ScriptedDetector(*OBJECTS),
        every=5,
        json=tmp_path / "out.jsonl",
        mot=stream,
        audio=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    np.testing.assert_allclose([line["time"] for line in lines], np.arange(FRAMES) / FPS, atol=1e-3)
    rows: dict[int, list[list[float]]] = {number: [] for number in range(1, FRAMES + 1)}
    for text in stream.getvalue().splitlines():
        frame, *row = map(float, text.split(","))
        rows[int(frame)].append(row)
    for number, (line, detections) in enumerate(zip(lines, expected, strict=True), 1):
        assert detections.tracker_id is not None
        assert detections.class_id is not None
        described = line["detections"]
        assert [d["tracker_id"] for d in described] == detections.tracker_id.tolist()
        assert [d["class_id"] for d in described] == detections.class_id.tolist()
        assert [d["class_name"] for d in described] == [CLASSES[i] for i in detections.class_id]
        np.testing.assert_allclose([d["xyxy"] for d in described], detections.xyxy, atol=0.01)
        assert [row[0] for row in rows[number]] == detections.tracker_id.tolist()
        left_top_wh = np.concatenate((detections.xyxy[:, :2], detections.xyxy[:, 2:] - detections.xyxy[:, :2]), 1)
        np.testing.assert_allclose([row[1:5] for row in rows[number]], left_top_wh, atol=0.01)
    assert only(tmp_path, "out.jsonl")


def test_summary_counts_frames_objects_and_detections(clip: Path) -> None:
    detector, start = ScriptedDetector(*OBJECTS), time.monotonic()
    summary = annotate_video(clip, None, CLASSES, model=detector, every=5)
    taken = time.monotonic() - start
    assert list(summary.classes) == CLASSES
    dog, cat, horse = summary.classes.values()
    assert (dog.objects, dog.frames, dog.most) == (2, 48, 2)
    assert dog.confidence == pytest.approx((48 * 0.5 + 21 * 0.75) / 69)
    assert (cat.objects, cat.frames, cat.most) == (1, 21, 1)
    assert cat.confidence == pytest.approx(0.5)
    assert (horse.objects, horse.frames, horse.most) == (0, 0, 0)
    assert math.isnan(horse.confidence)
    assert (summary.frames, summary.detections_run, summary.failed, summary.problems) == (48, 11, 0, 0)
    assert summary.seconds == pytest.approx(47 / FPS, abs=1e-3)
    assert summary.zones is None
    assert 0 < summary.elapsed <= taken
    assert summary.fps == pytest.approx(48 / summary.elapsed)
    assert summary.detector_fps == pytest.approx(11 / summary.elapsed)
    assert (Summary().fps, Summary().detector_fps) == (0.0, 0.0)


def test_failed_keyframes_are_counted(clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        if frame_number(image) in (10, 15):
            raise RuntimeError("too much")
        return ScriptedDetector(*OBJECTS)(image, classes)

    summary = annotate_video(clip, tmp_path / "out.mp4", CLASSES, model=detector, every=5)
    assert (summary.frames, summary.detections_run, summary.failed) == (48, 9, 2)
    assert numbers_of(tmp_path / "out.mp4") == list(range(FRAMES))
    assert "street.mp4" in caplog.text
    assert summary.classes["dog"].objects == 2


# The bottom of the first dog is at (40 + 4 n, 165). It crosses x = 100 after frame 15, and is inside on 15 to 27.
ZONES = {
    "lines": [{"name": "door", "start": [100, 190], "end": [100, 110]}],
    "zones": [{"name": "yard", "polygon": [[98, 150], [152, 150], [152, 180], [98, 180]]}],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "file", "object"])
def test_zones_are_counted(kind: str, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "zones.json"
    path.write_text(json.dumps(ZONES))
    zones: Any = {"dict": ZONES, "file": path, "object": Zones.from_dict(ZONES)}[kind]
    inside: list[int] = []

    def note(summary: Summary) -> None:
        assert summary.zones is not None
        inside.append(summary.zones["zones"]["yard"]["now"])

    summary = annotate_video(
        clip, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(OBJECTS[0]), every=5, zones=zones, on_frame=note
    )
    assert summary.zones is not None
    assert summary.zones["lines"]["door"] == {"in": 0, "out": 1, "classes": {"dog": {"in": 0, "out": 1}}}
    assert summary.zones["zones"]["yard"] == {"now": 0, "ids": 1, "classes": {}}
    assert inside == [int(15 <= number <= 28) for number in range(FRAMES)]
    assert numbers_of(tmp_path / "out.mp4") == list(range(FRAMES))


def test_on_frame_gets_the_same_summary_after_each_frame(clip: Path) -> None:
    seen: list[tuple[int, float, int]] = []
    objects: set[int] = set()

    def note(summary: Summary) -> None:
        objects.add(id(summary))
        seen.append((summary.frames, summary.seconds, summary.detections_run))

    summary = annotate_video(clip, None, CLASSES, model=ScriptedDetector(*OBJECTS), every=5, on_frame=note)
    assert objects == {id(summary)}
    assert [frames for frames, _, _ in seen] == list(range(1, FRAMES + 1))
    assert [s for _, s, _ in seen] == pytest.approx([n / FPS for n in range(FRAMES)], abs=1e-3)
    assert [count for *_, count in seen] == sorted(count for *_, count in seen)


# Failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 7, 30])
def test_error_in_on_frame_leaves_a_playable_video(error: BaseException, at: int, clip: Path, tmp_path: Path) -> None:
    def stop(summary: Summary) -> None:
        if summary.frames == at:
            raise error

    with pytest.raises(type(error)):
        annotate_video(
            clip, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5, json=tmp_path / "out.jsonl",
            on_frame=stop,
        )  # fmt: skip
    assert numbers_of(tmp_path / "out.mp4") == list(range(at))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == at
    assert 0 < len(sound_of(tmp_path / "out.mp4")) < len(sound_of(clip)) or at == 1
    assert only(tmp_path, "out.mp4", "out.jsonl")


@pytest.mark.parametrize("argument", ["json", "mot"])
def test_text_output_must_not_overwrite_the_source(argument: str, clip: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(clip)
    before = clip.read_bytes()
    for target in (str(clip), link):
        with pytest.raises(ValueError, match=f"{argument} would overwrite the source, .*; choose another file"):
            annotate_video(clip, None, CLASSES, model=ScriptedDetector(*OBJECTS), **{argument: target})
    assert clip.read_bytes() == before


def test_exception_keeps_the_source_if_it_is_the_target(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "same.mp4"
    path.write_bytes(clip.read_bytes())

    def stop(summary: Summary) -> None:
        raise RuntimeError("at once")

    with pytest.raises(RuntimeError, match="at once"):
        annotate_video(path, path, CLASSES, model=ScriptedDetector(*OBJECTS), every=5, on_frame=stop)
    assert numbers_of(path)[:1] == [0]  # playable, before or after replacement
    assert only(tmp_path, "same.mp4")


CTRL_C = """
import sys, time, numpy as np, supervision as sv
from moondream_cv.video import annotate_video
def detect(image, classes):
    time.sleep(0.02)
    return sv.Detections(np.array([[10, 10, 50, 50]], np.float32), class_id=np.array([0]))
def say(summary):
    if summary.frames % 10 == 0:
        print(summary.frames, flush=True)
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
frames = (np.roll(image, i, 1) for i in range(100_000))
annotate_video(frames, sys.argv[1], ["dog"], model=detect, every=5, on_frame=say)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to another process")
def test_ctrl_c_leaves_a_playable_video(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 60:
            pass
        process.send_signal(signal.SIGINT)
        said, error = process.communicate(timeout=240)
    finally:
        process.kill()
    assert error.rstrip().endswith("KeyboardInterrupt")
    written = max([60, *map(int, said.split())])
    assert written <= len(images_of(path)) <= written + 10
    assert only(tmp_path, "out.mp4")


def test_truncated_source_is_written_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [numbered_image(number, SIZE) for number in range(FRAMES)]
    source = truncate(write_clip(tmp_path / "in.mkv", images), 0.6)
    summary = annotate_video(source, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5)
    numbers = numbers_of(tmp_path / "out.mp4")
    assert numbers == list(range(summary.frames))
    assert 10 < summary.frames < FRAMES
    assert "truncated" in caplog.text or "damaged" in caplog.text


def breaking() -> Iterator[np.ndarray]:
    yield from (numbered_image(number, SIZE) for number in range(23))
    raise OSError("the disk is gone")


def test_failing_source_leaves_a_playable_video(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        annotate_video(breaking(), tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5)
    numbers = numbers_of(tmp_path / "out.mp4")
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 10
    assert only(tmp_path, "out.mp4")


@pytest.mark.parametrize("every", [5, 100])
def test_all_frames_before_a_source_failure_are_written(every: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        annotate_video(breaking(), tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=every)
    assert numbers_of(tmp_path / "out.mp4") == list(range(23))


def test_lost_live_source_leaves_a_playable_video(tmp_path: Path) -> None:
    def camera(reader: LiveReader) -> Iterator[np.ndarray]:
        for number in range(20):
            yield numbered_image(number, SIZE)
            time.sleep(0.03)

    live = LiveReader(camera, name="the camera", open_timeout=120, read_timeout=120, reconnect_for=0)
    with pytest.raises(VideoError, match="the camera is lost"):
        annotate_video(live, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=1)
    numbers = numbers_of(tmp_path / "out.mp4")
    assert numbers[0] == 0
    assert numbers[-1] == 19
    assert numbers == sorted(set(numbers))


OUTSIDE = {"zones": [{"name": "far", "polygon": [[900, 900], [990, 900], [990, 990]]}]}


def test_zone_outside_the_frame_is_rejected(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"an earlier one")
    with pytest.raises(ValueError, match=r'zone "far" .* is outside a frame of 320x192'):
        annotate_video(clip, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5, zones=OUTSIDE)
    assert (tmp_path / "out.mp4").read_bytes() == b"an earlier one"
    assert only(tmp_path, "out.mp4")


def test_zone_outside_the_frame_is_rejected_before_detection(clip: Path) -> None:
    detector = ScriptedDetector(*OBJECTS)
    with pytest.raises(ValueError, match='zone "far"'):
        annotate_video(clip, None, CLASSES, model=detector, every=5, zones=OUTSIDE)
    assert detector.keyframes == []


def test_zone_outside_later_smaller_frames_raises(tmp_path: Path) -> None:
    images = [numbered_image(n, SIZE if n < 20 else (64, 48)) for n in range(40)]
    with pytest.raises(ValueError, match=r'line "door" .* is outside a frame of 64x48'):
        annotate_video(images, tmp_path / "out.mp4", CLASSES, model=ScriptedDetector(*OBJECTS), every=5, zones=ZONES)
    assert numbers_of(tmp_path / "out.mp4") == list(range(20))


UNWRITABLE = [
    ("nowhere/out.mp4", "no folder"),
    ("out.avi", "must end in"),
    ("folder.mp4", "is a folder"),
]


@pytest.mark.parametrize(("name", "message"), UNWRITABLE)
def test_target_without_folder_is_rejected_before_detection(
    name: str, message: str, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    detector = ScriptedDetector(*OBJECTS)
    for options in ({"target": tmp_path / name}, {"target": None, "json": tmp_path / "folder.mp4"}):
        with pytest.raises(VideoError, match=message if options["target"] else "is a folder"):
            annotate_video(clip, classes=CLASSES, model=detector, every=5, **options)
    time.sleep(0.05)
    assert detector.keyframes == []
    assert only(tmp_path, "folder.mp4")


def test_unwritable_target_does_not_overwrite_text_files(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("an earlier one")
    with pytest.raises(VideoError, match="must end in"):
        annotate_video(clip, tmp_path / "out.avi", CLASSES, model=ScriptedDetector(), json=tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "an earlier one"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"target": "nowhere/out.mp4"}, VideoError, "no folder"),
        ({"target": "out.avi"}, VideoError, "must end in"),
        ({"annotate": "circles"}, ValueError, "circles"),
        ({"color_by": "size"}, ValueError, "color_by"),
    ],
)
def test_invalid_arguments_are_rejected_before_the_model_is_loaded(
    wrong: dict[str, Any], error: type[Exception], message: str, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load_colors(name: str, device: str | None = None) -> ColorModel:
        loaded.append(name)
        return ColorModel()

    monkeypatch.setattr(loading, "load", load_colors)
    arguments = {"source": clip, "target": None, "classes": CLASSES, "model": "colors", **wrong}
    with pytest.raises(error, match=message):
        annotate_video(**arguments)
    assert loaded == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"classes": []}, "classes must have at least one"),
        ({"annotate": "circles"}, "circles"),
        ({"color_by": "size"}, "color_by"),
        ({"zones": {}}, "add at least one of them"),
        ({"tracking": Tracking("deepsort")}, "tracker must be one of"),
    ],
)
def test_invalid_arguments_are_rejected(wrong: dict[str, Any], message: str, clip: Path, tmp_path: Path) -> None:
    detector = ScriptedDetector(*OBJECTS)
    arguments = {
        "source": clip, "target": tmp_path / "out.mp4", "classes": CLASSES, "model": detector, **wrong,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        annotate_video(**arguments)
    assert detector.keyframes == []
    assert only(tmp_path)


def test_blur_covers_frames_around_detections(clip: Path, tmp_path: Path) -> None:
    """Detected on every fifth of frames 10 to 30. Only blur also covers 0.32 s before and after."""
    counts = {}
    for annotate in ("box", "blur"):
        target = tmp_path / f"{annotate}.jsonl"
        model, tracking = ScriptedDetector(OBJECTS[1]), Tracking(bridge_seconds=0.32)
        annotate_video(clip, None, CLASSES, model=model, every=5, annotate=annotate, tracking=tracking, json=target)
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        counts[annotate] = [line["frame"] for line in lines if line["detections"]]
    assert counts["box"] == list(range(10, 31))
    assert counts["blur"] == list(range(2, 39))
