"""Keys and values of rows that decode together; the rows of an image share one copy of its prefix.

A context is an image's prefix and behind it whatever its rows have fed, in the order of time. Each entry has an owner,
and a row attends to the prefix and to its own entries. So memory grows with what the rows feed and not with rows ×
prefix, and a step reads each prefix once: the queries of all rows of an image are one product with its keys.

Contexts are stacked, and all of them write at the same place: one that feeds fewer entries than another leaves gaps
that nobody sees. A cache knows nothing of what a row is about.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from moondream_cv.engine.prefix import Prefix
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import attention

NOBODY, EVERYBODY = -2, -1  # owners of gaps and of prefixes; rows have keys from 0 on
GROWTH_STEPS = 16  # steps like the present one for which a full cache gets room


class SharedCache:
    """The stacked contexts of images with prefixes of one length, or of rows without an image.

    Attributes:
        count: Contexts in use; they are numbered from 0.
        end: Where the next entries are written.
    """

    def __init__(self, network: MoondreamNetwork, prefix_length: int, contexts: int, capacity: int) -> None:
        config = network.config.text
        self.prefix_length, self.count, self.end = prefix_length, 0, prefix_length
        self._stop = self.end  # of the step that is open
        tensor = torch.empty(0, device=network.device, dtype=network.dtype)
        shape = (2, contexts, config.n_kv_heads, prefix_length + capacity, config.head_dim)
        # Zeros: a gap's weight is 0, and 0 times whatever uninitialised memory holds may be NaN.
        self._layers = [tensor.new_zeros(shape) for _ in range(config.n_layers)]  # keys, then values
        self._inputs = tensor.new_zeros(contexts, prefix_length + capacity, config.dim)
        self._owner = torch.full((contexts, prefix_length + capacity), NOBODY, device=network.device, dtype=torch.long)
        self._mask = tensor
        self._clean = network.dtype == torch.float16

    @property
    def contexts(self) -> int:
        """How many contexts there is memory for."""
        return self._owner.shape[0]

    @property
    def capacity(self) -> int:
        """Entries of a context, its prefix included, that there is memory for."""
        return self._owner.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._layers, self._inputs, self._owner))

    def add(self, prefix: Prefix | None) -> int:
        """Copy a prefix into a new context; give back its number."""
        if self.count == self.contexts:
            self._resize(2 * self.contexts, self.capacity)
        number = self.count
        if prefix is not None:
            for layer, (keys, values) in zip(self._layers, prefix.layers, strict=True):
                layer[0, number, :, : self.prefix_length] = keys[0]
                layer[1, number, :, : self.prefix_length] = values[0]
        for layer in self._layers:  # of the context that was here before, which may have held no numbers
            layer[:, number, :, self.prefix_length : self.end] = 0
        self._owner[number] = NOBODY
        self._owner[number, : self.prefix_length] = EVERYBODY
        self.count += 1
        return number

    def remove(self, number: int) -> None:
        """Drop a context; the last one takes its number."""
        self.count -= 1
        if number == self.count:
            return
        for layer in self._layers:
            layer[:, number] = layer[:, self.count]
        self._inputs[number], self._owner[number] = self._inputs[self.count], self._owner[self.count]

    def make_room(self, contexts: int, entries: int, live: Collection[int]) -> None:
        """See to it that there is memory for so many contexts, and for so many more entries in each.

        Args:
            live: Keys of the rows that are still decoding; entries of all others are dropped where memory is short.
        """
        capacity = self.capacity
        if self.end + entries > capacity:
            self._pack(live)
            ahead = GROWTH_STEPS * entries
            if self.end + ahead > capacity:  # else packing has made room for a while
                capacity = self.end + max(ahead, (self.end - self.prefix_length) // 2)
        if contexts > self.contexts or capacity > self.capacity:
            self._resize(max(contexts, self.contexts), capacity)

    def open(self, owners: Tensor, inputs: Tensor, causal: bool) -> None:
        """Prepare a step, for whose entries `make_room` has seen to it that there is memory.

        Args:
            owners: [count, T] keys of the rows whose entries they are.
            inputs: [count, T, dim] embeddings that are fed; `fed` gives them back.
            causal: Whether a row feeds several entries, of which each sees those before it.
        """
        steps = owners.shape[1]
        self._stop = stop = self.end + steps
        self._owner[: self.count, self.end : stop] = owners
        self._inputs[: self.count, self.end : stop] = inputs
        seen = self._owner[: self.count, None, :stop]
        allowed = (seen == owners[..., None]) | (seen == EVERYBODY)  # [count, T, stop]
        if causal:
            allowed[..., self.end :] &= torch.ones(steps, steps, dtype=torch.bool, device=owners.device).tril()
        mask = torch.zeros(allowed.shape, device=owners.device, dtype=self._layers[0].dtype)
        self._mask = mask.masked_fill_(~allowed, -torch.inf)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the step's [count, T, kv_heads, head_dim] entries of one layer and attend to all that each may see."""
        if self._clean:  # half precision overflows, and one row's NaN would reach the others through their zero weights
            k, v = torch.nan_to_num(k), torch.nan_to_num(v)
        kept = self._layers[layer][:, : self.count, :, : self._stop]
        kept[0, :, :, self.end :] = k.transpose(1, 2)
        kept[1, :, :, self.end :] = v.transpose(1, 2)
        return attention(q, kept[0].transpose(1, 2), kept[1].transpose(1, 2), self._mask)

    def commit(self) -> None:
        """Close a step: its entries stand. A step that is opened anew instead has never been."""
        self.end = self._stop

    def release(self) -> None:
        """Free the keys and values. Only `fed` may follow, which needs neither."""
        self._layers, self._mask = [], self._mask.new_empty(0)

    def fed(self, number: int, owner: int) -> Tensor:
        """[n, dim] embeddings that a row has fed, in their order."""
        return self._inputs[number, : self.end][self._owner[number, : self.end] == owner]

    def _pack(self, live: Collection[int]) -> None:
        """Move the entries of live rows together. Where this fails, `fed` still tells what it did."""
        owners = self._owner[: self.count, : self.end]
        keys = torch.tensor([EVERYBODY, *live], device=owners.device, dtype=torch.long)
        dead = ~torch.isin(owners, keys)
        end = self.end - int(dead.sum(1).min()) if self.count else self.prefix_length
        if end == self.end:
            return
        order = dead.int().argsort(dim=1, stable=True)[:, :end]
        inputs = self._inputs[: self.count].gather(1, order[..., None].expand(-1, -1, self._inputs.shape[2]))
        owners = owners.gather(1, order).masked_fill_(dead.gather(1, order), NOBODY)
        for number, source in enumerate(order):
            for layer in self._layers:
                layer[:, number, :, :end] = layer[:, number].index_select(2, source)
        self._inputs[: self.count, :end], self._owner[: self.count, :end] = inputs, owners
        self._owner[:, end:] = NOBODY
        self.end = end

    def _resize(self, contexts: int, capacity: int) -> None:
        """Move everything to memory of another size, layer by layer: two copies of all would not fit."""
        inputs = self._inputs.new_zeros(contexts, capacity, self._inputs.shape[2])
        owner = self._owner.new_full((contexts, capacity), NOBODY)
        for i, layer in enumerate(self._layers):
            shape = (2, contexts, layer.shape[2], capacity, layer.shape[4])
            self._layers[i] = layer.new_zeros(shape)
            self._layers[i][:, : self.count, :, : self.end] = layer[:, : self.count, :, : self.end]
            del layer
        inputs[: self.count, : self.end] = self._inputs[: self.count, : self.end]
        owner[: self.count, : self.end] = self._owner[: self.count, : self.end]
        self._inputs, self._owner = inputs, owner
