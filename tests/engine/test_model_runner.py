"""The model runner and its decoding step. Run with `pytest tests/engine/test_model_runner.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moondream_cv.engine.heads import COLUMNS, NUM_PARTIAL_COLUMNS, AxisOutputs, HeadOutputs
from moondream_cv.engine.kv_cache import PrefixSharedKVCache
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.model_runner import ModelRunner, StepPart, decode_step
from moondream_cv.engine.prompts import write_prompt
from moondream_cv.engine.sequence_state import Job, SequenceState, WaitingImage
from moondream_cv.engine.sequences import make_sequence
from moondream_cv.engine.step_layout import SequenceSlot, plan_step
from moondream_cv.model.text import prefix_mask
from moondream_cv.requests import Caption, Detect, Query, Request, Settings
from tests.helpers.batch_invariance import assert_same

GREEDY = Settings(temperature=0, max_tokens=6)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def reference(model: LocalModel, prefix: Tensor | None, inputs: Tensor) -> Tensor:
    """[dim] last hidden state of one sequence, computed from all of its tokens without a KV cache."""
    tokens = inputs if prefix is None else torch.cat((prefix, inputs))
    length = 0 if prefix is None else len(prefix)
    positions = torch.arange(len(tokens))[None]
    return model.network.text(tokens[None], positions, prefix_mask(len(tokens), length))[0, -1]


@torch.inference_mode()
def test_decode_step_equals_the_network_without_a_cache(model: LocalModel) -> None:
    """Five sequences on two images and without one: a prefill step with prompts, then a step with one token each."""
    network, encoded = model.network, [model.encode_image(image(seed)) for seed in range(2)]
    bos = network.text.embed(torch.tensor([model.config.tokenizer.bos_id]))
    prefixes = [torch.cat((bos, one.embedding)) for one in encoded]
    length = len(prefixes[0])
    caches = [PrefixSharedKVCache(network, length, 2, 40), PrefixSharedKVCache(network, 0, 1, 40)]
    groups = [caches[0].add_group(one.prefix) for one in encoded]
    caches[1].add_group(None)

    torch.manual_seed(0)
    places = [(0, groups[0], 0), (0, groups[0], 1), (0, groups[1], 2), (1, 0, 3), (1, 0, 4)]
    steps = [[5, 2, 3, 4, 1], [1, 1, 1, 1, 1]]
    computed = [torch.empty(0, network.config.text.dim) for _ in places]
    for counts in steps:
        slots = [
            SequenceSlot(*place, (length if place[0] == 0 else 0) + len(done), count)
            for place, done, count in zip(places, computed, counts, strict=True)
        ]
        new = [0.1 * torch.randn(count, network.config.text.dim) for count in counts]
        computed = [torch.cat(pair) for pair in zip(computed, new, strict=True)]
        layout = plan_step(slots, [cache.num_groups for cache in caches], network.device)
        hidden = decode_step(network, [StepPart(layout, torch.cat(new), caches, None)])[0]
        again = decode_step(network, [StepPart(layout, torch.cat(new), caches, None)])[0]
        assert torch.equal(again, hidden)
        for (cache, group, _), inputs, one in zip(places, computed, hidden, strict=True):
            expected = reference(model, prefixes[group] if cache == 0 else None, inputs)
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
        for cache in caches:
            cache.commit()


@torch.inference_mode()
def test_next_step_of_a_layout_equals_a_new_plan() -> None:
    slots = [SequenceSlot(0, group, group, 7 + group, 1) for group in range(3)]
    moved = [slot._replace(position=slot.position + 1) for slot in slots]
    device = torch.device("cpu")
    assert torch.equal(
        plan_step(slots, [3], device).next_step().positions,
        plan_step(moved, [3], device).positions,
    )


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 1, 2, 1], [1, 4, 1, 1]])
def test_gather_inverts_scatter(counts: list[int]) -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 0, 3)]
    slots = [SequenceSlot(*place, 0, count) for place, count in zip(places, counts, strict=True)]
    layout = plan_step(slots, [2, 1], torch.device("cpu"))
    values = torch.randn(sum(counts), 5)
    assert torch.equal(layout.gather([part.scatter(values) for part in layout.slices]), values)


def state_of(model: LocalModel, request: Request, seq_id: int) -> SequenceState:
    encoded = None if request.image is None else model.encode_image(request.image)
    prompt = write_prompt(request, model.tokenizer, model.config.tokenizer)
    length = 0 if encoded is None else model.config.prefix_length
    waiting = WaitingImage(seq_id, request.image, request.settings, since=0, encoded=encoded)
    sequence = make_sequence(seq_id, request, model.config, model.tokenizer, None, length)
    return SequenceState(Job(request), waiting, sequence, prompt)


def finish(runner: ModelRunner, num_steps: int = 100) -> None:
    for _ in range(num_steps):
        outputs = runner.decode_step(None)
        for state, output in outputs:
            state.inputs = state.sequence.apply(output)
        runner.remove([state.sequence.seq_id for state, _ in outputs if state.sequence.result is not None], None)
        if runner.num_images == 0:
            return
    pytest.fail(f"not finished after {num_steps} steps")


@pytest.mark.parametrize("preempt_after", [None, 0, 1, 3])
def test_preempted_sequences_continue_with_the_same_results(model: LocalModel, preempt_after: int | None) -> None:
    requests = [
        Detect(image(0), "dog", Settings(max_objects=3)),
        Caption(image(1), "short", GREEDY),
        Query(None, "Why?", settings=GREEDY),
    ]
    runner = ModelRunner(model.network, model.get_adapter, model.encode_arrays)
    states = [state_of(model, request, seq_id) for seq_id, request in enumerate(requests)]
    runner.admit(states, None)
    assert runner.num_images == 3
    if preempt_after is not None:
        for _ in range(preempt_after):
            for state, output in runner.decode_step(None):
                state.inputs = state.sequence.apply(output)
        runner.preempt(None)
        assert runner.num_images == 0
        assert all(isinstance(state.inputs, Tensor) for state in states)
        runner.admit(states, None)
    finish(runner)
    for state, expected in zip(states, model.run(requests), strict=True):
        assert state.sequence.result is not None
        assert_same(model, state.job.request, expected, state.sequence.result)


def test_head_outputs_unpack_every_column() -> None:
    packed = [float(column) for column in range(NUM_PARTIAL_COLUMNS + 2)]
    outputs = HeadOutputs.unpack(packed)
    assert (outputs.continue_probability, outputs.next_continue_probability) == (0.0, NUM_PARTIAL_COLUMNS)
    assert outputs.stop
    assert outputs.x == AxisOutputs(1.0, (2.0, 3.0, 4.0))
    assert outputs.height == AxisOutputs(13.0, (14.0, 15.0, 16.0))
    assert [COLUMNS[field].start for field in ("x", "y", "width", "height")] == [1, 5, 9, 13]
