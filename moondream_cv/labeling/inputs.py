"""Inputs of labeling: folders, globs, list files, videos, datasets and URLs as `InputImage`s in a fixed order.

No image is opened here. Videos are decoded to extract their frames, after all inputs and names are checked.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moondream_cv.arguments import check_integer
from moondream_cv.images import IMAGE_SUFFIXES
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.export_names import check_unique_names, export_name, name_key
from moondream_cv.labeling.file_listing import expand_glob, list_url, missing_path, shown, walk_folder
from moondream_cv.labeling.given_labels import is_labeled_dataset, read_given_labels, read_labeled_dataset
from moondream_cv.labeling.huggingface_folders import has_parquet_files, is_saved_dataset
from moondream_cv.labeling.input_image import InputImage, read_source
from moondream_cv.urls import is_url

__all__ = ["VIDEO_SUFFIXES", "InputImage", "list_inputs", "read_source"]

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv"}
)
"""Suffixes of video files."""

_LIST_SUFFIX = ".txt"
_MAX_SHOWN_SUFFIXES = 5


def list_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    frames: Path,
    *,
    every: int | None = None,
    on_scene_change: bool = False,
    recursive: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[InputImage]:
    """List the images of all inputs, with unique names.

    The order is that of the inputs. The images of a folder are sorted by their relative paths, compared by character.
    A file that several inputs contain is listed once.

    Args:
        inputs: Each of them is
            a folder of images and videos, also if it is a COCO, YOLO or VOC dataset, whose labels are read;
            a dataset that labeling has written, whose objects are read;
            a folder of a Hugging Face dataset (`save_to_disk` or Parquet files), whose images and splits are read;
            a glob such as `photos/*.jpg`, in which `**` matches any folders;
            a text file with a path or URL per line, relative to the file; lines that begin with "#" are ignored;
            an image or a video;
            the http or https URL of an image, or another URL of a folder, a glob or an image that fsspec can list.
        frames: Folder "frames" of the dataset that is written. The frames of videos and the images of Hugging Face
            datasets are extracted into it. The dataset that is written is skipped if it is in an input folder or
            matches a glob.
        every: Interval between two frames of a video, in frames. None without `on_scene_change`: about one per second.
        on_scene_change: Extract the first frame of each scene of a video.
        recursive: Include subfolders.
        progress: Function that receives the number of decoded frames of videos, and an estimate of their total.

    Raises:
        LabelingError: There are no inputs; an input does not exist, cannot be read or contains no images; names are
            invalid or not unique; or a video cannot be read.
        OSError: A frame cannot be written.
        ValueError: `every` is not a positive integer.
    """
    # Check the inputs and the names
    if every is not None:
        check_integer("every", every)
    if not inputs:
        raise LabelingError("there are no inputs; name a folder of images")
    listing = _Listing(Path(os.path.abspath(frames.parent)), recursive)
    found: dict[str, InputImage] = {}
    for item in inputs:
        for image in listing.expand(os.fspath(item)):
            found.setdefault(image.source, image)
    listed = list(found.values())
    check_unique_names(listed)

    # Extract the frames of videos and the images of Hugging Face datasets
    videos = {index: image for index, image in enumerate(listed) if _suffix(image.name) in VIDEO_SUFFIXES}
    extracted: dict[int, list[InputImage]] = {}
    if videos:
        from moondream_cv.labeling.frames import FrameChoice, Video, extract_frames

        chosen = [Video(image.source, os.path.splitext(image.name)[0]) for image in videos.values()]
        names = extract_frames(chosen, frames, FrameChoice(every, on_scene_change), progress)
        for index, video, files in zip(videos, chosen, names, strict=True):
            extracted[index] = [
                replace(listed[index], name=file, source=f"{frames.name}/{file}", group=video.stem) for file in files
            ]
    for index, image in enumerate(listed):
        if image.source in listing.huggingface_folders:
            from moondream_cv.labeling.huggingface_folders import extract_images

            extracted[index] = extract_images(image, frames)
    if not extracted:
        return listed
    images = [one for index, image in enumerate(listed) for one in extracted.get(index, [image])]
    check_unique_names(images)
    return images


class _Listing:
    """Expands inputs to images. A video or a Hugging Face dataset is one `InputImage` until it is extracted.

    Attributes:
        huggingface_folders: Sources that are folders of Hugging Face datasets.
    """

    def __init__(self, dataset: Path, recursive: bool) -> None:
        self._dataset, self._recursive = dataset, recursive
        self._in_dataset: dict[str, bool] = {}  # by folder
        self.huggingface_folders: set[str] = set()

    def expand(self, text: str) -> list[InputImage]:
        """Return the images and videos of an input."""
        if not text.strip():
            raise LabelingError("an input must not be empty; name a folder of images")
        if is_url(text):
            return self._url(text.strip())
        path = os.path.expanduser(text)
        if os.path.isdir(path):
            return self._folder(path, "")
        if os.path.isfile(path):
            return (
                self._list_file(path) if _suffix(path) == _LIST_SUFFIX else [self._file(path, os.path.basename(path))]
            )
        if glob.has_magic(path):
            return self._glob(path)
        raise missing_path(text)

    def _folder(self, path: str, prefix: str, may_be_empty: bool = False) -> list[InputImage]:
        root = os.path.abspath(path)
        if self._is_in_dataset(root):
            place = "is" if os.path.realpath(root) == os.path.realpath(self._dataset) else "is in"
            raise LabelingError(f"{shown(path)} {place} the dataset that is written; choose another folder for it")
        if is_labeled_dataset(root):
            return read_labeled_dataset(root, self._dataset)
        if is_saved_dataset(root):
            return self._huggingface_folder(root, prefix)

        # List the files, and those that only the labels name
        labels = read_given_labels(root)
        files = walk_folder(root, self._recursive, self._dataset)
        media = {os.path.join(root, *file.split("/")): file for file in files if _is_media(file)}
        for labeled in labels or ():
            if labeled not in media:
                relative = os.path.relpath(labeled, root).replace(os.sep, "/")
                media[labeled] = os.path.basename(labeled) if relative.startswith("../") else relative
        if not media and has_parquet_files(root):
            return self._huggingface_folder(root, prefix)
        if not media and not may_be_empty:
            raise LabelingError(f"the folder {shown(path)} {_no_images(files)}")

        # Name them; the folders of a dataset are its splits
        keys = {name_key(os.path.basename(source)) for source in media}
        if labels is not None and len(keys) == len(media):
            media = {source: os.path.basename(source) for source in media}
        images = []
        for source, name in media.items():
            image = self._entry(source, prefix + name)
            given = None if labels is None else labels.get(source)
            images.append(image if given is None else replace(image, split=given.split, given=given.objects))
        return images

    def _huggingface_folder(self, root: str, prefix: str) -> list[InputImage]:
        self.huggingface_folders.add(root)
        return [self._entry(root, prefix + os.path.basename(root))]

    def _glob(self, pattern: str) -> list[InputImage]:
        images: list[InputImage] = []
        others = []
        for match, relative in expand_glob(pattern):
            is_folder = os.path.isdir(match)
            if self._is_in_dataset(match if is_folder else os.path.dirname(match)):
                continue
            if not is_folder:
                if _is_media(match):
                    images.append(self._entry(os.path.abspath(match), relative))
                others.append(relative)
            elif "**" not in pattern:
                images += self._folder(match, f"{relative}/", may_be_empty=True)
        if not images:
            problem = _no_images(others, "matches") if others else "matches no file; check the pattern"
            raise LabelingError(f"the pattern {shown(pattern)} {problem}")
        return images

    def _file(self, path: str, relative: str) -> InputImage:
        if not _is_media(path):
            raise LabelingError(
                f"{shown(path)} has an unknown suffix; images have {_listed(IMAGE_SUFFIXES)}, videos "
                f"{_listed(VIDEO_SUFFIXES)}, and lists {_LIST_SUFFIX}"
            )
        if self._is_in_dataset(os.path.dirname(path)):
            raise LabelingError(f"{shown(path)} is in the dataset that is written; choose another folder for it")
        return self._entry(os.path.abspath(path), relative)

    def _list_file(self, path: str) -> list[InputImage]:
        folder = os.path.dirname(os.path.abspath(path))
        images = []
        for number, line in _lines(path):
            place = f"{shown(path)}, line {number}"
            try:
                if is_url(line):
                    images.append(self._image_url(line))
                    continue
                file = os.path.normpath(os.path.join(folder, os.path.expanduser(line)))
                if os.path.isdir(file):
                    raise LabelingError(f"{shown(line)} is a folder; list its files")
                if not os.path.isfile(file):
                    raise missing_path(file, "file")
                relative = os.path.relpath(file, folder).replace(os.sep, "/")
                images.append(self._file(file, os.path.basename(file) if relative.startswith("../") else relative))
            except LabelingError as error:
                raise LabelingError(f"{place}: {error}") from error
        if not images:
            raise LabelingError(f"the list {shown(path)} is empty; write a path or a URL of an image per line")
        return images

    def _url(self, url: str) -> list[InputImage]:
        scheme = url.partition("://")[0].lower()
        if scheme in ("http", "https"):
            return [self._image_url(url)]
        if scheme == "file":
            raise LabelingError(f"{shown(url)} is a file URL; name its path")
        files = list_url(url, self._recursive)
        images = [
            InputImage(export_name(relative, source), source, dataset=self._dataset)
            for source, relative in files
            if _suffix(relative) in IMAGE_SUFFIXES
        ]
        if not images:
            raise LabelingError(f"{shown(url)} {_no_images([relative for _, relative in files])}")
        return images

    def _image_url(self, url: str) -> InputImage:
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        if _suffix(name) not in IMAGE_SUFFIXES:
            raise LabelingError(
                f"{shown(url)} does not end with a suffix of images ({_listed(IMAGE_SUFFIXES)}); download the image, "
                "and name its path"
            )
        return InputImage(export_name(name.replace("/", "_"), url), url, dataset=self._dataset)

    def _is_in_dataset(self, folder: str) -> bool:
        """Return whether a folder is the dataset that is written, or below it."""
        if folder not in self._in_dataset:
            real, dataset = os.path.realpath(folder), os.path.realpath(self._dataset)
            self._in_dataset[folder] = Path(real).is_relative_to(dataset)
        return self._in_dataset[folder]

    def _entry(self, source: str, relative: str) -> InputImage:
        return InputImage(export_name(relative, source), source, dataset=self._dataset)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a list file with their numbers, without comments and blank lines."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LabelingError(f"the list {shown(path)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabelingError(f"the list {shown(path)} is not text in UTF-8; save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip()


def _no_images(files: Sequence[str], verb: str = "contains") -> str:
    """Return the message about files without an image: their number, their suffixes, and the accepted suffixes."""
    if not files:
        content = f"{verb} no files"
    else:
        counts = Counter(_suffix(file) or "no suffix" for file in files).most_common(_MAX_SHOWN_SUFFIXES)
        number = f"{len(files)} other file{'s' if len(files) > 1 else ''}"
        content = f"{verb} no images, only {number} ({', '.join(suffix for suffix, _ in counts)})"
    return f"{content}; images have {_listed(IMAGE_SUFFIXES)}, and videos {_listed(VIDEO_SUFFIXES)}"


def _is_media(path: str) -> bool:
    return _suffix(path) in IMAGE_SUFFIXES or _suffix(path) in VIDEO_SUFFIXES


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _listed(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffixes))
