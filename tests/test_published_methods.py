"""Methods of the published model: names, order of arguments, and defaults."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moondream_cv.backends.base import RemoteModel
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import ImageError
from moondream_cv.hf import MoondreamForCausalLM, MoondreamHfConfig
from moondream_cv.vision_model import PublishedMethods
from tests.helpers.small_checkpoint import byte_tokenizer, small_config

REQUIRED = inspect.Parameter.empty
KEYWORDS = "**"

# From the published code of 2025-06-19, without `self`. Its default of `unstable_settings` is an empty dict.
# `load_encoded_image` is missing: it only writes to the KV cache of the published model.
MODEL: dict[str, dict[str, Any]] = {
    "caption": {"image": REQUIRED, "length": "normal", "stream": False, "settings": None},
    "query": {
        "image": None,
        "question": None,
        "reasoning": False,
        "spatial_refs": None,
        "stream": False,
        "settings": None,
    },
    "detect": {"image": REQUIRED, "object": REQUIRED, "settings": None},
    "point": {"image": REQUIRED, "object": REQUIRED, "settings": None},
    "detect_gaze": {"image": REQUIRED, "eye": None, "face": None, "unstable_settings": None},
    "answer_question": {
        "image_embeds": REQUIRED,
        "question": REQUIRED,
        "tokenizer": None,
        "chat_history": "",
        "result_queue": None,
        "max_new_tokens": 256,
        "kwargs": KEYWORDS,
    },
    "batch_answer": {"images": REQUIRED, "prompts": REQUIRED, "tokenizer": None, "kwargs": KEYWORDS},
}
LOCAL: dict[str, dict[str, Any]] = {"encode_image": {"image": REQUIRED, "settings": None}, "compile": {}}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "generate": {
        "image_embeds": REQUIRED,
        "prompt": REQUIRED,
        "tokenizer": REQUIRED,
        "max_new_tokens": 128,
        "kwargs": KEYWORDS,
    },
    "get_input_embeddings": {},
    "set_input_embeddings": {"value": REQUIRED},
    "input_embeds": {"input_ids": REQUIRED},
}
CASES = [
    *(
        (kind, MODEL, name)
        for kind in (PublishedMethods, LocalModel, RemoteModel, MoondreamForCausalLM)
        for name in MODEL
    ),
    *((kind, LOCAL, name) for kind in (LocalModel, MoondreamForCausalLM) for name in LOCAL),
    *((MoondreamForCausalLM, TRANSFORMERS, name) for name in TRANSFORMERS),
]


@pytest.mark.parametrize(("kind", "published", "name"), CASES, ids=lambda v: getattr(v, "__name__", str(v)[:20]))
def test_signature_starts_with_the_published_one(kind: type, published: dict[str, Any], name: str) -> None:
    parameters = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
    expected = published[name]
    for ours, (argument, default) in zip(parameters, expected.items(), strict=False):
        assert ours.name == argument
        if default is KEYWORDS:
            assert ours.kind is inspect.Parameter.VAR_KEYWORD
        else:
            assert ours.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            assert ours.default == default
    assert len(parameters) >= len(expected)
    for extra in parameters[len(expected) :]:
        optional = extra.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        assert optional or extra.default is not REQUIRED


def test_settings_are_accepted_by_position(model: LocalModel, frame: np.ndarray) -> None:
    one = {"max_objects": 1}
    assert model.detect(frame, "dog", one) == model.detect(frame, "dog", settings=one)
    assert len(model.detect(frame, "dog", one)["objects"]) <= 1
    assert model.point(frame, "dog", one) == model.point(frame, "dog", settings=one)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, f: m.caption(f, "short", {"max_tokens": 1}),
        lambda m, f: m.query(f, "what?", {"max_tokens": 1}),
        lambda m, f: m.query(f, "what?", False, None, {"max_tokens": 1}),
        lambda m, f: m.detect(f, "dog", None, {"max_objects": 1}),
        lambda m, f: m.point(f, "dog", None, {"max_objects": 1}),
    ],
)
def test_settings_in_the_position_of_a_flag_are_rejected(
    model: LocalModel, frame: np.ndarray, call: Callable[[LocalModel, np.ndarray], Any]
) -> None:
    with pytest.raises(ValueError, match=r"(stream|reasoning) must be True or False, got \{.*settings=\{'max_"):
        call(model, frame)


@pytest.mark.parametrize("stream", ["yes", 1, None])
def test_flags_must_be_booleans(model: LocalModel, frame: np.ndarray, stream: Any) -> None:
    with pytest.raises(ValueError, match="stream must be True or False, got"):
        model.caption(frame, "short", stream)


def test_stream_in_the_third_position_is_rejected(model: LocalModel, frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match="settings must be a mapping"):
        model.detect(frame, "dog", True)  # type: ignore[arg-type]


@pytest.mark.slow
def test_answer_question_returns_and_queues_the_answer(model: LocalModel, frame: np.ndarray) -> None:
    torch.manual_seed(0)
    expected = model.query(frame, "what?")["answer"].strip()
    answers: queue.Queue[str] = queue.Queue()
    torch.manual_seed(0)
    assert model.answer_question(frame, "what?", None, "earlier text", answers, 3, num_beams=4) == expected
    assert answers.get_nowait() == expected


@pytest.mark.slow
def test_batch_answer_returns_one_answer_per_image(model: LocalModel, frame: np.ndarray) -> None:
    torch.manual_seed(0)
    expected = []
    for image, prompt in ((frame, "what?"), (frame[::-1], "where?")):
        expected.append(model.query(image, prompt)["answer"].strip())
    torch.manual_seed(0)
    assert model.batch_answer([frame, frame[::-1]], ["what?", "where?"], None, num_beams=4) == expected


def test_batch_answer_needs_as_many_prompts_as_images(model: LocalModel, frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must have the same length, got 1 and 2"):
        model.batch_answer([frame], ["what?", "where?"])
    with pytest.raises(ImageError):
        model.batch_answer(["missing.png"], ["what?"])
    assert model.batch_answer([], []) == []


@pytest.fixture(scope="module")
def hf_model() -> MoondreamForCausalLM:
    model = MoondreamForCausalLM(MoondreamHfConfig(**small_config().to_dict()))
    model.tokenizer = byte_tokenizer()
    return model.eval()


def test_generate_answers_the_published_prompt(hf_model: MoondreamForCausalLM) -> None:
    image = Image.new("RGB", (40, 30), "red")
    torch.manual_seed(0)
    expected = hf_model.query(image, "a\nb?")["answer"]
    torch.manual_seed(0)
    assert hf_model.generate(image, "<image>\n\nQuestion: a\nb?\n\nAnswer:", None) == [expected]
    with pytest.raises(ValueError, match=r"prompt must have the form '<image>.*got 'a\?'"):
        hf_model.generate(image, "a?", None)


def test_input_embeddings_share_memory(hf_model: MoondreamForCausalLM) -> None:
    wte = hf_model.model.text.wte
    embeddings = hf_model.get_input_embeddings()
    assert embeddings.weight is wte
    ids = [[1, 2, 3]]
    assert torch.equal(hf_model.input_embeds(ids), wte[torch.tensor(ids)])
    assert torch.equal(embeddings(torch.tensor(ids)), wte[torch.tensor(ids)])
    with pytest.raises(ValueError, match=r"must have the shape \[272, 64\], got \[3, 64\]"):
        hf_model.set_input_embeddings(torch.nn.Embedding(3, 64))
    other = torch.nn.Embedding(*wte.shape)
    hf_model.set_input_embeddings(other)
    assert torch.equal(hf_model.input_embeds([5]), other.weight[[5]])
