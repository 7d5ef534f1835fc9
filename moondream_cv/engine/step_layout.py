"""Layout of a decoding step: the position of every token in the step's batch and in the KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moondream_cv.engine.kv_cache import PADDING_ID
from moondream_cv.engine.transfers import integers


class SequenceSlot(NamedTuple):
    """Location and new tokens of one sequence. Slots are ordered by cache, group and sequence.

    Attributes:
        cache: Index of the KV cache.
        group: Index of the group in the cache.
        seq_id: ID of the sequence.
        position: Position of the first new token in the context.
        num_new_tokens: Number of tokens that the step computes.
    """

    cache: int
    group: int
    seq_id: int
    position: int
    num_new_tokens: int


@dataclass(frozen=True)
class CacheSlice:
    """Tokens that a step adds to one KV cache, as a padded [groups, T] table.

    Attributes:
        seq_ids: [groups, T] ID of the sequence of each token; `PADDING_ID` for padding.
        index: [groups, T] index of each token in the batch; None: the table is the batch itself, reshaped.
        causal: Whether some sequence adds several tokens.
    """

    seq_ids: Tensor
    index: Tensor | None
    causal: bool

    def scatter(self, tokens: Tensor) -> Tensor:
        """Arrange the [N, ...] values of the batch as [groups, T, ...]."""
        groups, steps = self.seq_ids.shape
        return tokens.view(groups, steps, *tokens.shape[1:]) if self.index is None else tokens[self.index]


@dataclass(frozen=True)
class StepLayout:
    """Layout of a step with N tokens of S sequences. It contains indices only.

    Attributes:
        positions: [1, N] position of each token in its context.
        slices: One slice per KV cache.
        order: [N] row of each token in the concatenated tables of all slices; None: the tables are in token order.
        last: [S] index of the last token of each sequence; None: each sequence has one token.
    """

    positions: Tensor
    slices: tuple[CacheSlice, ...]
    order: Tensor | None
    last: Tensor | None

    @property
    def num_entries(self) -> tuple[int, ...]:
        """Number of entries that the step adds to each group of each KV cache."""
        return tuple(part.seq_ids.shape[1] for part in self.slices)

    @property
    def is_repeatable(self) -> bool:
        """Whether `next_step` can be called: each sequence has one token."""
        return self.last is None

    def gather(self, tables: Sequence[Tensor]) -> Tensor:
        """Collect the [N, ...] values of the batch from one [groups, T, ...] table per slice."""
        flat = [table.flatten(0, 1) for table in tables]
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        return joined if self.order is None else joined[self.order]

    def next_step(self) -> StepLayout:
        """Return the layout of the next step, in which each sequence adds one token."""
        return replace(self, positions=self.positions + 1)


@dataclass(frozen=True)
class StaticLayout:
    """Layout of a step with one token per sequence and one KV cache, as a padded table of a fixed shape.

    Attributes:
        seq_ids: [groups, T] ID of the sequence of each token; `PADDING_ID` for padding.
        rows: [S] row of each sequence in the flattened table.
        positions: [S] position of each sequence's token in its context.
    """

    seq_ids: Tensor
    rows: Tensor
    positions: Tensor

    @property
    def num_entries(self) -> tuple[int, ...]:
        """Number of entries that the step adds to each group of the KV cache."""
        return (self.seq_ids.shape[1],)

    @property
    def is_repeatable(self) -> bool:
        """Whether `next_step` can be called."""
        return True

    def next_step(self) -> StaticLayout:
        """Return the layout of the next step."""
        return replace(self, positions=self.positions + 1)


def plan_static_step(
    slots: Sequence[SequenceSlot], max_groups: int, tokens_per_group: int, device: torch.device
) -> StaticLayout:
    """Build the layout of a step with static shapes.

    Args:
        slots: Sequences of the step, in order of group and sequence ID, each with one new token.
        max_groups: Rows of the table; groups that are not in use are padding.
        tokens_per_group: Columns of the table, T.
        device: Device of the network.
    """
    table = [[PADDING_ID] * tokens_per_group for _ in range(max_groups)]
    used = [0] * max_groups
    rows = []
    for slot in slots:
        table[slot.group][used[slot.group]] = slot.seq_id
        rows.append(slot.group * tokens_per_group + used[slot.group])
        used[slot.group] += 1
    positions = [slot.position for slot in slots]
    return StaticLayout(integers(table, device), integers(rows, device), integers(positions, device))


def plan_step(slots: Sequence[SequenceSlot], num_groups: Sequence[int], device: torch.device) -> StepLayout:
    """Build the layout of a step.

    Args:
        slots: Sequences of the step, in order of cache, group and sequence ID.
        num_groups: Number of groups of each KV cache.
        device: Device of the network.
    """
    # Number the tokens and assign them to groups
    tables: list[list[list[int]]] = [[[] for _ in range(count)] for count in num_groups]
    seq_ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    for slot in slots:
        tables[slot.cache][slot.group] += range(len(seq_ids), len(seq_ids) + slot.num_new_tokens)
        seq_ids += [slot.seq_id] * slot.num_new_tokens
        positions += range(slot.position, slot.position + slot.num_new_tokens)
        last.append(len(seq_ids) - 1)
    causal = len(seq_ids) > len(slots)
    in_order = list(range(len(seq_ids)))

    # Pad the groups of each cache to the same number of tokens
    slices, flat = [], []
    for table in tables:
        steps = max(len(tokens) for tokens in table)
        padded = [tokens + [-1] * (steps - len(tokens)) for tokens in table]
        ids = integers([[seq_ids[t] if t >= 0 else PADDING_ID for t in tokens] for tokens in padded], device)
        dense = [t for tokens in padded for t in tokens]
        flat += dense
        # Padding repeats a token of the same group, so that NaN cannot come from another image.
        filled = [tokens + tokens[:1] * (steps - len(tokens)) for tokens in table]
        slices.append(CacheSlice(ids, None if dense == in_order else integers(filled, device), causal))

    # Map the tables back to the batch
    rows = {token: row for row, token in enumerate(flat) if token >= 0}
    return StepLayout(
        positions=integers([positions], device),
        slices=tuple(slices),
        order=None if flat == in_order else integers([rows[t] for t in in_order], device),
        last=integers(last, device) if causal else None,
    )
