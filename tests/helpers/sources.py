"""Images, animations and readers for tests of sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.sources.opening import Source, open_source
from tests.helpers.clips import encode_jpeg, frame_number, numbered_image

IMAGES = [numbered_image(number) for number in range(31)]
DURATIONS = [100, 250, 40, 1000]  # milliseconds


def read(source: Any, **settings: float | None) -> tuple[Source, list[Frame]]:
    """Read all frames of a source; return the closed source and the frames."""
    with open_source(source, **settings) as opened:
        return opened, list(opened)


def frame_numbers(frames: list[Frame]) -> list[int]:
    """Return the numbers that the frames show."""
    return [frame_number(frame.image) for frame in frames]


def image_folder(path: Path, names: list[str]) -> Path:
    """Write JPEG files with these names into a folder, and return it."""
    for number, name in enumerate(names):
        (path / name).write_bytes(encode_jpeg(IMAGES[number]))
    return path


def to_pil(image: np.ndarray) -> Image.Image:
    """Return a BGR array as an RGB image."""
    return Image.fromarray(image[..., ::-1].copy())


def write_animation(path: Path, durations: list[int], images: list[Image.Image] | None = None, **options: Any) -> Path:
    """Write an animation or a TIFF with several pages.

    Args:
        path: Target file.
        durations: Duration of each frame in milliseconds.
        images: Frames; default: the first ones of `IMAGES`.
        **options: Other options of `Image.save`.
    """
    images = images or [to_pil(IMAGES[number]) for number in range(len(durations))]
    kind = {".apng": "PNG"}.get(path.suffix)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=durations, **{**lossless, **options})
    return path
