"""`moondream-cv video`: tracks what is named through a video, draws and writes it, and sums up what was there.

The work is done by `moondream_cv.video.annotate_video`. Here are its options, what can be checked before a model is
loaded, the bar that shows how far it has come, and the summary in words.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from . import options
from .locating import split_classes
from .models import opened_model
from .output import Report, shown

if TYPE_CHECKING:
    from types import TracebackType

    from moondream_cv.video import Source, Summary
    from moondream_cv.video.pipeline import ClassSummary

STDOUT = "-"
_DETECTION_THREAD = "moondream_cv detection"
_FRAME_BY_FRAME = ("moondream_cv.detector", "moondream_cv.video.detecting")  # what logs about single frames
_LINES_OF_A_KIND = 3


def video(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A video file, a folder of images, a glob in quotes, a webcam's number, or the URL of a stream.",
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the video here: .mp4, .mov or .mkv.", show_default=False
        ),
    ] = None,
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
        typer.Option("--zone", metavar="FILE", help="JSON with lines and zones at which to count.", show_default=False),
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
    show: Annotated[bool, typer.Option("--show", help="Show the frames in a window; q closes it and ends.")] = False,
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Leave the sound of the file out.")] = False,
    confidence: options.Confidence = 0.0,
    tracker: Annotated[
        str, typer.Option("--tracker", metavar="NAME", help="sort, ocsort, bytetrack or botsort.")
    ] = "sort",
    scene_change: Annotated[
        bool, typer.Option("--scene-change", help="Look for cuts, and carry no object over into another scene.")
    ] = False,
    model: options.Model = "moondream2",
    device: options.Device = None,
) -> None:
    """Track what is named through a video: boxes with numbers, drawn and written.

    Ctrl-C ends it early; what was written so far is complete and plays.

    \b
    [bold]Examples[/]
    $ moondream-cv video street.mp4 person "red car" -o out.mp4
    $ moondream-cv video in.mp4 face --annotate blur --every 1 -o safe.mp4
    $ moondream-cv video shop.mp4 person --zone door.json --panel -o out.mp4
    $ moondream-cv video rtsp://camera/stream dog --json - | head
    $ moondream-cv video 0 cup --show
    $ moondream-cv video "frames/*.jpg" ball --mot tracks.txt
    """
    files = {"--output": None if output is None else str(output), "--json": json, "--mot": mot}
    targets = {option: target for option, target in files.items() if target is not None}
    if not targets and not show:
        raise ValueError(
            "nothing to write; add -o out.mp4 for a video, --json out.jsonl for its boxes (--json - prints them), "
            "--mot tracks.txt for its tracks, or --show to look on"
        )
    chosen = _class_names([*(names or ()), *(classes or ())])
    _keep_apart(targets, [source, *([] if zone is None else [str(zone)])])
    report = Report("video", as_json=STDOUT in (json, mot))  # as_json keeps standard output clean
    with ExitStack() as opened:
        opened.enter_context(_few_of_a_kind())
        # Whatever is wrong ends the command before a model is loaded.
        with report.working("Starting"):
            from moondream_cv.video import Annotator, Tracking, Zones, annotate_video
            from moondream_cv.video.schedule import check_every
            from moondream_cv.video.sources import url_name

            looks = check_every(int(every) if re.fullmatch(r"[+-]?\d+", every) else every)
            tracking = Tracking(tracker, scene_change=scene_change)
            tracking.start()
            colours = cast("Literal['class', 'id']", colour_by)
            Annotator(annotate, chosen, colour_by=colours)
            zones = None if zone is None else Zones.read(zone)
            frames = _checked_source(source, opened)
            _check_targets(targets)
        vision_model = opened.enter_context(opened_model(model, device, {"detect"}, report))
        from moondream_cv.detector import Detector

        detector = Detector(vision_model, confidence=confidence)
        bar = _Bar(url_name(source) if "://" in source else source, wanted=not (report.as_json and sys.stdout.isatty()))
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
                    colour_by=colours,
                    json=json,
                    mot=mot,
                    show=show,
                    audio=not no_audio,
                    on_frame=bar.update,
                )
        except BaseException as error:
            if bar.summary is not None:
                _sum_up(report, bar.summary, targets.values(), vision_model.has_scores, stopped=True)
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # whoever reads along has had enough, as `head` has
            if isinstance(error, KeyboardInterrupt) and bar.summary is not None:
                raise typer.Exit(130) from None
            raise
        finally:
            _let_the_model_finish(report)
        if bar.summary is not None:
            _sum_up(report, bar.summary, targets.values(), vision_model.has_scores)


def _class_names(names: Sequence[str]) -> list[str]:
    """Split names at commas and check them.

    Raises:
        ValueError: There are none, they are blank or given twice, or one is a file: of a glob that was not quoted.
    """
    files = [name for name in names if os.path.splitext(name)[1] and os.path.isfile(name)]
    if files:
        raise ValueError(
            f"{files[0]!r} is a file, where the name of a thing is expected; first comes one source, a glob in quotes, "
            'then what to look for: moondream-cv video "frames/*.jpg" dog -o out.mp4'
        )
    if not names:
        raise ValueError(
            'nothing to look for; name it after the source: moondream-cv video in.mp4 dog "red circle" -o out.mp4'
        )
    return split_classes(names, [], "video")


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


def _real(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _checked_source(source: str, opened: ExitStack) -> str | Source:
    """See that a source can be opened. A live one stays so; a file is left to be opened again, for its sound too."""
    from moondream_cv.video import open_source

    found = opened.enter_context(open_source(source))
    if found.live:
        return found
    found.close()
    return source


def _check_targets(targets: Mapping[str, str]) -> None:
    """See that there is a place for what is to be written.

    Raises:
        VideoError: There is none; names the target.
    """
    from moondream_cv.errors import VideoError
    from moondream_cv.video.video_file import VideoWriter
    from moondream_cv.video.writers import cannot_be_written

    for target in targets.values():
        place = os.path.expanduser(target)
        if target != STDOUT and (os.path.isdir(place) or not os.path.isdir(os.path.dirname(place) or ".")):
            raise VideoError(f"{target} {cannot_be_written(Path(target))}")
    if "--output" in targets:
        VideoWriter(targets["--output"]).close()  # without a frame it leaves no file


class _Bar:
    """Shows on a terminal how far a video has come.

    Attributes:
        summary: The latest that it was told; None before the first frame.
    """

    def __init__(self, name: str, *, wanted: bool) -> None:
        """Make a bar that is not shown yet.

        Args:
            name: Of the source.
            wanted: Whether a terminal, if there is one, has room for a bar.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.summary: Summary | None = None
        console = Console(stderr=True)
        self._visible = wanted and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._visible,
            transient=True,
            redirect_stdout=False,  # JSON lines are for whoever reads them
            expand=True,
        )
        short = shown(name if len(name) <= 24 else f"...{name[-21:]}")
        self._task = self._progress.add_task(short, total=None, rates="")
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> _Bar:
        self._progress.start()
        if self._visible:  # log lines go above the bar, instead of through it
            for handler in logging.getLogger("moondream_cv").handlers:
                if isinstance(handler, logging.StreamHandler):
                    self._streams.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler, stream in self._streams:
            if stream is not None:
                handler.setStream(stream)
        self._progress.stop()

    def update(self, summary: Summary) -> None:
        """Show how far it is."""
        self.summary = summary
        total = None if summary.frame_count is None else max(summary.frame_count, summary.frames)
        rates = f"{summary.fps:.1f} fps, {summary.looked_fps:.1f} looked at"
        self._progress.update(self._task, completed=summary.frames, total=total, rates=rates)


def _let_the_model_finish(report: Report) -> None:
    """Wait for a look that is under way in its thread: PyTorch aborts a process that ends in the midst of one.

    Another Ctrl-C ends the process at once.
    """
    try:
        for thread in [thread for thread in threading.enumerate() if thread.name == _DETECTION_THREAD]:
            thread.join(1.0)
            if thread.is_alive():
                report.notice("The model finishes its last look; Ctrl-C ends it at once")
                thread.join()
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)


@contextmanager
def _few_of_a_kind() -> Iterator[None]:
    """Give a context in which the lines that every frame could give are logged a few times, and never twice."""
    lines: set[str] = set()
    kinds: Counter[str] = Counter()

    def is_new(record: logging.LogRecord) -> bool:
        if record.name not in _FRAME_BY_FRAME:
            return True
        line, kind = record.getMessage(), str(record.msg)
        if line in lines or kinds[kind] >= _LINES_OF_A_KIND:
            return False
        lines.add(line)
        kinds[kind] += 1
        return True

    handlers = logging.getLogger("moondream_cv").handlers
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def _sum_up(report: Report, summary: Summary, targets: Iterable[str], has_scores: bool, stopped: bool = False) -> None:
    """Say what was seen, what went wrong, and where it all is.

    Raises:
        typer.Exit: With status 1 if the model failed on every frame that it was shown.
    """
    say = report.notice if report.as_json else report.print
    counts = {name: _class_text(seen, has_scores) for name, seen in summary.classes.items()}
    if summary.zones is not None:
        counts |= {f"{name} (line)": _line_text(line) for name, line in summary.zones["lines"].items()}
        counts |= {f"{name} (zone)": _zone_text(zone) for name, zone in summary.zones["zones"].items()}
    width = max(map(len, counts))
    for name, text in counts.items():
        say(f"{shown(name):{width}}  {text}")
    if summary.problems:
        were = "was" if summary.problems == 1 else "were"
        report.notice(f"Warning: {_number(summary.problems, 'frame')} could not be decoded and {were} left out")
    if summary.failed:
        which = f"{summary.failed} of {summary.looked + summary.failed} frames" if summary.looked else "every frame"
        report.notice(f"Warning: the model failed on {which}")
    files = [shown(target) for target in targets if target != STDOUT and os.path.exists(os.path.expanduser(target))]
    say(
        f"{'Stopped after ' if stopped else ''}{_number(summary.frames, 'frame')} in {summary.elapsed:.1f} s "
        f"({summary.fps:.1f} fps), {summary.looked} looked at ({summary.looked_fps:.1f} fps)"
        + (f"; saved {', '.join(files)}" if files else "")
    )
    if summary.failed and not summary.looked and not stopped:
        raise typer.Exit(1)


def _class_text(seen: ClassSummary, has_scores: bool) -> str:
    if not seen.frames:
        return "nothing found"
    text = f"{_number(seen.objects, 'object')}, on {_number(seen.frames, 'frame')}, {seen.most} at a time at the most"
    return f"{text}, mean confidence {seen.confidence:.2f}" if has_scores else text


def _line_text(line: Mapping[str, Any]) -> str:
    ways = []
    for way in ("in", "out"):
        names = ", ".join(f"{count[way]} {shown(name)}" for name, count in line["classes"].items() if count[way])
        ways.append(f"{line[way]} {way}" + (f" ({names})" if names else ""))
    return ", ".join(ways)


def _zone_text(zone: Mapping[str, Any]) -> str:
    names = ", ".join(f"{count} {shown(name)}" for name, count in zone["classes"].items())
    return f"{zone['ids']} so far, {zone['now']} at the end" + (f" ({names})" if names else "")


def _number(count: int, of: str) -> str:
    return f"{count} {of}{'s' * (count != 1)}"
