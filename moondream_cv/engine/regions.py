"""The loop that reads objects and points off the decoder, greedily, one after another until the model stops."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from moondream_cv.engine.confidence import combine, continue_probability, peak_mass
from moondream_cv.engine.state import DecodingState
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.region import bin_to_coordinate, bin_to_size
from moondream_cv.requests import DetectedObject, DetectedPoint


def generate_objects(
    network: MoondreamNetwork, state: DecodingState, hidden: Tensor, max_objects: int
) -> Generator[DetectedObject, None, bool]:
    """Yield boxes; return whether `max_objects` or the context ended the list.

    Args:
        state: Fed up to the end of the prompt.
        hidden: [1, dim], the last hidden state.
    """
    return (yield from _generate(network, state, hidden, max_objects, sized=True, force=False))  # type: ignore[misc]


def generate_points(
    network: MoondreamNetwork, state: DecodingState, hidden: Tensor, max_objects: int, force: bool = False
) -> Generator[DetectedPoint, None, bool]:
    """Yield points as `generate_objects` does boxes; with `force`, the first is given even where there is none."""
    return (yield from _generate(network, state, hidden, max_objects, sized=False, force=force))  # type: ignore[misc]


def _generate(
    network: MoondreamNetwork, state: DecodingState, hidden: Tensor, limit: int, sized: bool, force: bool
) -> Generator[DetectedObject | DetectedPoint, None, bool]:
    eos, positions_each = network.config.tokenizer.eos_id, 3 if sized else 2
    count = 0
    while True:
        with torch.inference_mode():
            logits = network.text.logits(hidden)[0]
        if int(logits.argmax()) == eos and not (force and count == 0):
            return False
        if count == limit or state.room < positions_each:
            return True
        going_on = continue_probability(logits, eos)
        item, hidden = _read_item(network, state, hidden, going_on, sized)
        yield item
        count += 1


@torch.inference_mode()
def _read_item(
    network: MoondreamNetwork, state: DecodingState, hidden: Tensor, going_on: Tensor, sized: bool
) -> tuple[DetectedObject | DetectedPoint, Tensor]:
    region = network.region
    masses, centre = [], []
    for _ in range(2):  # x, then y
        logits = region.decode_coordinate(hidden)  # [1, bins]
        masses.append(peak_mass(logits))
        centre.append(bin_to_coordinate(logits.argmax(-1), logits.shape[-1]))  # [1]
        hidden = state.feed(region.encode_coordinate(centre[-1].to(hidden.dtype)[None, :, None]))
    if not sized:
        x, y, confidence = torch.stack((*(c[0] for c in centre), combine(going_on, masses))).tolist()
        return DetectedPoint(x, y, confidence), hidden
    logits = region.decode_size(hidden)[0]  # [2, bins]
    masses += list(peak_mass(logits))
    size = bin_to_size(logits.argmax(-1), logits.shape[-1])  # [2]
    hidden = state.feed(region.encode_size(size.to(hidden.dtype))[None, None])
    x, y, w, h, confidence = torch.stack((*(c[0] for c in centre), *size, combine(going_on, masses))).tolist()
    return DetectedObject(x - w / 2, y - h / 2, x + w / 2, y + h / 2, confidence), hidden
