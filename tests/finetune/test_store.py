"""Metadata, tensors and files of `FinetuneStore` without crashes; `test_store_faults.py` has the crashes."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from moondream_cv.errors import MoondreamError
from moondream_cv.finetune.database import Database
from moondream_cv.finetune.errors import (
    FinetuneConflict,
    FinetuneGone,
    FinetuneNotFound,
    FinetuneStoreError,
    FinetuneStoreLocked,
)
from moondream_cv.finetune.layout import checkpoint_file, finetune_folder, state_file
from moondream_cv.finetune.records import check_name, decode_cursor, encode_cursor, new_id
from moondream_cv.finetune.store import FinetuneStore, read_finetunes
from moondream_cv.model.variants import finetunes_root

MODEL = "moondream2"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FinetuneStore]:
    with FinetuneStore(tmp_path / "finetunes") as store:
        yield store


def create(store: FinetuneStore, name: str = "parts", rank: int = 8) -> str:
    return store.create(name, rank, MODEL, seed=0).finetune_id


def tensors(step: int) -> dict[str, Tensor]:
    """Return tensors of several shapes and dtypes whose values depend on the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(4, 3, generator=generator, dtype=torch.float32),
        "b": torch.randn(2, 5, generator=generator, dtype=torch.float32).bfloat16(),
        "step": torch.tensor(step, dtype=torch.int64),
        "empty": torch.zeros(0, 3, dtype=torch.float32),
    }


def commit(store: FinetuneStore, finetune_id: str, step: int) -> None:
    store.commit_step(finetune_id, step, tensors(step), f"digest {step}", {"step": step})


def save(store: FinetuneStore, finetune_id: str, step: int) -> None:
    store.save_checkpoint(finetune_id, step, tensors(step), {"step": str(step)})


def train(store: FinetuneStore, finetune_id: str, steps: range) -> None:
    """Commit steps and save a checkpoint of each."""
    for step in steps:
        commit(store, finetune_id, step)
        save(store, finetune_id, step)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def read_checkpoint(store: FinetuneStore, finetune_id: str, step: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a checkpoint, read from its path as inference does."""
    with safe_open(checkpoint_file(store.root, finetune_id, step), framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def files(store: FinetuneStore) -> list[str]:
    """Return the files in the folders of finetunes, relative to the root."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.glob("*/**/*") if path.is_file())


# --- Finetunes -------------------------------------------------------------------------------------------------------


def test_created_finetune_is_found_by_id_after_reopening(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        record = store.create("parts-1.b_2", 16, MODEL, seed=7)
    assert (record.name, record.rank, record.model, record.seed) == ("parts-1.b_2", 16, MODEL, 7)
    assert (record.step, record.resumable) == (0, True)
    assert record.created_at_ms == record.updated_at_ms
    with FinetuneStore(tmp_path) as store:
        assert store.get(record.finetune_id) == record
        assert store.load_state(record.finetune_id) is None
        assert store.last_step(record.finetune_id) is None


def test_same_name_returns_the_existing_finetune(store: FinetuneStore) -> None:
    first = store.create("parts", 8, MODEL, seed=1)
    assert store.create("parts", 8, MODEL, seed=2) == first
    assert store.list_finetunes(10) == ([first], None)


def test_same_name_with_another_rank_or_model_is_a_conflict(store: FinetuneStore) -> None:
    create(store)
    with pytest.raises(FinetuneConflict, match=r"'parts' exists with rank 8, got rank 16; use 8, choose another name"):
        store.create("parts", 16, MODEL, seed=0)
    with pytest.raises(FinetuneConflict, match=r"exists with model moondream2, got model tiny"):
        store.create("parts", 8, "tiny", seed=0)
    assert len(store.list_finetunes(10)[0]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 8, MODEL, 0), "name must have 1 to 64"),
        (("a b", 8, MODEL, 0), "name must have 1 to 64 .*'a b'"),
        (("../x", 8, MODEL, 0), "name must have 1 to 64"),
        (("a\n", 8, MODEL, 0), "name must have 1 to 64"),
        (("ä", 8, MODEL, 0), "name must have 1 to 64"),
        (("a" * 65, 8, MODEL, 0), "name must have 1 to 64"),
        ((None, 8, MODEL, 0), "name must have 1 to 64"),
        (("a", 4, MODEL, 0), "rank must be one of 8, 16, 24, 32, got 4"),
        (("a", 8.0, MODEL, 0), "rank must be one of"),
        (("a", True, MODEL, 0), "rank must be one of"),
        (("a", "8", MODEL, 0), "rank must be one of"),
        (("a", 8, "", 0), "model must not be empty"),
        (("a", 8, MODEL, -1), "seed must be an integer"),
        (("a", 8, MODEL, 2**63), "seed must be an integer"),
    ],
)
def test_invalid_arguments_create_no_finetune(
    store: FinetuneStore, arguments: tuple[Any, Any, Any, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.create(*arguments)
    assert store.list_finetunes(10) == ([], None)


@given(st.text(alphabet=st.sampled_from("aZ09._-"), min_size=1, max_size=64))
def test_names_of_letters_digits_dots_hyphens_and_underscores_are_valid(name: str) -> None:
    assert check_name(name) == name


@given(st.text(min_size=1, max_size=10).filter(lambda text: not set(text) <= set("aZ09._-") and not text.isascii()))
def test_other_names_are_invalid(name: str) -> None:
    with pytest.raises(ValueError, match="name must have"):
        check_name(name)


@pytest.mark.parametrize("finetune_id", ["0" * 26, "", "../x", "a'; DROP TABLE finetunes; --"])
def test_unknown_finetune_is_not_found(store: FinetuneStore, finetune_id: str) -> None:
    create(store)
    calls: list[Callable[[], object]] = [
        lambda: store.get(finetune_id),
        lambda: store.delete(finetune_id),
        lambda: commit(store, finetune_id, 1),
        lambda: store.load_state(finetune_id),
        lambda: store.last_step(finetune_id),
        lambda: store.acknowledge(finetune_id),
        lambda: store.check_resumable(finetune_id),
        lambda: save(store, finetune_id, 1),
        lambda: store.get_checkpoint(finetune_id, 1),
        lambda: store.list_checkpoints(finetune_id),
        lambda: store.delete_checkpoint(finetune_id, 1),
        lambda: store.log_metrics(finetune_id, 1, {"loss": 1.0}),
        lambda: store.metrics(finetune_id),
    ]
    for call in calls:
        with pytest.raises(FinetuneNotFound, match="there is no finetune"):
            call()
    assert len(store.list_finetunes(10)[0]) == 1
    assert files(store) == []


def test_deleted_finetune_leaves_no_files_and_frees_its_name(store: FinetuneStore) -> None:
    first = create(store)
    train(store, first, range(1, 3))
    store.log_metrics(first, 1, {"loss": 0.5})
    store.delete(first)
    assert not finetune_folder(store.root, first).exists()
    with pytest.raises(FinetuneNotFound):
        store.get(first)
    with pytest.raises(FinetuneNotFound):
        store.delete(first)
    second = store.create("parts", 32, MODEL, seed=0)
    assert second.finetune_id > first
    assert second.step == 0
    assert store.metrics(second.finetune_id) == {}


def test_deleted_finetune_stays_deleted_after_reopening(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        kept, deleted = create(store, "kept"), create(store, "deleted")
        train(store, kept, range(1, 2))
        train(store, deleted, range(1, 2))
        store.delete(deleted)
    for _ in range(2):
        with FinetuneStore(tmp_path) as store:
            assert [record.finetune_id for record in store.list_finetunes(10)[0]] == [kept]
            assert len(files(store)) == 2


def test_finetunes_are_paged_newest_first(store: FinetuneStore) -> None:
    ids = [create(store, f"parts-{i}") for i in range(7)]
    first, cursor = store.list_finetunes(3)
    assert [record.finetune_id for record in first] == ids[:3:-1]
    added = create(store, "newer")
    store.delete(ids[4])  # the entry that the cursor was made from
    store.delete(ids[2])
    second, cursor = store.list_finetunes(3, cursor)
    assert [record.finetune_id for record in second] == [ids[3], ids[1], ids[0]]
    assert cursor is None
    assert store.list_finetunes(1)[0][0].finetune_id == added


def test_list_of_exactly_one_page_has_no_next_page(store: FinetuneStore) -> None:
    for i in range(3):
        create(store, f"parts-{i}")
    page, cursor = store.list_finetunes(3)
    assert (len(page), cursor) == (3, None)


@pytest.mark.parametrize("limit", [0, -1, 101, 1.5, "5", True, None])
def test_limit_outside_1_to_100_is_rejected(store: FinetuneStore, limit: Any) -> None:
    finetune_id = create(store)
    with pytest.raises(ValueError, match="limit must be an integer between 1 and 100"):
        store.list_finetunes(limit)
    with pytest.raises(ValueError, match="limit must be an integer between 1 and 100"):
        store.list_checkpoints(finetune_id, limit)


@pytest.mark.parametrize("cursor", ["", "x", "ä", "====", "c3RlcHM6", encode_cursor("steps", "-1"), 5, b"x"])
def test_malformed_cursor_is_rejected(store: FinetuneStore, cursor: Any) -> None:
    finetune_id = create(store)
    with pytest.raises(ValueError, match="cursor must be the next_cursor of an earlier page"):
        store.list_finetunes(5, cursor)
    with pytest.raises(ValueError, match="cursor must be the next_cursor of an earlier page"):
        store.list_checkpoints(finetune_id, 5, cursor)


def test_cursor_of_another_list_is_rejected(store: FinetuneStore) -> None:
    finetune_id = create(store)
    with pytest.raises(ValueError, match="cursor must be"):
        store.list_finetunes(5, encode_cursor("steps", "3"))
    with pytest.raises(ValueError, match="cursor must be"):
        store.list_checkpoints(finetune_id, 5, encode_cursor("finetunes", finetune_id))


@given(st.text(max_size=40))
def test_any_text_is_a_cursor_or_rejected(text: str) -> None:
    try:
        last = decode_cursor("steps", text, re.compile("[0-9]+"))
    except ValueError:
        return
    assert encode_cursor("steps", last) == text


def test_ids_are_unique_and_sort_by_creation() -> None:
    ids = [new_id() for _ in range(2000)]
    assert ids == sorted(set(ids))
    assert all(len(text) == 26 and text.isascii() and text.isalnum() for text in ids)


# --- Train steps -----------------------------------------------------------------------------------------------------


def test_committed_step_is_loaded_after_reopening(tmp_path: Path) -> None:
    reply = {"step": 2, "applied": True, "kl": None, "grad_norm": 0.25, "nested": [{"a": "ä"}]}
    with FinetuneStore(tmp_path) as store:
        finetune_id = create(store)
        commit(store, finetune_id, 1)
        record = store.commit_step(finetune_id, 2, tensors(2), "digest 2", reply)
        assert record.step == 2
        assert files(store) == [f"{finetune_id}/state-2.safetensors"]
    with FinetuneStore(tmp_path) as store:
        assert store.get(finetune_id) == record
        state = store.load_state(finetune_id)
        assert state is not None
        assert state[0] == 2
        assert_equal(state[1], tensors(2))
        assert store.last_step(finetune_id) == ("digest 2", reply, False)


def test_acknowledged_step_is_followed_by_an_unacknowledged_one(store: FinetuneStore) -> None:
    finetune_id = create(store)
    store.acknowledge(finetune_id)  # no step yet
    commit(store, finetune_id, 1)
    store.acknowledge(finetune_id)
    last = store.last_step(finetune_id)
    assert last is not None
    assert last.acknowledged
    commit(store, finetune_id, 2)
    assert store.last_step(finetune_id) == ("digest 2", {"step": 2}, False)


def test_views_shared_memory_and_gradients_are_stored(store: FinetuneStore) -> None:
    finetune_id = create(store)
    buffer = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    shared = {"rows": buffer[:2], "columns": buffer.T, "all": buffer, "again": buffer}
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))
    store.commit_step(finetune_id, 1, {**shared, "parameter": parameter}, "digest", {})
    state = store.load_state(finetune_id)
    assert state is not None
    assert_equal(state[1], {**shared, "parameter": parameter.detach()})


@pytest.mark.parametrize("step", [0, 1, 2, -1, 2.5, True, None, 2**53])
def test_step_must_be_greater_than_the_last_one(store: FinetuneStore, step: Any) -> None:
    finetune_id = create(store)
    commit(store, finetune_id, 2)
    with pytest.raises(ValueError, match="step must be"):
        store.commit_step(finetune_id, step, tensors(9), "digest", {})
    assert store.last_step(finetune_id) == ("digest 2", {"step": 2}, False)
    assert files(store) == [f"{finetune_id}/state-2.safetensors"]


@pytest.mark.parametrize(
    ("stored", "digest", "reply", "message"),
    [
        ({"a": [1.0]}, "digest", {}, "tensors must map names to dense tensors, got 'a': list"),
        ({1: torch.zeros(1)}, "digest", {}, "tensors must map names"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "digest", {}, "tensors must map names"),
        ({}, "", {}, "digest must not be empty"),
        ({}, "digest", {"kl": float("nan")}, "reply must be a JSON object"),
        ({}, "digest", {"kl": torch.zeros(1)}, "reply must be a JSON object"),
    ],
)
def test_invalid_step_changes_nothing(
    store: FinetuneStore, stored: Any, digest: str, reply: dict[str, Any], message: str
) -> None:
    finetune_id = create(store)
    with pytest.raises(ValueError, match=message):
        store.commit_step(finetune_id, 1, stored, digest, reply)
    assert store.get(finetune_id).step == 0
    assert files(store) == []


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def test_saved_checkpoint_is_read_by_path(store: FinetuneStore) -> None:
    finetune_id = create(store)
    commit(store, finetune_id, 5)
    record = store.save_checkpoint(finetune_id, 5, tensors(5), {"format": "pt", "rank": "8"})
    assert (record.finetune_id, record.step) == (finetune_id, 5)
    assert store.get_checkpoint(finetune_id, 5) == record
    found, metadata = read_checkpoint(store, finetune_id, 5)
    assert_equal(found, tensors(5))
    assert metadata == {"format": "pt", "rank": "8"}
    assert store.get(finetune_id).updated_at_ms >= record.created_at_ms


def test_checkpoint_before_the_first_step_has_step_0(store: FinetuneStore) -> None:
    finetune_id = create(store)
    save(store, finetune_id, 0)
    assert store.get_checkpoint(finetune_id, 0).step == 0


def test_saving_a_step_twice_keeps_the_first_checkpoint(store: FinetuneStore) -> None:
    finetune_id = create(store)
    commit(store, finetune_id, 1)
    first = store.save_checkpoint(finetune_id, 1, tensors(1), {})
    assert store.save_checkpoint(finetune_id, 1, tensors(8), {}) == first
    assert_equal(read_checkpoint(store, finetune_id, 1)[0], tensors(1))
    assert store.list_checkpoints(finetune_id) == ([first], None)


def test_checkpoint_of_a_later_step_is_rejected(store: FinetuneStore) -> None:
    finetune_id = create(store)
    commit(store, finetune_id, 1)
    with pytest.raises(ValueError, match=r"step must be at most 1, .* got 2"):
        save(store, finetune_id, 2)
    with pytest.raises(ValueError, match="metadata must map strings to strings, got 'rank': 8"):
        store.save_checkpoint(finetune_id, 1, tensors(1), {"rank": 8})  # type: ignore[dict-item]
    assert files(store) == [f"{finetune_id}/state-1.safetensors"]


def test_checkpoints_are_paged_newest_first(store: FinetuneStore) -> None:
    finetune_id, other = create(store), create(store, "other")
    train(store, finetune_id, range(1, 13))
    train(store, other, range(1, 3))
    first, cursor = store.list_checkpoints(finetune_id, 5)
    assert store.saved_steps(finetune_id)[:5] == [record.step for record in first]
    assert [record.step for record in first] == [12, 11, 10, 9, 8]
    train(store, finetune_id, range(13, 15))
    store.delete_checkpoint(finetune_id, 8)  # the entry that the cursor was made from
    store.delete_checkpoint(finetune_id, 6)
    second, cursor = store.list_checkpoints(finetune_id, 4, cursor)
    assert [record.step for record in second] == [7, 5, 4, 3]
    third, cursor = store.list_checkpoints(finetune_id, 4, cursor)
    assert ([record.step for record in third], cursor) == ([2, 1], None)


def test_checkpoint_that_was_never_saved_is_not_found(store: FinetuneStore) -> None:
    finetune_id = create(store)
    train(store, finetune_id, range(1, 2))
    for call in (store.get_checkpoint, store.delete_checkpoint):
        with pytest.raises(FinetuneNotFound, match="has no checkpoint of step 3; list its checkpoints"):
            call(finetune_id, 3)
        with pytest.raises(ValueError, match="step must be an integer"):
            call(finetune_id, -1)


def test_deleted_checkpoint_is_gone(store: FinetuneStore) -> None:
    finetune_id = create(store)
    train(store, finetune_id, range(1, 4))
    store.delete_checkpoint(finetune_id, 2)
    assert not checkpoint_file(store.root, finetune_id, 2).exists()
    assert [record.step for record in store.list_checkpoints(finetune_id)[0]] == [3, 1]
    assert store.saved_steps(finetune_id) == [3, 1]
    for call in (store.get_checkpoint, store.delete_checkpoint):
        with pytest.raises(FinetuneGone, match=r"the checkpoint of step 2 .* was deleted"):
            call(finetune_id, 2)
    with pytest.raises(FinetuneGone, match="step 2"):
        save(store, finetune_id, 2)
    store.check_resumable(finetune_id)
    train(store, finetune_id, range(4, 5))


def test_finetune_without_its_latest_checkpoint_cannot_resume(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        finetune_id = create(store)
        train(store, finetune_id, range(1, 4))
        commit(store, finetune_id, 4)
        store.delete_checkpoint(finetune_id, 3)
    with FinetuneStore(tmp_path) as store:
        assert not store.get(finetune_id).resumable
        for call in (
            lambda: store.check_resumable(finetune_id),
            lambda: commit(store, finetune_id, 5),
            lambda: save(store, finetune_id, 4),
        ):
            with pytest.raises(FinetuneGone, match=r"latest checkpoint .* was deleted, so its training cannot resume"):
                call()
        assert store.load_state(finetune_id) is None
        assert store.get_checkpoint(finetune_id, 2).step == 2
        save(store, finetune_id, 2)  # saved before
        assert files(store) == [f"{finetune_id}/checkpoints/{step}.safetensors" for step in (1, 2)]


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_returned_by_step_and_name(store: FinetuneStore) -> None:
    finetune_id, other = create(store), create(store, "other")
    assert store.log_metrics(finetune_id, 10, {"loss": 0.5, "f1": 1}) == 2
    assert store.log_metrics(finetune_id, 2, {"loss": 0.75}) == 1
    assert store.log_metrics(finetune_id, 10, {"loss": 0.25}) == 1  # a retry replaces the value
    assert store.log_metrics(finetune_id, 11, {}) == 0
    assert store.log_metrics(other, 1, {"loss": 9.0}) == 1
    assert store.metrics(finetune_id) == {2: {"loss": 0.75}, 10: {"f1": 1.0, "loss": 0.25}}
    assert list(store.metrics(finetune_id)) == [2, 10]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), "1", None, True, pytest.param(10**400, id="large")]
)
def test_metric_that_is_not_a_finite_number_stores_nothing(store: FinetuneStore, value: Any) -> None:
    finetune_id = create(store)
    with pytest.raises(ValueError, match="the metric 'f1' must be a finite number"):
        store.log_metrics(finetune_id, 1, {"loss": 1.0, "f1": value})
    with pytest.raises(ValueError, match="the name of a metric must not be empty"):
        store.log_metrics(finetune_id, 1, {"loss": 1.0, " ": 1.0})
    assert store.metrics(finetune_id) == {}


# --- Folder ----------------------------------------------------------------------------------------------------------


def test_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path))
    assert finetunes_root() == tmp_path
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / ".local" / "share"))
    assert finetunes_root() == tmp_path / ".local" / "share" / "moondream_cv" / "finetunes"


@pytest.mark.parametrize("finetune_id", ["", "..", "../../etc/passwd", "0" * 25, "0" * 25 + "/", "0" * 26 + "\n", None])
def test_paths_of_malformed_ids_are_rejected(tmp_path: Path, finetune_id: Any) -> None:
    with pytest.raises(ValueError, match="a finetune ID must have 26 letters and digits"):
        checkpoint_file(tmp_path, finetune_id, 1)
    with pytest.raises(ValueError, match="step must be an integer"):
        checkpoint_file(tmp_path, "0" * 26, -1)


def test_second_store_on_a_folder_is_locked_out(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        finetune_id = create(store)
        with pytest.raises(FinetuneStoreLocked, match=f"{tmp_path} are in use by another process"):
            FinetuneStore(tmp_path)
        assert store.get(finetune_id).name == "parts"
    with FinetuneStore(tmp_path) as store:
        assert store.get(finetune_id).name == "parts"


def test_store_can_be_closed_by_another_thread_and_twice(tmp_path: Path) -> None:
    store = FinetuneStore(tmp_path)
    finetune_id = create(store)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(store.close).result()
    store.close()
    with pytest.raises(FinetuneStoreError, match=f"the store in {tmp_path} is closed; open it again"):
        store.get(finetune_id)
    with pytest.raises(FinetuneStoreError, match="is closed"):
        create(store)
    FinetuneStore(tmp_path).close()


def test_threads_share_a_store(store: FinetuneStore) -> None:
    shared = create(store, "shared")
    barrier = threading.Barrier(4)

    def work(worker: int) -> str:
        finetune_id = create(store, f"parts-{worker}")
        barrier.wait()
        for step in range(1, 9):
            commit(store, finetune_id, step)
            save(store, finetune_id, step)
            store.log_metrics(shared, step, {f"loss-{worker}": float(step)})
            assert store.load_state(finetune_id) is not None
            store.list_finetunes(10)
        return finetune_id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(work, range(4)))
    for finetune_id in ids:
        assert store.get(finetune_id).step == 8
        assert len(store.list_checkpoints(finetune_id)[0]) == 8
    assert store.metrics(shared)[8] == {f"loss-{worker}": 8.0 for worker in range(4)}


def test_threads_that_create_one_name_get_one_finetune(store: FinetuneStore) -> None:
    barrier = threading.Barrier(4)

    def work(_: int) -> str:
        barrier.wait()
        return create(store)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1


def test_missing_file_only_affects_its_finetune(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FinetuneStore(tmp_path) as store:
        damaged, intact = create(store, "damaged"), create(store, "intact")
        train(store, damaged, range(1, 3))
        train(store, intact, range(1, 3))
    state = state_file(tmp_path, damaged, 2)
    state.unlink()
    with caplog.at_level(logging.WARNING), FinetuneStore(tmp_path) as store:
        assert f"{state} is missing" in caplog.text
        with pytest.raises(FinetuneStoreError, match=f"{state} is missing; restore it from a backup"):
            store.load_state(damaged)
        assert store.load_state(intact) is not None
        store.delete(damaged)
        assert [record.finetune_id for record in store.list_finetunes(5)[0]] == [intact]


def test_truncated_state_is_reported(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        finetune_id = create(store)
        commit(store, finetune_id, 1)
        os.truncate(state_file(tmp_path, finetune_id, 1), 20)
        with pytest.raises(FinetuneStoreError, match=r"state-1\.safetensors is damaged"):
            store.load_state(finetune_id)


def test_finetunes_without_their_database_are_not_removed(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        finetune_id = create(store)
        train(store, finetune_id, range(1, 2))
        before = files(store)
    for path in tmp_path.glob("finetunes.sqlite*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(FinetuneStoreError, match=r"finetunes\.sqlite is missing, but .* contains 1 finetunes"):
            FinetuneStore(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/**/*") if path.is_file()) == before


def test_folders_and_files_of_others_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FinetuneStore(tmp_path) as store:
        finetune_id = create(store)
        train(store, finetune_id, range(1, 2))
    unknown = tmp_path / new_id() / "checkpoints" / "1.safetensors"
    others = [unknown, tmp_path / "notes.txt", tmp_path / finetune_id / "notes.part", tmp_path / finetune_id / "a.txt"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with caplog.at_level(logging.WARNING), FinetuneStore(tmp_path):
        assert f"{unknown.parents[1]} does not belong to a finetune" in caplog.text
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\x00" + b"\xff" * 4096])
def test_damaged_database_is_reported_and_the_lock_released(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "finetunes.sqlite"
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(FinetuneStoreError, match=f"{tmp_path} cannot be read or written"):
            FinetuneStore(tmp_path)
    path.unlink()
    FinetuneStore(tmp_path).close()


def test_database_of_a_newer_version_is_rejected(tmp_path: Path) -> None:
    FinetuneStore(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "finetunes.sqlite")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(FinetuneStoreError, match=r"has version 2 of the format, .* supports version 1; update"):
        FinetuneStore(tmp_path)


def test_transaction_is_rolled_back_if_its_body_raises(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.sqlite")
    columns = "id, name, rank, model, seed, created_at_ms, updated_at_ms"
    insert = f"INSERT INTO finetunes ({columns}) VALUES (?, ?, 8, 'tiny', 0, 0, 0)"

    def add(*rows: tuple[str, str], then: Callable[[], object] = lambda: None) -> None:
        with database.transaction() as connection:
            connection.executemany(insert, rows)
            then()

    with pytest.raises(KeyError):
        add(("1", "one"), then=lambda: {}["missing"])
    add(("2", "two"))
    with pytest.raises(FinetuneStoreError, match="UNIQUE"):
        add(("3", "three"), ("4", "two"))
    assert [row["id"] for row in database.read("SELECT id FROM finetunes")] == ["2"]
    database.close()


def test_root_that_is_a_file_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_bytes(b"")
    with pytest.raises(FinetuneStoreError, match=f"{root} cannot be read or written"):
        FinetuneStore(root)


def test_errors_are_errors_of_the_package() -> None:
    for kind in (FinetuneConflict, FinetuneGone, FinetuneNotFound, FinetuneStoreError, FinetuneStoreLocked):
        assert issubclass(kind, MoondreamError)


def test_finetunes_are_read_while_the_store_is_open(store: FinetuneStore) -> None:
    first, second = create(store, "first"), create(store, "second")
    for step in (1, 2, 3):
        commit(store, first, step)
        store.save_checkpoint(first, step, tensors(step), {})
    store.delete_checkpoint(first, 2)
    deleted = create(store, "deleted")
    store.delete(deleted)
    expected = [(store.get(second), []), (store.get(first), [3, 1])]
    assert read_finetunes(store.root) == expected
    store.close()
    assert read_finetunes(store.root) == expected


def test_folders_without_a_database_have_no_finetunes(tmp_path: Path) -> None:
    assert read_finetunes(tmp_path / "missing") == []
    assert read_finetunes(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "finetunes.sqlite").touch()  # a crash before the tables were created
    assert read_finetunes(tmp_path) == []
    (tmp_path / "finetunes.sqlite").unlink()
    (tmp_path / new_id()).mkdir()
    with pytest.raises(FinetuneStoreError, match=r"finetunes\.sqlite is missing"):
        read_finetunes(tmp_path)
