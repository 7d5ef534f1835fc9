"""The report of a labeled dataset: its numbers, its thumbnails, and untrusted names."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from moondream_cv.drawing import class_color
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.label_statistics import LabelStatistics
from moondream_cv.labeling.records import ImageRecord, LabeledObject
from moondream_cv.labeling.report import NUM_LISTED, NUM_RANDOM, NUM_UNCERTAIN, write_report
from moondream_cv.scenes import render_scene
from tests.helpers.browser import chromium, is_failure

GREEN = (0, 255, 0)
VOID = {"meta", "img", "path", "line", "rect", "br"}


class Page(HTMLParser):
    """The parts of a report: tables as rows of texts, cards, tags, and the text of each section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        self.tiles: dict[str, int] = {}
        self.images: dict[str, list[dict[str, str]]] = {}
        self.captions: dict[str, list[str]] = {}
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self._name = ""
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes.update(values)
        if tag == "section":
            self._section = values["id"]
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1].append("")
        elif tag == "img":
            self.images.setdefault(self._section, []).append(values)
        elif tag == "figcaption":
            self.captions.setdefault(self._section, []).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if not text:
            return
        self.text[self._section] = f"{self.text.get(self._section, '')} {text}".strip()
        if "figcaption" in self._open:
            captions = self.captions[self._section]
            captions[-1] = f"{captions[-1]} {text}".strip()
        elif "td" in self._open or "th" in self._open:
            self.tables[self._section][-1][-1] += text
        elif self._open[-1] == "dt" and not self._section:
            self._name = text
        elif self._open[-1] == "dd" and not self._section:
            self.tiles[self._name] = int(text.replace(",", ""))


def write(folder: Path, records: Iterable[ImageRecord], **options: Any) -> Path:
    """Write the labels and their report; images are gray unless `open_image` is passed."""
    folder.mkdir(exist_ok=True)
    with open(folder / "labels.jsonl", "w", encoding="utf-8") as file:
        file.writelines(record.to_line() for record in records)
    defaults: dict[str, Any] = {
        "title": "Dataset",
        "settings": {},
        "open_image": lambda record: Image.new("RGB", (record.width, record.height), (128, 128, 128)),
        "splits": None,
    }
    return write_report(folder, **{**defaults, **options})


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def random_records(count: int, classes: list[str], seed: int = 0, max_objects: int = 9) -> Iterator[ImageRecord]:
    """Yield images of 640 × 480 pixels with random boxes."""
    rng = random.Random(seed)
    for index in range(count):
        objects = []
        for _ in range(rng.randint(0, max_objects)):
            x, y = rng.uniform(0, 600), rng.uniform(0, 440)
            box = (x, y, rng.uniform(x + 1, 640), rng.uniform(y + 1, 480))
            origin, score = rng.choice([("model", round(rng.random(), 4)), ("given", None), ("human", None)])
            objects.append(LabeledObject(rng.choice(classes), box, score, origin))  # type: ignore[arg-type]
        yield ImageRecord(f"{index:05}.jpg", f"{index:05}.jpg", 640, 480, tuple(objects))


def decode(values: dict[str, str]) -> npt.NDArray[np.int64]:
    """Return the [H, W, 3] RGB pixels of an `img` element, and check its size."""
    header, content = values["src"].split(",")
    assert header == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (str(image.width), str(image.height)) == (values["width"], values["height"])
    return np.asarray(image).astype(np.int64)


def extent(pixels: npt.NDArray[np.int64], color: tuple[int, int, int]) -> list[float]:
    """Return (x_min, y_min, x_max, y_max) of the pixels of about a color, as fractions of the image."""
    y, x = np.nonzero(np.abs(pixels - color).sum(-1) < 120)
    height, width = pixels.shape[:2]
    return [x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height]


def test_numbers_equal_those_of_the_labels(tmp_path: Path) -> None:
    records = list(random_records(1200, ["cat", "dog", "bird"]))
    records[7] = dataclasses.replace(records[7], reviewed=True)
    records.insert(0, ImageRecord("broken.jpg", "/photos/broken.jpg", error="cannot identify image file"))
    records.append(ImageRecord("copy.jpg", "copy.jpg", duplicate_of="00000.jpg"))
    class_names = ["unicorn", "bird", "cat", "dog"]
    settings = {"class_names": class_names, "classes": [{"name": "cat", "prompts": ["kitten", "cat"], "nms": None}]}
    page = read(write(tmp_path, records, settings=settings, splits={"train": 1000, "valid": 200}, seconds=3600.0))

    # The main counts
    objects = [labeled for record in records for labeled in record.objects]
    labeled_images = sum(bool(record.objects) for record in records)
    assert page.tiles == {
        "Images": 1202,
        "With objects": labeled_images,
        "Without objects": 1200 - labeled_images,
        "Near-duplicates dropped": 1,
        "Failed": 1,
        "Objects": len(objects),
        "Reviewed images": 1,
    }
    assert "Time: 1:00:00, 0.3 images per second" in page.text[""]
    assert page.tables["splits"][1:] == [["train", "1,000", "83.3%", ""], ["valid", "200", "16.7%", ""]]
    assert page.tables["failed"][1:] == [["/photos/broken.jpg", "cannot identify image file"]]
    assert page.tables["duplicates"][1:] == [["copy.jpg", "00000.jpg"]]

    assert page.tables["settings"] == [["name", "prompts", "nms"], ["cat", "kitten, cat", "–"]]

    # The table of classes, most frequent first, with a class that the model never found
    expected = []
    for name in ("bird", "cat", "dog"):
        found = [labeled for labeled in objects if labeled.class_name == name]
        scores = [labeled.confidence for labeled in found if labeled.confidence is not None]
        images = sum(any(labeled.class_name == name for labeled in record.objects) for record in records)
        shares = [sum(one.origin == origin for one in found) / len(found) for origin in ("model", "given", "human")]
        numbers = [f"{len(found):,}", "", f"{images:,}", f"{np.mean(scores):.2f}", ""]
        expected.append((len(found), [name, *numbers, *(f"{share:.1%}" for share in shares)]))
    expected.sort(reverse=True)
    assert page.tables["classes"][1:] == [
        *(row for _, row in expected),
        ["unicorn", "0", "", "0", "–", "", "–", "–", "–"],
    ]

    # The histograms, whose bars have their counts as titles
    scores = [labeled.confidence for labeled in objects if labeled.confidence is not None]
    sides = [np.sqrt((x2 - x1) * (y2 - y1) / (640 * 480)) for x1, y1, x2, y2 in (one.xyxy for one in objects)]
    for section, values in (("confidences", scores), ("sizes", sides)):
        shown = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)", page.text[section])]
        counts = Counter(min(int(Decimal(str(value)) * 20), 19) for value in values)
        assert shown == [counts[index] for index in sorted(counts)]
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one.xyxy for one in objects)]
    small, medium = sum(area < 32**2 for area in areas), sum(32**2 <= area < 96**2 for area in areas)
    assert f"{small:,} small (below 32² pixels), {medium:,} medium" in page.text["sizes"]


def test_confidences_at_the_limit_of_bins_are_in_the_upper_bin() -> None:
    for step in range(21):
        statistics = LabelStatistics()
        statistics.add(ImageRecord("a", "a", 9, 9, (LabeledObject("cat", (0, 0, 1, 1), round(step / 20, 4)),)))
        assert statistics.scores.index(1) == min(step, 19)


def test_least_certain_objects_come_first_and_reviewed_images_are_left_out(tmp_path: Path) -> None:
    records = list(random_records(400, ["cat", "dog"]))
    lowest = {
        record.image: min(labeled.confidence for labeled in record.objects if labeled.confidence is not None)
        for record in records
        if any(labeled.confidence is not None for labeled in record.objects)
    }
    order = sorted(lowest, key=lambda name: (lowest[name], name))
    records = [dataclasses.replace(record, reviewed=record.image in order[:3]) for record in records]
    page = read(write(tmp_path, records))
    captions = [re.fullmatch(r"([\d.]+) (?:cat|dog) (\d+\.jpg)", text) for text in page.captions["uncertain"]]
    assert [(match[2], match[1]) for match in captions if match] == [
        (name, f"{lowest[name]:.2f}") for name in order[3 : 3 + NUM_UNCERTAIN]
    ]
    most = [record.image for record in records if len(record.objects) == 9]
    assert [text[-9:] for text in page.captions["crowded"]] == most[:8]
    empty = {record.image for record in records if not record.objects}
    assert {text.removeprefix("No objects ") for text in page.captions["empty"]} <= empty


def test_thumbnails_show_boxes_and_points_at_their_positions(tmp_path: Path) -> None:
    cat = LabeledObject("cat", (3000.0, 1000.0, 3300.0, 1150.0), 0.5)
    dog = LabeledObject("dog", (480.0, 480.0, 480.0, 480.0), 0.6, is_point=True, prompt="puppy")
    records = [ImageRecord("a.jpg", "a.jpg", 4000, 2000, (cat,)), ImageRecord("b.jpg", "b.jpg", 600, 600, (dog,))]
    settings = {"class_names": ["cat", "dog"]}

    # The images are decoded at a quarter of the size, and have the object in green.
    def open_image(record: ImageRecord) -> Image.Image:
        image = Image.new("RGB", (record.width // 4, record.height // 4), (128, 128, 128))
        image.paste(GREEN, tuple(round(value / 4) for value in record.objects[0].xyxy))
        return image

    page = read(write(tmp_path, records, settings=settings, open_image=open_image))
    images = {values["alt"]: decode(values) for section in ("uncertain", "random") for values in page.images[section]}
    assert sorted(images) == [
        "a.jpg: 1 × cat",
        "b.jpg: 1 × dog",
        "cat with confidence 0.50 in a.jpg",
        "dog with confidence 0.60 in b.jpg",
    ]
    whole, crop = images["a.jpg: 1 × cat"], images["cat with confidence 0.50 in a.jpg"]
    assert extent(whole, GREEN) == pytest.approx(
        [3000 / 4000, 1000 / 2000, 3300 / 4000, 1150 / 2000], abs=0.025
    )  # lines hide the edges
    assert extent(whole, class_color(0))[::2] == pytest.approx([3000 / 4000, 3300 / 4000], abs=0.025)
    # The crop is 1200 × 900 pixels around the center of the box at (3150, 1075), which is 300 × 150 pixels.
    assert crop.shape == (240, 320, 3)
    for color in (class_color(0), GREEN):
        assert extent(crop, color) == pytest.approx([3 / 8, 5 / 12, 5 / 8, 7 / 12], abs=0.015)
    # The crop around the point is 200 × 150 pixels.
    left, top, right, bottom = extent(images["dog with confidence 0.60 in b.jpg"], class_color(1))
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((0.5, 0.5), abs=0.015)
    assert "Prompt: puppy" in page.captions["uncertain"][1]
    assert "Points, which have no size: 1" in page.text["sizes"]


def test_untrusted_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    quoted = "\" onload='alert(2)' x=\"&lt;"
    control = "a\x1b[31m\u202eb\ud800"
    classes = [evil, quoted, control, "{{ 7 * 7 }}"]
    objects = tuple(
        LabeledObject(name, (10.0 * i, 1.0, 10.0 * i + 9, 9.0), 0.5, prompt=evil) for i, name in enumerate(classes)
    )
    source = f"https://user:secret@host/{evil}?token=t0ken"
    records = [ImageRecord(f"{i}{name}", source, 64, 64, objects[i:]) for i, name in enumerate(classes)]
    records += [ImageRecord(evil, source, error=quoted), ImageRecord(quoted, source, duplicate_of=evil)]
    settings = {
        "class_names": classes,
        "classes": classes,
        evil: {quoted: [evil]},
        "model": "https://user:secret@host/v1",
    }

    lines = "".join(record.to_line() for record in records).replace("\ud800", "\\ud800")
    (tmp_path / "labels.jsonl").write_text(lines, encoding="utf-8")
    path = write_report(
        tmp_path,
        title=evil,
        settings=settings,
        open_image=lambda record: Image.new("RGB", (64, 64)),
        splits={evil: 1},
    )
    page, trusted = read(path), read(write(tmp_path / "trusted", random_records(30, ["cat"])))
    assert page.tags <= trusted.tags | {"table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "p", "span"}
    assert "onload" not in page.attributes
    text = path.read_text(encoding="utf-8")
    assert "secret" not in text
    assert "t0ken" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert [row[0] for row in page.tables["classes"][1:]] == [
        "{{ 7 * 7 }}",
        r"a\x1b[31m\u202eb\ud800",
        quoted,
        evil,
    ]
    assert page.tables["splits"][1][0] == page.tables["duplicates"][1][1] == evil
    assert page.text[""].startswith(f"{evil}: labeling report")


def test_report_of_rendered_scenes_opens_in_a_browser_without_errors_or_requests(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = {f"{'long-name-' * 12}{number:02}.jpg": render_scene(rng) for number in range(12)}
    records = []
    for name, scene in scenes.items():
        height, width = scene.image.shape[:2]
        objects = tuple(LabeledObject(one.name, one.xyxy, round(float(rng.random()), 4)) for one in scene.objects)
        records.append(ImageRecord(name, name, width, height, objects))
    records.append(ImageRecord("x.jpg", "x.jpg", error="unbroken" * 50))
    path = write(
        tmp_path,
        records,
        settings={"model": "tiny", "classes": [{"name": "cat", "prompts": ["cat", "kitten"]}]},
        open_image=lambda record: Image.fromarray(scenes[record.image].image),
        splits={"train": 12},
    )
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 360, "height": 800})
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text) if is_failure(message) else None)
        page.on("request", lambda request: wrong.append(request.url))
        page.goto(path.as_uri())
        sizes = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert len(sizes) > 20
        assert min(sizes) > 0
        assert [url for url in wrong if not url.startswith("data:image/jpeg")] == [path.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == 360  # only tables scroll sideways
        missing = "[...document.querySelectorAll('a')].filter(a => !document.querySelector(a.getAttribute('href')))"
        assert page.evaluate(f"{missing}.length") == 0


def test_size_is_limited_and_long_lists_are_cut(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8))  # the largest JPEGs
    classes = [f"class {number}" for number in range(500)]
    records = [dataclasses.replace(record, height=640) for record in random_records(300, classes)]
    records += [ImageRecord(f"x{i}.jpg", f"{'folder/' * 20}x{i}.jpg", error="broken " * 40) for i in range(1250)]
    path = write(tmp_path, records, settings={"class_names": classes}, open_image=lambda record: noise)
    page = read(path)
    assert path.stat().st_size < 4_000_000
    assert len(page.images["uncertain"]) == NUM_UNCERTAIN
    assert len(page.tables["failed"]) == NUM_LISTED + 1
    assert "1,050 more are in labels.jsonl" in page.text["failed"]
    assert len(page.tables["classes"]) == 501


def test_random_images_depend_on_their_names_only(tmp_path: Path) -> None:
    records = list(random_records(300, ["cat"]))
    first, second = (read(write(tmp_path, some)) for some in (records, records[::-1]))
    assert len(first.images["random"]) == NUM_RANDOM
    assert first.images["random"] == second.images["random"]
    numbers = [int(text[-9:-4]) for text in first.captions["random"]]
    assert numbers != sorted(numbers)
    assert max(numbers) - min(numbers) > 200


def test_equal_labels_give_equal_files_and_a_failed_write_keeps_the_old_one(tmp_path: Path) -> None:
    records = list(random_records(60, ["cat", "dog"]))
    contents = {write(tmp_path / name, records, seconds=2.0).read_bytes() for name in ("a", "b")}
    assert len(contents) == 1
    (tmp_path / "c" / "report.html").mkdir(parents=True)
    with pytest.raises(LabelingError, match=r"report\.html cannot be written"):
        write(tmp_path / "c", records)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["labels.jsonl", "report.html"]


def test_images_that_cannot_be_opened_have_a_message(tmp_path: Path) -> None:
    def open_image(record: ImageRecord) -> Image.Image:
        raise FileNotFoundError(f"{record.image} was removed")

    page = read(write(tmp_path, random_records(3, ["cat"]), open_image=open_image))
    assert page.images == {}
    assert "The image cannot be opened: 00001.jpg was removed" in page.text["random"]


def test_datasets_without_images_objects_or_confidences(tmp_path: Path) -> None:
    page = read(write(tmp_path, []))
    assert page.tiles["Images"] == 0
    assert page.text["classes"] == "Classes No classes."

    page = read(write(tmp_path, random_records(5, ["cat"], max_objects=0), settings={"class_names": ["cat"]}))
    assert page.tables["classes"] == [["Class", "Objects", "Images"], ["cat", "0", "", "0"]]
    assert len(page.images["empty"]) == len(page.images["random"]) == 5
    assert page.images.keys() == {"empty", "random"}

    objects = (LabeledObject("cat", (1, 1, 5, 5)), LabeledObject("cat", (1, 1, 5, 5)))
    page = read(write(tmp_path, [ImageRecord("a.jpg", "a.jpg", 9, 9, objects)]))
    assert "No object has a confidence" in page.text["confidences"]
    assert page.tables["classes"] == [["Class", "Objects", "Images"], ["cat", "2", "", "1"]]
    assert page.images.keys() == {"crowded", "random"}


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 4000):
        records = random_records(count, ["cat", "dog"])
        tracemalloc.start()
        write(tmp_path / str(count), records)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_500_000  # the free lists of Python vary; 3,700 more records would need 5 MB
