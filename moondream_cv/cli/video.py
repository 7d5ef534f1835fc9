"""`moondream-cv video`: track objects by name through a video, and write an annotated video or the tracks.

`moondream_cv.video.annotate_video` does the work. This module has its options, and the checks before the model is
loaded.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from moondream_cv._deprecation import REMOVED_IN

from . import options
from .detect_command import class_names as parse_class_names
from .models import ModelOptions, opened_model
from .report import Report, set_verbosity
from .signals import exit_process, exit_status, interrupted_line
from .video_progress import VideoProgress, limit_frame_messages
from .video_summary import STDOUT, print_summary

if TYPE_CHECKING:
    from moondream_cv.video import Source


def video(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Video, animated image, folder of images, glob in quotes, pattern such as frames/%04d.png, webcam "
            "number or stream URL.",
            show_default=False,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLASS", help="Class names; repeat them or separate them by commas.", show_default=False
        ),
    ] = None,
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Annotated video: .mp4, .mov or .mkv.", show_default=False),
    ] = None,
    overwrite: options.Overwrite = False,
    every: Annotated[
        str,
        typer.Option(
            "--every",
            metavar="N|auto",
            help="Keyframe interval in frames; auto adapts it so that the output keeps up with the source.",
        ),
    ] = "auto",
    annotate: Annotated[
        str,
        typer.Option(
            "--annotate", metavar="KINDS", help="Annotations: box, label, trace, dot, blur and pixelate, or none."
        ),
    ] = "box,label",
    zone: Annotated[
        Path | None,
        typer.Option(
            "--zone", metavar="FILE", help="JSON file with lines and zones for counting, see above.", show_default=False
        ),
    ] = None,
    panel: Annotated[bool, typer.Option("--panel", help="Add a table of counts next to the frame.")] = False,
    color_by: Annotated[
        str, typer.Option("--color-by", metavar="class|id", help="Color of annotations: by class or by track ID.")
    ] = "class",
    colour_by: Annotated[
        str | None, typer.Option("--colour-by", hidden=True, help="Deprecated: use --color-by.", show_default=False)
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="JSON Lines with one object per frame; - prints them.",
            show_default=False,
        ),
    ] = None,
    mot: Annotated[
        str | None,
        typer.Option(
            "--mot", metavar="FILE", help="Tracks in MOT challenge format; - prints them.", show_default=False
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            "--fps",
            metavar="RATE",
            help="Frame rate of images, in frames per second. [dim]\\[default: 30][/]",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the frames in a window; q closes it and stops.")] = False,
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Write no audio.")] = False,
    confidence: options.Confidence = 0.0,
    max_objects: options.MaxObjects = 50,
    nms: options.Nms = None,
    max_area: options.MaxArea = None,
    min_size: options.MinSize = 0.0,
    tracker: Annotated[
        str, typer.Option("--tracker", metavar="NAME", help="Tracker: sort, ocsort, bytetrack or botsort.")
    ] = "sort",
    scene_change: Annotated[
        bool, typer.Option("--scene-change", help="Detect scene cuts, and end all tracks at a cut.")
    ] = False,
    bridge: Annotated[
        float,
        typer.Option(
            "--bridge",
            metavar="SECONDS",
            help="Maximum gap between detections of a track, in seconds; blur and pixelate also cover this time "
            "before and after a track.",
        ),
    ] = 0.7,
    model: options.Model = "moondream2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Track objects by name through a video, and write an annotated video or the tracks.

    Ctrl-C and SIGTERM stop early; the files written so far are completed. A second Ctrl-C skips the audio.

    \b
    [bold]Examples[/]
    $ moondream-cv video street.mp4 person "red car" -o out.mp4
    $ moondream-cv video in.mp4 face --annotate blur --every 1 -o safe.mp4
    $ moondream-cv video shop.mp4 person --zone door.json --panel -o out.mp4
    $ moondream-cv video rtsp://camera/stream dog --json - | head
    $ moondream-cv video 0 cup --show
    $ moondream-cv video frames/%04d.png ball --fps 25 --mot tracks.txt

    \b
    [bold]Zone file[/] ("Lines and zones" in the documentation describes all keys)
    {"normalized": true,
     "lines": \\[{"name": "door", "start": \\[0.1, 0.6], "end": \\[0.9, 0.6]}],
     "zones": \\[{"name": "queue", "polygon": \\[\\[0, 0.6], \\[0.5, 0.6], \\[0.5, 1]]}]}
    Optional: "triggering_anchors", "minimum_crossing_threshold", "minimum_crossing_distance".
    """
    set_verbosity(verbose, quiet)

    # Check the arguments
    files = {"--output": None if output is None else str(output), "--json": json, "--mot": mot}
    targets = {option: target for option, target in files.items() if target is not None}
    if not targets and not show:
        raise ValueError(
            "an output is missing; add -o out.mp4 for a video, --json out.jsonl for boxes (--json - prints them), "
            "--mot tracks.txt for tracks, or --show for a window"
        )
    class_names = _class_names([*(names or ()), *(classes or ())], classes_file)
    _check_distinct(targets, [source, *(str(file) for file in (zone, classes_file) if file is not None)])
    _check_existing(targets, overwrite)
    report = Report("video", as_json=STDOUT in (json, mot), quiet=quiet)  # as_json keeps standard output clean
    if colour_by is not None:
        report.notice(f"Warning: --colour-by is deprecated and will be removed in {REMOVED_IN}; use --color-by")
        color_by = colour_by
    with ExitStack() as opened:
        opened.enter_context(limit_frame_messages())
        # Create everything that can fail before the model is loaded.
        with report.working("Starting"):
            from moondream_cv.video import Annotator, Tracking, Zones, annotate_video
            from moondream_cv.video.sources.opening import url_name
            from moondream_cv.video.tracking.schedule import check_every

            keyframe_interval = check_every(int(every) if re.fullmatch(r"[+-]?\d+", every) else every)
            tracking = Tracking(tracker, scene_change=scene_change, bridge_seconds=bridge)
            tracking.create_tracker()
            colors = cast("Literal['class', 'id']", color_by)
            Annotator(annotate, class_names, color_by=colors)
            zones = None if zone is None else Zones.read(zone)
            frames = _checked_source(source, opened, fps)
            _check_targets(targets)

        # Load the model
        vision_model = opened.enter_context(
            opened_model(ModelOptions(model, device, dtype, adapter, quantize), {"detect"}, report)
        )
        from moondream_cv.detector import Detector

        detector = Detector(
            vision_model,
            confidence=confidence,
            max_objects=max_objects,
            nms=nms,
            max_area=max_area,
            min_size=min_size,
        )

        # Process the video
        is_shown = not quiet and not (report.as_json and sys.stdout.isatty())
        progress = VideoProgress(url_name(source) if "://" in source else source, is_shown=is_shown)
        try:
            with progress:
                annotate_video(
                    frames,
                    output,
                    class_names,
                    annotate=annotate,
                    model=detector,
                    every=keyframe_interval,
                    tracking=tracking,
                    zones=zones,
                    panel=panel,
                    color_by=colors,
                    json=json,
                    mot=mot,
                    show=show,
                    audio=not no_audio,
                    fps=fps if frames == source else None,
                    on_frame=progress.update,
                )
        except BaseException as error:
            if progress.summary is not None:
                print_summary(report, progress.summary, targets.values(), vision_model.has_scores, stopped=True)
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # the reader of the output has ended, such as `head`
            if isinstance(error, KeyboardInterrupt):
                if progress.summary is None:
                    typer.echo(interrupted_line(), err=True)
                exit_process(exit_status(error))  # a running call of the detector can take minutes
            raise
        if progress.summary is not None:
            print_summary(report, progress.summary, targets.values(), vision_model.has_scores)


def _class_names(names: Sequence[str], classes_file: Path | None) -> list[str]:
    """Return the class names of the command line and of a file.

    Args:
        names: Class names; each may contain several, separated by commas.
        classes_file: Text file with further class names.

    Raises:
        ValueError: There are no class names, one is blank or repeated, or one is a file from a glob without quotes.
    """
    files = [name for name in names if os.path.splitext(name)[1] and os.path.isfile(name)]
    if files:
        raise ValueError(
            f"class names must not be files, got {files[0]!r}; write one source, with quotes around a glob, then the "
            'class names: moondream-cv video "frames/*.jpg" dog -o out.mp4'
        )
    if not names and classes_file is None:
        raise ValueError(
            "class names are missing; add them after the source, for example: "
            'moondream-cv video in.mp4 dog "red circle" -o out.mp4'
        )
    return parse_class_names(names, classes_file, [], "video")


def _check_distinct(targets: Mapping[str, str], inputs: Sequence[str]) -> None:
    """Check that output files differ from each other and from the input files.

    Args:
        targets: Output file for each option.
        inputs: Input files.

    Raises:
        ValueError: Two files are equal, or a target is empty.
    """
    read = {_real(name) for name in inputs if os.path.isfile(_real(name))}
    written: dict[str, str] = {}
    for option, target in targets.items():
        if not target:
            raise ValueError(f"{option} must not be empty; name a file")
        place = target if target == STDOUT else _real(target)
        if place in read:
            raise ValueError(f"{option} {target} would replace an input file; choose another file")
        if place in written:
            raise ValueError(f"{option} and {written[place]} both write to {target}; choose another file for {option}")
        written[place] = option


def _check_existing(targets: Mapping[str, str], overwrite: bool) -> None:
    """Check that no existing file is replaced without `overwrite`; devices and pipes are allowed.

    Args:
        targets: Output file for each option.
        overwrite: Replace existing files.

    Raises:
        ValueError: A file exists.
    """
    for option, target in targets.items():
        if target != STDOUT and os.path.isfile(_real(target)) and not overwrite:
            raise ValueError(f"{option}: {target} exists; add --overwrite, or choose another name")


def _real(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _checked_source(source: str, opened: ExitStack, fps: float | None) -> str | Source:
    """Open a source. A file is closed again and returned by name, because `annotate_video` copies its audio."""
    from moondream_cv.video import open_source

    found = opened.enter_context(open_source(source, fps=fps))
    if found.live or not os.path.isfile(_real(source)):
        return found
    found.close()
    return source


def _check_targets(targets: Mapping[str, str]) -> None:
    """Check that the output files can be written.

    Args:
        targets: Output file for each option.

    Raises:
        VideoError: A folder does not exist, or a file cannot be created.
    """
    from moondream_cv.errors import VideoError
    from moondream_cv.video.writers.base import cannot_be_written
    from moondream_cv.video.writers.video_file import VideoWriter

    for target in targets.values():
        place = os.path.expanduser(target)
        if target != STDOUT and (os.path.isdir(place) or not os.path.isdir(os.path.dirname(place) or ".")):
            raise VideoError(f"{target} {cannot_be_written(Path(target))}")
    if "--output" in targets:
        VideoWriter(targets["--output"]).close()  # without frames, no file remains
