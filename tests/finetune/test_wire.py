"""Test the checks of requests, ground truth, rollouts and groups, and the signatures of rollouts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from moondream_cv.finetune.groups import (
    MAX_GROUPS,
    AnswerTarget,
    DetectTarget,
    PointTarget,
    ReinforcementItem,
    SupervisedItem,
    parse_groups,
    parse_target,
)
from moondream_cv.finetune.signed_rollouts import Rollout, parse_rollout, sign, verify
from moondream_cv.finetune.values import MAX_REGIONS
from moondream_cv.finetune.wire import (
    GroundTruth,
    RolloutSettings,
    parse_ground_truth,
    parse_num_rollouts,
    parse_reasoning,
    parse_request,
)
from moondream_cv.requests import Detect, Grounding, Point, Query, Reasoning, Settings

KEY = bytes(range(32))
DIGEST = b"digest of the pixels"
IMAGE = Image.new("RGB", (4, 4))
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.6}
DETECT = {"skill": "detect", "image": IMAGE, "object": "cat"}
POINT = {"skill": "point", "image": IMAGE, "object": "cat"}
QUERY = {"skill": "query", "image": IMAGE, "question": "How many cats?"}

ROLLOUTS = {
    "detect": Rollout(
        skill="detect",
        finish_reason="stop",
        output={"objects": [BOX]},
        coords=(0.2, 0.4),
        sizes=((0.2, 0.4),),
        log_probs=(-0.0, -1.25, -3.5),
    ),
    "point": Rollout("point", "length", {"points": [{"x": 1, "y": 0.25}]}, coords=(1.0, 0.25), log_probs=(-1.0, -2.0)),
    "query": Rollout(
        "query",
        "stop",
        {
            "reasoning": {"text": "Two.", "grounding": [{"start_idx": 0, "end_idx": 3, "points": [[0.5, -0.1]]}]},
            "answer": "2",
        },
        answer_tokens=(17, 1),
        thinking_tokens=(5, 6),
        has_answer_separator=True,
        coords=(0.5, -0.1),
        log_probs=(-0.5, -0.25),
    ),
}
REQUESTS = {"detect": DETECT, "point": POINT, "query": {**QUERY, "reasoning": True}}


def signed(skill: str = "detect", finetune_id: str = "ft1") -> Rollout:
    rollout = ROLLOUTS[skill]
    signature = sign(KEY, finetune_id, parse_request(REQUESTS[skill]), rollout, DIGEST)
    return dataclasses.replace(rollout, signature=signature)


def rl_group(**changed: object) -> dict[str, Any]:
    return {"mode": "rl", "request": DETECT, "rollouts": [signed().to_dict()] * 2, "rewards": [0.5, 1], **changed}


def sft_group(**changed: object) -> dict[str, Any]:
    return {"mode": "sft", "request": DETECT, "target": {"boxes": [BOX]}, **changed}


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


# Requests


def test_request_defaults_are_those_of_the_hosted_service() -> None:
    assert parse_request(DETECT).settings == RolloutSettings(1.0, 1.0, max_objects=50)
    assert parse_request(POINT).settings == RolloutSettings(1.0, 1.0, max_objects=50)
    assert parse_request(QUERY).settings == RolloutSettings(1.0, 1.0, max_tokens=128)
    assert parse_request({**QUERY, "reasoning": True}).settings == RolloutSettings(1.0, 1.0, max_tokens=256)


def test_request_to_the_model_samples_with_the_settings_and_the_seed() -> None:
    detect = parse_request({**DETECT, "settings": {"temperature": 0.7, "top_p": 0.9, "max_objects": 3}})
    sampled = Settings(temperature=0.7, top_p=0.9, max_objects=3, seed=5, sample_regions=True)
    assert detect.to_request(5) == Detect(IMAGE, "cat", sampled)
    regions = Settings(temperature=1.0, top_p=1.0, max_objects=50, seed=6, sample_regions=True)
    assert parse_request(POINT).to_request(6) == Point(IMAGE, "cat", regions)
    text = Settings(temperature=1.0, top_p=1.0, max_tokens=256, seed=0, sample_regions=True)
    query = parse_request({**QUERY, "reasoning": True, "spatial_refs": [[0.1, 0.2], (0.1, 0.2, 0.3, 0.4)]})
    refs = ((0.1, 0.2), (0.1, 0.2, 0.3, 0.4))
    assert query.to_request(0) == Query(IMAGE, "How many cats?", True, refs, text)


@pytest.mark.parametrize("image", ["photo.jpg", b"bytes of a file", np.zeros((2, 2, 3), np.uint8), IMAGE])
def test_request_passes_the_image_on(image: object) -> None:
    request = parse_request({**DETECT, "image": image})
    assert request.image is image
    assert request.to_request(0).image is image


def test_request_ignores_none_and_arguments_without_effect() -> None:
    """The client's methods have the arguments of all skills, with None, False or an empty list as the default."""
    arguments = {"question": None, "settings": None, "spatial_refs": [], "reasoning": False}
    assert parse_request({**DETECT, **arguments}) == parse_request(DETECT)
    question = {"skill": "query", "question": "Why?", "image": None, "object": None}
    assert parse_request(question).to_request(0).image is None


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_request_dict_is_json_that_parses_to_the_same_request(request_: dict[str, Any]) -> None:
    request = parse_request({**request_, "settings": {"temperature": 0.5}})
    sent = json.loads(json.dumps(request.to_dict()))
    assert parse_request({**sent, "image": IMAGE}) == request


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("detect", r"^request must be an object with named values, got str: 'detect'"),
        ({}, r"^request\.skill must be one of query, point, detect, got None"),
        ({**DETECT, "skill": "caption"}, r"^request\.skill must be one of .*, got 'caption'"),
        ({**DETECT, "objects": "cat"}, r"^request has keys that are not allowed: \['objects'\]; allowed keys: skill, "),
        ({**DETECT, "question": "Why?"}, r"not allowed: \['question'\]"),
        ({**QUERY, "object": "cat"}, r"not allowed: \['object'\]"),
        ({**DETECT, 5: 6}, r"not allowed: \[5\]"),
        ({"skill": "detect", "image": IMAGE}, r"^request\.object is missing; got the keys"),
        ({"skill": "detect", "object": "cat"}, r"^request\.image is missing; detect needs an image"),
        ({**DETECT, "object": " "}, r"^request\.object must not be empty"),
        ({**DETECT, "object": 5}, r"^request\.object must be a string, got int"),
        ({**QUERY, "question": "\ud800"}, r"^request\.question must be valid Unicode text"),
        ({**QUERY, "question": "a" * 100_001}, r"^request\.question must have at most 100,000 characters, got 100,001"),
        ({**DETECT, "reasoning": True}, r"^request\.reasoning is only for query, got True for detect"),
        ({**POINT, "spatial_refs": [[0.1, 0.2]]}, r"^request\.spatial_refs is only for query"),
        ({**QUERY, "reasoning": 1}, r"^request\.reasoning must be True or False, got 1"),
        ({**QUERY, "image": None, "spatial_refs": [[0, 1]]}, r"^request\.spatial_refs need an image"),
        ({**QUERY, "spatial_refs": [[0, 1], [0, 1, 2]]}, r"^request\.spatial_refs\[1\] must be .*, got 3 numbers"),
        ({**QUERY, "spatial_refs": [[0, 10**400]]}, r"^request\.spatial_refs\[0\]\[1\] must be between 0 and 1"),
        ({**QUERY, "spatial_refs": [[0.5, 0, 0.5, 1]]}, r"^request\.spatial_refs\[0\] must have a positive area"),
        ({**DETECT, "settings": 1.0}, r"^request\.settings must be an object"),
        ({**DETECT, "settings": {"max_tokens": 5}}, r"^request\.settings has keys .*: \['max_tokens'\]; .*max_objects"),
        ({**QUERY, "settings": {"max_objects": 5}}, r"^request\.settings has keys .*: \['max_objects'\]; .*max_tokens"),
        ({**QUERY, "settings": {"variant": "a"}}, r"^request\.settings has keys .*: \['variant'\]"),
        (
            {**DETECT, "settings": {"temperature": 0}},
            r"^request\.settings\.temperature must be at least 0\.01, got 0; ",
        ),
        ({**DETECT, "settings": {"temperature": math.nan}}, r"^request\.settings\.temperature must be a finite number"),
        ({**DETECT, "settings": {"temperature": True}}, r"^request\.settings\.temperature must be a finite number"),
        ({**DETECT, "settings": {"top_p": 0}}, r"^request\.settings\.top_p must be above 0 and at most 1, got 0"),
        ({**DETECT, "settings": {"max_objects": 0}}, r"^request\.settings\.max_objects must be an integer of at least"),
        ({**QUERY, "settings": {"max_tokens": 1.5}}, r"^request\.settings\.max_tokens must be an integer"),
    ],
)
def test_wrong_requests_are_errors_with_the_path(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_request(value)


def test_number_of_rollouts_is_1_to_16() -> None:
    assert [parse_num_rollouts(number) for number in (1, 16, np.int64(4))] == [1, 16, 4]
    for wrong in (0, 17, 1.0, True, "4", None):
        with pytest.raises(ValueError, match="num_rollouts must be an integer between 1 and 16, got"):
            parse_num_rollouts(wrong)


# Ground truth and targets


def test_ground_truth_is_points_or_boxes_in_either_form() -> None:
    box = (0.1, 0.2, 0.3, 0.6)
    assert parse_ground_truth({"boxes": [BOX, list(box)]}, "detect") == GroundTruth(boxes=(box, box))
    assert parse_ground_truth({"boxes": np.array([box]), "points": None}, "point") == GroundTruth(boxes=(box,))
    points = [{"x": 0.1, "y": 1}, (0, 0.2)]
    assert parse_ground_truth({"points": points}, "point") == GroundTruth(points=((0.1, 1.0), (0.0, 0.2)))
    assert parse_ground_truth({"points": []}, "point") == GroundTruth(points=())
    assert parse_ground_truth({"boxes": np.zeros((0, 4))}, "detect") == GroundTruth(boxes=())


@pytest.mark.parametrize(
    ("value", "skill", "message"),
    [
        ({"boxes": []}, "query", r"^ground_truth is only for point and detect, got a request for query"),
        ({"points": []}, "detect", r"^ground_truth has keys that are not allowed: \['points'\]; allowed keys: boxes"),
        ({}, "detect", r"^ground_truth must have exactly one of the keys boxes, got \[\]"),
        ({"points": [], "boxes": []}, "point", r"^ground_truth must have exactly one of the keys points and boxes"),
        ([BOX], "detect", r"^ground_truth must be an object"),
        ({"boxes": BOX}, "detect", r"^ground_truth\.boxes must be a list, got dict"),
        ({"boxes": [{**BOX, "confidence": 1}]}, "detect", r"^ground_truth\.boxes\[0\] has keys .*: \['confidence'\]"),
        ({"boxes": [{"x_min": 0}]}, "detect", r"^ground_truth\.boxes\[0\]\.y_min is missing"),
        ({"boxes": [BOX, [0, 0, 1]]}, "detect", r"^ground_truth\.boxes\[1\] must have 4 items, got 3"),
        ({"boxes": ["0011"]}, "detect", r"^ground_truth\.boxes\[0\] must be \[x_min, y_min, x_max, y_max\] or"),
        (
            {"boxes": [[0, 0, 1.5, 1]]},
            "detect",
            r"^ground_truth\.boxes\[0\]\[2\] must be .* 1, got 1\.5; divide pixels by",
        ),
        ({"boxes": [{**BOX, "x_max": 0.1}]}, "detect", r"^ground_truth\.boxes\[0\] must have a positive area"),
        ({"boxes": [[0.2, 0.2, 0.1, 0.1]]}, "detect", r"^ground_truth\.boxes\[0\] must have a positive area"),
        ({"points": [[0.5, math.nan]]}, "point", r"^ground_truth\.points\[0\]\[1\] must be between 0 and 1, got nan"),
        (
            {"points": [{"x": 0, "y": True}]},
            "point",
            r"^ground_truth\.points\[0\]\.y must be between 0 and 1, got True",
        ),
        (
            {"points": [[0, 0]] * (MAX_REGIONS + 1)},
            "point",
            r"^ground_truth\.points must have 0 to 1,000 items, got 1,001",
        ),
    ],
)
def test_wrong_ground_truth_is_an_error_with_the_path(value: object, skill: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_ground_truth(value, skill)


def test_targets_of_each_skill() -> None:
    box = (0.1, 0.2, 0.3, 0.6)
    assert parse_target({"boxes": [BOX]}, "detect") == DetectTarget((box,))
    assert parse_target({"boxes": []}, "detect") == DetectTarget(())
    assert parse_target({"points": [[0.1, 0.2]]}, "point") == PointTarget(((0.1, 0.2),))
    assert parse_target({"points": []}, "point") == parse_target({"boxes": []}, "point") == PointTarget(())
    (center,) = parse_target({"boxes": [[0.1, 0.2, 0.3, 0.6]]}, "point").points
    assert center == pytest.approx((0.2, 0.4))
    assert parse_target({"answer": "2"}, "query") == AnswerTarget("2")
    reasoning = {"text": "Two.", "grounding": [{"start_idx": 0, "end_idx": 4, "points": [[0.5, 1]]}]}
    expected = Reasoning("Two.", (Grounding(0, 4, ((0.5, 1.0),)),))
    assert parse_target({"answer": "2", "reasoning": reasoning}, "query") == AnswerTarget("2", expected)
    assert parse_target({"answer": "2", "reasoning": "Two."}, "query") == AnswerTarget("2", Reasoning("Two."))
    assert parse_reasoning(expected.to_dict()) == expected


@pytest.mark.parametrize(
    ("value", "skill", "message"),
    [
        ({}, "query", r"^target\.answer is missing"),
        ({"answer": ""}, "query", r"^target\.answer must not be empty"),
        ({"answer": "2", "boxes": []}, "query", r"^target has keys that are not allowed: \['boxes'\]"),
        ({"answer": "2", "reasoning": 5}, "query", r"^target\.reasoning must be an object"),
        ({"answer": "2", "reasoning": {}}, "query", r"^target\.reasoning\.text is missing"),
        (
            {"answer": "2", "reasoning": {"text": "a", "grounding": [{"start_idx": 0, "end_idx": 2, "points": []}]}},
            "query",
            r"^target\.reasoning\.grounding\[0\] must have start_idx <= end_idx <= 1, .*got 0 and 2",
        ),
        ({"points": [[0.1, 0.2]]}, "detect", r"^target has keys that are not allowed: \['points'\]"),
        ({"answer": "2"}, "point", r"^target has keys that are not allowed: \['answer'\]"),
    ],
)
def test_wrong_targets_are_errors_with_the_path(value: object, skill: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_target(value, skill)


# Groups


def test_groups_become_items_in_their_order() -> None:
    second = {"boxes": []}
    sft = sft_group(targets=[{"boxes": [BOX]}, second])
    del sft["target"]
    first, *rest, last = parse_groups([rl_group(), sft, sft_group()])
    assert isinstance(first, ReinforcementItem)
    assert (first.path, first.request, first.rewards) == ("groups[0]", parse_request(DETECT), (0.5, 1.0))
    assert first.rollouts == (signed(), signed())
    assert [(item.path, item.target) for item in rest] == [
        ("groups[1].targets[0]", DetectTarget(((0.1, 0.2, 0.3, 0.6),))),
        ("groups[1].targets[1]", DetectTarget(())),
    ]
    assert last == SupervisedItem("groups[2].target", parse_request(DETECT), DetectTarget(((0.1, 0.2, 0.3, 0.6),)))


def test_one_rollout_is_a_valid_group() -> None:
    (item,) = parse_groups([rl_group(rollouts=[signed().to_dict()], rewards=[-3])])
    assert item.rewards == (-3.0,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^groups must have 1 to 64 items, got 0"),
        ([sft_group()] * 1000, r"^groups must have 1 to 64 items, got 1,000"),
        (sft_group(), r"^groups must be a list, got dict"),
        (["rl"], r"^groups\[0\] must be an object"),
        ([sft_group(), {"request": DETECT}], r"^groups\[1\]\.mode must be one of rl, sft, got None"),
        ([sft_group(mode="dpo")], r"^groups\[0\]\.mode must be one of rl, sft, got 'dpo'"),
        ([sft_group(rewards=[])], r"^groups\[0\] has keys that are not allowed: \['rewards'\]"),
        ([rl_group(target={})], r"^groups\[0\] has keys that are not allowed: \['target'\]"),
        ([rl_group(request={})], r"^groups\[0\]\.request\.skill must be one of"),
        ([rl_group(rewards=None)], r"^groups\[0\]\.rewards is missing"),
        (
            [rl_group()] * 2 + [rl_group(rewards=[math.nan, 1])],
            r"^groups\[2\]\.rewards\[0\] must be a finite number, got nan",
        ),
        ([rl_group(rewards=[1, math.inf])], r"^groups\[0\]\.rewards\[1\] must be a finite number, got inf"),
        ([rl_group(rewards=[1, "1"])], r"^groups\[0\]\.rewards\[1\] must be a finite number, got '1'"),
        ([rl_group(rewards=[1])], r"^groups\[0\]\.rewards must have one reward per rollout, got 1 for 2"),
        ([rl_group(rollouts=[], rewards=[])], r"^groups\[0\]\.rollouts must have 1 to 16 items, got 0"),
        ([rl_group(rollouts=[signed().to_dict()] * 17)], r"^groups\[0\]\.rollouts must have 1 to 16 items, got 17"),
        ([rl_group(request=POINT)], r"^groups\[0\]\.rollouts\[0\]\.skill must be the request's, point, got 'detect'"),
        ([sft_group(target=None)], r"^groups\[0\] must have exactly one of the keys target and targets"),
        ([sft_group(targets=[{"boxes": []}])], r"^groups\[0\] must have exactly one of the keys target and targets"),
        ([sft_group(target=None, targets=[])], r"^groups\[0\]\.targets must have 1 to 64 items, got 0"),
        ([sft_group(target=None, targets=[5])], r"^groups\[0\]\.targets\[0\] must be an object"),
    ],
)
def test_wrong_groups_are_errors_with_the_path(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_groups(value)


def test_each_target_counts_as_a_group() -> None:
    many = sft_group(target=None, targets=[{"boxes": []}] * MAX_GROUPS)
    assert len(parse_groups([many])) == MAX_GROUPS
    with pytest.raises(ValueError, match="groups must have 1 to 64 items, got 65 with one per target"):
        parse_groups([many, sft_group()])


# Rollouts


@pytest.mark.parametrize("skill", ROLLOUTS)
def test_rollouts_survive_json_and_keep_their_signature(skill: str) -> None:
    rollout, request = signed(skill), parse_request(REQUESTS[skill])
    sent = json.loads(json.dumps(rollout.to_dict()))
    received = parse_rollout(sent)
    assert json.loads(json.dumps(received.to_dict())) == sent
    verify(KEY, "ft1", request, received, DIGEST)


@pytest.mark.parametrize("skill", ROLLOUTS)
def test_signature_is_independent_of_number_types_and_key_order(skill: str) -> None:
    """JavaScript has one type of number, and writes 1.0 as 1 and −0.0 as 0."""

    def as_javascript(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_javascript(item) for key, item in reversed(value.items())}
        if isinstance(value, list | tuple):
            return [as_javascript(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def as_floats(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_floats(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [as_floats(item) for item in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    rollout = signed(skill).to_dict()
    texts = {json.dumps(form) for form in (rollout, as_javascript(rollout), as_floats(rollout))}
    assert len(texts) > 1
    for text in texts:
        verify(KEY, "ft1", parse_request(REQUESTS[skill]), parse_rollout(json.loads(text)), DIGEST)


def test_signature_accepts_a_request_with_explicit_defaults() -> None:
    request = parse_request({**DETECT, "settings": {"temperature": 1, "top_p": 1, "max_objects": 50}})
    verify(KEY, "ft1", request, signed(), DIGEST)


@pytest.mark.parametrize(
    "changed",
    [
        {"finish_reason": "length"},
        {"output": {"objects": []}},
        {"output": {"objects": [{**BOX, "x_max": 0.31}]}},
        {"answer_tokens": (1,)},
        {"thinking_tokens": (1,)},
        {"has_answer_separator": True},
        {"coords": (0.4, 0.2)},
        {"sizes": ((0.2, 0.2),)},
        {"log_probs": (0.0, -1.25, -3.4)},
        {"signature": ""},
        {"signature": "0" * 64},
        {"signature": "ü\ud800"},
    ],
)
def test_tampered_rollouts_are_errors_with_the_path(changed: dict[str, Any]) -> None:
    rollout = dataclasses.replace(signed(), **changed)
    with pytest.raises(ValueError, match=r"^groups\[2\]\.rollouts\[1\] was not returned by this finetune .*unchanged"):
        verify(KEY, "ft1", parse_request(DETECT), rollout, DIGEST, "groups[2].rollouts[1]")


def test_foreign_rollouts_are_errors() -> None:
    """Another finetune, another key, another request or another image invalidates a signature."""
    request, other_image = parse_request(DETECT), b"digest of other pixels"
    other = [
        parse_request({**DETECT, "object": "dog"}),
        parse_request({**DETECT, "settings": {"temperature": 0.9}}),
        parse_request({**DETECT, "settings": {"max_objects": 1}}),
    ]
    verify(KEY, "ft1", request, signed(), DIGEST)
    calls: list[tuple[Any, ...]] = [
        (KEY, "ft2", request, signed(), DIGEST),
        (KEY[::-1], "ft1", request, signed(), DIGEST),
        (KEY, "ft1", request, signed(), other_image),
        (KEY, "ft1", request, signed(), None),
        *((KEY, "ft1", changed, signed(), DIGEST) for changed in other),
    ]
    for arguments in calls:
        with pytest.raises(ValueError, match="rollout was not returned by this finetune"):
            verify(*arguments)


def test_a_short_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="key must have at least 16 bytes, got 0"):
        sign(b"", "ft1", parse_request(DETECT), signed(), DIGEST)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extra": 1}, r"^rollout has keys that are not allowed: \['extra'\]"),
        ({"signature": None}, r"^rollout\.signature is missing"),
        ({"signature": 5}, r"^rollout\.signature must be a string, got int"),
        ({"skill": "caption"}, r"^rollout\.skill must be one of query, point, detect"),
        ({"finish_reason": "end"}, r"^rollout\.finish_reason must be one of stop, length, got 'end'"),
        ({"output": {"answer": "a"}}, r"^rollout\.output has keys that are not allowed: \['answer'\]; .*: objects"),
        ({"output": {"objects": [{}]}}, r"^rollout\.output\.objects\[0\]\.x_min is missing"),
        ({"answer_tokens": [1.5]}, r"^rollout\.answer_tokens\[0\] must be an integer of at least 0, got 1\.5"),
        ({"answer_tokens": [-1]}, r"^rollout\.answer_tokens\[0\] must be an integer"),
        ({"thinking_tokens": "12"}, r"^rollout\.thinking_tokens must be a list, got str"),
        ({"has_answer_separator": 0}, r"^rollout\.has_answer_separator must be True or False, got 0"),
        ({"coords": [math.inf]}, r"^rollout\.coords\[0\] must be a finite number, got inf"),
        ({"coords": [10**400]}, r"^rollout\.coords\[0\] must be a finite number"),
        ({"sizes": [[1, 2, 3]]}, r"^rollout\.sizes\[0\] must have 2 items, got 3"),
        ({"log_probs": [None]}, r"^rollout\.log_probs\[0\] must be a finite number, got None"),
    ],
)
def test_wrong_rollouts_are_errors_with_the_path(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rollout({**signed().to_dict(), **changed})


# Junk

VALID = [
    rl_group(),
    rl_group(request=REQUESTS["query"], rollouts=[signed("query").to_dict()] * 2),
    rl_group(request=POINT, rollouts=[signed("point").to_dict()] * 2),
    sft_group(
        request={**QUERY, "spatial_refs": [[0.1, 0.2]]},
        target={
            "answer": "2",
            "reasoning": {"text": "Two.", "grounding": [{"start_idx": 0, "end_idx": 4, "points": [[0, 1]]}]},
        },
    ),
]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a nested value."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(found for key, item in inner for found in paths_of(item, (*path, key)))]


NAMES = st.sampled_from(sorted({key for path in paths_of(VALID) for key in path if isinstance(key, str)}))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["query", "point", "detect", "rl", "sft"]),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.just(np.float32(0.5)),
    st.just(np.zeros(3)),
    st.just(np.zeros(())),
    st.just(object()),
)
JUNK = st.recursive(
    SCALARS,
    lambda values: st.one_of(
        st.lists(values, max_size=4),
        st.lists(values, max_size=2).map(tuple),
        st.dictionaries(NAMES | st.text(max_size=3) | st.integers(), values, max_size=4),
    ),
    max_leaves=20,
)


def only_value_errors(function: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(ValueError):
        function(*arguments)


@given(JUNK)
@example(nested(50_000))
@example({"skill": nested(50_000)})
@example({**DETECT, "object": nested(50_000)})
@example({**DETECT, "settings": {"temperature": nested(50_000)}})
def test_junk_raises_only_value_errors(value: object) -> None:
    for function in (parse_request, parse_num_rollouts, parse_groups, parse_rollout, parse_reasoning):
        only_value_errors(function, value)
    for skill in ("query", "point", "detect"):
        only_value_errors(parse_ground_truth, value, skill)
        only_value_errors(parse_target, value, skill)


def replaced(value: Any, path: tuple[Any, ...], new: object) -> Any:
    """Return a copy of a nested value with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.slow
@given(st.data())
def test_junk_anywhere_in_valid_groups_raises_only_value_errors(data: st.DataObject) -> None:
    groups: Any = list(VALID)
    assert len(parse_groups(groups)) == len(VALID)
    path = data.draw(st.sampled_from(paths_of(groups)))
    only_value_errors(parse_groups, replaced(groups, path, data.draw(JUNK | st.just(nested(50_000)))))
