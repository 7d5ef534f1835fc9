"""The methods of the tuning API in the thread or process of an engine."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moondream_cv.requests import Request

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.engine.sequence_state import Job


@dataclass(frozen=True)
class TuningTarget:
    """Opens the finetunes of a folder.

    Attributes:
        root: Folder of the finetunes.
    """

    root: Path

    def open(self, model: LocalModel) -> TuningWorker:
        """Open the folder, which is locked until the worker is closed.

        Raises:
            FinetuneStoreLocked: Another process uses the folder.
            FinetuneStoreError: The folder cannot be read or written.
        """
        return TuningWorker(model, self.root)


class TuningWorker:
    """Runs the methods of the tuning API. Arguments and results are values of JSON, except for images."""

    def __init__(self, model: LocalModel, root: Path) -> None:
        """Open the finetunes of a folder.

        Args:
            model: Model that samples rollouts and is trained.
            root: Folder of the finetunes.
        """
        # Imported with the first request to the tuning API, because serving alone does not need it
        from moondream_cv.finetune.service import TuningService
        from moondream_cv.finetune.store import FinetuneStore

        self._model, self._store = model, FinetuneStore(root)
        try:
            self._service = TuningService(model, self._store, model.name)
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Let other processes use the folder."""
        self._service.close()
        self._store.close()

    # --- Finetunes ----------------------------------------------------------------------------------------------------

    def create(self, name: str, rank: int) -> dict[str, Any]:
        """Create a finetune, or return the existing one."""
        return asdict(self._service.create(name, rank))

    def get(self, finetune_id: str) -> dict[str, Any]:
        """Return the metadata of a finetune."""
        return {"finetune": asdict(self._store.get(finetune_id))}

    def list_finetunes(self, limit: int, cursor: str | None) -> dict[str, Any]:
        """Return a page of the finetunes."""
        found, following = self._store.list_finetunes(limit, cursor)
        return {"finetunes": [asdict(record) for record in found], **_page(following)}

    def delete(self, finetune_id: str) -> dict[str, Any]:
        """Delete a finetune, and drop its checkpoints from memory."""
        self._service.delete(finetune_id)
        return {"ok": True}

    def log_metrics(self, finetune_id: str, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Store metrics of a step."""
        return {"ok": True, "step": step, "logged_count": self._store.log_metrics(finetune_id, step, metrics)}

    # --- Rollouts and training ----------------------------------------------------------------------------------------

    def rollouts(
        self, finetune_id: str, request: Mapping[str, Any], num_rollouts: int, ground_truth: Mapping[str, Any] | None
    ) -> Generator[Sequence[Request], Sequence[Job], dict[str, Any]]:
        """Sample replies. This is a generator, as in `operations.py`."""
        started = self._service.start_rollouts(finetune_id, request, num_rollouts, ground_truth)
        try:
            jobs = yield started.requests
        except GeneratorExit:
            self._service.abandon_rollouts(started)
            raise
        return self._service.finish_rollouts(started, jobs)

    def train_step(self, finetune_id: str, groups: Sequence[Mapping[str, Any]], lr: float) -> dict[str, Any]:
        """Train on groups once, unless this step was applied and not acknowledged.

        Raises:
            ValueError: An argument is invalid, or the device has too little memory for the step.
        """
        from moondream_cv.engine.memory import free_after, is_out_of_memory

        try:
            return self._service.train_step(finetune_id, groups, lr)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_after(error, self._model.device)
            raise ValueError(
                f"out of memory on {self._model.device}: send fewer groups, fewer rollouts or shorter replies"
            ) from None

    def acknowledge(self, finetune_id: str, step: int) -> None:
        """Mark a step as acknowledged, unless another one was committed since then."""
        last = self._store.last_step(finetune_id)
        if last is not None and last.reply["step"] == step:
            self._store.acknowledge(finetune_id)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, finetune_id: str) -> dict[str, Any]:
        """Save the adapter of the current step."""
        return {"ok": True, "checkpoint": asdict(self._service.save_checkpoint(finetune_id))}

    def list_checkpoints(self, finetune_id: str, limit: int, cursor: str | None) -> dict[str, Any]:
        """Return a page of the saved checkpoints."""
        found, following = self._store.list_checkpoints(finetune_id, limit, cursor)
        return {"checkpoints": [asdict(record) for record in found], **_page(following)}

    def check_checkpoint(self, finetune_id: str, step: int) -> None:
        """Check that a checkpoint is saved."""
        self._store.get_checkpoint(finetune_id, step)

    def delete_checkpoint(self, finetune_id: str, step: int) -> dict[str, Any]:
        """Delete a checkpoint, also from memory."""
        self._service.delete_checkpoint(finetune_id, step)
        return {"ok": True}


def _page(next_cursor: str | None) -> dict[str, Any]:
    return {"next_cursor": next_cursor, "has_more": next_cursor is not None}
