"""Tasks of the model card: published prompts, default splits and figures.

The prompts are those of Moondream's evaluation code (`moondream/eval`, 2025-06). It has no prompts for OCRBench and
ScreenSpot: the questions and instructions are used unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

CARD_MODEL = "moondream2 (2025-06-21)"


class TaskSettings(NamedTuple):
    """Settings of a task.

    Attributes:
        title: Name of the benchmark.
        prompt: Prompt, with the question as `{}`.
        split: Default split.
    """

    title: str
    prompt: str = "{}"
    split: str = "test"


class CardFigure(NamedTuple):
    """A figure of the model card.

    Attributes:
        percent: Figure in percent.
        release: Release for which the change log of the card reports it.
    """

    percent: float
    release: str


TASKS = {
    "coco": TaskSettings("COCO", split="valid"),
    "screenspot": TaskSettings("ScreenSpot"),
    "countbenchqa": TaskSettings(
        "CountBenchQA",
        "Look at the image carefully and count the objects. Answer with just a number, without any additional text. {}",
    ),
    "docvqa": TaskSettings(
        "DocVQA", "{} The answer should be a short text span taken verbatim from the document.", "valid"
    ),
    "textvqa": TaskSettings(
        "TextVQA",
        "Read the text in the image and provide a brief lowercase answer. Respond 'unanswerable' only if there is no "
        "plausible answer. {}",
        "valid",
    ),
    "chartqa": TaskSettings(
        "ChartQA",
        "Analyze the chart carefully, consider both visual features and data values, and provide a precise answer "
        "without any additional explanation or formatting. {}",
    ),
    "ocrbench": TaskSettings("OCRBench"),
}

CARD_FIGURES = {
    ("coco", "AP50 per image and present class"): CardFigure(51.2, "2025-03-27"),
    ("screenspot", "F1 at IoU 0.5"): CardFigure(80.4, "2025-06-21"),
    ("countbenchqa", "accuracy"): CardFigure(86.4, "2025-03-27"),
    ("docvqa", "ANLS"): CardFigure(79.3, "2025-04-15"),
    ("textvqa", "VQA accuracy, min(matches / 3, 1)"): CardFigure(76.3, "2025-04-15"),
    ("chartqa", "relaxed accuracy"): CardFigure(77.5, "2025-04-15"),
    ("ocrbench", "accuracy"): CardFigure(61.2, "2025-03-27"),
}
"""Figures of the model card by task and metric."""
