"""`moondream-cv label`: label images, and write a dataset for training."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moondream_cv.urls import is_url

from . import options as shared
from .detect_command import split_class
from .report import SCHEMA, Report, set_verbosity, shown

if TYPE_CHECKING:
    from moondream_cv.labeling import LabelingResult

Format = Literal["yolo", "coco", "voc", "labelme", "createml", "label-studio", "huggingface"]


def label(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT",
            help="Folder, quoted glob, list file, video, COCO, YOLO or VOC dataset, or URL such as s3://bucket/folder.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Argument(metavar="CLASS...", help="Class names; commas separate several.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DATASET",
            help="Folder of the dataset, new or to continue.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="YAML file with prompts, negative prompts, threshold and skill by class.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option("--format", "-f", metavar="NAME", help=f"Format of the dataset: {', '.join(Format.__args__)}."),
    ] = "yolo",
    split: Annotated[
        str,
        typer.Option("--split", metavar="TRAIN,VALID,TEST", help="Shares of the images. Input datasets keep theirs."),
    ] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the split.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Create hard links to the images instead of copies.")] = False,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            min=1,
            metavar="N",
            help="Interval between two frames of a video. [dim]\\[default: one frame per second][/]",
            show_default=False,
        ),
    ] = None,
    scene_changes: Annotated[
        bool, typer.Option("--scene-changes", help="Use the first frame of each scene of a video.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Drop images that are nearly equal to an earlier one.")
    ] = False,
    duplicate_distance: Annotated[
        int,
        typer.Option(
            "--duplicate-distance",
            min=0,
            max=32,
            metavar="BITS",
            help="Maximum distance of the 64-bit hashes of near-duplicates.",
        ),
    ] = 6,
    confidence: shared.Confidence = 0.0,
    max_objects: shared.MaxObjects = 50,
    nms: shared.Nms = None,
    max_area: shared.MaxArea = None,
    slice_size: shared.SliceSize = None,
    model: shared.Model = "moondream2",
    device: shared.Device = None,
    dtype: shared.Dtype = None,
    quantize: shared.Quantize = None,
    adapter: shared.Adapter = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=1024, metavar="N", help="Images per batch.")] = 16,
    ray: shared.Ray = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Number of models on the Ray cluster. [dim]\\[default: one per GPU, or per machine without GPUs][/]",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge",
            metavar="REVIEWED",
            help="Replace the labels of reviewed images: Label Studio JSON, COCO, YOLO, VOC or LabelMe.",
            show_default=False,
        ),
    ] = None,
    as_json: shared.AsDocument = False,
    verbose: shared.Verbose = False,
    quiet: shared.Quiet = False,
) -> None:
    """Label images, and write a dataset for training.

    labels.jsonl contains all labels with their scores, and report.html shows the least certain first.
    After an interruption, the same command continues.

    \b
    [bold]Examples[/]
    $ moondream-cv label photos/ dog "red car" -o dataset
    $ moondream-cv label drive.mp4 person --every 30 --drop-duplicates -o frames-dataset
    $ moondream-cv label aerial/ car --slice 640 --format coco -o cars
    $ moondream-cv label photos/ --prompts prompts.yaml --ray auto -o dataset
    $ moondream-cv label --merge reviewed.json -o dataset
    """
    # Check the arguments
    set_verbosity(verbose, quiet)
    report = Report("label", as_json, quiet=quiet, model=model)
    if output is None:
        hint = f"for example: -o {_example_output(source)}" if merge is None else "the dataset of the reviewed labels"
        raise ValueError(f"the dataset is missing; add -o DATASET, {hint}")
    if merge is not None:
        if source is not None or classes or prompts is not None:
            raise ValueError("--merge takes no INPUT, CLASS or --prompts; only REVIEWED and -o DATASET")
        _merge(merge, output, report)
        return
    if source is None:
        raise ValueError("the input is missing; give a folder, a quoted glob, a list file, a video or a dataset")
    names = [name for text in classes or () for name in split_class(text)]
    _check_not_files(names)

    # Label
    from moondream_cv.labeling import label as run
    from moondream_cv.progress import showing_on

    from .label_progress import LabelProgress

    shares, progress = _shares(split), LabelProgress(report)
    try:
        with progress, showing_on(progress):
            result = run(
                source,
                names or None,
                output,
                prompts=prompts,
                model=model,
                device=device,
                dtype=dtype,
                quantize=quantize,
                adapter=adapter,
                confidence=confidence,
                max_objects=max_objects,
                nms=nms,
                max_area=max_area,
                slice_size=slice_size,
                every=every,
                on_scene_change=scene_changes,
                duplicate_distance=duplicate_distance if drop_duplicates else None,
                format=format,
                split=shares,
                seed=seed,
                link=link,
                batch=batch,
                ray=ray,
                workers=workers,
                on_progress=progress.update,
            )
    except KeyboardInterrupt:  # the bar is removed
        if progress.progress is not None:
            report.notice(f"{progress.progress.done:,} images are labeled; the same command continues")
        raise
    _print_result(result, report)
    is_validated = len(shares) > 1 and shares[1] > 0 and format != "label-studio"
    if is_validated and result.num_images and not result.splits.get("valid"):
        report.notice(
            "There are no images for validation: frames of a video stay together, and datasets keep their splits; add "
            "other images or videos"
        )


def _merge(reviewed: Path, folder: Path, report: Report) -> None:
    """Merge a review into a dataset."""
    from moondream_cv.labeling.run import merge_review

    summary, result = merge_review(folder, reviewed)
    report.notice(f"Reviewed images: {summary.num_reviewed:,}, with changes: {summary.num_changed:,}")
    if summary.new_classes:
        report.notice(f"New classes: {', '.join(map(shown, summary.new_classes))}")
    _print_result(result, report, reviewed=summary.num_reviewed, changed=summary.num_changed)


def _print_result(result: LabelingResult, report: Report, **extra: int) -> None:
    """Print the number of objects by class, and the paths of the results."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    table.add_column("objects", justify="right")
    for name, count in result.counts.items():
        table.add_row(Text(shown(name)), f"{count:,}")
    splits = ", ".join(f"{name} {count:,}" for name, count in result.splits.items() if count)
    report.print(table)
    report.print(f"{result.num_images:,} images in {shown(str(result.folder))}: {splits}")
    if result.num_duplicates:
        report.print(f"{result.num_duplicates:,} near-duplicates were dropped")
    report.print(f"Report: {shown(str(result.report))}")
    if result.num_failed:
        report.notice(f"Images that failed: {result.num_failed:,}; the report lists them")
    if report.as_json:
        document = {
            "folder": str(result.folder),
            "images": result.num_images,
            "duplicates": result.num_duplicates,
            "failed": result.num_failed,
            "objects": dict(result.counts),
            "splits": dict(result.splits),
            "report": str(result.report),
        }
        typer.echo(json.dumps({"schema": SCHEMA, **document, **extra}, indent=2))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--split must be one to three shares such as 0.8,0.1,0.1, got {text!r}") from None


def _check_not_files(names: list[str]) -> None:
    """Check that class names are not the files of an unquoted glob."""
    files = [
        name for name in names if is_url(name) or glob.has_magic(name) or (Path(name).suffix and os.path.exists(name))
    ]
    if files:
        raise ValueError(
            f'{files[0]!r} is given as a class name, but is a file; quote globs, as in "photos/*.jpg", or list the '
            "files in a text file"
        )


def _example_output(source: str | None) -> str:
    name = Path(source.rstrip("/*") if source else "photos").stem or "photos"
    return f"{name}-dataset"
