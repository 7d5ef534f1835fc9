"""Output of commands: JSON Lines, images, labels and crops."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv.requests import Result
from tests.helpers.color_model import ColorModel, color_frame
from tests.helpers.remote_server import RemoteServer, Reply, remote_server
from tests.helpers.small_commands import command

Run = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        running.on("/v1/models", Reply({"models": []}))
        running.on("/v1/detect", Reply({"objects": []}))
        yield running


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_lines_appear_as_images_are_done(folder: Path) -> None:
    """The second image waits for a file that is written only after the first line was read."""
    process = command("detect", "one.png", "two.jpg", "-c", "red", "--json", stage="wait for the test", cwd=folder)
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert (first["image"], len(first["objects"])) == ("one.png", 1)
    (folder / "go").touch()
    second = json.loads(process.stdout.readline())
    assert (second["image"], second["schema"]) == ("two.jpg", 2)
    assert process.communicate()[0] == ""
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals for another process")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted_commands_keep_the_lines_of_finished_images(folder: Path, name: str, status: int) -> None:
    process = command("detect", "one.png", "two.jpg", "-c", "red", "--json", stage="wait for the test", cwd=folder)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["image"] == "one.png"
    process.send_signal(getattr(signal, name))
    assert process.communicate()[0] == ""
    assert process.returncode == status


def test_folder_of_one_image_prints_json_lines(run: Run, folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "one.png").rename("photos/one.png")
    (line,) = run("detect", "photos", "-c", "red", "--json").stdout.splitlines()
    assert json.loads(line)["schema"] == 2


def test_one_image_prints_a_document_unless_lines_are_requested(run: Run, folder: Path) -> None:
    document = json.loads(run("detect", "one.png", "-c", "red", "--json").stdout)
    assert document["schema"] == 1
    (line,) = run("detect", "one.png", "-c", "red", "--jsonl").stdout.splitlines()
    (image,) = document.pop("images")
    assert json.loads(line) == {**document, **image, "schema": 2}


def test_json_of_missing_images_does_not_load_the_model(run: Run, folder: Path, model: ColorModel) -> None:
    result = run("detect", "no.png", "-c", "red", "--json", "-m", "unknown")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["images"] == [{"image": "no.png", "error": "'no.png': no such image file"}]
    assert not model.closed


REFERENCE = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.mark.skipif(not REFERENCE.exists(), reason="the pages are not part of a source distribution")
def test_every_json_key_is_documented(run: Run, folder: Path) -> None:
    documented: dict[str, set[str]] = {}
    for names, commands in re.findall(r"^\| (`[^|]*`) \| ([a-z, ]+) \|", REFERENCE.read_text(), re.MULTILINE):
        for name in ["detect", "point", "query", "caption"] if commands == "all" else commands.split(", "):
            documented.setdefault(name, set()).update(re.findall(r"`(\w+)`", names))
    Image.fromarray(color_frame(*[("red", (x, 0, x + 5, 5)) for x in (0, 10, 20)])[..., ::-1]).save("row.png")
    seen: dict[str, set[str]] = {}
    for arguments in (
        ("detect", "-c", "red", "--max-objects", 1, "--save-txt", "labels", "--save-crop", "crops"),
        ("point", "-c", "red", "--max-objects", 1),
        ("query", "-q", "What?", "--reasoning"),
        ("caption",),
    ):
        lines = run(*arguments, "row.png", "no.png", "--json", "-o", f"{arguments[0]}/").stdout.splitlines()
        seen[arguments[0]] = {key for line in lines for key in json.loads(line)}
    assert {name: keys - documented[name] for name, keys in seen.items()} == {name: set() for name in seen}
    expected = {"schema", "version", "command", "model", "image", "width", "height", "annotated", "error"}
    assert all(expected <= keys for keys in seen.values())


# --- inputs before models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo.jpg", "'typo.jpg': no such image file"),
        ("broken.png", "'broken.png' is not an image in a supported format"),
        ("empty.png", r"'empty.png' is empty (0 bytes)"),
        ("clip.mp4", "'clip.mp4' is a video; use moondream-cv video"),
        ("*.bmp", "no file matches the pattern '*.bmp'"),
        ("s3://bucket/a.png", "'s3://bucket/a.png' is not an http or https URL"),
        ("http://127.0.0.1:9/a.png?key=secret", "'http://127.0.0.1:9/a.png' cannot be downloaded"),
        ("~no-such-user/a.png", "'~no-such-user/a.png'"),
        ("a\0.png", r"'a\x00.png'"),
        ("x" * 300 + ".png", "File name too long"),
    ],
)
@pytest.mark.parametrize("command", [("detect", "-c", "red"), ("caption",), ("query", "-q", "What?")])
def test_unreadable_images_are_named_before_the_model_is_loaded(
    run: Run, folder: Path, name: str, message: str, command: tuple[str, ...]
) -> None:
    Path("empty.png").touch()
    Path("clip.mp4").write_bytes(b"junk")
    result = run(*command, name, "-m", "a model that does not exist")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.stderr


def test_standard_input_is_checked_before_the_model_is_loaded(run: Run, folder: Path) -> None:
    for content, message in ((b"", "standard input is empty"), (b"junk", "standard input of 4 bytes is not an image")):
        result = run("detect", "-", "-c", "red", "-m", "unknown", stdin=content)
        assert result.exit_code == 1
        assert message in result.stderr


def test_errors_of_images_are_shown_once_and_before_the_model_is_loaded(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "typo.jpg", "-c", "red", "-m", "unknown")
    assert result.stderr.splitlines() == [
        "Error: 'typo.jpg': no such image file",
        "Error: there is no model 'unknown'",
    ]
    result = run("detect", "typo.jpg", "one.png", "-c", "red")
    assert result.stderr == "Error: 'typo.jpg': no such image file\n"


def test_backslashes_in_a_path_are_not_doubled(run: Run, folder: Path) -> None:
    result = run("detect", r"C:\photos\typo.jpg", "-c", "red")
    assert result.stderr == "Error: 'C:\\photos\\typo.jpg': no such image file\n"


def test_image_urls(run: Run, folder: Path, server: RemoteServer) -> None:
    server.on("/shelf/a%20b.png", Reply((folder / "one.png").read_bytes(), kind="image/png"))
    url = f"{server.url}/shelf/a%20b.png?token=secret"
    result = run("detect", url, "-c", "red", "-o", "out/")
    assert result.exit_code == 0, result.stderr
    assert f"{server.url}/shelf/a%20b.png  80×60  1 object found" in result.stdout
    assert "secret" not in result.stdout + result.stderr
    assert Path("out/a b.png").exists()
    urls = [f"{server.url}/shelf/a%20b.png?{number}" for number in range(10)]  # more than are downloaded early
    lines = [json.loads(line) for line in run("detect", *urls, "-c", "red", "--json").stdout.splitlines()]
    assert [(line["image"], len(line["objects"])) for line in lines] == [(url, 1) for url in urls]
    assert sum("a%20b" in asked.path for asked in server.requests) == 11


@pytest.mark.parametrize(
    "suffix", [".avif", ".bmp", ".gif", ".heic", ".ico", ".jfif", ".jp2", ".pgm", ".ppm", ".tga", ".tiff", ".webp"]
)
def test_folders_include_images_of_every_format(run: Run, folder: Path, suffix: str) -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    (folder / "photos").mkdir()
    kinds = {".heic": "HEIF", ".jfif": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA"}
    Image.open("one.png").save(f"photos/a{suffix.upper()}", kinds.get(suffix))
    (line,) = run("detect", "photos", "-c", "red", "--json").stdout.splitlines()
    assert "error" not in json.loads(line)


def test_recursive_folders(run: Run, folder: Path) -> None:
    for name in ("photos/b/2.png", "photos/a.png", "photos/b/1.png", "photos/.hidden/3.png", "photos/b/.4.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes((folder / "one.png").read_bytes())

    def names(*arguments: str) -> list[str]:
        lines = run("detect", *arguments, "-c", "red", "--json").stdout.splitlines()
        return [Path(json.loads(line)["image"]).as_posix() for line in lines]

    assert names("photos") == ["photos/a.png"]
    everything = ["photos/a.png", "photos/b/1.png", "photos/b/2.png"]
    assert names("photos", "--recursive") == everything
    assert names("photos/", "-r") == everything
    assert names("photos/**") == everything
    # A shell gives the folder among the matches as an argument, so a quoted glob goes into it as well.
    assert names("photos/*") == names("photos/a.png", "photos/b") == everything


# --- annotated images ------------------------------------------------------------------------------------------------


def test_output_with_a_slash_is_a_folder(run: Run, folder: Path) -> None:
    assert run("detect", "one.png", "-c", "red", "-o", "out.v1/").exit_code == 0
    assert Path("out.v1/one.png").is_file()
    assert run("detect", "two.jpg", "-c", "red", "-o", "out.v1").exit_code == 0  # the folder exists
    assert Path("out.v1/two.jpg").is_file()


@pytest.mark.parametrize(
    "arguments", [("detect", "-c", "red"), ("point", "-c", "red"), ("caption",), ("query", "-qA?")]
)
def test_output_dash_prints_only_a_png(run: Run, folder: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "one.png", "-o", "-")
    assert result.exit_code == 0
    image = Image.open(io.BytesIO(result.stdout_bytes))
    assert (image.format, image.width) == ("PNG", 80)
    assert result.stderr  # the text


def test_existing_outputs_are_replaced_only_on_request(run: Run, folder: Path) -> None:
    Path("out").mkdir()
    for name in ("out/one.png", "out/two.jpg", "found.png"):
        Path(name).write_bytes(b"mine")
    for arguments, message in (
        (("one.png", "-o", "found.png"), "--output: found.png exists; add --overwrite, or choose another name"),
        (("one.png", "two.jpg", "-o", "out"), f"{Path('out/one.png')} and 1 more files exist; add --overwrite"),
    ):
        result = run("detect", *arguments, "-c", "red", "-m", "unknown")
        assert (result.exit_code, message in result.stderr) == (2, True)
        assert run("detect", *arguments, "-c", "red", "--overwrite").exit_code == 0
    assert b"mine" not in {path.read_bytes() for path in (Path("found.png"), *Path("out").iterdir())}


def test_input_image_is_never_replaced(run: Run, folder: Path) -> None:
    before = Path("one.png").read_bytes()
    result = run("detect", "one.png", "-c", "red", "-o", "./one.png", "--overwrite")
    assert result.exit_code == 2
    assert "would replace an input image" in result.stderr
    assert Path("one.png").read_bytes() == before


# --- labels and crops ------------------------------------------------------------------------------------------------


def test_save_txt_writes_a_dataset_that_supervision_reads(run: Run, folder: Path) -> None:
    arguments = ("detect", "one.png", "two.jpg", "-c", "green,red", "--json", "--save-txt", "labels")
    result = run(*arguments)
    assert result.exit_code == 0
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["labels"], second["labels"]) == (str(Path("labels/one.txt")), str(Path("labels/two.txt")))
    assert Path("labels/two.txt").read_text() == ""
    Path("images").mkdir()
    for name in ("one.png", "two.jpg"):
        Path(name).rename(f"images/{name}")
    dataset = sv.DetectionDataset.from_yolo("images", "labels", "labels/data.yaml")
    assert dataset.classes == ["green", "red"]
    found = {Path(path).name: detections for path, _, detections in dataset}
    order = np.argsort(found["one.png"].class_id)
    np.testing.assert_allclose(found["one.png"].xyxy[order], [[50, 20, 70, 40], [10, 5, 30, 45]], atol=0.01)
    assert found["one.png"].class_id[order].tolist() == [0, 1]
    assert len(found["two.jpg"]) == 0


def test_labels_are_replaced_only_on_request(run: Run, folder: Path) -> None:
    assert run("detect", "one.png", "-c", "green,red", "--save-txt", "labels").exit_code == 0
    assert run("detect", "two.jpg", "-c", "green,red", "--save-txt", "labels").exit_code == 0
    again = run("detect", "one.png", "-c", "green,red", "--save-txt", "labels")
    assert (again.exit_code, "one.txt exists; add --overwrite" in again.stderr) == (2, True)
    (folder / "labels" / "one.txt").unlink()
    other = run("detect", "one.png", "-c", "red", "--save-txt", "labels")
    assert (other.exit_code, "data.yaml lists other classes" in other.stderr) == (2, True)
    assert run("detect", "one.png", "-c", "red", "--save-txt", "labels", "--overwrite").exit_code == 0
    assert Path("labels/one.txt").read_text().split()[0] == "0"


def test_save_crop_writes_the_pixels_of_each_box(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "-c", "red,green", "--save-crop", "crops", "--json")
    assert result.exit_code == 0
    (image,) = json.loads(result.stdout)["images"]
    assert image["crops"] == [str(Path("crops/red/one-1.jpg")), str(Path("crops/green/one-2.jpg"))]
    for path, size, color in zip(image["crops"], [(20, 40), (20, 20)], [(255, 0, 0), (0, 255, 0)], strict=True):
        crop = Image.open(path)
        assert crop.size == size
        assert np.abs(np.asarray(crop).astype(int) - color).max() < 8
    again = run("detect", "one.png", "-c", "red", "--save-crop", "crops")
    assert (again.exit_code, "one-1.jpg exists; add --overwrite" in again.stderr) == (2, True)
    assert run("detect", "one.png", "-c", "red", "--save-crop", "crops", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("../etc", "_etc"), ("a/b", "a_b"), ("..", "_"), ("CON", "_CON"), ("a:b?", "a_b_"), ("日本", "日本")],
)
def test_crop_folders_have_safe_names(name: str, expected: str) -> None:
    from moondream_cv.cli.exports import _file_name

    assert _file_name(name) == expected


# --- other options ---------------------------------------------------------------------------------------------------


def test_slices_find_small_objects_at_their_place(run: Run, folder: Path, model: ColorModel) -> None:
    patches = [("red", (x, y, x + 6, y + 6)) for x, y in ((3, 3), (180, 20), (84, 84), (250, 130))]
    Image.fromarray(color_frame(*patches, size_wh=(300, 200))[..., ::-1]).save("large.png")

    def found(*options: object) -> list[list[float]]:
        document = json.loads(run("detect", "large.png", "-c", "red", "--json", *options).stdout)
        return sorted(item["xyxy"] for item in document["images"][0]["objects"])

    expected = sorted([float(value) for value in box] for _, box in patches)
    assert found("--slice", 100) == expected
    shapes = [request.image.shape for requests in model.runs for request in requests]
    assert len(shapes) > 4
    assert set(shapes) == {(100, 100, 3)}
    assert found("--slice", 100, "--max-area", 0.0005) == []  # of the whole image
    assert found("--slice", 100, "--max-area", 0.001) == expected
    assert run("detect", "two.jpg", "-c", "red", "--slice", 40).exit_code == 0  # without objects


def test_classes_file(run: Run, folder: Path) -> None:
    Path("names.txt").write_bytes("\ufeffred\r\n\r\n  green, or not \r\n".encode())
    result = run("detect", "one.png", "-c", "blue", "--classes-file", "names.txt", "--json")
    assert json.loads(result.stdout)["classes"] == ["blue", "red", "green, or not"]
    result = run("point", "one.png", "--classes-file", "names.txt", "-c", "red")
    assert (result.exit_code, "duplicates: 'red'" in result.stderr) == (2, True)


@pytest.mark.parametrize(("keys", "shown"), [("ab", 2), ("q", 1), ("\x1b", 1), ("aQ", 2)])
def test_show_waits_for_a_key_after_each_image(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, keys: str, shown: int
) -> None:
    from tests.video.test_writers import FakeScreen

    class Screen(FakeScreen):
        """Presses one key per image, in the longer of the two waits for keys."""

        def waitKey(self, milliseconds: int) -> int:
            return ord(keys[len(self.images) - 1]) if milliseconds > 1 and self.images else -1

        def imshow(self, title: str, image: np.ndarray) -> None:
            super().imshow(title, image)
            self.images[image.tobytes()] = image

        images: dict[bytes, np.ndarray]

    screen = Screen()
    screen.images = {}
    monkeypatch.setitem(sys.modules, "cv2", screen)
    monkeypatch.setattr("moondream_cv.video.writers.window._check_screen", lambda title: None)
    result = run("detect", "one.png", "two.jpg", "-c", "red", "--show", "-o", "out/")
    assert result.exit_code == 0, result.stderr
    assert len(screen.images) == shown
    assert next(iter(screen.images.values()))[25, 20].tolist() == [0, 0, 255]  # BGR, as OpenCV shows it
    assert len(list(Path("out").iterdir())) == 2
    assert screen.calls[-1] == "close"


def test_quiet_prints_only_errors_on_standard_error(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "no.png", "-c", "red", "-q", "-o", "out/", "--max-objects", 1)
    assert result.stderr == "Error: 'no.png': no such image file\n"
    assert "1 object found" in result.stdout
    assert run("query", "one.png", "-q", "What?", "--quiet", "-o", "a.png").stderr == ""


def test_verbose_shows_the_traceback_of_a_failed_image(
    run: Run, folder: Path, model: ColorModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(requests: Any) -> list[Result]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(model, "run", fail)
    assert run("detect", "one.png", "-c", "red", "-v").exit_code == 1
    assert "Traceback" in caplog.text
    caplog.clear()
    assert run("detect", "one.png", "-c", "red").exit_code == 1
    assert caplog.text == ""


@pytest.mark.parametrize("option", ["--device=cpu", "--dtype=float32", "--adapter=a.pt"])
def test_options_of_local_models_are_rejected_for_servers(server: RemoteServer, folder: Path, option: str) -> None:
    result = command("detect", "one.png", "-c", "red", "-m", server.url, option, cwd=folder).communicate()
    assert option.partition("=")[0] in result[1]
    assert "is a server" in result[1]


def test_adapter_is_checked_before_the_weights_are_loaded(folder: Path) -> None:
    process = command("detect", "one.png", "-c", "red", "--adapter", "no-such-file.pt", cwd=folder)
    stderr = process.communicate()[1]
    assert "no-such-file.pt" in stderr
    assert process.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full of Linux")
@pytest.mark.parametrize(
    "arguments",
    [
        ("detect", "one.png", "-c", "dog", "-m", "tiny"),
        ("detect", "one.png", "-c", "dog", "-m", "tiny", "--json"),
        ("detect", "one.png", "one.png", "-c", "dog", "-m", "tiny", "--json"),
        ("detect", "one.png", "-c", "dog", "-m", "tiny", "-o", "-"),
        ("download", "tiny"),
        ("--version",),
        ("--help",),
        ("detect", "--help"),
    ],
    ids=" ".join,
)
def test_full_standard_output_prints_one_line(folder: Path, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = command(*arguments, cwd=folder, stdout=full)
        stderr = process.communicate()[1]
    assert process.returncode == 1
    assert "No space left on device" in stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    assert stderr.count("Error") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full of Linux")
def test_device_as_output_is_rejected(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "-c", "red", "-o", "/dev/full")
    assert result.exit_code == 2
    assert result.stderr == "Error: --output /dev/full: /dev/full is not a folder; name a file that ends in .png\n"


def test_closed_pipe_ends_the_command_silently(folder: Path) -> None:
    for number in range(20):
        cv2.imwrite(f"{number}.png", color_frame())
    process = command("detect", *(f"{n}.png" for n in range(20)), "-c", "dog", "-m", "tiny", "--json", cwd=folder)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    stderr = process.stderr.read()
    assert process.wait() == 1
    assert "Error" not in stderr
    assert "Exception" not in stderr
