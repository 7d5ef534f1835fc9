"""Training batches: rendered scenes, cut into crops, with packed questions and what each image token shows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from moondream_cv.engine.crops import cut_crops
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.scenes.render import Scene, render_scene
from moondream_cv.scenes.world import COLORS, ICONS, SHAPES
from moondream_cv.training.packing import IGNORE, Packed, Packer
from moondream_cv.training.prompts import write_examples

MAX_POSITIONS = 120  # of an image's questions; attention over a batch costs the square of its longest row


@dataclass
class Stage:
    """What scenes and questions a part of the training draws.

    Attributes:
        max_objects: Objects in a scene at the most.
        questions: Questions per image; 0 trains the vision encoder alone.
        regions_only: Ask for boxes and points alone.
    """

    max_objects: int
    questions: int
    regions_only: bool = False


@dataclass
class Cells:
    """What each image token should know, by itself: [num_patches] arrays.

    Attributes:
        thing: Class index (shapes, then icons), or IGNORE where the cell lies in no object's core.
        color: Color index, or IGNORE.
        box: [num_patches, 4] x center, y center, width, height of the object; NaN where there is none.
    """

    thing: np.ndarray
    color: np.ndarray
    box: np.ndarray


@dataclass
class Sample:
    """One image's share of a batch."""

    pixels: np.ndarray
    tiling: tuple[int, int]
    packed: Packed
    cells: Cells


@dataclass
class Batch:
    """Tensors of a training step. Lists of positions are padded to the longest, with question −1."""

    pixels: Tensor  # [N, S, S, 3] uint8
    tilings: list[tuple[int, int]]
    ids: Tensor  # [B, T]
    coords: Tensor  # [B, T]
    sizes: Tensor  # [B, T, 2]
    next_ids: Tensor  # [B, T]
    weights: Tensor  # [B, T]
    next_coords: Tensor  # [B, T]
    next_sizes: Tensor  # [B, T, 2]
    offsets: Tensor  # [B, T]
    question: Tensor  # [B, T]
    thing: Tensor  # [B, P]
    color: Tensor  # [B, P]
    box: Tensor  # [B, P, 4]

    def to(self, device: torch.device) -> Batch:
        """A copy on a device."""
        moved = copy(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                setattr(moved, f.name, value.to(device, non_blocking=True))
        return moved


class SceneSamples(Dataset[Sample]):
    """Sample `i` is drawn from the seed and `i` alone, so that any number of workers gives the same stream."""

    def __init__(self, config: MoondreamConfig, tokenizer: Tokenizer, stage: Stage, seed: int) -> None:
        self.config, self.stage, self.seed = config, stage, seed
        self.packer = Packer(tokenizer, config.tokenizer)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        scene = render_scene(rng, num_objects=(0 if rng.random() < 0.02 else 1, self.stage.max_objects))
        crops = cut_crops(scene.image, self.config.vision)
        examples = write_examples(scene, rng, self.stage.questions, self.stage.regions_only)
        packed = self.packer.pack(examples, MAX_POSITIONS)
        return Sample(crops.pixels, crops.tiling, packed, cells_of(scene, self.config.vision.grid))


def cells_of(scene: Scene, grid: int) -> Cells:
    """Assign each cell of the token grid to the object in whose core (half its width and height) it lies.

    The cell of an object's center always belongs to it.
    """
    width, height = scene.resolution_wh
    thing = np.full(grid * grid, IGNORE, np.int64)
    color, box = thing.copy(), np.full((grid * grid, 4), np.nan, np.float32)
    middle = (np.arange(grid) + 0.5) / grid
    for item in sorted(scene.objects, key=lambda o: -(o.xyxy[2] - o.xyxy[0]) * (o.xyxy[3] - o.xyxy[1])):
        x0, y0, x1, y1 = np.divide(item.xyxy, (width, height, width, height))
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        rows = np.flatnonzero(np.abs(middle - y) <= h / 4)
        columns = np.flatnonzero(np.abs(middle - x) <= w / 4)
        own = min(int(y * grid), grid - 1) * grid + min(int(x * grid), grid - 1)
        cells = np.append((rows[:, None] * grid + columns).ravel(), own)
        thing[cells] = SHAPES.index(item.shape) if item.kind == "shape" else len(SHAPES) + ICONS.index(item.shape)
        color[cells] = list(COLORS).index(item.color) if item.color else IGNORE
        box[cells] = (x, y, w, h)
    return Cells(thing, color, box)


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples into one batch."""
    longest = max(len(s.packed) for s in samples)

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        rows = [getattr(s.packed, name) for s in samples]
        shape = (len(rows), longest, 2) if name.endswith("sizes") else (len(rows), longest)
        out = torch.full(shape, fill, dtype=dtype, device="cpu")
        for i, row in enumerate(rows):
            if row:
                out[i, : len(row)] = torch.tensor(row, dtype=dtype, device="cpu")
        return out

    return Batch(
        pixels=torch.from_numpy(np.concatenate([s.pixels for s in samples])),
        tilings=[s.tiling for s in samples],
        ids=padded("ids", 0, torch.long),
        coords=padded("coords", torch.nan, torch.float32),
        sizes=padded("sizes", torch.nan, torch.float32),
        next_ids=padded("next_ids", IGNORE, torch.long),
        weights=padded("weights", 0.0, torch.float32),
        next_coords=padded("next_coords", torch.nan, torch.float32),
        next_sizes=padded("next_sizes", torch.nan, torch.float32),
        offsets=padded("offsets", 0, torch.long),
        question=padded("question", -1, torch.long),
        thing=torch.from_numpy(np.stack([s.cells.thing for s in samples])),
        color=torch.from_numpy(np.stack([s.cells.color for s in samples])),
        box=torch.from_numpy(np.stack([s.cells.box for s in samples])),
    )
