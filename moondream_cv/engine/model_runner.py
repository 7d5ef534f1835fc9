"""Rows that decode together: one pass of the decoder over all of them, then the heads that each of them reads.

Rows may be of any skill, on any image, anywhere in their replies; they share an adapter. What the heads say is read in
`reading.py`, what it means to a row is known in `rows.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from moondream_cv.engine.heads import Reading, read
from moondream_cv.engine.kv_cache import GROWTH_STEPS, NOBODY, SharedCache
from moondream_cv.engine.prefix import Prefix
from moondream_cv.engine.prompts import Prompt, embed_prompts
from moondream_cv.engine.sequences import READINGS, Row
from moondream_cv.errors import MoondreamError
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora

Feed: TypeAlias = Prompt | Tensor
"""What a row is to feed: a prompt, or [T, dim] embeddings."""


def feed_length(feed: Feed) -> int:
    """In tokens."""
    return len(feed.ids) if isinstance(feed, Prompt) else len(feed)


@dataclass(eq=False)
class _Context:
    """An image that rows decode on, or what rows without an image have in common.

    Attributes:
        image: Identifies it.
        cache: Holds its keys and values.
        number: Of the context in its cache.
    """

    image: object
    cache: SharedCache
    number: int


@dataclass(eq=False)
class _Seat:
    """A row and where it is; `feed` is what it feeds next where that is something else than what was read last."""

    row: Row
    context: _Context
    feed: Feed | None

    @property
    def place(self) -> tuple[int, int, int]:
        return id(self.context.cache), self.context.number, self.row.key

    @property
    def steps(self) -> int:
        return 1 if self.feed is None else feed_length(self.feed)


@dataclass(frozen=True)
class Arrival:
    """A row that is to join a batch.

    Attributes:
        image: Identifies the image that it is on; rows with the same one share its context.
        prefix: Of the image; None without one.
        feed: What it feeds first.
        readings: [READINGS] of the object that it has begun, where it has been decoding before.
    """

    row: Row
    image: object
    prefix: Prefix | None
    feed: Feed
    readings: Tensor | None = None


@dataclass
class _Part:
    """What a step feeds into one cache: its tokens in a [contexts, T] table, with gaps where a context has fewer."""

    cache: SharedCache
    owners: Tensor  # [contexts, T]
    index: Tensor | None  # [contexts, T] numbers of tokens; None: the step's tokens as they come
    causal: bool

    def spread(self, tokens: Tensor) -> Tensor:
        """[N, ...] of the step's tokens → [contexts, T, ...]."""
        contexts, steps = self.owners.shape
        return tokens.view(contexts, steps, *tokens.shape[1:]) if self.index is None else tokens[self.index]


@dataclass
class _Plan:
    """Which token stands where in a step. It serves the following steps, too, while the same rows feed one each.

    Attributes:
        positions: [1, N] of the tokens of the first step.
        parts: One for each cache.
        order: [N] where each token stands in the parts' tables behind one another; None: in this order.
        last: [R] the last token of each row; None: each row has one token, in this order.
    """

    positions: Tensor
    parts: list[_Part]
    order: Tensor | None
    last: Tensor | None
    age: int = 0  # steps that it has served


class _Attend:
    """How one layer's tokens attend: each part's in its cache."""

    def __init__(self, plan: _Plan, layer: int) -> None:
        self._plan, self._layer = plan, layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = [
            part.cache.attend(self._layer, part.spread(q[0]), part.spread(k[0]), part.spread(v[0])).flatten(0, 1)
            for part in self._plan.parts
        ]
        joined = out[0] if len(out) == 1 else torch.cat(out)
        return (joined if self._plan.order is None else joined[self._plan.order])[None]


class Batch:
    """Rows of one adapter, each on its context.

    Attributes:
        lora: The adapter.
    """

    def __init__(self, network: MoondreamNetwork, lora: Sequence[LayerLora] | None) -> None:
        self._network, self.lora = network, lora
        self._seats: list[_Seat] = []
        self._contexts: list[_Context] = []
        self._caches: dict[tuple[int, int], SharedCache] = {}  # by length of prefix, and roughly by rows of an image
        # What each row feeds next, unless its seat says otherwise, and what has been read of the object it has begun.
        self._embeddings = torch.empty(0, network.config.text.dim, device=network.device, dtype=network.dtype)
        self._readings = torch.empty(0, READINGS, device=network.device, dtype=torch.float32)
        self._plan: _Plan | None = None

    @property
    def rows(self) -> list[Row]:
        return [seat.row for seat in self._seats]

    @property
    def images(self) -> int:
        """How many contexts there are."""
        return len(self._contexts)

    def holds(self, image: object) -> bool:
        """Whether rows are decoding on an image, so that its prefix is here."""
        return any(context.image is image for context in self._contexts)

    @torch.inference_mode()
    def join(self, arrivals: Sequence[Arrival]) -> None:
        """Let rows take part from the next step on; where this raises, none of them does."""
        groups: dict[int, list[Arrival]] = {}
        for arrival in arrivals:
            groups.setdefault(id(arrival.image), []).append(arrival)
        self._open_contexts([group for group in groups.values() if not self.holds(group[0].image)])
        blank = self._readings.new_zeros(READINGS)
        fresh = torch.stack([blank if arrival.readings is None else arrival.readings for arrival in arrivals])
        readings = torch.cat((self._readings, fresh))
        nothing = self._embeddings.new_zeros(len(arrivals), self._embeddings.shape[1])
        self._embeddings, self._readings = torch.cat((self._embeddings, nothing)), readings
        contexts = {id(context.image): context for context in self._contexts}
        self._seats += [_Seat(arrival.row, contexts[id(arrival.image)], arrival.feed) for arrival in arrivals]
        self._plan = None

    @torch.inference_mode()
    def leave(self, gone: Collection[int]) -> None:
        """Let the rows with these keys go, whether they have ended or not."""
        self._keep([i for i, seat in enumerate(self._seats) if seat.row.key not in gone])

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Exception | None]]:
        """Feed every row and read what comes next.

        Where this raises for want of memory, the rows are where they were, and `evict` gives them back.

        Returns:
            The rows that have ended, with the error of those that failed. They must `leave` before the next step.
        """
        if self._plan is None:
            self._plan = self._make_plan()
        plan = self._plan
        self._embed_prompts()
        x = self._embeddings
        if any(seat.feed is not None for seat in self._seats):
            x = torch.cat([self._fed_next(i) for i in range(len(self._seats))])
        for part in plan.parts:
            steps = part.owners.shape[1]
            if part.cache.end + steps > part.cache.capacity:
                part.cache.make_room(part.cache.count, steps, [seat.row.key for seat in self._seats])
            part.cache.open(part.owners, part.spread(x), part.causal)
        attends = [_Attend(plan, layer) for layer in range(self._network.config.text.n_layers)]
        positions = plan.positions + plan.age if plan.age else plan.positions
        hidden = self._network.text(x[None], positions, attends=attends, lora=self.lora)[0]  # [N, dim]
        reading = read(self._network, self.rows, hidden if plan.last is None else hidden[plan.last], self._readings)
        # From here on nothing asks the device for memory: the step is done as a whole or not at all.
        for part in plan.parts:
            part.cache.commit()
        return self._take(reading)

    @torch.inference_mode()
    def evict(self) -> list[Arrival]:
        """Let all rows go and free their memory; each comes back as what lets it go on from where it is."""
        for context in self._contexts:
            context.cache.release()  # first of all: what follows needs a little memory
        self._embed_prompts()
        arrivals = []
        for i, seat in enumerate(self._seats):
            fed = seat.context.cache.fed(seat.context.number, seat.row.key)
            feed = torch.cat((fed, self._fed_next(i)))
            arrivals.append(Arrival(seat.row, seat.context.image, None, feed, self._readings[i].clone()))
        for seat in self._seats:
            seat.row.length = seat.context.cache.prefix_length
        self._seats, self._contexts, self._caches, self._plan = [], [], {}, None
        self._embeddings, self._readings = self._embeddings[:0], self._readings[:0]
        return arrivals

    def _embed_prompts(self) -> None:
        prompted = [(seat, seat.feed) for seat in self._seats if isinstance(seat.feed, Prompt)]
        feeds = embed_prompts(self._network, [prompt for _, prompt in prompted])
        for (seat, _), feed in zip(prompted, feeds, strict=True):
            seat.feed = feed

    def _fed_next(self, i: int) -> Tensor:
        """[T, dim] embeddings that seat number i feeds in the next step, its prompt being embedded."""
        feed = self._seats[i].feed
        return feed if isinstance(feed, Tensor) else self._embeddings[i][None]

    def _open_contexts(self, groups: list[list[Arrival]]) -> None:
        """Make a context for each group of rows on the same image; those with about as many rows are stacked."""
        stacks: dict[tuple[int, int], list[list[Arrival]]] = {}
        for group in groups:
            prefix = group[0].prefix
            key = (0 if prefix is None else prefix.length, 1 << (len(group) - 1).bit_length())
            stacks.setdefault(key, []).append(group)
        for key, stack in stacks.items():
            if key not in self._caches:
                entries = (
                    max(sum(feed_length(arrival.feed) for arrival in group) for group in stack) + GROWTH_STEPS * key[1]
                )
                self._caches[key] = SharedCache(self._network, key[0], len(stack), entries)
            cache = self._caches[key]
            cache.make_room(cache.count + len(stack), 0, ())
            self._contexts += [_Context(group[0].image, cache, cache.add(group[0].prefix)) for group in stack]

    def _make_plan(self) -> _Plan:
        """Sort the seats by context, and say where each of their tokens stands."""
        seats = self._seats
        order = sorted(range(len(seats)), key=lambda i: seats[i].place)
        if order != list(range(len(seats))):
            self._keep(order)
            seats = self._seats
        tables: dict[int, list[list[int]]] = {}
        caches = {id(seat.context.cache): seat.context.cache for seat in seats}
        owners: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for seat in seats:
            table = tables.setdefault(id(seat.context.cache), [[] for _ in range(seat.context.cache.count)])
            table[seat.context.number] += range(len(owners), len(owners) + seat.steps)
            owners += [seat.row.key] * seat.steps
            positions += range(seat.row.length, seat.row.length + seat.steps)
            last.append(len(owners) - 1)
        causal = len(owners) > len(seats)
        integers = functools.partial(torch.tensor, device=self._network.device, dtype=torch.long)
        parts, flat = [], []
        for key, table in tables.items():
            steps = max(len(tokens) for tokens in table)
            padded = [tokens + [-1] * (steps - len(tokens)) for tokens in table]
            # A gap repeats a token of its own context: no row of another image may do harm there.
            filled = [tokens + tokens[:1] * (steps - len(tokens)) for tokens in table]
            ids = integers([[owners[t] if t >= 0 else NOBODY for t in tokens] for tokens in padded])
            dense = [t for tokens in padded for t in tokens]
            flat += dense
            index = None if dense == list(range(len(owners))) else integers(filled)
            parts.append(_Part(caches[key], ids, index, causal))
        where = {token: place for place, token in enumerate(flat) if token >= 0}
        in_order = flat == list(range(len(owners)))
        return _Plan(
            positions=integers([positions]),
            parts=parts,
            order=None if in_order else integers([where[t] for t in range(len(owners))]),
            last=integers(last) if causal else None,
        )

    def _take(self, reading: Reading) -> list[tuple[Row, Exception | None]]:
        """Tell the rows what was read, and see which go on with what."""
        assert self._plan is not None
        ended: list[tuple[Row, Exception | None]] = []
        same = True
        for i, seat in enumerate(self._seats):
            seat.row.length += seat.steps
            same = same and seat.feed is None
            seat.feed = None
            try:
                next_feed = reading.tell(i, seat.row)
            except MoondreamError as error:
                ended.append((seat.row, error))
                continue
            if next_feed is False:
                ended.append((seat.row, None))
            elif isinstance(next_feed, Prompt):
                seat.feed, same = next_feed, False
        self._embeddings, self._readings = reading.embeddings, reading.readings
        if same:
            self._plan.age += 1
        else:
            self._plan = None
        return ended

    def _keep(self, order: list[int]) -> None:
        """Keep these seats, in this order; contexts without rows go."""
        index = torch.tensor(order, dtype=torch.long, device=self._network.device)
        embeddings, readings = self._embeddings[index], self._readings[index]
        self._embeddings, self._readings, self._plan = embeddings, readings, None
        self._seats = [self._seats[i] for i in order]
        used = {id(seat.context) for seat in self._seats}
        for context in [c for c in self._contexts if id(c) not in used]:
            context.cache.remove(context.number)
            self._contexts.remove(context)
            for moved in self._contexts:
                if moved.cache is context.cache and moved.number == context.cache.count:
                    moved.number = context.number
        self._caches = {key: cache for key, cache in self._caches.items() if cache.count}
