"""Everything that finetunes keep on disk: metadata in SQLite, tensors as safetensors.

A crash at any point loses the train step that was being committed and nothing else, because of the order of writes:

- A file is written under a temporary name, synced and renamed before the row that refers to it is committed. If the row
  is missing after a crash, the file is an orphan, and opening the store removes it.
- A row is changed before the file that it referred to is removed. A file that is left over is an orphan as well.

`layout.py` defines the paths, `stored_files.py` encodes and reads tensors, and `database.py` contains the schema.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from moondream_cv.arguments import check_integer, check_text
from moondream_cv.durable_files import PART_SUFFIX, is_disk_full, make_folder, remove_file, remove_folder, write_file
from moondream_cv.finetune.database import Database
from moondream_cv.finetune.errors import (
    FinetuneConflict,
    FinetuneGone,
    FinetuneNotFound,
    FinetuneStoreError,
    FinetuneStoreLocked,
)
from moondream_cv.finetune.layout import (
    DATABASE,
    FINETUNE_ID,
    LOCK,
    MAX_STEP,
    check_step,
    checkpoint_file,
    finetune_folder,
    state_file,
    state_step,
)
from moondream_cv.finetune.records import (
    CheckpointRecord,
    FinetuneRecord,
    LastStep,
    check_limit,
    check_metric,
    check_name,
    check_rank,
    checkpoint_record,
    decode_cursor,
    encode_cursor,
    encode_reply,
    finetune_record,
    new_id,
    now_ms,
)
from moondream_cv.finetune.recovery import check_database_exists, recover, store_files
from moondream_cv.finetune.stored_files import encode_tensors, read_tensors, storage_errors

MAX_SEED = 2**63 - 1  # the largest integer of SQLite
_AFTER_ALL_IDS = "~"  # sorts after digits and letters
_STEP_KEY = re.compile(r"0|[1-9][0-9]{0,15}")


def read_finetunes(root: str | Path) -> list[tuple[FinetuneRecord, list[int]]]:
    """Return all finetunes under a folder, also while another process uses it.

    Args:
        root: Path of the folder, such as `model.variants.finetunes_root()`. It may not exist.

    Returns:
        The finetunes, newest first, each with the steps of its saved checkpoints, latest first.

    Raises:
        FinetuneStoreError: The folder cannot be read, or its database is damaged or missing.
    """
    root = Path(root).expanduser().absolute()
    if not root.exists():
        return []
    check_database_exists(root)
    if not (root / DATABASE).exists():
        return []
    with contextlib.closing(Database(root / DATABASE, read_only=True)) as database:
        if not database.read("SELECT 1 FROM sqlite_master WHERE name = 'last_steps'"):  # it is being created
            return []
        steps: dict[str, list[int]] = {}
        for row in database.read("SELECT finetune_id, step FROM checkpoints WHERE deleted = 0 ORDER BY step DESC"):
            steps.setdefault(row["finetune_id"], []).append(row["step"])
        records = map(finetune_record, database.read("SELECT * FROM finetunes WHERE deleted = 0 ORDER BY id DESC"))
        return [(record, steps.get(record.finetune_id, [])) for record in records]


class FinetuneStore:
    """The finetunes under one folder. One process can use a folder; its threads can share a store.

    Attributes:
        root: Absolute path of the folder.
        training: Lock for services, so that one of them trains at a time. The store does not use it.
    """

    def __init__(self, root: str | Path) -> None:
        """Open a folder with finetunes, or create it, and finish what a crash interrupted.

        Args:
            root: Path of the folder, such as `model.variants.finetunes_root()`.

        Raises:
            FinetuneStoreLocked: Another process uses the folder.
            FinetuneStoreError: The folder cannot be read or written, or its database is damaged or missing.
        """
        self.root = Path(root).expanduser().absolute()
        self.training = threading.RLock()
        self._writing = threading.RLock()  # held while files change; reads of metadata do not wait for it
        with contextlib.ExitStack() as opened:
            with storage_errors(self.root):
                make_folder(self.root)
                self._process_lock = _lock_process(self.root)
            opened.callback(self._process_lock.release)
            check_database_exists(self.root)
            self._database = Database(self.root / DATABASE)
            opened.callback(self._database.close)
            recover(self.root, self._database)
            self._opened = opened.pop_all()

    def __enter__(self) -> FinetuneStore:
        """Return the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Close the database and let other processes use the folder. A second call has no effect."""
        with self._writing:
            self._opened.close()

    # --- Finetunes ---------------------------------------------------------------------------------------------------

    def create(self, name: str, rank: int, model: str, seed: int) -> FinetuneRecord:
        """Create a finetune, or return the one with this name.

        Args:
            name: Name of 1 to 64 letters, digits, '.', '-' and '_'.
            rank: Rank of the adapter: 8, 16, 24 or 32.
            model: Name of the base model.
            seed: Seed of a new finetune. The seed of an existing one does not change.

        Raises:
            ValueError: An argument is invalid.
            FinetuneConflict: The finetune with this name has another rank or model.
            FinetuneStoreError: The disk is full or damaged.
        """
        check_name(name), check_text("model", model)
        rank = check_rank(rank)
        seed = check_integer("seed", seed, 0, MAX_SEED)
        with self._database.transaction() as connection:
            row = connection.execute("SELECT * FROM finetunes WHERE name = ? AND deleted = 0", (name,)).fetchone()
            if row is None:
                finetune_id, now = new_id(), now_ms()
                connection.execute(
                    "INSERT INTO finetunes (id, name, rank, model, seed, created_at_ms, updated_at_ms) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (finetune_id, name, rank, model, seed, now, now),
                )
                row = connection.execute("SELECT * FROM finetunes WHERE id = ?", (finetune_id,)).fetchone()
        record = finetune_record(row)
        for what, existing, given in (("rank", record.rank, rank), ("model", record.model, model)):
            if existing != given:
                raise FinetuneConflict(
                    f"the finetune {name!r} exists with {what} {existing}, got {what} {given}; use {existing}, choose "
                    "another name or delete the finetune"
                )
        return record

    def get(self, finetune_id: str) -> FinetuneRecord:
        """Return the metadata of a finetune.

        Args:
            finetune_id: ID of the finetune.

        Raises:
            FinetuneNotFound: The finetune does not exist.
        """
        return finetune_record(self._row(finetune_id))

    def list_finetunes(self, limit: int = 50, cursor: str | None = None) -> tuple[list[FinetuneRecord], str | None]:
        """Return a page of the finetunes, newest first.

        Args:
            limit: Maximum number of entries, 1 to 100.
            cursor: Cursor of the page, None for the first. It stays valid when finetunes are created or deleted.

        Returns:
            The finetunes, and the cursor of the next page or None after the last.

        Raises:
            ValueError: The limit or the cursor is invalid.
        """
        limit = check_limit(limit)
        before = _AFTER_ALL_IDS if cursor is None else decode_cursor("finetunes", cursor, FINETUNE_ID)
        statement = "SELECT * FROM finetunes WHERE deleted = 0 AND id < ? ORDER BY id DESC LIMIT ?"
        records = [finetune_record(row) for row in self._database.read(statement, before, limit + 1)]
        page, more = records[:limit], len(records) > limit
        return page, encode_cursor("finetunes", page[-1].finetune_id) if more else None

    def delete(self, finetune_id: str) -> None:
        """Delete a finetune with its state, checkpoints and metrics.

        Args:
            finetune_id: ID of the finetune.

        Raises:
            FinetuneNotFound: The finetune does not exist.
            FinetuneStoreError: The disk is full or damaged.
        """
        with self._writing:
            self._row(finetune_id)
            with self._database.transaction() as connection:
                # The row goes when the store is opened again and the folder is gone.
                connection.execute("UPDATE finetunes SET deleted = 1 WHERE id = ?", (finetune_id,))
            remove_folder(finetune_folder(self.root, finetune_id))

    # --- Train steps -------------------------------------------------------------------------------------------------

    def commit_step(
        self, finetune_id: str, step: int, tensors: Mapping[str, Tensor], digest: str, reply: Mapping[str, Any]
    ) -> FinetuneRecord:
        """Store the training state after a step, and the reply to its request.

        Args:
            finetune_id: ID of the finetune.
            step: Number of the step, greater than that of the last one.
            tensors: Adapter and state of the optimizer.
            digest: Digest of the request, to recognize a retry.
            reply: Reply to the request, as for JSON.

        Raises:
            ValueError: The step is not greater than the last one, or the tensors or the reply cannot be stored.
            FinetuneNotFound: The finetune does not exist.
            FinetuneGone: Its latest checkpoint was deleted.
            FinetuneStoreError: The disk is full or damaged; the last step is unchanged.
        """
        step, digest = check_step(step), check_text("digest", digest)
        text, content = encode_reply(reply), encode_tensors(tensors)
        with self._writing:
            self.check_resumable(finetune_id)
            last = self.get(finetune_id).step
            if step <= last:
                raise ValueError(f"step must be greater than {last}, the last step of {finetune_id}, got {step}")
            path = state_file(self.root, finetune_id, step)
            with self._new_file(path, content) as connection:
                connection.execute(
                    "UPDATE finetunes SET step = ?, state_step = ?, updated_at_ms = ? WHERE id = ?",
                    (step, step, now_ms(), finetune_id),
                )
                connection.execute(
                    "INSERT OR REPLACE INTO last_steps (finetune_id, digest, reply) VALUES (?, ?, ?)",
                    (finetune_id, digest, text),
                )
            self._remove_states(finetune_id, keep=path)
            return self.get(finetune_id)

    def load_state(self, finetune_id: str) -> tuple[int, dict[str, Tensor]] | None:
        """Return the last committed step and its training state.

        Args:
            finetune_id: ID of the finetune.

        Returns:
            The step and the tensors on the CPU, or None if there is no state: before the first step, and after the
            latest checkpoint was deleted.

        Raises:
            FinetuneNotFound: The finetune does not exist.
            FinetuneStoreError: The file is missing or damaged.
        """
        with self._writing:
            step = self._row(finetune_id)["state_step"]
            return None if step is None else (step, read_tensors(state_file(self.root, finetune_id, step)))

    def last_step(self, finetune_id: str) -> LastStep | None:
        """Return digest and reply of the last committed step, or None before the first.

        Args:
            finetune_id: ID of the finetune.

        Raises:
            FinetuneNotFound: The finetune does not exist.
        """
        self._row(finetune_id)
        rows = self._database.read("SELECT * FROM last_steps WHERE finetune_id = ?", finetune_id)
        return (
            LastStep(rows[0]["digest"], json.loads(rows[0]["reply"]), bool(rows[0]["acknowledged"])) if rows else None
        )

    def acknowledge(self, finetune_id: str) -> None:
        """Mark the last committed step as acknowledged: the client has received its reply.

        Args:
            finetune_id: ID of the finetune.

        Raises:
            FinetuneNotFound: The finetune does not exist.
            FinetuneStoreError: The disk is full or damaged.
        """
        self._row(finetune_id)
        with self._database.transaction() as connection:
            connection.execute("UPDATE last_steps SET acknowledged = 1 WHERE finetune_id = ?", (finetune_id,))

    def check_resumable(self, finetune_id: str) -> None:
        """Check that training can continue.

        Args:
            finetune_id: ID of the finetune.

        Raises:
            FinetuneNotFound: The finetune does not exist.
            FinetuneGone: Its latest checkpoint was deleted.
        """
        if not self.get(finetune_id).resumable:
            raise FinetuneGone(
                f"the latest checkpoint of the finetune {finetune_id} was deleted, so its training cannot resume; "
                "create another finetune"
            )

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, finetune_id: str, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> CheckpointRecord:
        """Save the adapter of a step. Has no effect if the checkpoint of this step is saved.

        Args:
            finetune_id: ID of the finetune.
            step: Number of the step, at most that of the last committed one.
            tensors: Tensors of the adapter.
            metadata: Strings for the header of the file.

        Raises:
            ValueError: The step is greater than the last one, or the tensors or metadata cannot be stored.
            FinetuneNotFound: The finetune does not exist.
            FinetuneGone: The checkpoint of this step, or the latest one, was deleted.
            FinetuneStoreError: The disk is full or damaged; no checkpoint is saved.
        """
        step, content = check_step(step), encode_tensors(tensors, metadata)
        with self._writing:
            with contextlib.suppress(FinetuneNotFound):
                return self.get_checkpoint(finetune_id, step)
            self.check_resumable(finetune_id)
            last = self.get(finetune_id).step
            if step > last:
                raise ValueError(f"step must be at most {last}, the last step of {finetune_id}, got {step}")
            now = now_ms()
            with self._new_file(checkpoint_file(self.root, finetune_id, step), content) as connection:
                connection.execute(
                    "INSERT INTO checkpoints (finetune_id, step, created_at_ms) VALUES (?, ?, ?)",
                    (finetune_id, step, now),
                )
                connection.execute("UPDATE finetunes SET updated_at_ms = ? WHERE id = ?", (now, finetune_id))
            return CheckpointRecord(finetune_id, step, now)

    def get_checkpoint(self, finetune_id: str, step: int) -> CheckpointRecord:
        """Return the metadata of a saved checkpoint.

        Args:
            finetune_id: ID of the finetune.
            step: Step of the checkpoint.

        Raises:
            ValueError: The step is not an integer of at least 0.
            FinetuneNotFound: The finetune does not exist, or has never saved this checkpoint.
            FinetuneGone: The checkpoint was deleted.
        """
        self._row(finetune_id)
        statement = "SELECT * FROM checkpoints WHERE finetune_id = ? AND step = ?"
        rows = self._database.read(statement, finetune_id, check_step(step))
        if not rows:
            raise FinetuneNotFound(
                f"the finetune {finetune_id} has no checkpoint of step {step}; list its checkpoints for the saved steps"
            )
        if rows[0]["deleted"]:
            raise FinetuneGone(
                f"the checkpoint of step {step} of the finetune {finetune_id} was deleted; list its checkpoints for "
                "the saved steps"
            )
        return checkpoint_record(rows[0])

    def list_checkpoints(
        self, finetune_id: str, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[CheckpointRecord], str | None]:
        """Return a page of the saved checkpoints, newest first.

        Args:
            finetune_id: ID of the finetune.
            limit: Maximum number of entries, 1 to 100.
            cursor: Cursor of the page, None for the first. It stays valid when checkpoints are saved or deleted.

        Returns:
            The checkpoints, and the cursor of the next page or None after the last.

        Raises:
            ValueError: The limit or the cursor is invalid.
            FinetuneNotFound: The finetune does not exist.
        """
        self._row(finetune_id)
        limit = check_limit(limit)
        before = MAX_STEP + 1 if cursor is None else int(decode_cursor("steps", cursor, _STEP_KEY))
        statement = (
            "SELECT * FROM checkpoints WHERE finetune_id = ? AND deleted = 0 AND step < ? ORDER BY step DESC LIMIT ?"
        )
        records = [checkpoint_record(row) for row in self._database.read(statement, finetune_id, before, limit + 1)]
        page, more = records[:limit], len(records) > limit
        return page, encode_cursor("steps", str(page[-1].step)) if more else None

    def saved_steps(self, finetune_id: str) -> list[int]:
        """Return the steps of all saved checkpoints, latest first.

        Args:
            finetune_id: ID of the finetune.

        Raises:
            FinetuneNotFound: The finetune does not exist.
        """
        self._row(finetune_id)
        statement = "SELECT step FROM checkpoints WHERE finetune_id = ? AND deleted = 0 ORDER BY step DESC"
        return [row["step"] for row in self._database.read(statement, finetune_id)]

    def delete_checkpoint(self, finetune_id: str, step: int) -> None:
        """Delete a saved checkpoint. If it is the latest one, the training state is deleted too.

        Args:
            finetune_id: ID of the finetune.
            step: Step of the checkpoint.

        Raises:
            ValueError: The step is not an integer of at least 0.
            FinetuneNotFound: The finetune does not exist, or has never saved this checkpoint.
            FinetuneGone: The checkpoint was deleted before.
            FinetuneStoreError: The disk is full or damaged.
        """
        with self._writing:
            step = self.get_checkpoint(finetune_id, step).step
            latest = self.saved_steps(finetune_id)[0]
            with self._database.transaction() as connection:
                connection.execute(
                    "UPDATE checkpoints SET deleted = 1 WHERE finetune_id = ? AND step = ?", (finetune_id, step)
                )
                connection.execute("UPDATE finetunes SET updated_at_ms = ? WHERE id = ?", (now_ms(), finetune_id))
                if step == latest:
                    connection.execute(
                        "UPDATE finetunes SET resumable = 0, state_step = NULL WHERE id = ?", (finetune_id,)
                    )
            remove_file(checkpoint_file(self.root, finetune_id, step))
            if step == latest:
                self._remove_states(finetune_id, keep=None)

    # --- Metrics -----------------------------------------------------------------------------------------------------

    def log_metrics(self, finetune_id: str, step: int, metrics: Mapping[str, float]) -> int:
        """Store metrics of a step. A metric with the same step and name is replaced.

        Args:
            finetune_id: ID of the finetune.
            step: Step that the metrics belong to.
            metrics: Finite numbers by name.

        Returns:
            The number of metrics.

        Raises:
            ValueError: The step, a name or a value is invalid.
            FinetuneNotFound: The finetune does not exist.
            FinetuneStoreError: The disk is full or damaged; no metric is stored.
        """
        step = check_step(step)
        rows = [(finetune_id, step, name, check_metric(name, value)) for name, value in metrics.items()]
        with self._database.transaction() as connection:
            self._row(finetune_id)
            connection.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows)
        return len(rows)

    def metrics(self, finetune_id: str) -> dict[int, dict[str, float]]:
        """Return all metrics of a finetune.

        Args:
            finetune_id: ID of the finetune.

        Returns:
            Values by name, by step in ascending order.

        Raises:
            FinetuneNotFound: The finetune does not exist.
        """
        self._row(finetune_id)
        statement = "SELECT step, name, value FROM metrics WHERE finetune_id = ? ORDER BY step, name"
        found: dict[int, dict[str, float]] = {}
        for step, name, value in self._database.read(statement, finetune_id):
            found.setdefault(step, {})[name] = value
        return found

    # --- Files -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _new_file(self, path: Path, content: bytes) -> Iterator[sqlite3.Connection]:
        """Write a file, then commit the statements of the body, which refer to it."""
        with storage_errors(self.root):
            write_file(path, content)
        try:
            with self._database.transaction() as connection:
                yield connection
        except FinetuneStoreError as error:
            # After other errors, such as a failed sync, SQLite may recover the commit when the store is opened again.
            if error.__cause__ is not None and is_disk_full(error.__cause__):
                remove_file(path)
            raise

    def _remove_states(self, finetune_id: str, keep: Path | None) -> None:
        for path in store_files(finetune_folder(self.root, finetune_id)):
            if path != keep and state_step(path.name.removesuffix(PART_SUFFIX)) is not None:
                remove_file(path)

    def _row(self, finetune_id: str) -> sqlite3.Row:
        rows = self._database.read("SELECT * FROM finetunes WHERE id = ? AND deleted = 0", finetune_id)
        if not rows:
            raise FinetuneNotFound(
                f"there is no finetune {finetune_id!r:.100} in {self.root}; list the finetunes, or create one"
            )
        return rows[0]


def _lock_process(root: Path) -> FileLock:
    lock = FileLock(root / LOCK, thread_local=False)  # another thread may close the store
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FinetuneStoreLocked(
            f"the finetunes in {root} are in use by another process; stop it, or use another folder"
        ) from None
    return lock
