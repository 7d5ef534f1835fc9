"""The loops that write text: answers and captions, and the reasoning before an answer."""

from __future__ import annotations

from collections.abc import Generator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moondream_cv.engine.sampling import Sampler
from moondream_cv.engine.state import DecodingState
from moondream_cv.engine.words import WordStream
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.region import bin_to_coordinate
from moondream_cv.requests import Grounding, Reasoning


def generate_text(
    network: MoondreamNetwork,
    tokenizer: Tokenizer,
    state: DecodingState,
    hidden: Tensor,
    sampler: Sampler,
    max_tokens: int,
) -> Generator[str, None, bool]:
    """Yield text word by word; return whether `max_tokens` or the context ended it.

    Args:
        state: Fed up to the end of the prompt.
        hidden: [1, dim], the last hidden state.
    """
    config, words = network.config.tokenizer, WordStream(tokenizer)
    banned = (config.answer_id,) if config.has_control_tokens else ()  # of earlier releases, it is a word
    token, count, truncated = sampler.choose(_logits(network, hidden)), 0, False
    while token != config.eos_id:
        if count == max_tokens:
            truncated = True
            break
        if piece := words.add(token):
            yield piece
        count += 1
        if not state.room:
            truncated = True
            break
        hidden = state.feed(_embed(network, token))
        token = sampler.choose(_logits(network, hidden), banned)
    if piece := words.rest():
        yield piece
    return truncated


def generate_reasoning(
    network: MoondreamNetwork,
    tokenizer: Tokenizer,
    state: DecodingState,
    hidden: Tensor,
    sampler: Sampler,
    max_tokens: int,
    reserve: int,
) -> tuple[Reasoning, bool]:
    """Write the thoughts before an answer, and whether `max_tokens` or the context ended them.

    At least `reserve` positions of the context are left for the answer.

    A coordinate token stands for the likeliest coordinate, which is fed back in its place. The tokens around a grounded
    passage split the text; the coordinates of each part, taken in pairs, are its points.
    """
    config = network.config.tokenizer
    marks = (config.start_ground_points_id, config.end_ground_id)
    parts: list[tuple[list[int], list[float]]] = [([], [])]
    token, truncated = sampler.choose(_logits(network, hidden)), False
    count = 0
    while token != config.answer_id:
        if count == max_tokens or state.room <= reserve:
            truncated = True
            break
        if token in marks:
            parts.append(([], []))
        parts[-1][0].append(token)
        if token == config.coord_id:
            coordinate, embedding = _coordinate(network, hidden)
            parts[-1][1].append(coordinate)
        else:
            embedding = _embed(network, token)
        hidden = state.feed(embedding)
        token = sampler.choose(_logits(network, hidden), banned=(config.eos_id, config.size_id))
        count += 1
    return _assemble(tokenizer, parts), truncated


def _assemble(tokenizer: Tokenizer, parts: list[tuple[list[int], list[float]]]) -> Reasoning:
    text, grounding = "", []
    for tokens, coordinates in parts:
        piece = tokenizer.decode(tokens)
        points = tuple(zip(coordinates[::2], coordinates[1::2]))  # noqa: B905 - an odd last coordinate is dropped
        if points:
            grounding.append(Grounding(len(text), len(text) + len(piece), points))
        text += piece
    return Reasoning(text, tuple(grounding))


@torch.inference_mode()
def _coordinate(network: MoondreamNetwork, hidden: Tensor) -> tuple[float, Tensor]:
    logits = network.region.decode_coordinate(hidden)  # [1, bins]
    coordinate = bin_to_coordinate(logits.argmax(-1), logits.shape[-1])
    return float(coordinate), network.region.encode_coordinate(coordinate.to(hidden.dtype)[None, :, None])


@torch.inference_mode()
def _logits(network: MoondreamNetwork, hidden: Tensor) -> Tensor:
    return network.text.logits(hidden)[0]


@torch.inference_mode()
def _embed(network: MoondreamNetwork, token: int) -> Tensor:
    return network.text.embed(torch.tensor([[token]], device=network.device))
