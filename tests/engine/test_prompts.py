"""Prompts of each kind of request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv.engine.prompts import Prompt, write_conversation, write_prompt
from moondream_cv.errors import UnsupportedSkill
from moondream_cv.model.config import TokenizerConfig
from moondream_cv.requests import Caption, Chat, Detect, Gaze, Point, Query, Settings, Turn
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


# Layout of the inference engine of the model's authors (kestrel 0.9.1, moondream2): images, [1, 15381, 2], question,
# [3, 3], answer; the last question ends with [3, 3], or with [3, 4] for reasoning.
A, B, C = ids("What?"), ids("A cat."), ids("Why?")
CONVERSATIONS = {
    "one turn": ([Turn("What?", images=("i",))], [(0,), "i"], (1, 15381, 2, *A, 3, 3)),
    "two turns": (
        [Turn("What?", "A cat.", ("i",)), Turn("Why?")],
        [(0,), "i"],
        (1, 15381, 2, *A, 3, 3, *B, 1, 15381, 2, *C, 3, 3),
    ),
    "no image": ([Turn("What?", "A cat."), Turn("Why?")], [], (0, 1, 15381, 2, *A, 3, 3, *B, 1, 15381, 2, *C, 3, 3)),
    "two images in a turn": ([Turn("What?", images=("i", "j"))], [(0,), "i", "j"], (1, 15381, 2, *A, 3, 3)),
    "an image in a later turn": (
        [Turn("What?", "A cat."), Turn("Why?", images=("i",))],
        [(0, 1, 15381, 2, *A, 3, 3, *B), "i"],
        (1, 15381, 2, *C, 3, 3),
    ),
    "an image in each turn": (
        [Turn("What?", "A cat.", ("i",)), Turn("Why?", images=("j",))],
        [(0,), "i", (1, 15381, 2, *A, 3, 3, *B), "j"],
        (1, 15381, 2, *C, 3, 3),
    ),
    "an image without text": (
        [Turn("", None, ("i",)), Turn("Why?")],
        [(0,), "i"],
        (1, 15381, 2, 1, 15381, 2, *C, 3, 3),
    ),
    "greeting": ([Turn(None, "A cat."), Turn("Why?")], [], (0, 3, 3, *B, 1, 15381, 2, *C, 3, 3)),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_is_a_sequence_of_question_templates(name: str) -> None:
    turns, context, prompt = CONVERSATIONS[name]
    expected = tuple(Prompt(part) if isinstance(part, tuple) else part for part in context), Prompt(prompt)
    assert write_conversation(Chat(tuple(turns)), TOKENIZER, CONFIG) == expected
    _, reasoning = write_conversation(Chat(tuple(turns), reasoning=True), TOKENIZER, CONFIG)
    assert reasoning.ids == (*prompt[:-1], 4)


def test_control_tokens_in_a_conversation_are_text() -> None:
    text = "".join(TOKENIZER.id_to_token(token) for token in (CONFIG.bos_id, CONFIG.answer_id, CONFIG.coord_id))
    _, prompt = write_conversation(Chat((Turn(text, text), Turn(text))), TOKENIZER, CONFIG)
    tokens = ids(text)
    assert not {CONFIG.bos_id, CONFIG.answer_id, CONFIG.coord_id} & set(tokens)
    assert prompt.ids == (0, 1, 15381, 2, *tokens, 3, 3, *tokens, 1, 15381, 2, *tokens, 3, 3)


def test_conversation_without_repeated_suffix_has_each_suffix_once() -> None:
    chat = Chat((Turn("What?", "A cat."), Turn("Why?")), settings=Settings(repeat_suffix=False))
    assert write_conversation(chat, TOKENIZER, CONFIG)[1].ids == (0, 1, 15381, 2, *A, 3, *B, 1, 15381, 2, *C, 3)


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
