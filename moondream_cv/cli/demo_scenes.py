"""The demo's scenes: what is rendered, what is asked about it, and how far the replies are true.

Printing and saving are left to `moondream_cv.cli.demo`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import supervision as sv
    from PIL import Image

    from moondream_cv.detector import Detector, Pointer
    from moondream_cv.requests import Result
    from moondream_cv.scenes import Scene
    from moondream_cv.vision_model import VisionModel

RESOLUTION_WH = (640, 480)


@dataclass(frozen=True)
class Plan:
    """A scene to render and what to ask about it.

    Attributes:
        title: Names the files.
        seed: Fixes the scene.
        names: What it shows.
        absent: Names to look for beside those that are there: the answer should be nothing.
        points: A name to point at.
        count: A name to count.
        what: Something that is there once, to ask "What is this?" at its centre.
        colour: A shape that is there once, to ask for its colour.
    """

    title: str
    seed: int
    names: tuple[str, ...]
    absent: tuple[str, ...]
    points: str
    count: str
    what: str
    colour: str | None = None


PLANS = (
    Plan("toys", 107, ("red circle", "red circle", "blue star", "dog", "cat"), ("red star", "bus"), "red circle",
         "red circle", "dog", "star"),
    Plan("street", 105, ("car", "bus", "bicycle", "house", "tree", "car"), ("train",), "car", "car", "bicycle"),
    Plan("table", 101, ("apple", "banana", "pizza", "cup", "cake", "donut"), ("key",), "banana", "apple", "pizza"),
    Plan("sky", 110, ("airplane", "rocket", "bird", "yellow star", "yellow star", "purple ring"), ("yellow ring",),
         "star", "yellow star", "rocket", "ring"),
)  # fmt: skip


@dataclass
class Score:
    """How often the model was right."""

    objects: int = 0
    found: int = 0
    wrong: int = 0
    questions: int = 0
    right: int = 0


@dataclass(frozen=True)
class Check:
    """One thing that was asked: what the model said, and what is true."""

    asked: str
    said: str
    truth: str
    right: bool


@dataclass
class Shown:
    """A scene with what the model found in it."""

    plan: Plan
    scene: Scene
    image: Image.Image
    boxes: sv.Detections
    points: sv.Detections
    checks: list[Check] = field(default_factory=list)


def look(plan: Plan, model: VisionModel, detector: Detector, pointer: Pointer, score: Score) -> Shown:
    """Render a scene, ask everything about it, and compare with the truth."""
    from PIL import Image

    from moondream_cv.scenes import render_scene

    scene = render_scene(plan.seed, resolution_wh=RESOLUTION_WH, names=plan.names)
    image = Image.fromarray(scene.image)
    names = [*dict.fromkeys(plan.names), *plan.absent]
    encode = getattr(model, "encode_image", None)  # a model that runs here encodes an image once for all questions
    shown = image if encode is None else encode(image)
    result = Shown(plan, scene, image, detector(shown, names), pointer(shown, plan.points))
    result.checks.append(_check_boxes(result, score))
    result.checks.append(_check_points(result))
    requests, truths = _questions(plan, scene, shown)
    replies = model.run(list(requests.values()))
    for asked, reply, truth in zip(requests, replies, truths, strict=True):
        said = _text_of(reply)
        result.checks.append(Check(asked, said, truth, said == truth))
    asked_and_right = [check.right for check in result.checks[1:]]
    score.questions += len(asked_and_right)
    score.right += sum(asked_and_right)
    return result


def _questions(plan: Plan, scene: Scene, image: Any) -> tuple[dict[str, Any], list[str]]:
    """What to ask about a scene, under what people read, and the true answers."""
    from moondream_cv.requests import Caption, Query, Settings
    from moondream_cv.scenes import plural
    from moondream_cv.training.prompts import short_caption

    settings = Settings(temperature=0)
    (x, y), (width, height) = scene.named(plan.what)[0].center, scene.resolution_wh
    how_many = f"How many {plural(plan.count)} are there?"
    requests: dict[str, Any] = {how_many: Query(image, how_many, settings=settings)}
    truths = [str(len(scene.named(plan.count)))]
    if plan.colour is not None:
        which = f"What colour is the {plan.colour}?"
        requests[which] = Query(image, which, settings=settings)
        truths.append(str(scene.named(plan.colour)[0].color))
    place = ((x / width, y / height),)
    requests[f"What is this, at {x:.0f}, {y:.0f}?"] = Query(
        image, "What is this?", spatial_refs=place, settings=settings
    )
    truths.append(plan.what)
    requests["Short caption:"] = Caption(image, "short", settings)
    left_to_right = sorted(scene.objects, key=lambda item: item.center[0])
    truths.append(short_caption([item.name for item in left_to_right]))
    return requests, truths


def _check_boxes(result: Shown, score: Score) -> Check:
    """Compare boxes with the scene's: a box is right if it overlaps one of its class by half, each counted once."""
    import numpy as np
    import supervision as sv

    found = wrong = 0
    missed = [item.name for item in result.scene.objects]
    extra: list[str] = []
    for name in dict.fromkeys(str(name) for name in result.boxes.data["class_name"]):
        boxes = result.boxes.xyxy[result.boxes.data["class_name"] == name]
        truth = np.array([item.xyxy for item in result.scene.named(name)], dtype=np.float32).reshape(-1, 4)
        overlap = sv.box_iou_batch(truth, boxes) if len(truth) else np.zeros((0, len(boxes)))
        matches = 0
        while overlap.size and overlap.max() >= 0.5:
            row, column = np.unravel_index(overlap.argmax(), overlap.shape)
            overlap = np.delete(np.delete(overlap, row, 0), column, 1)
            missed.remove(name)
            matches += 1
        found, wrong = found + matches, wrong + len(boxes) - matches
        extra += [name] * (len(boxes) - matches)
    objects = len(result.scene.objects)
    score.objects, score.found, score.wrong = score.objects + objects, score.found + found, score.wrong + wrong
    said = f"{found} of {objects} found" + (f", {wrong} wrong ({', '.join(extra)})" if wrong else "")
    truth_text = f"missed: {', '.join(missed)}" if missed else "all there"
    return Check(f"Detect {len(set(result.plan.names)) + len(result.plan.absent)} classes", said, truth_text,
                 not missed and not wrong)  # fmt: skip


def _check_points(result: Shown) -> Check:
    """Compare points with the scene's: each object has to have one point within its box, and no point may be left."""
    left = [tuple(box[:2]) for box in result.points.xyxy.tolist()]
    truth = result.scene.named(result.plan.points)
    hits = 0
    for item in truth:
        x0, y0, x1, y1 = item.xyxy
        inside = [point for point in left if x0 <= point[0] <= x1 and y0 <= point[1] <= y1]
        if inside:
            left.remove(inside[0])
            hits += 1
    said = f"{len(result.points)} point{'s' * (len(result.points) != 1)}, {hits} on it"
    return Check(f"Point at {result.plan.points!r}", said, str(len(truth)), hits == len(truth) and not left)


def _text_of(reply: Result) -> str:
    from moondream_cv.requests import CaptionResult, ErrorResult, QueryResult

    if isinstance(reply, ErrorResult):
        raise reply.error
    assert isinstance(reply, (QueryResult, CaptionResult))
    return (reply.answer if isinstance(reply, QueryResult) else reply.caption).strip()
