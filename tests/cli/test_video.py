"""`moondream-cv video`, on folders of color patches and on clips."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import moondream_cv
import moondream_cv.video
from moondream_cv.cli import app
from moondream_cv.scenes.clips import render_clip
from tests.helpers.clips import write_clip
from tests.helpers.color_model import ColorModel, color_frame

Run = Callable[..., Any]

TINY = ("--model", "tiny", "--device", "cpu")
FRAMES = 20
ZONES = {
    "lines": [{"name": "door", "start": [40, 60], "end": [40, 0]}],
    "zones": [{"name": "left", "polygon": [[0, 0], [40, 0], [40, 60], [0, 60]]}],
}


@pytest.fixture
def frames(folder: Path) -> Path:
    """Return a folder of 10 images: red moves from left to right; the last four have two green patches."""
    (folder / "frames").mkdir()
    for number in range(10):
        green = [("green", (2, 2, 12, 12)), ("green", (66, 2, 76, 12))] if number >= 6 else []
        red = ("red", (2 + 6 * number, 20, 22 + 6 * number, 40))
        cv2.imwrite(f"frames/{number}.png", color_frame(red, *green))
    (folder / "zones.json").write_text(json.dumps(ZONES))
    return folder / "frames"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video with objects that the tiny model detects."""
    scene = render_clip(1, num_frames=FRAMES, names=("red circle", "dog", "car"), resolution_wh=(320, 180))
    images = [np.ascontiguousarray(image[..., ::-1]) for image, _ in scene]
    return write_clip(tmp_path_factory.mktemp("clip") / "in.mp4", images)


def frame_sizes(path: Path | str) -> list[tuple[int, int]]:
    """Decode a video, and return the width and height of every frame."""
    with av.open(str(path)) as container:
        return [(frame.width, frame.height) for frame in container.decode(video=0)]


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a separate process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS")}
    environment = {
        **kept, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(moondream_cv.__file__).parents[1]),
    }  # fmt: skip
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "moondream_cv", "video", *arguments], env=environment, **settings)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Return a list of processes that are killed after the test."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for each in running:
        each.kill()
        each.communicate()


def wait_for_lines(path: Path, count: int, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end, f"{path} never had {count} lines"
        time.sleep(0.05)


# --- output ---


def test_video_json_and_tracks_are_written(clip: Path, tmp_path: Path) -> None:
    target, lines, tracks = (tmp_path / name for name in ("out.mp4", "out.jsonl", "tracks.txt"))
    result = CliRunner().invoke(
        app,
        ["video", str(clip), "dog", "red circle", *TINY, "-o", str(target), "--json", str(lines), "--mot", str(tracks),
         "--every", "4", "--panel", "--annotate", "box,label,trace", "--color-by", "id"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    sizes = frame_sizes(target)
    assert len(sizes) == FRAMES
    assert sizes[0][0] > 320
    assert sizes[0][1] == 180
    documents = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [document["frame"] for document in documents] == list(range(FRAMES))
    found = [row for document in documents for row in document["detections"]]
    assert {row["class_name"] for row in found} == {"dog", "red circle"}
    assert set(found[0]) == {"xyxy", "class_name", "class_id", "confidence", "tracker_id"}
    assert len(tracks.read_text().splitlines()) == len(found)
    *counts, last = result.stdout.splitlines()
    assert counts[0].startswith("dog         1 object, on ")
    assert counts[1].startswith("red circle  1 object, on ")
    assert last.startswith(f"{FRAMES} frames in ")
    assert ", detector ran on 6 " in last
    assert last.endswith(f"; saved {target}, {lines}, {tracks}")
    assert "━" not in result.stderr  # no progress bar without a terminal


def test_json_dash_prints_only_json_lines(clip: Path) -> None:
    result = CliRunner().invoke(app, ["video", str(clip), "dog", *TINY, "--json", "-"])
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["frame"] for line in result.stdout.splitlines()] == list(range(FRAMES))
    assert "dog  1 object" in result.stderr
    assert "saved" not in result.stderr


def test_summary_counts_objects_lines_and_zones(run: Run, frames: Path) -> None:
    result = run("video", "frames", "red", "green,blue", "--every", 1, "--zone", "zones.json", "-o", "out.mp4")
    assert result.exit_code == 0, result.stderr
    *counts, last = result.stdout.splitlines()
    assert counts == [
        "red          1 object, on 10 frames, at most 1 at a time, mean confidence 1.00",
        "green        2 objects, on 4 frames, at most 2 at a time, mean confidence 1.00",
        "blue         nothing found",
        "door (line)  0 in, 1 out (1 red)",
        "left (zone)  2 so far, 1 at the end (1 green)",
    ]
    assert last.startswith("10 frames in ")
    assert ", detector ran on 10 " in last
    assert last.endswith("; saved out.mp4")
    assert frame_sizes("out.mp4") == [(80, 60)] * 10
    assert result.stderr == ""


def test_glob_and_class_options(run: Run, frames: Path) -> None:
    result = run("video", "frames/*.png", "red", "-c", "green,blue", "--mot", "-")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith("1,1,2.00,20.00,20.00,20.00,1.0000,")
    assert [line.split()[0] for line in result.stderr.splitlines()[:3]] == ["red", "green", "blue"]


def test_summary_without_scores_has_no_confidence(run: Run, frames: Path, model: ColorModel) -> None:
    model.has_scores = False
    result = run("video", "frames", "red", "--json", "out.jsonl")
    assert result.stdout.splitlines()[0] == "red  1 object, on 10 frames, at most 1 at a time"


def test_options_reach_annotate_video(run: Run, frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(moondream_cv.video, "annotate_video", lambda *_, **options: asked.update(options))
    options = "--annotate blur --panel --color-by id --no-audio --scene-change --tracker ocsort --confidence 0.5"
    assert run("video", "frames", "red", "-o", "out.mp4", *options.split(), "--bridge", "1.5").exit_code == 0
    assert {name: asked[name] for name in ("annotate", "panel", "color_by", "audio", "show", "every")} == {
        "annotate": "blur",
        "panel": True,
        "color_by": "id",
        "audio": False,
        "show": False,
        "every": "auto",
    }
    assert asked["tracking"].scene_change
    assert asked["tracking"].tracker == "ocsort"
    assert asked["tracking"].bridge_seconds == 1.5
    assert asked["model"].confidence == 0.5


def test_deprecated_colour_by_still_works(run: Run, frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(moondream_cv.video, "annotate_video", lambda *_, **options: passed.update(options))
    result = run("video", "frames", "red", "-o", "out.mp4", "--colour-by", "id")
    assert (result.exit_code, passed["color_by"]) == (0, "id")
    assert "Warning: --colour-by is deprecated and will be removed in 0.2; use --color-by" in result.stderr
    assert "--colour-by" not in run("video", "--help").stdout


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("frames -o out.mp4", 2, "class names are missing; add them after the source"),
        ("frames red", 2, "an output is missing; add -o out.mp4"),
        ("frames red red -o out.mp4", 2, "class names must be unique; duplicates"),
        ("one.png two.jpg red -o out.mp4", 2, "class names must not be files, got 'two.jpg'"),
        ("missing.mp4 red -o out.mp4", 1, "'missing.mp4': no such file or folder"),
        ("broken.mp4 red -o out.mp4", 1, "broken.mp4"),
        ("frames red -o out.mp4 --annotate boks", 2, "'boks' is unknown; use any of box, label"),
        ("frames red -o out.mp4 --bridge nan", 2, "bridge_seconds must be 0 or more seconds, got nan"),
        ("frames red -o out.mp4 --every 0", 2, "an integer of at least 1, got 0"),
        ("frames red -o out.mp4 --every often", 2, "got 'often'"),
        ("frames red -o out.mp4 --tracker magic", 2, "got 'magic'"),
        ("frames red -o out.mp4 --color-by size", 2, "got 'size'"),
        ("frames red -o nowhere/out.mp4", 1, "nowhere/out.mp4 cannot be written: there is no folder"),
        ("frames red -o out.avi", 1, "use out.mp4"),
        ("frames red -o .", 1, ". is a folder"),
        ("frames red --json nowhere/out.jsonl", 1, "nowhere/out.jsonl cannot be written: there is no folder"),
        ("frames red --mot frames", 1, "frames is a folder"),
        ("frames red --json=", 2, "--json must not be empty; name a file"),
        ("frames red --json - --mot -", 2, "--mot and --json both write to -"),
        ("frames red --json out --mot ./out", 2, "choose another file for --mot"),
        ("one.png red --json one.png", 2, "--json one.png would replace an input file"),
        ("frames red --mot zones.json --zone zones.json", 2, "zones.json would replace an input file"),
        ("frames red -o out.mp4 --zone broken.json", 1, "broken.json is not JSON"),
        ("frames red -o out.mp4 --zone empty.json", 2, 'empty.json has neither "lines" nor "zones"'),
        (
            "frames red -o out.mp4 --zone typo.json",
            2,
            'typo.json: lines[0] "door": unknown key "strat"; did you mean "start"',
        ),
        (
            "frames red -o out.mp4 --zone anchor.json",
            2,
            '"triggering_anchors" has the unknown anchor "FEET"; use any of "CE',
        ),
        ("frames/%04d.png red -o out.mp4", 1, "matches no file; the folder has 10 images, such as '0.png'"),
        ("nowhere/%d.png red -o out.mp4", 1, "'nowhere/%d.png' matches no file; there is no folder 'nowhere'"),
        ("frames red -o out.mp4 --fps 0", 2, "fps must be between 0.001 and 1000, got 0"),
        ("frames red -o out.mp4 --fps nan", 2, "fps must be between 0.001 and 1000, got nan"),
        ("anim.webp red -o out.mp4 --fps 5", 2, "'anim.webp' has frame times, so omit fps"),
        ("frames red -o out.mp4 --model other", 1, "there is no model 'other'"),
        ("frames red -o out.mp4 --device tpu", 2, "there is no device 'tpu'"),
    ],
)
def test_errors_print_one_line_before_files_are_written(
    arguments: str, status: int, message: str, run: Run, frames: Path, model: ColorModel
) -> None:
    for name in ("broken.mp4", "broken.json"):
        Path(name).write_text('{"lines":')
    Path("empty.json").write_text("{}")
    door = {"name": "door", "end": [40, 0]}
    Path("typo.json").write_text(json.dumps({"lines": [{**door, "strat": [40, 60]}]}))
    Path("anchor.json").write_text(json.dumps({"lines": [{**door, "start": [40, 60], "triggering_anchors": ["FEET"]}]}))
    _animation("anim.webp")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = run("video", *arguments.split())
    assert result.exit_code == status
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert model.runs == []


def _animation(path: str) -> None:
    """Write the images of the folder as an animation: 40 ms per frame, the last one for a second."""
    images = [Image.open(f"frames/{number}.png") for number in range(10)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[40] * 9 + [1000], lossless=True)


def times_of(path: str) -> list[float]:
    return [json.loads(line)["time"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("source", ["frames", "frames/%d.png", "frames/*.png"])
def test_fps_is_the_frame_rate_of_images(run: Run, frames: Path, source: str) -> None:
    result = run("video", source, "red", "--every", 1, "--fps", 5, "--json", "out.jsonl", "-o", "out.mp4")
    assert result.exit_code == 0
    assert times_of("out.jsonl") == pytest.approx([number / 5 for number in range(10)])
    with av.open("out.mp4") as container:
        assert container.streams.video[0].average_rate == 5


@pytest.mark.parametrize("name", ["anim.webp", "anim.png", "anim.gif"])
def test_animation_works_as_video_and_as_image(run: Run, frames: Path, name: str) -> None:
    _animation(name)
    assert run("video", name, "red", "--every", 1, "--json", "out.jsonl", "-o", "out.mp4").exit_code == 0
    assert times_of("out.jsonl") == pytest.approx([number / 25 for number in range(10)])
    assert len(frame_sizes("out.mp4")) == 10
    found = run("detect", name, "-c", "red", "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["images"][0]["objects"][0]["xyxy"] == pytest.approx(
        [2, 20, 22, 40], abs=1
    )  # first frame


def test_gaps_in_a_pattern_are_logged_once(run: Run, frames: Path, caplog: pytest.LogCaptureFixture) -> None:
    (frames / "4.png").unlink()
    assert run("video", "frames/%d.png", "red", "--json", "out.jsonl").exit_code == 0
    assert [record.message for record in caplog.records if "gaps in the numbers" in record.message] == [
        "'frames/%d.png': gaps in the numbers from 0 to 9, 1 missing, the first is 4; the frames around a gap are "
        "consecutive"
    ]


def test_detector_options_apply(run: Run, frames: Path) -> None:
    def tracks(*options: object) -> set[str]:
        result = run("video", frames, "red,green", "--json", "-", "--every", 1, *options)
        assert result.exit_code == 0, result.stderr
        return {item["class_name"] for line in result.stdout.splitlines() for item in json.loads(line)["detections"]}

    assert tracks() == {"red", "green"}
    assert tracks("--min-size", 15) == {"red"}
    assert tracks("--max-area", 0.05) == {"green"}
    assert tracks("--max-objects", 1, "--nms", 0.5) == {"red", "green"}


def test_classes_file_adds_class_names(run: Run, frames: Path) -> None:
    Path("names.txt").write_text("red\n")
    assert run("video", frames, "--classes-file", "names.txt", "--json", "tracks.jsonl").exit_code == 0
    assert "red" in Path("tracks.jsonl").read_text()
    twice = run("video", frames, "red", "--classes-file", "names.txt", "--json", "-")
    assert (twice.exit_code, "duplicates: 'red'" in twice.stderr) == (2, True)


@pytest.mark.parametrize("option", ["--json", "--mot", "--output"])
def test_existing_files_are_replaced_only_on_request(run: Run, frames: Path, option: str) -> None:
    target = Path("out.mp4" if option == "--output" else "out.txt")
    target.write_bytes(b"mine")
    result = run("video", frames, "red", option, target, "-m", "unknown")
    assert (result.exit_code, f"{option}: {target} exists; add --overwrite" in result.stderr) == (2, True)
    assert target.read_bytes() == b"mine"
    assert run("video", frames, "red", option, target, "--overwrite").exit_code == 0
    assert target.read_bytes() != b"mine"


def test_quiet_prints_neither_progress_nor_notices(run: Run, frames: Path) -> None:
    assert run("video", frames, "red", "--json", "-", "-q").stderr == ""


def test_help_shows_a_zone_file_that_is_valid(run: Run) -> None:
    text = run("video", "--help").stdout
    start = text.index('{"normalized"')
    data, _ = json.JSONDecoder().raw_decode(text[start:])
    assert {"lines", "zones"} < {*data}
    moondream_cv.video.Zones.from_dict(data)
    assert "Lines and zones" in text


def test_input_video_is_never_replaced(run: Run, clip: Path) -> None:
    content = clip.read_bytes()
    result = run("video", clip, "red", "-o", clip)
    assert result.exit_code == 2
    assert f"--output {clip} would replace an input file" in result.stderr
    assert clip.read_bytes() == content


def test_zone_outside_the_frame_is_rejected(run: Run, frames: Path) -> None:
    zones = {"lines": [{"name": "far", "start": [500, 0], "end": [500, 9]}]}
    Path("zones.json").write_text(json.dumps(zones))
    result = run("video", "frames", "red", "--zone", "zones.json", "-o", "out.mp4")
    assert result.exit_code == 2
    assert 'zones.json: line "far"' in result.stderr
    assert not Path("out.mp4").exists()


def test_undecodable_frames_are_reported(run: Run, frames: Path) -> None:
    (frames / "5.png").write_bytes(b"junk")
    result = run("video", "frames", "red", "--json", "-")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 9
    assert "Warning: 1 frame could not be decoded and was skipped" in result.stderr


def test_frames_with_model_errors_are_reported(run: Run, frames: Path) -> None:
    cv2.imwrite("frames/5.png", color_frame(("magenta", (0, 0, 80, 60))))
    result = run("video", "frames", "red", "--every", 1, "--json", "out.jsonl")
    assert result.exit_code == 0
    assert "Warning: the model failed on 1 of 10 frames" in result.stderr
    assert len(Path("out.jsonl").read_text().splitlines()) == 10


def test_model_error_on_every_frame_exits_with_1(run: Run, frames: Path) -> None:
    for path in frames.iterdir():
        cv2.imwrite(str(path), color_frame(("magenta", (0, 0, 80, 60))))
    result = run("video", "frames", "red", "--every", 1, "--json", "out.jsonl")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "red  nothing found"
    assert "Warning: the model failed on every frame" in result.stderr


# --- separate processes ---


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom moondream_cv.cli import main\nsys.argv = ['moondream-cv', 'video', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'cv2', 'supervision', 'PIL', 'numpy', 'av'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "$ moondream-cv video" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_command_completes_its_files(
    tmp_path: Path, processes: list[subprocess.Popen[str]], number: signal.Signals, status: int
) -> None:
    write_clip(tmp_path / "long.mp4", [np.full((96, 160, 3), number % 250, np.uint8) for number in range(3000)])
    arguments = ("long.mp4", "dog", *TINY, "-o", "out.mp4", "--json", "out.jsonl", "--every", "1")
    running = process(*arguments, cwd=tmp_path)
    processes.append(running)
    wait_for_lines(tmp_path / "out.jsonl", 20)
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=240)
    assert running.returncode == status, stderr
    assert "Traceback" not in stderr
    assert stdout.splitlines()[0] == "dog  nothing found"
    assert stdout.splitlines()[1].startswith("Stopped after ")
    assert "saved out.mp4, out.jsonl" in stdout
    frames = int(stdout.splitlines()[1].split()[2])
    # A frame written when the signal arrived may not be counted.
    assert 19 <= frames < 3000
    assert 0 <= len(frame_sizes(tmp_path / "out.mp4")) - frames <= 1
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert 0 <= len(lines) - frames <= 1
    assert [json.loads(line)["frame"] for line in lines] == list(range(len(lines)))
    assert {path.name for path in tmp_path.iterdir()} == {"long.mp4", "out.mp4", "out.jsonl"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
def test_full_disk_is_reported_with_the_number_of_saved_frames(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    import resource

    noise = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    write_clip(tmp_path / "long.mp4", [np.roll(noise, 7 * number, 1) for number in range(400)])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    running = process("long.mp4", "dog", *TINY, "-o", "out.mp4", "--every", "100", cwd=tmp_path, preexec_fn=limit)
    processes.append(running)
    stdout, stderr = running.communicate(timeout=240)
    saved = len(frame_sizes(tmp_path / "out.mp4"))
    assert running.returncode == 1, stderr
    assert "out.mp4 cannot be written to: File too large; check " in stderr
    frames = int(stdout.splitlines()[1].split()[2])
    assert 0 < saved < frames < 400
    assert f"saved out.mp4 ({saved} of {frames} frames)" in stdout


def test_closed_pipe_ends_the_command_silently(
    tmp_path: Path, clip: Path, processes: list[subprocess.Popen[str]]
) -> None:
    running = process(str(clip), "dog", *TINY, "--every", "1", "--json", "-")
    processes.append(running)
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["frame"] == 0
    running.stdout.close()
    assert running.stderr is not None
    stderr = running.stderr.read()
    assert running.wait(240) == 1
    assert "Traceback" not in stderr
    assert "Error" not in stderr
    assert "Exception ignored" not in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_progress_bar_is_shown_on_a_terminal(
    tmp_path: Path, clip: Path, processes: list[subprocess.Popen[str]]
) -> None:
    import pty

    master, slave = pty.openpty()
    running = process(str(clip), "dog", *TINY, "--json", "-", stderr=slave)
    processes.append(running)
    os.close(slave)
    stdout = running.communicate(timeout=240)[0]
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux reports a closed terminal this way
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert running.returncode == 0
    assert f"{FRAMES}/{FRAMES}" in seen.decode()
    assert "detector" in seen.decode()
    assert [json.loads(line)["frame"] for line in stdout.splitlines()] == list(range(FRAMES))
