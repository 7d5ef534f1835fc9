"""Writers of JSON lines and MOT files, and the window. Run with `pytest tests/video/test_writers.py`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.base import Writer
from moondream_cv.video.writers.json_lines import JsonLinesWriter
from moondream_cv.video.writers.mot import MotWriter
from moondream_cv.video.writers.window import Window

NOTHING = sv.Detections.empty()


def frame_of(index: int, at: float = 0.0) -> Frame:
    return Frame(np.zeros((60, 80, 3), np.uint8), index, at)


def dogs(tracker_id: list[int] | None = None) -> sv.Detections:
    return sv.Detections(
        xyxy=np.array([[1.234, 2.0, 30.567, 40.999], [-0.001, 0.0, 5.0, 6.0]], np.float32),
        confidence=np.array([0.9, 0.123456], np.float32),
        class_id=np.array([0, 3]),
        tracker_id=None if tracker_id is None else np.array(tracker_id),
        data={"class_name": np.array(["dog", "Hündchen"])},
    )


class TestJsonLines:
    def test_one_line_per_frame(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        with JsonLinesWriter(path) as writer:
            writer.write(frame_of(0, 0.0), dogs([7, -1]))
            writer.write(frame_of(1, 1 / 30), NOTHING)
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        first = {"xyxy": [1.23, 2.0, 30.57, 41.0], "class_name": "dog", "class_id": 0, "confidence": 0.9}
        second = {"xyxy": [0.0, 0.0, 5.0, 6.0], "class_name": "Hündchen", "class_id": 3, "confidence": 0.1235}
        assert lines == [
            {"frame": 0, "time": 0.0, "detections": [first | {"tracker_id": 7}, second | {"tracker_id": None}]},
            {"frame": 1, "time": 0.033333, "detections": []},
        ]
        assert "-0.0" not in path.read_text("utf-8")

    def test_unknown_values_are_null(self) -> None:
        stream = io.StringIO()
        bare = sv.Detections(xyxy=np.array([[0.0, 0.0, 5.0, np.nan]]), confidence=np.array([np.nan]))
        JsonLinesWriter(stream).write(frame_of(2, float("nan")), bare)
        line = json.loads(stream.getvalue(), parse_constant=pytest.fail)
        assert line["time"] is None
        assert line["detections"] == [
            {"xyxy": [0, 0, 5, None], "class_name": None, "class_id": None, "confidence": None, "tracker_id": None}
        ]

    def test_every_line_is_flushed(self, tmp_path: Path) -> None:
        writer = JsonLinesWriter(tmp_path / "a.jsonl")
        for index in range(3):
            writer.write(frame_of(index), NOTHING)
            assert len((tmp_path / "a.jsonl").read_text().splitlines()) == index + 1
        writer.close()
        writer.close()
        with pytest.raises(VideoError, match=r"a\.jsonl is closed"):
            writer.write(frame_of(3), NOTHING)

    def test_text_streams_stay_open(self, capsys: pytest.CaptureFixture[str]) -> None:
        stream = io.StringIO()
        for target in (stream, "-"):
            with JsonLinesWriter(target) as writer:
                writer.write(frame_of(0), NOTHING)
        assert stream.getvalue() == capsys.readouterr().out == '{"frame": 0, "time": 0.0, "detections": []}\n'
        print("still open")
        stream.close()
        with pytest.raises(VideoError, match="cannot be written to: I/O operation on closed file"):
            JsonLinesWriter(stream).write(frame_of(0), NOTHING)


class TestMot:
    def test_output_is_readable_by_trackers(self, tmp_path: Path) -> None:
        mot = pytest.importorskip("trackers.io.mot")
        path = tmp_path / "mot.txt"
        with MotWriter(path) as writer:
            writer.write(frame_of(0), dogs([0, 12]))
            writer.write(frame_of(1), dogs())
            writer.write(frame_of(2), NOTHING)
            writer.write(frame_of(3), dogs([-1, 12]))
        assert path.read_text().splitlines()[0] == "1,0,1.23,2.00,29.33,39.00,0.9000,-1,-1,-1"
        frames = mot.load_mot_file(path)
        assert {number: frame.ids.tolist() for number, frame in frames.items()} == {1: [0, 12], 4: [12]}
        np.testing.assert_allclose(frames[1].boxes, [[1.23, 2, 29.33, 39], [0, 0, 5, 6]], atol=0.011)
        np.testing.assert_allclose(frames[1].confidences, [0.9, 0.1235], atol=1e-4)

    def test_confidence_defaults_to_1(self) -> None:
        stream = io.StringIO()
        boxes = sv.Detections(xyxy=np.array([[0.0, 1, 5, 6], [np.nan, 0, 1, 1]]), tracker_id=np.array([3, 4]))
        MotWriter(stream).write(frame_of(9), boxes)
        assert stream.getvalue() == "10,3,0.00,1.00,5.00,5.00,1.0000,-1,-1,-1\n"

    def test_missing_track_ids_log_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with MotWriter(tmp_path / "mot.txt") as writer:
            writer.write(frame_of(0), dogs())
        writer.close()
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path / 'mot.txt'} is empty: no detection had a track ID; track before writing"
        ]


@pytest.mark.parametrize("kind", [JsonLinesWriter, MotWriter])
class TestTextTargets:
    def test_unwritable_targets_are_rejected(self, tmp_path: Path, kind: type[JsonLinesWriter | MotWriter]) -> None:
        (tmp_path / "file").write_text("")
        for name, message in (
            ("none/a.txt", "there is no folder .*none; create it first"),
            ("file/a.txt", "file is not a folder; choose another path"),
            (".", "is a folder; pass a file in it"),
            ("nul\0", "cannot be written: embedded null"),
        ):
            with pytest.raises(VideoError, match=message) as caught:
                kind(tmp_path / name)
            assert str(caught.value).startswith(str(tmp_path / name))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk_is_reported(self, kind: type[JsonLinesWriter | MotWriter]) -> None:
        writer = kind("/dev/full")
        for _ in range(2):
            with pytest.raises(VideoError, match=r"^/dev/full cannot be written to: No space left on device"):
                writer.write(frame_of(0), dogs([1, 2]))
        writer.close()
        writer.close()

    def test_lines_before_an_exception_are_kept(self, tmp_path: Path, kind: type[JsonLinesWriter | MotWriter]) -> None:
        def fail() -> None:
            with kind(tmp_path / "a.txt") as writer:
                writer.write(frame_of(0), dogs([1, 2]))
                raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="in the middle"):
            fail()
        assert (tmp_path / "a.txt").read_text().count("\n") >= 1


class Failing(Writer):
    def write(self, frame: Frame, detections: sv.Detections) -> None:
        raise VideoError("the write failed")

    def close(self) -> None:
        raise VideoError("the close failed")


def test_first_error_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(VideoError, match="the write failed"), Failing() as writer:
        writer.write(frame_of(0), NOTHING)
    assert "the close failed" in caplog.text
    with pytest.raises(VideoError, match="the close failed"), Failing():
        pass


WITHOUT_WINDOWS = """
import sys, types
cv2 = types.ModuleType("cv2")
cv2.error = type("error", (Exception,), {})
def namedWindow(*arguments):
    raise cv2.error("The function is not implemented. Rebuild the library")
cv2.namedWindow = namedWindow
cv2.WINDOW_NORMAL = cv2.WINDOW_KEEPRATIO = cv2.WINDOW_GUI_NORMAL = 0
sys.modules["cv2"] = cv2
"""
SHOW = """
from moondream_cv.errors import VideoError
from moondream_cv.video.writers.window import Window
try:
    Window("dogs")
except VideoError as error:
    print(error)
"""


class FakeScreen:
    """Replace the OpenCV functions of a window, and simulate user input."""

    WINDOW_NORMAL, WINDOW_KEEPRATIO, WINDOW_GUI_NORMAL, WND_PROP_VISIBLE = 0, 0, 16, 4
    error = type("error", (Exception,), {})

    def __init__(self) -> None:
        self.key, self.visible, self.calls = -1, 1.0, list[str]()

    def namedWindow(self, title: str, flags: int) -> None:
        self.calls.append("open")

    def resizeWindow(self, title: str, width: int, height: int) -> None:
        self.calls.append(f"{width}x{height}")

    def imshow(self, title: str, image: np.ndarray) -> None:
        self.calls.append("show")

    def waitKey(self, milliseconds: int) -> int:
        return self.key

    def getWindowProperty(self, title: str, number: int) -> float:
        return self.visible

    def destroyWindow(self, title: str) -> None:
        self.calls.append("close")
        if not self.visible:
            raise self.error("no such window")


class TestWindow:
    @pytest.fixture
    def screen(self, monkeypatch: pytest.MonkeyPatch) -> FakeScreen:
        screen = FakeScreen()
        monkeypatch.setitem(sys.modules, "cv2", screen)
        monkeypatch.setattr("moondream_cv.video.writers.window._check_screen", lambda title: None)
        return screen

    @pytest.mark.parametrize(("key", "visible"), [(ord("q"), 1.0), (27, 1.0), (-1, 0.0), (0x100000 | 27, 1.0)])
    def test_keys_and_close_button_close_the_window(self, screen: FakeScreen, key: int, visible: float) -> None:
        with Window("dogs") as window:
            window.write(frame_of(0), NOTHING)
            window.write(Frame(np.zeros((2160, 3840, 3), np.uint8), 1, 0.1), NOTHING)
            assert not window.closed
            screen.key, screen.visible = key, visible
            window.write(frame_of(2), NOTHING)
            assert window.closed
            window.write(frame_of(3), NOTHING)
        assert screen.calls == ["open", "80x60", "show", "show", "show", "close"]

    def test_large_frames_fit_the_screen(self, screen: FakeScreen) -> None:
        window = Window("dogs")
        window.write(Frame(np.zeros((2160, 3840, 3), np.uint8), 0, 0.0), NOTHING)
        window.close()
        window.close()
        assert window.closed
        assert screen.calls == ["open", "1280x720", "show", "close"]

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no DISPLAY")
    @pytest.mark.parametrize(("display", "message"), [("", "DISPLAY is not set"), (":987", "no screen answers at")])
    def test_missing_screen_is_reported(self, monkeypatch: pytest.MonkeyPatch, display: str, message: str) -> None:
        if display and not any(
            Path(folder).glob("libxcb.so.1") for folder in ("/usr/lib", "/usr/lib/x86_64-linux-gnu")
        ):
            pytest.skip("nothing to ask the X server with")
        monkeypatch.setenv("DISPLAY", display)
        for name in ("WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(VideoError, match=f"the window 'dogs' cannot be shown: .*{message}"):
            Window("dogs")

    def test_opencv_without_window_support_is_reported(self) -> None:
        said = self.output(WITHOUT_WINDOWS + SHOW)
        assert "the window 'dogs' cannot be shown: The function is not implemented" in said
        assert "opencv-python-headless" in said

    def test_missing_opencv_is_reported(self) -> None:
        assert "pip install opencv-python" in self.output("import sys\nsys.modules['cv2'] = None\n" + SHOW)

    @staticmethod
    def output(program: str) -> str:
        # With another QT_QPA_PLATFORM than xcb, OpenCV decides whether there is a screen.
        environment = os.environ | {"QT_QPA_PLATFORM": "offscreen"}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=environment).stdout
