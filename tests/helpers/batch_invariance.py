"""Comparing a reply given alone with the reply to the same request in company.

Sums are taken in another order there, so that two choices whose logits are as good as equal may change places. Replies
count as the same if they are, or if they first differ at such a choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import (
    CaptionResult,
    DetectResult,
    ErrorResult,
    GazeResult,
    PointResult,
    QueryResult,
    Request,
    Result,
)

TIE = 1e-4  # difference of the two best logits


@dataclass
class Choices:
    """What a request that decodes alone has chosen at each step, and how far ahead of the second best that was."""

    chosen: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        for row in logits.detach().float().reshape(-1, logits.shape[-1]):
            best = row.topk(2)
            self.chosen.append(int(best.indices[0]))
            self.gaps.append(float(best.values[0] - best.values[1]))


@contextmanager
def recording(model: LocalModel) -> Iterator[Choices]:
    """Record the choices of whatever runs alone on a model meanwhile."""
    choices, region = Choices(), model.network.region
    half = model.config.region.size_out_dim // 2

    def of(shape: int | None) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            choices.add(output if shape is None else output.unflatten(-1, (-1, shape)))

        return hook

    handles = [
        model.network.text.lm_head.register_forward_hook(of(None)),
        region.coord_decoder.register_forward_hook(of(None)),
        region.size_decoder.register_forward_hook(of(half)),
    ]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


def assert_same(model: LocalModel, request: Request, alone: Result, together: Result) -> None:
    """Compare the reply to a request alone with that in company."""
    if isinstance(alone, ErrorResult) or isinstance(together, ErrorResult):
        assert type(alone) is type(together), (alone, together)
        assert str(alone.error) == str(together.error)  # type: ignore[union-attr]
        return
    if _places(alone) == _places(together):
        for mine, theirs in zip(_scores(alone), _scores(together), strict=True):
            assert abs(mine - theirs) < 1e-4, (request, mine, theirs)
        return
    assert request.settings.temperature == 0 or isinstance(alone, DetectResult | PointResult | GazeResult), request
    with recording(model) as choices:
        model.run([request])
    assert min(choices.gaps) < TIE, f"{request}: {alone} alone, {together} in company"
    if isinstance(alone, DetectResult | PointResult):
        step = _first_difference(alone, together)
        assert min(choices.gaps[: step + 1]) < TIE, f"{request}: {alone} alone, {together} in company"


def _first_difference(alone: Any, together: Any) -> int:
    """The number of head readings before objects first differ: of each, the decision, its x and its y, its sides."""
    mine, theirs = _places(alone), _places(together)
    same = 0
    while same < min(len(mine), len(theirs)) and mine[same] == theirs[same]:
        same += 1
    return (same + 1) * (5 if isinstance(alone, DetectResult) else 3)


def _places(result: Any) -> list[Any]:
    """Everything of a reply but its scores."""
    if isinstance(result, DetectResult):
        return [(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects] + [result.truncated]
    if isinstance(result, PointResult):
        return [(p.x, p.y) for p in result.points] + [result.truncated]
    if isinstance(result, GazeResult):
        return [None if result.gaze is None else (result.gaze.x, result.gaze.y)]
    if isinstance(result, QueryResult):
        return [result.answer, result.reasoning, result.truncated]
    assert isinstance(result, CaptionResult)
    return [result.caption, result.truncated]


def _scores(result: Any) -> list[float]:
    if isinstance(result, DetectResult):
        return [o.confidence for o in result.objects]
    if isinstance(result, PointResult):
        return [p.confidence for p in result.points]
    if isinstance(result, GazeResult):
        return [] if result.gaze is None else [result.gaze.confidence]
    return [] if result.logprob is None else [result.logprob]
