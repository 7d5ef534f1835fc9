"""Losses of the tiny model: language modeling and regions of the decoder, and targets of single image tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.engine.crops import normalize
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.region import size_to_bin
from moondream_cv.scenes.world import COLORS, ICONS, SHAPES
from moondream_cv.training.batches import Batch
from moondream_cv.training.packed_decoder import run_packed
from moondream_cv.training.packing import IGNORE

TEXT_WEIGHT, SIZE_WEIGHT, COORDINATE_JITTER = 1.5, 0.5, 0.006


class CellHeads(nn.Module):
    """Linear probes on image tokens: presence, class, color and box of an object. Not part of the checkpoint.

    The names of the layers are keys of the saved training state.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.present = nn.Linear(dim, 1)
        self.thing = nn.Linear(dim, len(SHAPES) + len(ICONS))
        self.colour = nn.Linear(dim, len(COLORS))
        self.box = nn.Linear(dim, 4)


def image_tokens(network: MoondreamNetwork, batch: Batch) -> Tensor:
    """Return the image tokens of a batch, [B, P, dim]."""
    crops = normalize(batch.pixels, network.dtype)
    return network.vision.join(network.vision(crops), batch.tilings)


def cell_losses(
    network: MoondreamNetwork, heads: CellHeads, tokens: Tensor, batch: Batch, sigma: float
) -> dict[str, Tensor]:
    """Compute the losses of single image tokens: presence, class, color and box of the object.

    Args:
        network: Network to train. Its region heads predict the size and x of the box as well.
        heads: Probes on the image tokens.
        tokens: [B, P, dim] image tokens.
        batch: Batch with the targets.
        sigma: Width of the soft targets in bins.
    """
    covered = batch.class_id != IGNORE
    normed = heads.norm(tokens)
    chosen, chosen_normed = tokens[covered], normed[covered]
    box, bins = batch.box[covered], network.config.region.coord_out_dim
    return {
        "present": F.binary_cross_entropy_with_logits(heads.present(normed).squeeze(-1), covered.float()),
        "class": F.cross_entropy(heads.thing(chosen_normed), batch.class_id[covered]),
        "color": _mean(F.cross_entropy(heads.colour(chosen_normed), batch.color_id[covered], reduction="none")),
        "cell size": 0.3 * soft_bins(network.region.decode_size(chosen), size_bins(box[:, 2:], network), sigma),
        "cell x": 0.3 * soft_bins(network.region.decode_coordinate(chosen), box[:, 0] * bins, sigma),
        "cell box": 4.0 * F.l1_loss(heads.box(chosen_normed), box),
    }


def text_losses(network: MoondreamNetwork, tokens: Tensor, batch: Batch, sigma: float) -> dict[str, Tensor]:
    """Compute the losses of the decoder on the packed questions, with teacher forcing.

    Args:
        network: Network to train.
        tokens: [B, P, dim] image tokens.
        batch: Batch with the questions and replies.
        sigma: Width of the soft targets in bins.
    """
    config, region = network.config, network.region
    hidden = packed_hidden(network, tokens, batch, COORDINATE_JITTER)
    has_target = batch.next_ids != IGNORE
    weights, logits = batch.weights[has_target], network.text.logits(hidden[has_target])
    per_token = F.cross_entropy(logits.float(), batch.next_ids[has_target], reduction="none")
    located, sized = ~batch.next_coords.isnan(), ~batch.next_sizes[..., 0].isnan()
    places = batch.next_coords[located] * config.region.coord_out_dim
    sizes = size_bins(batch.next_sizes[sized], network)
    return {
        "text": TEXT_WEIGHT * (per_token * weights).sum() / weights.sum(),
        "coord": soft_bins(region.decode_coordinate(hidden[located]), places, sigma),
        "size": SIZE_WEIGHT * soft_bins(region.decode_size(hidden[sized]), sizes, sigma),
    }


def packed_hidden(network: MoondreamNetwork, tokens: Tensor, batch: Batch, jitter: float) -> Tensor:
    """Run the decoder on images and packed questions.

    Args:
        network: Network to run.
        tokens: [B, P, dim] image tokens.
        batch: Batch with the questions.
        jitter: Standard deviation of the noise on input coordinates, as a fraction of the image. At inference the
            inputs are the model's own, inexact predictions.

    Returns:
        Hidden states of the questions, [B, T, dim].
    """
    region = network.region
    inputs = network.text.embed(batch.ids)
    with_coord, with_size = ~batch.coords.isnan(), ~batch.sizes[..., 0].isnan()
    coords = batch.coords[with_coord]
    coords = (coords + jitter * torch.randn_like(coords)).clamp(0, 1)
    with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 is too coarse for the phases of a coordinate
        encoded_coords = region.encode_coordinate(coords[:, None]).to(inputs.dtype)
        encoded_sizes = region.encode_size(batch.sizes[with_size]).to(inputs.dtype)
    inputs = inputs.masked_scatter(with_coord[..., None], encoded_coords)
    inputs = inputs.masked_scatter(with_size[..., None], encoded_sizes)
    return run_packed(network, tokens, inputs, batch.offsets, batch.question)


def soft_bins(logits: Tensor, center: Tensor, sigma: float) -> Tensor:
    """Compute the cross entropy against a Gaussian around the true value.

    Args:
        logits: [..., bins] logits.
        center: [...] true value, in bins.
        sigma: Standard deviation of the Gaussian, in bins.
    """
    if not logits.numel():
        return logits.sum()
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
    target = torch.softmax(-0.5 * ((bins - center[..., None]) / sigma) ** 2, dim=-1)
    return -(target * logits.float().log_softmax(-1)).sum(-1).mean()


def size_bins(size: Tensor, network: MoondreamNetwork) -> Tensor:
    """Convert width and height from fractions to real-valued bins."""
    return size_to_bin(size, network.config.region.size_out_dim // 2)


def _mean(losses: Tensor) -> Tensor:
    counted = losses != 0  # cross_entropy returns exactly 0 for ignored targets
    return losses.sum() / counted.sum().clamp_min(1)
