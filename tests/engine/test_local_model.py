"""`LocalModel`: streaming, encoded images, limits, threads and errors. `test_parity.py` compares replies."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moondream_cv import load
from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import ImageError, MoondreamError
from moondream_cv.requests import (
    Caption,
    Detect,
    DetectResult,
    ErrorResult,
    Gaze,
    GazeResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Settings,
)
from moondream_cv.vision_model import VisionModel
from tests.helpers.models import random_model

GREEDY = {"temperature": 0, "max_tokens": 12}


def test_local_model_is_a_vision_model(model: LocalModel) -> None:
    assert isinstance(model, VisionModel)
    assert model.has_scores
    assert model.skills == {"detect", "point", "query", "caption", "gaze"}


def test_encoded_image_gives_the_replies_of_its_image(model: LocalModel, frame: np.ndarray) -> None:
    encoded = model.encode_image(frame)
    assert isinstance(encoded, EncodedImage)
    assert encoded.size == (320, 240)
    assert model.encode_image(encoded) is encoded
    for ask in (
        lambda image: model.detect(image, "dog"),
        lambda image: model.point(image, "dog"),
        lambda image: model.caption(image, settings=GREEDY),
        lambda image: model.query(image, "What?", settings=GREEDY),
        lambda image: model.detect_gaze(image, eye=(0.5, 0.5)),
    ):
        assert ask(encoded) == ask(frame)


def test_encoded_image_rejects_other_settings(model: LocalModel, frame: np.ndarray) -> None:
    encoded = model.encode_image(frame, settings={"max_crops": 1})
    assert encoded.tiling == (1, 1)
    model.detect(encoded, "dog", settings={"max_crops": 1})
    with pytest.raises(ValueError, match="max_crops=1, not 4"):
        model.detect(encoded, "dog", settings={"max_crops": 4})
    with pytest.raises(ValueError, match="another model"):
        random_model(seed=1).detect(encoded, "dog")


def test_streamed_pieces_concatenate_to_the_reply(model: LocalModel, frame: np.ndarray) -> None:
    settings = {"temperature": 0, "max_tokens": 40}
    whole = model.caption(frame, settings=settings)["caption"]
    assert "".join(model.caption(frame, stream=True, settings=settings)["caption"]) == whole
    answer = model.query(frame, "What?", settings=settings)["answer"]
    assert "".join(model.query(frame, "What?", stream=True, settings=settings)["answer"]) == answer
    few = {"max_objects": 4}
    objects = model.detect(frame, "dog", settings=few)["objects"]
    assert list(model.detect(frame, "dog", stream=True, settings=few)["objects"]) == objects
    assert (
        list(model.point(frame, "dog", stream=True, settings=few)["points"])
        == model.point(frame, "dog", settings=few)["points"]
    )


def test_streamed_reasoning_comes_first(model: LocalModel, frame: np.ndarray) -> None:
    whole = model.query(frame, "What?", reasoning=True, settings=GREEDY)
    streamed = model.query(frame, "What?", reasoning=True, stream=True, settings=GREEDY)
    assert streamed["reasoning"] == whole["reasoning"]
    assert "".join(streamed["answer"]) == whole["answer"]


def test_objects_are_streamed_as_they_are_found(model: LocalModel, frame: np.ndarray) -> None:
    stream = model.stream(Detect(frame, "dog", Settings(max_objects=10_000)))
    assert next(stream).confidence > 0  # long before the list is complete


def test_text_results_have_a_mean_log_probability(model: LocalModel, frame: np.ndarray) -> None:
    """Compare with the distributions of the network, computed token by token."""
    logits: list[torch.Tensor] = []
    hook = model.network.text.lm_head.register_forward_hook(lambda _module, _args, output: logits.append(output[0]))
    reply = model.caption(frame, "short", settings={"temperature": 0, "max_tokens": 5})
    hook.remove()
    banned = [model.config.tokenizer.answer_id]
    steps = [logits[0], *(row.index_fill(0, torch.tensor(banned), -torch.inf) for row in logits[1:5])]
    best = [float(row.log_softmax(-1).max()) for row in steps]
    assert reply["truncated"]
    assert reply["logprob"] == pytest.approx(sum(best) / 5, abs=1e-4)
    assert model.query(frame, "What?", settings=GREEDY)["logprob"] < 0
    assert "logprob" not in model.detect(frame, "dog", settings={"max_objects": 1})


def test_max_objects_truncates_the_list(model: LocalModel, frame: np.ndarray) -> None:
    reply = model.detect(frame, "dog", settings={"max_objects": 2})
    assert len(reply["objects"]) == 2
    assert reply["truncated"]


def test_full_context_truncates_an_endless_list(model: LocalModel, frame: np.ndarray) -> None:
    reply = model.point(frame, "dog", settings={"max_objects": 100_000})
    assert reply["truncated"]
    room = model.config.text.max_context - model.config.prefix_length
    assert room / 2 - 10 < len(reply["points"]) < room / 2


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_truncates_the_text(model: LocalModel, frame: np.ndarray, max_tokens: int) -> None:
    result = model.run([Query(frame, "What?", settings=Settings(temperature=0, max_tokens=max_tokens))])[0]
    assert isinstance(result, QueryResult)
    assert result.truncated
    assert result.logprob is not None
    assert result.logprob < 0


@pytest.mark.slow
def test_full_context_truncates_an_endless_text(model: LocalModel) -> None:
    result = model.run([Query(None, "What?", settings=Settings(temperature=0, max_tokens=100_000))])[0]
    assert isinstance(result, QueryResult)
    assert result.truncated


@pytest.mark.slow
def test_reasoning_leaves_context_for_the_answer(model: LocalModel, frame: np.ndarray) -> None:
    settings = Settings(temperature=0, max_tokens=100_000)
    result = model.run([Query(frame, "What?", reasoning=True, settings=settings)])[0]
    assert isinstance(result, QueryResult)
    assert result.truncated
    assert result.reasoning is not None
    assert result.answer


def test_prompt_longer_than_the_context_raises(model: LocalModel, frame: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"the prompt must have at most \d+ tokens, got \d+; .* context has 512 tokens"
    ):
        model.detect(frame, "dog " * 600)


def test_seed_makes_sampling_repeatable(model: LocalModel, frame: np.ndarray) -> None:
    def sample(seed: int) -> str:
        settings = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 12, "seed": seed}
        return str(model.caption(frame, settings=settings)["caption"])

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_sampling_does_not_change_the_global_generator(model: LocalModel, frame: np.ndarray) -> None:
    state = torch.get_rng_state()
    model.caption(frame, settings={"temperature": 1.0, "max_tokens": 3, "seed": 0})
    assert torch.equal(state, torch.get_rng_state())


def test_failed_request_gets_an_error_result_in_order(model: LocalModel, frame: np.ndarray, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.png")
    requests = [Detect(frame, "dog"), Detect(missing, "dog"), Point(missing, "dog"), Point(frame, "dog " * 600)]
    first, second, third, fourth = model.run(requests)
    assert isinstance(first, DetectResult)
    for failed in (second, third):
        assert isinstance(failed, ErrorResult)
        assert isinstance(failed.error, ImageError)
    assert isinstance(fourth, ErrorResult)
    assert isinstance(fourth.error, ValueError)


def test_each_image_is_encoded_once(model: LocalModel, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encoder = model.network.vision.forward
    monkeypatch.setattr(model.network.vision, "forward", lambda *args: calls.append(len(args[0])) or encoder(*args))
    few = Settings(max_objects=1, max_tokens=1)
    model.run([Detect(frame, "dog", few), Point(frame, "cat", few), Caption(frame, "short", few)])
    assert len(calls) == 1


def test_concurrent_calls_give_the_same_replies(model: LocalModel, frame: np.ndarray) -> None:
    images = [np.roll(frame, 20 * i, axis=1) for i in range(4)]
    alone = [model.detect(image, "dog", settings={"max_objects": 3}) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: model.detect(image, "dog", settings={"max_objects": 3}), images * 2))
    assert together == alone * 2


def test_forced_gaze_returns_a_point(model: LocalModel, frame: np.ndarray) -> None:
    forced = model.run([Gaze(frame, (0.4, 0.3), force=True)])[0]
    assert isinstance(forced, GazeResult)
    assert forced.gaze is not None
    assert 0 <= forced.gaze.x < 1
    reply = model.detect_gaze(frame, eye=(0.4, 0.3), unstable_settings={"force_detect": True})
    assert reply["gaze"] == {"x": forced.gaze.x, "y": forced.gaze.y}


def test_accurate_gaze_is_repeatable_and_averages_mirror_images(model: LocalModel, frame: np.ndarray) -> None:
    options = {"prioritize_accuracy": True, "force_detect": True, "seed": 3}
    face = {"x_min": 0.3, "y_min": 0.2, "x_max": 0.5, "y_max": 0.4}
    state = random.getstate()
    reply = model.detect_gaze(frame, face=face, unstable_settings=options)
    assert reply == model.detect_gaze(frame, face=face, unstable_settings=options)
    assert random.getstate() == state
    mirror = Image.fromarray(frame[:, ::-1, ::-1])
    encoded = model.encode_image(frame)
    given = model.detect_gaze(
        encoded, face=face, unstable_settings={**options, "flip_enc_img": model.encode_image(mirror)}
    )
    assert given == reply
    with pytest.raises(ValueError, match="face must be a box"):
        model.detect_gaze(frame, unstable_settings=options)
    with pytest.raises(ValueError, match="eye must be \\(x, y\\)"):
        model.detect_gaze(frame)


def test_points_have_a_confidence(model: LocalModel, frame: np.ndarray) -> None:
    result = model.run([Point(frame, "dog", Settings(max_objects=5))])[0]
    assert isinstance(result, PointResult)
    assert all(0 < p.confidence < 1 for p in result.points)
    assert len({p.confidence for p in result.points}) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, f: m.detect(f, ""), "object must not be empty, got ''"),
        (lambda m, f: m.detect(f, "  "), "object must not be empty"),
        (lambda m, f: m.detect(f, 3), "object must be a string, got int"),
        (lambda m, f: m.detect(f, "x" * 200_000), "at most 100000 characters, got 200000"),
        (lambda m, f: m.detect(f, "\ud800"), "must be valid Unicode"),
        (lambda m, f: m.query(f), "question must be a string"),
        (lambda m, f: m.query(f, None), "question must be a string"),
        (lambda m, f: m.query(None, "What?", spatial_refs=[(0.1, 0.2)]), "image=None"),
        (lambda m, f: m.query(f, "What?", spatial_refs=[(0.1,)]), "2 or 4 numbers, got 1"),
        (lambda m, f: m.query(f, "What?", spatial_refs=[(0.1, 1.2)]), "fractions between 0 and 1"),
        (lambda m, f: m.query(f, "What?", spatial_refs=[(0.5, 0.5, 0.1, 0.9)]), "positive area"),
        (lambda m, f: m.query(f, "What?", spatial_refs=[("a", "b")]), "spatial reference"),
        (lambda m, f: m.caption(f, "medium"), "length must be one of short, normal, long, got 'medium'"),
        (lambda m, f: m.caption(None), "needs an image"),
        (lambda m, f: m.caption(f, settings={"temprature": 1}), "unknown settings \\['temprature'\\]"),
        (lambda m, f: m.caption(f, settings={"temperature": -1}), "temperature must be"),
        (lambda m, f: m.caption(f, settings={"temperature": float("nan")}), "temperature must be"),
        (lambda m, f: m.caption(f, settings={"top_p": 1.5}), "top_p must be"),
        (lambda m, f: m.detect(f, "dog", settings={"max_objects": 0}), "max_objects must be"),
        (lambda m, f: m.detect(f, "dog", settings={"max_crops": 0}), "max_crops must be"),
        (lambda m, f: m.detect(f, "dog", settings=3), "settings must be a mapping"),
    ],
)
def test_invalid_arguments_raise_with_the_argument_name(
    model: LocalModel, frame: np.ndarray, call: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, frame)


def test_closed_model_raises(frame: np.ndarray) -> None:
    with random_model() as opened:
        opened.detect(frame, "dog", settings={"max_objects": 1})
    opened.close()
    with pytest.raises(MoondreamError, match="is closed"):
        opened.detect(frame, "dog")


def test_compile_on_a_cpu_raises(model: LocalModel) -> None:
    with pytest.raises(MoondreamError, match=r"compile\(\) needs a CUDA device, and this model is on 'cpu'; omit"):
        model.compile()


@pytest.mark.slow
def test_compile_compiles_the_encoder_only(frame: np.ndarray) -> None:
    model, plain = random_model(), random_model()
    compiled: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(len(inputs))
        return module.forward

    assert model._compile_encoder(backend=backend) > 0
    warmed_up = len(compiled)
    assert 1 <= warmed_up <= 3  # one crop, several crops
    for image in (frame, frame[:40], np.tile(frame, (1, 3, 1))):  # other numbers of crops
        assert model.detect(image, "dog", {"max_objects": 3}) == plain.detect(image, "dog", {"max_objects": 3})
    assert len(compiled) == warmed_up


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compile_on_a_gpu(frame: np.ndarray) -> None:
    model, plain = (load("tiny", device="cuda") for _ in range(2))
    assert model.compile() > 0
    torch.testing.assert_close(
        model.encode_image(frame).features, plain.encode_image(frame).features, atol=1e-3, rtol=1e-3
    )
