"""Datasets of rendered scenes in the COCO, YOLO and VOC layouts, written by supervision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import supervision as sv

from moondream_cv.scenes import Scene, render_scene
from moondream_cv.scenes.sampling import sample_names
from moondream_cv.scenes.world import COLORED_SHAPES, ICONS

LAYOUTS = ("coco", "yolo", "voc")
CLASSES = ("arrow", *COLORED_SHAPES, *ICONS)  # of all splits


def arrow_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Render scenes with 0 to 3 arrows, a shape that the tiny model was not trained on, among 1 to 4 other objects."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        names = ["arrow"] * int(rng.integers(0, 4)) + sample_names(rng, int(rng.integers(1, 5)))
        rng.shuffle(names)
        try:
            scenes.append(render_scene(rng, names=names))
        except ValueError:  # the objects do not fit into the frame
            continue
    return scenes


def label_of(scene: Scene, index: int) -> str:
    """Return the class of an object: its full name, and "arrow" for arrows of any color."""
    found = scene.objects[index]
    return "arrow" if found.shape == "arrow" else found.name


def write_dataset(folder: Path, scenes: Sequence[Scene], layout: str, split: str = "train") -> Path:
    """Write scenes with their boxes as a split, with the folders that Roboflow exports have; return the folder."""
    images, labels = folder / split, folder / split
    if layout == "yolo":
        images, labels = folder / split / "images", folder / split / "labels"
    images.mkdir(parents=True)
    annotations = {}
    for number, scene in enumerate(scenes):
        path = str(images / f"{split}-{number:03}.png")
        cv2.imwrite(path, scene.image[..., ::-1])
        annotations[path] = sv.Detections.empty()
        if scene.objects:
            ids = [CLASSES.index(label_of(scene, i)) for i in range(len(scene.objects))]
            boxes = np.array([item.xyxy for item in scene.objects], np.float32)
            annotations[path] = sv.Detections(boxes, class_id=np.array(ids))
    dataset = sv.DetectionDataset(list(CLASSES), list(annotations), annotations)
    if layout == "coco":
        dataset.as_coco(annotations_path=str(labels / "_annotations.coco.json"))
    elif layout == "yolo":
        dataset.as_yolo(annotations_directory_path=str(labels), data_yaml_path=str(folder / "data.yaml"))
    else:
        dataset.as_pascal_voc(annotations_directory_path=str(labels))
    return folder
