"""Text drawing in many scripts."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image, ImageDraw, ImageFont

from moondream_cv import fonts
from moondream_cv.drawing import annotate
from moondream_cv.fonts import FontFile, font_for, legible, load_font
from moondream_cv.video import Annotator

WITHOUT_FONT = "\U0010fffd"
TEXTS = ("café", "señal", "собака", "€12", "2 × 3", "Ελληνικά", "Ångström", "žluťoučký kůň", "đặc biệt", "…„“")

needs_cjk = pytest.mark.skipif(
    font_for("図") is None, reason="no font has Chinese letters (apt-get install fontconfig fonts-wqy-microhei)"
)


def drawn(text: str, size: int = 24) -> np.ndarray:
    font = load_font(size)
    image = Image.new("L", (400, font.height))
    font.draw(ImageDraw.Draw(image), (0, 0), text, 255)
    return np.asarray(image)


def test_ascii_uses_the_default_font_of_pillow() -> None:
    own = ImageFont.load_default(24)
    expected = Image.new("L", (400, load_font(24).height))
    ImageDraw.Draw(expected).text((0, 0), "red circle #1", fill=255, font=own)
    assert (drawn("red circle #1") == np.asarray(expected)).all()
    assert load_font(24).getlength("red circle #1") == own.getlength("red circle #1")


@pytest.mark.parametrize("text", TEXTS)
def test_european_letters_have_a_font(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert legible(text) == text
    assert not caplog.records
    images = {letter: drawn(letter).tobytes() for letter in dict.fromkeys(text) if not letter.isspace()}
    assert len(set(images.values())) == len(images)  # no letter is drawn as the box for missing letters


@needs_cjk
@pytest.mark.parametrize("text", ["図書館", "图书馆"])
def test_system_fonts_are_used_for_other_scripts(text: str) -> None:
    assert legible(text) == text
    assert len({drawn(letter).tobytes() for letter in text}) == 3
    assert drawn(text).any(1).sum() <= load_font(24).height


def test_letters_without_a_font_are_replaced_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fonts._warned.clear()
    fonts.legible.cache_clear()
    assert legible(f"a{WITHOUT_FONT}é") == "a?é"
    assert legible(f"b{WITHOUT_FONT}\u0301") == "b?"  # the accent of a missing letter is dropped
    (record,) = caplog.records
    assert f"no font has the letters {WITHOUT_FONT}," in record.getMessage()


def test_letters_are_transliterated_if_even_dejavu_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "font_for", lambda letter: None)
    fonts._warned.clear()
    fonts.legible.cache_clear()
    try:
        assert legible("café ½") == "cafe 12"
        assert "no font has the letters é½," in caplog.text
    finally:
        fonts.legible.cache_clear()


def test_accents_are_composed_with_letters() -> None:
    assert legible(unicodedata.normalize("NFD", "señal")) == "señal"


def test_all_fonts_share_a_baseline() -> None:
    for text in ("x", "х", "é"):  # Latin and Cyrillic
        rows = np.flatnonzero(drawn(text, 40).max(1) > 128)
        assert abs(int(rows[-1]) - int(np.flatnonzero(drawn("x", 40).max(1) > 128)[-1])) <= 1


def test_invalid_font_files_have_no_letters(tmp_path: Path) -> None:
    (tmp_path / "text.ttf").write_text("no font")
    assert FontFile(str(tmp_path / "text.ttf")).letters == frozenset()
    assert FontFile(str(tmp_path / "missing.ttf")).letters == frozenset()


@pytest.mark.parametrize("name", ["café", "собака", pytest.param("図書館", marks=needs_cjk)])
def test_images_and_videos_draw_the_same_letters(name: str) -> None:
    """Check that a label differs from a label of question marks of the same length."""

    def detections(text: str) -> sv.Detections:
        return sv.Detections(
            np.array([[20, 60, 120, 120]], np.float32),
            confidence=np.array([0.9], np.float32),
            class_id=np.array([0]),
            data={"class_name": np.array([text])},
        )

    unknown = "?" * len(name)
    image = Image.new("RGB", (320, 240), (200, 200, 200))
    assert np.any(np.asarray(annotate(image, detections(name))) != np.asarray(annotate(image, detections(unknown))))
    frame = np.asarray(image)
    assert np.any(Annotator()(frame, detections(name)) != Annotator()(frame, detections(unknown)))


def test_right_to_left_words_are_one_run() -> None:
    from moondream_cv.video.drawing.panel import _coverage

    text = "كلب أحمر"
    assert legible(text) == text
    width = load_font(24).getlength(text)
    assert _coverage(text, 24).shape[1] == pytest.approx(width, abs=1)
