"""Export of detections: `--save-txt` writes labels, `--save-crop` writes crops."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import InputImage
from .saving import check_folder, check_targets, file_names, write_file

if TYPE_CHECKING:
    import supervision as sv
    from PIL import Image

_UNSAFE = re.compile(r'[\x00-\x1f<>:"/\\|?*]')  # not allowed in file names on Windows, the slash on any system
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names of Windows


class LabelFolder:
    """Writes labels in YOLO format: one text file per image, and `data.yaml` with the class names."""

    def __init__(self, folder: Path, classes: Sequence[str], images: Sequence[InputImage], overwrite: bool) -> None:
        """Check the folder; files are written later.

        Args:
            folder: Folder of the files.
            classes: Class names in the order of their ids.
            images: Input images; each label file has the name of its image.
            overwrite: Replace existing files.

        Raises:
            ValueError: The folder cannot be written, a file exists, or the folder has labels of other classes.
        """
        self._classes = list(classes)
        self._yaml = folder / "data.yaml"
        self._files = file_names(folder, images, ".txt")
        check_folder("--save-txt", folder)
        check_targets("--save-txt", self._files, images, overwrite)
        if self._yaml.exists() and not overwrite and not self._is_listed():
            raise ValueError(f"--save-txt: {self._yaml} lists other classes; add --overwrite, or choose another folder")

    def write(self, index: int, found: sv.Detections, size_wh: tuple[int, int]) -> Path:
        """Write the labels of an image: class id, center, width and height as fractions, one object per line.

        Args:
            index: Index of the image.
            found: Boxes in pixels.
            size_wh: Width and height of the image in pixels.

        Returns:
            Path of the text file, which is empty if there are no boxes.
        """
        from supervision.dataset.formats.yolo import detections_to_yolo_annotations, save_data_yaml

        lines = detections_to_yolo_annotations(found, image_shape=(size_wh[1], size_wh[0]))
        if not self._is_listed():
            save_data_yaml(str(self._yaml), self._classes)
        write_file(self._files[index], "".join(f"{line}\n" for line in lines).encode())
        return self._files[index]

    def _is_listed(self) -> bool:
        """Return whether `data.yaml` exists and lists these classes."""
        from supervision.utils.file import read_yaml_file

        try:
            content = read_yaml_file(str(self._yaml)) if self._yaml.exists() else None
        except Exception:  # the YAML library raises many types of errors for other files
            content = None
        return isinstance(content, dict) and content.get("names") == self._classes


class CropFolder:
    """Writes crops: `FOLDER/class/image-1.jpg` for the first object of an image."""

    def __init__(self, folder: Path, classes: Sequence[str], images: Sequence[InputImage], overwrite: bool) -> None:
        """Check the folder; files are written later. Arguments and errors are those of `LabelFolder`."""
        self._stems = [path.stem for path in file_names(folder, images, ".jpg")]
        self._folders = {name: folder / _file_name(name) for name in classes}
        check_folder("--save-crop", folder)
        stems = set(self._stems)
        for place in self._folders.values():
            check_folder("--save-crop", place)
            files = os.listdir(place) if place.is_dir() else []
            crops = [place / file for file in sorted(files) if re.sub(r"-\d+\.jpg$", "", file) in stems]
            check_targets("--save-crop", crops, images, overwrite)

    def write(self, index: int, image: Image.Image, found: sv.Detections) -> list[Path]:
        """Write the crop of each box as JPEG.

        Args:
            index: Index of the image.
            image: RGB image.
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
    """Return a class name as a folder name that is valid on every operating system."""
    name = _UNSAFE.sub("_", text).strip(". ")[:100]
    return f"_{name}" if not name or _RESERVED.fullmatch(name) else name
