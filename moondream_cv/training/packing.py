"""Pack the examples of an image into one training sequence: token ids, coordinates, sizes and targets.

The questions follow one another after the shared image prefix. Each question attends to the prefix and itself only, and
its position ids continue from the prefix, so the result equals that of a separate sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from moondream_cv.model.config import TokenizerConfig
from moondream_cv.training.prompts import Box, Example

IGNORE = -100
DECISION_WEIGHT = 2.0  # loss weight of the decision between another object and the end
REPLY_WEIGHT = 3.0  # loss weight of a one-token reply; tokens of longer replies are weighted by 1/√length


@dataclass
class Packed:
    """The packed questions of one image. Every list has one entry per position.

    Attributes:
        ids: Input token ids. The embeddings of coordinate and size tokens come from `coords` and `sizes`.
        coords: Input coordinates, as fractions; NaN at other tokens.
        sizes: Input widths and heights, as fractions; NaN at other tokens.
        next_ids: Target token ids, or IGNORE.
        weights: Loss weights of the target tokens.
        next_coords: Target coordinates; NaN without a target.
        next_sizes: Target widths and heights; NaN without a target.
        offsets: Positions within the question, from 0.
        question: Numbers of the questions, from 0.
    """

    ids: list[int] = field(default_factory=list)
    coords: list[float] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    next_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    next_coords: list[float] = field(default_factory=list)
    next_sizes: list[tuple[float, float]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    question: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, token: int, coord: float = np.nan, size: tuple[float, float] = (np.nan, np.nan)) -> None:
        """Append a position without targets.

        Args:
            token: Token id.
            coord: Input coordinate, as a fraction.
            size: Input width and height, as fractions.
        """
        self.ids.append(token)
        self.coords.append(coord)
        self.sizes.append(size)
        self.next_ids.append(IGNORE)
        self.weights.append(0.0)
        self.next_coords.append(np.nan)
        self.next_sizes.append((np.nan, np.nan))

    def predict(self, token: int, weight: float) -> None:
        """Set the target token of the last position.

        Args:
            token: Token id.
            weight: Loss weight.
        """
        self.next_ids[-1], self.weights[-1] = token, weight


class Packer:
    """Encode examples with the prompt templates of a checkpoint.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        config: Special tokens and templates.
    """

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    def pack(self, examples: Sequence[Example], limit: int) -> Packed:
        """Pack examples in order, up to the first one that does not fit.

        Args:
            examples: Examples of one image.
            limit: Maximum number of positions.
        """
        packed = Packed()
        for number, example in enumerate(examples):
            start = len(packed)
            self._add_example(packed, example)
            if len(packed) > limit:
                _truncate(packed, start)
                break
            packed.offsets.extend(range(len(packed) - start))
            packed.question.extend([number] * (len(packed) - start))
        return packed

    def _add_example(self, packed: Packed, example: Example) -> None:
        templates, config = self.config.templates, self.config
        if example.skill in ("detect", "point"):
            self._add_prompt(packed, example.skill, " " + example.prompt)
            self._add_objects(packed, example.boxes, with_size=example.skill == "detect")
        elif example.skill in ("query", "reason"):
            self._add_prompt(packed, "query", example.prompt, example.refs)
            if example.skill == "reason":
                self._add_reasoning(packed, example)
            else:
                for token in templates["query"]["suffix"]:  # type: ignore[index]
                    packed.add(token)
            self._add_reply(packed, self._encode(example.answer), config.eos_id)
        else:
            for token in templates["caption"][example.skill]:  # type: ignore[index]
                packed.add(token)
            self._add_reply(packed, self._encode(example.answer), config.eos_id)

    def _add_prompt(self, packed: Packed, skill: str, text: str, refs: Sequence[tuple[float, ...]] = ()) -> None:
        template = self.config.templates[skill]
        assert template is not None, f"the config has no template for {skill}"
        for token in template["prefix"]:
            packed.add(token)
        for ref in refs:
            packed.add(self.config.coord_id, coord=ref[0])
            packed.add(self.config.coord_id, coord=ref[1])
            if len(ref) == 4:
                packed.add(self.config.size_id, size=(ref[2], ref[3]))
        for token in [*self._encode(text), *template["suffix"]]:
            packed.add(token)

    def _add_objects(self, packed: Packed, boxes: Sequence[Box], with_size: bool) -> None:
        coord, size = self.config.coord_id, self.config.size_id
        for x, y, w, h in boxes:
            packed.predict(coord, DECISION_WEIGHT)
            packed.next_coords[-1] = x
            packed.add(coord, coord=x)
            packed.next_coords[-1] = y
            packed.add(coord, coord=y)
            if with_size:
                packed.next_sizes[-1] = (w, h)
                packed.add(size, size=(w, h))
        packed.predict(self.config.eos_id, DECISION_WEIGHT)

    def _add_reasoning(self, packed: Packed, example: Example) -> None:
        config = self.config
        packed.add(config.thinking_id)
        self._add_reply(packed, self._encode(" I see"), config.start_ground_points_id)
        packed.add(config.start_ground_points_id)
        self._add_reply(packed, self._encode(example.grounded), None)
        for x, y, _, _ in example.boxes:
            for value in (x, y):
                packed.predict(config.coord_id, DECISION_WEIGHT)
                packed.next_coords[-1] = value
                packed.add(config.coord_id, coord=value)
        packed.predict(config.end_ground_id, DECISION_WEIGHT)
        packed.add(config.end_ground_id)
        packed.predict(config.answer_id, 1.0)
        for token in config.templates["query"]["suffix"]:  # type: ignore[index]
            packed.add(token)

    def _add_reply(self, packed: Packed, tokens: Sequence[int], end: int | None) -> None:
        weight = REPLY_WEIGHT / (len(tokens) + 1) ** 0.5
        for token in tokens:
            packed.predict(token, weight)
            packed.add(token)
        if end is not None:
            packed.predict(end, weight)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _truncate(packed: Packed, length: int) -> None:
    inputs, outputs = (packed.ids, packed.coords, packed.sizes), (packed.next_coords, packed.next_sizes)
    for values in (*inputs, packed.next_ids, packed.weights, *outputs):
        del values[length:]
