"""Prompts: from a request to token IDs, coordinates and sizes, and from these to input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moondream_cv.engine.transfers import floats, integers
from moondream_cv.errors import UnsupportedSkill
from moondream_cv.model.config import TokenizerConfig
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.requests import Caption, Chat, Detect, Gaze, Point, Query, Request, SpatialRef, Turn


@dataclass(frozen=True)
class Prompt:
    """Tokens that precede a reply.

    Attributes:
        ids: Token IDs. Coordinate and size tokens of spatial references are placeholders.
        coords: Coordinates for the coordinate tokens, in order, as fractions of the image.
        sizes: (width, height) for the size tokens, in order, as fractions of the image.
    """

    ids: tuple[int, ...]
    coords: tuple[float, ...] = ()
    sizes: tuple[tuple[float, float], ...] = ()


def embed_prompts(network: MoondreamNetwork, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the [T, dim] input embeddings of each prompt.

    Args:
        network: Network with the embeddings and the region encoders.
        prompts: Prompts of any lengths.
    """
    if not prompts:
        return []
    config, region, device = network.config.tokenizer, network.region, network.device
    ids = [i for prompt in prompts for i in prompt.ids]
    coords = [c for prompt in prompts for c in prompt.coords]
    sizes = [s for prompt in prompts for s in prompt.sizes]
    with torch.inference_mode():
        embeddings = network.text.embed(integers(ids, device))
        if coords:
            values = floats(coords, network.dtype, device)[:, None]
            embeddings[_placeholders(prompts, config.coord_id)] = region.encode_coordinate(values)
        if sizes:
            values = floats(sizes, network.dtype, device)
            embeddings[_placeholders(prompts, config.size_id)] = region.encode_size(values)
    return list(embeddings.split([len(prompt.ids) for prompt in prompts]))


def _placeholders(prompts: Sequence[Prompt], token: int) -> list[int]:
    """Return the indices of a placeholder token. In prompts without coordinates, the token is an ordinary word."""
    indices, start = [], 0
    for prompt in prompts:
        if prompt.coords:
            indices += [start + i for i, t in enumerate(prompt.ids) if t == token]
        start += len(prompt.ids)
    return indices


def write_prompt(request: Request, tokenizer: Tokenizer, config: TokenizerConfig) -> Prompt:
    """Fill in the template of a request's skill.

    Args:
        request: Request to write the prompt of; `write_conversation` is for a `Chat`.
        tokenizer: Tokenizer of the checkpoint.
        config: Templates and token IDs of the checkpoint.

    Raises:
        UnsupportedSkill: The checkpoint has no template for the skill.
    """
    if isinstance(request, Detect | Point):
        template = _template(config, request.skill)
        return Prompt((*template["prefix"], *_encode(tokenizer, " " + request.object), *template["suffix"]))
    if isinstance(request, Query):
        return _question(request, tokenizer, config)
    if isinstance(request, Caption):
        template = _template(config, "caption")
        if request.length not in template:
            raise UnsupportedSkill(
                f"this checkpoint has no {request.length!r} captions, only {', '.join(map(repr, template))}"
            )
        return Prompt(tuple(template[request.length]))
    if isinstance(request, Gaze):
        before, after = _encode(tokenizer, "\n\nPoint:"), _encode(tokenizer, " gaze\n\n")
        return Prompt((*before, config.coord_id, config.coord_id, *after), coords=request.eye)
    raise TypeError(f"a request must be a Detect, Point, Query, Chat, Caption or Gaze, got {request!r}")


def write_conversation(
    request: Chat, tokenizer: Tokenizer, config: TokenizerConfig
) -> tuple[tuple[Prompt | Any, ...], Prompt]:
    """Fill in the template of a question once for each turn of a conversation.

    The layout is that of the inference engine of the model's authors: the images of a turn, the prefix of the template,
    the question, the suffix, the answer. No token separates the turns.

    Args:
        request: Conversation to write.
        tokenizer: Tokenizer of the checkpoint.
        config: Templates and token IDs of the checkpoint.

    Returns:
        The context up to the last image, as `Prompt`s and images in order, and the prompt behind it. Without an image,
        the first is empty, and the prompt starts with the beginning-of-sequence token.

    Raises:
        UnsupportedSkill: The checkpoint has no template for questions, or cannot reason.
    """
    # Write the turns
    _check_controls(request.reasoning, False, config)
    context: list[Any] = []
    ids = [config.bos_id]
    for turn in request.turns:
        for image in turn.images:
            context += [Prompt(tuple(ids)), image] if ids else [image]
            ids = []
        ids += _turn(turn, request.settings.repeat_suffix, tokenizer, config)

    # Open the answer
    ids += _answer_opener(request.reasoning, request.settings.repeat_suffix, config)
    return tuple(context), Prompt(tuple(ids))


def answer_prompt(config: TokenizerConfig) -> Prompt:
    """Return the tokens between the reasoning and the answer."""
    return Prompt(tuple(_template(config, "query")["suffix"]))


def _question(request: Query, tokenizer: Tokenizer, config: TokenizerConfig) -> Prompt:
    template = _template(config, "query")
    _check_controls(request.reasoning, bool(request.spatial_refs), config)
    spatial, coords, sizes = _spatial(request.spatial_refs, config)
    end = _answer_opener(request.reasoning, request.settings.repeat_suffix, config)
    start = () if request.image is not None else (config.bos_id,)
    ids = (*start, *template["prefix"], *spatial, *_encode(tokenizer, request.question), *end)
    return Prompt(ids, coords, sizes)


def _turn(turn: Turn, repeat_suffix: bool, tokenizer: Tokenizer, config: TokenizerConfig) -> list[int]:
    """Return the tokens of a turn, without its images."""
    ids: list[int] = []
    if turn.question is not None:
        ids += [*_template(config, "query")["prefix"], *_encode(tokenizer, turn.question)]
    if turn.answer is not None:
        ids += [*_answer_opener(False, repeat_suffix, config), *_encode(tokenizer, turn.answer)]
    return ids


def _answer_opener(reasoning: bool, repeat_suffix: bool, config: TokenizerConfig) -> tuple[int, ...]:
    """Return the tokens between a question and its answer or its reasoning."""
    suffix = tuple(_template(config, "query")["suffix"])
    if reasoning:
        return (*(suffix if repeat_suffix else ()), config.thinking_id)
    return suffix * (2 if repeat_suffix else 1)


def _check_controls(reasoning: bool, has_spatial_refs: bool, config: TokenizerConfig) -> None:
    if (reasoning or has_spatial_refs) and not config.has_control_tokens:
        what = "reason" if reasoning else "take spatial references"
        raise UnsupportedSkill(f"this checkpoint cannot {what}; Moondream 2 of 2025-06-21 can")


def _spatial(
    refs: Sequence[SpatialRef], config: TokenizerConfig
) -> tuple[list[int], tuple[float, ...], tuple[tuple[float, float], ...]]:
    ids: list[int] = []
    coords: list[float] = []
    sizes: list[tuple[float, float]] = []
    for ref in refs:
        ids += [config.coord_id, config.coord_id]
        if len(ref) == 2:
            coords += ref
        else:
            ids.append(config.size_id)
            coords += [(ref[0] + ref[2]) / 2, (ref[1] + ref[3]) / 2]
            sizes.append((ref[2] - ref[0], ref[3] - ref[1]))
    return ids, tuple(coords), tuple(sizes)


def _template(config: TokenizerConfig, skill: str) -> dict[str, list[int]]:
    template = config.templates.get(skill)
    if template is None:
        raise UnsupportedSkill(f"this checkpoint cannot {skill}; Moondream 2 of 2025-06-21 can")
    return template


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
