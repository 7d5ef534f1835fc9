"""Reading the heads of all rows at once: what each feeds next, and what the host has to know.

Coordinates and sizes go from logits to bins to embeddings on the device. The host waits for it once a step, and only
where some row may stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moondream_cv.engine.confidence import axis_features, continue_probability
from moondream_cv.engine.prompts import Prompt
from moondream_cv.engine.sampling import choose
from moondream_cv.engine.sequences import AXIS, Head, RegionRow, Row, TextRow
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.region import bin_to_coordinate, bin_to_size


@dataclass
class Reading:
    """What a step has read for R rows.

    Attributes:
        embeddings: [R, dim] what each feeds next.
        readings: [R, READINGS] of the object that each has begun.
        decisions: For the rows that decide: whether to stop, the probability of going on, the readings of before.
        tokens: For the rows that write: a token, its log-probability, the coordinate that it may stand for.
    """

    embeddings: Tensor
    readings: Tensor
    decisions: dict[int, list[float]]
    tokens: dict[int, list[float]]

    def tell(self, i: int, row: Row) -> Prompt | bool:
        """Tell row number i; say whether it goes on, perhaps with a prompt."""
        if isinstance(row, TextRow):
            token, logprob, coordinate = self.tokens[i]
            return row.take(int(token), logprob, coordinate)
        assert isinstance(row, RegionRow)
        if row.head is Head.DECISION:
            stop, going_on, *before = self.decisions[i]
            return row.decide(stop > 0, going_on, before)
        row.advance()
        return True


def read(network: MoondreamNetwork, rows: Sequence[Row], hidden: Tensor, readings: Tensor) -> Reading:
    """Read whatever each row reads next; nothing but the result tells of it.

    Args:
        hidden: [R, dim] hidden states, before `post_ln`.
        readings: [R, READINGS] of the objects that the rows have begun.
    """
    heads: dict[Head, list[int]] = {head: [] for head in Head}
    for i, row in enumerate(rows):
        heads[row.head].append(i)
    deciding, writing = heads[Head.DECISION], heads[Head.TOKEN] + heads[Head.THOUGHT]
    embeddings, readings = torch.empty_like(hidden), readings.clone()
    decided: Tensor | None = None
    written: Tensor | None = None
    if deciding or writing:
        logits = network.text.logits(_pick(hidden, deciding + writing))  # [D + W, vocab_size]
        if deciding:
            of_deciding = logits[: len(deciding)]
            eos = network.config.tokenizer.eos_id
            going_on = continue_probability(of_deciding, eos)[:, None]
            stop = (of_deciding.argmax(-1) == eos)[:, None]
            decided = torch.cat((stop, going_on, _pick(readings, deciding)), 1)  # [D, 2 + READINGS]
            _put(readings, deciding, going_on, 0)
        if writing:
            chosen = _write(network, [rows[i] for i in writing], logits[len(deciding) :], _pick(hidden, writing))
            _put(embeddings, writing, chosen[0])
            written = chosen[1]
    for axis, head in enumerate((Head.DECISION, Head.Y)):
        if heads[head]:
            logits = network.region.decode_coordinate(_pick(hidden, heads[head]))
            coordinate = bin_to_coordinate(logits.argmax(-1), logits.shape[-1])[:, None]  # [n, 1]
            _put(embeddings, heads[head], network.region.encode_coordinate(coordinate.to(hidden.dtype)))
            _put(readings, heads[head], torch.cat((coordinate, axis_features(logits)), -1), 1 + axis * AXIS)
    if heads[Head.SIZE]:
        logits = network.region.decode_size(_pick(hidden, heads[Head.SIZE]))
        size = bin_to_size(logits.argmax(-1), logits.shape[-1])  # [n, 2]
        _put(embeddings, heads[Head.SIZE], network.region.encode_size(size.to(hidden.dtype)))
        read = torch.cat((size[..., None], axis_features(logits)), -1)  # [n, 2, AXIS]
        _put(readings, heads[Head.SIZE], read.flatten(1), 1 + 2 * AXIS)
    # The only places where the device is waited for.
    decisions = [] if decided is None else decided.tolist()
    tokens = [] if written is None else written.tolist()
    return Reading(
        embeddings, readings, dict(zip(deciding, decisions, strict=True)), dict(zip(writing, tokens, strict=True))
    )


def _write(network: MoondreamNetwork, rows: Sequence[Row], logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the next token of each row.

    Returns:
        [W, dim] what is fed for it; [W, 3] token, log-probability, and the coordinate that it stands for in a thought.
    """
    texts = [row for row in rows if isinstance(row, TextRow)]
    tokens, logprobs = choose(
        logits,
        [row.request.settings.temperature for row in texts],
        [row.request.settings.top_p for row in texts],
        [row.draw for row in texts],
        [row.banned for row in texts],
        # Computed on the CPU while the device runs the decoder
        [row.grammar.bitmask() if row.grammar and row.head is Head.TOKEN else None for row in texts],
    )
    embeddings, coordinates = network.text.embed(tokens), torch.zeros_like(logprobs)
    thinking = [i for i, row in enumerate(texts) if row.head is Head.THOUGHT]
    if thinking:
        region = network.region
        bins = region.decode_coordinate(_pick(hidden, thinking))
        coordinate = bin_to_coordinate(bins.argmax(-1), bins.shape[-1])
        _put(coordinates[:, None], thinking, coordinate[:, None])
        stands_for_it = (_pick(tokens, thinking) == network.config.tokenizer.coord_id)[:, None]
        encoded = region.encode_coordinate(coordinate.to(hidden.dtype)[:, None])
        _put(embeddings, thinking, torch.where(stands_for_it, encoded, _pick(embeddings, thinking)))
    return embeddings, torch.stack((tokens.float(), logprobs, coordinates), 1)


def _pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor; all of them without a copy where they stand in order."""
    if rows == list(range(len(tensor))):
        return tensor
    return tensor[torch.tensor(rows, device=tensor.device, dtype=torch.long)]


def _put(tensor: Tensor, rows: list[int], values: Tensor, column: int = 0) -> None:
    """Write [n, k] values to some rows of a tensor, from a column on."""
    stop = column + values.shape[1]
    if rows == list(range(len(tensor))):
        tensor[:, column:stop] = values
    else:
        tensor[torch.tensor(rows, device=tensor.device, dtype=torch.long), column:stop] = values
