"""Questions of ScreenSpot, CountBenchQA, DocVQA, TextVQA, ChartQA and OCRBench, from JSON and Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moondream_cv.evaluation.benchmarks.dataset import Example, Question
from moondream_cv.evaluation.benchmarks.files import find_image, reading_labels
from moondream_cv.evaluation.benchmarks.parquet import read_rows
from moondream_cv.evaluation.benchmarks.tasks import TASKS

FORMULAS = "Handwritten Mathematical Expression Recognition"
"""Group of OCRBench's questions about formulas (HME100k), which are compared without spaces."""

_DESKTOP, _MOBILE = {"windows", "macos"}, {"ios", "android"}


class JsonLayout(NamedTuple):
    """A JSON layout of a task.

    Attributes:
        task: Task.
        keys: Keys of each entry that identify the layout.
        image: Returns the path of an entry's image in one of the folders.
        folders: Folders of images, next to the file or in the folder above it.
        question: Returns the question of an entry.
        has_several_files: Whether a split has several files.
    """

    task: str
    keys: frozenset[str]
    image: Callable[[Mapping[str, Any]], str]
    folders: tuple[str, ...]
    question: Callable[[Mapping[str, Any], Path], Question]
    has_several_files: bool = False


def json_layout(content: Any) -> JsonLayout | None:
    """Return the layout of the content of a JSON file; None if it is unknown.

    Args:
        content: Content of the file.
    """
    entries = _entries(content)
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], Mapping):
        return None
    return next((layout for layout in _JSON_LAYOUTS if entries[0].keys() >= layout.keys), None)


def read_json_questions(files: Sequence[tuple[Path, Any]], layout: JsonLayout) -> list[Example]:
    """Return the images of JSON files with their questions, in the order of the first question about each image.

    Args:
        files: Files of a split, with their content.
        layout: Layout of all files.

    Raises:
        DatasetError: An entry is invalid or has no answer.
    """
    questions: dict[tuple[str, Path], list[Question]] = {}
    for path, content in files:
        parents = (path.parent, path.parent.parent)
        folders = [parent / folder for parent in parents for folder in layout.folders]
        with reading_labels(path):
            for entry in _entries(content):
                name = layout.image(entry)
                key = (name, find_image(folders, name))
                questions.setdefault(key, []).append(layout.question(entry, path))
    return [Example(name, path, tuple(found)) for (name, path), found in questions.items()]


def parquet_task(columns: Iterable[str], inner: Iterable[str]) -> str | None:
    """Return the task of a Parquet file; None if it is unknown, and "" if several tasks are possible.

    Args:
        columns: Names of the columns.
        inner: Names of the fields of the questions, if each image has a list of them in the column `qa`.
    """
    found, fields = set(columns), set(inner)
    if "image" not in found:
        return None
    if {"instruction", "bbox"} <= found:
        return "screenspot"
    if {"question", "number"} <= found:
        return "countbenchqa"
    if {"query", "label"} <= found or {"answer", "source"} <= fields or {"question", "answer", "type"} <= found:
        return "chartqa"
    if {"question", "answer", "question_type"} <= found:
        return "ocrbench"
    if "answers" in fields or ({"question", "answers"} <= found and found & {"docId", "ucsf_document_id"}):
        return "docvqa"
    if {"question", "answers"} <= found:
        return "textvqa" if found & {"image_id", "image_classes", "ocr_tokens", "flickr_original_url"} else ""
    return None


def read_parquet_questions(paths: Sequence[Path], task: str) -> list[Example]:
    """Return the images of Parquet files with their questions.

    Args:
        paths: Files of a split, in order.
        task: Task of the files.

    Raises:
        DatasetError: A file cannot be read, or a row is invalid.
    """
    examples = []
    for number, (image, values) in enumerate(read_rows(paths)):
        with reading_labels(image.path):
            questions = tuple(_row_question(task, one) for one in _row_entries(values))
        examples.append(Example(f"row {number}", image, questions))
    return examples


# --- Entries of JSON files --------------------------------------------------------------------------------------------


def _entries(content: Any) -> Any:
    return content.get("data") if isinstance(content, Mapping) else content


def _asked(task: str, question: Any, answers: Any, *groups: Any) -> Question:
    """Return a question with its answers: one value or a list of them."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"a question must be a text, got {question!r:.100}")
    found = tuple(map(str, answers if isinstance(answers, list) else [answers]))
    if not found:
        raise ValueError(f"the question {question!r:.100} has no answer; choose a split with answers")
    return Question(TASKS[task].prompt.format(question), found, groups=tuple(map(str, groups)))


def _text_question(entry: Mapping[str, Any], path: Path) -> Question:
    return _asked("textvqa", entry["question"], entry.get("answers", []))


def _document_question(entry: Mapping[str, Any], path: Path) -> Question:
    return _asked("docvqa", entry["question"], entry.get("answers", []))


def _chart_question(entry: Mapping[str, Any], path: Path) -> Question:
    kind = "human" if "human" in path.stem else "augmented" if "augmented" in path.stem else None
    return _asked("chartqa", entry["query"], entry["label"], *([] if kind is None else [kind]))


def _ocr_question(entry: Mapping[str, Any], path: Path) -> Question:
    return _asked("ocrbench", entry["question"], entry["answers"], entry["type"])


def _screen_question(entry: Mapping[str, Any], path: Path) -> Question:
    x, y, width, height = map(float, entry["bbox"])
    return _located(entry, (x, y, x + width, y + height), is_fraction=False)


def _located(entry: Mapping[str, Any], box: Sequence[float], is_fraction: bool) -> Question:
    x_min, y_min, x_max, y_max = map(float, box)
    if not (x_min < x_max and y_min < y_max):
        raise ValueError(f"a bbox must have an area, got {entry['bbox']}")
    source = str(entry["data_source"]).lower()
    platform = "desktop" if source in _DESKTOP else "mobile" if source in _MOBILE else "web"
    groups = (str(entry["data_type"]), platform)
    return Question(str(entry["instruction"]), (), (x_min, y_min, x_max, y_max), is_fraction, groups)


_JSON_LAYOUTS = (
    JsonLayout(
        "screenspot",
        frozenset({"img_filename", "instruction", "bbox", "data_type", "data_source"}),
        lambda entry: str(entry["img_filename"]),
        ("screenspot_imgs", "screenspotv2_image", "images", ""),
        _screen_question,
        has_several_files=True,
    ),
    JsonLayout(
        "chartqa",
        frozenset({"imgname", "query", "label"}),
        lambda entry: str(entry["imgname"]),
        ("png", "images", ""),
        _chart_question,
        has_several_files=True,
    ),
    JsonLayout(
        "ocrbench",
        frozenset({"dataset_name", "image_path", "question", "answers", "type"}),
        lambda entry: str(entry["image_path"]),
        ("OCRBench_Images", "images", ""),
        _ocr_question,
    ),
    JsonLayout(
        "textvqa",
        frozenset({"image_id", "question", "question_id"}),
        lambda entry: f"{entry['image_id']}.jpg",
        ("train_images", "test_images", "images", ""),
        _text_question,
    ),
    JsonLayout(
        "docvqa",
        frozenset({"image", "question", "questionId"}),
        lambda entry: str(entry["image"]).removeprefix("documents/"),
        ("documents", "spdocvqa_images", "images", ""),
        _document_question,
    ),
)


# --- Rows of Parquet files --------------------------------------------------------------------------------------------


def _row_entries(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the questions of a row: those in `qa`, or the row itself."""
    if values.get("qa") is None:
        yield values
        return
    yield from values["qa"]


def _row_question(task: str, entry: Mapping[str, Any]) -> Question:
    if task == "screenspot":
        box = list(map(float, entry["bbox"]))
        if any(not 0 <= value <= 1 for value in box):
            raise ValueError(f"a bbox must have fractions between 0 and 1, got {box}")
        return _located(entry, box, is_fraction=True)
    if task == "countbenchqa":
        return _asked(task, entry["question"], int(entry["number"]))
    if task == "ocrbench":
        return _asked(task, entry["question"], entry["answer"], entry["question_type"])
    if task == "chartqa":
        return _asked(task, entry.get("query", entry.get("question")), _chart_answers(entry), *_chart_kind(entry))
    return _asked(task, entry["question"], entry.get("answers") or [])


def _chart_answers(entry: Mapping[str, Any]) -> Any:
    return entry["label"] if "label" in entry else entry["answer"]


def _chart_kind(entry: Mapping[str, Any]) -> list[str]:
    if "human_or_machine" in entry:
        return ["augmented" if entry["human_or_machine"] else "human"]
    kind = str(entry.get("source", entry.get("type", "")))
    return ["human"] if "human" in kind else ["augmented"] if kind else []
