"""Batch invariance: the reply to a request does not depend on the other requests in the batch."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.scheduler import Limits
from moondream_cv.requests import Caption, Chat, Detect, Gaze, Point, Query, Request, Settings, Turn
from moondream_cv.scenes.render import render_scene
from tests.helpers.batch_invariance import assert_same
from tests.helpers.models import random_model

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = ("dog", "red circle", "circle", "blue square", "car", "a white cat on a very long sofa by the window", "star")
QUESTIONS = ("What?", "How many circles are there?", "What color is the car, and which way does it point?")


def frames() -> list[np.ndarray]:
    """BGR frames of several sizes."""
    sizes = ((320, 240), (100, 90), (500, 300), (64, 400), (320, 240))
    scenes = [render_scene(seed, resolution_wh=size) for seed, size in enumerate(sizes)]
    return [np.ascontiguousarray(scene.image[..., ::-1]) for scene in scenes]


FRAMES = frames()


def some_settings(**changes: Any) -> st.SearchStrategy[Settings]:
    return st.builds(
        Settings,
        temperature=st.sampled_from((0.0, 0.0, 1.2)),
        top_p=st.sampled_from((0.3, 0.95)),
        max_tokens=st.sampled_from((1, 5, 30)),
        max_objects=st.sampled_from((1, 3, 12)),
        max_crops=st.sampled_from((None, None, 1)),
        seed=st.integers(0, 3),
        **changes,
    )


def some_requests(images: st.SearchStrategy[Any], chosen: st.SearchStrategy[Settings]) -> st.SearchStrategy[Request]:
    refs = st.sampled_from(((), ((0.2, 0.4),), ((0.1, 0.1, 0.6, 0.7), (0.5, 0.5))))
    return st.one_of(
        st.builds(Detect, images, st.sampled_from(NAMES), chosen),
        st.builds(Point, images, st.sampled_from(NAMES), chosen),
        st.builds(Query, images, st.sampled_from(QUESTIONS), st.booleans(), refs, chosen),
        st.builds(Query, st.none(), st.sampled_from(QUESTIONS), st.booleans(), settings=chosen),
        st.builds(some_chat, images, st.lists(images, max_size=1), st.sampled_from(QUESTIONS), st.booleans(), chosen),
        st.builds(Caption, images, st.sampled_from(("short", "normal")), chosen),
        st.builds(Gaze, images, st.just((0.4, 0.6)), st.booleans(), chosen),
    )


def some_chat(first: Any, later: list[Any], question: str, reasoning: bool, chosen: Settings) -> Chat:
    return Chat((Turn("What?", "A car.", (first,)), Turn(question, images=tuple(later))), reasoning, chosen)


class Memory:
    """Replies to single requests, each computed once."""

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.replies: dict[str, Any] = {}

    def alone(self, request: Request) -> Any:
        image = request.image
        if isinstance(request, Chat):
            key = repr((list(map(id, request.images)), request.with_images([0] * len(request.images))))
        else:
            key = repr((id(image) if isinstance(image, np.ndarray) else image, dataclasses.replace(request, image=0)))
        if key not in self.replies:
            self.replies[key] = self.model.run([request])[0]
        return self.replies[key]


@pytest.fixture(scope="module", params=["tiny", "random", "mha", "gqa"])
def memory(request: pytest.FixtureRequest) -> Memory:
    if request.param == "random":
        return Memory(random_model())
    name = "tiny" if request.param == "tiny" else str(GOLDEN / request.param)
    return Memory(load(name, device="cpu", dtype="float32"))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_replies_do_not_depend_on_the_batch(memory: Memory, data: st.DataObject) -> None:
    adapter = GOLDEN / Path(memory.model.name).name / "adapter.pt"
    variants = st.sampled_from((None, None, str(adapter))) if adapter.is_file() else st.none()
    chosen = some_settings(variant=variants)
    requests = data.draw(st.lists(some_requests(st.sampled_from(FRAMES), chosen), min_size=1, max_size=10))
    max_num_seqs, max_images = data.draw(st.sampled_from(((64, 16), (64, 2), (3, 16), (2, 1))))
    memory.model.limits = Limits(max_num_seqs, max_images)
    for one, reply in zip(requests, memory.model.run(requests), strict=True):
        assert_same(memory.model, one, memory.alone(one), reply)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrivals_and_cancellations_do_not_change_replies(memory: Memory, seed: int) -> None:
    """Requests arrive between steps, and half of them are cancelled while they run."""
    draw = random.Random(seed)
    strategy = (
        lambda image: Detect(image, draw.choice(NAMES), Settings(max_objects=8)),
        lambda image: Point(image, draw.choice(NAMES), Settings(max_objects=8)),
        lambda image: Query(image, draw.choice(QUESTIONS), settings=Settings(temperature=0, max_tokens=20)),
        lambda image: Caption(image, "short", Settings(temperature=1.0, top_p=0.9, max_tokens=20, seed=7)),
    )
    scheduler = memory.model.scheduler()
    scheduler.limits = Limits(6, 3)
    jobs, cancelled = [], set()
    arrivals = [draw.choice(strategy)(draw.choice(FRAMES)) for _ in range(12)]
    while arrivals or scheduler.step():
        for _ in range(draw.choice((0, 0, 1, 3))):
            if arrivals:
                jobs.append(scheduler.submit(arrivals.pop()))
        if jobs and draw.random() < 0.3:
            job = draw.choice(jobs)
            if not job.done and len(cancelled) < 6:
                scheduler.cancel(job)
                cancelled.add(id(job))
    assert {id(job) for job in scheduler.results()} == {id(job) for job in jobs}
    for job in jobs:
        assert job.result is not None
        if id(job) not in cancelled:
            assert_same(memory.model, job.request, memory.alone(job.request), job.result)
