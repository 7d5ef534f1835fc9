"""Requests with different adapters decode together: one pass through the decoder per step."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from moondream_cv.engine import model_runner
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.model_runner import ModelRunner
from moondream_cv.model.adapters import Adapter
from moondream_cv.requests import Caption, Detect, ErrorResult, Point, Query, Request, Result, Settings
from moondream_cv.training.lora import LoraParameters
from tests.helpers.models import random_model

RNG = np.random.default_rng(0)
FRAMES = [RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2)]
VARIANTS = (None, "first", "second", "published")


def changed_adapter(model: LocalModel, name: str, seed: int) -> Adapter:
    parameters = LoraParameters.initialize(model.config, 8, seed, model.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in parameters.tensors.items():
            if key.endswith(".B"):
                tensor.normal_(0, 0.05, generator=generator)
    return parameters.detached(name, model.dtype)


@pytest.fixture(scope="module")
def model() -> LocalModel:
    made = random_model()
    for seed, name in enumerate(("first", "second")):
        made.add_adapter(changed_adapter(made, name, seed))
    dim = made.config.text.dim
    pair = torch.randn(4, dim) * dim**-0.5, torch.randn(dim, 4) * 0.05
    layers = [{"attn": {"proj": pair}, "mlp": {}} for _ in range(made.config.text.n_layers)]
    made.add_adapter(Adapter("published", layers))
    return made


def requests() -> list[Request]:
    """Requests of all skills on two images under every adapter, in mixed order."""
    made: list[Request] = []
    for frame in FRAMES:
        for variant in VARIANTS:
            settings = Settings(temperature=0.0, max_tokens=6, max_objects=3, variant=variant)
            made += [
                Detect(frame, "dog", settings),
                Query(frame, "what is this?", settings=settings),
                Point(frame, "cat", settings),
                Caption(frame, "short", settings),
            ]
    return [made[i] for i in np.random.default_rng(1).permutation(len(made))]


def content(result: Result) -> object:
    """A result without its scores, which depend on the batch by rounding."""
    assert not isinstance(result, ErrorResult), result.error
    values = result.to_dict()
    values.pop("logprob", None)
    for pieces in (values.get("objects", []), values.get("points", [])):
        for piece in pieces:
            piece.pop("confidence")
    return values


def test_results_are_those_of_separate_calls(model: LocalModel) -> None:
    asked = requests()
    alone = [content(model.run([request])[0]) for request in asked]
    assert len(set(map(str, alone))) > len(asked) / 2  # the adapters differ
    assert [content(result) for result in model.run(asked)] == alone


def test_decoder_runs_once_per_step(model: LocalModel) -> None:
    calls = []
    run = model.network.text.forward

    def counted(x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        calls.append(x.shape[1])
        return run(x, *arguments, **options)  # type: ignore[arg-type]

    settings = [Settings(max_objects=3, variant=variant) for variant in VARIANTS]
    encoded = [model.encode_image(FRAMES[0], one) for one in settings]
    with patch.object(model.network.text, "forward", counted):
        model.run([Detect(encoded[0], "dog", settings[0])])
        one = len(calls)
        calls.clear()
        model.run([Detect(image, "dog", one) for image, one in zip(encoded, settings, strict=True)])
    assert len(calls) == one
    assert min(calls) == len(VARIANTS)


def test_adapters_decode_alone_if_they_cannot_decode_together(model: LocalModel) -> None:
    asked = requests()
    expected = [content(result) for result in model.run(asked)]
    with patch.object(ModelRunner, "decode_steps", side_effect=torch.OutOfMemoryError("out of memory")):
        assert [content(result) for result in model.run(asked)] == expected


def test_error_in_one_adapter_leaves_the_others(model: LocalModel) -> None:
    heads = model_runner.run_heads

    def failing(*arguments: object) -> object:
        if arguments[-1] is model.get_adapter("second").region:  # type: ignore[union-attr]
            raise RuntimeError("the kernel failed")
        return heads(*arguments)  # type: ignore[arg-type]

    with patch.object(model_runner, "run_heads", failing):
        results = model.run(requests())
    for request, result in zip(requests(), results, strict=True):
        assert isinstance(result, ErrorResult) == (request.settings.variant == "second")
