"""Read a reply of boxes or points again, all at once, for the distributions behind each of its numbers.

The engine gives out a confidence and keeps nothing else. Here the prompt and the finished reply go through the decoder
in one pass, each position seeing what it saw when the reply was made, so that other formulas can be tried on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moondream_cv.engine.confidence import axis_features, confidence, continue_probability
from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.local import LocalModel
from moondream_cv.engine.prompts import embed_prompts, write_prompt
from moondream_cv.model.region import bin_to_coordinate, bin_to_size, size_to_bin
from moondream_cv.requests import Detect, DetectResult, Point, PointResult


@dataclass(frozen=True)
class Reading:
    """One object of a reply.

    Attributes:
        box: x and y of its center, and width and height of an object with a box, as fractions of the image.
        going_on: Probability of anything but the end before it.
        logits: [2 or 4, bins] of each number of `box`.
    """

    box: tuple[float, ...]
    going_on: float
    logits: Tensor

    @property
    def confidence(self) -> float:
        """What `moondream_cv.engine.confidence` makes of it, before any calibration."""
        return confidence(self.going_on, self.box, axis_features(self.logits).tolist())


@torch.inference_mode()
def read_again(
    model: LocalModel, image: EncodedImage, request: Detect | Point, result: DetectResult | PointResult
) -> list[Reading]:
    """The readings of a reply, in its order.

    Args:
        model: What has answered, without an adapter.
        image: What was asked about, encoded by that model.
        request: What was asked.
        result: The answer.
    """
    network, config = model.network, model.config
    boxes = _fed(result, config.region.coord_out_dim, config.region.size_out_dim // 2)
    if not len(boxes):
        return []
    sized = boxes.shape[1] == 4
    bos = torch.tensor([config.tokenizer.bos_id], device=network.device, dtype=torch.long)
    (prompt,) = embed_prompts(network, [write_prompt(request, model.tokenizer, config.tokenizer)])
    fed = boxes.to(network.device, network.dtype)
    parts = [network.region.encode_coordinate(fed[:, :2, None])]  # [N, 2, dim]
    if sized:
        parts.append(network.region.encode_size(fed[:, None, 2:]))
    steps = torch.cat(parts, 1)  # [N, 2 or 3, dim]
    x = torch.cat((network.text.embed(bos), image.embedding, prompt, steps.flatten(0, 1)))
    prefix, length = 1 + len(image.embedding), len(x)
    mask = torch.ones(length, length, dtype=torch.bool, device=network.device).tril()
    mask[:prefix, :prefix] = True
    hidden = network.text(x[None], torch.arange(length, device=network.device)[None], mask)[0]
    # What stands before a step says what the step will be.
    hidden = hidden[length - steps.shape[0] * steps.shape[1] - 1 : -1].unflatten(0, steps.shape[:2])
    going_on = continue_probability(network.text.logits(hidden[:, 0]), config.tokenizer.eos_id)
    logits = network.region.decode_coordinate(hidden[:, :2])  # [N, 2, bins]
    axes = (
        [torch.cat((a, b)) for a, b in zip(logits, network.region.decode_size(hidden[:, 2]), strict=True)]
        if sized
        else logits
    )
    return [Reading(tuple(b), g, a.cpu()) for b, g, a in zip(boxes.tolist(), going_on.tolist(), axes, strict=True)]


def _fed(result: DetectResult | PointResult, coordinate_bins: int, size_bins: int) -> Tensor:
    """[N, 2 or 4] the numbers that were fed back: corners are sums of them and have lost a bit to rounding."""
    if isinstance(result, PointResult):
        return _numbers([(p.x, p.y) for p in result.points])
    corners = _numbers([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects]).reshape(-1, 4)
    center = bin_to_coordinate(((corners[:, :2] + corners[:, 2:]) / 2 * coordinate_bins).round(), coordinate_bins)
    size = bin_to_size(size_to_bin(corners[:, 2:] - corners[:, :2], size_bins).round(), size_bins)
    return torch.cat((center, size), 1)


def _numbers(values: Sequence[Any]) -> Tensor:
    """A float32 tensor on the CPU, whatever torch's defaults are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def formulas(readings: Sequence[Reading]) -> dict[str, list[float]]:
    """The scores that other formulas give: name → one score per reading.

    Mass is the probability within so many bins of the likeliest.
    """
    if not readings:
        return {}
    going_on = _numbers([r.going_on for r in readings])
    logits = torch.stack([r.logits.float() for r in readings])  # [N, 2 or 4, bins]
    bins, peak = torch.arange(logits.shape[-1], device=logits.device), logits.argmax(-1, keepdim=True)
    probabilities = logits.softmax(-1)

    def mass(reach: int) -> Tensor:
        return (probabilities * ((bins - peak).abs() <= reach)).sum(-1)

    def before(reach: int) -> Tensor:
        return (probabilities * (bins < peak - reach)).sum(-1)[:, 0]

    entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)
    found = {"going on": going_on, "going on · exp(−mean entropy)": going_on * (-entropy.mean(-1)).exp()}
    for reach in (8, 16, 32):
        masses = mass(reach)
        place = going_on * masses[:, :2].prod(-1)
        found[f"going on · geometric mean of masses, {reach}"] = going_on * masses.log().mean(-1).exp()
        found[f"going on · least mass, {reach}"] = going_on * masses.amin(-1)
        found[f"going on · masses, {reach}"] = going_on * masses.prod(-1)
        found[f"going on · masses of x and y, {reach}"] = place
        found[f"the same among what is left, {reach}"] = place / (1 - going_on * before(reach)).clamp_min(1e-6)
    if logits.shape[1] == 4:
        half = mass(16)[:, :2].prod(-1) * going_on
        size = _numbers([r.box[2:] for r in readings]) * len(bins)  # [N, 2], in bins of a coordinate
        for share in (0.125, 0.25):
            near = (probabilities[:, :2] * ((bins - peak[:, :2]).abs() <= share * size[..., None])).sum(-1)
            found[f"going on · masses of x and y, {share} of the size"] = going_on * near.prod(-1)
        for reach in (32, 48):
            sizes = mass(reach)[:, 2:].prod(-1)
            left = (1 - going_on * before(16)).clamp_min(1e-6)
            found[f"masses of x and y, 16, of sizes, {reach}"] = half * sizes
            found[f"the same among what is left, sizes {reach}"] = half * sizes / left
    return {name: scores.tolist() for name, scores in found.items()}
