"""Train the tiny model: one command, seeded and resumable, on CPU or GPU.

    python -m moondream_cv.training.tiny runs/tiny --images 385000          # start, or resume from runs/tiny/state.pt
    python -m moondream_cv.training.tiny runs/tiny --export                 # write the averaged weights as a checkpoint
    python -m moondream_cv.training.tiny runs/more --start-from moondream_cv/tiny --images 200000   # train further

The first 30 % of the images train the vision encoder only, on the object at each image token, at half the cost of a
full step. After that the decoder is trained as well, on scenes that grow from three to eight objects. Muon trains the
matrices inside the blocks, AdamW everything else. The exported weights are an exponential moving average.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

from moondream_cv.model.checkpoints import load_network, save_checkpoint
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.training.batches import Batch, SceneSamples, Stage, collate
from moondream_cv.training.losses import CellHeads, cell_losses, image_tokens, text_losses
from moondream_cv.training.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

VISION_ONLY = 0.3  # share of the images that train the vision encoder only
CONSTANT_UNTIL = 0.55  # share of the images after which the learning rate decays
STAGES = (  # each with the share of the images at which it starts
    (0.0, Stage(max_objects=8, questions=0)),
    (VISION_ONLY, Stage(max_objects=3, questions=8, regions_only=True)),
    (0.38, Stage(max_objects=5, questions=9)),
    (0.5, Stage(max_objects=8, questions=9)),
)
SIZES = {
    "small": {"vision": (96, 4, 288, 3), "text": (128, 4, 512, 4)},
    "medium": {"vision": (128, 4, 384, 4), "text": (192, 4, 768, 6)},
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Arguments of a training run.

    On a GPU, one process trains and worker processes render the scenes. On a CPU, each process renders and trains on
    its share of a batch.

    Attributes:
        folder: Folder of the training state and the checkpoint.
        images: Total number of images.
        size: Architecture, a key of `SIZES`.
        batch: Images per step.
        learning_rate: Peak learning rate.
        average: Decay of the moving average of the weights, per step.
        seed: Random seed.
        processes: Number of training processes on a CPU.
        workers: Number of rendering processes on a GPU; 0: all cores except one.
        device: "cpu", "cuda" or "auto".
        save_every: Seconds between saved states.
        start_from: Checkpoint folder to start from; empty: start from random weights.
    """

    folder: Path
    images: int = 385_000
    size: str = "small"
    batch: int = 32
    learning_rate: float = 2.5e-3
    average: float = 0.995
    seed: int = 0
    processes: int = 2
    workers: int = 0
    device: str = "auto"
    save_every: float = 180.0
    start_from: str = ""


def tiny_config(size: str, vocab_size: int, templates: dict[str, Any]) -> MoondreamConfig:
    """Return the architecture of the tiny model.

    Args:
        size: Key of `SIZES`.
        vocab_size: Number of tokens.
        templates: Prompt templates, as `tiny_templates` returns them.
    """
    (vision_dim, vision_layers, vision_ff, vision_heads), (dim, layers, ff, heads) = SIZES[size].values()
    return MoondreamConfig.from_dict(
        {
            "text": {
                "dim": dim,
                "ff_dim": ff,
                "n_layers": layers,
                "vocab_size": vocab_size,
                "max_context": 512,
                "n_heads": heads,
                "n_kv_heads": heads,
                "prefix_attn": 65,
            },
            "vision": {
                "enc_dim": vision_dim,
                "enc_patch_size": 14,
                "enc_n_layers": vision_layers,
                "enc_ff_dim": vision_ff,
                "enc_n_heads": vision_heads,
                "proj_out_dim": dim,
                "crop_size": 112,
                "max_crops": 4,
                "overlap_margin": 1,
                "proj_inner_dim": 256,
            },
            "region": {"dim": dim, "coord_feat_dim": 64, "size_feat_dim": 128, "inner_dim": 192},
            "tokenizer": {"templates": templates},
        }
    )


class Trainer:
    """A training run: network, probes, optimizers, averaged weights and the number of images so far.

    Args:
        recipe: Arguments of the run.
        rank: Number of this process, from 0.
    """

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self.recipe, self.rank, self.images = recipe, rank, 0
        self.device = torch.device(recipe.device)
        self.tokenizer = build_tokenizer()
        self.config = tiny_config(recipe.size, self.tokenizer.get_vocab_size(), tiny_templates(self.tokenizer))
        torch.manual_seed(recipe.seed)
        self.network = MoondreamNetwork(self.config)
        self.network.initialize()
        self.heads = CellHeads(self.config.text.dim)
        self.network.to(self.device), self.heads.to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.parameters = [*self.network.parameters(), *self.heads.parameters()]
        self.optimizers = _optimizers(self.network, self.heads, recipe.learning_rate)

    def run(self) -> None:
        """Train on the remaining images, and save the state periodically."""
        recipe, saved, started, logged = self.recipe, time.monotonic(), time.monotonic(), self.images
        for batch in self._batches():
            losses = self._step(batch)
            step = self.images // recipe.batch
            if self.rank == 0 and step % 50 == 0:
                speed = (self.images - logged) / (time.monotonic() - started)
                rate = self._learning_rate()
                logger.info("%7d images  %5.1f/s  lr %.5f  %s", self.images, speed, rate, _format_losses(losses))
                logged, started = self.images, time.monotonic()
            if self.rank == 0 and time.monotonic() - saved > recipe.save_every:
                self.save()
                saved = time.monotonic()
        if self.rank == 0:
            self.save()

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Run one training step and return its losses."""
        # Compute the losses
        batch = batch.to(self.device)
        progress = self.images / self.recipe.images
        sigma = 5.0 + 20.0 * max(0.0, 1 - progress / 0.6)
        # On CPUs the backward pass of fused attention takes 6× as long in bfloat16 as separate matrix products.
        attention = SDPBackend.MATH if self.device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel([attention, SDPBackend.MATH]):
            tokens = image_tokens(self.network, batch)
            losses = cell_losses(self.network, self.heads, tokens, batch, sigma)
            if batch.ids.shape[1]:
                losses = {k: 0.3 * v for k, v in losses.items()} | text_losses(self.network, tokens, batch, sigma)

        # Update the weights and their average
        for parameter in self.parameters:
            parameter.grad = None
        torch.stack(list(losses.values())).sum().backward()
        _average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate()
            optimizer.step()
        state = self.network.state_dict()
        torch._foreach_lerp_([self.average[k] for k in state], list(state.values()), 1 - self.recipe.average)
        self.images += self.recipe.batch
        return losses

    def _learning_rate(self) -> float:
        """Return the current learning rate: linear warm-up, constant, linear decay."""
        progress = self.images / self.recipe.images
        warm_up = min(1.0, (self.images + 1) / (200 * self.recipe.batch))
        decay = min(1.0, (1 - progress) / (1 - CONSTANT_UNTIL))
        return self.recipe.learning_rate * warm_up * max(decay, 0.01)

    def _batches(self) -> Iterator[Batch]:
        """Yield the remaining batches of this process, stage by stage."""
        recipe = self.recipe
        starts = [round(share * recipe.images) for share, _ in STAGES]
        for (_, stage), start, stop in zip(STAGES, starts, [*starts[1:], recipe.images], strict=True):
            first = max(start, self.images)
            if first >= stop:
                continue
            world = distributed.get_world_size() if distributed.is_initialized() else 1
            count = (stop - first) // recipe.batch * recipe.batch
            share = recipe.batch // world
            # Each process takes a contiguous share of every batch.
            indices = [first + b + self.rank * share + i for b in range(0, count, recipe.batch) for i in range(share)]
            samples = SceneSamples(self.config, self.tokenizer, stage, recipe.seed)
            yield from DataLoader(
                Subset(samples, indices),
                batch_size=share,
                collate_fn=collate,
                num_workers=recipe.workers,
                pin_memory=self.device.type == "cuda",
                prefetch_factor=4 if recipe.workers else None,
            )

    def save(self) -> None:
        """Write the training state, to resume from, and the averaged weights as a checkpoint."""
        state = {
            "network": self.network.state_dict(),
            "heads": self.heads.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "images": self.images,
            "size": self.recipe.size,
        }
        path = self.recipe.folder / "state.pt"
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        self.export(self.recipe.folder / "checkpoint")

    def load(self) -> None:
        """Resume from the saved state if there is one; otherwise load the checkpoint of `start_from`, if set."""
        path = self.recipe.folder / "state.pt"
        if not path.exists():
            if self.recipe.start_from:
                self._load_checkpoint(Path(self.recipe.start_from))
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.heads.load_state_dict(state["heads"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.images = state["images"]

    def _load_checkpoint(self, folder: Path) -> None:
        """Load the weights of a checkpoint of the same architecture, and start at the last stage."""
        state = load_network(folder, self.config, self.device, torch.float32).state_dict()
        self.network.load_state_dict(state)
        self.average = {k: v.clone() for k, v in state.items()}
        self.images = round(STAGES[-1][0] * self.recipe.images)

    def export(self, folder: Path) -> None:
        """Write a checkpoint for `load(folder)`: the averaged weights in float16, the config and the tokenizer."""
        network = MoondreamNetwork(self.config)
        network.load_state_dict(self.average)
        save_checkpoint(network, self.config, self.tokenizer, folder, torch.float16)


def tiny_templates(tokenizer: Any) -> dict[str, Any]:
    """Return prompt templates in the format of release 2025-06-21: prompt, skill, input, text, answer.

    Args:
        tokenizer: Tokenizer of the tiny model.
    """
    prompt, given, answer = 1, 2, 3

    def word(name: str) -> int:
        return int(tokenizer.token_to_id(f"Ġ{name}"))

    return {
        "caption": {k: [prompt, word("caption"), given, word(k), answer] for k in ("short", "normal", "long")},
        "query": {"prefix": [prompt, word("query"), given], "suffix": [answer]},
        "detect": {"prefix": [prompt, word("detect"), given], "suffix": [answer]},
        "point": {"prefix": [prompt, word("point"), given], "suffix": [answer]},
    }


def _optimizers(network: nn.Module, heads: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, and AdamW for all other parameters."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in [*network.named_parameters(), *heads.named_parameters()]:
        inside = ".blocks." in name or "proj_mlp" in name or "decoder.fc1" in name
        (hidden if inside and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all processes with one all-reduce."""
    if not distributed.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])  # type: ignore[union-attr]
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    start = 0
    for gradient in gradients:
        assert gradient is not None
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _format_losses(losses: dict[str, Tensor]) -> str:
    return "  ".join(f"{name} {float(value.detach()):.3f}" for name, value in losses.items())


def _choose_device(recipe: Recipe) -> Recipe:
    """Return the recipe with its device resolved, and with the numbers of processes and workers for that device."""
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return dataclasses.replace(recipe, device=device)
    workers = recipe.workers or max(1, (os.cpu_count() or 2) - 1)
    return dataclasses.replace(recipe, device=device, processes=1, workers=workers)


def _train(rank: int, recipe: Recipe) -> None:
    """Run one training process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cv2.setNumThreads(1)  # the processes already use all cores
    if recipe.processes > 1:
        torch.set_num_threads(1)
        store = f"file://{(recipe.folder / 'rendezvous').resolve()}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=recipe.processes)
    trainer = Trainer(recipe, rank)
    trainer.load()
    trainer.run()
    if recipe.processes > 1:
        distributed.destroy_process_group()


def main() -> None:
    """Parse the arguments, and train or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Recipe):
        if f.name == "folder":
            parser.add_argument("folder", type=Path, help="folder of the training state and the checkpoint")
        else:
            parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    parser.add_argument("--export", action="store_true", help="only write FOLDER/checkpoint from the saved state")
    arguments = vars(parser.parse_args())
    export = arguments.pop("export")
    recipe = _choose_device(Recipe(**arguments))
    recipe.folder.mkdir(parents=True, exist_ok=True)
    (recipe.folder / "rendezvous").unlink(missing_ok=True)
    if export:
        trainer = Trainer(recipe, 0)
        trainer.load()
        trainer.export(recipe.folder / "checkpoint")
    elif recipe.processes > 1:
        torch.multiprocessing.spawn(_train, (recipe,), recipe.processes)
    else:
        _train(0, recipe)


if __name__ == "__main__":
    main()
