"""Training batches: image crops of rendered scenes, packed questions, and the object at each image token."""

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

MAX_POSITIONS = 120  # positions of one image's questions; attention cost grows with the square of the longest sequence


@dataclass
class Stage:
    """Scenes and questions of one stage of training.

    Attributes:
        max_objects: Maximum number of objects in a scene.
        questions: Number of questions per image; 0 trains the vision encoder only.
        regions_only: Train on detect and point questions only.
    """

    max_objects: int
    questions: int
    regions_only: bool = False


@dataclass
class Cells:
    """Targets of the per-token losses: the object at each cell of the token grid.

    Attributes:
        class_id: [num_patches] class index (shapes, then icons); IGNORE outside the core of every object.
        color_id: [num_patches] color index; IGNORE outside shapes.
        box: [num_patches, 4] center x, center y, width and height of the object, as fractions; NaN without an object.
    """

    class_id: np.ndarray
    color_id: np.ndarray
    box: np.ndarray


@dataclass
class Sample:
    """One image of a batch.

    Attributes:
        pixels: Crops of the image, as `moondream_cv.engine.crops.cut_crops` returns them.
        tiling: Rows and columns of the crops.
        packed: Questions and replies.
        cells: Targets of the image tokens.
    """

    pixels: np.ndarray
    tiling: tuple[int, int]
    packed: Packed
    cells: Cells


@dataclass
class Batch:
    """Tensors of a training step.

    N crops of B images, T positions per image, P tokens per image. Sequences are padded to the longest one; padding has
    question −1.
    """

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
    class_id: Tensor  # [B, P]
    color_id: Tensor  # [B, P]
    box: Tensor  # [B, P, 4]

    def to(self, device: torch.device) -> Batch:
        """Return a copy on a device."""
        moved = copy(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                setattr(moved, f.name, value.to(device, non_blocking=True))
        return moved


class SceneSamples(Dataset[Sample]):
    """Random training samples. A sample depends on the seed and its index only, not on the number of workers."""

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
    """Assign the cells of the token grid to objects.

    A cell belongs to the object whose core, half as wide and high as its box, contains the center of the cell. The cell
    at the center of an object always belongs to that object. Small objects take precedence over large ones.

    Args:
        scene: Scene with ground truth.
        grid: Number of cells per side.
    """
    width, height = scene.resolution_wh
    class_id = np.full(grid * grid, IGNORE, np.int64)
    color_id, box = class_id.copy(), np.full((grid * grid, 4), np.nan, np.float32)
    middle = (np.arange(grid) + 0.5) / grid
    for item in sorted(scene.objects, key=lambda o: -(o.xyxy[2] - o.xyxy[0]) * (o.xyxy[3] - o.xyxy[1])):
        x0, y0, x1, y1 = np.divide(item.xyxy, (width, height, width, height))
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        rows = np.flatnonzero(np.abs(middle - y) <= h / 4)
        columns = np.flatnonzero(np.abs(middle - x) <= w / 4)
        own = min(int(y * grid), grid - 1) * grid + min(int(x * grid), grid - 1)
        cells = np.append((rows[:, None] * grid + columns).ravel(), own)
        class_id[cells] = SHAPES.index(item.shape) if item.kind == "shape" else len(SHAPES) + ICONS.index(item.shape)
        color_id[cells] = list(COLORS).index(item.color) if item.color else IGNORE
        box[cells] = (x, y, w, h)
    return Cells(class_id, color_id, box)


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate samples into one batch, padded to the longest sequence."""
    longest = max(len(s.packed) for s in samples)

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        sequences = [getattr(s.packed, name) for s in samples]
        shape = (len(sequences), longest, 2) if name.endswith("sizes") else (len(sequences), longest)
        out = torch.full(shape, fill, dtype=dtype, device="cpu")
        for i, sequence in enumerate(sequences):
            if sequence:
                out[i, : len(sequence)] = torch.tensor(sequence, dtype=dtype, device="cpu")
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
        class_id=torch.from_numpy(np.stack([s.cells.class_id for s in samples])),
        color_id=torch.from_numpy(np.stack([s.cells.color_id for s in samples])),
        box=torch.from_numpy(np.stack([s.cells.box for s in samples])),
    )
