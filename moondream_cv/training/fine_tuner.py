"""Training steps of an adapter: supervised and reinforcement groups in one step, in parts that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moondream_cv.engine.autocast import without_autocast
from moondream_cv.model.adapters import Adapter
from moondream_cv.model.hardware import is_small
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.training.lora import LoraParameters
from moondream_cv.training.policy import choice_log_probs, group_advantages, policy_loss
from moondream_cv.training.trajectories import Trajectory, TrajectoryBatch, pack_trajectories

MAX_TOKENS_PER_PASS = 4096
"""Maximum number of positions in one pass, including those of the images. A single trajectory may have more. For
full-size weights in bfloat16, a pass keeps about 0.4 GB of layer inputs, and recomputes the other activations."""

KL_WEIGHT = 0.02
MAX_GRAD_NORM = 1.0
_BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")  # names in the state of AdamW


@dataclass(frozen=True)
class SupervisedGroup:
    """A request with its target.

    Attributes:
        image: [num_patches, dim] image tokens; None: no image.
        trajectory: Prompt and target.
    """

    image: Tensor | None
    trajectory: Trajectory


@dataclass(frozen=True)
class ReinforcementGroup:
    """Rollouts of one request with their rewards.

    Attributes:
        image: [num_patches, dim] image tokens; None: no image.
        trajectories: Prompt and reply of each rollout.
        log_probs: For each rollout the log-probabilities of its choices when it was sampled, as
            `FineTuner.log_probs` returns them.
        rewards: Reward of each rollout.
        temperature: Temperature that the rollouts were sampled with, above 0.
    """

    image: Tensor | None
    trajectories: Sequence[Trajectory]
    log_probs: Sequence[Sequence[float]]
    rewards: Sequence[float]
    temperature: float


Group = SupervisedGroup | ReinforcementGroup


@dataclass(frozen=True)
class _Row:
    """Trajectories on one image in a pass: a group, or a part of it.

    Attributes:
        image: [num_patches, dim] image tokens; None: no image.
        trajectories: Trajectories.
        temperature: Temperature of the log-probabilities.
        weight: Weight of each choice in the loss.
        log_probs: Log-probabilities of the choices of each trajectory when it was sampled; None: targets.
        advantages: Advantage of each trajectory.
    """

    image: Tensor | None
    trajectories: Sequence[Trajectory]
    temperature: float
    weight: float = 0.0
    log_probs: Sequence[Sequence[float]] | None = None
    advantages: Sequence[float] = ()


@dataclass(frozen=True)
class StepStatistics:
    """Result of a training step.

    Attributes:
        applied: Whether the adapter changed. It does not change if no group has a gradient, for example because all
            rewards of each group are equal, or if a gradient is not finite.
        grad_norm: Norm of the gradient before clipping.
        kl: Mean estimate of the KL divergence from the base model per choice of the rollouts; 0 without rollouts.
        reward_mean: Mean of all rewards; None without rollouts.
        reward_std: Standard deviation of all rewards; None without rollouts.
        sft_loss: Mean negative log-probability per choice of the targets; None without targets.
    """

    applied: bool
    grad_norm: float
    kl: float
    reward_mean: float | None
    reward_std: float | None
    sft_loss: float | None


class FineTuner:
    """Trains the adapter of a network whose weights stay as they are. Not thread-safe.

    Attributes:
        network: Network with frozen weights, in any data type, quantized or not.
        parameters: Adapter that is trained.
        kl_weight: Weight of the KL divergence from the base model in the loss of rollouts.
        max_tokens: Maximum number of positions in one pass.
        checkpointing: Whether activations are recomputed in the backward pass.
    """

    def __init__(
        self,
        network: MoondreamNetwork,
        parameters: LoraParameters,
        kl_weight: float = KL_WEIGHT,
        max_tokens: int = MAX_TOKENS_PER_PASS,
        checkpointing: bool | None = None,
    ) -> None:
        """Create a tuner with a new optimizer.

        Args:
            network: Network; its weights are not changed.
            parameters: Adapter to train, on the device of the network.
            kl_weight: Weight of the KL divergence from the base model in the loss of rollouts.
            max_tokens: Maximum number of positions in one pass.
            checkpointing: Recompute activations in the backward pass instead of keeping them; None: for large models.
        """
        self.checkpointing = not is_small(network.config.text.dim) if checkpointing is None else checkpointing
        self.network, self.parameters = network, parameters
        self.kl_weight, self.max_tokens = kl_weight, max_tokens
        self._tensors = list(parameters.tensors.values())
        self._optimizer = torch.optim.AdamW(self._tensors, betas=_BETAS, weight_decay=0.0)

    @torch.inference_mode(False)
    def log_probs(
        self,
        image: Tensor | None,
        trajectories: Sequence[Trajectory],
        temperature: float,
        adapter: Adapter | None = None,
    ) -> list[list[float]]:
        """Return the log-probabilities of the choices of each trajectory.

        Args:
            image: [num_patches, dim] image tokens; None: no image.
            trajectories: Trajectories on the image.
            temperature: Sampling temperature, above 0.
            adapter: Adapter that the trajectories were sampled with, in the data type of the network; None: the current
                one.

        Returns:
            For each trajectory, one number per position with a choice.
        """
        adapter = adapter or self._adapter()
        found: list[list[float]] = []
        with without_autocast(self.network.device):
            for part in self._parts(image, trajectories):
                row = _Row(image, trajectories[part], temperature)
                batch, log_probs = self._log_probs([row], adapter)
                chosen = [batch.has_choice & (batch.numbers == i) for i in range(len(row.trajectories))]
                found += [log_probs.detach()[mask].tolist() for mask in chosen]
        return found

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, groups: Sequence[Group], lr: float) -> StepStatistics:
        """Train on groups once.

        The loss is the mean over all groups. A supervised group has the loss of its choices, where the choices of all
        supervised groups have the same weight. A reinforcement group has the mean of `policy_loss` over its choices.

        Args:
            groups: At least one group.
            lr: Learning rate.
        """
        for tensor in self._tensors:
            tensor.grad = None
        totals = {"kl": 0.0, "sft": 0.0}
        supervised = [group for group in groups if isinstance(group, SupervisedGroup)]
        num_targets = sum(group.trajectory.num_choices for group in supervised)
        num_samples = sum(
            trajectory.num_choices
            for group in groups
            if isinstance(group, ReinforcementGroup)
            for trajectory in group.trajectories
        )
        sft_weight = len(supervised) / len(groups) / max(1, num_targets)
        rows = [row for group in groups for row in self._rows(group, len(groups), sft_weight)]
        with without_autocast(self.network.device):
            for part in self._passes(rows):
                self._backward(part, totals)
        applied, grad_norm = self._update(lr)
        rewards = [r for group in groups if isinstance(group, ReinforcementGroup) for r in group.rewards]
        mean = math.fsum(rewards) / len(rewards) if rewards else None
        return StepStatistics(
            applied,
            grad_norm,
            totals["kl"] / max(1, num_samples),
            mean,
            None if mean is None else math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards)),
            totals["sft"] / num_targets if num_targets else None,
        )

    def state(self) -> dict[str, Tensor]:
        """Return the adapter and the state of the optimizer as named tensors on the CPU."""
        tensors = {f"adapter.{name}": tensor.detach() for name, tensor in self.parameters.tensors.items()}
        for name, tensor in self.parameters.tensors.items():
            state = self._optimizer.state.get(tensor, {})
            for moment in _MOMENTS:
                if moment in state:
                    tensors[f"optimizer.{moment}.{name}"] = state[moment]
            if "step" in state:
                tensors["optimizer.step"] = state["step"]
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a state.

        Args:
            tensors: Result of `state`.
        """
        for name, tensor in self.parameters.tensors.items():
            tensor.copy_(tensors[f"adapter.{name}"])
            self._optimizer.state.pop(tensor, None)
            if "optimizer.step" in tensors:
                moments = {m: tensors[f"optimizer.{m}.{name}"].to(tensor.device, copy=True) for m in _MOMENTS}
                self._optimizer.state[tensor] = {"step": tensors["optimizer.step"].clone(), **moments}

    def _rows(self, group: Group, num_groups: int, sft_weight: float) -> Iterator[_Row]:
        """Yield the rows of a group; many or long rollouts are divided.

        Args:
            group: Group to divide.
            num_groups: Number of groups of the step.
            sft_weight: Weight of each choice of a target.
        """
        if isinstance(group, SupervisedGroup):
            yield _Row(group.image, [group.trajectory], 1.0, sft_weight)
            return
        num_choices = sum(trajectory.num_choices for trajectory in group.trajectories)
        weight = 1 / num_groups / max(1, num_choices)
        advantages = group_advantages(group.rewards)
        for part in self._parts(group.image, group.trajectories):
            yield _Row(
                group.image,
                group.trajectories[part],
                group.temperature,
                weight,
                group.log_probs[part],
                advantages[part],
            )

    def _parts(self, image: Tensor | None, trajectories: Sequence[Trajectory]) -> Iterator[slice]:
        """Divide trajectories on one image into parts that fit into a pass."""
        start, length = 0, self._prefix(image)
        for i, trajectory in enumerate(trajectories):
            if i > start and length + len(trajectory) > self.max_tokens:
                yield slice(start, i)
                start, length = i, self._prefix(image)
            length += len(trajectory)
        yield slice(start, len(trajectories))

    def _passes(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Divide rows into passes of similar rows."""
        part: list[_Row] = []
        longest = 0
        for row in sorted(rows, key=lambda row: (row.image is None, self._length(row))):
            length = self._length(row)
            fits = (len(part) + 1) * max(longest, length) <= self.max_tokens
            if part and (not fits or (row.image is None) != (part[0].image is None)):
                yield part
                part, longest = [], 0
            part.append(row)
            longest = max(longest, length)
        yield part

    def _length(self, row: _Row) -> int:
        """Return the number of positions of a row, including those of its image."""
        return self._prefix(row.image) + sum(map(len, row.trajectories))

    def _prefix(self, image: Tensor | None) -> int:
        return 0 if image is None else self.network.config.prefix_length

    def _backward(self, rows: Sequence[_Row], totals: dict[str, float]) -> None:
        """Add the gradients of some rows, and their sums of losses to the totals."""
        batch, log_probs = self._log_probs(rows, self._adapter())
        has_choice, device = batch.has_choice, log_probs.device
        reference = None
        if any(row.log_probs is not None for row in rows):
            reference = self._log_probs(rows, None)[1].detach()
        loss = log_probs.new_zeros(())
        for i, row in enumerate(rows):
            new = log_probs[i][has_choice[i]]
            if row.log_probs is None or reference is None:
                losses = -new
                totals["sft"] += float(losses.detach().sum())
            else:
                sampled = [value for values in row.log_probs for value in values]
                old = torch.tensor(sampled, device=device, dtype=torch.float32)
                advantages = torch.tensor(row.advantages, device=device, dtype=torch.float32)
                chosen = advantages[batch.numbers[i][has_choice[i]]]
                losses, divergence = policy_loss(new, old, reference[i][has_choice[i]], chosen, self.kl_weight)
                totals["kl"] += float(divergence.detach().sum())
            loss = loss + losses.sum() * row.weight
        loss.backward()

    def _adapter(self) -> Adapter:
        return self.parameters.adapter(self.network.dtype)

    def _log_probs(self, rows: Sequence[_Row], adapter: Adapter | None) -> tuple[TrajectoryBatch, Tensor]:
        """Return the packed rows, and the [B, T] log-probabilities of their choices."""
        device = self.network.device
        batch = pack_trajectories([row.trajectories for row in rows], device)
        temperatures = torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device)
        images = _stack([row.image for row in rows])
        return batch, choice_log_probs(self.network, adapter, images, batch, temperatures, self.checkpointing)

    def _update(self, lr: float) -> tuple[bool, float]:
        """Apply the gradients. Returns whether the adapter has changed, and the norm of the gradient."""
        for tensor in self._tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        norm = float(torch.nn.utils.clip_grad_norm_(self._tensors, MAX_GRAD_NORM))
        if not math.isfinite(norm) or not norm:
            return False, norm
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return True, norm


def _stack(images: Sequence[Tensor | None]) -> Tensor | None:
    """Stack image tokens, as tensors that can be saved for a backward pass; None if there are no images."""
    present = [image for image in images if image is not None]
    return torch.stack(present).clone() if present else None
