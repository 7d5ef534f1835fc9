"""Draw the pictures of docs/how-to and docs/explanation, with the tiny model and rendered scenes.

    python scripts/make_howto_images.py                  # all pictures, about three minutes of CPU time
    python scripts/make_howto_images.py keyframes.png    # one picture

Repeated runs draw the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import cv2
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import supervision as sv
from docs_images import BLUE, GRAY, GREEN, ORANGE, draw_selected
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from moondream_cv import Detect, Detector, load
from moondream_cv.drawing import annotate
from moondream_cv.engine.confidence import COORDINATE_REACH
from moondream_cv.evaluation.confidence import SkillDetections, collect_detections, hard_scenes
from moondream_cv.evaluation.matching import match_boxes
from moondream_cv.evaluation.metrics import calibration_error
from moondream_cv.evaluation.rescoring import RescoredObject, rescore
from moondream_cv.evaluation.tracks import PerfectDetector, numbered_frames, tracking_clip, truth_of
from moondream_cv.scenes import Scene, SceneObject, render_scene
from moondream_cv.scenes.objects import paint, stamp
from moondream_cv.video import OnlineTracker, track_streams
from moondream_cv.video.sources.frame import Frame

CALIBRATION_SCENES = 1000
SMALL_CLASSES = ("red circle", "blue star", "dog")
SMALL_SCENE_WH = (1920, 1280)
SMALL_REGION = (430, 320, 1390, 960)  # left, top, right and bottom of the part that is shown
MANY_CLASSES = (
    *("dog", "cat", "bus", "guitar", "pizza", "umbrella", "clock", "rocket"),
    *("red circle", "blue star", "green heart", "purple ring"),
)
MASK_CLASSES = ("bus", "cat", "dog")
MASK_MARGIN = 0.05  # fraction of the box size; for GrabCut, all pixels outside the box are background
FPS, EVERY = 30.0, 15
KEYFRAME_FRAMES, KEYFRAME_TRACK = 150, 5


# --- Small objects and many classes -----------------------------------------------------------------------------------


def draw_small_objects() -> Figure:
    """Return a part of a large scene: detections on the whole image, and in slices."""
    scene = render_small_objects()
    frame = np.ascontiguousarray(scene.image[..., ::-1])
    with Detector("tiny") as detector:
        detect = partial(detector, classes=SMALL_CLASSES)
        slicer = sv.InferenceSlicer(
            detect, slice_wh=256, overlap_wh=48, overlap_metric=sv.OverlapMetric.IOS, batch_size=8
        )
        results = {"Whole image": detect(frame), "Slices of 256 pixels": slicer(frame)}

    # Draw the same part of both results
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.1), layout="constrained")
    for axis, (title, detections) in zip(axes, results.items(), strict=True):
        found, wrong = count_matches(detections, scene)
        axis.imshow(scene.image)
        axis.set(xlim=SMALL_REGION[::2], ylim=SMALL_REGION[3:0:-2], xticks=[], yticks=[])
        axis.set_title(f"{title}: {found} of {len(scene.objects)} found, {wrong} wrong")
        for left, top, right, bottom in detections.xyxy.tolist():
            corner, padding = (left - 5, top - 5), 10
            axis.add_patch(plt.Rectangle(corner, right - left + padding, bottom - top + padding, fill=False, ec=BLUE))
    return figure


def render_small_objects(seed: int = 5, num_objects: int = 40) -> Scene:
    """Return a large plain scene with objects of about 20 pixels."""
    rng = np.random.default_rng(seed)
    image = render_scene(seed, resolution_wh=SMALL_SCENE_WH, num_objects=0, style="plain").image.copy()
    columns, rows = 9, 6
    cell = np.array(SMALL_SCENE_WH) // (columns, rows)
    objects = []
    for index, place in enumerate(rng.permutation(columns * rows)[:num_objects]):
        name = SMALL_CLASSES[index % len(SMALL_CLASSES)]
        patch = paint(name, float(rng.uniform(18, 24)), rng)
        x, y = ((place % columns, place // columns) * cell + rng.integers(10, cell - 40)).tolist()
        stamp(image, patch, x, y)
        objects.append(SceneObject.from_name(name, (x, y, x + patch.box[2], y + patch.box[3])))
    return Scene(image, tuple(objects))


def count_matches(detections: sv.Detections, scene: Scene) -> tuple[int, int]:
    """Return the numbers of found objects and of wrong boxes, over all classes."""
    found = wrong = 0
    for class_id, name in enumerate(SMALL_CLASSES):
        true = np.array([item.xyxy for item in scene.named(name)], np.float32).reshape(-1, 4)
        counts = match_boxes(detections.xyxy[detections.class_id == class_id], true)[0]
        found, wrong = found + counts.true_positives, wrong + counts.false_positives
    return found, wrong


def draw_many_classes() -> Image.Image:
    """Return the detections of twelve classes on one scene."""
    scene = render_scene(15, resolution_wh=(960, 600), names=MANY_CLASSES)
    with Detector("tiny") as detector:
        detections = detector(np.ascontiguousarray(scene.image[..., ::-1]), MANY_CLASSES)
    return annotate(Image.fromarray(scene.image), detections)


# --- Masks ------------------------------------------------------------------------------------------------------------


def draw_masks() -> Image.Image:
    """Return the detections and masks of three objects."""
    scene = render_scene(5, resolution_wh=(630, 420), names=MASK_CLASSES)
    with Detector("tiny", device="cpu", masks=grab_cut) as detector:
        found = detector(Image.fromarray(scene.image), MASK_CLASSES)
    return annotate(Image.fromarray(scene.image), found)


def grab_cut(image: npt.NDArray[np.uint8], xyxy: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return the masks of the objects in boxes [n, 4] of an RGB image, [n, H, W]."""
    masks = np.zeros((len(xyxy), *image.shape[:2]), dtype=np.bool_)
    for mask, box in zip(masks, xyxy, strict=True):
        margin = MASK_MARGIN * (box[2:] - box[:2])
        left, top = np.maximum(box[:2] - margin, 1).astype(int).tolist()
        right, bottom = (box[2:] + margin).astype(int).tolist()
        labels = np.zeros(image.shape[:2], np.uint8)
        cv2.setRNGSeed(0)
        cv2.grabCut(
            image, labels, (left, top, right - left, bottom - top), None, None, 5, cv2.GC_INIT_WITH_RECT
        )  # fmt: skip
        mask[:] = labels % 2 == 1  # cv2.GC_FGD or cv2.GC_PR_FGD
    return masks


# --- Confidence -------------------------------------------------------------------------------------------------------


def draw_calibration() -> Figure:
    """Return a precision-recall curve, and reliability before and after a calibration."""
    with load("tiny", device="cpu") as model:
        found = collect_detections(model, hard_scenes("held out", CALIBRATION_SCENES))["detect"]
        calibration = model.calibration
    assert calibration is not None
    scores, correct = found.scores(), found.correct
    calibrated = np.array([calibration.apply("detect", score) for score in scores])

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    draw_precision_recall(axes[0], found)
    draw_reliability(axes[1], scores, correct, "Score of the model")
    draw_reliability(axes[2], calibrated, correct, "Confidence after calibration")
    return figure


def draw_precision_recall(axis: Axes, detections: SkillDetections) -> None:
    """Draw precision and recall at every threshold, and mark the threshold with the highest F1."""
    order = np.argsort(-detections.scores(), kind="stable")
    hits = detections.correct[order].cumsum()
    total = sum(one.total for one in detections.names.values())
    precision, recall = hits / np.arange(1, len(order) + 1), hits / total
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f1.argmax())
    threshold = detections.scores()[order][best]
    print(f"best threshold {threshold:.2f}: precision {precision[best]:.2f}, recall {recall[best]:.2f}")
    axis.plot(recall, precision, color=BLUE)
    axis.plot(recall[best], precision[best], "o", color=ORANGE)
    axis.annotate(
        f"threshold {threshold:.2f}\nF1 {f1[best]:.2f}",
        (recall[best], precision[best]),
        xytext=(-95, -35),
        textcoords="offset points",
    )
    axis.set(xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02), title="Choice of a threshold")


def draw_reliability(
    axis: Axes, confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], title: str, parts: int = 15
) -> None:
    """Draw the share of correct boxes against the mean confidence, for parts with equal numbers of boxes."""
    ordered = np.array_split(np.argsort(confidence, kind="stable"), parts)
    axis.plot([0, 1], [0, 1], "--", color=GRAY, lw=1)
    axis.plot(
        [confidence[part].mean() for part in ordered], [correct[part].mean() for part in ordered], "o-", color=BLUE
    )
    error = calibration_error(confidence, correct)
    axis.text(0.05, 0.92, f"calibration error {error:.3f}", transform=axis.transAxes)
    axis.set(xlabel="Confidence", ylabel="Share of correct boxes", xlim=(0, 1), ylim=(0, 1.02), title=title)


def draw_confidence() -> Figure:
    """Return two boxes of a scene and the distributions of their x coordinates."""
    scene = render_scene(11, resolution_wh=(480, 360), names=["red circle", "red circle", "dog", "red circle"])
    with load("tiny", device="cpu") as model:
        image = model.encode_image(np.ascontiguousarray(scene.image[..., ::-1]))
        request = Detect(image, "red circle")
        (result,) = model.run([request])
        objects = rescore(model, image, request, result)  # type: ignore[arg-type]

    # Draw the boxes and the distributions in the same colors
    colors = [BLUE, GREEN, ORANGE][: len(objects)]
    figure, axes = plt.subplots(
        1, 1 + len(objects), figsize=(11, 2.9), layout="constrained", width_ratios=[1.45, 1, 1, 1]
    )
    height, width = scene.image.shape[:2]
    axes[0].imshow(scene.image)
    axes[0].set(xticks=[], yticks=[], title='"red circle"')
    for item, color in zip(objects, colors, strict=True):
        x, y, w, h = item.box
        corner = ((x - w / 2) * width, (y - h / 2) * height)
        axes[0].add_patch(plt.Rectangle(corner, w * width, h * height, fill=False, ec=color, lw=2))
    for axis, item, color in zip(axes[1:], objects, colors, strict=True):
        draw_distribution(axis, item, color)
    axes[1].set_ylabel("Probability per bin of x")
    return figure


def draw_distribution(axis: Axes, item: RescoredObject, color: str) -> None:
    """Draw the distribution of x around its peak, and the bins that count toward the confidence."""
    probabilities = item.logits[0].float().softmax(-1).numpy()
    peak = int(probabilities.argmax())
    bins = np.arange(max(0, peak - 60), min(len(probabilities), peak + 61))
    near = np.abs(bins - peak) <= COORDINATE_REACH
    axis.fill_between(bins, probabilities[bins], color=GRAY, alpha=0.25, lw=0)
    axis.fill_between(bins[near], probabilities[bins[near]], color=color, alpha=0.45, lw=0)
    axis.plot(bins, probabilities[bins], color=color, lw=1.2)
    mass = probabilities[max(0, peak - COORDINATE_REACH) : peak + COORDINATE_REACH + 1].sum()
    text = f"continue {item.continue_probability:.2f}\nmass of x {mass:.2f}\nconfidence {item.confidence:.2f}"
    axis.text(0.02, 0.98, text, transform=axis.transAxes, va="top")
    axis.set(xlabel="Bin of x (of 1,024)", ylim=(0, probabilities[bins].max() * 1.6))


# --- Keyframes --------------------------------------------------------------------------------------------------------


def draw_keyframes() -> Figure:
    """Return the position of an object over time: keyframes, interpolated and predicted boxes."""
    clip = tracking_clip(5)
    truth = truth_of(clip)[:KEYFRAME_FRAMES]
    size, names = clip.resolution_wh, clip.class_names
    offline = [
        tracked.detections
        for tracked in track_streams(
            [numbered_frames(len(truth), size)], names, model=PerfectDetector(truth), every=EVERY
        )
    ]
    online = list(predicted(truth, size, names))

    # Follow an object that turns
    true = positions(KEYFRAME_TRACK, truth)
    figure, axes = plt.subplots(2, 1, figsize=(9, 5), layout="constrained", sharex=True, sharey=True)
    rows = (("Files: interpolated between keyframes", offline), ("Live: predicted after keyframes", online))
    for axis, (title, detections) in zip(axes, rows, strict=True):
        follow = np.array(
            [nearest(found, box) for found, box in zip(detections, boxes_of(KEYFRAME_TRACK, truth), strict=True)]
        )
        axis.plot(true[:, 0], true[:, 1], color=GRAY, lw=4, alpha=0.5, label="true position")
        axis.plot(np.arange(len(follow)), follow, color=BLUE, lw=1.5, label="tracked box")
        keyframes = np.arange(0, len(follow), EVERY)
        axis.plot(keyframes, follow[keyframes], "o", color=ORANGE, ms=5, label="keyframe")
        axis.set(title=title, ylabel="Center x (pixels)")
    axes[0].legend(loc="best", ncols=3)
    axes[1].set_xlabel("Frame")
    return figure


def predicted(
    truth: Sequence[Sequence[object]], size: tuple[int, int], names: Sequence[str]
) -> Iterator[sv.Detections]:
    """Yield the boxes of an `OnlineTracker` with a detector that takes no time."""
    tracker, detector = OnlineTracker(classes=names), PerfectDetector(truth)  # type: ignore[arg-type]
    for index, image in enumerate(numbered_frames(len(truth), size)):
        found = detector(image, names) if index % EVERY == 0 else None
        interval = EVERY / FPS
        yield tracker.step_frame(
            Frame(image, index, index / FPS), found, unknown_interval=interval, min_interval=interval
        )


def boxes_of(track: int, truth: Sequence[Sequence[object]]) -> list[tuple[float, ...] | None]:
    """Return the true box of a track on each frame; None if it is not visible."""
    return [next((o.xyxy for o in objects if o.track_id == track), None) for objects in truth]  # type: ignore[attr-defined]


def positions(track: int, truth: Sequence[Sequence[object]]) -> npt.NDArray[np.float64]:
    """Return frame and center x of a track on each frame on which it is visible, [N, 2]."""
    boxes = enumerate(boxes_of(track, truth))
    return np.array([(index, (box[0] + box[2]) / 2) for index, box in boxes if box is not None])


def nearest(found: sv.Detections, box: tuple[float, ...] | None) -> float:
    """Return the center x of the detection that is nearest to a box, or NaN if none is within 60 pixels."""
    if box is None or not len(found):
        return float("nan")
    center = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    centers = found.get_anchors_coordinates(sv.Position.CENTER)
    distance = np.linalg.norm(centers - center, axis=1)
    best = int(distance.argmin())
    return float(centers[best, 0]) if distance[best] < 60 else float("nan")


PICTURES: dict[str, Callable[[], Figure | Image.Image]] = {
    "small-objects.png": draw_small_objects,
    "many-classes.jpg": draw_many_classes,
    "masks.png": draw_masks,
    "calibration.png": draw_calibration,
    "confidence.png": draw_confidence,
    "keyframes.png": draw_keyframes,
}


def main() -> None:
    """Draw the pictures that the arguments name, or all."""
    draw_selected(PICTURES)


if __name__ == "__main__":
    main()
