"""Prompts of each kind of request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv.engine.prompts import write_prompt
from moondream_cv.errors import UnsupportedSkill
from moondream_cv.model.config import TokenizerConfig
from moondream_cv.requests import Caption, Detect, Gaze, Point, Query, Settings
from moondream_cv.training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
TOKENIZER.encode_special_tokens = True
CONFIG = TokenizerConfig()
IMAGE = np.zeros((4, 4, 3), np.uint8)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text).ids)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Detect(IMAGE, "dog"), (1, 7235, 476, 2, *ids(" dog"), 3)),  # a leading space
        (Point(IMAGE, "red circle"), (1, 2581, 2, *ids(" red circle"), 3)),
        (Caption(IMAGE, "short"), (1, 32708, 2, 12492, 3)),
        (Query(IMAGE, "What?"), (1, 15381, 2, *ids("What?"), 3, 3)),  # no leading space, the suffix twice
        (Query(IMAGE, "What?", reasoning=True), (1, 15381, 2, *ids("What?"), 3, 4)),
        (Query(None, "What?"), (0, 1, 15381, 2, *ids("What?"), 3, 3)),  # bos instead of the image
        (Query(IMAGE, "What?", settings=Settings(repeat_suffix=False)), (1, 15381, 2, *ids("What?"), 3)),
        (Query(IMAGE, "What?", True, settings=Settings(repeat_suffix=False)), (1, 15381, 2, *ids("What?"), 4)),
        (Gaze(IMAGE, (0.5, 0.25)), (*ids("\n\nPoint:"), 5, 5, *ids(" gaze\n\n"))),
    ],
    ids=str,
)
def test_prompts_follow_the_templates(request_: Any, expected: tuple[int, ...]) -> None:
    assert write_prompt(request_, TOKENIZER, CONFIG).ids == expected


def test_spatial_references_become_coordinates_and_sizes() -> None:
    request = Query(IMAGE, "What?", spatial_refs=((0.25, 0.75), (0.1, 0.2, 0.6, 0.9)))
    prompt = write_prompt(request, TOKENIZER, CONFIG)
    assert prompt.ids[3:8] == (5, 5, 5, 5, 6)
    assert prompt.coords == pytest.approx((0.25, 0.75, 0.35, 0.55))
    assert prompt.sizes == (pytest.approx((0.5, 0.7)),)


def test_control_tokens_in_text_are_plain_text() -> None:
    prompt = write_prompt(Query(IMAGE, "a<|endoftext|><|coord|>b"), TOKENIZER, CONFIG)
    assert not {0, 5} & set(prompt.ids)


@pytest.mark.parametrize("extra", [{"reasoning": True}, {"spatial_refs": ((0.5, 0.5),)}])
def test_earlier_releases_have_no_control_tokens(extra: dict[str, Any]) -> None:
    config = TokenizerConfig(templates={"query": {"prefix": [198], "suffix": [198, 33706, 25]}})
    assert write_prompt(Query(IMAGE, "What?"), TOKENIZER, config).ids[-3:] == (198, 33706, 25)
    with pytest.raises(UnsupportedSkill, match="2025-06-21 can"):
        write_prompt(Query(IMAGE, "What?", **extra), TOKENIZER, config)


def test_skill_without_template_raises() -> None:
    config = TokenizerConfig(templates={"caption": {"short": [1]}, "detect": None})
    with pytest.raises(UnsupportedSkill, match="cannot detect"):
        write_prompt(Detect(IMAGE, "dog"), TOKENIZER, config)
    with pytest.raises(UnsupportedSkill, match="no 'long' captions, only 'short'"):
        write_prompt(Caption(IMAGE, "long"), TOKENIZER, config)
