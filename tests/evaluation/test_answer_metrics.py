"""Test the metrics of answers on examples that are computed by hand from the definitions in the papers."""

from __future__ import annotations

import pytest

from moondream_cv.evaluation.benchmarks.answer_metrics import (
    anls,
    exact_match,
    normalize_vqa_answer,
    ocrbench_match,
    relaxed_match,
    vqa_accuracy,
    vqa_consensus,
)


@pytest.mark.parametrize(
    ("matches", "official", "consensus"),
    # 1 match: left out once (0), kept 9 times (1/3). 3 matches: left out 3 times (2/3), kept 7 times (1).
    [(0, 0.0, 0.0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1.0), (4, 1.0, 1.0), (10, 1.0, 1.0)],
)
def test_vqa_accuracy_leaves_out_one_answer_at_a_time(matches: int, official: float, consensus: float) -> None:
    expected = ["Nous les gosses"] * matches + [f"other {index}" for index in range(10 - matches)]
    assert vqa_accuracy("nous les gosses.", expected) == pytest.approx(official)
    assert vqa_consensus("nous les gosses.", expected) == pytest.approx(consensus)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("The Dog.", "dog"),
        ("two  dogs\nand a cat", "2 dogs and cat"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the table of the evaluation has this pair
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("coca-cola", "coca cola"),
        ("coca- cola", "coca cola"),
        ("yes!", "yes"),
        ("stop / go", "stop go"),
    ],
)
def test_vqa_answers_are_normalized(answer: str, normalized: str) -> None:
    assert normalize_vqa_answer(answer) == normalized


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Sitting", ["kitten"], 1 - 3 / 7),  # three edits, seven characters
        (" 15 May ", ["15 may", "may"], 1.0),
        ("ab", ["ac"], 0.5),  # half of the characters is the lowest similarity that counts
        ("abc", ["axy"], 0.0),
        ("no", ["yes", "not"], 2 / 3),  # the nearest answer counts
    ],
)
def test_anls(answer: str, expected: list[str], score: float) -> None:
    assert anls(answer, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "expected", "is_match"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("5%", "0.05", True),
        ("5", "5%", False),
        ("0", "0", True),
        ("0.0", "0", False),  # a relative change of 0 is not defined, so texts are compared
        ("Blue ", "blue", True),
        ("blues", "blue", False),
        ("[101, 48]", "[100, 50]", True),
        ("[101, 40]", "[100, 50]", False),
        ("[100]", "[100, 50]", False),
    ],
)
def test_relaxed_match_allows_five_percent(answer: str, expected: str, is_match: bool) -> None:
    assert relaxed_match(answer, [expected]) == float(is_match)


def test_exact_match_ignores_case_and_surrounding_whitespace() -> None:
    assert exact_match(" Four", ["4", "four"]) == 1.0
    assert exact_match("four.", ["4", "four"]) == 0.0


def test_ocrbench_answers_contain_the_expected_text() -> None:
    assert ocrbench_match("The text is\nCENTRE.", ["centre"]) == 1.0
    assert ocrbench_match("CENTER", ["centre"]) == 0.0
    formula = r"\frac { a } { b }"
    assert ocrbench_match(r"$\frac{a}{b}$", [formula]) == 0.0
    assert ocrbench_match(r"$\frac{a}{b}$", [formula], ignore_spaces=True) == 1.0
    assert ocrbench_match(r"$\frac{A}{b}$", [formula], ignore_spaces=True) == 0.0
