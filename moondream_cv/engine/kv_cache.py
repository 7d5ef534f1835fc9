"""KV caches of the decoder: the prefix of an image, and the cache that all sequences on an image share.

A group consists of one image prefix and the entries of the sequences that decode on that image, in the order in which
they were written. Each entry belongs to one sequence. A sequence attends to the prefix and to its own entries. Memory
therefore grows with the number of decoded tokens and not with sequences × prefix length, and a step reads each prefix
once: the queries of all sequences of a group are multiplied with the same keys.

Groups are stacked along the batch dimension and share one write position. A group that writes fewer entries than
another one is padded; no sequence attends to padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moondream_cv.model.adapters import Adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import attention

PADDING_ID, PREFIX_ID = -2, -1  # seq_id of padding and of prefix entries; sequences have IDs from 0 on
GROWTH_STEPS = 16  # steps of the current size that fit into a cache after it has grown


@dataclass(frozen=True)
class ImagePrefix:
    """Keys and values of the tokens of one image, or of a conversation up to its last image.

    Attributes:
        layers: For each layer the keys and the values, both [1, kv_heads, P, head_dim].
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


def prefill_images(
    network: MoondreamNetwork,
    embeddings: Tensor,
    adapter: Adapter | None,
    on_layer: Callable[[int], None] | None = None,
    mask: Tensor | None = None,
) -> list[ImagePrefix]:
    """Compute the keys and values of image tokens. The tokens of an image attend to one another in both directions.

    Args:
        network: Network that runs the decoder.
        embeddings: [I, P, dim] token embeddings of I images.
        adapter: Adapter; None: no adapter.
        on_layer: Function that receives the number of complete layers in each layer.
        mask: [P, P] booleans, True if attention is allowed; None: everywhere.

    Returns:
        One prefix per image. Prefixes share no memory, so each can be freed separately.
    """
    recorders = [_KVRecorder(layer, on_layer, mask) for layer in range(len(network.text.blocks))]
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    with torch.inference_mode():
        network.text(embeddings, positions, attends=recorders, adapter=adapter and adapter.layers)
    return [
        ImagePrefix(tuple((_copy_image(r.keys, image), _copy_image(r.values, image)) for r in recorders))
        for image in range(len(embeddings))
    ]


class _KVRecorder:
    """Attention that keeps the keys and values it receives."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: int, on_layer: Callable[[int], None] | None, mask: Tensor | None) -> None:
        self._layer, self._on_layer, self._mask = layer, on_layer, mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._on_layer is not None:
            self._on_layer(self._layer)
        self.keys, self.values = k, v
        return attention(q, k, v, self._mask)


def _copy_image(tensor: Tensor, image: int) -> Tensor:
    """[I, P, kv_heads, head_dim] → a copy of one image's [1, kv_heads, P, head_dim]."""
    return tensor[image : image + 1].transpose(1, 2).clone(memory_format=torch.contiguous_format)


@dataclass(eq=False)
class CacheGroup:
    """Location of a group.

    Attributes:
        key: Object that identifies the image; sequences with the same key share the group.
        cache: Cache that contains the group.
        index: Index of the group in the cache.
    """

    key: object
    cache: PrefixSharedKVCache
    index: int


@dataclass(eq=False)
class KVBuffers:
    """Tensors of a KV cache.

    Attributes:
        layers: For each layer the keys and the values, [2, groups, kv_heads, capacity, head_dim].
        inputs: [groups, capacity, dim] input embeddings of the entries.
        seq_ids: [groups, capacity] sequence ID of each entry; `PREFIX_ID` for the image prefix, `PADDING_ID` for
            padding.
        steps: Decode steps that were built for these tensors; only `cuda_graphs.py` uses them.
    """

    layers: list[Tensor]
    inputs: Tensor
    seq_ids: Tensor
    steps: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def allocate(cls, network: MoondreamNetwork, max_groups: int, capacity: int) -> KVBuffers:
        """Allocate empty tensors on the device of a network and in its dtype.

        Args:
            network: Network that the cache is for.
            max_groups: Number of groups.
            capacity: Entries per group, including the prefix.
        """
        config = network.config.text
        empty = torch.empty(0, device=network.device, dtype=network.dtype)
        shape = (2, max_groups, config.n_kv_heads, capacity, config.head_dim)
        return cls(
            # Zeros: padding has weight 0, and 0 times uninitialized memory may be NaN.
            layers=[empty.new_zeros(shape) for _ in range(config.n_layers)],
            inputs=empty.new_zeros(max_groups, capacity, config.dim),
            seq_ids=torch.full((max_groups, capacity), PADDING_ID, device=network.device, dtype=torch.long),
        )

    @property
    def max_groups(self) -> int:
        """Number of groups that memory is allocated for."""
        return self.seq_ids.shape[0]

    @property
    def capacity(self) -> int:
        """Entries per group, including the prefix, that memory is allocated for."""
        return self.seq_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in (*self.layers, self.inputs, self.seq_ids))

    def clear(self) -> None:
        """Make the tensors equal to newly allocated ones."""
        torch._foreach_zero_(self.layers)
        self.inputs.zero_()
        self.seq_ids.fill_(PADDING_ID)


class BufferPool(Protocol):
    """Source of tensors for KV caches that are reused from request to request."""

    def take(self, max_groups: int, capacity: int) -> KVBuffers:
        """Return empty tensors for at least this many groups and entries per group."""

    def give_back(self, buffers: KVBuffers) -> None:
        """Receive tensors that a cache no longer uses."""


class PrefixSharedKVCache:
    """KV cache of several groups whose image prefixes have the same length; without an image, that length is 0.

    Attributes:
        prefix_length: Tokens of each image prefix.
        num_groups: Groups in use; their indices start at 0.
        end: Position at which the next step writes.
        buffers: Tensors of the cache.
    """

    def __init__(
        self,
        network: MoondreamNetwork,
        prefix_length: int,
        max_groups: int,
        max_entries: int,
        pool: BufferPool | None = None,
    ) -> None:
        """Create an empty cache.

        Args:
            network: Network that the cache is for.
            prefix_length: Tokens of each image prefix.
            max_groups: Groups to allocate memory for.
            max_entries: Entries behind each prefix to allocate memory for.
            pool: Source of the tensors; None: the cache allocates them.
        """
        self.prefix_length, self.num_groups, self.end = prefix_length, 0, prefix_length
        self._step_end, self._pool = self.end, pool
        capacity = prefix_length + max_entries
        if pool is None:
            self.buffers = KVBuffers.allocate(network, max_groups, capacity)
        else:
            self.buffers = pool.take(max_groups, capacity)
        self._mask = self.buffers.inputs.new_empty(0)

    @property
    def max_groups(self) -> int:
        """Number of groups that memory is allocated for."""
        return self.buffers.max_groups

    @property
    def capacity(self) -> int:
        """Entries per group, including the prefix, that memory is allocated for."""
        return self.buffers.capacity

    @property
    def nbytes(self) -> int:
        """Size of all persistent tensors in bytes."""
        return self.buffers.nbytes

    def add_group(self, prefix: ImagePrefix | None) -> int:
        """Copy an image prefix into a new group.

        Args:
            prefix: Prefix of `prefix_length` tokens; None if that length is 0.

        Returns:
            Index of the group.
        """
        if self.num_groups == self.max_groups:
            self._resize(2 * self.max_groups, self.capacity)
        group = self.num_groups
        if prefix is not None:
            for layer, (keys, values) in zip(self.buffers.layers, prefix.layers, strict=True):
                layer[0, group, :, : self.prefix_length] = keys[0]
                layer[1, group, :, : self.prefix_length] = values[0]
        for layer in self.buffers.layers:  # a removed group may have left NaN at this index
            layer[:, group, :, self.prefix_length :] = 0
        self.buffers.seq_ids[group] = PADDING_ID
        self.buffers.seq_ids[group, : self.prefix_length] = PREFIX_ID
        self.num_groups += 1
        return group

    def remove_group(self, group: int) -> None:
        """Remove a group; the last group takes its index."""
        self.num_groups -= 1
        last = self.num_groups
        if group == last:
            return
        for layer in self.buffers.layers:
            layer[:, group] = layer[:, last]
        self.buffers.inputs[group] = self.buffers.inputs[last]
        self.buffers.seq_ids[group] = self.buffers.seq_ids[last]

    def reserve(self, num_groups: int, num_entries: int, live: Collection[int]) -> None:
        """Ensure that memory is allocated for a number of groups and for further entries in each of them.

        Args:
            num_groups: Total number of groups.
            num_entries: Entries that the next step writes to each group.
            live: IDs of the sequences that still decode. Entries of other sequences are dropped if space is short.
        """
        capacity = self.capacity
        if self.end + num_entries > capacity:
            self._compact(live)
            ahead = GROWTH_STEPS * num_entries
            if self.end + ahead > capacity:  # otherwise compaction has freed enough for several steps
                capacity = self.end + max(ahead, (self.end - self.prefix_length) // 2)
        if num_groups > self.max_groups or capacity > self.capacity:
            self._resize(max(num_groups, self.max_groups), capacity)

    def has_space(self, num_entries: int) -> bool:
        """Return whether each group has memory for further entries, so that `reserve` has nothing to do."""
        return self.end + num_entries <= self.capacity

    def begin_step(self, seq_ids: Tensor, inputs: Tensor, causal: bool) -> None:
        """Record the entries that a step adds and build its attention mask. `reserve` must have allocated the memory.

        A step that was begun and not committed leaves no trace: the next `begin_step` overwrites it.

        Args:
            seq_ids: [num_groups, T] IDs of the sequences that the entries belong to.
            inputs: [num_groups, T, dim] input embeddings of the entries, for `input_embeddings`.
            causal: Whether some sequence adds several entries, each of which attends to the ones before it.
        """
        steps = seq_ids.shape[1]
        self._step_end = stop = self.end + steps
        self.buffers.seq_ids[: self.num_groups, self.end : stop] = seq_ids
        self.buffers.inputs[: self.num_groups, self.end : stop] = inputs
        allowed = visible_entries(seq_ids, self.buffers.seq_ids[: self.num_groups, :stop])
        if causal:
            number = torch.arange(steps, device=seq_ids.device)
            allowed[..., self.end :] &= number[:, None] >= number
        self._mask = additive_mask(allowed, self.buffers.layers[0].dtype)

    def begin_static_step(self, num_entries: int) -> int:
        """Start a step that writes its entries to `buffers` itself; `commit` makes them permanent.

        Args:
            num_entries: Entries that the step writes to each group. `reserve` must have allocated their memory.

        Returns:
            Position of the first entry.
        """
        self._step_end = self.end + num_entries
        return self.end

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the keys and values of a step to one layer and compute its attention.

        Args:
            layer: Index of the layer.
            q: [num_groups, T, heads, head_dim] queries.
            k: [num_groups, T, kv_heads, head_dim] keys.
            v: [num_groups, T, kv_heads, head_dim] values.

        Returns:
            [num_groups, T, heads, head_dim] attention outputs.
        """
        k, v = replace_nan(k), replace_nan(v)
        cached = self.buffers.layers[layer][:, : self.num_groups, :, : self._step_end]
        cached[0, :, :, self.end :] = k.transpose(1, 2)
        cached[1, :, :, self.end :] = v.transpose(1, 2)
        return attention(q, cached[0].transpose(1, 2), cached[1].transpose(1, 2), self._mask)

    def commit(self) -> None:
        """Make the entries of the current step permanent."""
        self.end = self._step_end

    def release(self) -> None:
        """Free the keys and values. Afterwards only `input_embeddings` can be called."""
        self.buffers.steps.clear()
        self.buffers.layers.clear()
        self._mask = self._mask.new_empty(0)

    def close(self) -> None:
        """Return the tensors to the pool, if any. Afterwards the cache cannot be used."""
        if self._pool is not None and self.buffers.layers:
            self._pool.give_back(self.buffers)

    def input_embeddings(self, group: int, seq_id: int) -> Tensor:
        """Return the [n, dim] embeddings of all committed entries of a sequence, in order."""
        return self.buffers.inputs[group, : self.end][self.buffers.seq_ids[group, : self.end] == seq_id]

    def _compact(self, live: Collection[int]) -> None:
        """Move the entries of live sequences together. If this runs out of memory, `input_embeddings` stays valid."""
        seq_ids = self.buffers.seq_ids[: self.num_groups, : self.end]
        kept = torch.tensor([PREFIX_ID, *live], device=seq_ids.device, dtype=torch.long)
        dead = ~torch.isin(seq_ids, kept)
        end = self.end - int(dead.sum(1).min()) if self.num_groups else self.prefix_length
        if end == self.end:
            return
        # Compute everything that needs memory
        buffers = self.buffers
        order = dead.int().argsort(dim=1, stable=True)[:, :end]
        inputs = buffers.inputs[: self.num_groups].gather(1, order[..., None].expand(-1, -1, buffers.inputs.shape[2]))
        seq_ids = seq_ids.gather(1, order).masked_fill_(dead.gather(1, order), PADDING_ID)
        for group, source in enumerate(order):
            for layer in buffers.layers:
                layer[:, group, :, :end] = layer[:, group].index_select(2, source)
        # Update the inputs, which `input_embeddings` reads
        buffers.inputs[: self.num_groups, :end], buffers.seq_ids[: self.num_groups, :end] = inputs, seq_ids
        buffers.seq_ids[:, end:] = PADDING_ID
        for layer in buffers.layers:  # a step with static shapes multiplies them with weight 0, and they may be NaN
            layer[:, : self.num_groups, :, end : self.end] = 0
        self.end = end

    def _resize(self, max_groups: int, capacity: int) -> None:
        """Replace all tensors by larger ones with the same contents."""
        if self._pool is None:
            self._reallocate(max_groups, capacity)
            return
        before, self.buffers = self.buffers, self._pool.take(max_groups, capacity)
        for new, old in zip(self.buffers.layers, before.layers, strict=True):
            new[:, : self.num_groups, :, : self.end] = old[:, : self.num_groups, :, : self.end]
        used = (slice(self.num_groups), slice(self.end))
        self.buffers.inputs[used], self.buffers.seq_ids[used] = before.inputs[used], before.seq_ids[used]
        self._pool.give_back(before)

    def _reallocate(self, max_groups: int, capacity: int) -> None:
        """Reallocate all tensors, one layer at a time: two copies of the whole cache may not fit into memory."""
        buffers, used = self.buffers, (slice(self.num_groups), slice(self.end))
        inputs = buffers.inputs.new_zeros(max_groups, capacity, buffers.inputs.shape[2])
        seq_ids = buffers.seq_ids.new_full((max_groups, capacity), PADDING_ID)
        for i, layer in enumerate(buffers.layers):
            shape = (2, max_groups, layer.shape[2], capacity, layer.shape[4])
            buffers.layers[i] = layer.new_zeros(shape)
            buffers.layers[i][:, : self.num_groups, :, : self.end] = layer[:, : self.num_groups, :, : self.end]
            del layer
        inputs[used], seq_ids[used] = buffers.inputs[used], buffers.seq_ids[used]
        buffers.inputs, buffers.seq_ids = inputs, seq_ids


def visible_entries(seq_ids: Tensor, key_seq_ids: Tensor) -> Tensor:
    """Return which entries each token attends to: the image prefix and the entries of the same sequence.

    Args:
        seq_ids: [groups, T] sequence ID of each token.
        key_seq_ids: [groups, S] sequence ID of each entry.

    Returns:
        [groups, T, S] booleans.
    """
    keys = key_seq_ids[:, None]
    return (keys == seq_ids[..., None]) | (keys == PREFIX_ID)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an attention mask of zeros and negative infinities: [groups, T, S] booleans → [groups, 1, T, S]."""
    mask = torch.zeros(allowed.shape, device=allowed.device, dtype=dtype)
    return mask.masked_fill_(~allowed, -torch.inf)[:, None]


def replace_nan(entries: Tensor) -> Tensor:
    """Replace NaN and infinity in float16 keys or values.

    float16 overflows, and NaN would reach other sequences through their zero weights.
    """
    return torch.nan_to_num(entries) if entries.dtype == torch.float16 else entries
