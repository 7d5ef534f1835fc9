"""Labels batches of images on a Ray cluster: Ray Data passes them to actors that each have a model.

The batches are those of a run without Ray, so the labels are the same. If an actor or its machine is lost, its batches
run again on other actors.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moondream_cv.errors import MoondreamError
from moondream_cv.labeling.inputs import InputImage
from moondream_cv.labeling.labeler import Labeler, LabelingSettings, read_batch
from moondream_cv.ray_cluster import connected, last_error, plan_workers
from moondream_cv.urls import is_url


class _LabelingActor:
    """One model. While it labels a batch in one thread, another thread reads the images of the next batch."""

    def __init__(self, settings: LabelingSettings) -> None:
        self._labeler = Labeler(settings)
        self._lock = threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Label one batch of images: one row with its number and its images, pickled."""
        images: list[InputImage] = pickle.loads(batch["images"][0])
        pixels = read_batch(images)
        with self._lock:
            records = self._labeler.label(images, pixels)
        lines = pickle.dumps([record.to_line() for record in records])
        return {"number": batch["number"], "lines": np.array([lines], dtype=object)}


def label_on_ray(
    batches: Iterable[tuple[int, Sequence[InputImage]]],
    settings: LabelingSettings,
    address: str,
    *,
    num_workers: int | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """Yield the labels of batches as the actors complete them, in any order.

    Args:
        batches: Numbers and images of the batches. The actors must be able to read the images.
        settings: Model and options. The actors must be able to load the model.
        address: Address of the Ray cluster, see `ray_cluster.connected`.
        num_workers: Number of actors; None starts one per GPU, or one per node of a cluster without GPUs.

    Yields:
        The number of a batch, and one line of `labels.jsonl` per image.

    Raises:
        MoondreamError: The cluster is unreachable or too small, the model cannot be loaded, or a batch has failed.
        ValueError: Ray is not installed, or the device is one GPU of several.
    """
    rows = [{"number": number, "images": _pickled(images)} for number, images in batches]
    if not rows:
        return
    with connected(address, show_logs=False):
        import ray
        from ray.data import ActorPoolStrategy

        # Plan one task per batch
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised
        device = "cpu" if is_url(settings.model) else settings.device  # actors that use a server need no GPU
        workers = plan_workers(num_workers, device)
        actors = ActorPoolStrategy(
            size=workers.count,
            max_concurrent_calls_per_actor=2,  # one thread reads images while another one runs the model
            enable_true_multi_threading=True,
        )
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _LabelingActor,
            fn_constructor_args=(_with_absolute_paths(settings),),
            batch_size=1,
            compute=actors,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        )
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False

        # Run the tasks
        try:
            for row in dataset.iter_rows():
                yield int(row["number"]), pickle.loads(row["lines"])
        except ray.exceptions.RayError as error:
            raise MoondreamError(f"labeling on Ray has failed: {last_error(str(error))}") from error


def _pickled(images: Sequence[InputImage]) -> bytes:
    """Pickle images with absolute paths, because actors have another working directory."""
    return pickle.dumps([replace(image, dataset=Path(os.path.abspath(image.dataset))) for image in images])


def _with_absolute_paths(settings: LabelingSettings) -> LabelingSettings:
    paths = {
        name: os.path.abspath(path)
        for name in ("model", "adapter")
        if (path := getattr(settings, name)) is not None and os.path.exists(path)
    }
    return replace(settings, **paths)
