"""The admission policy: order of requests, and priority of rare detections.

Run with `pytest tests/engine/test_admission.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from moondream_cv.engine.admission import (
    ADMISSION_INTERVAL,
    MAX_DEFERRED_STEPS,
    MAX_TEXT_IMAGES,
    RARE_REGION_RATIO,
)
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.scheduler import Limits, Scheduler
from moondream_cv.engine.sequence_state import Job
from moondream_cv.requests import Caption, Detect, ErrorResult, Request, Settings
from tests.helpers.models import endless_model, random_model

LONG = Settings(temperature=0, max_tokens=200)
ONE = Settings(max_objects=1)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def caption(seed: int) -> Request:
    return Caption(image(seed), "short", LONG)


def detect(seed: int) -> Request:
    return Detect(image(seed), "dog", ONE)


@pytest.fixture(scope="module")
def talker() -> LocalModel:
    return endless_model()


def steps_until(scheduler: Scheduler, condition: Callable[[], bool], limit: int = 100) -> int:
    for step in range(1, limit + 1):
        scheduler.step()
        if condition():
            return step
    raise AssertionError(f"condition not met after {limit} steps")


def running(jobs: list[Job]) -> int:
    return sum(job.sequence is not None for job in jobs)


def running_texts(model: LocalModel, texts: int) -> tuple[Scheduler, list[Job]]:
    """Return a scheduler with running text requests, and their jobs."""
    scheduler = model.scheduler()
    jobs = [scheduler.submit(caption(seed)) for seed in range(texts)]
    steps_until(scheduler, lambda: running(jobs) == texts)
    return scheduler, jobs


def test_rare_detection_is_admitted_before_earlier_texts(talker: LocalModel) -> None:
    scheduler, _ = running_texts(talker, 2 * RARE_REGION_RATIO)
    late = [scheduler.submit(caption(seed)) for seed in range(20, 26)]
    short = scheduler.submit(detect(30))
    scheduler.step()
    assert short.sequence is not None  # admitted before any image of a text
    assert running(late) == 0


def test_texts_are_deferred_for_at_most_max_deferred_steps(talker: LocalModel) -> None:
    scheduler, _ = running_texts(talker, 2 * RARE_REGION_RATIO)
    late = [scheduler.submit(caption(seed)) for seed in range(20, 26)]
    seeds = iter(range(30, 1000))
    waited = 0
    while running(late) == 0:  # like a camera without end
        if all(state.is_text for states in scheduler._running.values() for state in states.values()):
            scheduler.submit(detect(next(seeds)))
        scheduler.step()
        waited += 1
        assert waited <= MAX_DEFERRED_STEPS + 2
    assert 1 <= running(late) <= MAX_TEXT_IMAGES


def test_text_images_per_step_are_limited_after_a_detection(talker: LocalModel) -> None:
    scheduler, _ = running_texts(talker, 2 * RARE_REGION_RATIO)
    short = scheduler.submit(detect(30))
    steps_until(scheduler, lambda: short.done)
    late = [scheduler.submit(caption(seed)) for seed in range(20, 28)]
    grown = [running(late)]
    for _ in range(8):
        scheduler.step()
        grown.append(running(late))
    assert grown[-1] > 0
    assert max(after - before for before, after in itertools.pairwise(grown)) <= MAX_TEXT_IMAGES


def test_frequent_detections_get_no_priority(talker: LocalModel) -> None:
    scheduler = talker.scheduler()
    jobs = [scheduler.submit(request) for i in range(6) for request in (caption(i), detect(50 + i))]
    scheduler.step()
    assert running(jobs) == len(jobs)


def test_texts_alone_are_admitted_at_once(talker: LocalModel) -> None:
    scheduler = talker.scheduler()
    jobs = [scheduler.submit(caption(seed)) for seed in range(12)]
    scheduler.step()
    assert running(jobs) == 12


def test_admissions_are_at_least_an_interval_apart(talker: LocalModel) -> None:
    scheduler, _ = running_texts(talker, 2)
    late = []
    joined = []
    for seed in range(20, 28):
        late.append(scheduler.submit(caption(seed)))
        before = running(late)
        scheduler.step()
        joined.append(running(late) - before)
    assert sum(joined) >= len(late) - (ADMISSION_INTERVAL - 1)
    assert all(not (a and b) for a, b in itertools.pairwise(joined))  # never in consecutive steps


@pytest.mark.slow
def test_small_limits_do_not_starve_requests(talker: LocalModel) -> None:
    model = random_model()
    scheduler = model.scheduler()
    scheduler.limits = Limits(max_num_seqs=3, max_images=2)
    mixed = [caption(i) if i % 3 else detect(i) for i in range(18)]
    jobs = [scheduler.submit(request) for request in mixed]
    steps_until(scheduler, lambda: all(job.done for job in jobs), limit=5000)
    assert not any(isinstance(job.result, ErrorResult) for job in jobs)


def test_max_images_grows_for_small_prefixes(talker: LocalModel) -> None:
    assert Limits.for_prefix_size(150 * 2**20).max_images == 16  # Moondream 2
    assert Limits.for_prefix_size(64 * 2**20).max_images == 32
    assert Limits.for_prefix_size(1).max_images == Limits().max_num_seqs
    assert talker.limits.max_images == Limits().max_num_seqs
