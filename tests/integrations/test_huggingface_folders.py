"""Folders of Hugging Face datasets as inputs of labeling."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.inputs import list_inputs
from moondream_cv.scenes import render_scene

pytestmark = pytest.mark.integrations
datasets = pytest.importorskip("datasets", reason="needs datasets (make test-integrations)")

SPLITS = [("train", "train", range(3)), ("validation", "valid", range(3, 5)), ("extra", None, range(5, 6))]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def content() -> Any:
    """Six rendered scenes as PNG files, in three splits."""
    files = []
    for seed in range(6):
        file = io.BytesIO()
        Image.fromarray(render_scene(seed, resolution_wh=(96, 64)).image).save(file, "PNG")
        files.append(file.getvalue())
    features = datasets.Features({"photo": datasets.Image(), "row": datasets.Value("int64")})
    return files, {
        name: datasets.Dataset.from_dict(
            {"photo": [{"bytes": files[i], "path": None} for i in rows], "row": list(rows)}, features=features
        )
        for name, _, rows in SPLITS
    }


def save(folder: Path, layout: str, parts: dict[str, Any]) -> Path:
    if layout == "disk":
        datasets.DatasetDict(parts).save_to_disk(folder)
        return folder
    (folder / "data").mkdir(parents=True)
    for name, part in parts.items():
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("layout", ["disk", "parquet"])
def test_images_are_extracted_with_their_splits(tmp_path: Path, content: Any, layout: str) -> None:
    files, parts = content
    if layout == "parquet":
        parts = {name: part for name, part in parts.items() if name != "extra"}  # not a name of parquet files
    folder, frames = save(tmp_path / "in" / "shapes", layout, parts), tmp_path / "out" / "frames"
    images = list_inputs([folder], frames)
    expected = [(name, split, i) for name, split, rows in SPLITS if name in parts for i in range(len(rows))]
    assert [(image.name, image.source, image.split) for image in images] == [
        (f"shapes__{name}__{i:08}.png", f"frames/shapes__{name}/{i:08}.png", split) for name, split, i in expected
    ]
    read = [image.open() for image in images]
    assert [path.read_bytes() for path in read if isinstance(path, Path)] == files[: len(images)]

    # Existing files are not written again, and missing ones are
    times = {path: path.stat().st_mtime_ns for path in frames.rglob("*.png")}
    assert list_inputs([folder], frames) == images
    (frames / "shapes__train" / "00000001.png").unlink()
    assert list_inputs([folder], frames) == images
    changed = {path for path in frames.rglob("*.png") if path.stat().st_mtime_ns != times[path]}
    assert {path.name for path in changed} <= {"00000001.png"}
    assert (frames / "shapes__train" / "00000001.png").read_bytes() == files[1]


def test_other_dataset_with_the_same_name_is_rejected(tmp_path: Path, content: Any) -> None:
    _, parts = content
    frames = tmp_path / "out" / "frames"
    one = tmp_path / "a" / "shapes"
    parts["train"].save_to_disk(one)
    assert [image.name for image in list_inputs([one], frames)] == [f"shapes__{i:08}.png" for i in range(3)]
    with pytest.raises(LabelingError, match="contains images of another dataset with the name"):
        list_inputs([save(tmp_path / "b" / "shapes", "disk", parts)], frames)


def test_datasets_without_images_are_rejected(tmp_path: Path, content: Any) -> None:
    _, parts = content
    parts["train"].select_columns(["row"]).save_to_disk(tmp_path / "rows")
    with pytest.raises(LabelingError, match="must have one column with images"):
        list_inputs([tmp_path / "rows"], tmp_path / "dataset" / "frames")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    with pytest.raises(LabelingError, match="cannot be read"):
        list_inputs([tmp_path / "broken"], tmp_path / "dataset" / "frames")
    assert not (tmp_path / "dataset").exists()
