"""`moondream-cv query` and `caption`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from moondream_cv.cli import report
from moondream_cv.requests import Caption, Query
from tests.helpers.color_model import ColorModel

Run = Callable[..., Any]


def test_one_image_prints_only_the_text(run: Run, folder: Path) -> None:
    assert run("query", "one.png", "-q", "What is there?").stdout == "1 red, 1 green, 0 blue\n"
    assert run("caption", "one.png").stdout == "A picture of 80 by 60 pixels, normal.\n"


def test_several_images_print_headings(run: Run, folder: Path) -> None:
    result = run("caption", "one.png", "two.jpg", "-l", "short")
    assert result.stdout == (
        "one.png:\nA picture of 80 by 60 pixels, short.\n\ntwo.jpg:\nA picture of 80 by 60 pixels, short.\n\n"
    )


def test_json_has_answers_and_errors(run: Run, folder: Path) -> None:
    result = run("query", "one.png", "missing.png", "-q", "What?", "--reasoning", "--json")
    good, bad = map(json.loads, result.stdout.splitlines())
    assert (good["schema"], good["command"], good["question"]) == (2, "query", "What?")
    assert good["answer"] == "1 red, 1 green, 0 blue"
    assert good["reasoning"]["grounding"] == [{"start_idx": 2, "end_idx": 7, "points": [[0.5, 0.5]]}]
    assert bad == {key: good[key] for key in ("schema", "version", "command", "model", "question")} | {
        "image": "missing.png",
        "error": "'missing.png': no such image file",
    }
    document = json.loads(run("caption", "one.png", "--json").stdout)
    assert document["images"][0]["caption"] == "A picture of 80 by 60 pixels, normal."


def test_reasoning_is_printed_before_the_answer(run: Run, folder: Path) -> None:
    result = run("query", "one.png", "-q", "What?", "--reasoning")
    assert result.stdout == "Reasoning: I count patches.\n\n1 red, 1 green, 0 blue\n"


def test_query_without_an_image(run: Run, folder: Path, model: ColorModel) -> None:
    result = run("query", "-q", "What is 2 + 2?", "--json")
    assert json.loads(result.stdout)["images"] == [{"image": None, "answer": "Nothing to see.", "truncated": False}]
    assert model.runs[0][0].image is None


def test_options_reach_the_request(run: Run, folder: Path, model: ColorModel) -> None:
    run("query", "one.png", "-q", "What?", "--point", "0.25,0.5", "--box", "0,0,.5,1", "--temperature", 0, "--seed", 3)
    (request,) = model.runs[-1]
    assert isinstance(request, Query)
    assert request.spatial_refs == ((0.25, 0.5), (0.0, 0.0, 0.5, 1.0))
    assert (request.settings.temperature, request.settings.seed) == (0, 3)
    run("caption", "one.png", "--length", "long", "--max-tokens", 9)
    (request,) = model.runs[-1]
    assert isinstance(request, Caption)
    assert (request.length, request.settings.max_tokens) == ("long", 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "one.png", "-q", " "], "question must not be empty"),
        (["query", "one.png", "-q", "x", "--point", "3,4"], "fractions of the image between 0 and 1"),
        (["query", "one.png", "-q", "x", "--point", "3"], "must be 2 numbers separated by commas, got '3'"),
        (["query", "one.png", "-q", "x", "--point", "nan,0"], "fractions"),
        (["query", "one.png", "-q", "x", "--box", "0,0,a,1"], "must be 4 numbers"),
        (["query", "one.png", "-q", "x", "--box", "0.5,0,0.1,1"], "positive area"),
        (["query", "-q", "x", "--point", "0,0"], "--point and --box need an image"),
        (["caption", "one.png", "-l", "huge"], "short, normal, long, got 'huge'"),
    ],
)
def test_wrong_arguments_print_one_line_and_exit_with_2(
    arguments: list[str], message: str, run: Run, folder: Path, model: ColorModel
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert model.runs == []


def test_question_is_required(run: Run, folder: Path) -> None:
    assert run("query", "one.png").exit_code == 2


def test_annotated_images_contain_the_text(run: Run, folder: Path) -> None:
    arguments = ("query", "one.png", "-q", "What?", "--reasoning", "--point", "0.2,0.2", "--box", "0,0,1,.5")
    assert run(*arguments, "-o", "q.png").exit_code == 0
    assert run("caption", "one.png", "-o", "c.jpg").exit_code == 0
    for name in ("q.png", "c.jpg"):
        width, height = Image.open(name).size
        assert width == 80
        assert height > 60


def test_text_is_streamed_to_a_terminal(
    run: Run, folder: Path, model: ColorModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def console(stderr: bool) -> Console:
        return Console(stderr=stderr, force_terminal=not stderr, color_system=None, width=80)

    monkeypatch.setattr(report, "_console", console)
    result = run("query", "one.png", "-q", "What?", "--reasoning")
    assert result.stdout == "Reasoning: I count patches.\n\n1 red, 1 green, 0 blue \n"
    assert model.runs == []  # it was streamed
    assert run("caption", "one.png").stdout.startswith("A picture of 80 by 60 pixels, normal.")
    assert run("caption", "missing.png").exit_code == 1
