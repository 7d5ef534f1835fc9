"""Scenes of the demo: rendering, questions, and comparison of the answers with the ground truth."""

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
class ScenePlan:
    """A scene to render, and the questions about it.

    Attributes:
        title: Name of the image files.
        seed: Seed of the renderer.
        names: Objects in the scene.
        absent: Class names that are not in the scene; the model should find none.
        points: Class name for pointing.
        count: Class name for counting.
        what: Object that occurs once, for "What is this?" at its center.
        color: Shape that occurs once, for the question about its color; None for no such question.
    """

    title: str
    seed: int
    names: tuple[str, ...]
    absent: tuple[str, ...]
    points: str
    count: str
    what: str
    color: str | None = None


PLANS = (
    ScenePlan("toys", 107, ("red circle", "red circle", "blue star", "dog", "cat"), ("red star", "bus"), "red circle",
         "red circle", "dog", "star"),
    ScenePlan("street", 105, ("car", "bus", "bicycle", "house", "tree", "car"), ("train",), "car", "car", "bicycle"),
    ScenePlan("table", 101, ("apple", "banana", "pizza", "cup", "cake", "donut"), ("key",), "banana", "apple", "pizza"),
    ScenePlan("sky", 110, ("airplane", "rocket", "bird", "yellow star", "yellow star", "purple ring"), ("yellow ring",),
         "star", "yellow star", "rocket", "ring"),
)  # fmt: skip


@dataclass
class Score:
    """Number of correct and wrong results.

    Attributes:
        objects: Objects in the scenes.
        found: Objects that were found.
        wrong: Boxes without an object.
        questions: Other questions.
        right: Correct answers to them.
    """

    objects: int = 0
    found: int = 0
    wrong: int = 0
    questions: int = 0
    right: int = 0


@dataclass(frozen=True)
class Check:
    """One question with its answer.

    Attributes:
        asked: Question.
        said: Answer of the model.
        truth: Correct answer.
        right: Whether the answer is correct.
    """

    asked: str
    said: str
    truth: str
    right: bool


@dataclass
class SceneResult:
    """A scene with the results of the model."""

    plan: ScenePlan
    scene: Scene
    image: Image.Image
    boxes: sv.Detections
    points: sv.Detections
    checks: list[Check] = field(default_factory=list)


def run_scene(plan: ScenePlan, model: VisionModel, detector: Detector, pointer: Pointer, score: Score) -> SceneResult:
    """Render a scene, run all requests, and compare the results with the ground truth.

    Args:
        plan: Scene and questions.
        model: Model for query and caption.
        detector: Detector with the same model.
        pointer: Pointer with the same model.
        score: Score to update.
    """
    from PIL import Image

    from moondream_cv.scenes import render_scene

    scene = render_scene(plan.seed, resolution_wh=RESOLUTION_WH, names=plan.names)
    image = Image.fromarray(scene.image)
    names = [*dict.fromkeys(plan.names), *plan.absent]
    encode = getattr(model, "encode_image", None)  # a local model encodes the image once for all requests
    shown = image if encode is None else encode(image)
    result = SceneResult(plan, scene, image, detector(shown, names), pointer(shown, plan.points))
    result.checks.append(_check_boxes(result, score))
    result.checks.append(_check_points(result))
    requests, truths = _questions(plan, scene, shown)
    results = model.run(list(requests.values()))
    for question, answer, truth in zip(requests, map(_text_of, results), truths, strict=True):
        result.checks.append(Check(question, answer, truth, answer == truth))
    asked_and_right = [check.right for check in result.checks[1:]]
    score.questions += len(asked_and_right)
    score.right += sum(asked_and_right)
    return result


def _questions(plan: ScenePlan, scene: Scene, image: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the requests about a scene by their displayed question, and the correct answers."""
    from moondream_cv.requests import Caption, Query, Settings
    from moondream_cv.scenes import plural
    from moondream_cv.training.prompts import short_caption

    settings = Settings(temperature=0)
    (x, y), (width, height) = scene.named(plan.what)[0].center, scene.resolution_wh
    how_many = f"How many {plural(plan.count)} are there?"
    requests: dict[str, Any] = {how_many: Query(image, how_many, settings=settings)}
    truths = [str(len(scene.named(plan.count)))]
    if plan.color is not None:
        which = f"What color is the {plan.color}?"
        requests[which] = Query(image, which, settings=settings)
        truths.append(str(scene.named(plan.color)[0].color))
    place = ((x / width, y / height),)
    requests[f"What is this, at {x:.0f}, {y:.0f}?"] = Query(
        image, "What is this?", spatial_refs=place, settings=settings
    )
    truths.append(plan.what)
    requests["Short caption:"] = Caption(image, "short", settings)
    left_to_right = sorted(scene.objects, key=lambda item: item.center[0])
    truths.append(short_caption([item.name for item in left_to_right]))
    return requests, truths


def _check_boxes(result: SceneResult, score: Score) -> Check:
    """Compare boxes with the ground truth: one-to-one matching within each class at an IoU of 0.5 or more."""
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
    summary = f"{found} of {objects} found" + (f", {wrong} wrong ({', '.join(extra)})" if wrong else "")
    truth_text = f"missed: {', '.join(missed)}" if missed else "all found"
    return Check(f"Detect {len(set(result.plan.names)) + len(result.plan.absent)} classes", summary, truth_text,
                 not missed and not wrong)  # fmt: skip


def _check_points(result: SceneResult) -> Check:
    """Compare points with the ground truth: each object must have one point in its box, and no point may remain."""
    left = [tuple(box[:2]) for box in result.points.xyxy.tolist()]
    truth = result.scene.named(result.plan.points)
    hits = 0
    for item in truth:
        x0, y0, x1, y1 = item.xyxy
        inside = [point for point in left if x0 <= point[0] <= x1 and y0 <= point[1] <= y1]
        if inside:
            left.remove(inside[0])
            hits += 1
    summary = f"{len(result.points)} point{'s' * (len(result.points) != 1)}, {hits} on target"
    return Check(f"Point at {result.plan.points!r}", summary, str(len(truth)), hits == len(truth) and not left)


def _text_of(result: Result) -> str:
    from moondream_cv.requests import CaptionResult, ErrorResult, QueryResult

    if isinstance(result, ErrorResult):
        raise result.error
    assert isinstance(result, (QueryResult, CaptionResult))
    return (result.answer if isinstance(result, QueryResult) else result.caption).strip()
