"""`ft(...)`: fine-tune a local model with the methods of the hosted tuning client."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moondream_cv.arguments import check_integer
from moondream_cv.finetune.layout import checkpoint_file
from moondream_cv.finetune.records import CheckpointRecord, FinetuneRecord, check_name, check_rank
from moondream_cv.finetune.service import DEFAULT_LR, StartedRollouts, TuningService, check_base_model
from moondream_cv.finetune.store import FinetuneStore
from moondream_cv.model.variants import finetunes_root

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel

_lock = threading.Lock()
_stores: dict[Path, tuple[FinetuneStore, int]] = {}  # open stores of this process, with their numbers of users


def ft(
    name: str | None = None,
    rank: int | None = None,
    *,
    finetune_id: str | None = None,
    model: str | os.PathLike[str] | LocalModel = "moondream2",
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Finetune:
    """Create a finetune, or continue an existing one.

    Args:
        name: 1 to 64 letters, digits, '.', '-' and '_'. The finetune with this name and rank is continued if it exists.
        rank: Rank of the adapter: 8, 16, 24 or 32.
        finetune_id: ID of an existing finetune, instead of name and rank.
        model: Name of the base model as in `load`, or a loaded model.
        root: Folder of the finetunes, which one process can use at a time; None: `MOONDREAM_CV_FINETUNES`, or a folder
            in the data folder of the user.
        seed: Seed of a new finetune. On a CPU, equal calls with equal seeds have equal results.

    Returns:
        The finetune. Close it, or use it in a `with` statement, to let other processes use the folder.

    Raises:
        ValueError: Neither `finetune_id` nor both `name` and `rank` are given, or an argument is invalid.
        FinetuneConflict: The finetune with this name or ID has another rank or another base model.
        FinetuneNotFound: There is no finetune with this ID.
        FinetuneStoreLocked: Another process uses the folder.
        CheckpointError: The base model cannot be loaded.
    """
    from moondream_cv.loading import load

    # Check the arguments
    if finetune_id is not None and (name is not None or rank is not None):
        raise ValueError(f"finetune_id cannot be combined with name or rank, got name={name!r} and rank={rank!r}")
    if finetune_id is None and (name is None or rank is None):
        raise ValueError(f"ft needs either finetune_id or both name and rank, got name={name!r} and rank={rank!r}")
    check_integer("seed", seed, 0)

    if finetune_id is None:
        check_name(name), check_rank(rank)

    # Open the store and the model, before a finetune is created for it
    model_name = os.fspath(model) if isinstance(model, str | os.PathLike) else model.name
    folder = Path(root).expanduser().absolute() if root is not None else finetunes_root().absolute()
    store = _open_store(folder)
    with contextlib.ExitStack() as opened:
        opened.callback(_close_store, store)
        if finetune_id is not None:
            check_base_model(store.get(finetune_id), model_name)
        loaded = load(model) if isinstance(model, str | os.PathLike) else model
        if loaded is not model:
            opened.callback(loaded.close)
        if finetune_id is not None:
            record = store.get(finetune_id)
        else:
            assert name is not None
            assert rank is not None
            record = store.create(name, rank, model_name, seed)
        service = TuningService(loaded, store, model_name)
        opened.pop_all()
    return Finetune(service, record, owns_model=loaded is not model)


class Finetune:
    """A finetune on this machine, with the properties, methods and results of the hosted client.

    Attributes:
        service: Operations on the model and the store of the finetune.
    """

    def __init__(self, service: TuningService, record: FinetuneRecord, owns_model: bool = False) -> None:
        """Wrap a finetune; `ft` creates it.

        Args:
            service: Operations on the model and the store.
            record: Metadata of the finetune.
            owns_model: Whether `close` closes the model.
        """
        self.service, self._record, self._owns_model = service, record, owns_model
        self._closed = False

    def __repr__(self) -> str:
        return f"Finetune({self.finetune_id!r}, name={self.name!r}, rank={self.rank})"

    def __enter__(self) -> Finetune:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finetune_id(self) -> str:
        """ID of the finetune."""
        return self._record.finetune_id

    @property
    def name(self) -> str:
        """Name of the finetune."""
        return self._record.name

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self._record.rank

    def rollouts(
        self,
        skill: str,
        *,
        image: Any = None,
        question: str | None = None,
        object: str | None = None,
        num_rollouts: int = 1,
        settings: Mapping[str, Any] | None = None,
        reasoning: bool = False,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        ground_truth: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sample replies to a request under the current adapter.

        Args:
            skill: "query", "point" or "detect".
            image: Any image that `load(...).detect` accepts, or a {"image_url": data URI} of the hosted client.
            question: Question of a query.
            object: Class name of the objects to point at or to detect.
            num_rollouts: Number of replies, 1 to 16.
            settings: "temperature" (default 1.0), "top_p" (1.0), "max_tokens" of a query (128, or 256 with reasoning),
                "max_objects" of the other skills (50).
            reasoning: Generate reasoning before the answer.
            spatial_refs: Points and boxes that the question refers to, as fractions.
            ground_truth: {"points"} or {"boxes"} as fractions, for rewards of point and detect.

        Returns:
            {"request", "rollouts", "rewards"}; "rewards" is None without ground truth. "request" has the image, so that
            it can be a part of a group of `train_step`.

        Raises:
            ValueError: An argument is invalid.
            ImageError: The image cannot be read.
            FinetuneGone: The latest checkpoint was deleted.
        """
        request = {
            "skill": skill,
            "image": image,
            "question": question,
            "object": object,
            "settings": settings,
            "reasoning": reasoning or None,
            "spatial_refs": spatial_refs,
        }
        given = {key: value for key, value in request.items() if value is not None}
        response: dict[str, Any] = self.service.rollouts(self.finetune_id, given, num_rollouts, ground_truth)
        return _with_image(response, image)

    def rollout_stream(
        self,
        requests: Iterable[tuple[Any, Mapping[str, Any]]],
        *,
        max_concurrency: int = 4,
        buffer_size: int = 8,
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Sample replies to several requests at the same time, in one batch of the engine.

        Rollouts of requests that have started keep their adapter if `train_step` is called between two results.

        Args:
            requests: Pairs of a context, which is returned unchanged, and the arguments of `rollouts`.
            max_concurrency: Maximum number of requests that decode at the same time.
            buffer_size: As in the hosted client. At most `max_concurrency` results wait for the caller, so it has no
                effect.

        Yields:
            Pairs of the context and the result of `rollouts`, in the order of completion.

        Raises:
            ValueError: An argument is invalid.
            Exception: The iterable or a request failed; its error.
        """
        check_integer("max_concurrency", max_concurrency)
        check_integer("buffer_size", buffer_size)
        return self._stream(iter(requests), max_concurrency)

    def _stream(
        self, requests: Iterator[tuple[Any, Mapping[str, Any]]], max_concurrency: int
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        scheduler = self.service.model.scheduler()
        running: list[tuple[Any, Any, StartedRollouts, list[Any]]] = []
        has_more = True
        try:
            while has_more or running:
                # Start requests
                while has_more and len(running) < max_concurrency:
                    try:
                        context, arguments = next(requests)
                    except StopIteration:
                        has_more = False
                        break
                    started, image = self._start(arguments)
                    running.append((context, image, started, [scheduler.submit(one) for one in started.requests]))

                # Decode, and return the requests that are complete
                scheduler.step()
                scheduler.results()
                for entry in [entry for entry in running if all(job.done for job in entry[3])]:
                    running.remove(entry)
                    context, image, started, jobs = entry
                    yield context, _with_image(self.service.finish_rollouts(started, jobs), image)
        finally:
            for _, _, started, _ in running:
                self.service.abandon_rollouts(started)

    def _start(self, arguments: Mapping[str, Any]) -> tuple[StartedRollouts, Any]:
        given = {key: value for key, value in arguments.items() if value is not None}
        num_rollouts, ground_truth = given.pop("num_rollouts", 1), given.pop("ground_truth", None)
        return self.service.start_rollouts(self.finetune_id, given, num_rollouts, ground_truth), given.get("image")

    def train_step(self, groups: Sequence[Mapping[str, Any]], lr: float = DEFAULT_LR, **options: Any) -> dict[str, Any]:
        """Train the adapter on groups once.

        Args:
            groups: 1 to 64 of {"mode": "rl", "request", "rollouts", "rewards"} with rollouts of this finetune, and
                {"mode": "sft", "request", "target"} with a target {"answer", "reasoning"?}, {"points"} or {"boxes"}.
            lr: Learning rate.
            options: Further fields of the hosted API; they have no effect.

        Returns:
            {"step", "applied", "kl", "router_kl", "grad_norm", "reward_mean", "reward_std", "sft_loss"}. If the
            gradient is zero or not finite, "applied" is False and the adapter is unchanged.

        Raises:
            ValueError: An argument is invalid, or a rollout was not returned by this finetune.
            ImageError: An image cannot be read.
            FinetuneGone: The latest checkpoint was deleted.
            FinetuneStoreError: The disk is full; the step is not applied.
        """
        reply = self.service.train_step(self.finetune_id, groups, lr)
        self.service.store.acknowledge(self.finetune_id)
        return reply

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Store metrics of a step.

        Args:
            step: Training step.
            metrics: Finite numbers by name.

        Returns:
            {"ok", "step", "logged_count"}.

        Raises:
            ValueError: The step is negative, or a metric is not a finite number.
        """
        count = self.service.store.log_metrics(self.finetune_id, step, metrics)
        return {"ok": True, "step": step, "logged_count": count}

    def save_checkpoint(self) -> dict[str, Any]:
        """Save the adapter of the current step, so that it can serve inference.

        Returns:
            {"ok", "checkpoint": {"finetune_id", "step", "created_at_ms"}}.
        """
        return {"ok": True, "checkpoint": checkpoint_dict(self.service.save_checkpoint(self.finetune_id))}

    def list_checkpoints(self, limit: int = 50, cursor: str | None = None) -> dict[str, Any]:
        """List the saved checkpoints, newest first.

        Args:
            limit: Maximum number of checkpoints, 1 to 100.
            cursor: "next_cursor" of the previous page.

        Returns:
            {"checkpoints", "next_cursor", "has_more"}.
        """
        found, following = self.service.store.list_checkpoints(self.finetune_id, limit, cursor)
        return {
            "checkpoints": [checkpoint_dict(one) for one in found],
            "next_cursor": following,
            "has_more": following is not None,
        }

    def delete_checkpoint(self, step: int) -> None:
        """Delete a checkpoint. Without its latest checkpoint, the finetune cannot be trained further.

        Args:
            step: Training step of the checkpoint.
        """
        self.service.delete_checkpoint(self.finetune_id, step)

    def delete(self) -> None:
        """Delete the finetune with all its checkpoints."""
        self.service.delete(self.finetune_id)

    def model(self, step: int) -> str:
        """Return the name of a checkpoint, for the field `model` of servers.

        Args:
            step: Training step of the checkpoint.
        """
        return f"moondream2/{self.finetune_id}@{step}"

    def checkpoint(self, step: int) -> Path:
        """Return the file of a saved checkpoint, for `load(..., adapter=path)`.

        Args:
            step: Training step of the checkpoint.

        Raises:
            FinetuneNotFound: The checkpoint was not saved.
            FinetuneGone: The checkpoint was deleted.
        """
        self.service.store.get_checkpoint(self.finetune_id, step)
        return checkpoint_file(self.service.store.root, self.finetune_id, step)

    def close(self) -> None:
        """Close the store, and the model if `ft` loaded it. A second call has no effect."""
        if self._closed:
            return
        self._closed = True
        self.service.close()
        _close_store(self.service.store)
        if self._owns_model:
            self.service.model.close()


def checkpoint_dict(record: CheckpointRecord) -> dict[str, Any]:
    """Return a checkpoint as the tuning API does."""
    return {"finetune_id": record.finetune_id, "step": record.step, "created_at_ms": record.created_at_ms}


def _with_image(response: dict[str, Any], image: Any) -> dict[str, Any]:
    """Add the image to the request of a response."""
    return response if image is None else {**response, "request": {**response["request"], "image": image}}


def _open_store(root: Path) -> FinetuneStore:
    """Return the store of a folder, which all users in this process share."""
    with _lock:
        store, users = _stores.get(root, (None, 0))
        if store is None:
            store = FinetuneStore(root)
        _stores[root] = store, users + 1
        return store


def _close_store(store: FinetuneStore) -> None:
    with _lock:
        _, users = _stores[store.root]
        if users > 1:
            _stores[store.root] = store, users - 1
            return
        del _stores[store.root]
        store.close()
