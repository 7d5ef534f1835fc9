"""Training examples of the tiny model: questions and answers generated from the ground truth of a scene.

An `Example` has text and objects; `training/packing.py` converts it to tokens. Objects are always listed from left to
right by center, so that the order of the reply is predictable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moondream_cv.scenes.render import Scene, SceneObject
from moondream_cv.scenes.world import COLORS, ICONS, SHAPES, listing, plural, short_caption, with_article

Box = tuple[float, float, float, float]  # x center, y center, width, height, as fractions of the image
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


@dataclass(frozen=True)
class Example:
    """One request and its target reply.

    Attributes:
        skill: "detect", "point", "query", "reason" or a caption length ("short", "normal", "long").
        prompt: Object name or question; empty for captions.
        answer: Text of the reply.
        boxes: Boxes of the reply for detect and point; boxes that ground the reasoning.
        refs: Spatial references of a question, (x, y) or (x, y, width, height), as fractions.
        grounded: Words of the reasoning that refer to the boxes.
    """

    skill: str
    prompt: str = ""
    answer: str = ""
    boxes: tuple[Box, ...] = ()
    refs: tuple[tuple[float, ...], ...] = ()
    grounded: str = ""


def write_examples(scene: Scene, rng: np.random.Generator, count: int, regions_only: bool = False) -> list[Example]:
    """Draw random examples for a scene.

    Args:
        scene: Scene with ground truth.
        rng: Source of randomness.
        count: Number of examples.
        regions_only: Draw detect and point examples only.
    """
    view = _View(scene)
    examples = []
    for _ in range(count):
        if regions_only or rng.random() < 0.4:
            examples.append(_region_example(view, rng))
        else:
            make_example = _EXAMPLE_KINDS[rng.choice(len(_EXAMPLE_KINDS), p=_WEIGHTS)]
            examples.append(make_example(view, rng) or _region_example(view, rng))
    return examples


class _View:
    """The objects of a scene from left to right, with boxes as fractions of the image."""

    def __init__(self, scene: Scene) -> None:
        width, height = scene.resolution_wh
        self.objects = sorted(scene.objects, key=lambda o: o.center[0])
        self.boxes = [
            (
                o.center[0] / width,
                o.center[1] / height,
                (o.xyxy[2] - o.xyxy[0]) / width,
                (o.xyxy[3] - o.xyxy[1]) / height,
            )
            for o in self.objects
        ]

    def boxes_of(self, name: str) -> tuple[Box, ...]:
        """Return the boxes of a name: a full name, a shape in any color, or "object" for all."""
        pairs = zip(self.objects, self.boxes, strict=True)
        return tuple(box for item, box in pairs if name == "object" or item.matches(name))

    def most_frequent_name(self) -> str | None:
        """Return the most frequent name; counting single objects teaches little."""
        names = [o.name for o in self.objects]
        return max(names, key=names.count, default=None)

    def pick(self, rng: np.random.Generator) -> tuple[SceneObject, Box] | None:
        """Draw an object and its box; None if the scene is empty."""
        if not self.objects:
            return None
        index = int(rng.integers(len(self.objects)))
        return self.objects[index], self.boxes[index]


def _present(view: _View, rng: np.random.Generator) -> str | None:
    picked = view.pick(rng)
    if picked is None:
        return None
    if rng.random() < 0.03:
        return "object"
    item = picked[0]
    return item.shape if item.kind == "icon" or rng.random() < 0.35 else item.name


def _absent(view: _View, rng: np.random.Generator) -> str:
    """Draw a name that is not in the scene, mostly a near miss of an object in it."""
    for _ in range(20):
        picked, draw = view.pick(rng), rng.random()
        if picked and picked[0].color and draw < 0.6:
            item = picked[0]
            if draw < 0.3:
                name = f"{rng.choice(list(COLORS))} {item.shape}"
            else:
                name = f"{item.color} {rng.choice(SHAPES)}"
        elif draw < 0.8:
            name = str(rng.choice(ICONS))
        else:
            shape = str(rng.choice(SHAPES))
            name = shape if rng.random() < 0.3 else f"{rng.choice(list(COLORS))} {shape}"
        if not view.boxes_of(name):
            return name
    return "key" if not view.boxes_of("key") else "cup"


def _name(view: _View, rng: np.random.Generator) -> str:
    present = _present(view, rng) if rng.random() < 0.55 else None
    return present or _absent(view, rng)


def _region_example(view: _View, rng: np.random.Generator) -> Example:
    name = _name(view, rng)
    asked = plural(name) if rng.random() < 0.05 else name
    return Example("detect" if rng.random() < 0.6 else "point", asked, boxes=view.boxes_of(name))


def _count_example(view: _View, rng: np.random.Generator) -> Example:
    draw = rng.random()
    name = view.most_frequent_name() if draw < 0.55 else _present(view, rng) if draw < 0.85 else None
    name = name or _absent(view, rng)
    boxes = view.boxes_of(name)
    templates = ("How many {} are there?", "How many {}?", "how many {} are there?", "Count the {}.")
    words = plural(name)
    question = str(rng.choice(templates, p=(0.5, 0.2, 0.2, 0.1))).format(words)
    if rng.random() < 0.1:
        return Example("reason", question, str(len(boxes)), boxes, grounded=f" {words}")
    return Example("query", question, str(len(boxes)))


def _color_example(view: _View, rng: np.random.Generator) -> Example | None:
    shapes = [o for o in view.objects if o.color]
    unique = [o for o in shapes if sum(o.shape == other.shape for other in shapes) == 1]
    if not unique:
        return None
    item = unique[int(rng.integers(len(unique)))]
    templates = ("What colour is the {}?", "What color is the {}?", "what colour is the {}?")
    return Example("query", str(rng.choice(templates, p=(0.5, 0.3, 0.2))).format(item.shape), str(item.color))


def _identity_example(view: _View, rng: np.random.Generator) -> Example | None:
    picked = view.pick(rng)
    if picked is None:
        return None
    item, (x, y, w, h) = picked
    if rng.random() < 0.7:
        reach = float(rng.choice((0.0, 0.25)))
        ref: tuple[float, ...] = (x + w * float(rng.uniform(-reach, reach)), y + h * float(rng.uniform(-reach, reach)))
    else:
        ref = (x, y, w, h)
    question = str(rng.choice(("What is this?", "what is this?", "What colour is this?"), p=(0.6, 0.3, 0.1)))
    if "colour" in question and item.color is None:
        question = "What is this?"
    return Example("query", question, str(item.color) if "colour" in question else item.name, refs=(ref,))


def _existence_example(view: _View, rng: np.random.Generator) -> Example:
    name = _name(view, rng)
    answer = "yes" if view.boxes_of(name) else "no"
    return Example("query", str(rng.choice(("Is there {}?", "is there {}?"))).format(with_article(name)), answer)


def _caption_example(view: _View, rng: np.random.Generator) -> Example | None:
    count = len(view.objects)
    if count > 6:
        return None
    names = [o.name for o in view.objects]
    draw = rng.random()
    if draw < 0.7:
        return Example("short", answer=short_caption(names))
    counted = "There is 1 object" if count == 1 else f"There are {count} objects"
    if draw < 0.9 or count > 4:
        body = f": {listing([with_article(n) for n in names])}." if names else "."
        return Example("normal", answer=counted + body)
    places = [f"{_capitalize(with_article(n))} at the {_place(b)}." for n, b in zip(names, view.boxes, strict=True)]
    return Example("long", answer=" ".join([counted + ".", *places]))


def _place(box: Box) -> str:
    row, column = ROWS[min(int(box[1] * 3), 2)], COLUMNS[min(int(box[0] * 3), 2)]
    return "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


_EXAMPLE_KINDS: tuple[Callable[[_View, np.random.Generator], Example | None], ...] = (
    _count_example,
    _color_example,
    _identity_example,
    _existence_example,
    _caption_example,
)
_WEIGHTS = (0.52, 0.08, 0.16, 0.06, 0.18)
