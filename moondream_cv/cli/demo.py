"""`moondream-cv demo`: the embedded tiny model on rendered scenes, with what is true beside what it says.

The scenes and the clip are fixed, so the demo is the same every time. Mistakes are shown like everything else. What is
asked, and what counts as right, stands in `moondream_cv.cli.demo_scenes` and `moondream_cv.cli.demo_clip`.
"""

from __future__ import annotations

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
from .saving import save


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
    _print_ending(report, score, clip, output, time.perf_counter() - started)
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
    from .montage import Panel, make_montage
    from .pictures import annotate

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
    from .montage import GREY, RED
    from .pictures import BLACK

    said = [(check.asked, GREY), (check.said, BLACK)]
    return said if check.right else [*said, (f"(in truth: {check.truth})", RED)]


def _as_dict(result: Shown, output: Path) -> dict[str, Any]:
    stem = f"{PLANS.index(result.plan) + 1}-{result.plan.title}"
    return {"image": str(output / f"{stem}.png"), "checks": [asdict(check) for check in result.checks]}


def _print_ending(report: Report, score: Score, clip: Followed, output: Path, seconds: float) -> None:
    scene = output / "1-toys.png"
    report.print(
        f"Found {score.found} of {score.objects} objects, {score.wrong} wrong; {score.right} of {score.questions} "
        f"other answers right; {seconds:.0f} s."
    )
    report.print(f"Tracked through the clip: {clip.sentence}.")
    pictures = f"{shown(str(output / 'overview.png'))} and {shown(str(output / 'tracked.mp4'))}"
    report.print(f"Look at {pictures}, then go on:")
    report.print(f'  moondream-cv detect {scene} -c dog -c "red circle" -m tiny -o found.png')
    report.print(f'  moondream-cv query {scene} -q "How many red circles are there?" -m tiny')
    report.print(f'  moondream-cv video {output / "clip.mp4"} dog "red circle" -m tiny -o out.mp4')
    report.print("  moondream-cv detect photo.jpg -c person -o found.png     # the real model: fetches 3.7 GB once")
    report.print("In Python:")
    report.print("  from moondream_cv import Detector")
    report.print(f"  detections = Detector('tiny')('{scene.as_posix()}', ['dog', 'red circle'])     # sv.Detections")
