"""Where annotated pictures go: one file, or a folder for several. Never over the pictures that they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import Picture

if TYPE_CHECKING:
    from PIL import Image

SAVED_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def plan_outputs(output: Path | None, pictures: Sequence[Picture]) -> list[Path | None]:
    """Decide where each picture is saved, before anything is computed.

    Args:
        output: A file such as `out.png`, a folder, or None to save nothing. What does not end like a picture's file, or
            is there as a folder, is a folder.

    Raises:
        ValueError: There are several pictures for one file, the format is unknown, or an original would be overwritten.
    """
    if output is None:
        return [None] * len(pictures)
    output = output.expanduser()
    if output.suffix and not output.is_dir():
        targets = [_check_file(output, len(pictures))]
    else:
        if output.is_file():
            raise ValueError(f"--output {output} is a file without a picture's suffix; end it in .png")
        targets = _name_files(output, pictures)
    originals = {picture.path.resolve() for picture in pictures if picture.path is not None}
    for target in targets:
        if target.resolve() in originals:
            raise ValueError(f"--output {target} would overwrite the original; choose another file or folder")
    return list(targets)


def save(picture: Image.Image, path: Path) -> None:
    """Save a picture, making the folder it goes into.

    Raises:
        OSError: The folder or file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        picture.save(path, quality=92, subsampling=0)  # subsampled colours smear thin lines
    else:
        picture.save(path)


def _check_file(output: Path, count: int) -> Path:
    if output.suffix.lower() not in SAVED_SUFFIXES:
        raise ValueError(f"--output {output}: pictures are saved as {', '.join(SAVED_SUFFIXES)}, not {output.suffix}")
    if count > 1:
        raise ValueError(
            f"--output {output} is one file, and there are {count} images; name a folder: -o {output.stem}/"
        )
    return output


def _name_files(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Name a file for each picture after its original; equal names are numbered."""
    taken: set[str] = set()
    files = []
    for picture in pictures:
        path = picture.path or Path("stdin")
        suffix = path.suffix.lower() if path.suffix.lower() in SAVED_SUFFIXES else ".png"
        name, number = f"{path.stem}{suffix}", 1
        while name.lower() in taken:  # some file systems ignore case
            number += 1
            name = f"{path.stem}-{number}{suffix}"
        taken.add(name.lower())
        files.append(folder / name)
    return files
