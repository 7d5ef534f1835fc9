"""Measure the blocks in Roboflow's workflows engine: number of classes, images and blocks.

    make bench-roboflow

Prints ratios of medians within one run, with the tiny model. Every run uses new frames, so that encoded images are
shared within a run only. Roboflow's core block for Moondream 2 runs the tiny model as well, through the adapter of
`tests/helpers/roboflow_app.py`.
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
    """Yield different BGR frames, [H, W, 3]."""
    for seed in itertools.count():
        yield np.ascontiguousarray(render_scene(seed, resolution_wh=SIZE).image[..., ::-1])


def medians(calls: Sequence[Callable[[list[np.ndarray]], Any]], images: Sequence[int], repeat: int) -> list[float]:
    """Return the median time of each function in seconds.

    The functions are called in turn, so that other load on the machine affects all of them.

    Args:
        calls: Functions of a list of frames.
        images: Number of frames for each function.
        repeat: Number of timed calls of each function.
    """
    times: list[list[float]] = [[] for _ in calls]
    source = frames()
    for turn in range(repeat + 1):  # the first is a warm-up
        for call, count, taken in zip(calls, images, times, strict=True):
            batch = list(itertools.islice(source, count))
            start = time.perf_counter()
            call(batch)
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def engine(*steps: dict[str, Any], **init_parameters: Any) -> Callable[[list[np.ndarray]], Any]:
    """Return a function that runs a workflow of the given steps on a list of frames."""
    definition = workflow(*steps, outputs=[f"{one['name']}.*" for one in steps])
    compiled = compile_workflow(definition, **init_parameters)
    return lambda batch: compiled.run(runtime_parameters={"image": batch})


def core_step(name: str) -> dict[str, Any]:
    """Return a step with Roboflow's core block, which accepts one class."""
    return {
        "type": "roboflow_core/moondream2@v1",
        "name": name.replace(" ", "_"),
        "images": "$inputs.image",
        "prompt": name,
        "model_version": MODEL_ID,
    }


def main() -> None:
    """Parse the arguments, run the measurements and print the ratios."""
    # Compile the workflows
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15, help="runs of each workflow (default: 15)")
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

        # Measure them
        images = [8 if name == "eight images" else 1 for name in calls]
        taken = dict(zip(calls, medians(list(calls.values()), images, repeat), strict=True))

    # Print the ratios
    def print_ratio(name: str, numerator: str, denominator: str) -> None:
        print(f"{name:<80} {taken[numerator] / taken[denominator]:.2f}")

    print_ratio("one detect block with 8 classes / 1 class (target: below 2)", "eight classes", "one class")
    print_ratio("one detect block with 8 classes / 8 core blocks with 1 class", "eight classes", "eight core blocks")
    print_ratio("8 detect blocks with 1 class / one block with 8 classes", "eight blocks", "eight classes")
    print_ratio("a detect block in the engine / a Detector", "eight classes", "no engine")
    print_ratio("a batch of 8 images / 1 image", "eight images", "eight classes")


if __name__ == "__main__":
    main()
