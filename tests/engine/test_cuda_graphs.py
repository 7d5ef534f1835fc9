"""Decode steps with static shapes. Run with `pytest tests/engine/test_cuda_graphs.py`.

They run here without CUDA graphs, and in `tests/test_gpu.py` with graphs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch

from moondream_cv.engine.cuda_graphs import MAX_TOKENS, GraphedDecodeStep, GraphPool
from moondream_cv.engine.heads import Head
from moondream_cv.engine.kv_cache import PADDING_ID, KVBuffers, PrefixSharedKVCache
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.model_runner import AdapterBatch, LaunchedStep, ModelRunner, StepPart, decode_step
from moondream_cv.engine.step_layout import SequenceSlot, StaticLayout, StepLayout, plan_static_step, plan_step
from moondream_cv.requests import Caption, Detect, DetectResult, ErrorResult, Point, Query, Request, Settings
from tests.helpers.batch_invariance import assert_same
from tests.helpers.models import random_model

SHORT = Settings(temperature=0, max_tokens=8, max_objects=4)
SAMPLED = Settings(temperature=1.0, max_tokens=8, seed=3)
GIB = 2**30


def image(seed: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def static_model(seed: int = 0) -> LocalModel:
    """A random model whose decode steps have static shapes."""
    model = random_model(seed)
    model.graph_pool = GraphPool(model.network, max_idle_bytes=GIB)
    return model


@contextmanager
def counting_steps() -> Iterator[list[int]]:
    """Collect the number of sequences of each step with static shapes."""
    counts: list[int] = []
    call = GraphedDecodeStep.__call__

    def counted(
        self: GraphedDecodeStep, layout: StaticLayout, inputs: torch.Tensor, cache: PrefixSharedKVCache
    ) -> torch.Tensor:
        counts.append(len(inputs))
        return call(self, layout, inputs, cache)

    with patch.object(GraphedDecodeStep, "__call__", counted):
        yield counts


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(6))
def test_static_steps_equal_dynamic_steps(model: LocalModel, seed: int) -> None:
    """Groups and sequences come and go, caches grow and drop entries, and every step is computed in both ways."""
    network, draw = model.network, random.Random(seed)
    torch.manual_seed(seed)
    prefixes = [model.encode_image(image(i)).prefix for i in range(3)]
    length, pool = prefixes[0].length, GraphPool(network, GIB)
    dynamic = PrefixSharedKVCache(network, length, 1, 4)
    static = PrefixSharedKVCache(network, length, 1, 4, pool)
    groups: list[dict[int, int]] = []  # position of each sequence
    next_id = 0
    for _ in range(60):
        # Change the groups and sequences
        if not groups or draw.random() < 0.1:
            prefix = draw.choice(prefixes)
            assert dynamic.add_group(prefix) == static.add_group(prefix) == len(groups)
            groups.append({})
        if len(groups) > 1 and draw.random() < 0.1:
            index = draw.randrange(len(groups))
            for cache in (dynamic, static):
                cache.remove_group(index)
            groups[index] = groups[-1]
            groups.pop()
        for group in groups:
            for seq_id in [seq_id for seq_id in group if draw.random() < 0.05]:
                del group[seq_id]
            if not group or draw.random() < 0.1:
                group[next_id] = length
                next_id += 1

        # Run one step in both ways
        slots = [SequenceSlot(0, g, s, group[s], 1) for g, group in enumerate(groups) for s in sorted(group)]
        live = [slot.seq_id for slot in slots]
        inputs = torch.randn(len(slots), network.config.text.dim)
        layout = plan_step(slots, [len(groups)], network.device)
        dynamic.reserve(len(groups), *layout.num_entries, live)
        expected = decode_step(network, [StepPart(layout, inputs, [dynamic], None)])[0]
        tokens_per_group = pool.tokens_per_group(max(map(len, groups)), static.max_groups)
        assert tokens_per_group is not None
        static.reserve(len(groups), tokens_per_group, live)
        step = pool.step(static.buffers, tokens_per_group, None)
        static_layout = plan_static_step(slots, static.max_groups, tokens_per_group, network.device)
        hidden = step(static_layout, inputs, static)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step(static_layout, inputs, static), hidden)  # nothing is committed yet

        # Commit
        for cache in (dynamic, static):
            cache.commit()
        for group in groups:
            for seq_id in group:
                group[seq_id] += 1
    for slot in slots:
        recorded = [cache.input_embeddings(slot.group, slot.seq_id) for cache in (dynamic, static)]
        assert torch.equal(*recorded)


def some_requests(draw: random.Random) -> list[Request]:
    frames = [image(seed) for seed in range(3)]
    return [
        draw.choice(
            (
                Detect(draw.choice(frames), "dog", SHORT),
                Point(draw.choice(frames), "red circle", SHORT),
                Caption(draw.choice(frames), "short", draw.choice((SHORT, SAMPLED))),
                Query(draw.choice(frames), "What?", draw.random() < 0.3, settings=SHORT),
            )
        )
        for _ in range(draw.randint(1, 10))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_replies_equal_those_of_dynamic_shapes(model: LocalModel, seed: int) -> None:
    """Requests arrive between steps, some are cancelled, and all sequences are preempted once."""
    draw, static = random.Random(seed), static_model()
    requests = some_requests(draw) + some_requests(draw)
    scheduler = static.scheduler()
    with counting_steps() as counts:
        jobs, is_running, preempted = [], True, False
        for step in range(500):
            if len(jobs) < len(requests) and draw.random() < 0.5:
                jobs.append(scheduler.submit(requests[len(jobs)]))
            if jobs and draw.random() < 0.05:
                scheduler.cancel(draw.choice(jobs))
            if not preempted and step > 10 and scheduler.running:
                preempted = True
                with patch.object(ModelRunner, "decode_step", side_effect=torch.OutOfMemoryError("out of memory")):
                    scheduler.step()
            is_running = scheduler.step()
            if not is_running and len(jobs) == len(requests):
                break
    assert not is_running
    assert preempted
    assert counts
    for request, job in zip(requests, jobs, strict=True):
        assert job.result is not None
        if not isinstance(job.result, ErrorResult):
            assert_same(model, request, model.run([request])[0], job.result)


@pytest.mark.parametrize(("num_classes", "num_frames"), [(1, 1), (3, 1), (8, 1), (64, 1), (1, 8), (1, 9), (3, 5)])
def test_batches_of_up_to_64_sequences_use_static_shapes(num_classes: int, num_frames: int) -> None:
    model = static_model()
    frames = [image(seed) for seed in range(num_frames)]
    with counting_steps() as counts:
        results = model.run([Detect(frame, f"{i}", SHORT) for frame in frames for i in range(num_classes)])
    assert not any(isinstance(result, ErrorResult) for result in results)
    assert counts[0] > num_classes * num_frames / 2  # some sequences end at their first step


@contextmanager
def counting_launches() -> Iterator[list[tuple[int, bool]]]:
    """Collect the number of sequences of each launched step, and whether it was launched ahead."""
    launches: list[tuple[int, bool]] = []
    launch, launch_next = AdapterBatch._launch, AdapterBatch._launch_next
    ahead = [False]

    def counted(self: AdapterBatch, layout: StepLayout | StaticLayout, heads: Sequence[Head]) -> LaunchedStep:
        launches.append((len(heads), ahead[0]))
        return launch(self, layout, heads)

    def counted_next(self: AdapterBatch) -> None:
        ahead[0] = True
        launch_next(self)
        ahead[0] = False

    with patch.object(AdapterBatch, "_launch", counted), patch.object(AdapterBatch, "_launch_next", counted_next):
        yield launches


def without_end(model: LocalModel) -> LocalModel:
    with torch.no_grad():
        model.network.text.lm_head.bias[model.config.tokenizer.eos_id] = -1e6
    return model


def test_steps_of_objects_are_launched_before_the_host_reads_a_decision() -> None:
    """3 boxes take a prompt step and 9 steps. Steps after a decision are launched ahead, but not after the last one."""
    model = without_end(static_model())
    with counting_launches() as launches:
        (result,) = model.run([Detect(image(0), "dog", Settings(max_objects=3))])
    assert isinstance(result, DetectResult)
    assert len(result.objects) == 3
    assert launches == [(1, False), *[(1, True), (1, False), (1, False)] * 3]


def test_steps_of_text_wait_for_the_host() -> None:
    model = without_end(static_model())
    with counting_launches() as launches:
        model.run([Detect(image(0), "dog", SHORT), Caption(image(0), "short", SHORT)])
    assert sum(is_ahead for num_seqs, is_ahead in launches if num_seqs == 2) == 0
    assert len(launches) >= SHORT.max_tokens


def test_results_of_a_step_ahead_are_discarded_for_ended_sequences(model: LocalModel) -> None:
    """Lists of different lengths: some sequences end while the next step is in progress."""
    static = static_model()
    frames = [image(seed) for seed in range(2)]
    requests = [Detect(frame, f"{i}", Settings(max_objects=1 + i % 4)) for frame in frames for i in range(6)]
    with counting_launches() as launches:
        results = static.run(requests)
    assert any(is_ahead for _, is_ahead in launches)
    for request, result in zip(requests, results, strict=True):
        assert_same(model, request, model.run([request])[0], result)


def test_out_of_memory_in_a_step_ahead_loses_nothing() -> None:
    model = without_end(static_model())
    request = Detect(image(0), "dog", Settings(max_objects=3))
    expected = model.run([request])
    launch_next, calls = AdapterBatch._launch_next, []

    def fail_once(self: AdapterBatch) -> None:
        calls.append(None)
        error = torch.OutOfMemoryError("out of memory") if len(calls) == 4 else None
        with patch.object(self, "_launch", side_effect=error, wraps=self._launch) as launch:
            launch_next(self)
        assert launch.called or error is None

    with patch.object(AdapterBatch, "_launch_next", fail_once):
        assert model.run([request]) == expected
    assert len(calls) == 10
    assert model.limits == LocalModel(model.network, model.tokenizer).limits


def test_two_kv_caches_use_dynamic_shapes() -> None:
    model = static_model()
    with counting_steps() as counts:
        model.run([Caption(image(0), "short", SHORT), Query(None, "Why?", settings=SHORT)])
    assert len(counts) < 8  # steps of the longer text after the shorter one


def test_second_request_reuses_tensors_and_steps() -> None:
    model = static_model()
    with (
        patch.object(KVBuffers, "allocate", wraps=KVBuffers.allocate) as allocate,
        patch.object(GraphedDecodeStep, "__init__", autospec=True, side_effect=GraphedDecodeStep.__init__) as build,
    ):
        first = model.run([Detect(image(0), "dog", SHORT)])
        assert (allocate.call_count, build.call_count) == (1, 1)
        second = model.run([Detect(image(1), "a red circle", SHORT)])
        again = model.run([Detect(image(0), "dog", SHORT)])
        assert (allocate.call_count, build.call_count) == (1, 1)
    assert not isinstance(second[0], ErrorResult)
    assert again == first


@pytest.mark.parametrize("num_classes", [1, 3, 64])
def test_requests_after_a_warm_up_build_nothing(num_classes: int) -> None:
    model = static_model()
    assert model.graph_pool is not None
    without_end(model)
    model.graph_pool.warm_up(None)
    frame = image(0)
    requests = [Detect(frame, f"{i}", Settings(max_objects=2)) for i in range(num_classes)]
    with patch.object(GraphedDecodeStep, "__init__", side_effect=AssertionError), counting_steps() as counts:
        results = model.run(requests)
    assert counts
    assert not any(isinstance(result, ErrorResult) for result in results)


@torch.inference_mode()
def test_reused_tensors_are_empty(model: LocalModel) -> None:
    pool = GraphPool(model.network, GIB)
    buffers = pool.take(3, 100)
    assert buffers.max_groups == 4
    assert buffers.capacity >= 100
    for tensor in (*buffers.layers, buffers.inputs):
        tensor.fill_(torch.nan)
    buffers.seq_ids.fill_(7)
    pool.give_back(buffers)
    assert pool.take(4, 90) is buffers
    assert not any(tensor.any() for tensor in (*buffers.layers, buffers.inputs))
    assert (buffers.seq_ids == PADDING_ID).all()
    assert pool.take(4, 90) is not buffers


def test_least_recently_used_tensors_are_freed(model: LocalModel) -> None:
    pool = GraphPool(model.network, GIB)
    taken = [pool.take(groups, 100) for groups in (1, 2, 4)]
    pool.max_idle_bytes = taken[1].nbytes + taken[2].nbytes
    for buffers in taken:
        pool.give_back(buffers)
    assert pool.idle_bytes == pool.max_idle_bytes
    assert pool.take(2, 100) is taken[1]
    assert pool.take(1, 100) is not taken[0]
    assert pool.clear()
    assert not pool.clear()
    assert pool.idle_bytes == 0


@pytest.mark.parametrize(
    ("num_tokens", "max_groups", "expected"),
    [(1, 1, 1), (3, 1, 4), (64, 1, 64), (65, 1, None), (1, 64, 1), (2, 64, 2), (3, 64, None), (1, 256, None)],
)
def test_steps_are_padded_to_few_sizes(
    model: LocalModel, num_tokens: int, max_groups: int, expected: int | None
) -> None:
    assert GraphPool(model.network, GIB).tokens_per_group(num_tokens, max_groups) == expected
    assert expected is None or expected * max_groups <= MAX_TOKENS


@pytest.mark.parametrize("part", ["text", "vision"])
def test_out_of_memory_frees_idle_tensors(part: str) -> None:
    """A request that runs out of memory once succeeds after the pool is empty, and no limit is lowered."""
    model = static_model()
    pool = model.graph_pool
    assert pool is not None
    pool.give_back(pool.take(4, 100))
    scheduler = model.scheduler()
    jobs = [scheduler.submit(Detect(image(seed), "dog", SHORT)) for seed in range(1 if part == "text" else 2)]
    with patch.object(getattr(model.network, part), "forward", side_effect=torch.OutOfMemoryError("out of memory")):
        scheduler.step()
    assert pool.idle_bytes == 0
    while scheduler.step():
        pass
    assert not any(isinstance(job.result, ErrorResult) for job in jobs)
    assert scheduler.limits.max_images == LocalModel(model.network, model.tokenizer).limits.max_images


def test_closing_the_model_frees_idle_tensors() -> None:
    model = static_model()
    model.run([Detect(image(0), "dog", SHORT)])
    pool = model.graph_pool
    assert pool is not None
    assert pool.idle_bytes
    model.close()
    assert pool.idle_bytes == 0


def test_models_on_the_cpu_have_dynamic_shapes(model: LocalModel) -> None:
    assert GraphPool.for_device(model.network) is None
    assert model.graph_pool is None
