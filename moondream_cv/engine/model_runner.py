"""Model runner: runs the network on the admitted sequences and owns their KV caches and adapters.

Sequences may have any skill, any image, any adapter and any progress. A step runs the decoder once over all of them
and then applies the head of each sequence. With CUDA graphs, each adapter has a step of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moondream_cv.engine.cuda_graphs import GraphPool
from moondream_cv.engine.heads import (
    NUM_PARTIAL_COLUMNS,
    BatchOutputs,
    Head,
    HeadOutputs,
    TokenOutput,
    run_heads,
)
from moondream_cv.engine.image_encoding import EncodedContext, EncodedImage, InterleavedContext, encode_context
from moondream_cv.engine.kv_cache import GROWTH_STEPS, CacheGroup, PrefixSharedKVCache
from moondream_cv.engine.memory import is_out_of_memory
from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.engine.prompts import Prompt, embed_prompts
from moondream_cv.engine.sequence_state import SequenceState
from moondream_cv.engine.step_layout import SequenceSlot, StaticLayout, StepLayout, plan_static_step, plan_step
from moondream_cv.engine.transfers import integers
from moondream_cv.model.adapters import Adapter
from moondream_cv.model.layers import SegmentedPair
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import AppliedLora

StepOutputs = list[tuple[SequenceState, HeadOutputs | TokenOutput | None]]


@dataclass(frozen=True)
class StepPart:
    """The sequences of one adapter in a step.

    Attributes:
        layout: Layout of N tokens of S sequences.
        inputs: [N, dim] input embeddings.
        caches: One KV cache per slice of the layout, with memory reserved for the step.
        adapter: Adapter; None: no adapter.
    """

    layout: StepLayout
    inputs: Tensor
    caches: Sequence[PrefixSharedKVCache]
    adapter: Adapter | None


def decode_step(network: MoondreamNetwork, parts: Sequence[StepPart]) -> list[Tensor]:
    """Run the decoder over the new tokens of a step, once for all parts.

    The function depends on its arguments only. It writes behind the committed entries of the caches, so calling it
    again before `commit` returns the same hidden states.

    Args:
        network: Network that runs the decoder.
        parts: Sequences of each adapter.

    Returns:
        For each part the [S, dim] hidden state of the last token of each sequence.
    """
    for part in parts:
        for cut, cache in zip(part.layout.slices, part.caches, strict=True):
            cache.begin_step(cut.seq_ids, cut.scatter(part.inputs), cut.causal)
    lengths = tuple(len(part.inputs) for part in parts)
    inputs, positions = parts[0].inputs, parts[0].layout.positions
    if len(parts) > 1:
        inputs = torch.cat([part.inputs for part in parts])
        positions = torch.cat([part.layout.positions for part in parts], dim=1)
    attends = [partial(_attend, parts, lengths, layer) for layer in range(network.config.text.n_layers)]
    layers = _joined_layers([part.adapter for part in parts], lengths)
    hidden = network.text(inputs[None], positions, attends=attends, adapter=layers)[0]  # [N of all parts, dim]
    return [
        states if part.layout.last is None else states[part.layout.last]
        for states, part in zip(hidden.split(lengths), parts, strict=True)
    ]


def _attend(parts: Sequence[StepPart], lengths: Sequence[int], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute one layer's attention, each slice in its cache: [1, N, heads, head_dim] → [1, N, heads, head_dim]."""
    attended = []
    for part, *tokens in zip(parts, *(tensor[0].split(lengths) for tensor in (q, k, v)), strict=True):
        outputs = [
            cache.attend(layer, *(cut.scatter(tensor) for tensor in tokens))
            for cut, cache in zip(part.layout.slices, part.caches, strict=True)
        ]
        attended.append(part.layout.gather(outputs))
    return attended[0][None] if len(attended) == 1 else torch.cat(attended)[None]


def _joined_layers(adapters: Sequence[Adapter | None], lengths: tuple[int, ...]) -> Sequence[AppliedLora] | None:
    """Return the layers of one adapter, or those of several adapters for consecutive parts of the tokens."""
    present = [adapter for adapter in adapters if adapter is not None]
    if not present:
        return None
    if len(adapters) == 1:
        return present[0].layers
    joined = []
    for i in range(len(present[0].layers)):
        layers = [None if adapter is None else adapter.layers[i] for adapter in adapters]
        names = {(block, name) for layer in layers if layer for block in layer for name in layer[block]}
        pairs: dict[str, dict[str, SegmentedPair]] = {}
        for block, name in sorted(names):
            found = tuple(layer and layer.get(block, {}).get(name) for layer in layers)
            pairs.setdefault(block, {})[name] = SegmentedPair(lengths, found)  # type: ignore[arg-type]
        joined.append(pairs)
    return joined


class EncodeImages(Protocol):
    """Function that encodes images or takes them from a cache."""

    def __call__(
        self, frames: Sequence[np.ndarray | PreprocessedImage], max_crops: int | None, adapter_name: str | None
    ) -> list[EncodedImage]:
        """Encode images; the arguments are those of `ModelRunner.prefill_images`."""


class ModelRunner:
    """Runs prefill and decoding steps. Each method either succeeds or raises without advancing any sequence."""

    def __init__(
        self,
        network: MoondreamNetwork,
        load_adapter: Callable[[str | None], Adapter | None],
        encode_images: EncodeImages,
        graph_pool: GraphPool | None = None,
    ) -> None:
        """Create a runner without sequences.

        Args:
            network: Network to run.
            load_adapter: Returns an adapter by its name; None is the default adapter, if any.
            encode_images: Encodes images with the same network and adapters.
            graph_pool: Tensors and CUDA graphs for decode steps with static shapes; None: shapes are dynamic.
        """
        self._network, self._load_adapter, self._encode_images = network, load_adapter, encode_images
        self._graph_pool = graph_pool
        self._batches: dict[str | None, AdapterBatch] = {}

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self._network.device

    @property
    def num_images(self) -> int:
        """Number of images that sequences decode on, summed over all adapters."""
        return sum(batch.num_groups for batch in self._batches.values())

    def has_group(self, key: object, adapter_name: str | None) -> bool:
        """Return whether an image has a KV cache group, so that sequences on it need no prefix."""
        batch = self._batches.get(adapter_name)
        return batch is not None and batch.has_group(key)

    def prefill_images(
        self, frames: Sequence[np.ndarray | PreprocessedImage], max_crops: int | None, adapter_name: str | None
    ) -> list[EncodedImage]:
        """Encode images and compute the keys and values of their tokens.

        Args:
            frames: Each [H, W, 3] uint8 RGB, or preprocessed.
            max_crops: Maximum number of local crops of an image; None: the number the model was trained with.
            adapter_name: Adapter of the sequences that will decode on the images.
        """
        return self._encode_images(frames, max_crops, adapter_name)

    def prefill_context(
        self, context: InterleavedContext, images: Sequence[EncodedImage], adapter_name: str | None
    ) -> EncodedContext:
        """Compute the keys and values of a conversation up to its last image.

        Args:
            context: Text and images.
            images: The images of the context, encoded.
            adapter_name: Adapter of the sequence that will decode on the context.
        """
        return encode_context(self._network, context, images, self._load_adapter(adapter_name))

    def admit(self, states: Sequence[SequenceState], adapter_name: str | None) -> None:
        """Add sequences to the batch of an adapter. If this raises, none of them is added.

        Args:
            states: Sequences with inputs. Unless `has_group`, their images must be encoded.
            adapter_name: Adapter; it is loaded on first use.

        Raises:
            CheckpointError: The adapter is missing or does not fit.
        """
        if adapter_name not in self._batches:
            adapter = self._load_adapter(adapter_name)
            self._batches[adapter_name] = AdapterBatch(self._network, adapter, self._graph_pool)
        self._batches[adapter_name].admit(states)

    def decode_step(self, adapter_name: str | None) -> StepOutputs:
        """Advance all sequences of an adapter by one step.

        Each output must be applied to its sequence, and finished sequences must be removed, before the next step. If
        this runs out of memory, no sequence has advanced; call `preempt` to recover them.
        """
        return self._batches[adapter_name].decode_step()

    def can_join(self, adapter_names: Collection[str | None]) -> bool:
        """Return whether `decode_steps` can advance the sequences of these adapters. CUDA graphs have one adapter."""
        return self._graph_pool is None and len(adapter_names) > 1

    @torch.inference_mode()
    def decode_steps(self, adapter_names: Sequence[str | None]) -> list[StepOutputs]:
        """Advance all sequences of several adapters by one step, with one pass through the weights of the decoder.

        If this raises, no sequence has advanced. `decode_step` can advance each adapter alone then.

        Args:
            adapter_names: Adapters for which `can_join` is true.
        """
        batches = [self._batches[name] for name in adapter_names]
        parts = [batch.prepare_step() for batch in batches]
        hidden = decode_step(self._network, parts)
        steps = [batch.run_heads(part, one) for batch, part, one in zip(batches, parts, hidden, strict=True)]
        return [batch.finish_step(step) for batch, step in zip(batches, steps, strict=True)]

    def remove(self, seq_ids: Collection[int], adapter_name: str | None) -> None:
        """Remove finished or aborted sequences of an adapter."""
        if adapter_name in self._batches:
            self._batches[adapter_name].remove(seq_ids)

    def preempt(self, adapter_name: str | None) -> None:
        """Remove all sequences of an adapter so that they can be admitted again, and free their memory.

        Their inputs become the embeddings of everything that they have computed behind the image prefix.
        """
        if (batch := self._batches.pop(adapter_name, None)) is not None:
            batch.preempt()

    def reset(self, adapter_name: str | None) -> None:
        """Drop all sequences of an adapter and free their memory."""
        if (batch := self._batches.pop(adapter_name, None)) is not None:
            batch.close()

    def free_idle_memory(self) -> bool:
        """Free the tensors and CUDA graphs that wait for reuse, and return whether there were any."""
        return self._graph_pool is not None and self._graph_pool.clear()


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device may still compute.

    Attributes:
        states: Sequences of the step.
        layout: Layout of the step.
        outputs: Outputs of the heads.
    """

    states: list[SequenceState]
    layout: StepLayout | StaticLayout
    outputs: BatchOutputs


class AdapterBatch:
    """Sequences that share an adapter, their KV caches and the tensors that go from step to step."""

    def __init__(self, network: MoondreamNetwork, adapter: Adapter | None, graph_pool: GraphPool | None) -> None:
        """Create an empty batch.

        Args:
            network: Network to run.
            adapter: Adapter; None: no adapter.
            graph_pool: Tensors and CUDA graphs for decode steps with static shapes; None: shapes are dynamic.
        """
        self._network, self._adapter, self._graph_pool = network, adapter, graph_pool
        self._states: list[SequenceState] = []
        self._groups: list[CacheGroup] = []
        self._caches: dict[tuple[int, int], PrefixSharedKVCache] = {}  # by prefix length and sequences per image
        # Next input of each sequence unless its state has `inputs`, and head outputs for its incomplete object
        self._embeddings = torch.empty(0, network.config.text.dim, device=network.device, dtype=network.dtype)
        self._partial = torch.empty(0, NUM_PARTIAL_COLUMNS, device=network.device, dtype=torch.float32)
        self._next_step: LaunchedStep | None = None
        self._layout: StepLayout | StaticLayout | None = None  # layout of the last step, if it can be reused

    @property
    def num_groups(self) -> int:
        """Number of images that the sequences decode on."""
        return len(self._groups)

    def has_group(self, key: object) -> bool:
        """Return whether an image has a KV cache group."""
        return any(group.key is key for group in self._groups)

    @torch.inference_mode()
    def admit(self, states: Sequence[SequenceState]) -> None:
        """Add sequences; see `ModelRunner.admit`."""
        # Allocate KV cache groups
        self._next_step = None  # it lacks the new sequences; the next step overwrites its entries
        by_image: dict[int, list[SequenceState]] = {}
        for state in states:
            by_image.setdefault(id(state.image.group_key), []).append(state)
        self._add_groups([members for members in by_image.values() if not self.has_group(members[0].image.group_key)])

        # Extend the batch tensors
        blank = self._partial.new_zeros(NUM_PARTIAL_COLUMNS)
        added = torch.stack([blank if state.partial_outputs is None else state.partial_outputs for state in states])
        partial_outputs = torch.cat((self._partial, added))
        no_embedding = self._embeddings.new_zeros(len(states), self._embeddings.shape[1])
        self._embeddings, self._partial = torch.cat((self._embeddings, no_embedding)), partial_outputs

        # Register the sequences
        groups = {id(group.key): group for group in self._groups}
        for state in states:
            state.group = groups[id(state.image.group_key)]
        self._states += states
        self._layout = None

    @torch.inference_mode()
    def remove(self, seq_ids: Collection[int]) -> None:
        """Remove sequences, finished or not."""
        self._keep([i for i, state in enumerate(self._states) if state.sequence.seq_id not in seq_ids])

    @torch.inference_mode()
    def decode_step(self) -> StepOutputs:
        """Advance all sequences; see `ModelRunner.decode_step`.

        With CUDA graphs, the next step is launched before the host reads the outputs of this one, so that the device
        does not wait for the host.
        """
        step, self._next_step = self._next_step, None
        if step is None:
            step = self._launch(self._next_layout(), [state.sequence.head for state in self._states])
        self._commit(step)
        self._launch_next()
        return self._read(step)

    def prepare_step(self) -> StepPart:
        """Collect the inputs of the next step of all sequences, and reserve memory in the KV caches."""
        layout = self._next_layout()
        assert isinstance(layout, StepLayout)
        return StepPart(layout, self._collect_inputs(layout), list(self._caches.values()), self._adapter)

    def run_heads(self, part: StepPart, hidden: Tensor) -> LaunchedStep:
        """Apply the heads to the hidden states of a step, without advancing any sequence.

        Args:
            part: Result of `prepare_step`.
            hidden: [S, dim] hidden state of each sequence.
        """
        return self._run_heads(part.layout, [state.sequence.head for state in self._states], hidden)

    def finish_step(self, step: LaunchedStep) -> StepOutputs:
        """Advance all sequences by a step, and return their outputs."""
        self._commit(step)
        return self._read(step)

    def _read(self, step: LaunchedStep) -> StepOutputs:
        """Return the outputs of a committed step for the sequences that are left."""
        present = set(map(id, self._states))
        outputs = zip(step.states, step.outputs.read(), strict=True)
        return [(state, output) for state, output in outputs if id(state) in present]

    def _next_layout(self) -> StepLayout | StaticLayout:
        """Return the layout of the next step."""
        if self._layout is None or any(state.inputs is not None for state in self._states):
            return self._plan_step()
        return self._layout.next_step()

    def _launch(self, layout: StepLayout | StaticLayout, heads: Sequence[Head]) -> LaunchedStep:
        """Run the decoder and the heads for all sequences, without advancing any of them.

        Args:
            layout: Layout of the step.
            heads: Head of each sequence.
        """
        inputs, caches = self._collect_inputs(layout), list(self._caches.values())
        if isinstance(layout, StaticLayout):
            assert self._graph_pool is not None
            (cache,), (tokens_per_group,) = caches, layout.num_entries
            step = self._graph_pool.step(cache.buffers, tokens_per_group, self._adapter)
            hidden = step(layout, inputs, cache)
        else:
            (hidden,) = decode_step(self._network, [StepPart(layout, inputs, caches, self._adapter)])
        return self._run_heads(layout, heads, hidden)

    def _collect_inputs(self, layout: StepLayout | StaticLayout) -> Tensor:
        """Return the [N, dim] input embeddings of a step, and reserve memory in the KV caches."""
        self._embed_prompts()
        inputs = self._embeddings
        if any(state.inputs is not None for state in self._states):
            inputs = torch.cat([self._next_inputs(i) for i in range(len(self._states))])
        for num_entries, cache in zip(layout.num_entries, self._caches.values(), strict=True):
            if not cache.has_space(num_entries):
                cache.reserve(cache.num_groups, num_entries, [state.sequence.seq_id for state in self._states])
        return inputs

    def _run_heads(self, layout: StepLayout | StaticLayout, heads: Sequence[Head], hidden: Tensor) -> LaunchedStep:
        sampling = [state.sequence.sampling_params() for state in self._states]  # while the device runs the decoder
        region_lora = None if self._adapter is None else self._adapter.region
        outputs = run_heads(self._network, heads, hidden, self._partial, sampling, region_lora)
        return LaunchedStep(list(self._states), layout, outputs)

    def _commit(self, step: LaunchedStep) -> None:
        """Advance all sequences by a step. Sequences that were removed after its launch are left out."""
        # Select the sequences that are left. From here on nothing allocates device memory: a step succeeds as a whole
        # or not at all.
        present = set(map(id, self._states))
        kept = [i for i, state in enumerate(step.states) if id(state) in present]
        embeddings, partial_outputs = step.outputs.embeddings, step.outputs.partial
        if len(kept) < len(step.states):
            index = integers(kept, self._network.device)
            embeddings, partial_outputs = embeddings[index], partial_outputs[index]

        # Advance
        for cache in self._caches.values():
            cache.commit()
        for state in self._states:
            state.sequence.num_computed_tokens += state.num_new_tokens
            state.inputs = None
        self._embeddings, self._partial = embeddings, partial_outputs
        is_complete = len(kept) == len(step.states)
        self._layout = step.layout if is_complete and step.layout.is_repeatable else None

    def _launch_next(self) -> None:
        """Launch the step after the committed one, if the host must read outputs and the heads are known without them.

        The step computes sequences that end with the committed step as well; their results are discarded. It starts
        only if the KV cache has space, because `PrefixSharedKVCache.reserve` must not fail after a commit.
        """
        sequences = [state.sequence for state in self._states]
        is_deciding = any(sequence.head is Head.X_OR_STOP for sequence in sequences)
        if self._graph_pool is None or not is_deciding or not any(sequence.may_continue for sequence in sequences):
            return
        heads = {sequence.seq_id: sequence.predicted_head for sequence in sequences}
        if None in heads.values():
            return
        try:
            layout = self._next_layout()  # may reorder the sequences
            (num_entries, *_), (cache, *_) = layout.num_entries, self._caches.values()
            if isinstance(layout, StaticLayout) and cache.has_space(num_entries):
                ordered = [heads[state.sequence.seq_id] for state in self._states]
                self._next_step = self._launch(layout, [head for head in ordered if head is not None])
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    @torch.inference_mode()
    def preempt(self) -> None:
        """Store in each state the inputs for admitting it again. The batch cannot be used afterwards."""
        self._next_step = None
        for cache in self._caches.values():
            cache.release()  # before anything else: the rest needs a little memory
        self._embed_prompts()
        for i, state in enumerate(self._states):
            assert state.group is not None
            computed = state.group.cache.input_embeddings(state.group.index, state.sequence.seq_id)
            state.inputs = torch.cat((computed, self._next_inputs(i)))
            state.partial_outputs = self._partial[i].clone()
        for state in self._states:
            assert state.group is not None
            state.sequence.num_computed_tokens = state.group.cache.prefix_length
            state.group = None

    def close(self) -> None:
        """Return the tensors of the KV caches to the pool. The batch cannot be used afterwards."""
        for cache in self._caches.values():
            cache.close()

    def _embed_prompts(self) -> None:
        """Replace prompts among the inputs by their embeddings."""
        prompts = [(state, state.inputs) for state in self._states if isinstance(state.inputs, Prompt)]
        embeddings = embed_prompts(self._network, [prompt for _, prompt in prompts])
        for (state, _), embedding in zip(prompts, embeddings, strict=True):
            state.inputs = embedding

    def _next_inputs(self, i: int) -> Tensor:
        """Return the [T, dim] input embeddings of a sequence for the next step. Its prompt must be embedded."""
        inputs = self._states[i].inputs
        return inputs if isinstance(inputs, Tensor) else self._embeddings[i][None]

    def _add_groups(self, images: list[list[SequenceState]]) -> None:
        """Add a group for the sequences of each image. Images with a similar number of sequences share a cache."""
        stacks: dict[tuple[int, int], list[list[SequenceState]]] = {}
        for members in images:
            encoded = members[0].image.encoded
            key = (0 if encoded is None else encoded.prefix.length, 1 << (len(members) - 1).bit_length())
            stacks.setdefault(key, []).append(members)
        for key, stack in stacks.items():
            if key not in self._caches:
                longest = max(sum(state.num_new_tokens for state in members) for members in stack)
                entries = longest + GROWTH_STEPS * key[1]
                self._caches[key] = PrefixSharedKVCache(self._network, key[0], len(stack), entries, self._graph_pool)
            cache = self._caches[key]
            cache.reserve(cache.num_groups + len(stack), 0, ())
            for members in stack:
                image = members[0].image
                prefix = None if image.encoded is None else image.encoded.prefix
                self._groups.append(CacheGroup(image.group_key, cache, cache.add_group(prefix)))

    def _plan_step(self) -> StepLayout | StaticLayout:
        """Sort the sequences by cache and group, and build the layout of the next step."""
        cache_indices = {id(cache): i for i, cache in enumerate(self._caches.values())}
        slots = []
        for state in self._states:
            assert state.group is not None
            cache, group, sequence = cache_indices[id(state.group.cache)], state.group.index, state.sequence
            slots.append(
                SequenceSlot(cache, group, sequence.seq_id, sequence.num_computed_tokens, state.num_new_tokens)
            )
        order = sorted(range(len(slots)), key=slots.__getitem__)
        if order != list(range(len(slots))):
            self._keep(order)
        slots = [slots[i] for i in order]
        return self._plan_static_step(slots) or plan_step(
            slots, [cache.num_groups for cache in self._caches.values()], self._network.device
        )

    def _plan_static_step(self, slots: Sequence[SequenceSlot]) -> StaticLayout | None:
        """Return a layout with static shapes; None if the shapes of the step are dynamic.

        They are dynamic with prompts, with several KV caches, and with too many sequences.
        """
        if self._graph_pool is None or len(self._caches) > 1 or any(slot.num_new_tokens > 1 for slot in slots):
            return None
        (cache,) = self._caches.values()
        largest = max(Counter(slot.group for slot in slots).values())
        tokens_per_group = self._graph_pool.tokens_per_group(largest, cache.max_groups)
        if tokens_per_group is None:
            return None
        return plan_static_step(slots, cache.max_groups, tokens_per_group, self._network.device)

    def _keep(self, order: list[int]) -> None:
        """Keep the sequences with these indices, in this order, and remove groups without sequences."""
        # Select the sequences
        index = integers(order, self._network.device)
        embeddings, partial_outputs = self._embeddings[index], self._partial[index]
        self._embeddings, self._partial, self._layout = embeddings, partial_outputs, None
        self._states = [self._states[i] for i in order]

        # Remove the groups; the last group of a cache takes the index of the removed one
        used = {id(state.group) for state in self._states}
        for group in [group for group in self._groups if id(group) not in used]:
            group.cache.remove_group(group.index)
            self._groups.remove(group)
            for moved in self._groups:
                if moved.cache is group.cache and moved.index == group.cache.num_groups:
                    moved.index = group.index
        for cache in [cache for cache in self._caches.values() if not cache.num_groups]:
            cache.close()
        self._caches = {key: cache for key, cache in self._caches.items() if cache.num_groups}
