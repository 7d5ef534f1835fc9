"""Replies on a GPU equal those on a CPU. Run with `pytest -m gpu` on a machine with a CUDA device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moondream_cv import load
from moondream_cv.engine.crops import cut_crops
from moondream_cv.engine.cuda_graphs import GraphPool
from moondream_cv.engine.gpu_preprocessing import cut_crops_on_device
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.scheduler import Limits
from moondream_cv.engine.transfers import HostCopy, integers, upload
from moondream_cv.evaluation.scenes import held_out_scenes
from moondream_cv.model.config import VisionConfig
from moondream_cv.model.padded_linear import PaddedLinear
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


def graphs_of(pool: GraphPool) -> list[torch.cuda.CUDAGraph | None]:
    """Return the graphs of all steps on idle tensors."""
    return [step._graph for buffers in pool._idle for step in buffers.steps.values()]


def without_graphs() -> LocalModel:
    model = random_model(device="cuda")
    model.graph_pool = None
    return model


def test_graphs_are_captured_and_replayed() -> None:
    model, eager = random_model(device="cuda"), without_graphs()
    assert model.graph_pool is not None
    frame = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    for num_classes in (1, 3, 64, 3, 1):
        requests = [Detect(frame, f"class {i}", SHORT) for i in range(num_classes)]
        for request, expected, result in zip(requests, eager.run(requests), model.run(requests), strict=True):
            assert_same(eager, request, expected, result)
    graphs = graphs_of(model.graph_pool)
    assert graphs
    assert None not in graphs
    model.run([Detect(frame, "class 0", SHORT)])
    assert set(graphs_of(model.graph_pool)) == set(graphs)


def test_mixed_batches_with_graphs_equal_those_without() -> None:
    model, eager = random_model(device="cuda"), without_graphs()
    requests = mixed(24)
    for request, expected, result in zip(requests, eager.run(requests), model.run(requests), strict=True):
        assert_same(eager, request, expected, result)


def test_threads_replay_separate_graphs() -> None:
    model = random_model(device="cuda")
    requests = mixed(16)
    expected = model.run(requests)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(model.run, [requests] * 4):
            for request, one, result in zip(requests, expected, results, strict=True):
                assert_same(model, request, one, result)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_in_half_precision_return_finite_results(dtype: str) -> None:
    with load("tiny", device="cuda", dtype=dtype) as model:
        for result in model.run(mixed(16)):
            assert not isinstance(result, ErrorResult), result.error
        assert model.graph_pool is not None
        assert None not in graphs_of(model.graph_pool)


def test_closing_the_model_frees_graphs() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load("tiny", device="cuda")
    model.run(mixed(16))
    model.close()
    assert torch.cuda.memory_allocated() <= before


def test_compiled_model_equals_the_original() -> None:
    with load("tiny", device="cuda", dtype="float32") as model, load("tiny", device="cuda", dtype="float32") as other:
        model.compile()
        assert model.graph_pool is not None
        assert None not in graphs_of(model.graph_pool)
        requests = mixed(16)
        for request, expected, result in zip(requests, other.run(requests), model.run(requests), strict=True):
            assert_same(other, request, expected, result)


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (378, 378), (200, 3000), (2160, 3840), (1, 1)])
def test_crops_equal_those_of_pillow(size: tuple[int, int]) -> None:
    rgb, config = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), VisionConfig()
    pixels, tiling = cut_crops_on_device(upload(rgb, torch.device("cuda")), config)
    expected = cut_crops(rgb, config)
    assert tiling == expected.tiling
    assert np.abs(pixels.cpu().numpy().astype(int) - expected.pixels).max() <= 1
    assert (pixels.cpu().numpy() != expected.pixels).mean() < 1e-4


def test_unchanged_frame_is_not_encoded_again() -> None:
    with load("tiny", device="cuda") as model:
        frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        first = model.encode_image(frame)
        assert isinstance(first.pixels, torch.Tensor)
        assert model.encode_image(frame, previous=first) is first


def test_transfers_do_not_depend_on_later_changes() -> None:
    device, array = torch.device("cuda"), np.zeros((1000, 1000), np.uint8)
    uploaded = upload(array, device)
    array[:] = 1
    assert not uploaded.any()
    numbers = integers([1, 2], device)
    copy = HostCopy(numbers)
    numbers += 1
    assert copy.read() == [1, 2]


def test_patches_are_padded_on_the_device() -> None:
    model, reference = random_model(device="cuda"), random_model()
    assert isinstance(model.network.vision.patch_emb, PaddedLinear)
    assert model.fingerprint() == LocalModel(reference.network.cuda(), reference.tokenizer).fingerprint()
    assert list(model.network.state_dict()) == list(random_model().network.state_dict())
