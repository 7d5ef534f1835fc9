"""Roboflow Workflows: what classes, images and blocks cost in the real engine.

    make bench-roboflow

Ratios within one run, medians, with the tiny model. Every run is on frames that were not there before, so that no
encoded image is met again but by the blocks of the same run. The core block for Moondream 2 gets the tiny model too:
`tests/helpers/roboflow_app.py` puts it into Roboflow's own adapter.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from moondream_cv import Detector, load
from moondream_cv.scenes import ICONS, render_scene
from tests.helpers.roboflow_app import MODEL_ID, model_manager, prepare
from tests.helpers.workflows import compile_workflow, step, workflow

CLASSES = list(ICONS[:8])
SIZE = (640, 480)


def frames() -> Iterator[np.ndarray]:
    """[H, W, 3] BGR, each another."""
    for seed in itertools.count():
        yield np.ascontiguousarray(render_scene(seed, resolution_wh=SIZE).image[..., ::-1])


def medians(calls: Sequence[Callable[[list[np.ndarray]], Any]], images: Sequence[int], repeat: int) -> list[float]:
    """Seconds of each call, which take turns: whatever else the machine does meets all of them.

    Args:
        calls: Each takes a list of frames.
        images: How many of them, for each call.
    """
    times: list[list[float]] = [[] for _ in calls]
    source = frames()
    for turn in range(repeat + 1):  # one to warm up
        for call, count, taken in zip(calls, images, times, strict=True):
            batch = list(itertools.islice(source, count))
            start = time.perf_counter()
            call(batch)
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def engine(*steps: dict[str, Any], **init_parameters: Any) -> Callable[[list[np.ndarray]], Any]:
    """A call of the engine with a workflow of these steps."""
    definition = workflow(*steps, outputs=[f"{one['name']}.*" for one in steps])
    made = compile_workflow(definition, **init_parameters)
    return lambda batch: made.run(runtime_parameters={"image": batch})


def core_step(name: str) -> dict[str, Any]:
    """A step with the core block, which takes one class."""
    return {
        "type": "roboflow_core/moondream2@v1",
        "name": name.replace(" ", "_"),
        "images": "$inputs.image",
        "prompt": name,
        "model_version": MODEL_ID,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15, help="runs of each workflow")
    repeat = parser.parse_args().repeat
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        from roboflow_workflows.core_steps.common.entities import StepExecutionMode

        model = load("tiny")
        detector = Detector(model)
        core = {
            "workflows_core.model_manager": model_manager(model),
            "workflows_core.api_key": None,
            "workflows_core.step_execution_mode": StepExecutionMode.LOCAL,
        }
        calls = {
            "one class": engine(step("detect", class_names=CLASSES[:1])),
            "eight classes": engine(step("detect", class_names=CLASSES)),
            "eight blocks": engine(*[step("detect", n, class_names=[n]) for n in CLASSES]),
            "eight core blocks": engine(*[core_step(n) for n in CLASSES], **core),
            "no engine": lambda batch: detector(batch, CLASSES),
            "eight images": engine(step("detect", class_names=CLASSES)),
        }
        images = [8 if name == "eight images" else 1 for name in calls]
        taken = dict(zip(calls, medians(list(calls.values()), images, repeat), strict=True))

    def ratio(what: str, one: str, other: str) -> None:
        print(f"{what:<80} {taken[one] / taken[other]:.2f}")

    ratio("8 classes in one detect block beside 1 class (must: below 2)", "eight classes", "one class")
    ratio("8 classes in one detect block beside 8 core blocks of 1 class each", "eight classes", "eight core blocks")
    ratio(
        "8 detect blocks of 1 class each, which share the encoded image, beside one of 8",
        "eight blocks",
        "eight classes",
    )
    ratio("a detect block in the engine beside a Detector without it", "eight classes", "no engine")
    ratio("a batch of 8 images beside 1 image", "eight images", "eight classes")


if __name__ == "__main__":
    main()
