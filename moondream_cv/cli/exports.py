"""Labels and crops of detected objects: `--save-txt` and `--save-crop`."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import Picture
from .saving import check_folder, check_targets, file_names, write_file

if TYPE_CHECKING:
    import supervision as sv
    from PIL import Image

_UNSAFE = re.compile(r'[\x00-\x1f<>:"/\\|?*]')  # not allowed in file names on Windows; the slash nowhere
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names of Windows


class LabelFolder:
    """A folder of labels in the YOLO format: a text file per image, and `data.yaml` with the class names."""

    def __init__(self, folder: Path, classes: Sequence[str], pictures: Sequence[Picture], overwrite: bool) -> None:
        """Check the folder; nothing is written yet.

        Args:
            folder: Where the files go.
            classes: Class names; their order gives the class ids.
            pictures: The input images, after which the files are named.
            overwrite: Replace files that exist.

        Raises:
            ValueError: The folder cannot be written, a file exists, or the folder has labels of other classes.
        """
        self._classes = list(classes)
        self._yaml = folder / "data.yaml"
        self._files = file_names(folder, pictures, ".txt")
        check_folder("--save-txt", folder)
        check_targets("--save-txt", self._files, pictures, overwrite)
        if self._yaml.exists() and not overwrite and not self._is_listed():
            raise ValueError(f"--save-txt: {self._yaml} lists other classes; add --overwrite, or choose another folder")

    def write(self, index: int, found: sv.Detections, size_wh: tuple[int, int]) -> Path:
        """Write the labels of an image: class id, center, width and height as fractions, one object per line.

        Args:
            index: Which of the images.
            found: Boxes in pixels.
            size_wh: Width and height of the image in pixels.

        Returns:
            The path of the text file; it is empty if nothing was found.
        """
        from supervision.dataset.formats.yolo import detections_to_yolo_annotations, save_data_yaml

        lines = detections_to_yolo_annotations(found, image_shape=(size_wh[1], size_wh[0]))
        if not self._is_listed():
            save_data_yaml(str(self._yaml), self._classes)
        write_file(self._files[index], "".join(f"{line}\n" for line in lines).encode())
        return self._files[index]

    def _is_listed(self) -> bool:
        """Whether `data.yaml` exists and lists these classes."""
        from supervision.utils.file import read_yaml_file

        try:
            content = read_yaml_file(str(self._yaml)) if self._yaml.exists() else None
        except Exception:  # the YAML library has many errors for a file that is something else
            content = None
        return isinstance(content, dict) and content.get("names") == self._classes


class CropFolder:
    """A folder of crops: `FOLDER/class/image-1.jpg` for the first object of an image."""

    def __init__(self, folder: Path, classes: Sequence[str], pictures: Sequence[Picture], overwrite: bool) -> None:
        """Check the folder; nothing is written yet. Arguments and errors are those of `LabelFolder`."""
        self._stems = [path.stem for path in file_names(folder, pictures, ".jpg")]
        self._folders = {name: folder / _file_name(name) for name in classes}
        check_folder("--save-crop", folder)
        stems = set(self._stems)
        for place in self._folders.values():
            check_folder("--save-crop", place)
            files = os.listdir(place) if place.is_dir() else []
            crops = [place / file for file in sorted(files) if re.sub(r"-\d+\.jpg$", "", file) in stems]
            check_targets("--save-crop", crops, pictures, overwrite)

    def write(self, index: int, image: Image.Image, found: sv.Detections) -> list[Path]:
        """Save the part of an image in each box as JPEG.

        Args:
            index: Which of the images.
            image: In RGB.
            found: Boxes in pixels.

        Returns:
            A path for each box, in order.
        """
        saved = []
        for number, (xyxy, name) in enumerate(zip(found.xyxy.tolist(), found.data["class_name"], strict=True), 1):
            left, top, right, bottom = xyxy
            content = io.BytesIO()
            crop = image.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
            crop.save(content, "JPEG", quality=95, subsampling=0)
            path = self._folders[str(name)] / f"{self._stems[index]}-{number}.jpg"
            write_file(path, content.getvalue())
            saved.append(path)
        return saved


def _file_name(text: str) -> str:
    """Return a class name as the name of a folder on every system."""
    name = _UNSAFE.sub("_", text).strip(". ")[:100]
    return f"_{name}" if not name or _RESERVED.fullmatch(name) else name
