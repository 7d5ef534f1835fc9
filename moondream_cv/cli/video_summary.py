"""Summary at the end of `moondream-cv video`: objects, counts, problems and files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from .report import Report, shown

if TYPE_CHECKING:
    from moondream_cv.video import Summary
    from moondream_cv.video.pipeline import ClassSummary

STDOUT = "-"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")


def print_summary(
    report: Report, summary: Summary, targets: Iterable[str], has_scores: bool, stopped: bool = False
) -> None:
    """Print objects and counts, problems, and the written files.

    Args:
        report: Output of the command.
        summary: Summary of the video.
        targets: Output files.
        has_scores: Whether the model returns confidences.
        stopped: Whether the command was stopped early.

    Raises:
        typer.Exit: With status 1 if the model failed on every keyframe.
    """
    output = report.notice if report.as_json else report.print
    counts = {name: _class_text(seen, has_scores) for name, seen in summary.classes.items()}
    if summary.zones is not None:
        counts |= {f"{name} (line)": _line_text(line) for name, line in summary.zones["lines"].items()}
        counts |= {f"{name} (zone)": _zone_text(zone) for name, zone in summary.zones["zones"].items()}
    width = max(map(len, counts))
    for name, text in counts.items():
        output(f"{shown(name):{width}}  {text}")
    if summary.problems:
        were = "was" if summary.problems == 1 else "were"
        report.notice(f"Warning: {_number(summary.problems, 'frame')} could not be decoded and {were} skipped")
    if summary.failed:
        keyframes = summary.detections_run + summary.failed
        which = f"{summary.failed} of {keyframes} frames" if summary.detections_run else "every frame"
        report.notice(f"Warning: the model failed on {which}")
    files = [_file_text(target, summary) for target in targets if target != STDOUT and _exists(target)]
    output(
        f"{'Stopped after ' if stopped else ''}{_number(summary.frames, 'frame')} in {summary.elapsed:.1f} s "
        f"({summary.fps:.1f} fps), detector ran on {summary.detections_run} ({summary.detector_fps:.1f} fps)"
        + (f"; saved {', '.join(files)}" if files else "")
    )
    if summary.failed and not summary.detections_run and not stopped:
        raise typer.Exit(1)


def _exists(target: str) -> bool:
    return os.path.exists(os.path.expanduser(target))


def _file_text(target: str, summary: Summary) -> str:
    saved = summary.saved_frames
    if saved is None or saved >= summary.frames or not target.lower().endswith(VIDEO_SUFFIXES):
        return shown(target)
    return f"{shown(target)} ({saved} of {_number(summary.frames, 'frame')})"


def _class_text(seen: ClassSummary, has_scores: bool) -> str:
    if not seen.frames:
        return "nothing found"
    text = f"{_number(seen.objects, 'object')}, on {_number(seen.frames, 'frame')}, at most {seen.most} at a time"
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
