"""Measure the overhead of labeling next to `Detector` alone.

    python benchmarks/labeling.py

Prints the time of a complete labeling run (labels, dataset and report) divided by the time of `Detector` on the same
files in batches of the same size, with the tiny model. Both run in turn, so that other load on the machine affects
both. The overhead per image is the same with a full-size model, which takes about 100 times as long.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from moondream_cv import Detector, load
from moondream_cv.labeling import label
from moondream_cv.scenes import SHAPES, render_scene

CLASSES = list(SHAPES[:4])
BATCH = 16


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640, help="images per run")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each")
    arguments = parser.parse_args()
    model = load("tiny", device="cpu")
    detector = Detector(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = [folder / "images" / f"{seed:05}.jpg" for seed in range(arguments.images)]
        paths[0].parent.mkdir()
        for seed, path in enumerate(paths):
            Image.fromarray(render_scene(seed, resolution_wh=(640, 480)).image).save(path, quality=92)

        def detect() -> None:
            remaining = iter(paths)
            while batch := list(islice(remaining, BATCH)):
                detector.detect_each(batch, CLASSES)

        labeled = iter(range(10**6))

        def label_all() -> None:
            label(paths[0].parent, CLASSES, folder / f"dataset-{next(labeled)}", model=model, batch=BATCH)

        ratios = []
        for turn in range(arguments.repeat + 1):  # the first is a warm-up
            seconds = [_seconds(call) for call in (detect, label_all)]
            if turn:
                ratios.append(seconds[1] / seconds[0])
                rates = [arguments.images / taken for taken in seconds]
                print(f"detector {rates[0]:.1f} images/s, labeling {rates[1]:.1f} images/s, ratio {ratios[-1]:.3f}")
    print(f"labeling / detector: {statistics.median(ratios):.3f}   must 1.1")


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
