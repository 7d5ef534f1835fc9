"""Detect small objects in a large image with a `Detector` as the callback of supervision's `InferenceSlicer`.

    python examples/small_objects.py --output small_objects.png

Compares both on a rendered scene of 48 objects of about 20 pixels. docs/prompts.md has advice on the size of slices.
"""

import argparse
import time
from functools import partial

import numpy as np
import supervision as sv
from PIL import Image

from moondream_cv import Detector
from moondream_cv.evaluation.matching import Counts, match_boxes
from moondream_cv.scenes import Scene, SceneObject, render_scene
from moondream_cv.scenes.objects import paint, stamp

CLASSES = ["red circle", "blue star", "dog"]


def render_small_objects(seed: int) -> Scene:
    """Render 48 objects of 18 to 24 pixels on a plain background of 2400 x 1600 pixels."""
    rng, objects = np.random.default_rng(seed), []
    image = render_scene(seed, resolution_wh=(2400, 1600), num_objects=0, style="plain").image.copy()
    for index, cell in enumerate(rng.permutation(60)[:48].tolist()):  # 60 cells of 240 x 266 pixels
        patch = paint(CLASSES[index % 3], float(rng.uniform(18, 24)), rng)
        x, y = cell % 10 * 240 + int(rng.integers(10, 200)), cell // 10 * 266 + int(rng.integers(10, 226))
        stamp(image, patch, x, y)
        objects.append(SceneObject.from_name(CLASSES[index % 3], (x, y, x + patch.box[2], y + patch.box[3])))
    return Scene(image, tuple(objects))


def compare(detections: sv.Detections, scene: Scene) -> Counts:
    """Return true and false positives over all classes, at a minimum IoU of 0.5."""
    true = [np.array([item.xyxy for item in scene.named(name)], np.float32) for name in CLASSES]
    return sum((match_boxes(detections.xyxy[detections.class_id == i], true[i])[0] for i in range(3)), Counts())


def main() -> None:
    """Parse the arguments, detect on the whole image and in slices, and save the annotated image."""
    parser = argparse.ArgumentParser(description="Detect small objects in a large image, as a whole and in slices.")
    parser.add_argument("--output", default="small_objects.png", help="annotated image (default: small_objects.png)")
    args, scene = parser.parse_args(), render_small_objects(5)
    image, detect = Image.fromarray(scene.image), partial(Detector("tiny"), classes=CLASSES)
    slicer = sv.InferenceSlicer(detect, 256, overlap_wh=48, overlap_metric=sv.OverlapMetric.IOS, batch_size=8)
    for title, method in ("whole image", detect), ("slices", slicer):
        start = time.perf_counter()
        detections = method(image)
        seconds, counts = time.perf_counter() - start, compare(detections, scene)
        print(f"{title:12} {counts.true_positives} of 48 found, {counts.false_positives} wrong, {seconds:.1f} s")
    detections.xyxy = sv.pad_boxes(detections.xyxy, px=5)  # lines do not cover the small objects
    sv.LabelAnnotator().annotate(sv.BoxAnnotator().annotate(image, detections), detections).save(args.output)


if __name__ == "__main__":
    main()
