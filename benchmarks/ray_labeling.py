"""Measure labeling on a local Ray with two one-core actors in relation to one.

    .venv-integrations/bin/python benchmarks/ray_labeling.py

Prints the images per second of both, and their ratio. The time starts when every actor has labeled a batch, so that
loading the model does not count. Both run in turn, and the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from moondream_cv.labeling.inputs import InputImage
from moondream_cv.labeling.labeler import LabelingSettings
from moondream_cv.labeling.prompts import ClassPrompts
from moondream_cv.labeling.ray_runner import label_on_ray
from moondream_cv.ray_cluster import ENVIRONMENT
from moondream_cv.scenes import SHAPES, render_scene

SETTINGS = LabelingSettings(tuple(ClassPrompts(name=name) for name in SHAPES[:4]), model="tiny", device="cpu")
BATCH = 16
WARM_UP = 6  # batches, of several actors


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=480, help="images per run")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to the cores of an actor
    with tempfile.TemporaryDirectory() as folder:
        images = []
        for seed in range(arguments.images):
            path = Path(folder) / f"{seed:05}.jpg"
            Image.fromarray(render_scene(seed, resolution_wh=(640, 480)).image).save(path, quality=92)
            images.append(InputImage(path.name, str(path)))
        ratios = []
        for _ in range(arguments.repeat):
            rates = [images_per_second(images, num_actors) for num_actors in (1, 2)]
            ratios.append(rates[1] / rates[0])
            print(f"1 actor {rates[0]:.1f} images/s, 2 actors {rates[1]:.1f} images/s, ratio {ratios[-1]:.2f}")
    print(f"2 actors / 1 actor: {statistics.median(ratios):.2f}   must 1.5")


def images_per_second(images: Sequence[InputImage], num_actors: int) -> float:
    """Return the rate of actors that each have one core.

    Args:
        images: Images to label.
        num_actors: Number of actors.
    """
    ray.init("local", num_cpus=num_actors, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        batches = [(start, images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        num_done, started = 0, 0.0
        for number, _ in enumerate(label_on_ray(batches, SETTINGS, "local", num_workers=num_actors)):
            if number == WARM_UP:
                started = time.perf_counter()
            num_done += number > WARM_UP
        return num_done * BATCH / (time.perf_counter() - started)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
