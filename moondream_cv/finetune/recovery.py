"""Recovery of a folder with finetunes when it is opened, after a crash at any point of an earlier process."""

from __future__ import annotations

import logging
from pathlib import Path

from moondream_cv.durable_files import PART_SUFFIX, remove_file, remove_folder
from moondream_cv.finetune.database import Database
from moondream_cv.finetune.errors import FinetuneStoreError
from moondream_cv.finetune.layout import (
    DATABASE,
    checkpoint_file,
    checkpoint_step,
    finetune_folder,
    is_finetune_id,
    state_file,
    state_step,
)
from moondream_cv.finetune.stored_files import storage_errors

logger = logging.getLogger(__name__)


def check_database_exists(root: Path) -> None:
    """Check that no finetunes are left without their database: a new database would make orphans of their files.

    Args:
        root: Folder of all finetunes.

    Raises:
        FinetuneStoreError: The database is missing, or the folder cannot be read.
    """
    with storage_errors(root):
        folders = [path.name for path in root.iterdir() if is_finetune_id(path.name) and path.is_dir()]
    if folders and not (root / DATABASE).exists():
        raise FinetuneStoreError(
            f"{root / DATABASE} is missing, but {root} contains {len(folders)} finetunes, such as {folders[0]}; "
            "restore the database from a backup, or move the folders away"
        )


def recover(root: Path, database: Database) -> None:
    """Finish interrupted deletions, remove orphans and log missing files.

    Args:
        root: Folder of all finetunes.
        database: Its database.

    Raises:
        FinetuneStoreError: The folder or the database cannot be read or written.
    """
    # Finish deletions
    for row in database.read("SELECT id FROM finetunes WHERE deleted = 1"):
        if remove_folder(finetune_folder(root, row["id"])):
            with database.transaction() as connection:
                connection.execute("DELETE FROM finetunes WHERE id = ?", (row["id"],))

    # Remove orphans
    rows = database.read("SELECT id, state_step FROM finetunes WHERE deleted = 0")
    expected = {state_file(root, row["id"], row["state_step"]) for row in rows if row["state_step"] is not None}
    for row in database.read(
        "SELECT c.finetune_id, c.step FROM checkpoints c JOIN finetunes f ON f.id = c.finetune_id "
        "WHERE c.deleted = 0 AND f.deleted = 0"
    ):
        expected.add(checkpoint_file(root, row["finetune_id"], row["step"]))
    with storage_errors(root):
        for row in rows:
            for path in store_files(finetune_folder(root, row["id"])):
                if path not in expected:
                    remove_file(path)

        # Log files and rows that are missing
        for path in sorted(expected):
            if not path.is_file():
                logger.warning("%s is missing; restore it from a backup, or delete the finetune or checkpoint", path)
        known = {row["id"] for row in database.read("SELECT id FROM finetunes")}
        for path in root.iterdir():
            if is_finetune_id(path.name) and path.name not in known:
                logger.warning("%s does not belong to a finetune in %s; move it away", path, DATABASE)


def store_files(folder: Path) -> list[Path]:
    """Return the files of a finetune with names of the store: states, checkpoints, and incomplete ones of both.

    Args:
        folder: Folder of the finetune; it may not exist.
    """
    named = ((folder, state_step), (folder / "checkpoints", checkpoint_step))
    return [
        path
        for place, step in named
        if place.is_dir()
        for path in place.iterdir()
        if step(path.name.removesuffix(PART_SUFFIX)) is not None
    ]
