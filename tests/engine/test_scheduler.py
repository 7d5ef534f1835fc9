"""The scheduler: complete and unmixed results, errors of single requests, and recovery from out of memory.

Run with `pytest tests/engine/test_scheduler.py`.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moondream_cv import load
from moondream_cv.engine.admission import ADMISSION_INTERVAL
from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.kv_cache import ImagePrefix, PrefixSharedKVCache
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.scheduler import Limits, Scheduler
from moondream_cv.engine.sequence_state import Job
from moondream_cv.errors import CheckpointError, ImageError, MoondreamError, RequestCancelled, UnsupportedSkill
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Chat,
    Detect,
    DetectResult,
    ErrorResult,
    Gaze,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
    Settings,
    Turn,
)
from tests.helpers.batch_invariance import assert_same
from tests.helpers.models import random_model

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "mha"
SHORT = Settings(temperature=0, max_tokens=6, max_objects=2)
SAMPLED = Settings(temperature=1.5, top_p=0.95, max_tokens=10, seed=5)


@pytest.fixture
def model() -> LocalModel:
    """Return a new model for each test, because running out of memory changes its limits."""
    return random_model()


def noise(seed: int, width: int = 320, height: int = 240) -> np.ndarray:
    """Return [height, width, 3] BGR noise of large squares."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return np.kron(small, np.ones((20, 20, 1), np.uint8))


FIRST, SECOND, SMALL = noise(1), noise(2, 500, 300), noise(3, 100, 80)


def mixed(first: Any = FIRST, second: Any = SECOND) -> list[Request]:
    """Return requests of all skills and several lengths, with and without image, sampling and reasoning."""
    return [
        Detect(first, "dog", dataclasses.replace(SHORT, max_objects=5)),
        Point(second, "cat", SHORT),
        Query(first, "What?", settings=SHORT),
        Query(second, "What?", reasoning=True, settings=SAMPLED),
        Caption(second, "short", SAMPLED),
        Gaze(first, (0.4, 0.6), force=True),
        Query(None, "Why?", settings=SAMPLED),
        Query(first, "Which?", spatial_refs=((0.1, 0.2, 0.5, 0.6),), settings=SHORT),
        Caption(first, "long", dataclasses.replace(SHORT, max_tokens=2)),
        Chat((Turn("What?", "No.", (first,)), Turn("Why?")), settings=SHORT),
    ]


def finish(scheduler: Scheduler, at_most: int = 1000) -> None:
    for _ in range(at_most):
        if not scheduler.step():
            return
    pytest.fail(f"not done after {at_most} steps")


def alone(model: LocalModel, request: Request) -> Result:
    return model.run([request])[0]


def assert_alone(model: LocalModel, jobs: Sequence[Job]) -> None:
    """Check that each result equals that of the request alone."""
    for job in jobs:
        assert job.result is not None
        assert not isinstance(job.result, ErrorResult), job.result
        assert_same(model, job.request, alone(model, job.request), job.result)


def nan_image(encoded: EncodedImage) -> EncodedImage:
    """Return an encoded image for which the model computes only NaN."""
    layers = tuple((k * torch.nan, v * torch.nan) for k, v in encoded.prefix.layers)
    return dataclasses.replace(encoded, prefix=ImagePrefix(layers))


# --- Batch invariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cancelled", "failed", "cut short", "everything"])
def test_early_ends_do_not_change_other_results(model: LocalModel, what: str) -> None:
    scheduler = model.scheduler()
    kept = [scheduler.submit(request) for request in mixed()]
    go: list[Job] = []
    if what in ("cancelled", "everything"):
        go += [scheduler.submit(dataclasses.replace(r, settings=Settings(seed=1))) for r in mixed()]
    fail: list[Job] = []
    if what in ("failed", "everything"):
        broken = nan_image(model.encode_image(SMALL))
        fail = [
            scheduler.submit(request) for request in (Detect(broken, "dog", SHORT), Caption(broken, "short", SHORT))
        ]
    if what in ("cut short", "everything"):
        ends = dataclasses.replace(SAMPLED, max_tokens=3)
        kept += [scheduler.submit(r) for r in (Query(FIRST, "What?", settings=ends), Caption(SECOND, "short", ends))]
    for _ in range(4):
        scheduler.step()
    assert not any(job.done for job in kept[:5])  # still running
    for job in go:
        scheduler.cancel(job)
    finish(scheduler)
    assert_alone(model, kept)
    assert all(isinstance(job.result, ErrorResult) for job in fail)
    for job in go:
        if job.request.skill in ("query", "caption"):
            assert isinstance(job.result, ErrorResult)
            assert isinstance(job.result.error, RequestCancelled)


# --- Interface of the scheduler -------------------------------------------------------------------------------------


def test_step_without_requests_returns_false(model: LocalModel) -> None:
    scheduler = model.scheduler()
    assert not scheduler.step()
    assert scheduler.results() == []
    job = scheduler.submit(Caption(FIRST, "short", SHORT))
    assert (job.done, job.sequence, job.take()) == (False, None, [])
    finish(scheduler)
    assert not scheduler.step()
    assert job.done


def test_taken_pieces_come_one_by_one_and_equal_the_result(model: LocalModel) -> None:
    scheduler = model.scheduler()
    long = dataclasses.replace(SHORT, max_objects=6)
    requests = [*mixed(), Detect(SECOND, "dog", long), Point(FIRST, "dog", long)]
    jobs = [scheduler.submit(request) for request in requests]
    pieces: list[list[Any]] = [[] for _ in jobs]
    num_early = [0] * len(jobs)
    is_running = True
    while is_running:
        is_running = scheduler.step()
        for i, job in enumerate(jobs):
            new = job.take()
            assert len(new) <= (1 if not job.done else 2)  # the last step returns the remaining text
            assert job.take() == []
            pieces[i] += new
            num_early[i] += 0 if job.done else len(new)
    for job, given, early in zip(jobs, pieces, num_early, strict=True):
        result = job.result
        if isinstance(result, DetectResult):
            assert given == list(result.objects)
            assert early >= len(given) - 1
        elif isinstance(result, PointResult):
            assert given == list(result.points)
            assert early >= len(given) - 1
        elif isinstance(result, CaptionResult):
            assert "".join(given) == result.caption
        elif isinstance(result, QueryResult):
            if result.reasoning is not None:
                assert given.pop(0) == result.reasoning
            assert "".join(given) == result.answer
    assert sum(num_early) > 15


def test_text_pieces_are_words(model: LocalModel) -> None:
    scheduler = model.scheduler()
    jobs = [
        scheduler.submit(Caption(FIRST, "short", Settings(temperature=3.0, top_p=1.0, max_tokens=40, seed=seed)))
        for seed in range(5)
    ]
    while scheduler.step():
        pass
    words = [job.take() for job in jobs]
    assert sum(len(pieces) for pieces in words) > 20
    for pieces in words:
        assert all(piece[-1] in " \n" or ord(piece[-1]) >= 0x3400 for piece in pieces[:-1]), pieces
        assert all(" " not in piece.rstrip(" ") or piece.startswith(" ") for piece in pieces), pieces


def test_results_are_returned_once_in_order_of_completion(model: LocalModel) -> None:
    scheduler = model.scheduler()
    lengths = (9, 2, 5)
    jobs = [
        scheduler.submit(Detect(FIRST, "dog", dataclasses.replace(SHORT, max_objects=objects))) for objects in lengths
    ]
    given: list[Job] = []
    while scheduler.step():
        new = scheduler.results()
        assert all(job.done for job in new)
        assert [job for job in jobs if job.done and job not in given] == new
        given += new
    given += scheduler.results()
    assert given == [jobs[1], jobs[2], jobs[0]]
    assert scheduler.results() == []


@pytest.mark.parametrize("when", ["before any step", "waiting", "running", "done"])
def test_cancel_finishes_the_job_with_request_cancelled(model: LocalModel, when: str) -> None:
    scheduler = model.scheduler()
    if when == "waiting":
        scheduler.limits = Limits(max_num_seqs=1)
    other = scheduler.submit(Caption(FIRST, "short", SAMPLED))
    job = scheduler.submit(Caption(FIRST, "long", dataclasses.replace(SHORT, max_tokens=4)))
    if when in ("waiting", "running"):
        scheduler.step()
        assert (job.sequence is None) == (when == "waiting")
    elif when == "done":
        finish(scheduler)
    scheduler.cancel(job)
    scheduler.cancel(job)
    finish(scheduler)
    scheduler.cancel(job)
    finish(scheduler)
    if when == "done":
        assert isinstance(job.result, CaptionResult)
    else:
        assert isinstance(job.result, ErrorResult)
        assert isinstance(job.result.error, RequestCancelled)
    assert sorted(map(id, scheduler.results())) == sorted((id(job), id(other)))
    assert_alone(model, [other])
    assert scheduler._queue == {}
    assert scheduler._running == {}


def test_cancelled_job_keeps_its_pieces(model: LocalModel) -> None:
    scheduler = model.scheduler()
    job = scheduler.submit(Detect(FIRST, "dog", Settings(max_objects=40)))
    while len(job.sequence.pieces if job.sequence else ()) < 3:
        scheduler.step()
    scheduler.cancel(job)
    finish(scheduler)
    assert isinstance(job.result, ErrorResult)
    assert len(job.take()) == 3


def test_requests_can_be_submitted_from_other_threads(model: LocalModel) -> None:
    scheduler = model.scheduler()
    jobs: list[Job] = []

    def submit(part: list[Request]) -> None:
        for request in part:
            jobs.append(scheduler.submit(request))
            time.sleep(0.002)

    requests = mixed() * 2
    threads = [threading.Thread(target=submit, args=(requests[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 240
    while any(thread.is_alive() for thread in threads) or scheduler.step():
        scheduler.step()
        assert time.monotonic() < deadline
    assert len(jobs) == len(requests)
    assert_alone(model, jobs)
    assert sorted(map(id, scheduler.results())) == sorted(map(id, jobs))


def test_step_raises_after_the_model_is_closed(model: LocalModel) -> None:
    scheduler = model.scheduler()
    scheduler.submit(Caption(FIRST, "short", SHORT))
    scheduler.step()
    model.close()
    with pytest.raises(MoondreamError, match="'random' is closed; load it again"):
        scheduler.step()
    with pytest.raises(MoondreamError, match="is closed"):
        model.scheduler()


# --- Images ---------------------------------------------------------------------------------------------------------


@contextmanager
def counting(model: LocalModel) -> Iterator[list[int]]:
    """Collect the number of crops in each pass of the vision encoder."""
    crops: list[int] = []
    handle = model.network.vision.register_forward_hook(lambda _module, args, _output: crops.append(len(args[0])))
    try:
        yield crops
    finally:
        handle.remove()


def crops_of(model: LocalModel, images: Sequence[Any], **settings: Any) -> int:
    with counting(model) as crops:
        for image in images:
            model.encode_image(image, settings)
    return sum(crops)


def num_groups(scheduler: Scheduler) -> int:
    return scheduler._runner.num_images


def test_sequences_on_an_image_share_a_cache_group(model: LocalModel) -> None:
    scheduler = model.scheduler()
    encoded = model.encode_image(FIRST)
    jobs = [scheduler.submit(Caption(encoded, "short", SHORT)) for _ in range(3)]
    jobs.append(scheduler.submit(Caption(SECOND, "short", SHORT)))
    scheduler.step()
    assert num_groups(scheduler) == 2
    jobs.append(scheduler.submit(Detect(encoded, "dog", SHORT)))
    scheduler.step()
    assert scheduler.running == 5
    assert num_groups(scheduler) == 2
    finish(scheduler)
    assert_alone(model, jobs)


def test_jobs_count_prompt_and_completion_tokens(model: LocalModel) -> None:
    scheduler = model.scheduler()
    requests = [
        Query(None, "Why?", settings=dataclasses.replace(SHORT, max_tokens=4)),
        Query(FIRST, "Why?", settings=dataclasses.replace(SHORT, max_tokens=5)),
        Detect(FIRST, "dog", dataclasses.replace(SHORT, max_objects=2)),
        Detect(FIRST, "dog " * 10_000, SHORT),
    ]
    jobs = [scheduler.submit(request) for request in requests]
    assert [(job.prompt_tokens, job.completion_tokens) for job in jobs] == [(0, 0)] * 4
    finish(scheduler)
    alone, on_image, detection, too_long = jobs
    # Without an image, the prompt has no image tokens, but starts with bos.
    assert on_image.prompt_tokens - alone.prompt_tokens == model.config.prefix_length - 1
    assert (alone.completion_tokens, on_image.completion_tokens) == (4, 5)
    assert isinstance(detection.result, DetectResult)
    assert detection.completion_tokens == 3 * len(detection.result.objects) > 0
    assert isinstance(too_long.result, ErrorResult)
    assert (too_long.prompt_tokens, too_long.completion_tokens) == (0, 0)


def test_modified_array_is_encoded_again(model: LocalModel) -> None:
    scheduler = model.scheduler()
    frame = FIRST.copy()
    before = scheduler.submit(Caption(frame, "short", SHORT))
    scheduler.step()
    frame[:] = noise(9)
    after = scheduler.submit(Caption(frame, "short", SHORT))
    for _ in range(ADMISSION_INTERVAL):
        scheduler.step()
    assert num_groups(scheduler) == 2
    finish(scheduler)
    for job, image in ((before, FIRST), (after, noise(9))):
        request = Caption(image, "short", SHORT)
        assert job.result is not None
        assert_same(model, request, alone(model, request), job.result)


def test_array_modified_while_requests_wait_is_encoded_again(model: LocalModel) -> None:
    scheduler = model.scheduler()
    scheduler.limits = Limits(max_num_seqs=1)
    frame = FIRST.copy()
    before = [scheduler.submit(Caption(frame, "short", SHORT)) for _ in range(2)]
    scheduler.step()
    frame[:] = noise(9)
    after = scheduler.submit(Caption(frame, "short", SHORT))
    finish(scheduler)
    for job, image in ((before[0], FIRST), (before[1], FIRST), (after, noise(9))):
        request = Caption(image, "short", SHORT)
        assert job.result is not None
        assert_same(model, request, alone(model, request), job.result)


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(max_num_seqs=2), Limits(max_images=1), Limits(max_num_seqs=3, max_images=2)], ids=str
)
def test_each_image_is_encoded_once(model: LocalModel, limits: Limits, tmp_path: Path) -> None:
    path = tmp_path / "third.png"
    cv2.imwrite(str(path), SMALL)
    images = [FIRST, SECOND, path, FIRST, str(path), SECOND, FIRST]
    expected = crops_of(model, [FIRST, SECOND, path])
    model.limits = limits
    with counting(model) as crops:
        model.run([Caption(image, "short", SHORT) for image in images])
    assert sum(crops) == expected


def test_unreadable_image_fails_only_its_requests(model: LocalModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    requests = [
        Detect(broken, "dog", SHORT),
        Detect(FIRST, "dog", SHORT),
        Caption(broken, "short", SHORT),
        Point(np.zeros((0, 5, 3), np.uint8), "dog", SHORT),
        Query(None, "What?", settings=SHORT),
        Caption(object(), "short", SHORT),
    ]
    results = model.run(requests)
    for i in (0, 2, 3, 5):
        failed = results[i]
        assert isinstance(failed, ErrorResult)
        assert isinstance(failed.error, ImageError)
    assert "broken.png" in str(results[0].error)  # type: ignore[union-attr]
    for i in (1, 4):
        assert_same(model, requests[i], alone(model, requests[i]), results[i])


def test_image_cache_matches_images_by_content() -> None:
    model = load("tiny", device="cpu", dtype="float32", cache_images=2)
    frame = noise(4)
    with counting(model) as crops:
        request = Caption(frame, "short", SHORT)
        first = alone(model, request)
        once = sum(crops)
        assert once > 0
        again = model.run([Caption(frame.copy(), "short", SHORT), Detect(frame.copy(), "dog", SHORT)])
        assert_same(model, request, first, again[0])
        encoded = model.encode_image(frame.copy())
        assert sum(crops) == once
        assert alone(model, Caption(encoded, "short", SHORT)) == first
        limit = model.config.vision.max_crops  # the meaning of None
        model.run([Caption(frame, "short", dataclasses.replace(SHORT, max_crops=limit))])
        assert sum(crops) == once
        model.run([Caption(frame, "short", dataclasses.replace(SHORT, max_crops=1))])
        assert sum(crops) == once + 1
        model.run([Caption(frame.copy(), "short", dataclasses.replace(SHORT, max_crops=1))])
        assert sum(crops) == once + 1
        model.run([Caption(noise(5), "short", SHORT)])  # evicts the least recently used image
        model.run([Caption(frame, "short", SHORT)])
        assert sum(crops) == 3 * once + 1
    cache = model.image_cache
    assert cache is not None
    assert len(cache) == 2
    model.close()
    assert len(cache) == 0


def test_equal_pixels_in_one_call_are_encoded_once_with_image_cache() -> None:
    model = load("tiny", device="cpu", dtype="float32", cache_images=4)
    once = crops_of(load("tiny", device="cpu", dtype="float32"), [FIRST])
    with counting(model) as crops:
        model.run([Caption(FIRST.copy(), "short", SHORT) for _ in range(3)])
    assert sum(crops) == once


def test_encode_image_reuses_crops_of_the_previous_frame(model: LocalModel) -> None:
    frame = noise(6)
    previous = model.encode_image(frame)
    with counting(model) as crops:
        assert model.encode_image(frame.copy(), previous=previous) is previous
        assert crops == []
        moved = frame.copy()
        moved[-20:, -20:] ^= 255
        encoded = model.encode_image(moved, previous=previous)
        assert 0 < sum(crops) < len(previous.crops)
    fresh = model.encode_image(moved)
    assert torch.allclose(encoded.embedding, fresh.embedding, atol=1e-5)
    assert not torch.allclose(encoded.embedding, previous.embedding, atol=1e-5)
    request = Caption(moved, "short", SHORT)
    assert_same(model, request, alone(model, request), alone(model, dataclasses.replace(request, image=encoded)))
    assert model.encode_image(moved, previous=previous, tolerance=255) is previous
    coarse = model.encode_image(frame, {"max_crops": 1})
    assert model.encode_image(frame.copy(), previous=coarse) is coarse
    assert model.encode_image(moved, previous=coarse).max_crops == 1
    with pytest.raises(ValueError, match="tolerance must be 0 or more"):
        model.encode_image(moved, previous=previous, tolerance=-1)
    with pytest.raises(ValueError, match="another model"):
        random_model(seed=1).encode_image(moved, previous=previous)


# --- Limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("max_images", [1, 2])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_limits_do_not_change_results(model: LocalModel, max_num_seqs: int, max_images: int) -> None:
    requests = [*mixed(), *mixed(SMALL, FIRST)]
    scheduler = model.scheduler()
    scheduler.limits = Limits(max_num_seqs, max_images)
    jobs = [scheduler.submit(request) for request in requests]
    while scheduler.step():
        assert scheduler.running <= max_num_seqs
        assert scheduler._runner.num_images <= max_images
    assert_alone(model, jobs)


def test_images_are_admitted_in_order_of_their_first_requests(model: LocalModel) -> None:
    """With one sequence at a time, images are admitted in the order of their first requests."""
    scheduler = model.scheduler()
    scheduler.limits = Limits(max_num_seqs=1)
    images = [noise(seed, 100, 80) for seed in range(5)]
    jobs = [scheduler.submit(Caption(image, "short", SHORT)) for image in (*images, *reversed(images))]
    finish(scheduler)
    order = [next(i for i, image in enumerate(images) if image is job.request.image) for job in scheduler.results()]
    assert list(dict.fromkeys(order)) == [0, 1, 2, 3, 4]
    assert all(job.done for job in jobs)


@pytest.mark.parametrize("popular", ["image", "path", "no image"])
def test_popular_image_does_not_starve_other_images(model: LocalModel, popular: str, tmp_path: Path) -> None:
    path = tmp_path / "popular.png"
    cv2.imwrite(str(path), FIRST)
    image = {"image": model.encode_image(FIRST), "path": path, "no image": None}[popular]
    scheduler = model.scheduler()
    scheduler.limits = Limits(max_num_seqs=2)
    for _ in range(4):
        scheduler.submit(Query(image, "What?", settings=SHORT))
    other = scheduler.submit(Query(SMALL, "What?", settings=SHORT))
    for _ in range(200):
        scheduler.step()
        for _ in scheduler.results():
            scheduler.submit(Query(image, "What?", settings=SHORT))
        if other.done:
            return
    pytest.fail("not done after 200 steps")


def test_full_image_budget_does_not_starve_waiting_images(model: LocalModel) -> None:
    scheduler = model.scheduler()
    scheduler.limits = Limits(max_images=1)
    popular = model.encode_image(FIRST)
    scheduler.submit(Caption(popular, "short", SHORT))
    other = scheduler.submit(Caption(SMALL, "short", SHORT))
    for _ in range(100):
        scheduler.submit(Caption(popular, "short", SHORT))
        scheduler.step()
        if other.done:
            return
    pytest.fail("not done after 100 steps")


# --- Adapters and invalid requests ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_with_and_without_adapter_run_together() -> None:
    model = load(GOLDEN, device="cpu", dtype="float32")
    variant = str(GOLDEN / "adapter.pt")
    plain = [r for r in mixed(SMALL, SMALL) if r.image is not None]
    requests = []
    for request in plain:
        requests += [
            request,
            dataclasses.replace(request, settings=dataclasses.replace(request.settings, variant=variant)),
        ]
    requests.append(Query(None, "Why?", settings=dataclasses.replace(SHORT, variant=variant)))
    results = model.run(requests)
    assert len(results) == len(requests)
    for request, result in zip(requests, results, strict=True):
        assert not isinstance(result, ErrorResult)
        assert_same(model, request, alone(model, request), result)
    pairs = list(zip(results[0:-1:2], results[1::2], strict=True))
    assert any(without != with_one for without, with_one in pairs)
    whole = load(GOLDEN, device="cpu", dtype="float32", adapter=variant)
    for request, result in zip(plain, results[1::2], strict=True):
        assert_same(whole, request, alone(whole, request), result)


def test_invalid_requests_get_error_results_in_order(model: LocalModel, tmp_path: Path) -> None:
    model.config.tokenizer.templates["point"] = None
    missing = str(tmp_path / "missing.pt")
    bad = {
        0: (Point(FIRST, "dog"), UnsupportedSkill, "cannot point"),
        2: (
            Query(FIRST, "why " * 600),
            ValueError,
            r"the prompt must have at most 447 tokens, got \d+; .* context has 512 tokens",
        ),
        3: (Detect(random_model(seed=1).encode_image(FIRST), "dog"), ValueError, "encoded by another model"),
        5: (Caption(FIRST, "short", Settings(variant=missing)), CheckpointError, "missing.pt"),
        6: (Query(None, "What?", settings=Settings(variant=missing)), CheckpointError, "missing.pt"),
        8: ("not a request", TypeError, "a request must be a Detect, Point, .* got 'not a request'"),
    }
    good = iter([r for r in mixed() if not isinstance(r, Point)])
    requests: list[Any] = [bad[i][0] if i in bad else next(good) for i in range(12)]
    results = model.run(requests)
    assert len(results) == len(requests)
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        if i in bad:
            assert isinstance(result, ErrorResult), request
            with pytest.raises(bad[i][1], match=bad[i][2]):
                raise result.error
        else:
            assert_same(model, request, alone(model, request), result)


# --- Out of memory --------------------------------------------------------------------------------------------------

Failure = Callable[[], Exception]


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@contextmanager
def failing(module: nn.Module, when: Callable[[Tensor], bool], error: Failure = out_of_memory) -> Iterator[list[Any]]:
    """Make the forward pass of a module raise for inputs that satisfy `when`, and collect their shapes."""
    forward, failed_shapes = module.forward, []

    def wrapped(x: Tensor, *args: Any, **options: Any) -> Any:
        if when(x):
            failed_shapes.append(tuple(x.shape))
            raise error()
        return forward(x, *args, **options)

    module.forward = wrapped  # type: ignore[method-assign]
    try:
        yield failed_shapes
    finally:
        module.forward = forward  # type: ignore[method-assign]


def more_tokens_than(count: int, model: LocalModel) -> Callable[[Tensor], bool]:
    """Return a predicate: whether a step, not an image prefill, computes more tokens."""
    return lambda x: x.shape[1] > count and x.shape[1] != model.config.prefix_length


def at_calls(*numbers: int) -> Callable[[Tensor], bool]:
    calls = iter(range(1, 100_000))
    return lambda _x: next(calls) in numbers


@pytest.mark.slow
@pytest.mark.parametrize("error", [out_of_memory, lambda: RuntimeError("MPS backend out of memory (3 GB)")])
@pytest.mark.parametrize("tokens", [50, 30])
def test_out_of_memory_lowers_max_num_seqs_and_keeps_results(
    model: LocalModel, tokens: int, error: Failure, caplog: pytest.LogCaptureFixture
) -> None:
    requests = mixed()
    before = [alone(model, request) for request in requests]
    with (
        failing(model.network.text, more_tokens_than(tokens, model), error) as failed_shapes,
        caplog.at_level("WARNING"),
    ):
        results = model.run(requests)
    assert failed_shapes
    assert model.limits.max_num_seqs < len(requests)
    assert f"out of memory on cpu: continuing with at most {model.limits.max_num_seqs} sequences" in caplog.text
    for request, expected, result in zip(requests, before, results, strict=True):
        assert not isinstance(result, ErrorResult), result
        assert_same(model, request, expected, result)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [(1,), (2,), (5,), (9,), (3, 4), (2, 5, 9)])
def test_out_of_memory_between_steps_loses_no_pieces(model: LocalModel, calls: tuple[int, ...]) -> None:
    requests = mixed()
    before = [alone(model, request) for request in requests]
    images = [model.encode_image(image) for image in (FIRST, SECOND)]
    scheduler = model.scheduler()
    jobs = [scheduler.submit(request) for request in mixed(*images)]
    pieces: list[list[Any]] = [[] for _ in jobs]
    with failing(model.network.text, at_calls(*calls)) as failed_shapes:
        is_running = True
        while is_running:
            is_running = scheduler.step()
            for given, job in zip(pieces, jobs, strict=True):
                given += job.take()
    assert len(failed_shapes) == len(calls)
    assert model.limits.max_num_seqs < len(requests)
    for request, expected, job, given in zip(requests, before, jobs, pieces, strict=True):
        assert job.result is not None
        assert not isinstance(job.result, ErrorResult), job.result
        assert_same(model, request, expected, job.result)
        assert job.sequence is not None
        assert given == job.sequence.pieces
        if isinstance(job.result, DetectResult):
            assert given == list(job.result.objects)
        elif isinstance(job.result, CaptionResult):
            assert "".join(given) == job.result.caption


@pytest.mark.parametrize("image", ["an array", "no image"])
def test_preempted_requests_on_equal_images_all_finish(model: LocalModel, image: str) -> None:
    """The preempted requests wait under the same key, each for its own image."""
    source = FIRST if image == "an array" else None
    scheduler = model.scheduler()
    jobs = [scheduler.submit(Query(source, "What?", settings=SAMPLED))]
    for question in ("How?", "Why?"):
        scheduler.step()
        jobs.append(scheduler.submit(Query(source, question, settings=SAMPLED)))
    scheduler.step()
    with failing(model.network.text, at_calls(1)) as failed_shapes:
        finish(scheduler)
    assert len(failed_shapes) == 1
    assert_alone(model, jobs)


def test_preempted_sequence_keeps_its_original_pixels(model: LocalModel) -> None:
    scheduler = model.scheduler()
    frame = FIRST.copy()
    jobs = [scheduler.submit(Caption(image, "short", SAMPLED)) for image in (frame, SECOND)]
    for _ in range(3):
        scheduler.step()
    frame[:] = noise(9)
    with failing(model.network.text, at_calls(1)):
        finish(scheduler)
    for job, image in zip(jobs, (FIRST, SECOND), strict=True):
        assert job.result is not None
        assert_same(model, Caption(image, "short", SAMPLED), alone(model, Caption(image, "short", SAMPLED)), job.result)


def test_out_of_memory_lowers_max_images_and_keeps_results(model: LocalModel, caplog: pytest.LogCaptureFixture) -> None:
    images = [FIRST, SECOND, SMALL, noise(7), noise(8, 400, 400)]
    requests: list[Request] = [Caption(image, "short", SHORT) for image in images]
    before = [alone(model, request) for request in requests]
    with failing(model.network.vision, lambda crops: len(crops) > 6) as failed_shapes, caplog.at_level(logging.WARNING):
        results = model.run(requests)
    assert failed_shapes
    assert model.limits.max_images < 5
    assert f"on {model.limits.max_images} images" in caplog.text
    for request, expected, result in zip(requests, before, results, strict=True):
        assert_same(model, request, expected, result)


def test_image_waits_for_memory_until_a_sequence_finishes(model: LocalModel) -> None:
    scheduler = model.scheduler()
    scheduler.limits = Limits()
    jobs = [scheduler.submit(Caption(SECOND, "short", SAMPLED)), scheduler.submit(Query(SECOND, "A?", settings=SHORT))]
    scheduler.step()
    jobs.append(scheduler.submit(Caption(FIRST, "short", SHORT)))
    with failing(model.network.vision, lambda _crops: not any(job.done for job in jobs)) as failed_shapes:
        finish(scheduler)
    assert failed_shapes
    assert_alone(model, jobs)


def test_image_waits_for_memory_of_images_in_the_same_step(model: LocalModel) -> None:
    scheduler = model.scheduler()
    settings = [dataclasses.replace(SHORT, max_crops=crops) for crops in (1, 2, None)]
    jobs = [scheduler.submit(Caption(FIRST, "short", one)) for one in settings]
    encoded: list[int] = []
    is_running = True
    with failing(model.network.vision, lambda _crops: len(encoded) == 1 or encoded.append(1)):  # type: ignore[func-returns-value]
        for _ in range(200):
            encoded.clear()
            is_running = scheduler.step()
            if not is_running:
                break
    assert not is_running
    assert_alone(model, jobs)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_too_large_request_gets_an_error_with_advice(model: LocalModel, part: str) -> None:
    encoded = model.encode_image(SECOND)
    long = Query(encoded, "why " * 40, settings=SHORT) if part == "text" else Caption(SECOND, "short", SHORT)
    requests = [Caption(encoded, "short", SHORT), long, Detect(encoded, "dog", SHORT)]
    before = [alone(model, request) for request in requests]
    when = more_tokens_than(100, model) if part == "text" else lambda _crops: True
    with failing(getattr(model.network, part), when):
        results = model.run(requests)
    for i in (0, 2):
        assert_same(model, requests[i], before[i], results[i])
    failed = results[1]
    assert isinstance(failed, ErrorResult)
    assert isinstance(failed.error, MoondreamError)
    for hint in ("out of memory on cpu", "max_crops", "max_tokens", "max_objects"):
        assert hint in str(failed.error)
    assert not isinstance(alone(model, long), ErrorResult)


def test_single_too_large_request_fails_after_few_retries(model: LocalModel) -> None:
    for module in (model.network.text, model.network.vision):
        with failing(module, lambda _x: True) as failed_shapes:
            (failed,) = model.run([Caption(FIRST, "short", SHORT)])
        assert len(failed_shapes) < 5
        assert isinstance(failed, ErrorResult)
        assert "max_crops" in str(failed.error)


def test_other_errors_fail_running_requests_only(model: LocalModel) -> None:
    scheduler = model.scheduler()
    limits = dataclasses.replace(scheduler.limits)
    running = [scheduler.submit(request) for request in mixed()[:5]]
    scheduler.step()
    with failing(model.network.text, at_calls(1), lambda: RuntimeError("device-side assert")):
        scheduler.step()
    assert all(isinstance(job.result, ErrorResult) and "device-side" in str(job.result.error) for job in running)
    assert scheduler.limits == limits
    later = [scheduler.submit(request) for request in mixed()]
    finish(scheduler)
    assert_alone(model, later)


def test_error_of_one_output_fails_only_its_request(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = model.scheduler()
    running = [scheduler.submit(request) for request in mixed()[:5]]
    scheduler.step()
    assert running[2].sequence is not None

    def fail(output: Any) -> None:
        raise RuntimeError("broken output")

    monkeypatch.setattr(running[2].sequence, "apply", fail)
    finish(scheduler)
    assert isinstance(running[2].result, ErrorResult)
    assert "broken output" in str(running[2].result.error)
    assert_alone(model, [job for job in running if job is not running[2]])


@pytest.mark.slow
@pytest.mark.parametrize("error", [out_of_memory, lambda: RuntimeError("device-side assert")])
def test_error_result_keeps_no_kv_cache_alive(model: LocalModel, error: Failure) -> None:
    request = Caption(model.encode_image(FIRST), "short", SHORT)

    def caches() -> int:
        gc.collect()
        return sum(type(item) is PrefixSharedKVCache for item in gc.get_objects())

    before = caches()
    with failing(model.network.text, lambda _x: True, error):
        results = model.run([request])
    assert isinstance(results[0], ErrorResult)
    assert caches() == before


class OutOfMemoryAt(TorchFunctionMode):
    """Raises at the n-th call of torch that computes something. Attribute access and writes are not counted."""

    def __init__(self, number: int, scheduler: Scheduler) -> None:
        super().__init__()
        self.number, self.scheduler = number, scheduler
        self.calls, self.running = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "__setitem__", "__len__"):
            self.calls += 1
            if self.calls == self.number:
                self.running = self.scheduler.running
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(4))
def test_out_of_memory_at_any_operation_loses_no_request(model: LocalModel, start: int) -> None:
    """The stride is prime, so that failures of several runs affect different operations."""
    images = [model.encode_image(image) for image in (FIRST, SECOND)]
    requests = mixed(*images)
    before = [alone(model, request) for request in requests]
    number, last = 5 + 53 * start, False
    while not last:
        model.limits = Limits()
        scheduler = model.scheduler()
        jobs = [scheduler.submit(request) for request in requests]
        with OutOfMemoryAt(number, scheduler) as mode:
            finish(scheduler)
        last = mode.calls < number
        for request, expected, job in zip(requests, before, jobs, strict=True):
            assert job.result is not None, number
            if isinstance(job.result, ErrorResult) and mode.running <= 1:
                assert "out of memory" in str(job.result.error), number
            else:
                assert_same(model, request, expected, job.result)
        number += 4 * 53


# --- Overflow and NaN -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("skill", ["detect", "query", "sampled"])
def test_nan_image_fails_only_its_requests(model: LocalModel, skill: str, order: int) -> None:
    broken = nan_image(model.encode_image(FIRST))
    ask: dict[str, list[Request]] = {
        "detect": [Detect(broken, "dog", SHORT), Point(broken, "a very long name of an object", SHORT)],
        "query": [Query(broken, "What?", settings=SHORT), Query(broken, "What is it, and why?", True, settings=SHORT)],
        "sampled": [Query(broken, "What?", settings=SAMPLED), Caption(broken, "short", SAMPLED)],
    }
    good: list[Request] = [
        Caption(SECOND, "short", SHORT),
        Detect(SECOND, "dog", SHORT),
        Query(SMALL, "What is it?", settings=SAMPLED),
        Query(None, "What?", settings=SHORT),
    ]
    requests = [*ask[skill], *good][::order]
    for request, result in zip(requests, model.run(requests), strict=True):
        if any(request is one for one in good):
            assert_same(model, request, alone(model, request), result)
        else:
            assert isinstance(result, ErrorResult)
            assert "numbers overflowed" in str(result.error)


def test_nan_image_does_not_affect_later_images(model: LocalModel) -> None:
    scheduler = model.scheduler()
    stays = scheduler.submit(Caption(SECOND, "short", SAMPLED))
    scheduler.step()
    broken = scheduler.submit(Query(nan_image(model.encode_image(FIRST)), "What?", settings=SHORT))
    while not broken.done:
        scheduler.step()
    comes = scheduler.submit(Caption(SMALL, "short", SHORT))
    finish(scheduler)
    assert isinstance(broken.result, ErrorResult)
    assert_alone(model, [stays, comes])


def test_tiny_temperature_equals_greedy_sampling(model: LocalModel) -> None:
    cold = Query(FIRST, "What?", settings=Settings(temperature=1e-40, max_tokens=6))
    other = Caption(SECOND, "short", SHORT)
    result, beside = model.run([cold, other])
    assert_same(model, other, alone(model, other), beside)
    greedy = alone(model, Query(FIRST, "What?", settings=SHORT))
    assert isinstance(result, QueryResult)
    assert isinstance(greedy, QueryResult)
    assert result.answer == greedy.answer
