"""Names and files of the saved checkpoints that requests can select instead of the model of the server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moondream_cv.finetune.layout import checkpoint_file, checkpoint_step, is_finetune_id
from moondream_cv.model.variants import FINETUNE_MODELS

MAX_LISTED = 100
_NAME = re.compile(r"(?:(.+)/)?([0-9A-Za-z]{26})@(0|[1-9][0-9]{0,14})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a finetune, which may not be saved.

    Attributes:
        finetune_id: ID of the finetune, 26 letters and digits.
        step: Train step of the checkpoint.
    """

    finetune_id: str
    step: int

    @property
    def variant(self) -> str:
        """Value of `Settings.variant`."""
        return f"{self.finetune_id}@{self.step}"

    def file(self, root: Path) -> Path:
        """Return the file of the checkpoint. It exists if and only if the checkpoint is saved.

        Args:
            root: Folder of the finetunes.
        """
        return checkpoint_file(root, self.finetune_id, self.step)


def parse_checkpoint(name: str, served: str | None = None) -> Checkpoint | None:
    """Return the checkpoint that a model name selects, or None for a name of another form.

    Args:
        name: "ID@STEP" or "MODEL/ID@STEP" with a finetune ID. MODEL is `served`, moondream2 or moondream3-preview; the
            hosted client always sends the last one.
        served: Model name of the server; None: MODEL is one of the other two.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in {None, served, *FINETUNE_MODELS}:
        return None
    return Checkpoint(match[2], int(match[3]))


def list_checkpoints(root: Path) -> list[tuple[Checkpoint, float]]:
    """Return the saved checkpoints with the times of saving in seconds since 1970: the 100 newest, newest first.

    Args:
        root: Folder of the finetunes, which may not exist.
    """
    found = []
    for file in root.glob("*/checkpoints/*.safetensors"):
        finetune_id, step = file.parent.parent.name, checkpoint_step(file.name)
        if is_finetune_id(finetune_id) and step is not None:
            try:
                found.append((Checkpoint(finetune_id, step), file.stat().st_mtime))
            except FileNotFoundError:
                continue  # deleted in the meantime
    return sorted(found, key=lambda one: (one[1], one[0].step), reverse=True)[:MAX_LISTED]
