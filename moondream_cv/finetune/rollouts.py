"""Conversions between the engine's replies, rollouts, targets and the trajectories that training reads."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from moondream_cv.engine.prompts import write_prompt
from moondream_cv.engine.sequence_state import Job
from moondream_cv.engine.sequences import TextSequence
from moondream_cv.finetune.groups import AnswerTarget, DetectTarget, Target
from moondream_cv.finetune.signed_rollouts import Rollout
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.region import bin_to_coordinate, bin_to_size
from moondream_cv.requests import (
    DetectedObject,
    DetectedPoint,
    DetectResult,
    PointResult,
    QueryResult,
    Reasoning,
    Request,
)
from moondream_cv.training.trajectories import (
    Trajectory,
    coordinate_to_bin,
    region_trajectory,
    sizes_to_bins,
    text_trajectory,
)


def rollout_of(job: Job, config: MoondreamConfig) -> Rollout:
    """Return the rollout of a finished request, without log-probabilities and signature.

    Args:
        job: Request with a result that is no error.
        config: Configuration of the checkpoint.
    """
    result, sequence = job.result, job.sequence
    if isinstance(result, DetectResult | PointResult):
        key = "objects" if isinstance(result, DetectResult) else "points"
        regions = [_numbers(piece, config) for piece in getattr(result, key)]
        names = ("x_min", "y_min", "x_max", "y_max") if key == "objects" else ("x", "y")
        return Rollout(
            skill=job.request.skill,
            finish_reason="length" if result.truncated else "stop",
            output={key: [{name: getattr(piece, name) for name in names} for piece in getattr(result, key)]},
            coords=tuple(value for x, y, *_ in regions for value in (x, y)),
            sizes=tuple((size[0], size[1]) for _, _, *size in regions if size),
        )
    assert isinstance(result, QueryResult), result
    assert isinstance(sequence, TextSequence)
    reasoning = {} if result.reasoning is None else {"reasoning": result.reasoning.to_dict()}
    has_reasoning = result.reasoning is not None
    segments = sequence.reasoning_segments if has_reasoning else []
    return Rollout(
        skill="query",
        finish_reason="length" if result.truncated else "stop",
        output={"answer": result.answer, **reasoning},
        answer_tokens=tuple(sequence.answer_tokens),
        thinking_tokens=tuple(token for tokens, _ in segments for token in tokens),
        has_answer_separator=has_reasoning and not sequence.reasoning_truncated,
        coords=tuple(value for _, values in segments for value in values),
    )


def trajectory_of(request: Request, rollout: Rollout, tokenizer: Tokenizer, config: MoondreamConfig) -> Trajectory:
    """Return the trajectory of a rollout.

    Args:
        request: Request of the rollout.
        rollout: Rollout that this model returned.
        tokenizer: Tokenizer of the checkpoint.
        config: Configuration of the checkpoint.

    Raises:
        UnsupportedSkill: The checkpoint has no template for the request.
    """
    prompt, ended = write_prompt(request, tokenizer, config.tokenizer), rollout.finish_reason == "stop"
    bins = [coordinate_to_bin(value, config) for value in rollout.coords]
    if rollout.skill == "query":
        return text_trajectory(
            prompt,
            rollout.answer_tokens,
            ended,
            config,
            rollout.thinking_tokens,
            bins,
            thinking_ended=rollout.has_answer_separator,
        )
    objects: list[tuple[int, ...]] = list(zip(bins[::2], bins[1::2], strict=True))
    if rollout.skill == "detect":
        sizes = [sizes_to_bins(width, height, config) for width, height in rollout.sizes]
        objects = [(*center, *size) for center, size in zip(objects, sizes, strict=True)]
    return region_trajectory(prompt, objects, ended, config)


def target_trajectory(request: Request, target: Target, tokenizer: Tokenizer, config: MoondreamConfig) -> Trajectory:
    """Return the trajectory of a target. Objects and points are listed from left to right, as the model lists them.

    Args:
        request: Request of the target.
        target: Target of the same skill.
        tokenizer: Tokenizer of the checkpoint.
        config: Configuration of the checkpoint.

    Raises:
        UnsupportedSkill: The checkpoint has no template for the request.
    """
    prompt = write_prompt(request, tokenizer, config.tokenizer)
    if isinstance(target, AnswerTarget):
        thinking, bins = ([], []) if target.reasoning is None else _reasoning(target.reasoning, tokenizer, config)
        answer = tokenizer.encode(target.answer, add_special_tokens=False).ids
        return text_trajectory(prompt, answer, True, config, thinking, bins)
    if isinstance(target, DetectTarget):
        boxes = [((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0) for x0, y0, x1, y1 in target.boxes]
        objects = [
            (coordinate_to_bin(x, config), coordinate_to_bin(y, config), *sizes_to_bins(width, height, config))
            for x, y, width, height in sorted(boxes)
        ]
        return region_trajectory(prompt, objects, True, config)
    points = [(coordinate_to_bin(x, config), coordinate_to_bin(y, config)) for x, y in sorted(target.points)]
    return region_trajectory(prompt, points, True, config)


def check_length(trajectory: Trajectory, has_image: bool, config: MoondreamConfig, path: str) -> Trajectory:
    """Return a trajectory that fits into the context of the model.

    Args:
        trajectory: Prompt and reply.
        has_image: Whether an image takes positions.
        config: Configuration of the checkpoint.
        path: Path of the value for the error message.

    Raises:
        ValueError: The trajectory is too long.
    """
    limit = config.text.max_context - (config.prefix_length if has_image else 0)
    if len(trajectory) > limit:
        raise ValueError(
            f"{path} must take at most {limit} positions with its prompt, got {len(trajectory)}; shorten it"
        )
    return trajectory


def _numbers(piece: DetectedObject | DetectedPoint, config: MoondreamConfig) -> tuple[float, ...]:
    """Return center and size of an object or point, as exact values of their bins."""
    if isinstance(piece, DetectedPoint):
        return _exact(piece.x, piece.y, config)
    x, y = (piece.x_min + piece.x_max) / 2, (piece.y_min + piece.y_max) / 2
    bins = torch.tensor(
        sizes_to_bins(piece.x_max - piece.x_min, piece.y_max - piece.y_min, config), device="cpu", dtype=torch.long
    )
    return *_exact(x, y, config), *bin_to_size(bins, config.region.size_out_dim // 2).tolist()


def _exact(x: float, y: float, config: MoondreamConfig) -> tuple[float, ...]:
    bins = torch.tensor([coordinate_to_bin(value, config) for value in (x, y)], device="cpu", dtype=torch.long)
    return tuple(bin_to_coordinate(bins, config.region.coord_out_dim).tolist())


def _reasoning(reasoning: Reasoning, tokenizer: Tokenizer, config: MoondreamConfig) -> tuple[list[int], list[int]]:
    """Return the tokens of a reasoning, and the bins of its coordinates. Grounded passages must not overlap."""
    tokens, bins, end, ids = [], [], 0, config.tokenizer
    for passage in sorted(reasoning.grounding, key=lambda passage: passage.start):
        if passage.start < end:
            raise ValueError(f"grounded passages must not overlap, got one from {passage.start} behind one to {end}")
        tokens += tokenizer.encode(reasoning.text[end : passage.start], add_special_tokens=False).ids
        tokens.append(ids.start_ground_points_id)
        tokens += tokenizer.encode(reasoning.text[passage.start : passage.end], add_special_tokens=False).ids
        for value in (value for point in passage.points for value in point):
            tokens.append(ids.coord_id)
            bins.append(coordinate_to_bin(value, config))
        tokens.append(ids.end_ground_id)
        end = passage.end
    tokens += tokenizer.encode(reasoning.text[end:], add_special_tokens=False).ids
    return tokens, bins
