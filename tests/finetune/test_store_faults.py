"""`FinetuneStore` after SIGKILL, with a second process on its folder, and on a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moondream_cv.finetune.errors import FinetuneStoreError, FinetuneStoreLocked
from moondream_cv.finetune.layout import checkpoint_file, finetune_folder, state_file
from moondream_cv.finetune.records import FinetuneRecord
from moondream_cv.finetune.store import FinetuneStore
from tests.finetune.store_worker import digest_of, tensors_of

ROOT = Path(__file__).parents[2]
KEPT = 3  # finetunes after a verification
needs_kill = pytest.mark.skipif(os.name == "nt", reason="forks processes and kills them with SIGKILL")


# --- Crashes ---------------------------------------------------------------------------------------------------------


@dataclass
class Reported:
    """The state of a finetune that follows from the reports.

    Attributes:
        step: Last committed step.
        saved: Steps of the saved checkpoints.
        resumable: Whether the latest checkpoint was never deleted.
        deleted: Whether the finetune was deleted.
        pending: Operation that was reported as begun but not as done, and its step.
    """

    step: int = 0
    saved: set[int] = field(default_factory=set)
    resumable: bool = True
    deleted: bool = False
    pending: tuple[str, int] | None = None

    def after_pending(self) -> Reported:
        """Return the state if the pending operation is complete."""
        operation, step = self.pending or ("", 0)
        return Reported(
            step=step if operation == "commit" else self.step,
            saved={*self.saved, *({step} if operation == "save" else ())}
            - ({step} if operation == "delete_checkpoint" else set()),
            resumable=self.resumable and not (operation == "delete_checkpoint" and step == max(self.saved)),
            deleted=self.deleted or operation == "delete",
        )


class Reports:
    """The reports of all children of a worker, by finetune."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.finetunes: dict[str, Reported] = {}

    def add(self, report: dict[str, Any]) -> None:
        """Add the report of an operation."""
        finetune_id = report["id"]
        if report.get("done") == "create":
            self.finetunes[finetune_id] = Reported()
        elif "begin" in report:
            self.finetunes[finetune_id].pending = report["begin"], report["step"]
        else:
            assert self.finetunes[finetune_id].pending == (report["done"], report["step"])
            self.finetunes[finetune_id] = self.finetunes[finetune_id].after_pending()

    def verify(self) -> None:
        """Open the store and compare it with the reports: operations are complete or without effect."""
        for path in self.root.glob("*/checkpoints/*.safetensors"):  # inference does not wait for the store to open
            check_checkpoint(path)
        with FinetuneStore(self.root) as store:
            records = {record.finetune_id: record for record in store.list_finetunes(100)[0]}
            for finetune_id in records.keys() - self.finetunes.keys():  # created, but not reported
                self.finetunes[finetune_id] = Reported()
            for finetune_id, before in self.finetunes.items():
                found = self.observe(store, finetune_id, records.get(finetune_id))
                before_pending = Reported(before.step, before.saved, before.resumable, before.deleted)
                assert found in (before_pending, before.after_pending()), (finetune_id, before)
                self.finetunes[finetune_id] = found
            for finetune_id in sorted(records)[:-KEPT]:
                store.delete(finetune_id)
                self.finetunes[finetune_id].deleted = True

    def observe(self, store: FinetuneStore, finetune_id: str, record: FinetuneRecord | None) -> Reported:
        """Return the stored state of a finetune, after a check of its files."""
        if record is None:
            assert not finetune_folder(self.root, finetune_id).exists()
            before = self.finetunes[finetune_id]
            return Reported(before.step, before.saved, before.resumable, deleted=True)

        # Check tensors and digest of the training state
        expected = set()
        if record.resumable and record.step > 0:
            state = store.load_state(finetune_id)
            assert state is not None
            assert state[0] == record.step
            assert_equal(state[1], tensors_of(finetune_id, record.step))
            expected.add(state_file(self.root, finetune_id, record.step))
        else:
            assert store.load_state(finetune_id) is None
        last = store.last_step(finetune_id)
        assert (last and last.digest) == (digest_of(finetune_id, record.step) if record.step else None)

        # Check the checkpoints as inference reads them
        saved = {checkpoint.step for checkpoint in store.list_checkpoints(finetune_id, 100)[0]}
        for step in saved:
            path = checkpoint_file(self.root, finetune_id, step)
            check_checkpoint(path)
            expected.add(path)

        # Check that there are no other files
        folder = finetune_folder(self.root, finetune_id)
        assert {path for path in folder.rglob("*") if path.is_file()} == expected
        return Reported(record.step, saved, record.resumable)


class Killer:
    """Runs a worker and kills its children."""

    def __init__(self, root: Path) -> None:
        self.reports = Reports(root)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.finetune.store_worker", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, **command: int) -> None:
        """Start a child."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """Wait for the next report and return it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the worker ended unexpectedly"
        report: dict[str, Any] = json.loads(line)
        if "id" in report:
            self.reports.add(report)
        return report

    def wait(self) -> int:
        """Read all reports of the child, and return its exit status, which is negative for a signal."""
        while "ended" not in (report := self.read()):
            pass
        status: int = report["ended"]
        return status

    def close(self) -> None:
        """End the worker."""
        self._process.communicate()


@contextmanager
def killer(root: Path) -> Iterator[Killer]:
    """Yield a `Killer` for a folder."""
    running = Killer(root)
    try:
        yield running
    finally:
        running.close()


def check_checkpoint(path: Path) -> None:
    """Check tensors and metadata of a checkpoint of the worker."""
    finetune_id, step = path.parents[1].name, int(path.stem)
    with safe_open(path, framework="pt", device="cpu") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"digest": digest_of(finetune_id, step)}
    assert_equal(found, tensors_of(finetune_id, step))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@needs_kill
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_store_is_consistent_after_kills_at_random_times(tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    with killer(tmp_path / "finetunes") as running:
        for _ in range(kills):
            running.start(seed=rng.getrandbits(30))
            child = running.read()["opened"]
            for _ in range(rng.randrange(5, 60)):
                running.read()
            time.sleep(rng.uniform(0, 0.01))  # selects a point within an operation; nothing waits for it
            os.kill(child, signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
            running.reports.verify()
    finetunes = running.reports.finetunes.values()
    assert sum(reported.step for reported in finetunes) > kills
    assert any(reported.saved for reported in finetunes)


@needs_kill
@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.soak)])
def test_store_is_consistent_after_a_kill_at_each_line(tmp_path: Path, stride: int) -> None:
    kills = 0
    with killer(tmp_path / "finetunes") as running:
        while True:
            running.start(kill_at=kills * stride)
            status = running.wait()
            running.reports.verify()
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
    assert kills * stride > 500


@needs_kill
def test_second_process_is_locked_out_until_the_first_is_killed(tmp_path: Path) -> None:
    with killer(tmp_path) as running:
        running.start(seed=0)
        child = running.read()["opened"]
        with pytest.raises(FinetuneStoreLocked, match=f"{tmp_path} are in use by another process; stop it"):
            FinetuneStore(tmp_path)
        while running.read().get("done") != "commit":
            pass
        os.kill(child, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        running.reports.verify()


def test_opening_removes_files_without_a_row(tmp_path: Path) -> None:
    with FinetuneStore(tmp_path) as store:
        finetune_id = store.create("parts", 8, "tiny", 0).finetune_id
        for step in (1, 2):
            store.commit_step(finetune_id, step, state(10, step), f"{step}", {})
            store.save_checkpoint(finetune_id, step, state(10, step), {})
        store.delete_checkpoint(finetune_id, 1)
        before = content(store, finetune_id)
    orphans = [
        state_file(tmp_path, finetune_id, 1),  # not removed after the next commit
        state_file(tmp_path, finetune_id, 3),  # not committed
        state_file(tmp_path, finetune_id, 4).with_name("state-4.safetensors.part"),
        checkpoint_file(tmp_path, finetune_id, 1),  # not removed after its deletion
        checkpoint_file(tmp_path, finetune_id, 3),  # not committed
        checkpoint_file(tmp_path, finetune_id, 4).with_name("4.safetensors.part"),
    ]
    for path in orphans:
        path.write_bytes(b"x")
    with FinetuneStore(tmp_path) as store:
        assert content(store, finetune_id) == before
    assert not any(path.exists() for path in orphans)


# --- Full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on a file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def fill(disk: Path, free: int) -> Iterator[None]:
    """Leave less than `free` + 4096 free bytes on a disk."""
    filler = disk / "filler"
    try:
        statistics = os.statvfs(disk)
        with filler.open("wb") as file:
            file.write(b"x" * max(0, statistics.f_bavail * statistics.f_frsize - free))
        yield
    finally:
        filler.unlink()


def state(size: int, value: float) -> dict[str, torch.Tensor]:
    """Return a training state of `size` float32 numbers."""
    return {"a": torch.full((size,), value, dtype=torch.float32)}


def test_state_that_does_not_fit_on_the_disk_changes_nothing(small_disk: Path) -> None:
    root, size = small_disk / "finetunes", 200_000  # 0.8 MB
    with FinetuneStore(root) as store:
        finetune_id = store.create("parts", 8, "tiny", 0).finetune_id
        store.commit_step(finetune_id, 1, state(size, 1), "one", {"step": 1})
        record = store.save_checkpoint(finetune_id, 1, state(size, 1), {})
        before = sorted(root.rglob("*"))
        with fill(small_disk, 400_000):
            with pytest.raises(FinetuneStoreError, match=f"the disk of {root} is full .*; nothing was changed. Free"):
                store.commit_step(finetune_id, 2, state(size, 2), "two", {"step": 2})
            assert store.get(finetune_id).step == 1
            assert store.last_step(finetune_id) == ("one", {"step": 1}, False)
            assert sorted(root.rglob("*")) == before
        store.commit_step(finetune_id, 2, state(size, 2), "two", {"step": 2})
        with fill(small_disk, 400_000):
            with pytest.raises(FinetuneStoreError, match=f"the disk of {root} is full"):
                store.save_checkpoint(finetune_id, 2, state(size, 2), {})
            assert store.list_checkpoints(finetune_id) == ([record], None)
            assert not checkpoint_file(root, finetune_id, 2).exists()
    with FinetuneStore(root) as store:
        loaded = store.load_state(finetune_id)
        assert loaded is not None
        assert loaded[0] == 2
        assert_equal(loaded[1], state(size, 2))
        store.save_checkpoint(finetune_id, 2, state(size, 2), {})


def create_one(store: FinetuneStore, finetune_id: str) -> None:
    store.create(f"parts-{len(store.list_finetunes(100)[0])}", 8, "tiny", 0)


def log_many(store: FinetuneStore, finetune_id: str) -> None:
    store.log_metrics(finetune_id, 1, {f"metric-{i}": 1.0 for i in range(1000)})


def commit_next(store: FinetuneStore, finetune_id: str) -> None:
    step = store.get(finetune_id).step + 1
    store.commit_step(finetune_id, step, state(4000, step), f"{step}", {"text": "x" * 20_000})


def save_last(store: FinetuneStore, finetune_id: str) -> None:
    step = store.get(finetune_id).step
    store.save_checkpoint(finetune_id, step, state(4000, step), {})


def delete_first(store: FinetuneStore, finetune_id: str) -> None:
    store.delete_checkpoint(finetune_id, 1)


def delete_finetune(store: FinetuneStore, finetune_id: str) -> None:
    store.delete(finetune_id)


def content(store: FinetuneStore, finetune_id: str) -> list[Any]:
    """Return everything that a store contains: the records of all finetunes, and one finetune with its files."""
    found: list[Any] = [store.list_finetunes(100)]
    if any(record.finetune_id == finetune_id for record in found[0][0]):
        loaded = store.load_state(finetune_id)
        found += [loaded and (loaded[0], loaded[1]["a"].tolist()), store.last_step(finetune_id)]
        found += [store.list_checkpoints(finetune_id), store.metrics(finetune_id)]
    return [*found, sorted(path for path in store.root.glob("*/**/*") if path.is_file())]


@pytest.mark.parametrize("call", [create_one, log_many, commit_next, save_last, delete_first, delete_finetune])
def test_operations_without_free_space_have_no_effect(
    small_disk: Path, call: Callable[[FinetuneStore, str], None]
) -> None:
    """The free space grows until the operation succeeds: it runs out in files and in each part of the database."""
    root = small_disk / "finetunes"
    with FinetuneStore(root) as store:
        finetune_id = store.create("parts", 8, "tiny", 0).finetune_id
        commit_next(store, finetune_id)
        save_last(store, finetune_id)
        commit_next(store, finetune_id)
        before = content(store, finetune_id)

    failures, free, done = [], 0, False
    while not done:
        with FinetuneStore(root) as store:
            with fill(small_disk, free):
                try:
                    call(store, finetune_id)
                    done = True
                except FinetuneStoreError as error:
                    failures.append(str(error))
            after = content(store, finetune_id)
            assert (after != before) == done
        with FinetuneStore(root) as store:
            assert content(store, finetune_id) == after
        free += 4096
    assert failures
    assert all(f"the disk of {root} is full" in failure for failure in failures)


def test_store_cannot_be_opened_on_a_full_disk_and_loses_nothing(small_disk: Path) -> None:
    root = small_disk / "finetunes"
    with FinetuneStore(root) as store:
        finetune_id = store.create("parts", 8, "tiny", 0).finetune_id
        commit_next(store, finetune_id)
        before = content(store, finetune_id)
    with fill(small_disk, 0):
        with pytest.raises(FinetuneStoreError, match=f"the disk of {root} is full"):
            FinetuneStore(root)
        with pytest.raises(FinetuneStoreError, match="is full"):
            FinetuneStore(small_disk / "other")
    with FinetuneStore(root) as store:
        assert content(store, finetune_id) == before


LIMITED = """
import resource, sys
import torch
from moondream_cv.finetune.errors import FinetuneStoreError
from moondream_cv.finetune.store import FinetuneStore
store = FinetuneStore(sys.argv[1])
finetune_id = store.create("parts", 8, "tiny", 0).finetune_id
store.commit_step(finetune_id, 1, {"a": torch.ones(1000)}, "one", {})
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    store.commit_step(finetune_id, 2, {"a": torch.ones(200_000)}, "two", {})
except FinetuneStoreError as error:
    print(error)
assert store.last_step(finetune_id).digest == "one"
store.commit_step(finetune_id, 2, {"a": torch.ones(2000)}, "small", {})
"""


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files by setrlimit")
def test_limited_file_size_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "finetunes"
    command = [sys.executable, "-c", LIMITED, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=ROOT)
    assert f"the disk of {root} is full" in done.stdout
    with FinetuneStore(root) as store:
        ((record, *others), _) = store.list_finetunes()
        assert (record.step, others) == (2, [])
        assert [path.name for path in root.glob("*/**/*") if path.is_file()] == ["state-2.safetensors"]
