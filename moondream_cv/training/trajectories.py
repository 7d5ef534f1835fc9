"""Trajectories: prompts and replies as the decoder reads and writes them, for teacher forcing.

A reply consists of choices. Behind each position of a trajectory the model makes up to two: a token, or whether another
object follows; and bins for a coordinate or a size. Trajectories on the same image are packed into one sequence behind
its prefix: each attends to the prefix and to itself only, and its positions continue from the prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moondream_cv.engine.prompts import Prompt, answer_prompt
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.region import bin_to_coordinate, bin_to_size, size_to_bin

NO_CHOICE = -1
NAN = float("nan")


@dataclass
class Trajectory:
    """A prompt and a reply. Every list has one entry per position.

    Attributes:
        ids: Input token IDs. The embeddings of coordinates and sizes come from `coords` and `sizes`.
        coords: Input coordinates, as fractions; NaN at other positions.
        sizes: Input widths and heights, as fractions; NaN at other positions.
        tokens: Tokens that are chosen behind each position, or NO_CHOICE.
        decisions: Whether another object follows (1) or the list ends (0), or NO_CHOICE.
        coordinate_bins: Bins of the coordinates that are chosen, or NO_CHOICE.
        size_bins: Bins of the widths and heights that are chosen, or NO_CHOICE.
    """

    ids: list[int] = field(default_factory=list)
    coords: list[float] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    coordinate_bins: list[int] = field(default_factory=list)
    size_bins: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_choices(self) -> int:
        """Number of positions with at least one choice."""
        return sum(
            max(token, decision, coordinate, *size) != NO_CHOICE
            for token, decision, coordinate, size in zip(
                self.tokens, self.decisions, self.coordinate_bins, self.size_bins, strict=True
            )
        )

    def read(self, token: int, coord: float = NAN, size: tuple[float, float] = (NAN, NAN)) -> None:
        """Append an input without a choice.

        Args:
            token: Token ID.
            coord: Coordinate, as a fraction.
            size: Width and height, as fractions.
        """
        self.ids.append(token)
        self.coords.append(coord)
        self.sizes.append(size)
        self.tokens.append(NO_CHOICE)
        self.decisions.append(NO_CHOICE)
        self.coordinate_bins.append(NO_CHOICE)
        self.size_bins.append((NO_CHOICE, NO_CHOICE))

    def read_prompt(self, prompt: Prompt, config: MoondreamConfig) -> None:
        """Append the tokens of a prompt.

        Args:
            prompt: Prompt; its coordinates and sizes replace the placeholders.
            config: Configuration of the checkpoint.
        """
        coords, sizes = iter(prompt.coords), iter(prompt.sizes)
        for token in prompt.ids:
            is_coord = bool(prompt.coords) and token == config.tokenizer.coord_id
            is_size = bool(prompt.sizes) and token == config.tokenizer.size_id
            self.read(token, next(coords) if is_coord else NAN, next(sizes) if is_size else (NAN, NAN))


def region_trajectory(
    prompt: Prompt, objects: Sequence[Sequence[int]], ended: bool, config: MoondreamConfig
) -> Trajectory:
    """Return the trajectory of a list of objects or points.

    Args:
        prompt: Prompt of the request.
        objects: Bins of each object: x and y, or x, y, width and height.
        ended: Whether the model ended the list; otherwise a limit did, and the end is no choice.
        config: Configuration of the checkpoint.
    """
    trajectory = Trajectory()
    trajectory.read_prompt(prompt, config)
    coord_id, size_id = config.tokenizer.coord_id, config.tokenizer.size_id
    for x, y, *size in objects:
        trajectory.decisions[-1], trajectory.coordinate_bins[-1] = 1, x
        trajectory.read(coord_id, _coordinate(x, config))
        trajectory.coordinate_bins[-1] = y
        trajectory.read(coord_id, _coordinate(y, config))
        if size:
            width, height = size
            trajectory.size_bins[-1] = width, height
            trajectory.read(size_id, size=_size(width, height, config))
    if ended:
        trajectory.decisions[-1] = 0
    return trajectory


def text_trajectory(
    prompt: Prompt,
    answer: Sequence[int],
    ended: bool,
    config: MoondreamConfig,
    thinking: Sequence[int] = (),
    thinking_coords: Sequence[int] = (),
    thinking_ended: bool = True,
) -> Trajectory:
    """Return the trajectory of an answer or a caption, optionally behind reasoning.

    Args:
        prompt: Prompt of the request. With reasoning, it ends in the token that starts the reasoning.
        answer: Token IDs of the answer.
        ended: Whether the model ended the answer; otherwise a limit did.
        config: Configuration of the checkpoint.
        thinking: Token IDs of the reasoning.
        thinking_coords: Bins of the coordinate tokens of the reasoning, in order.
        thinking_ended: Whether the model ended the reasoning; otherwise a limit did.
    """
    trajectory, tokenizer = Trajectory(), config.tokenizer
    trajectory.read_prompt(prompt, config)
    if prompt.ids[-1:] == (tokenizer.thinking_id,):
        bins = iter(thinking_coords)
        for token in thinking:
            trajectory.tokens[-1] = token
            if token == tokenizer.coord_id:
                trajectory.coordinate_bins[-1] = next(bins)
                trajectory.read(token, _coordinate(trajectory.coordinate_bins[-1], config))
            else:
                trajectory.read(token)
        if thinking_ended:
            trajectory.tokens[-1] = tokenizer.answer_id
        # The answer's prompt takes the place of the token that ended the reasoning.
        trajectory.read_prompt(answer_prompt(tokenizer), config)
    for token in answer:
        trajectory.tokens[-1] = token
        trajectory.read(token)
    if ended:
        trajectory.tokens[-1] = tokenizer.eos_id
    return trajectory


def coordinate_to_bin(coordinate: float, config: MoondreamConfig) -> int:
    """Return the bin that is closest to a coordinate, a fraction of the image's side."""
    bins = config.region.coord_out_dim
    return min(max(round(coordinate * bins), 0), bins - 1)


def sizes_to_bins(width: float, height: float, config: MoondreamConfig) -> tuple[int, int]:
    """Return the bins that are closest to a width and a height, as fractions of the image's sides."""
    bins = config.region.size_out_dim // 2
    values = size_to_bin(torch.tensor([width, height], dtype=torch.float64, device="cpu"), bins)
    columns, rows = values.round().clamp(0, bins - 1).int().tolist()
    return columns, rows


def _coordinate(index: int, config: MoondreamConfig) -> float:
    return float(bin_to_coordinate(torch.tensor(index, device="cpu", dtype=torch.long), config.region.coord_out_dim))


def _size(width: int, height: int, config: MoondreamConfig) -> tuple[float, float]:
    sizes = bin_to_size(
        torch.tensor([width, height], device="cpu", dtype=torch.long), config.region.size_out_dim // 2
    ).tolist()
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class TrajectoryBatch:
    """Packed trajectories of B images, T positions each. Shorter rows are padded; padding has no choices.

    Attributes:
        ids: [B, T] input token IDs.
        coords: [B, T] input coordinates; NaN at other positions.
        sizes: [B, T, 2] input sizes; NaN at other positions.
        positions: [B, T] positions behind the prefix, from 0 for each trajectory.
        numbers: [B, T] number of the trajectory on its image, from 0; padding has −1.
        tokens: [B, T] chosen tokens, or NO_CHOICE.
        decisions: [B, T] decisions on another object, or NO_CHOICE.
        coordinate_bins: [B, T] chosen bins, or NO_CHOICE.
        size_bins: [B, T, 2] chosen bins, or NO_CHOICE.
    """

    ids: Tensor
    coords: Tensor
    sizes: Tensor
    positions: Tensor
    numbers: Tensor
    tokens: Tensor
    decisions: Tensor
    coordinate_bins: Tensor
    size_bins: Tensor

    @property
    def has_choice(self) -> Tensor:
        """[B, T] whether the model makes a choice behind each position."""
        choices = torch.stack((self.tokens, self.decisions, self.coordinate_bins, *self.size_bins.unbind(-1)))
        return (choices != NO_CHOICE).any(0)


def pack_trajectories(rows: Sequence[Sequence[Trajectory]], device: torch.device) -> TrajectoryBatch:
    """Pack the trajectories of each image into one row.

    Args:
        rows: Trajectories of each image; at least one trajectory in all.
        device: Device of the batch.
    """

    def joined(name: str, fill: object, dtype: torch.dtype) -> Tensor:
        values = [[value for trajectory in row for value in getattr(trajectory, name)] for row in rows]
        return _padded(values, fill, dtype, device)

    positions = [[i for trajectory in row for i in range(len(trajectory))] for row in rows]
    numbers = [[n for n, trajectory in enumerate(row) for _ in range(len(trajectory))] for row in rows]
    return TrajectoryBatch(
        ids=joined("ids", 0, torch.long),
        coords=joined("coords", NAN, torch.float32),
        sizes=joined("sizes", (NAN, NAN), torch.float32),
        positions=_padded(positions, 0, torch.long, device),
        numbers=_padded(numbers, -1, torch.long, device),
        tokens=joined("tokens", NO_CHOICE, torch.long),
        decisions=joined("decisions", NO_CHOICE, torch.long),
        coordinate_bins=joined("coordinate_bins", NO_CHOICE, torch.long),
        size_bins=joined("size_bins", (NO_CHOICE, NO_CHOICE), torch.long),
    )


def _padded(rows: Sequence[Iterable[object]], fill: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of rows that are padded to the longest one."""
    lists = [list(row) for row in rows]
    longest = max(map(len, lists))
    padded = [row + [fill] * (longest - len(row)) for row in lists]
    return torch.tensor(padded, dtype=dtype, device="cpu").to(device)
