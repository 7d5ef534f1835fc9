"""The SQLite database with the metadata of finetunes: schema, transactions and reads.

`store.py` contains the statements. All methods can be called from several threads.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moondream_cv.finetune.errors import FinetuneStoreError
from moondream_cv.finetune.stored_files import storage_errors

VERSION = 1  # version of the schema
_SCHEMA = """
CREATE TABLE finetunes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    rank INTEGER NOT NULL,
    model TEXT NOT NULL,
    seed INTEGER NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    state_step INTEGER,                     -- NULL: no training state is stored
    resumable INTEGER NOT NULL DEFAULT 1,
    deleted INTEGER NOT NULL DEFAULT 0,     -- 1: its folder is being removed
    created_at_ms INTEGER NOT NULL,
    updated_at_ms INTEGER NOT NULL
);
CREATE UNIQUE INDEX finetune_names ON finetunes (name) WHERE deleted = 0;
CREATE TABLE checkpoints (
    finetune_id TEXT NOT NULL REFERENCES finetunes (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    created_at_ms INTEGER NOT NULL,
    PRIMARY KEY (finetune_id, step)
);
CREATE TABLE metrics (
    finetune_id TEXT NOT NULL REFERENCES finetunes (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    name TEXT NOT NULL,
    value REAL NOT NULL,
    PRIMARY KEY (finetune_id, step, name)
);
CREATE TABLE last_steps (
    finetune_id TEXT PRIMARY KEY REFERENCES finetunes (id) ON DELETE CASCADE,
    digest TEXT NOT NULL,
    reply TEXT NOT NULL,                    -- JSON
    acknowledged INTEGER NOT NULL DEFAULT 0
);
"""


class Database:
    """A database file. One process can write it, and others can read it at the same time."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create a database.

        Args:
            path: Path of the file.
            read_only: Open an existing file without changes to it. It may have no tables yet.

        Raises:
            FinetuneStoreError: The file is damaged, was written by a newer version, or cannot be read or written.
        """
        self._path = path
        self._lock = threading.RLock()
        self._is_open = True
        with storage_errors(path.parent):
            uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._connection = sqlite3.connect(uri, isolation_level=None, check_same_thread=False, uri=True)
        try:
            with storage_errors(path.parent):
                self._connection.row_factory = sqlite3.Row
                if not read_only:
                    self._connection.execute("PRAGMA journal_mode = WAL")
                    self._connection.execute("PRAGMA synchronous = FULL")
                    self._connection.execute("PRAGMA foreign_keys = ON")
            self._prepare_schema(read_only)
        except BaseException:
            self.close()
            raise

    def _prepare_schema(self, read_only: bool) -> None:
        """Create the tables, or check that they are readable."""
        (version,) = self.read("PRAGMA user_version")[0]
        if version > VERSION:
            raise FinetuneStoreError(
                f"{self._path} has version {version} of the format, and this moondream-cv supports version {VERSION}; "
                "update moondream-cv"
            )
        if version == 0 and not read_only:
            with self.transaction() as connection:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
        problems = [row[0] for row in self.read("PRAGMA quick_check(1)")]
        if problems != ["ok"]:
            raise FinetuneStoreError(f"{self._path} is damaged: {problems[0]}; restore it from a backup")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run statements that are committed together, or not at all if the body raises.

        Raises:
            FinetuneStoreError: The disk is full, or SQLite failed; its error is the cause.
        """
        with self._lock, storage_errors(self._path.parent):
            self._check_open()
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite has rolled back after some errors
                    self._connection.execute("ROLLBACK")
                raise

    def read(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        """Return the rows of a query.

        Args:
            statement: A `SELECT` or `PRAGMA`.
            values: Values of its placeholders.

        Raises:
            FinetuneStoreError: SQLite failed.
        """
        with self._lock, storage_errors(self._path.parent):
            self._check_open()
            return self._connection.execute(statement, values).fetchall()

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        with self._lock:
            self._is_open = False
            self._connection.close()

    def _check_open(self) -> None:
        if not self._is_open:
            raise FinetuneStoreError(f"the store in {self._path.parent} is closed; open it again")
