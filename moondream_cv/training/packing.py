"""From examples to one training sequence per image: token ids, coordinates and sizes, and what follows each position.

An image's questions stand one after another behind its shared prefix. Each sees the prefix and itself, and counts its
positions from the prefix on, so that it is computed just as it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from moondream_cv.model.config import TokenizerConfig
from moondream_cv.training.prompts import Box, Example

IGNORE = -100
DECISION_WEIGHT = 2.0  # of going on or stopping
REPLY_WEIGHT = 3.0  # of a reply of one token; longer ones share it by the square root of their length


@dataclass
class Packed:
    """The questions of one image behind one another; every list has one entry a position.

    Attributes:
        ids: Token ids; where the coordinate or the size token stands, the embedding comes from `coords` or `sizes`.
        coords: Coordinate fed in, NaN elsewhere.
        sizes: (width, height) fed in, NaN elsewhere.
        next_ids: Token to be predicted, or IGNORE.
        weights: How much that token counts.
        next_coords: Coordinate to be predicted from this position, NaN elsewhere.
        next_sizes: (width, height) to be predicted from this position, NaN elsewhere.
        offsets: Position within its question.
        question: Number of its question.
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
        """Append a position of the current question that predicts nothing yet."""
        self.ids.append(token)
        self.coords.append(coord)
        self.sizes.append(size)
        self.next_ids.append(IGNORE)
        self.weights.append(0.0)
        self.next_coords.append(np.nan)
        self.next_sizes.append((np.nan, np.nan))

    def predict(self, token: int, weight: float) -> None:
        """Let the last position predict a token."""
        self.next_ids[-1], self.weights[-1] = token, weight


class Packer:
    """Writes examples as positions, with the templates of a checkpoint."""

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    def pack(self, examples: Sequence[Example], limit: int) -> Packed:
        """Pack as many examples as fit into `limit` positions, in order."""
        packed = Packed()
        for number, example in enumerate(examples):
            start = len(packed)
            self._write(packed, example)
            if len(packed) > limit:
                _truncate(packed, start)
                break
            packed.offsets.extend(range(len(packed) - start))
            packed.question.extend([number] * (len(packed) - start))
        return packed

    def _write(self, packed: Packed, example: Example) -> None:
        templates, config = self.config.templates, self.config
        if example.skill in ("detect", "point"):
            self._prompt(packed, example.skill, " " + example.prompt)
            self._objects(packed, example.boxes, sized=example.skill == "detect")
        elif example.skill in ("query", "reason"):
            self._prompt(packed, "query", example.prompt, example.refs)
            if example.skill == "reason":
                self._reason(packed, example)
            else:
                for token in templates["query"]["suffix"]:  # type: ignore[index]
                    packed.add(token)
            self._reply(packed, self._encode(example.answer), config.eos_id)
        else:
            for token in templates["caption"][example.skill]:  # type: ignore[index]
                packed.add(token)
            self._reply(packed, self._encode(example.answer), config.eos_id)

    def _prompt(self, packed: Packed, skill: str, text: str, refs: Sequence[tuple[float, ...]] = ()) -> None:
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

    def _objects(self, packed: Packed, boxes: Sequence[Box], sized: bool) -> None:
        coord, size = self.config.coord_id, self.config.size_id
        for x, y, w, h in boxes:
            packed.predict(coord, DECISION_WEIGHT)
            packed.next_coords[-1] = x
            packed.add(coord, coord=x)
            packed.next_coords[-1] = y
            packed.add(coord, coord=y)
            if sized:
                packed.next_sizes[-1] = (w, h)
                packed.add(size, size=(w, h))
        packed.predict(self.config.eos_id, DECISION_WEIGHT)

    def _reason(self, packed: Packed, example: Example) -> None:
        config = self.config
        packed.add(config.thinking_id)
        self._reply(packed, self._encode(" I see"), config.start_ground_points_id)
        packed.add(config.start_ground_points_id)
        self._reply(packed, self._encode(example.grounded), None)
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

    def _reply(self, packed: Packed, tokens: Sequence[int], end: int | None) -> None:
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
