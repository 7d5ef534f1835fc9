"""Groups of a training step, checked and typed: rollouts with rewards, and requests with targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moondream_cv.arguments import check_choice
from moondream_cv.finetune.signed_rollouts import Rollout, parse_rollout
from moondream_cv.finetune.values import (
    XY,
    Box,
    check_finite,
    check_items,
    check_list,
    check_mapping,
    check_prompt,
    limited_nesting,
)
from moondream_cv.finetune.wire import (
    MAX_ROLLOUTS,
    RolloutRequest,
    parse_ground_truth,
    parse_reasoning,
    parse_request,
)
from moondream_cv.requests import Reasoning

MODES = ("rl", "sft")
MAX_GROUPS = 64
MAX_REWARD = 1e9  # absolute value; the squares of larger rewards could overflow


@dataclass(frozen=True)
class ReinforcementItem:
    """Rollouts of one request with their rewards. A single rollout is valid, but has no gradient.

    Attributes:
        path: Path of the group for error messages, such as "groups[2]".
        request: Request of the rollouts.
        rollouts: Rollouts, 1 to 16, in the order of the group. `parse_groups` does not verify their signatures.
        rewards: Reward of each rollout, between -1e9 and 1e9.
    """

    path: str
    request: RolloutRequest
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class AnswerTarget:
    """Target of a query.

    Attributes:
        answer: Answer text.
        reasoning: Reasoning before the answer, or None.
    """

    answer: str
    reasoning: Reasoning | None = None


@dataclass(frozen=True)
class PointTarget:
    """Target of a point request: points as fractions; an empty tuple if the image has no such object."""

    points: tuple[XY, ...]


@dataclass(frozen=True)
class DetectTarget:
    """Target of a detect request: boxes as fractions; an empty tuple if the image has no such object."""

    boxes: tuple[Box, ...]


Target = AnswerTarget | PointTarget | DetectTarget


@dataclass(frozen=True)
class SupervisedItem:
    """A request with one target.

    Attributes:
        path: Path of the target for error messages, such as "groups[2].target".
        request: Request. Its sampling settings have no effect.
        target: Target of the request's skill.
    """

    path: str
    request: RolloutRequest
    target: Target


def parse_groups(value: object, path: str = "groups") -> list[ReinforcementItem | SupervisedItem]:
    """Check the groups of a training step.

    Args:
        value: List of {"mode": "rl", "request", "rollouts", "rewards"} and {"mode": "sft", "request", "target"}. A list
            "targets" instead of "target" is one group per target.
        path: Path of the value for error messages.

    Returns:
        1 to 64 items in the order of the groups.

    Raises:
        ValueError: There are no groups or too many, or a group is invalid.
    """
    with limited_nesting(path):
        items: list[ReinforcementItem | SupervisedItem] = []
        for index, group in enumerate(check_list(path, value, 1, MAX_GROUPS)):
            items += _parse_group(group, f"{path}[{index}]")
        if len(items) > MAX_GROUPS:
            raise ValueError(
                f"{path} must have 1 to {MAX_GROUPS} items, got {len(items):,} with one per target; send them in "
                "several steps"
            )
        return items


def parse_target(value: object, skill: str, path: str = "target") -> Target:
    """Check the target of a request.

    Args:
        value: {"answer", "reasoning"?} for query, {"points"} or {"boxes"} for point, {"boxes"} for detect. The points
            of boxes are their centers.
        skill: Skill of the request.
        path: Path of the value for error messages.

    Raises:
        ValueError: The value has another form.
    """
    if skill != "query":
        regions = parse_ground_truth(value, skill, path)
        if skill == "detect":
            return DetectTarget(regions.boxes or ())
        centers = tuple(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in regions.boxes or ())
        return PointTarget(regions.points or centers)
    with limited_nesting(path):
        given = check_mapping(path, value, ("answer", "reasoning"), required=("answer",))
        answer = check_prompt(f"{path}.answer", given["answer"])
        reasoning = parse_reasoning(given["reasoning"], f"{path}.reasoning") if "reasoning" in given else None
        return AnswerTarget(answer, reasoning)


def _parse_group(group: object, path: str) -> list[ReinforcementItem] | list[SupervisedItem]:
    mode = check_choice(f"{path}.mode", check_mapping(path, group).get("mode"), MODES)
    if mode == "rl":
        keys = ("mode", "request", "rollouts", "rewards")
        return [_reinforcement_item(check_mapping(path, group, keys, required=keys), path)]
    given = check_mapping(path, group, ("mode", "request", "target", "targets"), required=("request",))
    return _supervised_items(given, path)


def _reinforcement_item(given: dict[str, Any], path: str) -> ReinforcementItem:
    request = parse_request(given["request"], f"{path}.request")
    rollouts = check_items(
        f"{path}.rollouts", given["rollouts"], lambda at, item: parse_rollout(item, at), 1, MAX_ROLLOUTS
    )
    for i, rollout in enumerate(rollouts):
        if rollout.skill != request.skill:
            raise ValueError(
                f"{path}.rollouts[{i}].skill must be the request's, {request.skill}, got {rollout.skill!r}"
            )
    rewards = check_items(f"{path}.rewards", given["rewards"], _reward)
    if len(rewards) != len(rollouts):
        raise ValueError(f"{path}.rewards must have one reward per rollout, got {len(rewards)} for {len(rollouts)}")
    return ReinforcementItem(path, request, rollouts, rewards)


def _reward(path: str, value: object) -> float:
    reward = check_finite(path, value)
    if abs(reward) > MAX_REWARD:
        raise ValueError(
            f"{path} must be between -{MAX_REWARD:g} and {MAX_REWARD:g}, got {value!r:.100}; scale rewards"
        )
    return reward


def _supervised_items(given: dict[str, Any], path: str) -> list[SupervisedItem]:
    if ("target" in given) == ("targets" in given):
        raise ValueError(f"{path} must have exactly one of the keys target and targets, got {sorted(given)}")
    request = parse_request(given["request"], f"{path}.request")

    def item(at: str, target: object) -> SupervisedItem:
        return SupervisedItem(at, request, parse_target(target, request.skill, at))

    if "target" in given:
        return [item(f"{path}.target", given["target"])]
    return list(check_items(f"{path}.targets", given["targets"], item, 1, MAX_GROUPS))
