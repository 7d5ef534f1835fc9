"""Memory after many mixed requests: a fiftieth of them here, all of them with `make soak`."""

from __future__ import annotations

import gc
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.scheduler import Scheduler
from moondream_cv.errors import RequestCancelled
from moondream_cv.requests import Caption, Detect, ErrorResult, Gaze, Point, Query, Request, Settings
from moondream_cv.scenes.render import render_scene

MIXED = 10_000
PER_ROUND = 50
PLAIN = np.full((120, 160, 3), 90, np.uint8)
ALLOWED_GROWTH = 48 << 20  # bytes of the process between the first fifth and the end, for the allocator


def some_requests(count: int, rng: random.Random) -> list[Request]:
    """Return requests of all skills, with new images of several sizes or none; some are unreadable or truncated."""
    images = []
    for _ in range(3):
        size = rng.choice([(320, 240), (640, 480), (200, 300)])
        images.append(render_scene(rng.randrange(1 << 30), resolution_wh=size).image[..., ::-1])
    requests: list[Request] = []
    for _ in range(count):
        image = rng.choice(images)
        settings = Settings(
            temperature=rng.choice([0.0, 0.5, 1.2]),
            max_tokens=rng.choice([3, 8, 16]),
            max_objects=rng.choice([1, 3, 8]),
            max_crops=rng.choice([None, 2]),
            seed=rng.randrange(1000),
        )
        name = rng.choice(["circle", "red square", "dog", "object"])
        requests.append(
            rng.choice(
                [
                    Detect(image, name, settings),
                    Point(image, name, settings),
                    Query(image, f"How many {name}s are there?", settings=settings),
                    Query(None, "What is a circle?", settings=settings),
                    Caption(image, "short", settings),
                    Gaze(image, (rng.random(), rng.random())),
                    Detect(b"no picture", name, settings),
                ]
            )
        )
    return requests


def one_round(model: LocalModel, scheduler: Scheduler, rng: random.Random) -> tuple[int, int]:
    """Run `PER_ROUND` requests through every interface, and return the numbers of completed and cancelled ones."""
    requests = some_requests(PER_ROUND, rng)
    jobs = [scheduler.submit(request) for request in requests[:30]]
    steps = itertools.count()
    while scheduler.step():
        if next(steps) == 2:
            for job in jobs[::5]:
                scheduler.cancel(job)
        for job in jobs:
            job.take()
    done = scheduler.results()
    assert len(done) == len(jobs)
    cancelled = [j for j in done if isinstance(j.result, ErrorResult) and isinstance(j.result.error, RequestCancelled)]
    completed = sum(not isinstance(job.result, ErrorResult) for job in done)
    completed += sum(not isinstance(result, ErrorResult) for result in model.run(requests[30:]))
    next(model.stream(Caption(PLAIN, "short")))  # abandoned before its end
    return completed, len(cancelled)


def held_bytes() -> int:
    """Return the size in bytes of all live tensors, counting each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # torch.compile in other tests of this process leaves tensors without memory, and readers of files sparse ones.
        if not issubclass(type(thing), torch.Tensor) or issubclass(type(thing), FakeTensor):
            continue
        if thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def serve(count: int) -> tuple[list[int], list[int]]:
    """Run rounds of mixed requests, and return the tensor bytes and resident bytes after each round."""
    held, resident = [], []
    rng = random.Random(0)
    with load("tiny", device="cpu", dtype="float32", cache_images=4) as model:
        scheduler = model.scheduler()
        completed = cancelled = 0
        for _ in range(count // PER_ROUND):
            done, gone = one_round(model, scheduler, rng)
            completed, cancelled = completed + done, cancelled + gone
            assert model.image_cache is not None
            model.image_cache.clear()
            held.append(held_bytes())
            if sys.platform == "linux":
                resident.append(resident_bytes())
        assert completed > count // 2
        assert cancelled > count // 50
    return held, resident


@pytest.mark.slow
def test_requests_release_all_tensors() -> None:
    before = held_bytes()
    held, _ = serve(MIXED // 50)
    assert len(set(held)) == 1, [later - held[0] for later in held]
    assert held_bytes() <= before  # the weights of the closed model are released as well


@pytest.mark.soak
def test_memory_does_not_grow_over_ten_thousand_requests() -> None:
    held, resident = serve(MIXED)
    assert len(set(held)) == 1, [later - held[0] for later in held]
    if not resident:
        pytest.skip("how much memory this process takes is read from /proc, which only Linux has; no tensor is left")
    settled = max(resident[: len(resident) // 5])
    grown = max(resident[-10:]) - settled
    print(f"{MIXED} requests: {settled / 1e6:.0f} MB after a fifth, {grown / 1e6:+.1f} MB at the end")
    assert grown <= ALLOWED_GROWTH


@pytest.mark.slow
def test_leaked_tensors_are_detected() -> None:
    before = held_bytes()
    kept = [torch.zeros(1000) for _ in range(3)]
    assert held_bytes() - before == 3 * 4000
    shares = kept[0][:10]
    assert held_bytes() - before == 3 * 4000
    del kept, shares
    assert held_bytes() == before


@pytest.mark.slow
def test_image_cache_keeps_encoded_images() -> None:
    with load("tiny", device="cpu", dtype="float32", cache_images=2) as model:
        image = np.zeros((120, 160, 3), np.uint8)
        model.run([Caption(image, "short", {"max_tokens": 2})])
        before = held_bytes()
        assert model.image_cache is not None
        kept = model.image_cache.nbytes
        model.image_cache.clear()
        assert 0 < before - held_bytes() <= kept
