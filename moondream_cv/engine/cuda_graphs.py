"""Decode steps with static shapes, replayed as CUDA graphs.

A decode step of one sequence launches several hundred short kernels, and launching them takes longer than running them.
A CUDA graph launches them at once, but only with the shapes and the memory addresses that it was captured with. So a
step that is replayed

- works on a padded table with a fixed number of groups and of tokens per group,
- attends to all entries of its KV cache, of which the mask hides those that are not in use, and
- reads the position of the new entries from the device.

`GraphPool` keeps the tensors of KV caches, and the graphs captured on them, from request to request: a detection takes
about ten steps, too few to capture a graph for each. On other devices than CUDA, the same steps run without a graph,
which the tests compare with `model_runner.decode_step`.
"""

from __future__ import annotations

import logging
import threading
from functools import partial

import torch
from torch import Tensor

from moondream_cv.engine.kv_cache import (
    GROWTH_STEPS,
    PADDING_ID,
    KVBuffers,
    PrefixSharedKVCache,
    additive_mask,
    replace_nan,
    visible_entries,
)
from moondream_cv.engine.memory import is_out_of_memory
from moondream_cv.engine.step_layout import SequenceSlot, StaticLayout, plan_static_step
from moondream_cv.model.adapters import Adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import attention

logger = logging.getLogger(__name__)

TOKENS_PER_GROUP = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of tokens per group that steps are padded to."""

MAX_TOKENS = 128
"""Maximum number of tokens of a step with static shapes, including padding: enough for 64 sequences on any images."""

CAPACITY_MULTIPLE = 64  # attention kernels require aligned masks
MIN_ENTRIES = 128  # entries behind the prefix: a detection of 10 objects takes 40
TYPICAL_PROMPT_TOKENS = 8  # for the name of a class
IDLE_SHARE = 1 / 8  # part of the device memory that idle tensors may take


class GraphedDecodeStep:
    """Decode step with static shapes on the tensors of one KV cache.

    On a CUDA device, the first call captures a graph and every call replays it.
    """

    def __init__(
        self,
        network: MoondreamNetwork,
        buffers: KVBuffers,
        tokens_per_group: int,
        adapter: Adapter | None,
        use_graph: bool,
    ) -> None:
        """Allocate the static inputs.

        Args:
            network: Network that runs the decoder. Its weights must keep their addresses.
            buffers: Tensors of the KV cache.
            tokens_per_group: Tokens per group, including padding.
            adapter: Adapter; None: no adapter.
            use_graph: Capture and replay a CUDA graph.
        """
        self._network, self._adapter, self._use_graph = network, adapter, use_graph
        # No reference to `buffers`, which refers to this step: a cycle would delay the release of device memory.
        self._layers, self._cached_inputs, self._cached_seq_ids = buffers.layers, buffers.inputs, buffers.seq_ids
        num_tokens = buffers.max_groups * tokens_per_group
        self._seq_ids = buffers.seq_ids.new_full((buffers.max_groups, tokens_per_group), PADDING_ID)
        self._inputs = buffers.inputs.new_zeros(num_tokens, buffers.inputs.shape[2])
        self._positions = buffers.seq_ids.new_zeros(1, num_tokens)
        self._index = buffers.seq_ids.new_zeros(tokens_per_group)  # entries that the step writes
        self._entries = torch.arange(buffers.capacity, device=buffers.seq_ids.device, dtype=torch.long)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden = self._inputs  # output of the graph, replaced on capture

    def __call__(self, layout: StaticLayout, inputs: Tensor, cache: PrefixSharedKVCache) -> Tensor:
        """Run the decoder over one token per sequence, as `model_runner.decode_step` does.

        Args:
            layout: Layout of S sequences, in a table of this step's shape.
            inputs: [S, dim] input embeddings.
            cache: KV cache that uses the tensors of this step, with memory reserved for it.

        Returns:
            [S, dim] hidden state of each sequence.
        """
        start = cache.begin_static_step(len(self._index))
        self._index.copy_(self._entries[start : start + len(self._index)])
        self._seq_ids.copy_(layout.seq_ids)
        self._inputs.zero_()  # padding must be finite: its keys and values are multiplied with weight 0
        self._inputs.index_copy_(0, layout.rows, inputs)
        self._positions.zero_()
        self._positions[0].index_copy_(0, layout.rows, layout.positions)
        if self._use_graph and self._graph is None:
            self._capture()
        if self._graph is None:
            return self._run()[layout.rows]
        self._graph.replay()
        return self._hidden[layout.rows]

    def _run(self) -> Tensor:
        """Compute the [groups · T, dim] hidden states from the static inputs. Repeated calls have the same effect."""
        # Add the entries and build the mask
        groups, steps = self._seq_ids.shape
        self._cached_seq_ids.index_copy_(1, self._index, self._seq_ids)
        self._cached_inputs.index_copy_(1, self._index, self._inputs.view(groups, steps, -1))
        allowed = visible_entries(self._seq_ids, self._cached_seq_ids) & (self._entries <= self._index[-1])
        mask = additive_mask(allowed, self._inputs.dtype)

        # Run the decoder
        attends = [partial(self._attend, layer, mask) for layer in self._layers]
        layers = None if self._adapter is None else self._adapter.layers
        return self._network.text(self._inputs[None], self._positions, attends=attends, adapter=layers)[0]

    def _attend(self, layer: Tensor, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values and compute the attention of one layer: [1, N, heads, head_dim] → the same shape."""
        q, k, v = (tensor.view(*self._seq_ids.shape, *tensor.shape[2:]) for tensor in (q, k, v))
        layer[0].index_copy_(2, self._index, replace_nan(k).transpose(1, 2))
        layer[1].index_copy_(2, self._index, replace_nan(v).transpose(1, 2))
        return attention(q, layer[0].transpose(1, 2), layer[1].transpose(1, 2), mask).flatten(0, 1)[None]

    def _capture(self) -> None:
        """Capture the graph. If this runs out of memory, the next call tries again."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._inputs.device):
                # Warm up: libraries cannot initialize during a capture
                current, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    self._run()
                current.wait_stream(side)
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
                    hidden = self._run()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            logger.warning(
                "decode steps of this shape run without a CUDA graph, because it cannot be captured: %s", error
            )
            self._use_graph = False
            return
        self._graph, self._hidden = graph, hidden


class GraphPool:
    """Tensors of KV caches in a few fixed shapes, with the decode steps captured on them. Safe for several threads.

    A cache takes tensors and gives them back; meanwhile no other cache uses them.

    Attributes:
        max_idle_bytes: Maximum size of the tensors that wait for reuse. The least recently used ones are freed.
    """

    def __init__(self, network: MoondreamNetwork, max_idle_bytes: int) -> None:
        """Create an empty pool.

        Args:
            network: Network that the caches are for. Its weights must keep their addresses.
            max_idle_bytes: Maximum size of the tensors that wait for reuse.
        """
        self._network, self.max_idle_bytes = network, max_idle_bytes
        self._idle: list[KVBuffers] = []  # least recently used first
        self._lock = threading.Lock()
        self._use_graphs = network.device.type == "cuda"

    @classmethod
    def for_device(cls, network: MoondreamNetwork) -> GraphPool | None:
        """Return a pool for a network on a CUDA device; None on other devices, where shapes stay dynamic."""
        if network.device.type != "cuda":
            return None
        total = torch.cuda.get_device_properties(network.device).total_memory
        return cls(network, int(total * IDLE_SHARE))

    @property
    def idle_bytes(self) -> int:
        """Size of the tensors that wait for reuse."""
        with self._lock:
            return sum(buffers.nbytes for buffers in self._idle)

    def take(self, max_groups: int, capacity: int) -> KVBuffers:
        """Return empty tensors for at least this many groups and entries per group."""
        shape = (_power_of_two(max_groups), self.rounded_capacity(capacity))
        with self._lock:
            found = [buffers for buffers in self._idle if buffers.seq_ids.shape == shape]
            if found:
                self._idle.remove(found[-1])
        if not found:
            return KVBuffers.allocate(self._network, *shape)
        found[-1].clear()
        return found[-1]

    def give_back(self, buffers: KVBuffers) -> None:
        """Receive tensors that a cache no longer uses."""
        with self._lock:
            self._idle.append(buffers)
            nbytes = sum(one.nbytes for one in self._idle)
            while nbytes > self.max_idle_bytes:
                nbytes -= self._idle.pop(0).nbytes

    def clear(self) -> bool:
        """Free the tensors that wait for reuse, with their graphs, and return whether there were any."""
        with self._lock:
            freed, self._idle = bool(self._idle), []
        if freed and self._network.device.type == "cuda":
            torch.cuda.empty_cache()
        return freed

    def tokens_per_group(self, num_tokens: int, max_groups: int) -> int | None:
        """Return the padded number of tokens per group of a step; None if the step is too large for static shapes.

        Args:
            num_tokens: Largest number of sequences on one image.
            max_groups: Groups of the cache's tensors.
        """
        padded = next((size for size in TOKENS_PER_GROUP if size >= num_tokens), None)
        return None if padded is None or padded * max_groups > MAX_TOKENS else padded

    def step(self, buffers: KVBuffers, tokens_per_group: int, adapter: Adapter | None) -> GraphedDecodeStep:
        """Return the decode step of a shape on tensors of this pool, which is created on first use."""
        key = (tokens_per_group, id(adapter))  # the step refers to the adapter, so the ID stays unique
        if key not in buffers.steps:
            buffers.steps[key] = GraphedDecodeStep(self._network, buffers, tokens_per_group, adapter, self._use_graphs)
        step: GraphedDecodeStep = buffers.steps[key]
        return step

    @torch.inference_mode()
    def warm_up(self, adapter: Adapter | None) -> None:
        """Build the decode steps of 1 to 64 sequences on one image before the first request needs them.

        Args:
            adapter: Adapter; None: no adapter.
        """
        network = self._network
        prefix_length, dim = network.config.prefix_length, network.config.text.dim
        for count in TOKENS_PER_GROUP:
            # Create a cache as for requests with short prompts
            entries = (GROWTH_STEPS + TYPICAL_PROMPT_TOKENS) * count
            cache = PrefixSharedKVCache(network, prefix_length, 1, entries, self)
            cache.add_group(None)

            # Run one step
            slots = [SequenceSlot(0, 0, seq_id, prefix_length, 1) for seq_id in range(count)]
            layout = plan_static_step(slots, cache.max_groups, count, network.device)
            inputs = cache.buffers.inputs.new_zeros(count, dim)
            self.step(cache.buffers, count, adapter)(layout, inputs, cache)
            cache.close()

    def rounded_capacity(self, capacity: int) -> int:
        """Return the capacity of the tensors that `take` returns."""
        prefix = self._network.config.prefix_length
        start = prefix if capacity > prefix else 0
        entries = max(MIN_ENTRIES, _power_of_two(capacity - start))
        return -(-(start + entries) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
