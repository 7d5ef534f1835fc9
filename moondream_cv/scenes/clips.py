"""Video clips with ground truth: objects that drift, turn, cross, leave the frame and return.

A clip stores the motion of its objects and renders frames on demand; rendering a frame again returns the same image.
An object keeps its track ID for the whole clip, including the frames in which it is not visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .backgrounds import color_distance, make_background
from .objects import Patch, outlined, paint, stamp
from .sampling import near_miss, sample_name, with_colors
from .scene import SceneObject
from .sprites import icon_color
from .world import COLORS, split_name

Frame = tuple[npt.NDArray[np.uint8], tuple["TrackedObject", ...]]


@dataclass(frozen=True)
class TrackedObject(SceneObject):
    """One object in one frame of a clip.

    Attributes:
        track_id: Track ID within the clip, from 1, in drawing order: a higher ID is in front.
        visible: Share of the object's pixels that are inside the frame and not occluded, 0..1. The box is clipped to
            the frame but includes occluded parts.
    """

    track_id: int
    visible: float


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip whose frames are rendered on demand.

    Attributes:
        resolution_wh: Width and height of a frame in pixels.
        names: Name of each object by track ID: track 1 is ``names[0]``.
        class_names: Distinct names, sorted.
    """

    resolution_wh: tuple[int, int]
    names: tuple[str, ...]
    _patches: tuple[Patch, ...] = field(repr=False)
    _background: npt.NDArray[np.uint8] = field(repr=False)  # [H, W, 3] image that the camera pans over
    _corners: npt.NDArray[np.int64] = field(repr=False)  # [T, N, 2] left and top of each object in the world
    _camera: npt.NDArray[np.int64] = field(repr=False)  # [T, 2] left and top of the frame in the world

    @property
    def class_names(self) -> tuple[str, ...]:
        """Distinct names, sorted."""
        return tuple(sorted(set(self.names)))

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._camera)

    def __iter__(self) -> Iterator[Frame]:
        """Iterate over `frames`."""
        return self.frames()

    def frames(self) -> Iterator[Frame]:
        """Yield each frame, [H, W, 3] uint8 RGB, with the objects that overlap it, in the order of track IDs."""
        for index in range(len(self)):
            yield self.frame(index)

    def frame(self, index: int) -> Frame:
        """Render one frame.

        Args:
            index: 0-based frame number; negative numbers count from the end.

        Returns:
            The image, [H, W, 3] uint8 RGB, and the objects that overlap it, in the order of track IDs.
        """
        # Crop the background to the camera's view
        width, height = self.resolution_wh
        camera_x, camera_y = self._camera[index].tolist()
        image = self._background[camera_y : camera_y + height, camera_x : camera_x + width].copy()
        corners = (self._corners[index] - self._camera[index]).tolist()

        # Draw the objects
        owner = np.zeros((height, width), np.uint8)  # track ID of each pixel, 0 for the background
        boxes: dict[int, tuple[int, int, int, int]] = {}
        for track_id, (patch, (x, y)) in enumerate(zip(self._patches, corners, strict=True), start=1):
            stamp(image, patch, x, y)
            box = (max(0, x), max(0, y), min(width, x + patch.box[2]), min(height, y + patch.box[3]))
            if box[0] < box[2] and box[1] < box[3]:
                boxes[track_id] = box
                mask = _silhouette(patch)[box[1] - y : box[3] - y, box[0] - x : box[2] - x]
                owner[box[1] : box[3], box[0] : box[2]][mask] = track_id

        # Collect the ground truth
        counts = np.bincount(owner.ravel(), minlength=len(self.names) + 1)
        objects = []
        for track_id, (left, top, right, bottom) in boxes.items():
            name = self.names[track_id - 1]
            color, shape = split_name(name)
            objects.append(
                TrackedObject(
                    name=name,
                    kind="icon" if color is None else "shape",
                    shape=shape,
                    color=color,
                    xyxy=(float(left), float(top), float(right), float(bottom)),
                    track_id=track_id,
                    visible=float(counts[track_id] / _silhouette(self._patches[track_id - 1]).sum()),
                )
            )
        return image, tuple(objects)


def _silhouette(patch: Patch) -> npt.NDArray[np.bool_]:
    """Return a mask of the object within the visible box of its patch, [h, w] bool."""
    left, top, width, height = patch.box
    return np.asarray(patch.alpha[top : top + height, left : left + width] > 127)


def _camera_path(num_frames: int, travel: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return left and top of the frame in the world, [T, 2], oscillating over `travel` pixels in x and y."""
    time = np.arange(num_frames)[:, None]
    period = rng.uniform(150, 260, 2)  # frames
    swing = 0.5 - 0.5 * np.cos(2 * math.pi * (time / period + rng.random(2)))
    return np.rint(swing * travel).astype(np.int64)


def _paths(
    num_frames: int, world: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Simulate the motion of the objects: each bounces within its bounds, and every third one turns continuously.

    Args:
        num_frames: Number of frames T.
        world: [2] width and height of the world in pixels.
        sizes: [N, 2] width and height of the objects' boxes.
        rng: Source of randomness.

    Returns:
        Left and top of the boxes in the world, [T, N, 2].
    """
    # Draw bounds, positions and velocities
    count = len(sizes)
    low, high = np.full((count, 2), 1.0), world - sizes - 1
    # Every third object is a visitor: its bounds extend beyond the world in x, so it leaves and returns.
    visitors = np.arange(count) % 3 == 2
    low[visitors, 0] = -sizes[visitors, 0] - world[0] * 0.12
    high[visitors, 0] = world[0] * 1.12
    position = rng.uniform(np.maximum(low, 1), np.minimum(high, world - sizes - 1))
    heading = rng.uniform(0, 2 * math.pi, count)
    # With a nearly vertical heading, a visitor would never leave.
    heading[visitors] = rng.uniform(-0.4, 0.4, int(visitors.sum())) + math.pi * rng.integers(0, 2, int(visitors.sum()))
    speed = rng.uniform(0.003, 0.011, count) * world.min()
    velocity = np.stack([np.cos(heading), np.sin(heading)], 1) * speed[:, None]
    turn = np.where(np.arange(count) % 3 == 1, rng.uniform(-0.03, 0.03, count), 0.0)  # radians per frame

    # Step through the frames
    cos, sin = np.cos(turn), np.sin(turn)
    path = np.empty((num_frames, count, 2))
    for index in range(num_frames):
        path[index] = position
        velocity = np.stack(
            [velocity[:, 0] * cos - velocity[:, 1] * sin, velocity[:, 0] * sin + velocity[:, 1] * cos], 1
        )
        position = position + velocity
        outside = (position < low) | (position > high)
        velocity = np.where(outside, np.where(position < low, np.abs(velocity), -np.abs(velocity)), velocity)
        position = np.clip(position, low, high)
    return np.rint(path).astype(np.int64)


def _class_names(rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct class names; the second is a near miss of the first."""
    names = [sample_name(rng)]
    while len(names) < count:
        name = near_miss(rng, names[0]) if len(names) == 1 else sample_name(rng)
        if name not in names:
            names.append(name)
    return names


def _backdrop(
    rng: np.random.Generator, size_wh: tuple[int, int], colors: Sequence[tuple[float, float, float]]
) -> tuple[npt.NDArray[np.uint8], float]:
    """Draw a background that contrasts with the given colors.

    Returns:
        The background, and the share of it that is too similar to one of the colors, 0..1: the worst color counts.
    """
    best: tuple[float, npt.NDArray[np.uint8] | None] = (2.0, None)
    for _ in range(8):
        image = make_background(rng, size_wh, colors)
        sample = image[::16, ::16]
        hidden = max(float((color_distance(sample, color) < 120).mean()) for color in colors)
        if hidden < best[0]:
            best = (hidden, image)
        if hidden < 0.01:
            break
    assert best[1] is not None, "a share is at most 1"
    return best[1], best[0]


def render_clip(
    seed: int,
    *,
    num_frames: int = 300,
    num_objects: int = 8,
    num_classes: int = 3,
    resolution_wh: tuple[int, int] = (640, 480),
    pan: bool = False,
    names: Sequence[str] | None = None,
) -> Clip:
    """Create a clip. Its frames are rendered on demand.

    Args:
        seed: Seed that determines the clip.
        num_frames: Number of frames.
        num_objects: Number of objects, 1 to 255.
        num_classes: Number of distinct names, 1 to `num_objects`.
        resolution_wh: Width and height of a frame in pixels.
        pan: Pan the camera over a world 1.5 times as wide as the frame.
        names: Name of each object in the order of track IDs, instead of `num_objects` and `num_classes`. A shape
            without a color gets a random one.

    Raises:
        ValueError: A number is out of range, or a name is unknown.
    """
    # Choose the objects
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    rng = np.random.default_rng(seed)
    if names is None:
        if not 1 <= num_classes <= num_objects <= 255:
            raise ValueError(
                f"must have 1 <= num_classes <= num_objects <= 255, got num_classes={num_classes}, "
                f"num_objects={num_objects}"
            )
        classes = _class_names(rng, num_classes)
        chosen = [classes[index % num_classes] for index in range(num_objects)]
        rng.shuffle(chosen)
    else:
        if not 1 <= len(names) <= 255:
            raise ValueError(f"names must have 1 to 255 names, got {len(names)}")
        chosen = with_colors(rng, names)

    # Draw the background
    frame_wh = np.array(resolution_wh, np.float64)
    travel = np.rint(frame_wh * (0.5, 0.15)) if pan else np.zeros(2)
    world = frame_wh + travel
    parts = [split_name(name) for name in chosen]
    colors = [icon_color(shape) if color is None else COLORS[color] for color, shape in parts]
    background, hidden = _backdrop(rng, (int(world[0]), int(world[1])), colors)

    # Draw the objects
    sizes = (rng.uniform(0.1, 0.24, len(chosen)) * frame_wh.min()).tolist()
    patches = tuple(paint(name, size, rng) for name, size in zip(chosen, sizes, strict=True))
    if hidden > 0.05:
        level = 20 if background.mean() > 128 else 245
        patches = tuple(outlined(patch, (level, level, level), 2) for patch in patches)
    extents = np.array([patch.box[2:] for patch in patches], np.float64)
    return Clip(
        resolution_wh=resolution_wh,
        names=tuple(chosen),
        _patches=patches,
        _background=background,
        _corners=_paths(num_frames, world, extents, rng),
        _camera=_camera_path(num_frames, travel, rng),
    )
