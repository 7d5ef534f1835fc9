"""Files that a command writes: one annotated image or a folder of them, to new files unless `--overwrite` is given.

Where files go is decided and checked before a model is loaded.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from .inputs import Picture
from .output import writing_stdout

if TYPE_CHECKING:
    from PIL import Image

SAVED_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
STDOUT = Path("-")


def plan_outputs(output: str | None, pictures: Sequence[Picture], overwrite: bool = False) -> list[Path | None]:
    """Decide where each annotated image is saved, before anything is computed.

    Args:
        output: A file such as `out.png`; "-" for standard output; a folder, which ends in a slash, exists, or has no
            suffix; or None to save nothing.
        pictures: The input images.
        overwrite: Replace files that exist.

    Returns:
        A path for each image; `STDOUT` is standard output.

    Raises:
        ValueError: There are several images for one file, the format is unknown, the place cannot be written, or an
            input or, without `overwrite`, another file would be replaced.
    """
    if output is None:
        return [None] * len(pictures)
    if output == str(STDOUT):
        return [_check_stdout(len(pictures))]
    if not output:
        raise ValueError("--output must not be empty; name a file, a folder or -")
    path = Path(os.path.expanduser(output))
    is_folder = os.path.isdir(path) or not path.suffix or output.endswith(tuple(filter(None, (os.sep, os.altsep))))
    if is_folder:
        targets = file_names(path, pictures)
    else:
        targets = [_check_file(path, len(pictures))]
    check_folder("--output", path if is_folder else path.parent, "name a file that ends in .png" if is_folder else "")
    check_targets("--output", targets, pictures, overwrite)
    return list(targets)


def check_folder(option: str, folder: Path, advice: str = "") -> None:
    """Check that files can be written into a folder, which may have to be made.

    Raises:
        ValueError: It is not a folder, or cannot be made or written; the message names the option.
    """
    place = folder
    while not os.path.exists(place) and place.parent != place:
        place = place.parent
    if not os.path.isdir(place):
        raise ValueError(f"{option} {folder}: {place} is not a folder; {advice or 'choose another place'}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: no permission to write to the folder {place}; choose another place")


def check_targets(option: str, targets: Iterable[Path], pictures: Sequence[Picture], overwrite: bool) -> None:
    """Check that no input is replaced, and no other file without being asked.

    Raises:
        ValueError: One would be; the message names the option.
    """
    originals = {picture.path.resolve() for picture in pictures if picture.path is not None}
    existing = []
    for target in targets:
        try:
            exists = target.exists()
        except (OSError, ValueError) as error:  # too long, a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{option} {str(target)[:100]}: {reason}; choose another name") from error
        if target.resolve() in originals:
            raise ValueError(f"{option} {target} would overwrite the original; choose another file or folder")
        if target.is_dir():
            raise ValueError(f"{option} {target} is a folder; choose another name")
        if exists:
            existing.append(target)
    if existing and not overwrite:
        more = f" and {len(existing) - 1} more files exist" if len(existing) > 1 else " exists"
        raise ValueError(f"{option}: {existing[0]}{more}; add --overwrite, or choose another name")


def save(picture: Image.Image, path: Path) -> None:
    """Save an image, making its folder; `STDOUT` gets a PNG. No incomplete file is left behind.

    Raises:
        ValueError: The format cannot contain an image of this size.
        OSError: The folder or file cannot be written.
    """
    encoded = io.BytesIO()
    kind = "PNG" if path == STDOUT else {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    try:
        # Subsampled colors smear thin lines.
        picture.save(encoded, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    except (OSError, ValueError) as error:  # JPEG and WebP limit width and height
        size = f"{picture.width}x{picture.height}"
        raise ValueError(f"{path}: an image of {size} pixels cannot be saved as {kind}; save it as .png") from error
    if path == STDOUT:
        with writing_stdout():
            sys.stdout.buffer.write(encoded.getbuffer())
            sys.stdout.buffer.flush()
    else:
        write_file(path, encoded.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Write a file, making its folder. If that fails, the incomplete file is removed.

    Raises:
        OSError: The folder or file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            if path.is_file():  # not a device
                with suppress(OSError):
                    path.unlink()
            raise


def file_names(folder: Path, pictures: Sequence[Picture], suffix: str | None = None) -> list[Path]:
    """Return a path in a folder for each image, named after the input; equal names are numbered.

    Args:
        folder: Where the files go.
        pictures: The input images.
        suffix: Suffix of the files; None keeps those of images that are saved in their own format, and gives .png to
            others.
    """
    taken: set[str] = set()
    files = []
    for picture in pictures:
        original = _original_name(picture)
        kept = original.suffix.lower() if original.suffix.lower() in SAVED_SUFFIXES else ".png"
        ending = kept if suffix is None else suffix
        name, number = f"{original.stem}{ending}", 1
        while name.lower() in taken:  # some file systems ignore case
            number += 1
            name = f"{original.stem}-{number}{ending}"
        taken.add(name.lower())
        files.append(folder / name)
    return files


def _original_name(picture: Picture) -> Path:
    if picture.path is not None:
        return picture.path
    if "://" not in picture.name:
        return Path("stdin")
    name = Path(unquote(urlsplit(picture.name).path)).name
    return Path("".join(c for c in name if c.isalnum() or c in "._- ").strip(". ")[:100] or "image")


def _check_file(output: Path, count: int) -> Path:
    if output.suffix.lower() not in SAVED_SUFFIXES:
        raise ValueError(
            f"--output {output}: images are saved as {', '.join(SAVED_SUFFIXES)}, not {output.suffix}; "
            f"end a folder's name in a slash: -o {output}/"
        )
    if count > 1:
        raise ValueError(
            f"--output {output} is one file, and there are {count} images; name a folder: -o {output.stem}/"
        )
    return output


def _check_stdout(count: int) -> Path:
    if count != 1:
        raise ValueError(f"--output - prints one image, and there are {count}; name a folder")
    if sys.stdout.isatty():
        raise ValueError("--output - prints a PNG, and standard output is a terminal; redirect it: ... -o - > out.png")
    return STDOUT
