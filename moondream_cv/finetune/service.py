"""`TuningService`: all operations of the tuning API on one local model and one store, without HTTP.

Rollouts have two halves, so that a server can run them in its own scheduler: `start_rollouts` returns the requests for
the engine, `finish_rollouts` their rewards and signatures.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moondream_cv.durable_files import write_file
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.sequence_state import Job
from moondream_cv.finetune.errors import FinetuneConflict, FinetuneStoreError
from moondream_cv.finetune.groups import AnswerTarget, ReinforcementItem, SupervisedItem, parse_groups
from moondream_cv.finetune.layout import SIGNING_KEY, checkpoint_file
from moondream_cv.finetune.records import CheckpointRecord, FinetuneRecord
from moondream_cv.finetune.rewards import rewards_for
from moondream_cv.finetune.rollouts import check_length, rollout_of, target_trajectory, trajectory_of
from moondream_cv.finetune.signed_rollouts import sign, verify
from moondream_cv.finetune.store import FinetuneStore
from moondream_cv.finetune.stored_files import storage_errors
from moondream_cv.finetune.training_images import ImageTokens, TrainingImage, read_image
from moondream_cv.finetune.wire import (
    GroundTruth,
    RolloutRequest,
    parse_ground_truth,
    parse_num_rollouts,
    parse_request,
)
from moondream_cv.model.adapters import Adapter
from moondream_cv.model.variants import FINETUNE_MODELS
from moondream_cv.requests import ErrorResult, Request
from moondream_cv.training.fine_tuner import FineTuner, Group, ReinforcementGroup, SupervisedGroup
from moondream_cv.training.lora import LoraParameters

DEFAULT_LR = 2e-4
KEY_BYTES = 32
MAX_TUNERS = 4  # finetunes whose adapter and optimizer are in memory
_service_numbers = itertools.count()


@dataclass(frozen=True)
class StartedRollouts:
    """Rollouts that the engine runs.

    Attributes:
        finetune_id: ID of the finetune.
        request: Checked request.
        requests: Requests for the engine, one per rollout.
        ground_truth: True points or boxes for the rewards; None: no rewards.
        image_digest: Digest of the image's pixels; None without an image.
        embedding: [num_patches, dim] image tokens; None without an image.
        adapter: Adapter that the engine uses. Train steps do not change it.
    """

    finetune_id: str
    request: RolloutRequest
    requests: list[Request]
    ground_truth: GroundTruth | None
    image_digest: bytes | None
    embedding: Tensor | None
    adapter: Adapter


@dataclass
class ActiveTuner:
    """A finetune in memory.

    Attributes:
        tuner: Adapter and optimizer.
        step: Last committed step.
        in_use: Number of unfinished rollout calls by the name of their adapter.
    """

    tuner: FineTuner
    step: int
    in_use: dict[str, int]


class TuningService:
    """Operations of the tuning API. Thread-safe: on one store, they run one after the other.

    Attributes:
        model: Model that samples rollouts and is trained.
        store: Store of the finetunes.
        model_name: Name of the base model in new finetunes.
    """

    def __init__(self, model: LocalModel, store: FinetuneStore, model_name: str) -> None:
        """Create a service.

        Args:
            model: Local model; its weights are not changed.
            store: Store of the finetunes, which the service does not close.
            model_name: Name of the base model in new finetunes.
        """
        self.model, self.store, self.model_name = model, store, model_name
        self._signing_key = _read_key(store.root / SIGNING_KEY)
        self._lock = store.training
        self._number = next(_service_numbers)
        self._tuners: OrderedDict[str, ActiveTuner] = OrderedDict()
        self._image_tokens = ImageTokens(model)
        self._num_started: Counter[str] = Counter()  # calls of `start_rollouts` by finetune, for the seeds

    # --- Finetunes ----------------------------------------------------------------------------------------------------

    def create(self, name: str, rank: int, seed: int = 0) -> FinetuneRecord:
        """Create a finetune, or return the existing one with the same name and rank.

        Args:
            name: 1 to 64 letters, digits, '.', '-' and '_'.
            rank: 8, 16, 24 or 32.
            seed: Seed of the adapter and of sampling.

        Raises:
            ValueError: The name or the rank is invalid.
            FinetuneConflict: The finetune with this name has another rank or another base model.
        """
        return self.store.create(name, rank, self.model_name, seed)

    def delete(self, finetune_id: str) -> None:
        """Delete a finetune with all its checkpoints.

        Raises:
            FinetuneNotFound: The finetune does not exist.
        """
        with self._lock:
            steps = self.store.saved_steps(finetune_id)
            self.store.delete(finetune_id)
            self._forget(finetune_id)
            for step in steps:
                self._drop(finetune_id, step)

    # --- Rollouts -----------------------------------------------------------------------------------------------------

    def rollouts(self, finetune_id: str, request: object, num_rollouts: object = 1, ground_truth: object = None) -> Any:
        """Sample replies and return the response of the API.

        Args:
            finetune_id: ID of the finetune.
            request: Mapping as in `parse_request`.
            num_rollouts: Number of replies, 1 to 16.
            ground_truth: Mapping as in `parse_ground_truth`, for rewards; None: no rewards.

        Returns:
            {"request", "rollouts", "rewards"}; "rewards" is None without ground truth.

        Raises:
            ValueError: An argument is invalid.
            ImageError: The image cannot be read.
            FinetuneNotFound: The finetune does not exist.
            FinetuneGone: Its latest checkpoint was deleted.
        """
        started = self.start_rollouts(finetune_id, request, num_rollouts, ground_truth)
        scheduler = self.model.scheduler()
        jobs = [scheduler.submit(one) for one in started.requests]
        while scheduler.step():
            pass
        return self.finish_rollouts(started, jobs)

    def start_rollouts(
        self, finetune_id: str, request: object, num_rollouts: object = 1, ground_truth: object = None
    ) -> StartedRollouts:
        """Check the arguments of `rollouts`, and return the requests for the engine."""
        # Check the arguments
        parsed, count = parse_request(request), parse_num_rollouts(num_rollouts)
        truth = None if ground_truth is None else parse_ground_truth(ground_truth, parsed.skill)
        image = read_image(parsed.image)

        # Make the current adapter available to the engine
        with self._lock:
            self.store.check_resumable(finetune_id)
            active = self._active(finetune_id)
            name = self._adapter_name(finetune_id, active.step)
            if name not in active.in_use:
                self.model.add_adapter(active.tuner.parameters.detached(name, self.model.dtype))
                active.in_use[name] = 0
            adapter = self.model.get_adapter(name)
            assert adapter is not None
            active.in_use[name] += 1
            self._num_started[finetune_id] += 1
            seed = f"{self.store.get(finetune_id).seed}:{active.step}:{self._num_started[finetune_id]}"

        # Encode the image and create the requests
        try:
            embedding, encoded = None, None
            if image is not None:
                with self._lock:
                    (embedding,) = self._image_tokens.get([image])
                assert embedding is not None
                encoded = self.model.encode_tokens(embedding, image.size, name)
            requests = [self._engine_request(parsed, encoded, name, _seed(f"{seed}:{i}")) for i in range(count)]
        except BaseException:
            self._release(finetune_id, name)
            raise
        return StartedRollouts(finetune_id, parsed, requests, truth, _digest(image), embedding, adapter)

    def abandon_rollouts(self, started: StartedRollouts) -> None:
        """Free what unfinished rollouts use.

        Args:
            started: Result of `start_rollouts`.
        """
        self._release(started.finetune_id, started.adapter.name)

    def finish_rollouts(self, started: StartedRollouts, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the response of the API for finished requests.

        Args:
            started: Result of `start_rollouts`.
            jobs: Its requests in order, all of them finished.

        Raises:
            Exception: A request failed; its error.
        """
        model, temperature = self.model, started.request.settings.temperature
        try:
            for job in jobs:
                if isinstance(job.result, ErrorResult):
                    raise job.result.error
            results = [job.result for job in jobs if job.result is not None]
            rollouts = [rollout_of(job, model.config) for job in jobs]
            trajectories = [
                trajectory_of(job.request, rollout, model.tokenizer, model.config)
                for job, rollout in zip(jobs, rollouts, strict=True)
            ]
            with self._lock:
                tuner = self._active(started.finetune_id).tuner
                log_probs = tuner.log_probs(started.embedding, trajectories, temperature, started.adapter)
        finally:
            self._release(started.finetune_id, started.adapter.name)
        truth = started.ground_truth
        signed = []
        for rollout, values in zip(rollouts, log_probs, strict=True):
            rollout = replace(rollout, log_probs=tuple(values))
            signature = sign(self._signing_key, started.finetune_id, started.request, rollout, started.image_digest)
            signed.append(replace(rollout, signature=signature).to_dict())
        return {
            "request": started.request.to_dict(),
            "rollouts": signed,
            "rewards": None if truth is None else rewards_for(started.request, results, truth),
        }

    # --- Training -----------------------------------------------------------------------------------------------------

    def train_step(self, finetune_id: str, groups: object, lr: object = DEFAULT_LR) -> dict[str, Any]:
        """Train on groups once. A request that was not acknowledged is not applied twice.

        If the last committed step had the same arguments, and `FinetuneStore.acknowledge` was not called since then,
        this is a retry: it returns the reply of that step.

        Args:
            finetune_id: ID of the finetune.
            groups: List as in `parse_groups`.
            lr: Learning rate, above 0 and at most 1.

        Returns:
            {"step", "applied", "kl", "router_kl", "grad_norm", "reward_mean", "reward_std", "sft_loss"}.

        Raises:
            ValueError: An argument is invalid, or a rollout was not returned by this finetune.
            ImageError: An image cannot be read.
            FinetuneNotFound: The finetune does not exist.
            FinetuneGone: Its latest checkpoint was deleted.
            FinetuneStoreError: The disk is full; the step is not applied.
        """
        rate, items = _learning_rate(lr), parse_groups(groups)
        with self._lock:
            self.store.check_resumable(finetune_id)
            images = [read_image(item.request.image) for item in items]
            digests = [_digest(image) for image in images]
            self._verify(finetune_id, items, digests)
            digest = _request_digest(items, digests, rate)
            last = self.store.last_step(finetune_id)
            if last is not None and last.digest == digest and not last.acknowledged:
                return last.reply
            training = [self._group(item, one) for item, one in zip(items, self._image_tokens.get(images), strict=True)]
            return self._train(finetune_id, training, rate, digest)

    def _train(self, finetune_id: str, groups: Sequence[Group], lr: float, digest: str) -> dict[str, Any]:
        """Apply a step and commit it. If it cannot be committed, the finetune continues from the last one."""
        active = self._active(finetune_id)
        try:
            statistics = active.tuner.step(groups, lr)
            step = active.step + statistics.applied
            reply = {"step": step, **asdict(statistics), "router_kl": 0.0}  # the model is dense: it has no router
            if statistics.applied:
                self.store.commit_step(finetune_id, step, active.tuner.state(), digest, reply)
                active.step = step
        except BaseException:
            self._restore(finetune_id)
            raise
        return reply

    def _verify(
        self,
        finetune_id: str,
        items: Sequence[ReinforcementItem | SupervisedItem],
        digests: Sequence[bytes | None],
    ) -> None:
        """Check the signatures of all rollouts."""
        for item, digest in zip(items, digests, strict=True):
            for i, rollout in enumerate(item.rollouts if isinstance(item, ReinforcementItem) else ()):
                path = f"{item.path}.rollouts[{i}]"
                verify(self._signing_key, finetune_id, item.request, rollout, digest, path)

    def _group(self, item: ReinforcementItem | SupervisedItem, embedding: Tensor | None) -> Group:
        """Convert a group for training."""
        model = self.model
        if isinstance(item, ReinforcementItem):
            request = self._engine_request(item.request, item.request.image, None, 0)
            trajectories = [trajectory_of(request, one, model.tokenizer, model.config) for one in item.rollouts]
            log_probs = [one.log_probs for one in item.rollouts]
            return ReinforcementGroup(
                embedding, trajectories, log_probs, item.rewards, item.request.settings.temperature
            )
        target = item.target
        reasoning = isinstance(target, AnswerTarget) and target.reasoning is not None
        request = self._engine_request(replace(item.request, reasoning=reasoning), item.request.image, None, 0)
        trajectory = target_trajectory(request, target, model.tokenizer, model.config)
        return SupervisedGroup(embedding, check_length(trajectory, embedding is not None, model.config, item.path))

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, finetune_id: str) -> CheckpointRecord:
        """Save the adapter of the current step, so that it can serve inference.

        Raises:
            FinetuneNotFound: The finetune does not exist.
            FinetuneGone: Its latest checkpoint was deleted.
            FinetuneStoreError: The disk is full; no checkpoint is saved.
        """
        with self._lock:
            record = self.store.get(finetune_id)
            active = self._active(finetune_id)
            tensors = {name: tensor.detach().cpu() for name, tensor in active.tuner.parameters.tensors.items()}
            metadata = {"format": "pt", "base_model": record.model, "finetune": record.name, "rank": str(record.rank)}
            return self.store.save_checkpoint(finetune_id, active.step, tensors, metadata)

    def delete_checkpoint(self, finetune_id: str, step: int) -> None:
        """Delete a saved checkpoint. Without its latest checkpoint, a finetune cannot be trained further.

        Raises:
            FinetuneNotFound: The finetune or the checkpoint does not exist.
            FinetuneGone: The checkpoint was deleted before.
        """
        with self._lock:
            self.store.delete_checkpoint(finetune_id, step)
            self._drop(finetune_id, step)
            if not self.store.get(finetune_id).resumable:
                self._forget(finetune_id)

    def _drop(self, finetune_id: str, step: int) -> None:
        """Drop the adapter of a deleted checkpoint from the model, under all names that requests have for it."""
        name = f"{finetune_id}@{step}"
        path = str(checkpoint_file(self.store.root, finetune_id, step))
        for one in (path, name, *(f"{model}/{name}" for model in FINETUNE_MODELS)):
            self.model.remove_adapter(one)

    def close(self) -> None:
        """Drop all finetunes from memory. The model and the store stay open."""
        with self._lock:
            for finetune_id in list(self._tuners):
                self._forget(finetune_id)
            self._image_tokens.clear()

    # --- Memory -------------------------------------------------------------------------------------------------------

    def _active(self, finetune_id: str) -> ActiveTuner:
        """Return a finetune in memory, and load it from the store if necessary."""
        active = self._tuners.get(finetune_id)
        if active is None:
            active = self._tuners[finetune_id] = ActiveTuner(*self._load(finetune_id), {})
            self._forget_idle(finetune_id)
        elif active.step != self.store.get(finetune_id).step:  # another service on the store has trained it
            active.tuner, active.step = self._load(finetune_id)
        self._tuners.move_to_end(finetune_id)
        return active

    def _adapter_name(self, finetune_id: str, step: int) -> str:
        """Return the name of the adapter of a step, which no other service on the same model uses."""
        return f"{finetune_id}@live-{self._number}-{step}"

    @torch.inference_mode(False)
    def _load(self, finetune_id: str) -> tuple[FineTuner, int]:
        """Return the tuner of the last committed step, and the step."""
        record, model = self.store.get(finetune_id), self.model
        check_base_model(record, self.model_name)
        parameters = LoraParameters.initialize(model.config, record.rank, record.seed, model.device)
        tuner, state = FineTuner(model.network, parameters), self.store.load_state(finetune_id)
        if state is None:
            return tuner, 0
        step, tensors = state
        try:
            tuner.load_state(tensors)
        except (KeyError, RuntimeError) as error:  # other names or shapes
            raise FinetuneStoreError(
                f"the training state of the finetune {finetune_id} does not fit the base model {record.model!r} "
                f"({error}); use the model it was trained with, or delete the finetune"
            ) from error
        return tuner, step

    def _restore(self, finetune_id: str) -> None:
        """Return to the last committed step. Rollouts that have started keep their adapters."""
        try:
            active = self._active(finetune_id)
            active.tuner, active.step = self._load(finetune_id)
        except Exception:  # the next call loads it again, and raises this error
            self._forget(finetune_id)

    def _forget_idle(self, current: str) -> None:
        """Drop the finetunes that were not used for longest, but none that samples rollouts."""
        idle = [key for key, one in self._tuners.items() if key != current and not any(one.in_use.values())]
        for key in idle[: max(0, len(self._tuners) - MAX_TUNERS)]:
            self._forget(key)

    def _forget(self, finetune_id: str) -> None:
        """Drop a finetune from memory."""
        active = self._tuners.pop(finetune_id, None)
        for name in () if active is None else active.in_use:
            self.model.remove_adapter(name)

    def _release(self, finetune_id: str, adapter_name: str) -> None:
        """Free the adapters of earlier steps that no rollout uses any more."""
        with self._lock:
            active = self._tuners.get(finetune_id)
            if active is None or adapter_name not in active.in_use:
                return
            active.in_use[adapter_name] -= 1
            for name, count in list(active.in_use.items()):
                if not count and name != self._adapter_name(finetune_id, active.step):
                    del active.in_use[name]
                    self.model.remove_adapter(name)

    def _engine_request(self, request: RolloutRequest, image: Any, adapter_name: str | None, seed: int) -> Request:
        made = replace(request, image=image).to_request(seed)
        return replace(made, settings=replace(made.settings, variant=adapter_name))


def check_base_model(record: FinetuneRecord, model_name: str) -> None:
    """Check that a finetune belongs to a base model.

    Args:
        record: Metadata of the finetune.
        model_name: Name of the base model.

    Raises:
        FinetuneConflict: The finetune has another base model.
    """
    if record.model != model_name:
        raise FinetuneConflict(
            f"the finetune {record.finetune_id} has the base model {record.model!r}, got {model_name!r}; use "
            f"{record.model!r}, or create another finetune"
        )


def _digest(image: TrainingImage | None) -> bytes | None:
    return None if image is None else image.digest


def _read_key(path: Path) -> bytes:
    """Return the key for signatures, which is created with the store."""
    if path.is_file():
        key = path.read_bytes()
        if len(key) == KEY_BYTES:
            return key
    key = secrets.token_bytes(KEY_BYTES)
    with storage_errors(path.parent):
        write_file(path, key, mode=0o600)
    return key


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def _learning_rate(value: object) -> float:
    rate = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < rate <= 1:
        raise ValueError(f"lr must be a number above 0 and at most 1, got {value!r:.100}")
    return rate


def _request_digest(
    items: Sequence[ReinforcementItem | SupervisedItem], digests: Sequence[bytes | None], lr: float
) -> str:
    """Return a digest of the arguments of a step, to recognize a retry."""
    content: list[Any] = [lr]
    for item, digest in zip(items, digests, strict=True):
        entry: list[Any] = [item.request.to_dict(), digest and digest.hex()]
        if isinstance(item, ReinforcementItem):
            entry += [[rollout.to_dict() for rollout in item.rollouts], list(item.rewards)]
        else:
            entry.append(asdict(item.target))
        content.append(entry)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
