"""Names and places of the files of finetunes.

    ROOT/finetunes.sqlite                               metadata
    ROOT/signing.key                                    key for the signatures of rollouts
    ROOT/finetunes.lock                                 locked by the process that uses the folder
    ROOT/FINETUNE_ID/state-STEP.safetensors             training state after the last committed step
    ROOT/FINETUNE_ID/checkpoints/STEP.safetensors       adapter of each saved checkpoint

`store.py` reads and writes these files. Inference only needs the path of a checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path

from moondream_cv.arguments import check_integer

DATABASE = "finetunes.sqlite"
LOCK = "finetunes.lock"
SIGNING_KEY = "signing.key"
FINETUNE_ID = re.compile(r"[0-9A-Za-z]{26}")
MAX_STEP = 2**53 - 1  # JSON numbers are exact up to here
_NUMBER = r"(0|[1-9][0-9]{0,15})"
_STATE = re.compile(rf"state-{_NUMBER}\.safetensors")
_CHECKPOINT = re.compile(rf"{_NUMBER}\.safetensors")


def is_finetune_id(value: object) -> bool:
    """Return whether a value has the form of a finetune ID: 26 letters and digits."""
    return isinstance(value, str) and FINETUNE_ID.fullmatch(value) is not None


def finetune_folder(root: Path, finetune_id: str) -> Path:
    """Return the folder of a finetune.

    Args:
        root: Folder of all finetunes.
        finetune_id: ID of the finetune.

    Raises:
        ValueError: The ID does not consist of 26 letters and digits.
    """
    if not is_finetune_id(finetune_id):
        raise ValueError(f"a finetune ID must have 26 letters and digits, got {finetune_id!r:.100}")
    return root / finetune_id


def checkpoint_file(root: Path, finetune_id: str, step: int) -> Path:
    """Return the file of a checkpoint. It exists if and only if the checkpoint is saved.

    Args:
        root: Folder of all finetunes, such as `model.variants.finetunes_root()`.
        finetune_id: ID of the finetune.
        step: Train step of the checkpoint.

    Raises:
        ValueError: The ID is malformed, or the step is not an integer of at least 0.
    """
    return finetune_folder(root, finetune_id) / "checkpoints" / f"{check_step(step)}.safetensors"


def state_file(root: Path, finetune_id: str, step: int) -> Path:
    """Return the file of the training state after a step.

    Args:
        root: Folder of all finetunes.
        finetune_id: ID of the finetune.
        step: Train step.

    Raises:
        ValueError: The ID is malformed, or the step is not an integer of at least 0.
    """
    return finetune_folder(root, finetune_id) / f"state-{check_step(step)}.safetensors"


def check_step(step: object) -> int:
    """Return the number of a train step.

    Args:
        step: Value to check.

    Raises:
        ValueError: The step is not an integer between 0 and `MAX_STEP`.
    """
    return check_integer("step", step, 0, MAX_STEP)


def state_step(name: str) -> int | None:
    """Return the step in the name of a state file, or None for other names.

    Args:
        name: Name of a file, without its folder.
    """
    match = _STATE.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint file, or None for other names.

    Args:
        name: Name of a file, without its folder.
    """
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None
