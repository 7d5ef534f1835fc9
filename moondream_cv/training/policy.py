"""Log-probabilities of trajectories under the model with an adapter, and the losses of fine-tuning.

A temperature T divides the logits of tokens and bins. The decision whether another object follows is a choice of two:
the end token, or any other one. It has the logits log p(end) / T and log (1 − p(end)) / T.

`top_p` has no part in these log-probabilities: it limits which choices are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moondream_cv.model.adapters import Adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.training.packed_decoder import run_packed
from moondream_cv.training.trajectories import NO_CHOICE, TrajectoryBatch

CLIP_RANGE = 0.2
ROWS_PER_CHUNK = 512  # positions whose logits are in memory at the same time
_LARGEST_LOG_PROBABILITY = -1e-6  # keeps log (1 − p) and its gradient finite for the end


@torch.enable_grad()
def choice_log_probs(
    network: MoondreamNetwork,
    adapter: Adapter | None,
    images: Tensor | None,
    batch: TrajectoryBatch,
    temperatures: Tensor,
    checkpointing: bool = True,
) -> Tensor:
    """Compute the log-probability of the choices behind each position.

    Inference has other kernels, with other rounding. So the result is always computed as if it required a gradient:
    with the same adapter, or with one that changes nothing, it is the same number.

    Args:
        network: Network with frozen weights.
        adapter: Adapter, which may require gradients; None: no adapter.
        images: [B, num_patches, dim] image tokens; None: the trajectories have no image.
        batch: Trajectories of each image.
        temperatures: [B] sampling temperature of each image's trajectories, above 0.
        checkpointing: Recompute the activations of a layer in the backward pass instead of keeping them.

    Returns:
        [B, T] float32 sums of the log-probabilities of all choices behind a position; 0 without a choice.
    """
    hidden = _hidden_states(network, adapter, images, batch, checkpointing)
    region_lora = None if adapter is None else adapter.region
    inverse = 1 / temperatures[:, None].expand(batch.ids.shape)  # [B, T]
    total = torch.zeros(batch.ids.shape, dtype=torch.float32, device=hidden.device)

    # Tokens and decisions on another object
    for choices, function in ((batch.tokens, _token_log_probs), (batch.decisions, _decision_log_probs)):
        chosen = choices != NO_CHOICE
        if chosen.any():
            picked = _in_chunks(function, network, hidden[chosen], choices[chosen], inverse[chosen])
            total = total + _scattered(chosen, picked)

    # Coordinates and sizes
    chosen = batch.coordinate_bins != NO_CHOICE
    if chosen.any():
        logits = network.region.decode_coordinate(hidden[chosen], region_lora).float()
        picked = _picked(logits * inverse[chosen][:, None], batch.coordinate_bins[chosen])
        total = total + _scattered(chosen, picked)
    chosen = batch.size_bins[..., 0] != NO_CHOICE
    if chosen.any():
        logits = network.region.decode_size(hidden[chosen], region_lora).float()
        picked = _picked(logits * inverse[chosen][:, None, None], batch.size_bins[chosen]).sum(-1)
        total = total + _scattered(chosen, picked)
    return total


def _in_chunks(
    function: Callable[[MoondreamNetwork, Tensor, Tensor, Tensor], Tensor], network: MoondreamNetwork, *tensors: Tensor
) -> Tensor:
    """Apply a function to a few rows at a time, without keeping its logits for the backward pass."""
    parts = zip(*(tensor.split(ROWS_PER_CHUNK) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, network, *part, use_reentrant=False) for part in parts])


def _token_log_probs(network: MoondreamNetwork, hidden: Tensor, tokens: Tensor, inverse: Tensor) -> Tensor:
    """Return the log-probabilities of tokens: hidden states [N, dim], tokens and inverse temperatures [N] → [N]."""
    return _picked(network.text.logits(hidden).float() * inverse[:, None], tokens)


def _decision_log_probs(network: MoondreamNetwork, hidden: Tensor, decisions: Tensor, inverse: Tensor) -> Tensor:
    """Return the log-probabilities of decisions, with the shapes of `_token_log_probs`."""
    end = network.text.logits(hidden).float().log_softmax(-1)[:, network.config.tokenizer.eos_id]
    return _picked(decision_logits(end) * inverse[:, None], decisions)


def decision_logits(end: Tensor) -> Tensor:
    """Return the logits of the decision whether another object follows.

    Args:
        end: [...] log-probability of the end token.

    Returns:
        [..., 2] logits of the end and of another object.
    """
    end = end.clamp(max=_LARGEST_LOG_PROBABILITY)
    return torch.stack((end, torch.log(-torch.expm1(end))), -1)


def policy_loss(
    log_probs: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Compute the clipped policy gradient loss and the KL divergence from the base model, per choice.

    The ratio of probabilities is clipped as in PPO (Schulman et al., 2017, https://arxiv.org/abs/1707.06347). The KL
    divergence is estimated by r − 1 − log r with r = p(reference) / p, which is not negative and has low variance
    (Schulman, "Approximating KL Divergence", 2020).

    Args:
        log_probs: [N] log-probabilities of the choices.
        old: [N] log-probabilities when the choices were sampled.
        reference: [N] log-probabilities under the base model.
        advantages: [N] advantage of the trajectory that each choice belongs to.
        kl_weight: Weight of the KL divergence in the loss.

    Returns:
        [N] losses, and [N] estimates of the KL divergence.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    difference = (reference - log_probs).clamp(max=20.0)  # a finite exponential
    divergence = difference.exp() - 1 - difference
    return kl_weight * divergence - torch.minimum(ratio * advantages, clipped * advantages), divergence


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Return the rewards of a group relative to one another: (reward − mean) / standard deviation.

    Shao et al., "DeepSeekMath", 2024 (https://arxiv.org/abs/2402.03300), section 4.1. Equal rewards have advantages 0.

    Args:
        rewards: Rewards of the rollouts of one request.
    """
    values = torch.tensor(rewards, dtype=torch.float64, device="cpu")
    deviation = values.std(correction=0)
    if deviation < 1e-8:
        return [0.0] * len(rewards)
    advantages: list[float] = ((values - values.mean()) / deviation).tolist()
    return advantages


def _hidden_states(
    network: MoondreamNetwork,
    adapter: Adapter | None,
    images: Tensor | None,
    batch: TrajectoryBatch,
    checkpointing: bool,
) -> Tensor:
    """Run the decoder on images and trajectories: [B, T, dim] hidden states of the trajectories."""
    # Embed tokens, coordinates and sizes
    region = network.region
    with torch.no_grad():
        x = network.text.embed(batch.ids)
        with_coord, with_size = ~batch.coords.isnan(), ~batch.sizes[..., 0].isnan()
        if with_coord.any():
            coords = batch.coords[with_coord][:, None].to(x.dtype)
            x = x.masked_scatter(with_coord[..., None], region.encode_coordinate(coords))
        if with_size.any():
            x = x.masked_scatter(with_size[..., None], region.encode_size(batch.sizes[with_size].to(x.dtype)))

    # Run the decoder
    x.requires_grad_()  # selects the kernels for training
    layers = None if adapter is None else adapter.layers
    return run_packed(network, images, x, batch.positions, batch.numbers, layers, checkpointing)


def _picked(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probabilities of choices: logits [..., n] and indices [...] → [...]."""
    return -F.cross_entropy(logits.flatten(0, -2), chosen.flatten(), reduction="none").view(chosen.shape)


def _scattered(mask: Tensor, values: Tensor) -> Tensor:
    """Return a tensor with values where the mask is true, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
