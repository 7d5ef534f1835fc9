"""`label`: a run from the inputs to the exported dataset.

A run writes `labels.jsonl` batch by batch, in the order of its inputs. Batches are fixed ranges of images, so
the result does not depend on interruptions. A run in a folder that already contains a part of the labels continues.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from moondream_cv.arguments import check_integer, check_probability, check_share
from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.images import to_rgb
from moondream_cv.labeling.dataset_folder import (
    DatasetState,
    ImageList,
    check_same,
    check_space,
    check_target,
    has_labels,
    locked,
    read_images,
    read_state,
    remove_images,
    write_images,
    write_state,
)
from moondream_cv.labeling.duplicates import check_imagehash, find_duplicates
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.export_names import name_key
from moondream_cv.labeling.exports import check_format, check_unchanged, export_dataset
from moondream_cv.labeling.given_labels import is_labeled_dataset
from moondream_cv.labeling.inputs import InputImage, list_inputs, read_source
from moondream_cv.labeling.label_log import LabelLog
from moondream_cv.labeling.labeler import Labeler, LabelingSettings, Pixels, read_batch
from moondream_cv.labeling.layout import FRAMES, LABELS, WORK
from moondream_cv.labeling.merge import MergeSummary, merge_reviewed
from moondream_cv.labeling.prompts import ClassPrompts, class_prompts, load_prompts
from moondream_cv.labeling.records import ImageRecord, read_records
from moondream_cv.labeling.report import write_report
from moondream_cv.labeling.splits import scale_shares
from moondream_cv.memory_trimming import MemoryTrimmer, release_large_blocks

if TYPE_CHECKING:
    from moondream_cv.vision_model import VisionModel

OnProgress = Callable[["LabelingProgress"], None]

_TRIMMING_INTERVAL = 5.0  # seconds

DEFAULT_SPLIT = (0.8, 0.1, 0.1)


@dataclass
class LabelingProgress:
    """State of a run.

    Attributes:
        stage: "frames", "duplicates", "labels" or "export".
        done: Number of completed images of the stage.
        total: Number of images of the stage; 0 if it is unknown.
        counts: Number of objects by class.
        num_failed: Number of images that failed.
    """

    stage: str
    done: int = 0
    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    num_failed: int = 0

    def add(self, record: ImageRecord) -> None:
        """Count a labeled image."""
        self.done += 1
        self.num_failed += record.error is not None
        self.counts.update(labeled.class_name for labeled in record.objects)


@dataclass(frozen=True)
class LabelingResult:
    """Result of a run.

    Attributes:
        folder: Folder of the dataset.
        num_images: Number of images in the exported dataset.
        num_duplicates: Number of near-duplicates that were dropped.
        num_failed: Number of images that cannot be read or on which the model failed.
        counts: Number of objects by class.
        splits: Number of images by split.
        report: Path of the report.
    """

    folder: Path
    num_images: int
    num_duplicates: int
    num_failed: int
    counts: Mapping[str, int]
    splits: Mapping[str, int]
    report: Path


def label(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    classes: str | Sequence[str] | None = None,
    output: str | os.PathLike[str] = "dataset",
    *,
    prompts: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | VisionModel = "moondream2",
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    confidence: float = 0.0,
    max_objects: int = 50,
    nms: float | None = None,
    max_area: float | None = None,
    slice_size: int | None = None,
    every: int | None = None,
    on_scene_change: bool = False,
    duplicate_distance: int | None = None,
    format: str = "yolo",
    split: Sequence[float] = DEFAULT_SPLIT,
    seed: int = 0,
    link: bool = False,
    batch: int = 16,
    ray: str | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> LabelingResult:
    """Label images with a model, and write them as a dataset for training.

    The folder contains the dataset, `labels.jsonl` (one line per input image, with scores), `labeling.json` (settings)
    and `report.html`. After an interruption, a call with the same arguments continues; new images of the inputs are
    added. Images that cannot be read are listed in the report and skipped.

    Args:
        inputs: Folder, glob, text file with a path or URL per line, image, video, COCO, YOLO or VOC dataset, labeled
            dataset, or URL that fsspec can list; or several of them. Labels of a dataset are kept, and objects of the
            model are added.
        classes: Class names. None: the classes of `prompts`; or no model runs, and the dataset is only exported.
        output: Folder of the new dataset, or of one to continue.
        prompts: YAML file with prompts, negative prompts, threshold and skill by class.
        model: Model name or folder, server URL, or a loaded model.
        device: Device of a local model; None selects the best available.
        dtype: "float32", "bfloat16" or "float16"; None selects the best for the device.
        quantize: "int8" or "int4"; None: as in the checkpoint.
        adapter: LoRA adapter, as in `moondream_cv.load`.
        confidence: Minimum confidence of classes without a threshold in `prompts`.
        max_objects: Maximum number of objects per image and prompt.
        nms: IoU threshold of non-maximum suppression within each class; None keeps overlapping boxes.
        max_area: Maximum box area as a fraction of the image area, above 0 and at most 1; None keeps all boxes.
        slice_size: Size of overlapping slices in pixels, at least 32, for small objects; None: the whole image at once.
        every: Interval between two frames of a video, in frames; None: about one frame per second.
        on_scene_change: Use the first frame of each scene of a video.
        duplicate_distance: Maximum Hamming distance of the 64-bit perceptual hashes of near-duplicates, which are
            dropped; 6 is a good start. None keeps all images.
        format: "yolo", "coco", "voc", "labelme", "createml", "label-studio" or "huggingface".
        split: Shares of the images for training, validation and test. Input datasets keep their splits.
        seed: Seed of the split.
        link: Create hard links to the images instead of copies, if the file system supports them.
        batch: Number of images per batch.
        ray: Address of a Ray cluster, "auto", or "local"; None uses this process only.
        workers: Number of models on the Ray cluster; None loads one per GPU, or one per machine without GPUs.
        on_progress: Function that receives the progress.

    Raises:
        LabelingError: An input, a class, the format or the folder is unsuitable; the message names the remedy. Nothing
            was changed.
        ValueError: An argument is out of range.
        MoondreamError: The model cannot be loaded, or it failed on all images of a batch.
    """
    # Check the arguments
    folder = Path(output).expanduser()
    if duplicate_distance is not None:
        check_integer("duplicate_distance", duplicate_distance, 0, 32)
        check_imagehash()
    if every is not None:
        check_integer("every", every)
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    chosen = _class_prompts(classes, prompts, confidence)
    settings = LabelingSettings(
        chosen,
        _model_name(model),
        device,
        dtype,
        quantize,
        None if adapter is None else str(adapter),
        check_integer("max_objects", max_objects),
        None if nms is None else check_probability("nms", nms),
        None if max_area is None else check_share("max_area", max_area),
        None if slice_size is None else check_integer("slice_size", slice_size, 32),
    )
    loaded = None if isinstance(model, (str, os.PathLike)) else model
    settings.check(loaded is not None, ray is not None)
    if workers is not None:
        check_integer("workers", workers)
        if ray is None:
            raise LabelingError(f"workers needs ray, the address of a Ray cluster, got {workers}; add ray='local'")
    options: dict[str, Any] = {
        **settings.to_dict(),
        "every": every,
        "on_scene_change": on_scene_change,
        "duplicate_distance": duplicate_distance,
        "batch": check_integer("batch", batch, 1, 1024),
    }
    export = {
        "format": format,
        "split": list(scale_shares(split)),
        "seed": check_integer("seed", seed, 0),
        "link": link,
    }
    if chosen:
        check_format(format, [one.name for one in chosen], "point" in settings.skills)
    _check_state(folder, options)

    # Label and export
    report_progress = on_progress or (lambda progress: None)
    with locked(folder):
        before = _check_state(folder, options)  # another process may have changed it before the lock
        check_unchanged(folder)
        if before is None:
            remove_images(folder)
        state = DatasetState(options, export, [one.name for one in chosen] if before is None else before.class_names)
        write_state(folder, state)
        images = _list_images(folder, paths, state, report_progress)
        dropped = _find_duplicates(folder, images.images, options["duplicate_distance"], report_progress)
        _label_images(folder, state, images, dropped, settings, loaded, ray, workers, report_progress)
        return export_labels(folder, state, on_progress=report_progress)


def merge_review(
    folder: str | os.PathLike[str], reviewed: str | os.PathLike[str]
) -> tuple[MergeSummary, LabelingResult]:
    """Replace the labels of reviewed images by those of people, and export the dataset again.

    Args:
        folder: Folder of a labeled dataset.
        reviewed: Label Studio export, COCO, YOLO or VOC dataset, or folder of LabelMe files; see `merge_reviewed`.

    Returns:
        A summary of the merge, and the result of the export.

    Raises:
        LabelingError: The dataset is not complete, the review cannot be read, it contains none of the images, or the
            format of the dataset cannot represent its objects. Nothing was changed.
    """
    path = Path(folder).expanduser()
    read_state(path)  # before `locked` creates files
    with locked(path):
        state = read_state(path)
        num_images = len(read_images(path).images)
        num_labeled = sum(1 for _ in read_records(path / LABELS)) if (path / LABELS).exists() else 0
        if num_labeled != num_images:
            raise LabelingError(f"{num_labeled} of {num_images} images in {path} are labeled; complete the run first")

        def add_classes(names: Sequence[str], has_points: bool) -> None:
            state.class_names = list(dict.fromkeys([*state.class_names, *names]))
            check_format(state.export["format"], state.class_names, has_points)
            write_state(path, state)  # first, so that a killed merge leaves no objects of unknown classes

        summary = merge_reviewed(path, Path(reviewed).expanduser(), on_classes=add_classes)
        return summary, export_labels(path, state)


def export_labels(folder: Path, state: DatasetState, *, on_progress: OnProgress | None = None) -> LabelingResult:
    """Export a labeled dataset in its format, and write its report.

    Args:
        folder: Folder of the dataset, which is locked.
        state: Settings of the dataset; they are written.
        on_progress: Function that receives the progress.

    Raises:
        LabelingError: The labels cannot be read, or files are in the way.
        OSError: A file cannot be written.
    """
    progress = LabelingProgress("export")

    def update(done: int, total: int) -> None:
        progress.done, progress.total = done, total
        if on_progress is not None:
            on_progress(progress)

    # Export
    write_state(folder, state)
    summary = export_dataset(
        folder,
        state.export["format"],
        state.class_names,
        lambda record: read_source(record.source, folder),
        split=state.export["split"],
        seed=state.export["seed"],
        link=state.export["link"],
        progress=update,
    )

    # Report
    report = write_report(
        folder,
        title=folder.absolute().name,
        settings={**state.labeling, **state.export, "class_names": state.class_names},
        open_image=lambda record: Image.fromarray(to_rgb(read_source(record.source, folder))),
        splits=summary.num_images,
    )
    return LabelingResult(
        folder,
        sum(summary.num_images.values()),
        summary.num_duplicates,
        summary.num_failed,
        summary.num_objects,
        summary.num_images,
        report,
    )


def _class_prompts(
    classes: str | Sequence[str] | None, prompts: str | os.PathLike[str] | None, confidence: float
) -> tuple[ClassPrompts, ...]:
    """Return the classes with their prompts; none if there are neither classes nor prompts."""
    names = [] if classes is None else [classes] if isinstance(classes, str) else list(classes)
    if classes is not None and not names:
        raise LabelingError("class names must not be empty; give names such as 'dog', or a file with prompts")
    if prompts is not None:
        return load_prompts(prompts, names or None, confidence)
    return class_prompts(names, confidence) if names else ()


def _model_name(model: str | os.PathLike[str] | VisionModel) -> str:
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    return str(getattr(model, "name", "") or type(model).__name__)


def _check_state(folder: Path, options: Mapping[str, Any]) -> DatasetState | None:
    """Check the folder of the dataset, and return its state; None for a dataset without labels."""
    before = check_target(folder)
    if before is None or not has_labels(folder):
        return None
    check_same(folder, before.labeling, options)
    return before


def _list_images(
    folder: Path, paths: Sequence[str | os.PathLike[str]], state: DatasetState, on_progress: OnProgress
) -> ImageList:
    """List the images of the inputs, add new ones to the list of the dataset, and write it."""

    def update(done: int, total: int) -> None:
        on_progress(LabelingProgress("frames", done, total))

    options = state.labeling
    listed = list_inputs(
        paths,
        folder.absolute() / FRAMES,
        every=options["every"],
        on_scene_change=options["on_scene_change"],
        progress=update,
    )
    if not options["classes"] and any(image.given is None for image in listed):
        raise LabelingError("class names are missing; give names such as 'dog', or a file with prompts")
    images = read_images(folder)
    known = {image.source for image in images.images}
    added = [image for image in listed if image.source not in known]
    if added:
        _check_new_names(images.images, added)
        if not state.export["link"]:
            check_space(folder, added)
        state.class_names = list(dict.fromkeys([*state.class_names, *_given_classes(paths, added)]))
        check_format(state.export["format"], state.class_names, _has_points(state, added))
        images.add(added)
        write_state(folder, state)
        write_images(folder, images)
    return images


def _given_classes(paths: Sequence[str | os.PathLike[str]], added: Iterable[InputImage]) -> list[str]:
    """Return the classes of the inputs: those of labeled datasets in their order, so that exports share class IDs."""
    folders = [os.path.expanduser(path) for path in paths]
    ordered = [
        name for folder in folders if is_labeled_dataset(folder) for name in read_state(Path(folder)).class_names
    ]
    return [*ordered, *sorted({labeled.class_name for image in added for labeled in image.given or ()})]


def _check_new_names(images: Iterable[InputImage], added: Iterable[InputImage]) -> None:
    """Check that the stems of new images differ from those of the dataset."""
    sources = {name_key(image.name): image.source for image in images}
    for image in added:
        other = sources.get(name_key(image.name))
        if other is not None:
            raise LabelingError(
                f"{image.source} has the same name as {other} in the dataset; rename it, or choose another folder"
            )


def _has_points(state: DatasetState, images: Iterable[InputImage]) -> bool:
    if any(one["skill"] == "point" for one in state.labeling["classes"]):
        return True
    return any(labeled.is_point for image in images for labeled in image.given or ())


def _find_duplicates(
    folder: Path, images: Sequence[InputImage], distance: int | None, on_progress: OnProgress
) -> Mapping[int, int]:
    """Return the index of an earlier image for each near-duplicate."""
    if distance is None:
        return {}

    def update(done: int, total: int) -> None:
        on_progress(LabelingProgress("duplicates", done, total))

    return find_duplicates(images, distance, folder / WORK / "hashes.jsonl", progress=update)


def _label_images(
    folder: Path,
    state: DatasetState,
    listed: ImageList,
    dropped: Mapping[int, int],
    settings: LabelingSettings,
    model: VisionModel | None,
    ray: str | None,
    workers: int | None,
    on_progress: OnProgress,
) -> None:
    """Write the missing batches of the log."""
    images, batches = listed.images, listed.batches(int(state.labeling["batch"]))
    with LabelLog(folder, batches) as log:
        missing = log.missing
        if not missing:
            return

        # Count the images that are labeled
        progress = LabelingProgress("labels", total=len(images))
        progress.counts.update(dict.fromkeys(state.class_names, 0))
        for record in read_records(folder / LABELS):
            progress.add(record)
        on_progress(progress)

        # Label the others
        release_large_blocks()
        trimmer = MemoryTrimmer(_TRIMMING_INTERVAL)
        inputs = ((number, [images[index] for index in batches[number] if index not in dropped]) for number in missing)
        try:
            for number, records in _labeled_batches(inputs, settings, model, ray, workers):
                remaining = iter(records)
                completed = [
                    _duplicate(images[index], images[dropped[index]]) if index in dropped else next(remaining)
                    for index in batches[number]
                ]
                log.write(number, [record.to_line() for record in completed])
                for record in completed:
                    progress.add(record)
                on_progress(progress)
                trimmer.trim()
        except MoondreamError as error:
            raise LabelingError(
                f"{error}. {log.num_lines} of {len(images)} images are labeled; the same command continues"
            ) from error


def _labeled_batches(
    batches: Iterator[tuple[int, list[InputImage]]],
    settings: LabelingSettings,
    model: VisionModel | None,
    ray: str | None,
    workers: int | None,
) -> Iterator[tuple[int, list[ImageRecord]]]:
    """Yield the records of each batch, on Ray in any order."""
    if ray is not None:
        from moondream_cv.labeling.ray_runner import label_on_ray

        for number, lines in label_on_ray(batches, settings, ray, num_workers=workers):
            yield number, [ImageRecord.from_line(line) for line in lines]
        return
    with Labeler(settings, model) as labeler:
        for number, images, pixels in _read_ahead(batches):
            yield number, labeler.label(images, pixels)


def _read_ahead(
    batches: Iterator[tuple[int, list[InputImage]]],
) -> Iterator[tuple[int, list[InputImage], list[Pixels | ImageError]]]:
    """Yield the batches with their pixels. The next batch is read while the caller uses one."""
    with ThreadPoolExecutor(1) as executor:
        waiting = None
        for number, images in batches:
            reading = number, images, executor.submit(read_batch, images)
            if waiting is not None:
                yield waiting[0], waiting[1], waiting[2].result()
            waiting = reading
        if waiting is not None:
            yield waiting[0], waiting[1], waiting[2].result()


def _duplicate(image: InputImage, original: InputImage) -> ImageRecord:
    return ImageRecord(image.name, image.source, split=image.split, group=image.group, duplicate_of=original.name)
