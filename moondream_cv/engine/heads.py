"""Output heads: from the hidden states of a step to tokens, coordinates, sizes and the next input embeddings.

Coordinates and sizes go from logits to bins to embeddings on the device. The host waits for the device only when it
reads the outputs of a step, and only if a sequence may stop.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moondream_cv.engine.confidence import AxisFeatures, axis_features, continue_probability
from moondream_cv.engine.sampling import SamplingParams, sample
from moondream_cv.engine.transfers import HostCopy, integers
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.region import RegionLora, bin_to_coordinate, bin_to_size


class Head(enum.Enum):
    """The heads that a sequence applies to its next hidden state."""

    X_OR_STOP = enum.auto()  # language head: whether another object follows; coordinate head: its x
    Y = enum.auto()
    SIZE = enum.auto()
    TOKEN = enum.auto()
    REASONING = enum.auto()  # language head, and the coordinate head in case the token is a coordinate


class AxisOutputs(NamedTuple):
    """Output of the coordinate or size head for one axis.

    Attributes:
        value: Coordinate of the center or size, as a fraction of the image.
        features: Probability mass around the peak of the distribution.
    """

    value: float
    features: AxisFeatures


class HeadOutputs(NamedTuple):
    """All head outputs for one object or point.

    The device collects them over several steps as one row of a packed tensor with the columns `COLUMNS`. The last two
    fields belong to the decision after the object.

    Attributes:
        continue_probability: Probability that there is this object.
        x: Horizontal center.
        y: Vertical center.
        width: Width; zeros for a point.
        height: Height; zeros for a point.
        next_continue_probability: Probability of another object after this one.
        stop: Whether the end is more likely than another object.
    """

    continue_probability: float
    x: AxisOutputs
    y: AxisOutputs
    width: AxisOutputs
    height: AxisOutputs
    next_continue_probability: float
    stop: bool

    @classmethod
    def unpack(cls, packed: Sequence[float]) -> HeadOutputs:
        """Build the tuple from one row of the packed tensor."""
        x, y, width, height = (_unpack_axis(packed[COLUMNS[axis]]) for axis in AXES)
        return cls(
            continue_probability=packed[COLUMNS["continue_probability"].start],
            x=x,
            y=y,
            width=width,
            height=height,
            next_continue_probability=packed[COLUMNS["next_continue_probability"].start],
            stop=packed[COLUMNS["stop"].start] > 0,
        )


class TokenOutput(NamedTuple):
    """Output of the language head for one sequence.

    Attributes:
        token: Token ID.
        logprob: Logarithm of its probability.
        coordinate: Coordinate that the token stands for if it is the coordinate token of reasoning; otherwise 0.
    """

    token: int
    logprob: float
    coordinate: float


AXES = ("x", "y", "width", "height")


def _columns() -> dict[str, slice]:
    columns, start = {}, 0
    for field in HeadOutputs._fields:
        stop = start + (1 + len(AxisFeatures._fields) if field in AXES else 1)
        columns[field], start = slice(start, stop), stop
    return columns


def _unpack_axis(packed: Sequence[float]) -> AxisOutputs:
    value, *features = packed
    return AxisOutputs(value, AxisFeatures(*features))


COLUMNS = _columns()  # columns of each field of `HeadOutputs` in the packed tensor
NUM_PARTIAL_COLUMNS = COLUMNS["next_continue_probability"].start  # those of an object that is not complete


@dataclass(frozen=True)
class BatchOutputs:
    """Outputs of the heads for a batch of S sequences, on the device or on their way to the host.

    Attributes:
        embeddings: [S, dim] next input embedding of each sequence.
        partial: [S, NUM_PARTIAL_COLUMNS] float32 packed outputs for the object that each sequence decodes.
        deciding: Sequences that decided whether another object follows.
        writing: Sequences that wrote a token.
        packed: [deciding, all columns] packed outputs for their previous objects; None if there are none.
        sampled: [writing, 3] token ID, log-probability and coordinate; None if there are none.
    """

    embeddings: Tensor
    partial: Tensor
    deciding: list[int]
    writing: list[int]
    packed: HostCopy | None
    sampled: HostCopy | None

    def read(self) -> list[HeadOutputs | TokenOutput | None]:
        """Wait for the outputs and return those of each sequence; None while an object is incomplete."""
        outputs: list[HeadOutputs | TokenOutput | None] = [None] * len(self.embeddings)
        for i, values in zip(self.deciding, [] if self.packed is None else self.packed.read(), strict=True):
            outputs[i] = HeadOutputs.unpack(values)
        for i, values in zip(self.writing, [] if self.sampled is None else self.sampled.read(), strict=True):
            token, logprob, coordinate = values
            outputs[i] = TokenOutput(int(token), logprob, coordinate)
        return outputs


def run_heads(
    network: MoondreamNetwork,
    heads: Sequence[Head],
    hidden: Tensor,
    partial: Tensor,
    sampling: Sequence[SamplingParams | None],
    region_lora: RegionLora | None = None,
) -> BatchOutputs:
    """Apply the head of each sequence. No argument is modified.

    Args:
        network: Network with the heads.
        heads: Head of each of S sequences.
        hidden: [S, dim] hidden states before `post_ln`.
        partial: [S, NUM_PARTIAL_COLUMNS] packed outputs so far for the object that each sequence decodes.
        sampling: Sampling parameters of each sequence; None for the most likely objects and points.
        region_lora: Adapter of the region heads; None: no adapter.
    """
    by_head: dict[Head, list[int]] = {head: [] for head in Head}
    for i, head in enumerate(heads):
        by_head[head].append(i)
    deciding, reasoning = by_head[Head.X_OR_STOP], by_head[Head.REASONING]
    writing = by_head[Head.TOKEN] + reasoning
    embeddings, partial = torch.empty_like(hidden), partial.clone()
    packed: Tensor | None = None
    sampled: Tensor | None = None

    # Language head: stop decisions and tokens
    if deciding or writing:
        logits = network.text.logits(_gather(hidden, deciding + writing))  # [D + W, vocab_size]
        if deciding:
            decisions = logits[: len(deciding)]
            eos = network.config.tokenizer.eos_id
            continue_probs = continue_probability(decisions, eos)[:, None]
            stop = _choose_stops(decisions, continue_probs, [sampling[i] for i in deciding], eos)
            packed = torch.cat((_gather(partial, deciding), continue_probs, stop), 1)  # [D, all columns]
            _scatter(partial, deciding, continue_probs, COLUMNS["continue_probability"])
        if writing:
            writers = [one for i in writing if (one := sampling[i]) is not None]
            token_embeddings, sampled = _sample_tokens(
                network, writers, logits[len(deciding) :], _gather(hidden, writing), len(reasoning), region_lora
            )
            _scatter(embeddings, writing, token_embeddings)

    # Coordinate head: x and y
    for head, field in ((Head.X_OR_STOP, "x"), (Head.Y, "y")):
        if rows := by_head[head]:
            logits = network.region.decode_coordinate(_gather(hidden, rows), region_lora)
            params = [sampling[i] for i in rows]
            bins = _choose_bins(logits, _seconds(params) if head is Head.X_OR_STOP else params)
            coordinate = bin_to_coordinate(bins, logits.shape[-1])[:, None]  # [n, 1]
            _scatter(embeddings, rows, network.region.encode_coordinate(coordinate.to(hidden.dtype)))
            _scatter(partial, rows, torch.cat((coordinate, axis_features(logits)), -1), COLUMNS[field])

    # Size head: width and height
    if rows := by_head[Head.SIZE]:
        logits = network.region.decode_size(_gather(hidden, rows), region_lora)  # [n, 2, bins]
        params = [sampling[i] for i in rows]
        both = [one for pair in zip(params, _seconds(params), strict=True) for one in pair]
        bins = _choose_bins(logits.flatten(0, 1), both).view(-1, 2)
        size = bin_to_size(bins, logits.shape[-1])  # [n, 2]
        _scatter(embeddings, rows, network.region.encode_size(size.to(hidden.dtype)))
        outputs = torch.cat((size[..., None], axis_features(logits)), -1)  # [n, 2, columns of an axis]
        columns = slice(COLUMNS["width"].start, COLUMNS["height"].stop)
        _scatter(partial, rows, outputs.flatten(1), columns)

    # Start the transfer to the host
    on_host = [None if tensor is None else HostCopy(tensor) for tensor in (packed, sampled)]
    return BatchOutputs(embeddings, partial, deciding, writing, *on_host)


def _choose_stops(
    logits: Tensor, continue_probs: Tensor, params: Sequence[SamplingParams | None], eos_id: int
) -> Tensor:
    """Decide which lists end: next-token logits [D, vocab_size] → [D, 1] booleans.

    A list ends if the end is the most likely token. A sampled decision is one between the end and any other token.
    """
    stop = logits.argmax(-1) == eos_id
    if any(one is not None for one in params):
        probabilities = torch.cat((continue_probs, 1 - continue_probs), -1)
        stop = torch.where(_is_sampled(params, logits.device), _choose_bins(probabilities.log(), params) == 1, stop)
    return stop[:, None]


def _choose_bins(logits: Tensor, params: Sequence[SamplingParams | None]) -> Tensor:
    """Return the chosen bin of each row, [n, bins] → [n]: the most likely one, or a sample if there are parameters."""
    if all(one is None for one in params):
        return logits.argmax(-1)
    return sample(logits, [SamplingParams(0.0, 1.0, None) if one is None else one for one in params])[0]


def _seconds(params: Sequence[SamplingParams | None]) -> list[SamplingParams | None]:
    """Return the parameters of the second choices of a step; None for the most likely ones."""
    return [
        None if one is None or one.second_seed is None else SamplingParams(one.temperature, one.top_p, one.second_seed)
        for one in params
    ]


def _is_sampled(params: Sequence[SamplingParams | None], device: torch.device) -> Tensor:
    return integers([one is not None for one in params], device).bool()


def _sample_tokens(
    network: MoondreamNetwork,
    params: Sequence[SamplingParams],
    logits: Tensor,
    hidden: Tensor,
    num_reasoning: int,
    region_lora: RegionLora | None,
) -> tuple[Tensor, Tensor]:
    """Sample the next token of W sequences, of which the last `num_reasoning` ones are reasoning.

    Args:
        network: Network with the heads.
        params: Sampling parameters of each sequence.
        logits: [W, vocab_size] next-token logits.
        hidden: [W, dim] hidden states.
        num_reasoning: Number of sequences at the end that may emit a coordinate.
        region_lora: Adapter of the region heads; None: no adapter.

    Returns:
        [W, dim] embeddings of the tokens; [W, 3] token ID, log-probability and coordinate.
    """
    tokens, logprobs = sample(logits, params)
    embeddings, coordinates = network.text.embed(tokens), torch.zeros_like(logprobs)
    if num_reasoning:
        region = network.region
        bins = region.decode_coordinate(hidden[-num_reasoning:], region_lora)
        coordinate = bin_to_coordinate(_choose_bins(bins, _seconds(params[-num_reasoning:])), bins.shape[-1])
        coordinates[-num_reasoning:] = coordinate
        is_coordinate = (tokens[-num_reasoning:] == network.config.tokenizer.coord_id)[:, None]
        encoded = region.encode_coordinate(coordinate.to(hidden.dtype)[:, None])
        embeddings[-num_reasoning:] = torch.where(is_coordinate, encoded, embeddings[-num_reasoning:])
    return embeddings, torch.stack((tokens.float(), logprobs, coordinates), 1)


def _gather(tensor: Tensor, rows: list[int]) -> Tensor:
    """Return some rows of a tensor; all rows in order are returned without a copy."""
    if rows == list(range(len(tensor))):
        return tensor
    return tensor[integers(rows, tensor.device)]


def _scatter(tensor: Tensor, rows: list[int], values: Tensor, columns: slice = slice(None)) -> None:
    """Write [n, k] values to some rows of a tensor, in k of its columns."""
    if rows == list(range(len(tensor))):
        tensor[:, columns] = values
    else:
        tensor[integers(rows, tensor.device), columns] = values
