"""Inputs of labeling: which images are listed, in which order, under which names, and the errors before any work."""

from __future__ import annotations

import importlib.util
import os
import pickle
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.export_names import MAX_NAME_BYTES
from moondream_cv.labeling.inputs import InputImage, list_inputs
from moondream_cv.labeling.layout import LABELS, SETTINGS
from moondream_cv.labeling.records import ImageRecord, LabeledObject
from tests.helpers.clips import http_server
from tests.helpers.labeled_scenes import LAYOUTS, arrow_scenes, label_of, write_dataset


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Folder of frames in a dataset that does not exist yet."""
    return tmp_path / "dataset" / "frames"


def touch(folder: Path, *names: str) -> Path:
    """Create files that are not images, so that opening one would fail."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not an image")
    return folder


def names(images: list[InputImage]) -> list[str]:
    return [image.name for image in images]


def message(inputs: list[str | os.PathLike[str]], frames: Path) -> str:
    with pytest.raises(LabelingError) as raised:
        list_inputs(inputs, frames)
    assert not frames.parent.exists()
    return str(raised.value)


def test_folder_is_listed_recursively_in_order_of_paths(tmp_path: Path, frames: Path) -> None:
    touch(tmp_path / "in", "b.JPG", "a2.png", "a10.webp", "street/001.jpg", "street/x/1.tif", "notes.txt")
    touch(tmp_path / "in", ".hidden.jpg", ".cache/c.jpg", "old/labeling.json", "old/train/a.jpg")
    images = list_inputs([tmp_path / "in"], frames)
    assert names(images) == ["a10.webp", "a2.png", "b.JPG", "street__001.jpg", "street__x__1.tif"]
    assert [image.source for image in images][3] == str(tmp_path / "in" / "street" / "001.jpg")
    assert images[3].open() == tmp_path / "in" / "street" / "001.jpg"
    assert all(image.given is None and image.split is None and image.group is None for image in images)
    assert names(list_inputs([tmp_path / "in"], frames, recursive=False)) == ["a10.webp", "a2.png", "b.JPG"]
    assert pickle.loads(pickle.dumps(images)) == images


def test_dataset_in_its_input_folder_is_skipped(tmp_path: Path) -> None:
    folder = touch(tmp_path / "in", "a.jpg", "out/train/images/a.jpg", "out/frames/clip__000000.jpg")
    assert names(list_inputs([folder], folder / "out" / "frames")) == ["a.jpg"]
    for pattern in ("**/*.jpg", "*"):
        assert names(list_inputs([f"{folder}/{pattern}"], folder / "out" / "frames")) == ["a.jpg"]
    with pytest.raises(LabelingError, match="is the dataset that is written; choose another folder"):
        list_inputs([folder], folder / "frames")
    (tmp_path / "list.txt").write_text("in/out/train/images/a.jpg\n")
    for inside in (folder / "out" / "train", folder / "out" / "train" / "images" / "a.jpg", tmp_path / "list.txt"):
        with pytest.raises(LabelingError, match="is in the dataset that is written; choose another folder"):
            list_inputs([inside], folder / "out" / "frames")


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need privileges")
def test_symbolic_links_are_followed_once(tmp_path: Path, frames: Path) -> None:
    folder = touch(tmp_path / "in", "a/1.jpg", "a/b/2.jpg")
    touch(tmp_path / "elsewhere", "3.jpg")
    (folder / "a" / "b" / "loop").symlink_to(folder)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "more")
    (folder / "broken.jpg").symlink_to(tmp_path / "missing.jpg")
    (folder / "cycle.jpg").symlink_to("cycle.jpg")
    found = names(list_inputs([folder], frames))
    assert found == ["a__1.jpg", "a__b__2.jpg", "again__3.jpg", "broken.jpg", "cycle.jpg"]


def test_sources_do_not_depend_on_the_working_directory(
    tmp_path: Path, frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "in", "a.jpg", "b/c.jpg")
    (tmp_path / "list.txt").write_text("in/a.jpg\n")
    monkeypatch.chdir(tmp_path)
    first = list_inputs(["in", "list.txt"], frames), list_inputs(["in/*.jpg"], frames)
    monkeypatch.chdir(tmp_path / "in")
    assert (list_inputs([".", "../list.txt"], frames), list_inputs(["*.jpg"], frames)) == first


def test_globs_name_images_below_their_literal_folder(tmp_path: Path, frames: Path) -> None:
    folder = touch(tmp_path / "in", "cam1/a.jpg", "cam1/notes.txt", "cam2/a.jpg", "cam2/x/b.jpg", "c.jpg")
    assert names(list_inputs([f"{folder}/*/a.jpg"], frames)) == ["cam1__a.jpg", "cam2__a.jpg"]
    assert names(list_inputs([f"{folder}/cam*"], frames)) == ["cam1__a.jpg", "cam2__a.jpg", "cam2__x__b.jpg"]
    assert names(list_inputs([f"{folder}/**/*.jpg"], frames)) == names(list_inputs([folder], frames))
    touch(tmp_path / "odd[1]", "a.jpg")
    assert names(list_inputs([tmp_path / "odd[1]", tmp_path / "odd[1]" / "a.jpg"], frames)) == ["a.jpg"]


def test_list_file_names_images_relative_to_the_file(tmp_path: Path, frames: Path) -> None:
    touch(tmp_path, "lists/cam1/a.jpg", "lists/cam2/a.jpg", "other/b.jpg", "c.jpg")
    lines = ["# comment", "cam2/a.jpg", "", "cam1/a.jpg", str(tmp_path / "c.jpg"), "../other/b.jpg"]
    path = tmp_path / "lists" / "images.txt"
    path.write_text("\r\n".join([*lines, "https://example.org/d%20e.png?key=1"]), encoding="utf-8-sig")
    images = list_inputs([path], frames)
    assert names(images) == ["cam2__a.jpg", "cam1__a.jpg", "c.jpg", "b.jpg", "d e.png"]
    assert images[3].source == str(tmp_path / "other" / "b.jpg")
    assert images[4].source == "https://example.org/d%20e.png?key=1"

    path.write_text("cam1/a.jpg\ncam1/b.jpg\n")
    assert f'{path}", line 2: "{tmp_path}/lists/cam1/b.jpg": no such file; did you mean' in message([path], frames)
    path.write_text("# nothing\n")
    assert "is empty; write a path or a URL of an image per line" in message([path], frames)


def test_names_are_valid_on_all_systems(tmp_path: Path, frames: Path) -> None:
    folder = touch(tmp_path / "in", "con.jpg", "é/ü.jpg")
    (tmp_path / "list.txt").write_text("https://example.org/a%3Ab%2F%5C.jpg")
    images = list_inputs([folder, tmp_path / "list.txt"], frames)
    assert names(images) == ["_con.jpg", "é__ü.jpg", "a_b__.jpg"]


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["a.jpg", "a.png"], "rename one of them"),
        (["a.jpg", "A.JPG"], "rename one of them"),
        (["x__a.jpg", "x/a.jpg"], "rename one of them"),
        (["x/e\u0301.jpg", "x/\u00e9.png"], "rename one of them"),
        (["a.jpg", "a.mp4"], "rename one of them"),
    ],
)
def test_names_with_equal_stems_are_rejected(tmp_path: Path, frames: Path, files: list[str], remedy: str) -> None:
    folder = touch(tmp_path / "in", *files)
    if len(list(folder.rglob("*.*"))) < 2:
        pytest.skip("the file system ignores case")
    text = message([folder], frames)
    assert all(str(folder / file) in text for file in files)
    assert remedy in text


def test_equal_names_of_two_folders_name_the_common_folder(tmp_path: Path, frames: Path) -> None:
    touch(tmp_path / "in", "cam1/a.jpg", "cam2/a.jpg")
    text = message([tmp_path / "in" / "cam1", tmp_path / "in" / "cam2"], frames)
    assert f'rename one of them, or give the folder "{tmp_path / "in"}" as the input' in text
    assert names(list_inputs([tmp_path / "in"], frames)) == ["cam1__a.jpg", "cam2__a.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="such names do not exist there")
def test_invalid_names_are_rejected(tmp_path: Path, frames: Path) -> None:
    touch(tmp_path / "control", "a\nb.jpg")
    assert r'a\nb.jpg" contains control characters; rename the file' in message([tmp_path / "control"], frames)
    touch(tmp_path / "long", f"{'d' * 200}/{'f' * 200}.jpg")
    text = message([tmp_path / "long"], frames)
    assert f"would have 406 bytes, more than {MAX_NAME_BYTES}" in text
    assert len(list_inputs([tmp_path / "long" / ("d" * 200)], frames)) == 1
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xf6n"))
    touch(latin, "a.jpg")
    assert r'gr\udcf6n/a.jpg" is not text in UTF-8; rename its folders' in message([latin], frames)


def test_unsuitable_inputs_are_rejected(tmp_path: Path, frames: Path) -> None:
    touch(tmp_path, "photos/a.jpg", "texts/a.pdf", "texts/b.pdf", "texts/README", "file.pdf")
    (tmp_path / "empty").mkdir()
    assert "there are no inputs; name a folder" in message([], frames)
    assert "an input must not be empty" in message([" "], frames)
    text = message([tmp_path / "photo"], frames)
    assert f'"{tmp_path / "photo"}": no such file or folder; did you mean "{tmp_path / "photos"}"?' in text
    assert "does not exist either" in message([tmp_path / "no" / "photos"], frames)
    assert 'empty" contains no files; images have .avif, ' in message([tmp_path / "empty"], frames)
    text = message([tmp_path / "texts"], frames)
    assert 'texts" contains no images, only 3 other files (.pdf, no suffix); images have .avif, ' in text
    assert "matches no images, only 2 other files (.pdf)" in message([f"{tmp_path}/texts/*.pdf"], frames)
    assert "matches no file; check the pattern" in message([f"{tmp_path}/*.jpg"], frames)
    assert 'file.pdf" has an unknown suffix' in message([tmp_path / "file.pdf"], frames)
    assert "is a file URL; name its path" in message([f"file://{tmp_path}/photos"], frames)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="all folders are readable")
def test_unreadable_folders_are_rejected(tmp_path: Path, frames: Path) -> None:
    folder = touch(tmp_path / "in", "a.jpg", "locked/b.jpg")
    (folder / "locked").chmod(0)
    try:
        assert 'locked" cannot be read: Permission denied' in message([folder], frames)
    finally:
        (folder / "locked").chmod(0o700)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_datasets_keep_labels_splits_and_file_names(tmp_path: Path, frames: Path, layout: str) -> None:
    folder, splits = tmp_path / "in", ("test", "train", "valid")
    scenes = {split: arrow_scenes(3, seed) for seed, split in enumerate(splits)}
    for split in splits:
        write_dataset(folder, scenes[split], layout, split)
    touch(folder, "extra/new.jpg")
    images = list_inputs([folder], frames)
    assert names(images) == ["new.jpg", *(f"{split}-{i:03}.png" for split in splits for i in range(3))]
    assert images[0].given is None
    for image, (split, i) in zip(images[1:], [(split, i) for split in splits for i in range(3)], strict=True):
        scene = scenes[split][i]
        height, width = scene.image.shape[:2]
        found = image.given_objects(width, height)
        assert image.split == split
        assert {one.origin for one in found} <= {"given"}
        expected = sorted((label_of(scene, k), tuple(item.xyxy)) for k, item in enumerate(scene.objects))
        assert [one.class_name for one in sorted(found, key=_by_name)] == [name for name, _ in expected]
        boxes = [one.xyxy for one in sorted(found, key=_by_name)]
        tolerance = 1.01 if layout == "voc" else 0.02  # VOC rounds to pixels
        assert np.abs(np.array(boxes) - np.array([box for _, box in expected])).max(initial=0) < tolerance


def _by_name(labeled: LabeledObject) -> tuple[str, tuple[float, ...]]:
    return labeled.class_name, labeled.xyxy


def test_datasets_with_equal_file_names_keep_relative_paths(tmp_path: Path, frames: Path) -> None:
    folder = tmp_path / "in"
    for split in ("train", "val"):
        touch(folder, f"images/{split}/1.jpg")
    touch(folder, "labels/train/1.txt")
    (folder / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 0.5 0.5")
    (folder / "data.yaml").write_text("names: [dog]")
    images = list_inputs([folder], frames)
    assert [(image.name, image.split) for image in images] == [
        ("images__train__1.jpg", "train"),
        ("images__val__1.jpg", "valid"),
    ]
    assert images[0].given_objects(100, 50) == (LabeledObject("dog", (25, 12.5, 75, 37.5), None, "given"),)
    assert images[1].given == ()
    (folder / "labels" / "train" / "1.txt").write_text("1 0.5 0.5 0.5 0.5")
    assert "labels" in message([folder], frames)
    aliases = "".join(f"a{i}: &a{i} [{9 * f'*a{i - 1},'}]\n" for i in range(1, 12))  # 9 ** 11 texts
    (folder / "data.yaml").write_text(f"a0: &a0 x\n{aliases}names: [*a11]")
    assert "a class name must be a text, got a list" in message([folder], frames)


def test_labeled_dataset_yields_its_objects(tmp_path: Path, frames: Path) -> None:
    folder = touch(tmp_path / "in", "frames/clip__000000.jpg", "train/images/gone.jpg", SETTINGS)
    touch(tmp_path, "a.jpg")
    model = LabeledObject("dog", (1.23, 4.56, 33.33, 66.67), 0.9, prompt="puppy")
    point = LabeledObject("cat", (10.01, 20.02, 10.01, 20.02), None, "human", is_point=True)
    size = {"width": 97, "height": 71}
    records = [
        ImageRecord("a.jpg", str(tmp_path / "a.jpg"), **size, objects=(model, point), split="valid"),
        ImageRecord("copy.jpg", str(tmp_path / "copy.jpg"), duplicate_of="a.jpg"),
        ImageRecord(
            "clip__000000.jpg", "frames/clip__000000.jpg", **size, objects=(model,), group="clip", reviewed=True
        ),
        ImageRecord("gone.jpg", "/moved/gone.jpg", **size),
        ImageRecord("bad.jpg", "https://example.org/bad.jpg", error="damaged"),
    ]
    (folder / LABELS).write_text("".join(record.to_line() for record in records))
    first, frame, gone = list_inputs([folder], frames)
    assert (first.name, first.source, first.split) == ("a.jpg", str(tmp_path / "a.jpg"), "valid")
    assert first.given_objects(97, 71) == (model, point)
    assert (frame.source, frame.group) == (str(folder / "frames" / "clip__000000.jpg"), "clip")
    assert frame.given_objects(97, 71) == (model,)
    assert gone.source == str(folder / "train" / "images" / "gone.jpg")
    assert gone.given == ()


def test_urls_of_file_systems_are_listed_and_read(tmp_path: Path, frames: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("b.jpg", "a/[1] x.png", ".hidden/c.jpg", "notes.txt"):
        files.pipe(f"/inputs/{name}", name.encode())
    try:
        images = list_inputs(["memory://inputs"], frames)
        assert [(image.name, image.source) for image in images] == [
            ("a__[1] x.png", "memory://inputs/a/[1] x.png"),
            ("b.jpg", "memory://inputs/b.jpg"),
        ]
        assert [image.open() for image in images] == [b"a/[1] x.png", b"b.jpg"]
        assert names(list_inputs(["memory://inputs/*/*.png"], frames)) == ["a__[1] x.png"]
        assert names(list_inputs(["memory://inputs/b.jpg"], frames)) == ["b.jpg"]
        assert names(list_inputs(["memory://inputs/"], frames, recursive=False)) == ["b.jpg"]
        assert "contains no images, only 1 other file (.txt)" in message(["memory://inputs/notes.txt"], frames)
    finally:
        files.rm("/inputs", recursive=True)
    assert '"memory://inputs": no such file or folder' in message(["memory://inputs"], frames)


def test_images_in_archives_are_listed_and_read(tmp_path: Path, frames: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1.jpg", b"first")
        archive.writestr("x/y/2.jpg", b"second")
    images = list_inputs([f"zip://x::{tmp_path}/a.zip"], frames)
    assert names(images) == ["1.jpg", "y__2.jpg"]
    assert [image.open() for image in images] == [b"first", b"second"]


def test_http_urls_are_single_images(frames: Path) -> None:
    with http_server(lambda reply: reply.send_file(b"content", "image/png")) as url:
        (image,) = list_inputs([f"{url}/a/b.png"], frames)
        assert (image.name, image.source, image.open()) == ("b.png", f"{url}/a/b.png", b"content")
    assert "does not end with a suffix of images" in message(["https://example.org/?id=3"], frames)


def test_unusable_urls_are_rejected(frames: Path) -> None:
    missing = next(
        protocol for protocol, entry in sorted(known_implementations.items()) if not _can_import(entry["class"])
    )
    assert f'"{missing}://bucket" needs another package: ' in message([f"{missing}://bucket"], frames)
    assert "Protocol not known: nothing" in message(["nothing://a/b"], frames)
    text = message(["sftp://me:secret@host/images"], frames)
    assert "contains a password" in text
    assert "secret" not in text


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name.rpartition(".")[0])
    except ImportError:
        return False
    return True


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_hugging_face_datasets_without_the_package_are_rejected(tmp_path: Path, frames: Path) -> None:
    touch(tmp_path, "saved/state.json", "files/data/train-00000-of-00001.parquet")
    for name in ("saved", "files"):
        assert "needs the package datasets; pip install datasets" in message([tmp_path / name], frames)
