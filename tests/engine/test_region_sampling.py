"""Sampling of objects and points, as the rollouts of fine-tuning need it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from moondream_cv.engine.cuda_graphs import GraphPool
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.prompts import write_prompt
from moondream_cv.requests import Detect, DetectResult, Point, Query, Settings
from moondream_cv.training.fine_tuner import FineTuner
from moondream_cv.training.lora import LoraParameters
from moondream_cv.training.trajectories import region_trajectory
from tests.helpers.models import random_model

FRAME = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return random_model()


def sampled(temperature: float = 1.0, top_p: float = 1.0, seed: int | None = 0, max_objects: int = 4) -> Settings:
    return Settings(temperature=temperature, top_p=top_p, seed=seed, max_objects=max_objects, sample_regions=True)


def numbers(result: object) -> list[list[float]]:
    """The numbers of each object or point without its confidence."""
    pieces = result.objects if isinstance(result, DetectResult) else result.points  # type: ignore[attr-defined]
    return [list(piece.to_dict().values())[:-1] for piece in pieces]


def test_objects_are_not_sampled_by_default(model: LocalModel) -> None:
    plain, hot = Settings(max_objects=4), Settings(temperature=5.0, top_p=1.0, max_objects=4)
    assert model.run([Detect(FRAME, "dog", hot)]) == model.run([Detect(FRAME, "dog", plain)])


@pytest.mark.parametrize("request_class", [Detect, Point])
def test_seed_repeats_a_sample_in_any_batch(model: LocalModel, request_class: type[Detect | Point]) -> None:
    requests = [request_class(FRAME, "dog", sampled(seed=seed)) for seed in range(8)]
    alone = [model.run([request])[0] for request in requests]
    others = [Detect(FRAME, "cat"), Query(FRAME, "why?", settings=Settings(max_tokens=3, seed=1))]
    together = model.run([*others, *requests])[2:]
    for found, expected in zip(together, alone, strict=True):
        assert numbers(found) == [pytest.approx(one, abs=1e-6) for one in numbers(expected)]
    assert len(set(map(str, alone))) > 4


def test_samples_without_a_seed_follow_the_generator_of_torch(model: LocalModel) -> None:
    request = Detect(FRAME, "dog", sampled(seed=None))
    torch.manual_seed(3)
    first = model.run([request, request])
    torch.manual_seed(3)
    assert model.run([request, request]) == first
    assert first[0] != first[1]


def test_temperature_zero_and_a_small_top_p_return_the_most_likely_objects(model: LocalModel) -> None:
    expected = model.run([Detect(FRAME, "dog", Settings(max_objects=4))])
    assert model.run([Detect(FRAME, "dog", sampled(temperature=0.0))]) == expected
    assert model.run([Detect(FRAME, "dog", sampled(temperature=1e-6, seed=4))]) == expected


def test_steps_with_static_shapes_have_the_same_samples() -> None:
    """Steps are launched ahead of the host there, some of them twice."""
    model = random_model()
    requests = [Detect(FRAME, "dog", sampled(seed=seed)) for seed in range(5)]
    expected = model.run(requests)
    model.graph_pool = GraphPool(model.network, 2**30)
    for found, wanted in zip(model.run(requests), expected, strict=True):
        assert isinstance(found, DetectResult)
        assert isinstance(wanted, DetectResult)
        assert [o.to_dict() for o in found.objects] == [pytest.approx(o.to_dict(), abs=1e-4) for o in wanted.objects]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_frequencies_of_decisions_and_bins_equal_their_probabilities(model: LocalModel, temperature: float) -> None:
    """The log-probabilities of training describe what the engine samples."""
    count = 1500
    requests = [Point(FRAME, "dog", sampled(temperature, seed=seed, max_objects=1)) for seed in range(count)]
    results = model.run(requests)
    bins = Counter(round(r.points[0].x * 1024) for r in results if r.points)  # type: ignore[union-attr]
    prompt = write_prompt(Point(FRAME, "dog"), model.tokenizer, model.config.tokenizer)
    tuner = FineTuner(model.network, LoraParameters.initialize(model.config, 8, 0, model.device))
    image = model.encode_image(FRAME).embedding
    chosen = [x for x, _ in bins.most_common(5)]
    lists = [[], *([(x, 0)] for x in chosen)]
    trajectories = [region_trajectory(prompt, one, not one, model.config) for one in lists]
    expected = [np.exp(values[0]) for values in tuner.log_probs(image, trajectories, temperature)]
    found = [count - sum(bins.values()), *(bins[x] for x in chosen)]
    for number, probability in zip(found, expected, strict=True):
        deviation = np.sqrt(count * probability * (1 - probability)) + 1
        assert number == pytest.approx(count * probability, abs=4 * deviation)
