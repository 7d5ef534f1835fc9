"""`moondream-cv demo`: run the embedded tiny model on rendered scenes and a clip, and compare with the ground truth.

The scenes and the clip are fixed, so the results are reproducible. `demo_scenes` and `demo_clip` have the questions and
the checks.
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
from .demo_clip import SHOWN, ClipResult, sample_frames, track_clip
from .demo_scenes import PLANS, Check, SceneResult, Score, run_scene
from .models import ModelOptions, opened_model
from .report import Report, shown
from .saving import check_folder, save


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for images and videos.")
    ] = Path("demo"),
    model: options.Model = "tiny",
    device: options.Device = None,
    as_json: options.AsDocument = False,
) -> None:
    """Run all features on four rendered scenes and a clip, without a download.

    The embedded tiny model recognizes colored shapes and a few dozen icons, but no photographs.

    \b
    [bold]Examples[/]
    $ moondream-cv demo
    $ moondream-cv demo --output /tmp/demo --json
    """
    from rich.text import Text

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} must be a folder, got a file; choose a folder")
    check_folder("--output", output)
    started = time.perf_counter()
    report, score = Report("demo", as_json, model=model), Score()
    report.print(Text(f"moondream-cv demo: {len(PLANS)} rendered scenes and a clip, the model {model!r}", style="bold"))
    with opened_model(ModelOptions(model, device), {"detect", "point", "query", "caption"}, report) as vision_model:
        from moondream_cv.detector import Detector, Pointer

        detector, pointer = Detector(vision_model), Pointer(vision_model)

        # Run the scenes
        scenes = []
        for number, plan in enumerate(PLANS, 1):
            with report.working(f"Scene {number} of {len(PLANS)}: {plan.title}"):
                result = run_scene(plan, vision_model, detector, pointer, score)
            scenes.append(result)
            _print_checks(report, f"Scene: {plan.title}", result.checks)
        saved = _save_images(output, scenes, score, model)

        # Track the clip
        with report.working("Clip"):
            clip = track_clip(detector, output)
            _save_contact_sheet(clip, model)
        _print_checks(report, f"Clip: {clip.frames} frames", clip.checks)

    # Report the results
    report.notice(f"Saved {len(saved) + 1} images and 2 videos in {shown(str(output))}")
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
    for header in ("question", "answer", "ground truth", ""):
        table.add_column(header)
    for check in checks:
        verdict = Text("correct", "green") if check.right else Text("wrong", "bold red")
        table.add_row(check.asked, Text(shown(check.said)), Text(check.truth), verdict)
    report.print(table)


def _save_images(output: Path, scenes: Sequence[SceneResult], score: Score, model: str) -> list[Path]:
    from moondream_cv.drawing import annotate

    from .montage import Panel, make_montage

    saved, panels = [], []
    for number, result in enumerate(scenes, 1):
        stem = f"{number}-{result.plan.title}"
        boxes = annotate(result.image, result.boxes)
        for name, image in (
            (f"{stem}.png", result.image),
            (f"{stem}-boxes.png", boxes),
            (f"{stem}-points.png", annotate(result.image, result.points)),
        ):
            save(image, output / name)
            saved.append(output / name)
        panels.append(Panel(boxes, [_colored_texts(check) for check in result.checks[2:]]))
    overview = make_montage(
        "moondream-cv: detect objects by name",
        f"{len(scenes)} rendered scenes, the model {model!r}: {score.found} of {score.objects} objects found, "
        f"{score.wrong} wrong; {score.right} of {score.questions} other answers correct",
        panels,
    )
    save(overview, output / "overview.png")
    return [*saved, output / "overview.png"]


def _save_contact_sheet(clip: ClipResult, model: str) -> None:
    from .montage import GRAY, Panel, make_montage

    frames = sample_frames(clip.target, SHOWN)
    sheet = make_montage(
        "moondream-cv: track objects by name",
        f"{clip.target.name}, the model {model!r}: {clip.sentence}",
        [Panel(image, [[(f"{seconds:.1f} s", GRAY)]]) for seconds, image in frames],
        panel_width=frames[0][1].width,
    )
    save(sheet, clip.sheet)


def _colored_texts(check: Check) -> list[tuple[str, tuple[int, int, int]]]:
    from moondream_cv.drawing import BLACK

    from .montage import GRAY, RED

    texts = [(check.asked, GRAY), (check.said, BLACK)]
    return texts if check.right else [*texts, (f"(ground truth: {check.truth})", RED)]


def _as_dict(result: SceneResult, output: Path) -> dict[str, Any]:
    stem = f"{PLANS.index(result.plan) + 1}-{result.plan.title}"
    return {"image": str(output / f"{stem}.png"), "checks": [asdict(check) for check in result.checks]}


def _print_ending(
    report: Report, score: Score, scenes: Sequence[SceneResult], clip: ClipResult, output: Path, seconds: float
) -> None:
    report.print(
        f"Found {score.found} of {score.objects} objects, {score.wrong} wrong; {score.right} of {score.questions} "
        f"other answers correct; {seconds:.0f} s."
    )
    report.print(f"Tracked through the clip: {clip.sentence}.")
    images = f"{shown(str(output / 'overview.png'))} and {shown(str(output / 'tracked.mp4'))}"
    report.print(f"Open {images}, then try:")
    for line in suggestions(scenes, clip, output):
        report.print(f"  {line}")


def suggestions(scenes: Sequence[SceneResult], clip: ClipResult, output: Path) -> list[str]:
    """Return commands and Python code to try next, with objects that the model found.

    Args:
        scenes: Results of the scenes.
        clip: Result of the clip.
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
        "moondream-cv detect photo.jpg -c person -o people.png     # Moondream 2: downloads 3.7 GB once",
        "In Python:",
        "from moondream_cv import Detector",
        f"detections = Detector('tiny')({image.as_posix()!r}, {names!r})     # sv.Detections",
    ]


def _quoted(text: str) -> str:
    """Return an argument for the shell of any operating system, in double quotes if necessary."""
    return text if re.fullmatch(r"[\w./\\:-]+", text) else f'"{text}"'
