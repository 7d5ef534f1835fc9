"""Detect small objects in a large image with a `Detector` as the callback of supervision's `InferenceSlicer`.

    python examples/small_objects.py --output small_objects.png

Renders a 2400 x 1600 scene of 48 objects of about 20 pixels, detects them on the whole image and in slices with the
embedded tiny model, and compares both with the ground truth. Use larger slices with Moondream 2, which processes images
of up to about 1176 pixels without downscaling.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import supervision as sv

from moondream_cv import Detector
from moondream_cv.evaluation.matching import Counts, match_boxes
from moondream_cv.scenes import Scene, SceneObject, render_scene
from moondream_cv.scenes.objects import paint, stamp

CLASSES = ["red circle", "blue star", "dog"]
GRID = 10, 6  # columns and rows of the object grid


def render_small_objects(seed: int, resolution_wh: tuple[int, int] = (2400, 1600), num_objects: int = 48) -> Scene:
    """Render objects of 18 to 24 pixels on a plain background.

    Args:
        seed: Random seed.
        resolution_wh: Width and height in pixels.
        num_objects: Number of objects, at most 60.
    """
    rng = np.random.default_rng(seed)
    image = render_scene(seed, resolution_wh=resolution_wh, num_objects=0, style="plain").image.copy()
    room = np.array(resolution_wh) // GRID - 40
    objects = []
    for index, cell in enumerate(rng.permutation(GRID[0] * GRID[1])[:num_objects]):
        name = CLASSES[index % len(CLASSES)]
        patch = paint(name, float(rng.uniform(18, 24)), rng)
        column_row = cell % GRID[0], cell // GRID[0]
        x, y = (column_row * (room + 40) + rng.integers(10, room)).tolist()
        stamp(image, patch, x, y)
        objects.append(SceneObject.from_name(name, (x, y, x + patch.box[2], y + patch.box[3])))
    return Scene(image, tuple(objects))


def compare(detections: sv.Detections, scene: Scene) -> Counts:
    """Return true and false positives over all classes, at a minimum IoU of 0.5."""
    counts = Counts()
    for class_id, name in enumerate(CLASSES):
        true = np.array([item.xyxy for item in scene.named(name)], dtype=np.float32).reshape(-1, 4)
        counts += match_boxes(detections.xyxy[detections.class_id == class_id], true)[0]
    return counts


def annotate(frame: np.ndarray, detections: sv.Detections) -> np.ndarray:
    """Draw padded boxes, so that their lines do not cover the small objects."""
    palette = sv.ColorPalette.from_hex(["#9b1c1c", "#1d3fbb", "#7a4a12"])  # dark enough for white text
    drawn = detections[:]
    drawn.xyxy = sv.pad_boxes(drawn.xyxy, px=5)
    annotated = sv.BoxAnnotator(palette, thickness=2).annotate(frame.copy(), drawn)
    labels = [f"{name} {score:.2f}" for name, score in zip(drawn.data["class_name"], drawn.confidence, strict=True)]
    label_annotator = sv.LabelAnnotator(palette, text_scale=0.6, text_padding=4, smart_position=True)
    return label_annotator.annotate(annotated, drawn, labels)


def main() -> None:
    """Parse the arguments, detect on the whole image and in slices, and save the annotated image."""
    parser = argparse.ArgumentParser(description="Detect small objects in a large image, as a whole and in slices.")
    parser.add_argument("--seed", type=int, default=5, help="seed of the scene (default: 5)")
    parser.add_argument(
        "--output", type=Path, default=Path("small_objects.png"), help="annotated image (default: small_objects.png)"
    )
    arguments = parser.parse_args()

    # Render the scene
    scene = render_small_objects(arguments.seed)
    frame = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)

    # Detect
    with Detector("tiny") as detector:
        detect = partial(detector, classes=CLASSES)
        slicer = sv.InferenceSlicer(
            detect,
            slice_wh=256,
            overlap_wh=48,  # larger than an object, so that each object is completely inside a slice
            overlap_metric=sv.OverlapMetric.IOS,  # removes objects that are cut off at the edge of a slice
            batch_size=8,  # a detector accepts a list; with a remote model, use thread_workers instead
        )
        for title, method in ("whole image", detect), ("slices", slicer):
            start = time.perf_counter()
            detections = method(frame)
            seconds, counts = time.perf_counter() - start, compare(detections, scene)
            print(
                f"{title:12} {counts.true_positives} of {len(scene.objects)} found, "
                f"{counts.false_positives} wrong, {seconds:.1f} s"
            )

    # Save the annotated image
    cv2.imwrite(str(arguments.output), annotate(frame, detections))
    print(f"Saved {arguments.output}")


if __name__ == "__main__":
    main()
