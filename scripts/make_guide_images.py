"""Draw the pictures of the README, the home page, the guides and the reference.

    python scripts/make_guide_images.py             # all pictures, about a minute
    python scripts/make_guide_images.py zones.jpg   # one picture

Repeated runs draw the same pictures.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import cv2
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from docs_images import BLUE, ORANGE, draw_grid, draw_selected, read_picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from typer.testing import CliRunner

from moondream_cv import Detector, Pointer
from moondream_cv.cli import app
from moondream_cv.drawing import annotate
from moondream_cv.engine.crops import cut_crops, resize_with_pillow
from moondream_cv.model.config import VisionConfig
from moondream_cv.scenes import render_clip, render_scene
from moondream_cv.scenes.hard import render_hard
from moondream_cv.video import Annotator, Tracking, Zones, track_streams

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "full_size-avx512_bf16.json"

CLIP_CLASSES = ("dog", "car", "red circle", "bus")
CLIP_FRAMES, CLIP_FRAME, ZONES_FRAME = 90, 60, 72
ANNOTATIONS = ("box,label", "box,label,trace", "dot", "blur", "pixelate", "none")
ZONES = {
    "normalized": True,
    "lines": [{"name": "gate", "start": [0.36, 0.52], "end": [0.36, 0.08]}],
    "zones": [{"name": "bay", "polygon": [[0.25, 0.66], [0.75, 0.66], [0.75, 0.99], [0.25, 0.99]]}],
}
REQUEST_STEPS = {  # left, bottom, width and text of each box
    "Detector": (1, 20, 18, "images × class names"),
    "Scheduler": (25, 20, 18, "waiting requests"),
    "Image encoding": (25, 2, 18, "crops, vision encoder"),
    "prefill_images": (48, 2, 18, "KV cache of an image,\nshared by its requests"),
    "ModelRunner": (71, 2, 18, "decode step of\nall sequences"),
    "Sequences": (71, 20, 18, "heads, next inputs, end"),
    "Results": (94, 20, 15, "sv.Detections"),
}
REQUEST_ARROWS = (  # x and y of the start and the end
    ((19.5, 24.5), (24.5, 24.5)),
    ((34, 19.5), (34, 11.5)),
    ((43.5, 6.5), (47.5, 6.5)),
    ((66.5, 6.5), (70.5, 6.5)),
    ((83.5, 11.5), (83.5, 19.5)),
    ((75.5, 19.5), (75.5, 11.5)),
    ((89.5, 24.5), (93.5, 24.5)),
)
SECURITY_PARTS = {
    "Clients": (1, 20, 20, "requests, image data"),
    "Other hosts": (1, 2, 20, "images by URL"),
    "Server process": (38, 11, 20, "keys, limits, schemas;\nonly public addresses"),
    "Decoder processes": (67, 20, 18, "limits on time\nand pixels"),
    "Model process": (67, 2, 18, "weights are data,\nnever code"),
    "Hub": (95, 2, 14, "checkpoints"),
}
SECURITY_ARROWS = (
    ((21.5, 24.5), (37.5, 17.5)),
    ((21.5, 6.5), (37.5, 13.5)),
    ((58.5, 17.5), (66.5, 23)),
    ((58.5, 13.5), (66.5, 8)),
    ((94.5, 6.5), (85.5, 6.5)),
)
UNTRUSTED = ("Clients", "Other hosts")
MODES = ("float32", "bfloat16", "int8", "int4")


def demo_image(name: str) -> Image.Image:
    """Return an image that `moondream-cv demo` writes."""
    with tempfile.TemporaryDirectory() as folder:
        result = CliRunner().invoke(app, ["demo", "--output", folder])
        if result.exit_code:
            raise SystemExit(result.stderr)
        return read_picture(Path(folder, name))


def draw_overview() -> Image.Image:
    """Return the results of the demo on its four scenes."""
    return demo_image("overview.png")


def draw_tracked() -> Image.Image:
    """Return six frames of the clip of the demo."""
    return demo_image("tracked.png")


def draw_boxes_and_points() -> Image.Image:
    """Return the boxes of a `Detector` and the points of a `Pointer` on one scene."""
    names = ("dog", "cat", "red circle")
    image = Image.fromarray(render_scene(8, names=("dog", "dog", "cat", "red circle"), resolution_wh=(480, 360)).image)
    with Detector("tiny", device="cpu") as detector:
        results = [detector(image, names), Pointer(detector.model)(image, names)]
    return draw_grid([[annotate(image, found) for found in results]], [], width=480)


def draw_crops() -> Figure:
    """Return an image with the borders of its local crops, next to its global crop."""
    config = VisionConfig()
    rgb = render_scene(4, num_objects=7, resolution_wh=(640, 480)).image
    crops = cut_crops(rgb, config)
    rows, columns = crops.tiling
    size, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size
    window = size - margin
    resized = resize_with_pillow(rgb, columns * window + margin, rows * window + margin)

    # Draw the crops, every second one in another color
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=[resized.shape[1], size * 1.1]
    )
    axes[0].imshow(resized)
    axes[0].set_title(f"{rows * columns} local crops of the image, enlarged to {resized.shape[1]}×{resized.shape[0]}")
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        inset = 4 * ((row + column) % 2)
        corner = (column * window + inset, row * window + inset)
        side, color = size - 1 - 2 * inset, (BLUE, ORANGE)[(row + column) % 2]
        axes[0].add_patch(plt.Rectangle(corner, side, side, fill=False, ec=color, lw=2))
    axes[1].imshow(crops.pixels[0])
    axes[1].set_title(f"Global crop, {size}×{size}")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def draw_annotations() -> Image.Image:
    """Return a frame with each kind of annotation."""
    annotators = [Annotator(kinds, CLIP_CLASSES) for kinds in ANNOTATIONS]
    drawn: Sequence[npt.NDArray[np.uint8]] = ()
    with Detector("tiny", device="cpu") as detector:
        stream = track_streams(
            [clip_frames()], CLIP_CLASSES, model=detector.model, every=5, fps=30, tracking=Tracking(redact=True)
        )
        for tracked in stream:
            drawn = [
                annotator(tracked.frame.image, tracked.detections, tracked.frame.time, tracked.redaction)
                if "blur" in kinds or "pixelate" in kinds
                else annotator(tracked.frame.image, tracked.detections, tracked.frame.time)
                for annotator, kinds in zip(annotators, ANNOTATIONS, strict=True)
            ]
            if tracked.frame.index == CLIP_FRAME:
                break
    images = [Image.fromarray(np.ascontiguousarray(image[..., ::-1])) for image in drawn]
    titles = [[f'annotate="{kinds}"' for kinds in ANNOTATIONS[start : start + 3]] for start in (0, 3)]
    return draw_grid([images[:3], images[3:]], titles, width=370)


def draw_zones() -> Image.Image:
    """Return a frame with a line, a zone, and the panel of counts."""
    zones = Zones.from_dict(ZONES)
    annotator = Annotator("box,label,trace", CLIP_CLASSES, zones=zones, panel=True)
    with Detector("tiny", device="cpu") as detector:
        for tracked in track_streams([clip_frames()], CLIP_CLASSES, model=detector.model, every=5, fps=30):
            frame = tracked.frame.image
            zones.update(tracked.detections, (frame.shape[1], frame.shape[0]))
            drawn = annotator(frame, tracked.detections, tracked.frame.time)
            if tracked.frame.index == ZONES_FRAME:
                break
    return Image.fromarray(np.ascontiguousarray(drawn[..., ::-1]))


def clip_frames() -> list[npt.NDArray[np.uint8]]:
    """Return the BGR frames of a rendered clip."""
    clip = render_clip(7, num_frames=CLIP_FRAMES, names=CLIP_CLASSES, resolution_wh=(640, 400))
    return [cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR) for rgb, _ in clip.frames()]


def draw_scenes() -> Image.Image:
    """Return scenes of the training renderer, and difficult scenes."""
    size = (400, 300)
    easy = [Image.fromarray(render_scene(seed, resolution_wh=size).image) for seed in range(3)]
    hard = [Image.fromarray(render_hard(seed, resolution_wh=size).image) for seed in (5, 12, 16)]
    return draw_grid([easy, hard], [["render_scene"], ["render_hard"]], width=370)


def draw_performance() -> Figure:
    """Return the measured encoding times and decoding rates of each mode."""
    measures = json.loads(RESULTS.read_text())["measures"]
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    draw_bars(axes[0], "Encode a 640×480 image (s)", [measures[f"{mode}: encode 640x480 (s)"] for mode in MODES])
    for axis, batch in zip(axes[1:], (1, 8), strict=True):
        values = [measures[f"{mode}: tokens/s, batch of {batch}"] for mode in MODES]
        draw_bars(axis, f"Tokens/s, {batch} sequence{'s' if batch > 1 else ''}", values)
    return figure


def draw_bars(axis: Axes, title: str, values: Sequence[float]) -> None:
    """Draw a horizontal bar with its value for each mode."""
    bars = axis.barh(MODES, values, color=BLUE, height=0.6)
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.invert_yaxis()
    axis.set(title=title, xticks=[], xlim=(0, 1.2 * max(values)))
    axis.spines["bottom"].set_visible(False)


def draw_request() -> Figure:
    """Return a diagram of the life of a request."""
    figure, axis = draw_diagram(REQUEST_STEPS, REQUEST_ARROWS)
    axis.text(74, 16.2, "one step", fontsize=9, ha="right", va="center")
    axis.text(84.5, 16.2, "outputs", fontsize=9, ha="left", va="center")
    return figure


def draw_security() -> Figure:
    """Return a diagram of the server's processes, and of the data that enters them."""
    figure, axis = draw_diagram(SECURITY_PARTS, SECURITY_ARROWS, untrusted=UNTRUSTED)
    axis.add_patch(FancyBboxPatch((34.5, 0.6), 54, 29.4, boxstyle="round,pad=0.4", fc="none", ec=BLUE, ls="--"))
    return figure


def draw_diagram(
    parts: Mapping[str, tuple[float, float, float, str]],
    arrows: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    untrusted: Collection[str] = (),
) -> tuple[Figure, Axes]:
    """Return a diagram of boxes and arrows, and its axes.

    Args:
        parts: Left, bottom, width and text of each box, by its title.
        arrows: x and y of the start and the end of each arrow.
        untrusted: Titles of the boxes in the color of untrusted data.
    """
    figure, axis = plt.subplots(figsize=(11, 3.1), layout="constrained")
    axis.set(xlim=(0, 110), ylim=(0, 31))
    axis.axis("off")
    for name, (x, y, width, text) in parts.items():
        fill, edge = ("#fdf0e3", ORANGE) if name in untrusted else ("#eef2fb", BLUE)
        axis.add_patch(FancyBboxPatch((x, y), width, 9, boxstyle="round,pad=0.4", fc=fill, ec=edge))
        axis.text(x + width / 2, y + 6.6, name, ha="center", va="center", weight="bold")
        axis.text(x + width / 2, y + 2.8, text, ha="center", va="center", fontsize=9)
    for start, end in arrows:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 1.5})
    return figure, axis


PICTURES: dict[str, Callable[[], Figure | Image.Image]] = {
    "overview.jpg": draw_overview,
    "tracked.jpg": draw_tracked,
    "boxes-and-points.jpg": draw_boxes_and_points,
    "crops.png": draw_crops,
    "annotations.jpg": draw_annotations,
    "zones.jpg": draw_zones,
    "scenes.jpg": draw_scenes,
    "performance.png": draw_performance,
    "request.png": draw_request,
    "security.png": draw_security,
}


def main() -> None:
    """Draw the pictures that the arguments name, or all."""
    draw_selected(PICTURES)


if __name__ == "__main__":
    main()
