"""Synthetic scenes and clips with ground truth: colored shapes and icons on random backgrounds.

Training, tests, the demo and the notebooks use them. Dependencies are imported on first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moondream_cv._lazy import lazy_names

if TYPE_CHECKING:
    from .alternate import render_alternate
    from .clips import Clip, TrackedObject, render_clip
    from .render import render_scene
    from .scene import Scene, SceneObject
    from .world import ALL_NAMES, COLORED_SHAPES, COLORS, ICONS, SHAPES, plural, with_article

__all__ = [
    "ALL_NAMES",
    "COLORED_SHAPES",
    "COLORS",
    "ICONS",
    "SHAPES",
    "Clip",
    "Scene",
    "SceneObject",
    "TrackedObject",
    "plural",
    "render_alternate",
    "render_clip",
    "render_scene",
    "with_article",
]

_SUBMODULES = {
    "ALL_NAMES": "world",
    "COLORED_SHAPES": "world",
    "COLORS": "world",
    "Clip": "clips",
    "ICONS": "world",
    "SHAPES": "world",
    "Scene": "scene",
    "SceneObject": "scene",
    "TrackedObject": "clips",
    "plural": "world",
    "render_alternate": "alternate",
    "render_clip": "clips",
    "render_scene": "render",
    "with_article": "world",
}

__getattr__, __dir__ = lazy_names(
    __name__, _SUBMODULES, renamed={"COLOURED_SHAPES": "COLORED_SHAPES", "COLOURS": "COLORS"}
)
