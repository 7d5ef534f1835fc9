"""Fine-tune the tiny model on a CPU, and measure a training step at full size.

    python benchmarks/finetuning.py                          # teach a new shape (SFT), and crowded scenes (RL, 3 seeds)
    python benchmarks/finetuning.py --sections sft           # one of them
    python benchmarks/finetuning.py --sections full-size     # time and memory of one step of 4 images at full size
    python benchmarks/finetuning.py --sections full-size --device cuda

- sft: rendered scenes contain arrows, a shape that the tiny model was not trained on. Each step has 16 scenes. The
  groups of a scene are a question for arrows and one for another object.
- rl: scenes with 10 to 15 objects of one class, of which the tiny model misses a third. Rewards are `detect_reward`.
- full-size: random weights in the sizes of Moondream 2.

F1 is at IoU 0.5, rewards and F1 are on held-out scenes, with greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import random_model
from PIL import Image

from moondream_cv import Detect, Settings, load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.evaluation.matching import Counts, match_boxes
from moondream_cv.finetune import Finetune, ft
from moondream_cv.finetune.rewards import detect_reward
from moondream_cv.model.packed_linear import pack_weights
from moondream_cv.model.quantized_linear import weight_bytes
from moondream_cv.requests import DetectResult
from moondream_cv.scenes.render import render_scene
from moondream_cv.scenes.sampling import sample_names
from moondream_cv.scenes.scene import Scene
from moondream_cv.scenes.world import ICONS, SHAPES

NEW_SHAPE = "arrow"
HELD_OUT = 2_000_000_011  # seed of the held-out scenes
RANK = 8
LR = 2e-3
GB = 1e9


@dataclass(frozen=True)
class Question:
    """A class on an image with its true boxes.

    Attributes:
        image: RGB image.
        object: Name of the class.
        boxes: [N, 4] boxes as x_min, y_min, x_max, y_max, as fractions.
    """

    image: Image.Image
    object: str
    boxes: list[list[float]]

    @classmethod
    def of(cls, scene: Scene, name: str) -> Question:
        """Return the question for a name in a scene."""
        sides = np.tile(scene.resolution_wh, 2)
        boxes = [(np.array(item.xyxy) / sides).tolist() for item in scene.objects if item.matches(name)]
        return cls(Image.fromarray(scene.image), name, boxes)

    def group(self) -> dict[str, Any]:
        """Return the supervised group of a training step."""
        request = {"skill": "detect", "object": self.object, "image": self.image}
        return {"mode": "sft", "request": request, "target": {"boxes": self.boxes}}


@dataclass
class Results:
    """Printed results.

    Attributes:
        measures: Values by name.
    """

    measures: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, note: str = "") -> None:
        """Print and keep a result."""
        self.measures[name] = round(float(value), 4)
        print(f"{name:60} {value:9.3f} {note}", flush=True)


def draw_scene(rng: np.random.Generator, choose: Callable[[np.random.Generator], list[str]], **options: Any) -> Scene:
    """Render a scene with random names; names are drawn again if they do not fit.

    Args:
        rng: Source of randomness.
        choose: Draws the names of the objects.
        options: Options of `render_scene`.
    """
    while True:
        try:
            return render_scene(rng, names=choose(rng), **options)
        except ValueError:
            continue


def new_shape_names(rng: np.random.Generator) -> list[str]:
    """Draw up to 3 arrows and 1 to 4 other objects."""
    names = [NEW_SHAPE] * int(rng.integers(0, 4)) + sample_names(rng, int(rng.integers(1, 5)))
    rng.shuffle(names)
    return names


def crowd_names(rng: np.random.Generator) -> list[str]:
    """Draw 10 to 15 objects of one class."""
    return [str(rng.choice([*SHAPES, *ICONS]))] * int(rng.integers(10, 16))


def crowded(rng: np.random.Generator) -> Question:
    """Draw a crowded scene with the question for its class."""
    chosen: list[str] = []

    def choose(rng: np.random.Generator) -> list[str]:
        chosen[:] = crowd_names(rng)
        return chosen

    scene = draw_scene(rng, choose, resolution_wh=(480, 360))
    return Question.of(scene, chosen[0])


def evaluate(model: LocalModel, questions: Sequence[Question], variant: str | None) -> tuple[float, float]:
    """Return F1 at IoU 0.5 and the mean of `detect_reward`.

    Args:
        model: Model to evaluate.
        questions: Questions with true boxes.
        variant: Adapter; None: the base model.
    """
    counts, rewards = Counts(), []
    requests = [Detect(one.image, one.object, Settings(variant=variant)) for one in questions]
    for question, result in zip(questions, model.run(requests), strict=True):
        assert isinstance(result, DetectResult), result
        found = [(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects]
        true = np.array(question.boxes, np.float32).reshape(-1, 4)
        counts += match_boxes(np.array(found, np.float32).reshape(-1, 4), true)[0]
        rewards.append(detect_reward(found, true))
    return counts.f1, float(np.mean(rewards))


def checkpoint(finetune: Finetune) -> str:
    """Save a checkpoint and return its file."""
    step = finetune.save_checkpoint()["checkpoint"]["step"]
    return str(finetune.checkpoint(step))


def measure_sft(model: LocalModel, root: Path, steps: int, num_held_out: int, results: Results) -> None:
    """Teach the new shape by supervised steps."""
    # Draw the held-out questions
    rng = np.random.default_rng(HELD_OUT)
    scenes = [draw_scene(rng, new_shape_names) for _ in range(num_held_out)]
    new = [Question.of(scene, NEW_SHAPE) for scene in scenes]
    old = [Question.of(scene, name) for scene in scenes for name in _other_names(scene)]
    before = {"new": evaluate(model, new, None)[0], "old": evaluate(model, old, None)[0]}

    # Train
    rng, start = np.random.default_rng(0), time.monotonic()
    with ft("sft", RANK, model=model, root=root) as finetune:
        for _ in range(steps):
            groups = []
            for scene in (draw_scene(rng, new_shape_names) for _ in range(16)):
                groups.append(Question.of(scene, NEW_SHAPE).group())
                if names := _other_names(scene):
                    groups.append(Question.of(scene, str(rng.choice(names))).group())
            finetune.train_step(groups, lr=LR)
        minutes = (time.monotonic() - start) / 60
        after = checkpoint(finetune)
        f1 = {"new": evaluate(model, new, after)[0], "old": evaluate(model, old, after)[0]}
    results.add(f"sft: F1 of {NEW_SHAPE!r} before", before["new"], "must be at most 0.2")
    results.add(f"sft: F1 of {NEW_SHAPE!r} after {steps} steps of 16 scenes", f1["new"], "must 0.6, goal 0.8")
    results.add("sft: change of the F1 of other classes", f1["old"] - before["old"], "must -0.03")
    results.add("sft: minutes", minutes)


def measure_rl(
    model: LocalModel, root: Path, steps: int, seeds: Sequence[int], num_held_out: int, results: Results
) -> None:
    """Raise the reward on crowded scenes by rollouts, for several seeds."""
    rng = np.random.default_rng(HELD_OUT)
    questions = [crowded(rng) for _ in range(num_held_out)]
    f1, reward = evaluate(model, questions, None)
    results.add("rl: F1 before", f1)
    results.add("rl: reward before", reward)
    changes, divergences, start = [], [], time.monotonic()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        with ft(f"rl-{seed}", RANK, model=model, root=root, seed=seed) as finetune:
            for _ in range(steps):
                requests = [(None, _rollout_request(crowded(rng))) for _ in range(8)]
                groups = [
                    {"mode": "rl", **{key: response[key] for key in ("request", "rollouts", "rewards")}}
                    for _, response in finetune.rollout_stream(requests, max_concurrency=8)
                ]
                statistics = finetune.train_step(groups, lr=LR)
            after = evaluate(model, questions, checkpoint(finetune))
        changes.append((after[0] - f1, after[1] - reward))
        divergences.append(statistics["kl"])
        print(f"seed {seed}: F1 {after[0]:.3f}, reward {after[1]:.3f}, KL {statistics['kl']:.2f}", flush=True)
    by_measure = np.array(changes)
    for i, (name, note) in enumerate((("F1", "goal 0.05"), ("reward", "must 0.05"))):
        mean, spread = by_measure[:, i].mean(), by_measure[:, i].std()
        results.add(f"rl: change of {name} after {steps} steps, mean of {len(seeds)} seeds", mean, note)
        results.add(f"rl: standard deviation of the change of {name}", spread)
    results.add("rl: KL divergence from the base model, per choice", float(np.mean(divergences)))
    results.add("rl: minutes per seed", (time.monotonic() - start) / 60 / len(seeds))


def measure_full_size(root: Path, device: torch.device, layers: int | None, results: Results) -> None:
    """Run supervised steps of 4 images on random weights of full size."""
    model = random_model(layers, layers, device)
    pack_weights(model.network)
    rng = np.random.default_rng(0)
    boxes = [[0.1, 0.1, 0.4, 0.5], [0.3, 0.4, 0.6, 0.9], [0.6, 0.2, 0.9, 0.7]]
    frames = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(4)]
    groups = [Question(frame, "dog", boxes).group() for frame in frames]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ft("full-size", RANK, model=model, root=root) as finetune:
        for name in ("with image encoding", "with cached images"):
            start = time.monotonic()
            reply = finetune.train_step(groups)
            assert reply["applied"], reply
            results.add(f"full size: step of 4 images, rank {RANK}, {name} (s)", time.monotonic() - start)
    results.add("full size: weights (GB)", weight_bytes(model.network) / GB)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.add("full size: peak memory (GB)", peak / GB, "must 20 on a CPU")


def _other_names(scene: Scene) -> list[str]:
    return sorted({item.name for item in scene.objects if item.shape != NEW_SHAPE})


def _rollout_request(question: Question) -> dict[str, Any]:
    return {
        "skill": "detect",
        "image": question.image,
        "object": question.object,
        "num_rollouts": 8,
        "ground_truth": {"boxes": question.boxes},
    }


def main() -> None:
    """Parse the arguments and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("sft", "rl", "full-size")
    parser.add_argument("--sections", nargs="+", choices=sections, default=["sft", "rl"], help="default: sft rl")
    parser.add_argument("--sft-steps", type=int, default=150, help="default: 150")
    parser.add_argument("--rl-steps", type=int, default=80, help="default: 80")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of rl (default: 0 1 2)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out scenes (default: 100)")
    parser.add_argument("--device", default="cpu", help="device of full-size (default: cpu)")
    parser.add_argument("--layers", type=int, help="layers of full-size (default: all)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the results, in benchmarks/results/")
    arguments = parser.parse_args()
    results = Results()
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if "full-size" in arguments.sections:
            measure_full_size(root / "full", torch.device(arguments.device), arguments.layers, results)
        if {"sft", "rl"} & set(arguments.sections):
            with load("tiny", device="cpu") as model:
                model.show_progress = False
                if "sft" in arguments.sections:
                    measure_sft(model, root / "sft", arguments.sft_steps, arguments.held_out, results)
                if "rl" in arguments.sections:
                    measure_rl(model, root / "rl", arguments.rl_steps, arguments.seeds, arguments.held_out, results)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"date": str(date.today()), "torch": torch.__version__, "threads": torch.get_num_threads()}
        arguments.output.write_text(json.dumps(report | {"measures": results.measures}, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
