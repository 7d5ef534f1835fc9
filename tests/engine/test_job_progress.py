"""Texts that a local model reports while it runs, for each kind of call."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moondream_cv import progress
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.loading import load
from moondream_cv.progress import showing_on
from moondream_cv.requests import Caption, Detect, Point, Query, Settings
from tests.helpers.recording_display import Recorder

FEW = Settings(max_objects=3, max_tokens=12)


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A display of every update from the start of an operation."""
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "REFRESH_INTERVAL", 0)
    recorder = Recorder()
    with showing_on(recorder):
        yield recorder


def test_one_class(model: LocalModel, frame: np.ndarray, display: Recorder) -> None:
    model.run([Detect(frame, "dog", FEW)])
    crops = len(model.encode_image(frame).crops)
    display.texts = display.texts[: display.texts.index("") + 1]
    assert display.texts[0] == f"Encoding image: 0.0 of {crops} crops"
    assert display.matches(rf"Encoding image: {crops}\.0 of {crops} crops")
    layers = model.config.text.n_layers
    assert display.matches(r"Prefilling image: \d+ of \d+ layers")[-1].endswith(f"{layers - 1} of {layers} layers")
    assert display.texts[-1] == ""
    assert display.matches("Detecting 'dog': 1 object")
    assert display.matches("Detecting 'dog': 2 objects")


def test_points(model: LocalModel, frame: np.ndarray, display: Recorder) -> None:
    model.run([Point(frame, "dog", FEW)])
    assert display.matches("Pointing at 'dog': 2 points")


def test_several_classes(model: LocalModel, frame: np.ndarray, display: Recorder) -> None:
    model.run([Detect(frame, "dog", Settings(max_objects=1)), Detect(frame, "cat", FEW)])
    assert display.texts[0].startswith("0 of 2 requests; encoding image: 0.0 of ")
    assert display.matches("0 of 2 requests")
    assert display.texts[-2:] == ["1 of 2 requests, 3 objects", ""]


def test_several_images(model: LocalModel, frame: np.ndarray, display: Recorder) -> None:
    crops = len(model.encode_image(frame).crops)
    display.texts.clear()
    requests = [Caption(frame, "short", Settings(max_tokens=2)), Caption(frame[::-1], "short", FEW)]
    model.run(requests)
    assert display.matches(rf"0 of 2 requests; encoding 2 images: {2 * crops}\.0 of {2 * crops} crops")
    assert display.matches(r"0 of 2 requests; prefilling 2 images: 0 of \d+ layers")
    assert display.texts[-2:] == ["1 of 2 requests", ""]


def test_words_of_answers_and_captions(display: Recorder) -> None:
    with load("tiny", device="cpu") as tiny:
        image = np.full((96, 96, 3), 200, np.uint8)
        caption = tiny.caption(image)["caption"]
        words = display.matches("Captioning: .*")
        assert len(caption.split()) > 2
        assert words[-1] == f"Captioning: {caption.rpartition(' ')[0].strip()}"
        assert len(set(words)) > 2
        tiny.query(image, "What color is the circle?", reasoning=True)
    assert display.matches("Reasoning: 1 token")
    assert display.matches("Answering: .*")


def test_long_texts_are_cut_to_the_last_words(display: Recorder, model: LocalModel, frame: np.ndarray) -> None:
    from moondream_cv.engine.job_progress import MAX_CHARACTERS, describe_jobs

    scheduler = model.scheduler()
    job = scheduler.submit(Query(frame, "What?", settings=FEW))
    assert describe_jobs([job]) == "Answering"
    scheduler.step()
    assert job.sequence is not None
    job.sequence.pieces = ["word "] * 40
    text = describe_jobs([job])
    assert re.fullmatch(r"Answering: \.\.\.(word ?)+", text)
    assert len(text) <= MAX_CHARACTERS + len("Answering: ...")


def test_streams_show_no_words(display: Recorder) -> None:
    with load("tiny", device="cpu") as tiny:
        display.texts.clear()
        pieces = tiny.stream(Caption(np.full((96, 96, 3), 200, np.uint8), "short"))
        first = next(pieces)
        assert display.matches("Encoding image: .*")
        assert display.texts[-1] == ""
        shown = len(display.texts)
        assert first + "".join(pieces)
        assert len(display.texts) == shown


def test_loading(display: Recorder) -> None:
    load("tiny", device="cpu").close()
    assert display.texts[0].startswith("Loading weights: 0.0 of ")
    assert display.texts[-1] == ""
    done, total = re.findall(r"[\d.]+", display.texts[-2])
    assert done == total


def test_schedulers_and_other_threads_show_nothing(model: LocalModel, frame: np.ndarray, display: Recorder) -> None:
    scheduler = model.scheduler()
    scheduler.submit(Detect(frame, "dog", FEW))
    while scheduler.step():
        pass
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.run, [Detect(frame, "dog", FEW)]).result()
    assert display.texts == []


def test_show_progress_turns_it_off_for_a_model(model: LocalModel, frame: np.ndarray, display: Recorder) -> None:
    quiet = copy.copy(model)
    quiet.show_progress = False
    quiet.run([Detect(frame, "dog", FEW)])
    quiet.encode_image(frame)
    assert display.texts == []
    assert not copy.deepcopy(quiet).show_progress


@pytest.mark.parametrize("stage", ["Encoding image: ", "Prefilling image: ", "Detecting 'dog': 1 "])
def test_model_is_usable_after_ctrl_c(model: LocalModel, frame: np.ndarray, display: Recorder, stage: str) -> None:
    class Interrupting(Recorder):
        def show(self, text: str) -> None:
            super().show(text)
            if text.startswith(stage):
                raise KeyboardInterrupt

    expected = model.run([Detect(frame, "dog", FEW)])
    interrupting = Interrupting()
    with showing_on(interrupting), pytest.raises(KeyboardInterrupt):
        model.run([Detect(frame, "dog", FEW)])
    assert interrupting.texts[-1] == ""
    assert model.run([Detect(frame, "dog", FEW)]) == expected
