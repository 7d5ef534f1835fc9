"""`moondream-cv detect` and `point`, on images of color patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import __version__
from tests.helpers.color_model import ColorModel, color_frame

Run = Callable[..., Any]

RED, GREEN = [10, 5, 30, 45], [50, 20, 70, 40]


def lines_of(result: Any) -> list[dict[str, Any]]:
    """Return the JSON Lines on standard output."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_detect_prints_a_table(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "-c", "red", "-c", "green")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["one.png", "80×60", "2", "objects", "found"] in lines
    assert ["red", "1.00", *map(str, RED)] in lines
    assert ["green", "1.00", *map(str, GREEN)] in lines
    assert result.stderr == ""


def test_detect_json_is_the_only_standard_output(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "two.jpg", "-c", "blue,red", "--json", "-m", "colors", "-o", "out")
    assert result.exit_code == 0
    head = {
        "schema": 2,
        "version": __version__,
        "command": "detect",
        "model": "colors",
        "classes": ["blue", "red"],
        "has_scores": True,
    }
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {
            **head,
            "image": "one.png",
            "width": 80,
            "height": 60,
            "objects": [{"class_name": "red", "class_id": 1, "confidence": 1.0, "xyxy": RED}],
            "annotated": str(Path("out/one.png")),
        },
        {**head, "image": "two.jpg", "width": 80, "height": 60, "objects": [], "annotated": str(Path("out/two.jpg"))},
    ]
    assert "Saved" in result.stderr


def test_point_prints_points(run: Run, folder: Path) -> None:
    result = run("point", "one.png", "-c", "red,blue", "--json")
    assert json.loads(result.stdout)["images"] == [
        {
            "image": "one.png",
            "width": 80,
            "height": 60,
            "points": [{"class_name": "red", "class_id": 0, "confidence": 1.0, "xy": [20, 25]}],
        }
    ]
    text = run("point", "one.png", "two.jpg", "-c", "red").stdout
    assert "one.png  80×60  1 point found" in text
    assert "two.jpg  80×60  nothing found" in text


def test_options_reach_the_detector(run: Run, folder: Path, model: ColorModel) -> None:
    run("detect", "one.png", "-c", "red", "--max-objects", 3)
    assert model.runs[-1][0].settings.max_objects == 3
    Image.fromarray(color_frame(("red", (0, 0, 10, 10)), ("red", (5, 5, 20, 20)))[..., ::-1]).save("corner.png")
    found = json.loads(run("detect", "corner.png", "-c", "red", "--json").stdout)["images"][0]["objects"]
    assert found[0]["confidence"] < 0.9
    assert json.loads(run("detect", "corner.png", "-c", "red", "--json", "--confidence", 0.9).stdout)["images"][0][
        "objects"
    ] == []  # fmt: skip


def test_max_area_and_min_size_filter_boxes(run: Run, folder: Path) -> None:
    Image.fromarray(color_frame(("red", (0, 0, 80, 59)), ("green", (50, 20, 52, 40)))[..., ::-1]).save("boxes.png")

    def found(*options: object) -> list[str]:
        result = run("detect", "boxes.png", "-c", "red,green", "--json", *options)
        return [item["class_name"] for item in json.loads(result.stdout)["images"][0]["objects"]]

    assert found() == ["red", "green"]
    assert found("--max-area", 0.95) == ["green"]
    assert found("--min-size", 3) == ["red"]
    assert found("--max-area", 0.95, "--min-size", 3) == []


def test_truncation_is_reported(run: Run, folder: Path) -> None:
    row = color_frame(*[("red", (x, 0, x + 5, 5)) for x in range(0, 80, 10)], ("green", (50, 20, 70, 40)))
    Image.fromarray(row[..., ::-1]).save("row.png")
    result = run("detect", "row.png", "one.png", "-c", "green,red", "--max-objects", 3, "--json")
    cut, whole = lines_of(result)
    assert cut["truncated"] == ["red"]
    assert "truncated" not in whole
    assert result.stderr == "row.png: there may be more of 'red' than --max-objects 3\n"
    assert "more of 'red'" in run("detect", "row.png", "-c", "red", "--max-objects", 3).stderr
    assert run("detect", "row.png", "-c", "red").stderr == ""


def test_missing_scores_are_printed_as_a_dash(run: Run, folder: Path, model: ColorModel) -> None:
    model.has_scores = False
    assert ["red", "-", *map(str, RED)] in [
        line.split() for line in run("detect", "one.png", "-c", "red").stdout.splitlines()
    ]
    assert json.loads(run("detect", "one.png", "-c", "red", "--json").stdout)["has_scores"] is False


# --- inputs ----------------------------------------------------------------------------------------------------------


def names_in(result: Any) -> list[str]:
    return [image["image"] for image in lines_of(result)]


def test_globs_folders_and_standard_input_are_expanded(run: Run, folder: Path) -> None:
    (folder / "more").mkdir()
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (folder / "more" / name).write_bytes((folder / "one.png").read_bytes())
    assert names_in(run("detect", "*.jpg", "one.*", "-c", "red", "--json")) == ["two.jpg", "one.png"]
    more = [str(Path("more") / "a.JPG"), str(Path("more") / "b.png")]
    assert names_in(run("detect", "more", "-c", "red", "--json")) == more
    assert names_in(run("detect", "**/b.png", "-c", "red", "--jsonl")) == more[1:]
    result = run("detect", "-", "one.png", "-c", "red", "--json", stdin=(folder / "one.png").read_bytes())
    first, second = lines_of(result)
    assert (first["image"], first["objects"]) == ("-", second["objects"])


def test_existing_file_takes_precedence_over_a_glob(run: Run, folder: Path) -> None:
    (folder / "[bold]x.png").write_bytes((folder / "one.png").read_bytes())
    result = run("detect", "[bold]x.png", "-c", "red")
    assert result.exit_code == 0
    assert "[bold]x.png  80×60  1 object found" in result.stdout


def test_failed_image_does_not_stop_the_others(run: Run, folder: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 255)).save("magenta.png")
    result = run("detect", "missing.png", "broken.png", "no*.png", "magenta.png", "one.png", "-c", "red", "--json")
    assert result.exit_code == 1
    *bad, good = lines_of(result)
    assert [image["image"] for image in bad] == ["missing.png", "broken.png", "no*.png", "magenta.png"]
    assert "no such image file" in bad[0]["error"]
    assert "not an image in a supported format" in bad[1]["error"]
    assert len(good["objects"]) == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("Error: ") for line in lines)
    assert lines[3] == "Error: magenta.png: http://colors rejected the image"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.png"], "moondream-cv detect one.png -c dog -c 'red circle'"),
        (["one.png", "dog", "red car"], "moondream-cv detect one.png -c dog -c 'red car'"),
        (["one.png", "-c", "red,red"], "must be unique; duplicates: 'red'"),
        (["one.png", "-c", "red,"], "class names must not be empty, got 'red,'; write 'red'"),
        (["one.png", "-c", "red,,blue"], "write 'red,blue'"),
        (["one.png", "-c", " "], "class names must not be empty"),
        (["one.png", "-c", ","], "class names must not be empty, got ','"),
        (["one.png", "-c", "red", "--device", "banana"], "no device 'banana'"),
        (["one.png", "two.jpg", "-c", "red", "-o", "out.png"], "is one file for 2 images; use a folder"),
        (["one.png", "-c", "red", "-o", "out.gif"], "got .gif"),
        (["one.png", "-c", "red", "-o", "./one.png"], "would replace an input image"),
        (["one.png", "-c", "red", "-o", "."], "would replace an input image"),
        (["one.png", "-c", "red", "-o", "file"], "file is not a folder; name a file that ends in .png"),
        (["one.png", "-c", "red", "-o", f"{'x' * 255}.png"], "File name too long; choose another name"),
        (["one.png", "-c", "red", "-o", "two.jpg"], "two.jpg exists; add --overwrite"),
        (["one.png", "-c", "red", "-o", "out.v1"], "end the name with a slash: -o out.v1/"),
        (["one.png", "-c", "red", "-o", "file/out.png"], "--output file: file is not a folder"),
        (["one.png", "-c", "red", "-o", ""], "--output must not be empty"),
        (["one.png", "two.jpg", "-c", "red", "-o", "-"], "--output - prints one image, got 2"),
        (["one.png", "-c", "red", "-o", "-", "--json"], "--output - and --json both print on standard output"),
        (["one.png", "-c", "red", "--save-txt", "file"], "--save-txt file: file is not a folder"),
        (["one.png", "-c", "red", "--save-crop", "file"], "--save-crop file: file is not a folder"),
        (["one.png", "--classes-file", "no.txt"], "--classes-file no.txt cannot be read: No such file or directory"),
        (["one.png", "--classes-file", "file"], "--classes-file file contains no names"),
        (["one.png", "--classes-file", "one.png"], "--classes-file one.png must be UTF-8 text"),
        (["one.png", "-c", "red", "-v", "-q"], "--verbose and --quiet exclude each other"),
        (["nested", "-c", "red"], "the folder nested contains no images, but its subfolders do; add --recursive"),
        (["empty", "-c", "red"], "the folder empty contains no images"),
        (["-", "-", "-c", "red"], "only once"),
        (["", "-c", "red"], "empty"),
    ],
)
def test_wrong_arguments_print_one_line_and_exit_with_2(
    arguments: list[str], message: str, run: Run, folder: Path, model: ColorModel
) -> None:
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "nested" / "more").mkdir(parents=True)
    (folder / "nested" / "more" / "a.png").write_bytes((folder / "one.png").read_bytes())
    result = run("detect", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert model.runs == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["one.png", "--confidence", "7", "-c", "red"],
        ["one.png", "-c", "red", "--nms", "nan"],
        ["one.png", "--no"],
        ["one.png", "-c", "red", "--max-area", "1.1"],
        ["one.png", "-c", "red", "--max-area", "0"],
        ["one.png", "-c", "red", "--min-size", "-1"],
        ["one.png", "-c", "red", "--min-size", "nan"],
    ],
)
def test_wrong_options_exit_with_2(arguments: list[str], run: Run, folder: Path) -> None:
    result = run("detect", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_unknown_model_prints_one_line_and_exits_with_1(run: Run, folder: Path) -> None:
    result = run("detect", "one.png", "-c", "red", "-m", "nope")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: there is no model 'nope'\n"


def test_model_without_the_skill_exits_with_1(run: Run, folder: Path, model: ColorModel) -> None:
    model.skills = frozenset({"query"})
    result = run("point", "one.png", "-c", "red")
    assert result.exit_code == 1
    assert "cannot point, only query" in result.stderr
    assert model.closed


def test_model_is_closed(run: Run, folder: Path, model: ColorModel) -> None:
    run("detect", "one.png", "-c", "red")
    assert model.closed


# --- images ----------------------------------------------------------------------------------------------------------


def test_annotated_images_keep_size_and_colors(run: Run, folder: Path) -> None:
    assert run("detect", "one.png", "-c", "red", "-o", "deep/er/out.png").exit_code == 0
    before, after = Image.open("one.png").convert("RGB"), Image.open("deep/er/out.png")
    assert after.size == before.size
    assert after.getpixel((20, 25)) == (255, 0, 0)  # red and blue are not swapped
    assert after.getpixel((2, 57)) == before.getpixel((2, 57))
    assert not np.array_equal(np.asarray(before), np.asarray(after))


def test_equal_names_in_a_folder_are_numbered(run: Run, folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for name in ("a/x.png", "b/x.png", "b/x.bmp"):
        Image.new("RGB", (40, 30)).save(name)
    result = run("detect", "a", "b", "-", "-c", "red", "-o", "out/", stdin=(folder / "one.png").read_bytes())
    assert result.exit_code == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["stdin.png", "x-2.png", "x-3.png", "x.png"]


def test_unsavable_image_reports_its_error(run: Run, folder: Path) -> None:
    Image.new("RGB", (16_384, 1)).save("wide.png")
    result = run("detect", "wide.png", "-c", "red", "-o", "out.webp")
    assert result.exit_code == 1
    message = "out.webp: an image of 16384x1 pixels cannot be saved as WEBP; save it as .png"
    assert result.stderr == f"Error: wide.png: {message}\n"
    assert not Path("out.webp").exists()
