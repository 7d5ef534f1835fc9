"""`moondream-cv video`: tracks what is named through a video, draws and writes it, and sums up what was there.

The work is done by `moondream_cv.video.annotate_video`. Here are its options, and what can be checked before a model is
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

from . import options
from .detect_command import class_names
from .models import ModelOptions, opened_model
from .output import Report, set_verbosity
from .stopping import exit_status
from .video_bar import Bar, few_of_a_kind
from .video_summary import STDOUT, sum_up

if TYPE_CHECKING:
    from moondream_cv.video import Source


def video(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A video or an animated image, a folder of images, a glob in quotes or a pattern like "
            "frames/%04d.png, a webcam's number, or the URL of a stream.",
            show_default=False,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLASS", help="What to look for; several, also separated by commas.", show_default=False
        ),
    ] = None,
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the video here: .mp4, .mov or .mkv.", show_default=False
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    every: Annotated[
        str,
        typer.Option(
            "--every",
            metavar="N|auto",
            help="Look at every Nth frame; auto: as often as the model can while the output keeps up with the source.",
        ),
    ] = "auto",
    annotate: Annotated[
        str,
        typer.Option(
            "--annotate", metavar="KINDS", help="What to draw: box, label, trace, dot, blur and pixelate, or none."
        ),
    ] = "box,label",
    zone: Annotated[
        Path | None,
        typer.Option(
            "--zone", metavar="FILE", help="JSON with lines and zones at which to count; see above.", show_default=False
        ),
    ] = None,
    panel: Annotated[bool, typer.Option("--panel", help="Put a table of counts beside the picture.")] = False,
    colour_by: Annotated[str, typer.Option("--colour-by", metavar="class|id", help="What shares a colour.")] = "class",
    json: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write JSON lines, one a frame; - is standard output, with nothing else on it.",
            show_default=False,
        ),
    ] = None,
    mot: Annotated[
        str | None,
        typer.Option(
            "--mot", metavar="FILE", help="Write the tracks as a MOT challenge file; or -.", show_default=False
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            "--fps",
            metavar="RATE",
            help="Frames per second of images, which have no clock. Default: 30.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the frames in a window; q closes it and ends.")] = False,
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Leave the sound of the file out.")] = False,
    confidence: options.Confidence = 0.0,
    max_objects: options.MaxObjects = 50,
    nms: options.Nms = None,
    max_area: options.MaxArea = None,
    min_size: options.MinSize = 0.0,
    tracker: Annotated[
        str, typer.Option("--tracker", metavar="NAME", help="sort, ocsort, bytetrack or botsort.")
    ] = "sort",
    scene_change: Annotated[
        bool, typer.Option("--scene-change", help="Look for cuts, and carry no object over into another scene.")
    ] = False,
    bridge: Annotated[
        float,
        typer.Option(
            "--bridge",
            metavar="SECONDS",
            help="Seconds without a detection that are bridged; blur and pixelate cover as long before and after one.",
        ),
    ] = 0.7,
    model: options.Model = "moondream2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    adapter: options.Adapter = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Track what is named through a video: boxes with numbers, drawn and written.

    Ctrl-C and SIGTERM end it early; what was written so far is completed and plays. A second Ctrl-C skips the sound.

    \b
    [bold]Examples[/]
    $ moondream-cv video street.mp4 person "red car" -o out.mp4
    $ moondream-cv video in.mp4 face --annotate blur --every 1 -o safe.mp4
    $ moondream-cv video shop.mp4 person --zone door.json --panel -o out.mp4
    $ moondream-cv video rtsp://camera/stream dog --json - | head
    $ moondream-cv video 0 cup --show
    $ moondream-cv video frames/%04d.png ball --fps 25 --mot tracks.txt

    \b
    [bold]Zone file[/] (docs/zones.md has all keys, docs/zones.schema.json the JSON schema)
    {"normalized": true,
     "lines": \\[{"name": "door", "start": \\[0.1, 0.6], "end": \\[0.9, 0.6]}],
     "zones": \\[{"name": "queue", "polygon": \\[\\[0, 0.6], \\[0.5, 0.6], \\[0.5, 1]]}]}
    Optional: "triggering_anchors", "minimum_crossing_threshold", "minimum_crossing_distance".
    """
    set_verbosity(verbose, quiet)
    files = {"--output": None if output is None else str(output), "--json": json, "--mot": mot}
    targets = {option: target for option, target in files.items() if target is not None}
    if not targets and not show:
        raise ValueError(
            "nothing to write; add -o out.mp4 for a video, --json out.jsonl for its boxes (--json - prints them), "
            "--mot tracks.txt for its tracks, or --show to look on"
        )
    chosen = _class_names([*(names or ()), *(classes or ())], classes_file)
    _keep_apart(targets, [source, *(str(file) for file in (zone, classes_file) if file is not None)])
    _check_existing(targets, overwrite)
    report = Report("video", as_json=STDOUT in (json, mot), quiet=quiet)  # as_json keeps standard output clean
    with ExitStack() as opened:
        opened.enter_context(few_of_a_kind())
        # Whatever is wrong ends the command before a model is loaded.
        with report.working("Starting"):
            from moondream_cv.video import Annotator, Tracking, Zones, annotate_video
            from moondream_cv.video.sources.opening import url_name
            from moondream_cv.video.tracking.schedule import check_every

            looks = check_every(int(every) if re.fullmatch(r"[+-]?\d+", every) else every)
            tracking = Tracking(tracker, scene_change=scene_change, bridge_seconds=bridge)
            tracking.create_tracker()
            colours = cast("Literal['class', 'id']", colour_by)
            Annotator(annotate, chosen, color_by=colours)
            zones = None if zone is None else Zones.read(zone)
            frames = _checked_source(source, opened, fps)
            _check_targets(targets)
        vision_model = opened.enter_context(
            opened_model(ModelOptions(model, device, dtype, adapter), {"detect"}, report)
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
        wanted = not quiet and not (report.as_json and sys.stdout.isatty())
        bar = Bar(url_name(source) if "://" in source else source, wanted=wanted)
        try:
            with bar:
                annotate_video(
                    frames,
                    output,
                    chosen,
                    annotate=annotate,
                    model=detector,
                    every=looks,
                    tracking=tracking,
                    zones=zones,
                    panel=panel,
                    color_by=colours,
                    json=json,
                    mot=mot,
                    show=show,
                    audio=not no_audio,
                    fps=fps if frames == source else None,
                    on_frame=bar.update,
                )
        except BaseException as error:
            if bar.summary is not None:
                sum_up(report, bar.summary, targets.values(), vision_model.has_scores, stopped=True)
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # whoever reads along has had enough, as `head` has
            if isinstance(error, KeyboardInterrupt) and bar.summary is not None:
                raise typer.Exit(exit_status(error)) from None
            raise
        if bar.summary is not None:
            sum_up(report, bar.summary, targets.values(), vision_model.has_scores)


def _class_names(names: Sequence[str], classes_file: Path | None) -> list[str]:
    """Split names at commas, add those of a file, and check them.

    Raises:
        ValueError: There are none, they are blank or given twice, or one is a file: of a glob that was not quoted.
    """
    files = [name for name in names if os.path.splitext(name)[1] and os.path.isfile(name)]
    if files:
        raise ValueError(
            f"{files[0]!r} is a file, where the name of a thing is expected; first comes one source, a glob in quotes, "
            'then what to look for: moondream-cv video "frames/*.jpg" dog -o out.mp4'
        )
    if not names and classes_file is None:
        raise ValueError(
            "no class names are given; add them after the source, for example: "
            'moondream-cv video in.mp4 dog "red circle" -o out.mp4'
        )
    return class_names(names, classes_file, [], "video")


def _keep_apart(targets: Mapping[str, str], originals: Sequence[str]) -> None:
    """Check that nothing is written twice, nor over what is read.

    Raises:
        ValueError: It would be, or a target has no name; names the option.
    """
    read = {_real(name) for name in originals if os.path.isfile(_real(name))}
    written: dict[str, str] = {}
    for option, target in targets.items():
        if not target:
            raise ValueError(f"{option} needs the name of a file")
        place = target if target == STDOUT else _real(target)
        if place in read:
            raise ValueError(f"{option} {target} would overwrite the original; choose another file")
        if place in written:
            raise ValueError(f"{written[place]} writes to {target} already; choose another file for {option}")
        written[place] = option


def _check_existing(targets: Mapping[str, str], overwrite: bool) -> None:
    """Check that no file is replaced without being asked; devices and pipes are written as they are.

    Raises:
        ValueError: A target exists; names the option.
    """
    for option, target in targets.items():
        if target != STDOUT and os.path.isfile(_real(target)) and not overwrite:
            raise ValueError(f"{option}: {target} exists; add --overwrite, or choose another name")


def _real(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _checked_source(source: str, opened: ExitStack, fps: float | None) -> str | Source:
    """Open a source. A file is closed again, and returned by its name, because `annotate_video` copies its sound."""
    from moondream_cv.video import open_source

    found = opened.enter_context(open_source(source, fps=fps))
    if found.live or not os.path.isfile(_real(source)):
        return found
    found.close()
    return source


def _check_targets(targets: Mapping[str, str]) -> None:
    """See that there is a place for what is to be written.

    Raises:
        VideoError: There is none; names the target.
    """
    from moondream_cv.errors import VideoError
    from moondream_cv.video.writers.base import cannot_be_written
    from moondream_cv.video.writers.video_file import VideoWriter

    for target in targets.values():
        place = os.path.expanduser(target)
        if target != STDOUT and (os.path.isdir(place) or not os.path.isdir(os.path.dirname(place) or ".")):
            raise VideoError(f"{target} {cannot_be_written(Path(target))}")
    if "--output" in targets:
        VideoWriter(targets["--output"]).close()  # without a frame it leaves no file
