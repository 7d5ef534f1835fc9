"""The examples about images, with the tiny model on rendered scenes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from moondream_cv.scenes import render_scene
from moondream_cv.scenes.objects import paint, stamp
from tests.examples.conftest import EXAMPLES, RunExample

NAMES = ["dog", "red circle", "blue star", "cat"]
CENTERS = np.array([[160.0, 60.0], [160.0, 120.0], [90.0, 190.0], [230.0, 190.0]])


def example(name: str) -> dict[str, Any]:
    """Return the names that an example defines."""
    return runpy.run_path(str(EXAMPLES / name))


class TestGuiGrounding:
    def test_point_is_on_the_element(self, run_example: RunExample, tmp_path: Path) -> None:
        scene = render_scene(1, resolution_wh=(640, 480), names=NAMES)
        screenshot, output = tmp_path / "screen.png", tmp_path / "marked.png"
        Image.fromarray(scene.image).save(screenshot)
        for item in scene.objects:
            printed = run_example("gui_grounding.py", screenshot, item.name, "--model", "tiny", "--output", output)
            (point,) = re.findall(r"^(\d+) (\d+) \(confidence [01]\.\d\d, 1 found\)$", printed, re.MULTILINE)
            x, y = map(int, point)
            left, top, right, bottom = item.xyxy
            assert left < x < right
            assert top < y < bottom
            changed = (np.asarray(Image.open(output)) != scene.image).any(2)
            rows, columns = np.nonzero(changed)
            assert abs(np.array([columns.mean(), rows.mean()]) - (x, y)).max() < 2
            assert not changed[y, x]  # the element stays visible

    def test_missing_element_is_reported(self, run_example: RunExample, tmp_path: Path) -> None:
        screenshot = tmp_path / "screen.png"
        Image.fromarray(render_scene(1, names=["dog"]).image).save(screenshot)
        with pytest.raises(SystemExit, match=r"screen\.png has no 'banana'; use other words"):
            run_example("gui_grounding.py", screenshot, "banana", "--model", "tiny")


class TestReadGauge:
    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0, -0.05, 1.05])
    @pytest.mark.parametrize("start", [135.0, -30.0])  # degrees of the lowest mark, clockwise from the right
    def test_value_follows_the_angles(self, share: float, start: float) -> None:
        angles = np.radians(start + 270 * np.array([share, 0.0, 0.0, 1.0]))
        radii = np.array([80.0, 0.0, 100.0, 90.0])
        points = np.stack((300 + radii * np.cos(angles), 200 + radii * np.sin(angles)), axis=1)
        assert example("read_gauge.py")["value_at"](points, -20.0, 60.0) == pytest.approx(-20 + 80 * share)

    def test_points_of_no_gauge_are_reported(self) -> None:
        points = np.array([[10.0, 10.0], [10.0, 10.0], [0.0, 20.0], [20.0, 20.0]])
        with pytest.raises(ValueError, match=r"\[10.0, 10.0\].* are not those of a gauge"):
            example("read_gauge.py")["value_at"](points, 0.0, 10.0)

    def test_points_and_answer_are_compared(self, run_example: RunExample, tmp_path: Path) -> None:
        image = render_scene(0, resolution_wh=(320, 240), num_objects=0, style="plain").image.copy()
        for name, (x, y) in zip(NAMES, CENTERS.tolist(), strict=True):
            patch = paint(name, 36.0, np.random.default_rng(0), varied=False)
            stamp(image, patch, round(x - patch.box[2] / 2), round(y - patch.box[3] / 2))
        gauge, output = tmp_path / "gauge.png", tmp_path / "points.png"
        Image.fromarray(image).save(gauge)
        options = ("--model", "tiny", "--output", output, "--phrases")
        lines = run_example("read_gauge.py", gauge, 0, 100, *options, *NAMES).splitlines()
        (value,) = re.findall(r"^points: (\S+) \(lowest confidence [01]\.\d\d\)$", lines[0])
        assert float(value) == pytest.approx(50, abs=3)
        answer = re.search(r"\d+", lines[1].removeprefix("answer: "))
        if answer:
            difference = float(lines[2].removeprefix("difference: "))
            assert difference == pytest.approx(abs(float(value) - int(answer[0])), abs=0.01)
        else:
            assert lines[2] == "difference: the answer has no number"
        assert np.asarray(Image.open(output)).shape == image.shape
        with pytest.raises(SystemExit, match=r"no point for banana in .*gauge\.png"):
            run_example("read_gauge.py", gauge, 0, 100, *options, *NAMES[:3], "banana")


class TestTranscribeDocuments:
    def test_pages_are_cut_between_lines(self) -> None:
        page = Image.new("RGB", (400, 1000), (250, 245, 230))
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(22)
        for y in range(20, 980, 40):
            draw.text((20, y), "Lorem ipsum gypsy", fill=(20, 20, 60), font=font)
        pixels = np.asarray(page)
        for strips in (1, 2, 3, 5):
            parts = example("transcribe_documents.py")["cut"](pixels, strips)
            assert len(parts) == strips
            assert np.array_equal(np.concatenate(parts), pixels)
            for part in parts:
                assert len(part) == pytest.approx(1000 / strips, abs=1000 / strips / 2)
                assert (part[0] == part[0, 0]).all()
                assert (part[-1] == part[-1, 0]).all()

    def test_each_page_becomes_a_file_with_the_answers_of_its_strips(
        self, run_example: RunExample, tmp_path: Path
    ) -> None:
        # Write two pages of two scenes each, and a damaged page
        pages, output = tmp_path / "pages", tmp_path / "texts"
        pages.mkdir()
        for name, counts in ("first.png", (1, 2)), ("second.jpg", (0, 1)):
            scenes = [render_scene(3, resolution_wh=(320, 240), names=["dog"] * n + ["cat"]).image for n in counts]
            gap = np.full((60, 320, 3), 255, np.uint8)
            Image.fromarray(np.concatenate((scenes[0], gap, scenes[1]))).save(pages / name)
        (pages / "third.png").write_bytes(b"no image")
        options = ("--model", "tiny", "--strips", 2, "--prompt", "How many dogs are there?")

        # Transcribe them twice
        with pytest.raises(SystemExit, match=r"pages: 3 pages, 1 failed\n.*third\.png: "):
            run_example("transcribe_documents.py", pages, output, *options)
        texts = {path.name: path.read_text() for path in output.iterdir()}
        assert texts == {"first.png.md": "1\n\n2\n", "second.jpg.md": "0\n\n1\n"}
        (pages / "third.png").unlink()
        (output / "first.png.md").write_text("corrected by hand")
        assert run_example("transcribe_documents.py", pages, output, *options) == ""
        assert (output / "first.png.md").read_text() == "corrected by hand"
