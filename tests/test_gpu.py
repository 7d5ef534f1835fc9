"""The same answers on a GPU. Run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moondream_cv import Detect, Settings, load
from moondream_cv.evaluation.scenes import held_out_scenes
from moondream_cv.requests import DetectResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_float32_boxes_are_those_of_the_cpu() -> None:
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


def test_closing_frees_the_memory() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load("tiny", device="cuda")
    model.detect(np.zeros((100, 100, 3), np.uint8), "dog")
    model.close()
    assert torch.cuda.memory_allocated() <= before
