"""`PrefixSharedKVCache` compared with plain attention of each sequence over its prefix and entries.

Run with `pytest tests/engine/test_kv_cache.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moondream_cv.engine.kv_cache import GROWTH_STEPS, PADDING_ID, ImagePrefix, PrefixSharedKVCache

HEADS, KV_HEADS, HEAD_DIM, LAYERS, DIM = 4, 2, 8, 2, 6


def network(dtype: torch.dtype = torch.float32) -> Any:
    """Return the attributes of a network that a cache uses."""
    text = SimpleNamespace(n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, n_layers=LAYERS, dim=DIM)
    return SimpleNamespace(config=SimpleNamespace(text=text), device=torch.device("cpu"), dtype=dtype)


def prefix_of(length: int) -> ImagePrefix | None:
    if length == 0:
        return None
    shape = (1, KV_HEADS, length, HEAD_DIM)
    return ImagePrefix(tuple((torch.randn(shape), torch.randn(shape)) for _ in range(LAYERS)))


def plain(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[heads, head_dim] query, [n, kv_heads, head_dim] keys and values → [heads, head_dim], without fused attention."""
    keys, values = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (keys, values))
    weights = (torch.einsum("hd,nhd->hn", q, keys) / math.sqrt(HEAD_DIM)).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, values)


@dataclass
class PlainSequence:
    """A sequence with separate keys and values per layer, including those of the prefix."""

    keys: list[Tensor]
    values: list[Tensor]
    inputs: Tensor = field(default_factory=lambda: torch.zeros(0, DIM))


@dataclass
class PlainGroup:
    prefix: ImagePrefix | None
    sequences: dict[int, PlainSequence] = field(default_factory=dict)

    def new_sequence(self) -> PlainSequence:
        if self.prefix is None:
            nothing = [torch.zeros(0, KV_HEADS, HEAD_DIM)] * LAYERS
            return PlainSequence(list(nothing), list(nothing))
        layers = [(k[0].transpose(0, 1), v[0].transpose(0, 1)) for k, v in self.prefix.layers]
        return PlainSequence([k for k, _ in layers], [v for _, v in layers])


class AgainstPlainAttention(RuleBasedStateMachine):
    """Groups and sequences are added and removed, and each sequence adds 0 to 5 entries per step."""

    @initialize(
        seed=st.integers(0, 2**32),
        length=st.sampled_from((0, 1, 7)),
        num_groups=st.integers(1, 2),
        max_entries=st.integers(0, 9),
    )
    def start(self, seed: int, length: int, num_groups: int, max_entries: int) -> None:
        torch.manual_seed(seed)
        self.cache = PrefixSharedKVCache(network(), length, num_groups, max_entries)
        self.groups: list[PlainGroup] = []
        self.next_id = 0

    @rule(num_seqs=st.integers(1, 4))
    def add_group(self, num_seqs: int) -> None:
        group = PlainGroup(prefix_of(self.cache.prefix_length))
        assert self.cache.add_group(group.prefix) == len(self.groups)
        self.groups.append(group)
        for _ in range(num_seqs):
            self.add_sequence(group)

    def add_sequence(self, group: PlainGroup) -> None:
        group.sequences[self.next_id] = group.new_sequence()
        self.next_id += 1

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def sequence_starts(self, data: st.DataObject) -> None:
        self.add_sequence(data.draw(st.sampled_from(self.groups)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def sequence_ends(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.live))
        for group in self.groups:
            group.sequences.pop(key, None)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def remove_group(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.groups) - 1))
        self.cache.remove_group(number)
        last = self.groups.pop()
        if number < len(self.groups):
            self.groups[number] = last

    @rule(num_groups=st.integers(0, 5), entries=st.integers(0, 20))
    def reserve(self, num_groups: int, entries: int) -> None:
        self.cache.reserve(num_groups, entries, self.live)
        assert self.cache.max_groups >= num_groups
        assert self.cache.capacity >= self.cache.end + entries

    @precondition(lambda self: self.live)
    @rule(data=st.data(), many=st.booleans(), fails=st.booleans())
    def step(self, data: st.DataObject, many: bool, fails: bool) -> None:
        """Run a step. A failed step is repeated with other values and must leave no trace."""
        counts = {key: data.draw(st.integers(0, 5 if many else 1)) for key in self.live}
        tokens = [[key for key in group.sequences for _ in range(counts[key])] for group in self.groups]
        steps = max(map(len, tokens))
        if steps == 0:
            return
        seq_ids = torch.tensor([ids + [PADDING_ID] * (steps - len(ids)) for ids in tokens])
        if self.cache.end + steps > self.cache.capacity:
            self.cache.reserve(self.cache.num_groups, steps, self.live)
        causal = any(count > 1 for count in counts.values())
        inputs = torch.randn(*seq_ids.shape, DIM)
        if fails:
            self.cache.begin_step(seq_ids, torch.randn_like(inputs), causal)
            self.cache.attend(0, *self.random(seq_ids))
        self.cache.begin_step(seq_ids, inputs, causal)
        for layer in range(LAYERS):
            q, k, v = self.random(seq_ids)
            out = self.cache.attend(layer, q, k, v)
            assert out.shape == q.shape
            for number, group in enumerate(self.groups):
                for place, key in enumerate(tokens[number]):
                    sequence = group.sequences[key]
                    sequence.keys[layer] = torch.cat((sequence.keys[layer], k[number, place][None]))
                    sequence.values[layer] = torch.cat((sequence.values[layer], v[number, place][None]))
                    expected = plain(q[number, place], sequence.keys[layer], sequence.values[layer])
                    assert torch.allclose(out[number, place], expected, atol=1e-5), (layer, number, place)
        self.cache.commit()
        for number, group in enumerate(self.groups):
            for place, key in enumerate(tokens[number]):
                group.sequences[key].inputs = torch.cat((group.sequences[key].inputs, inputs[number, place][None]))

    @staticmethod
    def random(seq_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = tuple(seq_ids.shape)
        kv = (*shape, KV_HEADS, HEAD_DIM)
        return 2 * torch.randn(*shape, HEADS, HEAD_DIM), 2 * torch.randn(kv), torch.randn(kv)

    @property
    def live(self) -> list[int]:
        return [key for group in self.groups for key in group.sequences]

    @invariant()
    def input_embeddings_equal_the_inputs(self) -> None:
        assert self.cache.num_groups == len(self.groups)
        for number, group in enumerate(self.groups):
            for seq_id, sequence in group.sequences.items():
                assert torch.equal(self.cache.input_embeddings(number, seq_id), sequence.inputs)


TestAgainstPlainAttention = AgainstPlainAttention.TestCase
TestAgainstPlainAttention.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def run_step(cache: PrefixSharedKVCache, seq_ids: list[list[int]], live: list[int]) -> Tensor:
    """Run one step with random entries and return its [num_groups, T, dim] inputs."""
    table = torch.tensor(seq_ids)
    cache.reserve(cache.num_groups, table.shape[1], live)
    inputs = torch.randn(*table.shape, DIM)
    cache.begin_step(table, inputs, causal=True)
    for layer in range(LAYERS):
        cache.attend(layer, *(t.to(cache.buffers.layers[0].dtype) for t in AgainstPlainAttention.random(table)))
    cache.commit()
    return inputs


def test_memory_grows_with_entries_not_with_sequences_times_prefix() -> None:
    prefix = prefix_of(200)
    assert prefix is not None
    entry = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4 + DIM * 4 + 8  # keys and values, input embedding, sequence ID

    def nbytes(num_seqs: int, steps: int) -> int:
        cache = PrefixSharedKVCache(network(), prefix.length, 1, 0)
        cache.add_group(prefix)
        for _ in range(steps):
            run_step(cache, [list(range(num_seqs))], list(range(num_seqs)))
        return cache.nbytes

    alone = PrefixSharedKVCache(network(), prefix.length, 1, 0).nbytes
    assert prefix.nbytes <= alone == 200 * entry
    for num_seqs, steps in ((1, 64), (8, 8), (64, 1), (64, 16)):
        grown, entries = nbytes(num_seqs, steps) - alone, num_seqs * steps
        assert entries * entry <= grown <= (1.5 * entries + GROWTH_STEPS * num_seqs) * entry, (num_seqs, steps)


def test_finished_sequences_free_cache_space() -> None:
    """A cache that serves sequences one after another stays as large as for one sequence."""
    cache = PrefixSharedKVCache(network(), 0, 1, 20)
    cache.add_group(None)
    for key in range(50):
        for _ in range(10):
            run_step(cache, [[key]], [key])
    assert cache.capacity <= 20 + 2 * GROWTH_STEPS


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan, 65504.0])
def test_float16_overflow_does_not_affect_other_sequences(broken: float) -> None:
    torch.manual_seed(0)
    cache = PrefixSharedKVCache(network(torch.float16), 0, 2, 64)
    cache.add_group(None)
    cache.add_group(None)
    seq_ids = torch.tensor([[0, 1], [2, PADDING_ID]])
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], 2: []}
    for _ in range(4):
        q, k, v = (t.half() for t in AgainstPlainAttention.random(seq_ids))
        k[0, 0], v[0, 0] = broken, broken  # sequence 0
        k[1, 1], v[1, 1] = broken, broken  # padding
        cache.begin_step(seq_ids, torch.zeros(2, seq_ids.shape[1], DIM), causal=False)
        out = cache.attend(0, q, k, v)
        cache.commit()
        for key, number, place in ((1, 0, 1), (2, 1, 0)):
            seen[key].append((k[number, place].float(), v[number, place].float()))
            keys, values = (torch.stack(t) for t in zip(*seen[key], strict=True))
            expected = plain(q[number, place].float(), keys, values)
            assert torch.allclose(out[number, place].float(), expected, atol=5e-3), key


def test_new_group_does_not_see_entries_of_a_removed_group() -> None:
    """A removed group may have left NaN at its index."""
    cache = PrefixSharedKVCache(network(), 3, 2, 32)
    cache.add_group(prefix_of(3))
    cache.add_group(prefix_of(3))
    seq_ids = torch.tensor([[0], [1]])
    for _ in range(3):
        q, k, v = AgainstPlainAttention.random(seq_ids)
        k[1], v[1] = torch.nan, torch.nan
        cache.begin_step(seq_ids, torch.zeros(2, seq_ids.shape[1], DIM), causal=False)
        cache.attend(0, q, k, v)
        cache.commit()
    cache.remove_group(1)
    added = prefix_of(3)
    assert added is not None
    cache.add_group(added)
    q, k, v = AgainstPlainAttention.random(seq_ids)
    cache.begin_step(torch.tensor([[0], [2]]), torch.zeros(2, 1, DIM), causal=False)
    out = cache.attend(0, q, k, v)
    keys, values = (torch.cat((t[0].transpose(0, 1), new[1])) for t, new in zip(added.layers[0], (k, v), strict=True))
    assert torch.allclose(out[1, 0], plain(q[1, 0], keys, values), atol=1e-5)


class OutOfMemoryAt(TorchFunctionMode):
    """Raises at the n-th call of torch that may allocate memory; views and in-place writes are not counted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func is Tensor.__getitem__ else ()
        view = all(isinstance(i, int | slice) for i in (index if isinstance(index, tuple) else (index,)))
        if not (func.__name__ in ("__get__", "__setitem__") or (func is Tensor.__getitem__ and view)):
            self.calls += 1
            if self.calls == self.number:
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


def test_input_embeddings_survive_out_of_memory_in_reserve() -> None:
    """`input_embeddings` stays valid after any failed allocation, so that sequences can be preempted."""

    def filled() -> tuple[PrefixSharedKVCache, dict[tuple[int, int], Tensor]]:
        torch.manual_seed(0)
        cache = PrefixSharedKVCache(network(), 2, 2, 12)
        prefixes = prefix_of(2), prefix_of(2)
        for prefix in prefixes:
            cache.add_group(prefix)
        expected: dict[tuple[int, int], list[Tensor]] = {(0, 1): [], (1, 3): []}
        for _ in range(5):
            inputs = run_step(cache, [[0, 1], [2, 3]], [0, 1, 2, 3])
            for number, key in expected:
                expected[number, key].append(inputs[number, 1])
        return cache, {place: torch.stack(inputs) for place, inputs in expected.items()}

    number, calls = 1, 1
    while number <= calls:
        cache, expected = filled()
        counter = OutOfMemoryAt(number)
        try:
            with counter:
                cache.reserve(2, 30, [1, 3])  # compacts and grows
        except torch.OutOfMemoryError:
            calls = counter.calls + 1
        for (group, key), inputs in expected.items():
            assert torch.equal(cache.input_embeddings(group, key), inputs), f"call {number}"
        number += 1
    assert number > 10  # number of calls that have failed
