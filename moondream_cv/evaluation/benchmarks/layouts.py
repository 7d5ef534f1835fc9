"""Recognize the published layout of a benchmark on disk, and read its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from moondream_cv.arguments import check_choice
from moondream_cv.dataset_layouts import DatasetError
from moondream_cv.evaluation.benchmarks.coco import first_images, image_folders, is_coco, read_coco
from moondream_cv.evaluation.benchmarks.dataset import Benchmark, Example, Skill, Task
from moondream_cv.evaluation.benchmarks.files import by_split, check_split, choose_split, read_json
from moondream_cv.evaluation.benchmarks.parquet import read_schema
from moondream_cv.evaluation.benchmarks.questions import (
    json_layout,
    parquet_task,
    read_json_questions,
    read_parquet_questions,
)
from moondream_cv.evaluation.benchmarks.tasks import TASKS

SUPPORTED = (
    "COCO (instances_*.json or _annotations.coco.json, with images), ScreenSpot (screenspot_*.json with images, or "
    "Parquet), CountBenchQA (Parquet), DocVQA (*_v1.0*.json with images, or Parquet), TextVQA (TextVQA_0.5.1_*.json "
    "with images, or Parquet), ChartQA (*_human.json and *_augmented.json with png folders, or Parquet), OCRBench "
    "(OCRBench.json with OCRBench_Images, or Parquet)"
)

_COCO_ON_CARD = "instances_val2017"
_LABELING = "labeling.json"  # settings of a dataset that `moondream-cv label` has written


def load_benchmark(
    data: Path,
    *,
    task: str | None = None,
    skill: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Benchmark:
    """Read the labels of a benchmark. Its files determine the task.

    Args:
        data: Folder with the published files, or one of the files with labels.
        task: Task, if the files do not determine it: "coco", "screenspot", "countbenchqa", "docvqa", "textvqa",
            "chartqa" or "ocrbench".
        skill: "point" scores points instead of boxes on COCO ground truth; None: the skill of the task.
        split: "train", "valid" or "test"; None: the split that is usually reported.
        limit: Maximum number of images, from the first one; None: all.

    Raises:
        DatasetError: There is no such file or folder, its layout is unknown, labels cannot be read, there are no
            images, or the images are missing.
        ValueError: An argument is unknown or does not fit the task.
    """
    # Find the files
    wanted = None if split is None else check_split(split)
    wanted_task = None if task is None else check_choice("task", task, get_args(Task))
    if not data.exists():
        raise DatasetError(f"{data} does not exist; give the folder of a benchmark")
    root = data if data.is_dir() else data.parent
    if (data / _LABELING).is_file() and not any(data.glob("*/_annotations.coco.json")):
        raise DatasetError(
            f"{data} is a labeled dataset in another format than COCO; run its `moondream-cv label` command again with "
            "--format coco"
        )
    json_files, parquet_files = _label_files(data)
    if not json_files and not parquet_files:
        raise DatasetError(f"{data} has no files with labels; supported layouts: {SUPPORTED}")

    # Read the labels
    if parquet_files:
        benchmark = _from_parquet(parquet_files, root, wanted_task, wanted)
    else:
        benchmark = _from_json(json_files, root, wanted_task, wanted)
    if not benchmark.examples:
        raise DatasetError(f"{data} has no images in the split {benchmark.split or 'without a name'}")
    return _limited(_with_skill(benchmark, skill), limit)


def _label_files(data: Path) -> tuple[list[Path], list[Path]]:
    """Return the JSON and Parquet files of a folder and of its folders, or the file itself."""
    paths = [data] if data.is_file() else [*data.iterdir(), *data.glob("*/*.json"), *data.glob("*/*.parquet")]
    found = sorted(
        {path for path in paths if path.is_file() and not path.name.startswith(".") and path.name != _LABELING}
    )
    json_files = [path for path in found if path.suffix.lower() == ".json"]
    return json_files, [path for path in found if path.suffix.lower() == ".parquet"]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _from_parquet(paths: Sequence[Path], root: Path, task: Task | None, split: str | None) -> Benchmark:
    schema = read_schema(paths[0])
    found = parquet_task(schema.names, _question_fields(schema))
    if found is None:
        columns = ", ".join(schema.names)
        raise DatasetError(f"{paths[0]} has the unknown columns {columns}; supported layouts: {SUPPORTED}")
    if not found and task not in ("docvqa", "textvqa"):
        raise DatasetError(f"{paths[0]} has only questions and answers; add --task docvqa or --task textvqa")
    if found and task not in (None, found):
        raise DatasetError(f"{paths[0]} has the columns of {TASKS[found].title}, not of {TASKS[str(task)].title}")
    chosen = check_choice("task", found or task, get_args(Task))
    name, files = choose_split(by_split(paths, root), split, TASKS[chosen].split, root)
    examples = read_parquet_questions(files, chosen)
    return _questions(chosen, name, examples)


def _question_fields(schema: Any) -> list[str]:
    """Return the fields of the questions in the column `qa`, a list of structs."""
    if "qa" not in schema.names:
        return []
    values = getattr(schema.field("qa").type, "value_type", None)
    return [] if values is None else [values.field(index).name for index in range(values.num_fields)]


# --- JSON -------------------------------------------------------------------------------------------------------------


def _from_json(paths: Sequence[Path], root: Path, task: Task | None, split: str | None) -> Benchmark:
    # Choose the split by the names of the files, because a file may have hundreds of megabytes
    is_chart = any(path.stem.endswith(("_human", "_augmented")) for path in paths)
    name, files = choose_split(by_split(paths, root), split, TASKS["chartqa" if is_chart else "coco"].split, root)
    instances = [path for path in files if path.stem.startswith("instances")]  # next to captions and keypoints

    # Recognize the layout of each file
    coco, others = [], []
    for path in instances or files:
        content = read_json(path)
        layout = json_layout(content)
        if is_coco(content) and task in (None, "coco"):
            coco.append((path, content))
        elif layout is not None and task in (None, layout.task):
            others.append((layout, path, content))

    # Read the labels
    tasks = sorted({layout.task for layout, _, _ in others} | ({"coco"} if coco else set()))
    if not tasks:
        expected = "" if task is None else f" of {TASKS[task].title}"
        raise DatasetError(
            f"{root} has no labels{expected} in {', '.join(path.name for path in files[:5])}; supported layouts: "
            f"{SUPPORTED}"
        )
    if len(tasks) > 1:
        raise DatasetError(f"{root} has the labels of several tasks ({', '.join(tasks)}); choose one with --task")
    if len(coco) > 1:
        names = ", ".join(str(path.relative_to(root)) for path, _ in coco)
        raise DatasetError(f"{root} has several COCO files: {names}; give one of them as DATA")
    if coco:
        return _from_coco(*coco[0], root, name)
    layout = others[0][0]
    if len(others) > 1 and not layout.has_several_files:
        names = ", ".join(str(path.relative_to(root)) for _, path, _ in others)
        raise DatasetError(f"{root} has several files with questions: {names}; give one of them as DATA")
    examples = read_json_questions([(path, content) for _, path, content in others], layout)
    _check_images(examples, [others[0][1].parent / folder for folder in layout.folders])
    chosen = check_choice("task", layout.task, get_args(Task))
    return _questions(chosen, name, examples)


def _from_coco(path: Path, content: Any, root: Path, split: str) -> Benchmark:
    examples, coco = read_coco(path, root, content)
    _check_images(examples, image_folders(path, root))
    classes = tuple(category["name"] for category in coco["categories"])
    is_published = path.stem == _COCO_ON_CARD
    title = "COCO 2017" if is_published else "COCO ground truth"
    return Benchmark("coco", "detect", title, split, examples, classes, coco, is_published)


def _questions(task: Task, split: str, examples: Sequence[Example]) -> Benchmark:
    title, _, default = TASKS[task]
    skill: Skill = "detect" if task == "screenspot" else "query"
    return Benchmark(task, skill, title, split, examples, is_on_card=split in ("", default))


def _check_images(examples: Sequence[Example], folders: Sequence[Path]) -> None:
    """Check that there is at least one image; others may be missing."""
    if examples and not any(isinstance(one.image, Path) and one.image.is_file() for one in examples):
        searched = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        raise DatasetError(
            f"no image of the labels exists, such as {examples[0].name!r}; put the images into one of the folders "
            f"{searched}"
        )


# --- Options ----------------------------------------------------------------------------------------------------------


def _with_skill(benchmark: Benchmark, skill: str | None) -> Benchmark:
    if skill is None or skill == benchmark.skill:
        return benchmark
    if skill != "point" or benchmark.task != "coco":
        raise ValueError(f"the skill of {TASKS[benchmark.task].title} is {benchmark.skill}, got {skill!r}")
    return replace(benchmark, skill="point")


def _limited(benchmark: Benchmark, limit: int | None) -> Benchmark:
    if limit is None or limit >= len(benchmark.examples):
        return benchmark
    coco = first_images(benchmark.coco, limit) if benchmark.coco else benchmark.coco
    return replace(benchmark, examples=benchmark.examples[:limit], coco=coco)
