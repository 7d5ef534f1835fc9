"""Output files of a command: paths, checks and writing.

All paths are checked before the model is loaded. Existing files are replaced only with `--overwrite`.
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

from .inputs import InputImage
from .report import writing_stdout

if TYPE_CHECKING:
    from PIL import Image

SAVED_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
STDOUT = Path("-")


def plan_outputs(output: str | None, images: Sequence[InputImage], overwrite: bool = False) -> list[Path | None]:
    """Return the path of each annotated image, after checking that it can be written.

    Args:
        output: File such as `out.png`; "-" for standard output; a folder, which ends with a slash, exists, or has no
            suffix; or None to save nothing.
        images: Input images.
        overwrite: Replace existing files.

    Returns:
        A path for each image; `STDOUT` is standard output.

    Raises:
        ValueError: Several images have one output file, the format is unknown, the folder cannot be written, or an
            input image or, without `overwrite`, another file would be replaced.
    """
    if output is None:
        return [None] * len(images)
    if output == str(STDOUT):
        return [_check_stdout(len(images))]
    if not output:
        raise ValueError("--output must not be empty; use a file, a folder or -")
    path = Path(os.path.expanduser(output))
    is_folder = os.path.isdir(path) or not path.suffix or output.endswith(tuple(filter(None, (os.sep, os.altsep))))
    if is_folder:
        targets = file_names(path, images)
    else:
        targets = [_check_file(path, len(images))]
    check_folder("--output", path if is_folder else path.parent, "name a file that ends in .png" if is_folder else "")
    check_targets("--output", targets, images, overwrite)
    return list(targets)


def check_folder(option: str, folder: Path, advice: str = "") -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Args:
        option: Name of the option, for error messages.
        folder: Folder.
        advice: Advice for the error message.

    Raises:
        ValueError: The path is not a folder, or the folder cannot be created or written.
    """
    place = folder
    while not os.path.exists(place) and place.parent != place:
        place = place.parent
    if not os.path.isdir(place):
        raise ValueError(f"{option} {folder}: {place} is not a folder; {advice or 'choose another folder'}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: no permission to write to the folder {place}; choose another folder")


def check_targets(option: str, targets: Iterable[Path], images: Sequence[InputImage], overwrite: bool) -> None:
    """Check that no input image is replaced, and no other file without `overwrite`.

    Args:
        option: Name of the option, for error messages.
        targets: Output files.
        images: Input images.
        overwrite: Replace existing files.

    Raises:
        ValueError: A file would be replaced, or a path is invalid.
    """
    originals = {image.path.resolve() for image in images if image.path is not None}
    existing = []
    for target in targets:
        try:
            exists = target.exists()
        except (OSError, ValueError) as error:  # too long, a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{option} {str(target)[:100]}: {reason}; choose another name") from error
        if target.resolve() in originals:
            raise ValueError(f"{option} {target} would replace an input image; choose another file or folder")
        if target.is_dir():
            raise ValueError(f"{option} {target} is a folder; choose another name")
        if exists:
            existing.append(target)
    if existing and not overwrite:
        more = f" and {len(existing) - 1} more files exist" if len(existing) > 1 else " exists"
        raise ValueError(f"{option}: {existing[0]}{more}; add --overwrite, or choose another name")


def save(image: Image.Image, path: Path) -> None:
    """Save an image, and create its folder if necessary. `STDOUT` receives a PNG. No incomplete file remains.

    Args:
        image: RGB image.
        path: Path whose suffix selects the format; `STDOUT` for standard output.

    Raises:
        ValueError: The format cannot contain an image of this size.
        OSError: The folder or file cannot be written.
    """
    encoded = io.BytesIO()
    kind = "PNG" if path == STDOUT else {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    try:
        # Subsampled colors smear thin lines.
        image.save(encoded, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    except (OSError, ValueError) as error:  # JPEG and WebP limit width and height
        size = f"{image.width}x{image.height}"
        raise ValueError(f"{path}: an image of {size} pixels cannot be saved as {kind}; save it as .png") from error
    if path == STDOUT:
        with writing_stdout():
            sys.stdout.buffer.write(encoded.getbuffer())
            sys.stdout.buffer.flush()
    else:
        write_file(path, encoded.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and create its folder if necessary. If writing fails, the incomplete file is removed.

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


def file_names(folder: Path, images: Sequence[InputImage], suffix: str | None = None) -> list[Path]:
    """Return a path in a folder for each image, named after the input image; equal names are numbered.

    Args:
        folder: Folder of the files.
        images: Input images.
        suffix: Suffix of the files. None keeps the suffixes of formats that can be saved, and uses .png for others.
    """
    taken: set[str] = set()
    files = []
    for image in images:
        original = _original_name(image)
        kept = original.suffix.lower() if original.suffix.lower() in SAVED_SUFFIXES else ".png"
        ending = kept if suffix is None else suffix
        name, number = f"{original.stem}{ending}", 1
        while name.lower() in taken:  # some file systems ignore case
            number += 1
            name = f"{original.stem}-{number}{ending}"
        taken.add(name.lower())
        files.append(folder / name)
    return files


def _original_name(image: InputImage) -> Path:
    if image.path is not None:
        return image.path
    if "://" not in image.name:
        return Path("stdin")
    name = Path(unquote(urlsplit(image.name).path)).name
    return Path("".join(c for c in name if c.isalnum() or c in "._- ").strip(". ")[:100] or "image")


def _check_file(output: Path, count: int) -> Path:
    if output.suffix.lower() not in SAVED_SUFFIXES:
        raise ValueError(
            f"--output {output}: the suffix must be one of {', '.join(SAVED_SUFFIXES)}, got {output.suffix}; for a "
            f"folder, end the name with a slash: -o {output}/"
        )
    if count > 1:
        raise ValueError(f"--output {output} is one file for {count} images; use a folder: -o {output.stem}/")
    return output


def _check_stdout(count: int) -> Path:
    if count != 1:
        raise ValueError(f"--output - prints one image, got {count}; use a folder")
    if sys.stdout.isatty():
        raise ValueError("--output - cannot print a PNG on a terminal; redirect standard output: ... -o - > out.png")
    return STDOUT
