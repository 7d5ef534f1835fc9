"""Re-score a detect or point result by teacher forcing, to compare confidence formulas.

The engine returns one confidence per object and discards the distributions. This module runs the prompt and the
finished result through the decoder in one forward pass, with the attention mask of generation, and returns the logits
behind every coordinate and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moondream_cv.engine.confidence import axis_features, confidence, continue_probability
from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.prompts import embed_prompts, write_prompt
from moondream_cv.model.region import bin_to_coordinate, bin_to_size, size_to_bin
from moondream_cv.requests import Detect, DetectResult, Point, PointResult


@dataclass(frozen=True)
class RescoredObject:
    """One object of a result, with the distributions behind it.

    Attributes:
        box: Center x and y, followed by width and height for detections, as fractions of the image.
        continue_probability: Probability that the decoder generates another object instead of ending, 0..1.
        logits: [2 or 4, bins] logits of each value of `box`.
    """

    box: tuple[float, ...]
    continue_probability: float
    logits: Tensor

    @property
    def confidence(self) -> float:
        """Confidence by the formula of `moondream_cv.engine.confidence`, before calibration."""
        return confidence(self.continue_probability, self.box, axis_features(self.logits).tolist())


@torch.inference_mode()
def rescore(
    model: LocalModel, image: EncodedImage, request: Detect | Point, result: DetectResult | PointResult
) -> list[RescoredObject]:
    """Return the distributions behind each object of a result, in the order of the result.

    Args:
        model: Model that returned the result, without an adapter.
        image: Image of the request, encoded by that model.
        request: Request that was run.
        result: Result of the request.
    """
    # Recover the decoder's inputs
    network, config = model.network, model.config
    boxes = _decoder_values(result, config.region.coord_out_dim, config.region.size_out_dim // 2)
    if not len(boxes):
        return []
    has_size = boxes.shape[1] == 4

    # Embed the prefix, the prompt and the objects
    bos = torch.tensor([config.tokenizer.bos_id], device=network.device, dtype=torch.long)
    (prompt,) = embed_prompts(network, [write_prompt(request, model.tokenizer, config.tokenizer)])
    inputs = boxes.to(network.device, network.dtype)
    parts = [network.region.encode_coordinate(inputs[:, :2, None])]  # [N, 2, dim]
    if has_size:
        parts.append(network.region.encode_size(inputs[:, None, 2:]))
    steps = torch.cat(parts, 1)  # [N, 2 or 3, dim]
    x = torch.cat((network.text.embed(bos), image.embedding, prompt, steps.flatten(0, 1)))

    # Run the decoder once, with full attention inside the prefix
    prefix, length = 1 + len(image.embedding), len(x)
    mask = torch.ones(length, length, dtype=torch.bool, device=network.device).tril()
    mask[:prefix, :prefix] = True
    hidden = network.text(x[None], torch.arange(length, device=network.device)[None], mask)[0]

    # Decode the distributions; the position before a step predicts it
    hidden = hidden[length - steps.shape[0] * steps.shape[1] - 1 : -1].unflatten(0, steps.shape[:2])
    probabilities = continue_probability(network.text.logits(hidden[:, 0]), config.tokenizer.eos_id)
    logits = network.region.decode_coordinate(hidden[:, :2])  # [N, 2, bins]
    axes = (
        [torch.cat((a, b)) for a, b in zip(logits, network.region.decode_size(hidden[:, 2]), strict=True)]
        if has_size
        else logits
    )
    objects = zip(boxes.tolist(), probabilities.tolist(), axes, strict=True)
    return [RescoredObject(tuple(box), probability, axis.cpu()) for box, probability, axis in objects]


def _decoder_values(result: DetectResult | PointResult, coordinate_bins: int, size_bins: int) -> Tensor:
    """Return the coordinates and sizes that were decoder inputs, [N, 2 or 4].

    The corners of a result are sums of these values and are rounded, so the values are snapped to their bins again.
    """
    if isinstance(result, PointResult):
        return _float_tensor([(p.x, p.y) for p in result.points])
    corners = _float_tensor([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects]).reshape(-1, 4)
    center = bin_to_coordinate(((corners[:, :2] + corners[:, 2:]) / 2 * coordinate_bins).round(), coordinate_bins)
    size = bin_to_size(size_to_bin(corners[:, 2:] - corners[:, :2], size_bins).round(), size_bins)
    return torch.cat((center, size), 1)


def _float_tensor(values: Sequence[Any]) -> Tensor:
    """Return a float32 tensor on the CPU, independent of torch's defaults."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def candidate_scores(objects: Sequence[RescoredObject]) -> dict[str, list[float]]:
    """Score objects with alternative confidence formulas.

    "Mass" is the probability within a number of bins of the most likely bin.

    Args:
        objects: Objects of one result.

    Returns:
        One score per object for each formula; empty without objects.
    """
    if not objects:
        return {}
    # Compute the features that the formulas share
    proceed = _float_tensor([item.continue_probability for item in objects])
    logits = torch.stack([item.logits.float() for item in objects])  # [N, 2 or 4, bins]
    bins, peak = torch.arange(logits.shape[-1], device=logits.device), logits.argmax(-1, keepdim=True)
    probabilities = logits.softmax(-1)

    def mass(reach: int) -> Tensor:
        return (probabilities * ((bins - peak).abs() <= reach)).sum(-1)

    def mass_left_of_peak(reach: int) -> Tensor:
        return (probabilities * (bins < peak - reach)).sum(-1)[:, 0]

    # Score boxes and points
    entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)
    scores = {"continue": proceed, "continue · exp(−mean entropy)": proceed * (-entropy.mean(-1)).exp()}
    for reach in (8, 16, 32):
        masses = mass(reach)
        center = proceed * masses[:, :2].prod(-1)
        scores[f"continue · geometric mean of masses, {reach}"] = proceed * masses.log().mean(-1).exp()
        scores[f"continue · minimum mass, {reach}"] = proceed * masses.amin(-1)
        scores[f"continue · masses, {reach}"] = proceed * masses.prod(-1)
        scores[f"continue · masses of x and y, {reach}"] = center
        scores[f"continue · masses of x and y, {reach}, renormalized"] = center / (
            1 - proceed * mass_left_of_peak(reach)
        ).clamp_min(1e-6)

    # Score boxes by their sizes as well
    if logits.shape[1] == 4:
        center = mass(16)[:, :2].prod(-1) * proceed
        size = _float_tensor([item.box[2:] for item in objects]) * len(bins)  # [N, 2], in bins of a coordinate
        for share in (0.125, 0.25):
            near = (probabilities[:, :2] * ((bins - peak[:, :2]).abs() <= share * size[..., None])).sum(-1)
            scores[f"continue · masses of x and y, {share} of the size"] = proceed * near.prod(-1)
        for reach in (32, 48):
            sizes = mass(reach)[:, 2:].prod(-1)
            remaining = (1 - proceed * mass_left_of_peak(16)).clamp_min(1e-6)
            scores[f"continue · masses of x and y, 16, sizes, {reach}"] = center * sizes
            scores[f"continue · masses of x and y, 16, sizes, {reach}, renormalized"] = center * sizes / remaining
    return {name: values.tolist() for name, values in scores.items()}
