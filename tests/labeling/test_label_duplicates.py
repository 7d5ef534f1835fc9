"""Near-duplicates: copies are found, different images are not, and interruptions do not change the result."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw

from moondream_cv.labeling.duplicates import find_duplicates
from moondream_cv.labeling.input_image import InputImage
from moondream_cv.scenes import render_scene

DISTANCE = 6


def save(folder: Path, name: str, image: Image.Image, **options: object) -> InputImage:
    image.save(folder / name, **options)
    return InputImage(name, str(folder / name))


def scene(seed: int) -> Image.Image:
    return Image.fromarray(render_scene(seed, resolution_wh=(400, 300)).image)


def page(*marks: tuple[int, int]) -> Image.Image:
    """Return a white page with black marks of 1 % of its width and height."""
    image = Image.new("RGB", (800, 800), "white")
    draw = ImageDraw.Draw(image)
    for x, y in marks:
        draw.rectangle((x, y, x + 8, y + 8), fill="black")
    return image


def test_different_scenes_are_kept_and_copies_dropped(tmp_path: Path) -> None:
    scenes = [scene(seed) for seed in range(80)]
    images = [save(tmp_path, f"{i:03}.png", image) for i, image in enumerate(scenes)]
    assert find_duplicates(images, DISTANCE, tmp_path / "hashes") == {}

    for i, image in enumerate(scenes[:30]):
        images.append(save(tmp_path, f"{i:03}-jpeg.jpg", image, quality=40))
        images.append(save(tmp_path, f"{i:03}-small.webp", image.resize((200, 150)), quality=80))
    found = find_duplicates(images, DISTANCE, tmp_path / "hashes")
    assert {index: earlier for index, earlier in found.items() if earlier != (index - 80) // 2} == {}
    assert len(found) >= 0.9 * 60  # the hash of low-contrast scenes depends on noise


def test_only_the_first_of_equal_images_is_kept(tmp_path: Path) -> None:
    first, other = scene(1), scene(2)
    files = [first, other, first, first, other]
    images = [save(tmp_path, f"{i}.png", image) for i, image in enumerate(files)]
    assert find_duplicates(images, 0, tmp_path / "hashes") == {2: 0, 3: 0, 4: 1}


def test_images_with_little_contrast_are_only_dropped_if_they_look_equal(tmp_path: Path) -> None:
    colors = ["white", "black", "gray", "red", "#008000", "#fdfdfd"]
    images = [save(tmp_path, f"{color.strip('#')}.png", Image.new("RGB", (64, 64), color)) for color in colors]
    rng = np.random.default_rng(0)
    pages = [page()] + [page((int(x), int(y))) for x in range(100, 700, 150) for y in range(100, 700, 150)]
    pages += [page(*(tuple(map(int, mark)) for mark in rng.integers(0, 790, (6, 2)))) for _ in range(20)]
    images += [save(tmp_path, f"page{i}.png", image) for i, image in enumerate(pages)]
    images.append(save(tmp_path, "page1.jpg", pages[1].resize((400, 400))))
    assert find_duplicates(images, DISTANCE, tmp_path / "hashes") == {5: 0, 6: 0, len(images) - 1: 7}


def test_orientation_and_mode_do_not_matter(tmp_path: Path) -> None:
    upright = scene(3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    images = [
        save(tmp_path, "a.png", upright),
        save(tmp_path, "b.jpg", upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95),
        save(tmp_path, "c.png", upright.convert("RGBA")),
        save(tmp_path, "d.jpg", upright.convert("CMYK"), quality=95),
        save(tmp_path, "e.png", upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ]
    assert find_duplicates(images, DISTANCE, tmp_path / "hashes") == {1: 0, 2: 0, 3: 0}


def test_unreadable_images_and_images_of_datasets_are_kept(tmp_path: Path) -> None:
    image = save(tmp_path, "a.png", scene(4))
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"damaged")
    images = [
        image,
        InputImage("b.png", image.source),
        InputImage("labeled.png", image.source, given=()),
        *(InputImage(f"{i}.jpg", str(damaged)) for i in range(2)),
        InputImage("missing.jpg", str(tmp_path / "missing.jpg")),
        InputImage("nowhere.jpg", "memory://nowhere.jpg"),
    ]
    if hasattr(os, "mkfifo"):  # without a writer, opening it would wait
        os.mkfifo(tmp_path / "pipe.jpg")
        images.append(InputImage("pipe.jpg", str(tmp_path / "pipe.jpg")))
    assert find_duplicates(images, DISTANCE, tmp_path / "hashes") == {1: 0}


def test_result_and_file_do_not_depend_on_interruptions(tmp_path: Path) -> None:
    scenes = [scene(seed) for seed in range(20)]
    images = [save(tmp_path, f"{i}.png", scenes[i % 20].resize((64, 48))) for i in range(80)]
    expected = find_duplicates(images, DISTANCE, tmp_path / "hashes")
    assert expected == {i: i % 20 for i in range(20, 80)}
    content = (tmp_path / "hashes").read_bytes()
    lines = content.splitlines(keepends=True)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_duplicates(images, DISTANCE, tmp_path / "interrupted", interrupt)
    written = (tmp_path / "interrupted").read_bytes()
    assert content.startswith(written)
    assert 0 < len(written) < len(content)

    # The file is cut to its valid lines, and only the other images are read
    damages = [written, content[:-1], content[: len(content) // 2], b"".join(lines[:7]) + b"\0" * 99, lines[1], b""]
    calls: list[tuple[int, int]] = []
    for damage in damages:
        path = tmp_path / "damaged"
        path.write_bytes(damage)
        assert find_duplicates(images, DISTANCE, path, lambda done, total: calls.append((done, total))) == expected
        assert path.read_bytes() == content
        assert calls[-1] == (80, 80)
    for image in images:
        os.unlink(image.source)
    assert find_duplicates(images, DISTANCE, tmp_path / "hashes") == expected


def test_distance_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distance must be an integer between 0 and 32, got 33"):
        find_duplicates([], 33, tmp_path / "hashes")
