"""Metrics of answers: exact match, VQA accuracy, ANLS, relaxed accuracy and OCRBench's rule.

Each function scores one answer from 0 to 1. The score of a dataset is the mean over its questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_MIN_SIMILARITY = 0.5  # ANLS counts lower similarities as 0
_MAX_RELATIVE_CHANGE = 0.05  # relaxed accuracy accepts a deviation of 5 %

# The evaluation of VQA restores the apostrophes of these words, if one of them is missing.
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """Return whether an answer equals one of the expected ones, without regard to case and surrounding whitespace.

    Args:
        answer: Answer of the model.
        expected: Accepted answers.
    """
    return float(_plain(answer) in map(_plain, expected))


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """Return the accuracy of VQA: the mean of min(matches / 3, 1) over all choices of all but one expected answer.

    Antol et al., "VQA: Visual Question Answering", 2015 (https://arxiv.org/abs/1505.00468), as visualqa.org evaluates
    it.

    Args:
        answer: Answer of the model.
        expected: Answers of people, usually 10.
    """
    normalized = normalize_vqa_answer(answer)
    matches = [normalize_vqa_answer(one) == normalized for one in expected]
    return sum(min((sum(matches) - match) / 3, 1.0) for match in matches) / len(matches)


def vqa_consensus(answer: str, expected: Sequence[str]) -> float:
    """Return min(matches / 3, 1), the simplified accuracy of VQA that Moondream's evaluation computes.

    Args:
        answer: Answer of the model.
        expected: Answers of people, usually 10.
    """
    normalized = normalize_vqa_answer(answer)
    return min(sum(normalize_vqa_answer(one) == normalized for one in expected) / 3, 1.0)


def normalize_vqa_answer(answer: str) -> str:
    """Return an answer as the evaluation of VQA compares it.

    Punctuation and articles are removed, numbers up to ten are digits, and contractions have their apostrophes.

    Args:
        answer: Answer of a model or of a person.
    """
    text = " ".join(answer.split())
    has_grouped_digits = _GROUPED_DIGITS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        is_dropped = f"{mark} " in text or f" {mark}" in text or has_grouped_digits
        cleaned = cleaned.replace(mark, "" if is_dropped else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, expected: Sequence[str]) -> float:
    """Return the normalized Levenshtein similarity to the nearest expected answer; 0 if it is below 0.5.

    Biten et al., "Scene Text Visual Question Answering", 2019 (https://arxiv.org/abs/1905.13648). Case and surrounding
    whitespace are ignored.

    Args:
        answer: Answer of the model.
        expected: Accepted answers.
    """
    from rapidfuzz.distance import Levenshtein

    nearest = max(Levenshtein.normalized_similarity(_plain(answer), _plain(one)) for one in expected)
    return nearest if nearest >= _MIN_SIMILARITY else 0.0


def relaxed_match(answer: str, expected: Sequence[str]) -> float:
    """Return whether an answer equals an expected one; numbers may differ by 5 %.

    Masry et al., "ChartQA", 2022 (https://arxiv.org/abs/2203.10244), section 5.1. Percentages are numbers. Lists in
    JSON are compared item by item.

    Args:
        answer: Answer of the model.
        expected: Accepted answers.
    """
    return float(any(_is_relaxed_match(answer, one) for one in expected))


def ocrbench_match(answer: str, expected: Sequence[str], ignore_spaces: bool = False) -> float:
    """Return whether an answer contains one of the expected ones, as OCRBench counts it.

    Liu et al., "OCRBench", 2023 (https://arxiv.org/abs/2305.07895).

    Args:
        answer: Answer of the model.
        expected: Accepted answers.
        ignore_spaces: Remove spaces and compare the case, as for formulas (HME100k); otherwise case is ignored.
    """

    def comparable(text: str) -> str:
        line = text.strip().replace("\n", " ")
        return line.replace(" ", "") if ignore_spaces else line.lower()

    return float(any(comparable(one) in comparable(answer) for one in expected))


def _plain(text: str) -> str:
    return text.strip().lower()


def _is_relaxed_match(answer: str, expected: str) -> bool:
    wanted, found = _json_list(expected), _json_list(answer)
    if wanted is None or found is None or len(wanted) != len(found):
        wanted, found = [expected], [answer]
    return all(_is_near(_plain(str(a)), _plain(str(b))) for a, b in zip(found, wanted, strict=True))


def _is_near(answer: str, expected: str) -> bool:
    number, wanted = _number(answer), _number(expected)
    if number is None or not wanted:  # a relative change of 0 is not defined
        return answer == expected
    return abs(number - wanted) / abs(wanted) <= _MAX_RELATIVE_CHANGE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _json_list(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
