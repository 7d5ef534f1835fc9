"""Replies on a GPU equal those on a CPU. Run with `pytest -m gpu` on a machine with a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moondream_cv import load
from moondream_cv.engine.scheduler import Limits
from moondream_cv.evaluation.scenes import held_out_scenes
from moondream_cv.requests import Caption, Detect, DetectResult, ErrorResult, Point, Query, Request, Settings
from tests.helpers.batch_invariance import assert_same
from tests.helpers.models import random_model

SHORT = Settings(temperature=0, max_tokens=8, max_objects=3)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_float32_boxes_on_a_gpu_equal_those_on_a_cpu() -> None:
    with load("tiny", device="cpu") as here, load("tiny", device="cuda", dtype="float32") as there:
        agreed = total = 0
        for scene in held_out_scenes("own", 20):
            frame = np.ascontiguousarray(scene.image[..., ::-1])
            requests = [Detect(frame, name, Settings()) for name in {o.name for o in scene.objects}]
            for mine, theirs in zip(here.run(requests), there.run(requests), strict=True):
                assert isinstance(mine, DetectResult)
                assert isinstance(theirs, DetectResult)
                total += 1
                agreed += [(o.x_min, o.y_max) for o in mine.objects] == [(o.x_min, o.y_max) for o in theirs.objects]
        assert agreed / total > 0.97  # another order of summation may move a bin


def mixed(count: int) -> list[Request]:
    requests: list[Request] = []
    for seed in range(count // 4):
        frame = np.random.default_rng(seed).integers(0, 256, (240, 320, 3), np.uint8)
        requests += [
            Detect(frame, "dog", SHORT),
            Point(frame, "red circle", SHORT),
            Caption(frame, "short", SHORT),
            Query(frame, "How many dogs are there?", settings=Settings(max_tokens=8, seed=seed)),
        ]
    return requests


def test_replies_on_a_gpu_do_not_depend_on_the_batch() -> None:
    model = random_model(device="cuda")
    requests = mixed(24)
    for request, together in zip(requests, model.run(requests), strict=True):
        assert_same(model, request, model.run([request])[0], together)


def test_full_gpu_lowers_limits_and_keeps_results() -> None:
    """With less memory than the batch needs, the replies stay the same."""
    with load("tiny", device="cuda", dtype="float32") as model:
        requests = mixed(64)
        model.run(requests[:4])
        torch.cuda.empty_cache()
        base = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        before = model.run(requests)
        peak = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        try:
            torch.cuda.set_per_process_memory_fraction((base + (peak - base) * 0.5) / total)
            after = model.run(requests)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert model.limits != Limits()
        for request, expected, result in zip(requests, before, after, strict=True):
            assert not isinstance(result, ErrorResult), result.error
            assert_same(model, request, expected, result)


def test_close_frees_gpu_memory() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load("tiny", device="cuda")
    model.detect(np.zeros((100, 100, 3), np.uint8), "dog")
    model.close()
    assert torch.cuda.memory_allocated() <= before
