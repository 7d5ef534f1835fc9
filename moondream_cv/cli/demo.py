"""`moondream-cv demo`: the embedded tiny model on rendered scenes, with what is true beside what it says.

The scenes and the clip are fixed, so the demo is the same every time. Mistakes are shown like everything else. What is
asked, and what counts as right, stands in `moondream_cv.cli.demo_scenes` and `moondream_cv.cli.demo_clip`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .demo_clip import SHOWN, Followed, follow, shown_frames
from .demo_scenes import PLANS, Check, Score, Shown, look
from .models import ModelOptions, opened_model
from .output import Report, shown
from .saving import check_folder, save


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the pictures go.")] = Path(
        "demo"
    ),
    model: options.Model = "tiny",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what the package does, on four rendered scenes and a clip, without any download.

    The embedded tiny model knows coloured shapes and a few dozen icons, and nothing of photographs.

    \b
    [bold]Examples[/]
    $ moondream-cv demo
    $ moondream-cv demo --output /tmp/demo --json
    """
    from rich.text import Text

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; the demo needs a folder")
    check_folder("--output", output)
    started = time.perf_counter()
    report, score = Report("demo", as_json, model=model), Score()
    report.print(Text(f"moondream-cv demo: {len(PLANS)} rendered scenes and a clip, the model {model!r}", style="bold"))
    with opened_model(ModelOptions(model, device), {"detect", "point", "query", "caption"}, report) as vision_model:
        from moondream_cv.detector import Detector, Pointer

        detector, pointer = Detector(vision_model), Pointer(vision_model)
        scenes = []
        for number, plan in enumerate(PLANS, 1):
            with report.working(f"Scene {number} of {len(PLANS)}: {plan.title}"):
                result = look(plan, vision_model, detector, pointer, score)
            scenes.append(result)
            _print_checks(report, f"Scene: {plan.title}", result.checks)
        saved = _save_pictures(output, scenes, score, model)
        with report.working("Clip"):
            clip = follow(detector, output)
            _save_sheet(clip, model)
        _print_checks(report, f"Clip: {clip.frames} frames", clip.checks)
    report.notice(f"Saved {len(saved) + 1} pictures and 2 videos in {shown(str(output))}")
    for result in scenes:
        report.add(_as_dict(result, output))
    report.put(score=asdict(score), clip=clip.to_dict())
    _print_ending(report, score, scenes, clip, output, time.perf_counter() - started)
    report.finish()


def _print_checks(report: Report, title: str, checks: Sequence[Check]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(shown(title), "italic"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=False
    )
    for header in ("asked", "the model says", "the truth", ""):
        table.add_column(header)
    for check in checks:
        verdict = Text("right", "green") if check.right else Text("wrong", "bold red")
        table.add_row(check.asked, Text(shown(check.said)), Text(check.truth), verdict)
    report.print(table)


def _save_pictures(output: Path, scenes: Sequence[Shown], score: Score, model: str) -> list[Path]:
    from .images import annotate
    from .montage import Panel, make_montage

    saved, panels = [], []
    for number, result in enumerate(scenes, 1):
        stem = f"{number}-{result.plan.title}"
        boxes = annotate(result.image, result.boxes)
        for name, picture in (
            (f"{stem}.png", result.image),
            (f"{stem}-boxes.png", boxes),
            (f"{stem}-points.png", annotate(result.image, result.points)),
        ):
            save(picture, output / name)
            saved.append(output / name)
        panels.append(Panel(boxes, [_pieces(check) for check in result.checks[2:]]))
    overview = make_montage(
        "moondream-cv: name it, and find it",
        f"{len(scenes)} rendered scenes, the model {model!r}: {score.found} of {score.objects} objects found, "
        f"{score.wrong} wrong; {score.right} of {score.questions} other answers right",
        panels,
    )
    save(overview, output / "overview.png")
    return [*saved, output / "overview.png"]


def _save_sheet(clip: Followed, model: str) -> None:
    from .montage import GREY, Panel, make_montage

    frames = shown_frames(clip.target, SHOWN)
    sheet = make_montage(
        "moondream-cv: name it, and follow it",
        f"{clip.target.name}, the model {model!r}: {clip.sentence}",
        [Panel(image, [[(f"{seconds:.1f} s", GREY)]]) for seconds, image in frames],
        panel_width=frames[0][1].width,
    )
    save(sheet, clip.sheet)


def _pieces(check: Check) -> list[tuple[str, tuple[int, int, int]]]:
    from .images import BLACK
    from .montage import GREY, RED

    said = [(check.asked, GREY), (check.said, BLACK)]
    return said if check.right else [*said, (f"(in truth: {check.truth})", RED)]


def _as_dict(result: Shown, output: Path) -> dict[str, Any]:
    stem = f"{PLANS.index(result.plan) + 1}-{result.plan.title}"
    return {"image": str(output / f"{stem}.png"), "checks": [asdict(check) for check in result.checks]}


def _print_ending(
    report: Report, score: Score, scenes: Sequence[Shown], clip: Followed, output: Path, seconds: float
) -> None:
    report.print(
        f"Found {score.found} of {score.objects} objects, {score.wrong} wrong; {score.right} of {score.questions} "
        f"other answers right; {seconds:.0f} s."
    )
    report.print(f"Tracked through the clip: {clip.sentence}.")
    images = f"{shown(str(output / 'overview.png'))} and {shown(str(output / 'tracked.mp4'))}"
    report.print(f"Look at {images}, then go on:")
    for line in suggestions(scenes, clip, output):
        report.print(f"  {line}")


def suggestions(scenes: Sequence[Shown], clip: Followed, output: Path) -> list[str]:
    """Return commands and Python code to try next, about objects that the model has found.

    Args:
        scenes: The scenes of the demo.
        clip: The tracked clip.
        output: Folder of the images.
    """
    found = next((result for result in scenes if result.checks[0].right), scenes[0])
    names = list(dict.fromkeys(found.plan.names))[:2]
    image = output / f"{scenes.index(found) + 1}-{found.plan.title}.png"
    counts = [(index, check) for index, result in enumerate(scenes, 1) for check in result.checks[2:3]]
    number, count = next(((index, check) for index, check in counts if check.right), counts[0])
    counted = output / f"{number}-{scenes[number - 1].plan.title}.png"
    tracked = [name for name, check in zip(clip.names, clip.checks, strict=True) if check.right][:2] or clip.names[:2]
    classes = " ".join(f"-c {_quoted(name)}" for name in names)
    video = _quoted(str(output / "clip.mp4"))
    return [
        f"moondream-cv detect {_quoted(str(image))} {classes} -m tiny -o found.png",
        f"moondream-cv query {_quoted(str(counted))} -q {_quoted(count.asked)} --temperature 0 -m tiny",
        f"moondream-cv video {video} {' '.join(map(_quoted, tracked))} -m tiny -o out.mp4",
        "moondream-cv detect photo.jpg -c person -o people.png     # the real model: downloads 3.7 GB once",
        "In Python:",
        "from moondream_cv import Detector",
        f"detections = Detector('tiny')({image.as_posix()!r}, {names!r})     # sv.Detections",
    ]


def _quoted(text: str) -> str:
    """Return an argument for the shells of every system, in double quotes if it needs any."""
    return text if re.fullmatch(r"[\w./\\:-]+", text) else f'"{text}"'
