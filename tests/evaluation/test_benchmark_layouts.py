"""Test that benchmarks are read from small files in exactly the published layouts."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv.dataset_layouts import DatasetError
from moondream_cv.evaluation.benchmarks.dataset import Benchmark, Question
from moondream_cv.evaluation.benchmarks.layouts import load_benchmark
from moondream_cv.evaluation.benchmarks.parquet import ParquetImage, ParquetImages
from tests.helpers.benchmark_files import text_entry, write_image, write_json, write_parquet

COUNT_PROMPT = (
    "Look at the image carefully and count the objects. Answer with just a number, without any additional text. "
)
CHART_PROMPT = (
    "Analyze the chart carefully, consider both visual features and data values, and provide a precise answer without "
    "any additional explanation or formatting. "
)
TEXT_PROMPT = (
    "Read the text in the image and provide a brief lowercase answer. Respond 'unanswerable' only if there is no "
    "plausible answer. "
)
DOCUMENT_PROMPT = " The answer should be a short text span taken verbatim from the document."


def questions(benchmark: Benchmark) -> list[Question]:
    return [question for example in benchmark.examples for question in example.questions]


def image_files(benchmark: Benchmark, root: Path) -> list[str]:
    """Return the paths of the images, which must exist."""
    paths = [example.image for example in benchmark.examples]
    assert all(isinstance(path, Path) and path.is_file() for path in paths)
    return [path.relative_to(root).as_posix() for path in paths if isinstance(path, Path)]


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(files: list[str], names: list[str]) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": 9 + i, "file_name": file, "width": 40, "height": 30} for i, file in enumerate(files)],
        "annotations": [
            {"id": i, "image_id": 9 + i, "category_id": 1, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}
            for i in range(len(files))
        ],
        "categories": [{"id": i, "name": name, "supercategory": "none"} for i, name in enumerate(names)],
    }


@pytest.fixture
def coco_2017(tmp_path: Path) -> Path:
    """Return a folder as COCO 2017 is unpacked."""
    for name in ("val2017/000000000139.jpg", "val2017/000000000285.jpg", "train2017/000000000009.jpg"):
        write_image(tmp_path / name)
    annotations = tmp_path / "annotations"
    write_json(
        annotations / "instances_val2017.json", coco(["000000000139.jpg", "000000000285.jpg"], ["none", "person"])
    )
    write_json(annotations / "instances_train2017.json", coco(["000000000009.jpg"], ["none", "person"]))
    write_json(annotations / "person_keypoints_val2017.json", coco(["000000000139.jpg"], ["none", "person"]))
    write_json(annotations / "captions_val2017.json", {"images": [], "annotations": []})
    return tmp_path


def test_coco_2017(coco_2017: Path) -> None:
    found = load_benchmark(coco_2017)
    assert (found.task, found.skill, found.split, found.is_on_card) == ("coco", "detect", "valid", True)
    assert image_files(found, coco_2017) == ["val2017/000000000139.jpg", "val2017/000000000285.jpg"]
    assert found.classes == ("person",)  # categories without annotations have no average precision
    assert [one["id"] for one in found.coco["annotations"]] == [1, 2]
    train = load_benchmark(coco_2017, split="train", skill="point")
    assert (image_files(train, coco_2017), train.skill) == (["train2017/000000000009.jpg"], "point")
    assert not train.is_on_card
    file = load_benchmark(coco_2017 / "annotations" / "instances_val2017.json")
    assert file.examples == found.examples
    first = load_benchmark(coco_2017, limit=1)
    assert (len(first.examples), len(first.coco["images"]), len(first.coco["annotations"])) == (1, 1, 1)


def test_roboflow_export(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_image(tmp_path / split / "a.jpg")
        write_json(tmp_path / split / "_annotations.coco.json", coco(["a.jpg"], ["parts", "bolt", "nut"]))
    found = load_benchmark(tmp_path)
    assert (image_files(found, tmp_path), found.classes) == (["valid/a.jpg"], ("bolt",))
    assert image_files(load_benchmark(tmp_path, split="test"), tmp_path) == ["test/a.jpg"]


# --- ScreenSpot -------------------------------------------------------------------------------------------------------


def screen(file: str, kind: str, source: str) -> dict[str, Any]:
    entry = {"img_filename": file, "bbox": [4, 6, 10, 3], "instruction": f"open {kind}"}
    return {**entry, "data_type": kind, "data_source": source}


def test_screenspot_json_groups_questions_about_an_image(tmp_path: Path) -> None:
    write_image(tmp_path / "screenspot_imgs" / "web_1.png")
    write_image(tmp_path / "screenspot_imgs" / "pc_1.png")
    write_json(
        tmp_path / "screenspot_web.json", [screen("web_1.png", "text", "shop"), screen("web_1.png", "icon", "shop")]
    )
    write_json(tmp_path / "screenspot_desktop.json", [screen("pc_1.png", "icon", "windows")])
    found = load_benchmark(tmp_path)
    assert (found.task, found.skill, found.split) == ("screenspot", "detect", "")
    assert [len(example.questions) for example in found.examples] == [1, 2]
    assert questions(found)[0] == Question("open icon", (), (4, 6, 14, 9), False, ("icon", "desktop"))
    assert [one.groups for one in questions(found)[1:]] == [("text", "web"), ("icon", "web")]


def test_screenspot_parquet(tmp_path: Path) -> None:
    row = {"file_name": "mobile_1.png", "bbox": [0.1, 0.2, 0.3, 0.4], "instruction": "close", "data_type": "icon"}
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{**row, "data_source": "ios"}])
    (found,) = questions(load_benchmark(tmp_path))
    assert found == Question("close", (), (0.1, 0.2, 0.3, 0.4), True, ("icon", "mobile"))


# --- Questions --------------------------------------------------------------------------------------------------------


def test_countbenchqa_parquet(tmp_path: Path) -> None:
    rows = [{"text": "four cups", "question": f"How many {i}?", "number": i + 2} for i in range(3)]
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", rows)
    write_parquet(tmp_path / "data" / "test-00001-of-00002.parquet", rows[:1])
    found = load_benchmark(tmp_path)
    assert (found.task, found.split, len(found.examples)) == ("countbenchqa", "test", 4)
    assert questions(found)[2] == Question(f"{COUNT_PROMPT}How many 2?", ("4",))
    assert load_benchmark(tmp_path, limit=2).examples == found.examples[:2]
    assert len({example.name for example in found.examples}) == 4


def test_textvqa_json_and_parquet(tmp_path: Path) -> None:
    write_image(tmp_path / "train_images" / "0054c91.jpg")
    entries = [text_entry("0054c91", ["nokia"] * 9 + ["toshiba"])] * 2
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {**head, "data": entries})
    write_json(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {**head, "data": [{"image_id": "0", "ocr_tokens": []}]})
    write_json(tmp_path / "TextVQA_0.5.1_test.json", {**head, "data": [{**entries[0], "answers": []}]})
    found = load_benchmark(tmp_path)
    assert (found.task, found.split, len(found.examples)) == ("textvqa", "valid", 1)
    assert image_files(found, tmp_path) == ["train_images/0054c91.jpg"]
    assert questions(found)[1] == Question(f"{TEXT_PROMPT}what brand?", (*["nokia"] * 9, "toshiba"))
    with pytest.raises(DatasetError, match="has no answer; choose a split with answers"):
        load_benchmark(tmp_path, split="test")
    write_parquet(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", entries)
    assert questions(load_benchmark(tmp_path / "hub")) == questions(found)


def test_docvqa_json_and_parquet(tmp_path: Path) -> None:
    entry = {"questionId": 49153, "question": "What is the date?", "image": "documents/xnbl0037_1.png", "docId": 14465}
    entry |= {"ucsf_document_id": "xnbl0037", "answers": ["15 May", "May"], "data_split": "val"}
    head = {"dataset_name": "SP-DocVQA", "dataset_split": "val"}
    write_json(tmp_path / "val_v1.0_withQT.json", {**head, "data": [entry]})
    expected = [Question(f"What is the date?{DOCUMENT_PROMPT}", ("15 May", "May"))]
    for folder in ("spdocvqa_images", "documents"):
        write_image(tmp_path / folder / "xnbl0037_1.png")
        found = load_benchmark(tmp_path)
        assert (found.task, questions(found)) == ("docvqa", expected)
        assert image_files(found, tmp_path) == [f"{folder}/xnbl0037_1.png"]
    row = {name: entry[name] for name in ("questionId", "question", "docId", "answers")}
    write_parquet(tmp_path / "hub" / "DocVQA" / "validation-00000-of-00006.parquet", [row])
    assert questions(load_benchmark(tmp_path / "hub")) == expected
    listed = {"qa": [{"question": row["question"], "answers": row["answers"]}] * 2}
    write_parquet(tmp_path / "lists" / "validation-00000-of-00001.parquet", [listed])
    assert questions(load_benchmark(tmp_path / "lists")) == expected * 2


def test_chartqa_json_and_parquet(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for kind in ("human", "augmented"):
            entry = {"imgname": f"{kind}.png", "query": f"Which {kind}?", "label": "0.57"}
            write_json(tmp_path / split / f"{split}_{kind}.json", [entry])
            write_image(tmp_path / split / "png" / f"{kind}.png")
    found = load_benchmark(tmp_path)
    assert (found.task, found.split) == ("chartqa", "test")
    assert image_files(found, tmp_path) == ["test/png/augmented.png", "test/png/human.png"]
    expected = [Question(f"{CHART_PROMPT}Which {kind}?", ("0.57",), groups=(kind,)) for kind in ("augmented", "human")]
    assert questions(found) == expected
    assert questions(load_benchmark(tmp_path / "test")) == expected
    layouts: list[list[dict[str, Any]]] = [
        [
            {"query": "Which augmented?", "label": ["0.57"], "human_or_machine": 1},
            {"query": "Which human?", "label": ["0.57"], "human_or_machine": 0},
        ],
        [
            {"type": "augmented_test", "question": "Which augmented?", "answer": "0.57"},
            {"type": "human_test", "question": "Which human?", "answer": "0.57"},
        ],
        [
            {"qa": [{"question": "Which augmented?", "answer": "0.57", "source": "augmented"}]},
            {"qa": [{"question": "Which human?", "answer": "0.57", "source": "human"}]},
        ],
    ]
    for number, rows in enumerate(layouts):
        write_parquet(tmp_path / f"hub {number}" / "test-00000-of-00001.parquet", rows)
        assert questions(load_benchmark(tmp_path / f"hub {number}")) == expected


def test_ocrbench_json_and_parquet(tmp_path: Path) -> None:
    entry = {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "id": 0, "question": "what is written?"}
    write_json(tmp_path / "OCRBench.json", [{**entry, "answers": ["CENTRE"], "image_path": "IIIT5K/2.png"}])
    write_image(tmp_path / "OCRBench_Images" / "IIIT5K" / "2.png")
    expected = [Question("what is written?", ("CENTRE",), groups=("Regular Text Recognition",))]
    found = load_benchmark(tmp_path)
    assert (found.task, questions(found)) == ("ocrbench", expected)
    assert image_files(found, tmp_path) == ["OCRBench_Images/IIIT5K/2.png"]
    row = {"dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition"}
    write_parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", [{**row, "answer": ["CENTRE"]}])
    assert questions(load_benchmark(tmp_path / "hub")) == expected


def test_parquet_images_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_parquet(path, [{"question": "?", "number": 1}] * 50, group=7)
    reader = ParquetImages()
    for row in (0, 1, 2, 30, 31, 8, 49, 49):
        content = reader.read(ParquetImage(path, row))
        assert content is not None
        assert np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0] == row


# --- Errors -----------------------------------------------------------------------------------------------------------


def without_images(root: Path) -> None:
    write_json(root / "valid" / "_annotations.coco.json", coco(["a.jpg"], ["parts", "bolt"]))


def without_annotations(root: Path) -> None:
    write_json(root / "valid" / "_annotations.coco.json", {**coco(["a.jpg"], ["parts", "bolt"]), "annotations": []})


def outside(root: Path) -> None:
    write_json(root / "valid" / "_annotations.coco.json", coco(["../a.jpg"], ["parts", "bolt"]))


def changed_box(*box: float) -> Callable[[Path], None]:
    """Return a function that writes ground truth with this box."""

    def write(root: Path) -> None:
        content = coco(["a.jpg"], ["parts", "bolt"])
        content["annotations"][0]["bbox"] = box
        write_json(root / "valid" / "_annotations.coco.json", content)

    return write


def blank_name(root: Path) -> None:
    write_json(root / "valid" / "_annotations.coco.json", coco(["a.jpg"], ["parts", " "]))


def two_splits(root: Path) -> None:
    for split in ("train", "test"):
        write_image(root / split / "a.jpg")
        write_json(root / split / "_annotations.coco.json", coco(["a.jpg"], ["parts", "bolt"]))


def two_files(root: Path) -> None:
    for name in ("a.json", "b.json"):
        write_json(root / name, coco(["a.jpg"], ["parts", "bolt"]))


def truncated(root: Path) -> None:
    (root / "labels.json").write_text('{"images": [')


def not_parquet(root: Path) -> None:
    (root / "test.parquet").write_bytes(b"junk")


def labeled_yolo(root: Path) -> None:
    write_json(root / "labeling.json", {"version": 1, "labeling": {}})
    (root / "valid").mkdir()
    (root / "data.yaml").write_text("val: valid/images")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: None, r"has no files with labels; supported layouts: COCO \(instances"),
        (lambda root: write_json(root / "a.json", {"version": 1}), "has no labels in a.json; supported layouts: COCO"),
        (lambda root: write_parquet(root / "a.parquet", [{"x": 1}]), "has the unknown columns image, x; supported"),
        (without_images, r"no image of the labels exists, such as 'a.jpg'; put the images into .* folders .*valid"),
        (without_annotations, "has no annotations"),
        (outside, "must be a path inside the dataset, got '../a.jpg'"),
        (changed_box(1, float("nan"), 2, 3), "annotation 1 must have a finite box and area, got .1, nan, 2, 3. and 6"),
        (changed_box(10**400, 1, 2, 3), "_annotations.coco.json cannot be read: int too large"),
        (blank_name, "the names of categories must not be empty"),
        (two_splits, r"has several splits \(test, train\); choose one with --split"),
        (two_files, "has several COCO files: a.json, b.json; give one of them as DATA"),
        (labeled_yolo, "is a labeled dataset in another format than COCO; run .* again with --format coco"),
        (truncated, r"labels.json cannot be read: Expecting value"),
        (not_parquet, "test.parquet cannot be read as a Parquet file"),
    ],
)
def test_unusable_data_raises(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(DatasetError, match=message):
        load_benchmark(tmp_path)


def test_settings_of_a_labeled_dataset_are_not_a_split(tmp_path: Path) -> None:
    write_json(tmp_path / "labeling.json", {"version": 1, "labeling": {}})
    (tmp_path / "train").mkdir()
    write_json(tmp_path / "train" / "_annotations.coco.json", coco(["a.jpg"], ["bolt"]))
    with pytest.raises(DatasetError, match=r"has no split test; found: train$"):
        load_benchmark(tmp_path, split="test")


def test_questions_and_answers_alone_need_a_task(tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [{"question": "what?", "answers": ["a", "b"]}])
    with pytest.raises(DatasetError, match="add --task docvqa or --task textvqa"):
        load_benchmark(tmp_path)
    assert questions(load_benchmark(tmp_path, task="textvqa"))[0].prompt == f"{TEXT_PROMPT}what?"
    with pytest.raises(DatasetError, match="add --task docvqa or --task textvqa"):
        load_benchmark(tmp_path, task="chartqa")


def test_arguments_are_checked(coco_2017: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist; give the folder of a benchmark"):
        load_benchmark(coco_2017 / "missing")
    with pytest.raises(DatasetError, match="has no split test; found: train, valid"):
        load_benchmark(coco_2017, split="test")
    with pytest.raises(ValueError, match="split must be train, valid or test, got 'dev'"):
        load_benchmark(coco_2017, split="dev")
    with pytest.raises(DatasetError, match="has no labels of DocVQA in"):
        load_benchmark(coco_2017, task="docvqa")
