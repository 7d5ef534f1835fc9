"""Conversations: messages, turns and the `chat` method."""

from __future__ import annotations

import base64
import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import UnsupportedSkill, connect, load
from moondream_cv.conversations import parse_messages
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import ImageError
from moondream_cv.requests import Chat, ErrorResult, Query, Settings, Turn
from tests.engine.test_cuda_graphs import counting_steps, static_model
from tests.engine.test_scheduler import at_calls, failing
from tests.helpers.batch_invariance import assert_same
from tests.helpers.models import random_model
from tests.test_parity import GOLDEN

SETTINGS = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 30, "seed": 3}
FIRST, SECOND = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)) for seed in (0, 1)
)


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return random_model()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def user(text: str, *images: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_messages_become_turns() -> None:
    uri = f"data:image/png;base64,{base64.b64encode(png(FIRST)).decode()}"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Hello."},
        user("What?", uri, FIRST),
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
        {"role": "developer", "content": "In French."},
        {"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "How?"}]},
    ]
    assert parse_messages(messages) == (
        Turn(None, "Hello."),
        Turn("Be brief.\n\nIn French.\n\nWhat?", None, (png(FIRST), FIRST)),
        Turn("Why?", "So."),
        Turn("How?", None, ("a.png",)),
    )


INVALID: list[tuple[Any, str]] = [
    ("What?", "messages must be a list of dicts with role and content, got 'What.'"),
    ([], "at least one message must have the role"),
    (["What?"], "a message must be a dict with a role of system, .* got 'What.'"),
    ([{"role": "robot", "content": "?"}], "a message must be a dict with a role of system"),
    ([{"role": "user", "content": 3}], "must be text or a list of parts, got 3"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "must have the type text or image_url, got {'type': 'audio'}"),
    ([user("?", None)], r"must be a tuple of images that are not None, got \(None,\)"),
    ([user("?", "data:image/png,x")], "a data URI must be in base64"),
    ([user("?", "data:image/png;base64,=x")], "a data URI must be in base64"),
    ([{"role": "user", "content": " "}], "the last user message must have text"),
    ([user("?"), {"role": "assistant", "content": "!"}], "the last message must be a question of the user"),
    ([{**user("?", FIRST), "role": "assistant"}, user("?")], "images are supported in user messages only"),
]


@pytest.mark.parametrize(("messages", "match"), INVALID, ids=[match for _, match in INVALID])
def test_invalid_messages_are_rejected(model: LocalModel, messages: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model.chat(messages)


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ((), "the last turn must have a question"),
        ((Turn("What?", "A cat."),), "the last turn must have a question"),
        ((Turn(" "),), "the question of the last turn"),
        ((Turn("x" * 60_000, "y" * 60_000), Turn("?")), "at most 100000 characters, got 120001"),
        ("What?", "turns must be a tuple of Turn, got 'What.'"),
        (({"role": "user", "content": "What?"},), "turns must be a tuple of Turn, got .* pass messages to the method"),
    ],
)
def test_invalid_chats_are_rejected(turns: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Chat(turns)


@pytest.mark.parametrize("images", ["a.png", FIRST, (None,), None])
def test_turn_rejects_other_values_than_a_tuple_of_images(images: Any) -> None:
    with pytest.raises(ValueError, match="images must be a tuple of images that are not None"):
        Turn("What?", images=images)


def test_chat_without_earlier_turns_equals_a_query(model: LocalModel) -> None:
    settings = Settings.of(SETTINGS)
    for image in (FIRST, None):
        turn = Turn("What?", images=() if image is None else (image,))
        for reasoning in (False, True):
            chat, query = Chat((turn,), reasoning, settings), Query(image, "What?", reasoning, settings=settings)
            assert model.run([chat])[0] == model.run([query])[0]


def test_chat_returns_the_dict_of_the_client(model: LocalModel) -> None:
    messages = [user("What?", FIRST), {"role": "assistant", "content": "A cat."}, user("Why?", SECOND)]
    turns = (Turn("What?", "A cat.", (FIRST,)), Turn("Why?", images=(SECOND,)))
    (expected,) = model.run([Chat(turns, True, Settings.of(SETTINGS))])
    answer, reasoning = expected.answer, expected.reasoning.to_dict()  # type: ignore[union-attr]
    reply = model.chat(messages, settings=SETTINGS, reasoning=True)
    message = {"role": "assistant", "content": answer, "reasoning": reasoning}
    assert reply == {"message": message, "finish_reason": "length" if expected.truncated else "stop"}  # type: ignore[union-attr]
    assert "".join(model.chat(messages, True, SETTINGS, True)["message"]) == answer
    assert model.chat(messages, settings={**SETTINGS, "max_tokens": 2})["finish_reason"] == "length"


def test_each_part_of_a_conversation_changes_the_answer(model: LocalModel) -> None:
    turns = (Turn("What?", "A cat.", (FIRST,)), Turn("Why?", images=(SECOND,)))
    changed = [
        turns,
        (Turn("Who?", "A cat.", (FIRST,)), turns[1]),
        (Turn("What?", "A dog.", (FIRST,)), turns[1]),
        (Turn("What?", "A cat.", (SECOND,)), turns[1]),
        (Turn("What?", "A cat."), turns[1]),
        (turns[0], Turn("Why?", images=(FIRST,))),
        (turns[0], Turn("Why?")),
    ]
    results = model.run([Chat(one, settings=Settings(temperature=0, max_tokens=20)) for one in changed])
    assert len({(result.answer, result.logprob) for result in results}) == len(changed)  # type: ignore[union-attr]


def test_encoded_images_give_the_same_answer(model: LocalModel) -> None:
    turns = (Turn("What?", "A cat.", (FIRST,)), Turn("Why?", images=(SECOND,)))
    chat = Chat(turns, settings=Settings.of(SETTINGS))
    encoded = chat.with_images([model.encode_image(FIRST), SECOND])
    (expected, result) = model.run([chat, encoded])
    assert result == expected
    other = chat.with_images([FIRST, random_model(seed=1).encode_image(SECOND)])
    (failed,) = model.run([other])
    assert isinstance(failed, ErrorResult)
    assert "encoded by another model" in str(failed.error)


def test_repeated_image_is_encoded_once(model: LocalModel, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    path.write_bytes(png(FIRST))
    chat = Chat(
        (Turn("What?", "A cat.", (FIRST, SECOND)), Turn("Why?", images=(FIRST,))), settings=Settings(0, max_tokens=8)
    )
    for image in (FIRST, path):
        images = [image, SECOND, image]
        num_crops: list[int] = []
        hook = model.network.vision.register_forward_pre_hook(lambda _, args, n=num_crops: n.append(len(args[0])))
        (result,) = model.run([chat.with_images(images)])
        hook.remove()
        assert num_crops == [2]  # an image of this size is one crop
        (expected,) = model.run([chat.with_images([image, SECOND, FIRST.copy()])])
        assert_same(model, chat, expected, result)


@pytest.mark.parametrize("calls", [(1,), (2,), (4,), (3, 6)])
def test_out_of_memory_does_not_change_answers(calls: tuple[int, ...]) -> None:
    """The first call of the decoder computes the contexts, and the further ones decode."""
    model = random_model()
    first, second = model.encode_image(FIRST), model.encode_image(SECOND)
    turns = (Turn("What?", "A cat.", (first,)), Turn("Why?", images=(second,)))
    greedy = Settings(temperature=0, max_tokens=20)
    requests = [
        Chat(turns, settings=greedy),
        Chat((turns[1], Turn("How?")), settings=Settings.of(SETTINGS)),
        Query(first, "What?", settings=greedy),
        Chat((turns[1], Turn("How?", images=(FIRST,))), True, Settings.of(SETTINGS)),
    ]
    expected = [model.run([request])[0] for request in requests]
    with failing(model.network.text, at_calls(*calls)) as failed_shapes:
        results = model.run(requests)
    assert len(failed_shapes) == len(calls)
    for request, alone, result in zip(requests, expected, results, strict=True):
        assert not isinstance(result, ErrorResult), result
        assert_same(model, request, alone, result)


def test_steps_with_static_shapes_give_the_same_answers() -> None:
    model = static_model()
    greedy = Settings(temperature=0, max_tokens=20)
    turns = (Turn("What?", "A cat.", (FIRST,)), Turn("Why?", images=(SECOND,)))
    for chat in (Chat(turns, settings=greedy), Chat((turns[0], Turn("Why?")), settings=greedy)):
        with counting_steps() as counts:
            (result,) = model.run([chat])
        assert counts
        assert_same(model, chat, random_model().run([chat])[0], result)


def test_adapter_applies_to_the_whole_conversation() -> None:
    model = load(str(GOLDEN / "mha"), device="cpu", dtype="float32")
    chat = Chat((Turn("What?", "A cat."), Turn("Why?", images=(FIRST,))), settings=Settings(0, max_tokens=8))
    adapted = dataclasses.replace(chat, settings=Settings(0, max_tokens=8, variant=str(GOLDEN / "mha" / "adapter.pt")))
    results = model.run([chat, adapted, chat])
    whole = load(str(GOLDEN / "mha"), device="cpu", dtype="float32", adapter=str(GOLDEN / "mha" / "adapter.pt"))
    assert_same(model, chat, results[0], results[2])
    assert_same(whole, chat, whole.run([chat])[0], results[1])
    assert results[0].logprob != pytest.approx(results[1].logprob, abs=1e-3)  # type: ignore[union-attr]


def test_unreadable_image_fails_its_conversation_only(model: LocalModel) -> None:
    good = Chat((Turn("What?", "A cat.", (FIRST,)), Turn("Why?", images=(SECOND,))), settings=Settings.of(SETTINGS))
    failed, result = model.run([good.with_images([FIRST, b"no image"]), good])
    assert isinstance(failed, ErrorResult)
    assert isinstance(failed.error, ImageError)
    assert not isinstance(result, ErrorResult)


def test_conversation_longer_than_the_context_is_rejected(model: LocalModel) -> None:
    long = {"role": "assistant", "content": "why " * 600}
    for messages, of_images in (
        ([user("What?", *[FIRST] * 8)], r", of which images take 512 \(64 each\)"),
        ([user("What?", FIRST), long, user("Why?")], r", of which images take 64 \(64 each\)"),
        ([user("What?"), long, user("Why?")], ""),
    ):
        with pytest.raises(ValueError, match=rf"at most 512 tokens, got \d+{of_images}; leave out earlier turns"):
            model.chat(messages)


def test_chats_can_be_pickled_and_changed() -> None:
    chat = Chat([Turn("What?", "A cat.", ["a.png"]), Turn("Why?", images=["b.png"])])  # type: ignore[arg-type, list-item]
    assert pickle.loads(pickle.dumps(chat)) == chat
    assert hash(chat) == hash(dataclasses.replace(chat))
    assert (chat.images, chat.image) == (("a.png", "b.png"), "a.png")
    assert chat.with_images(["c.png", "d.png"]).images == ("c.png", "d.png")
    with pytest.raises(ValueError, match="the conversation has 2 images, got 1"):
        chat.with_images(["c.png"])


def test_remote_models_reject_conversations() -> None:
    remote = connect("http://localhost:9", dialect="moondream")  # sends no request
    with pytest.raises(UnsupportedSkill, match="cannot continue a conversation; use a model from"):
        remote.chat([user("What?")])
