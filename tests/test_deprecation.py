"""Deprecated names work with one `FutureWarning` that names the caller's line and the new name."""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from moondream_cv._deprecation import renamed_arguments, renamed_attribute, renamed_function
from moondream_cv._lazy import lazy_names


@renamed_arguments(colour_by="color_by")
def draw(image: str, color_by: str = "class") -> tuple[str, str]:
    return image, color_by


@renamed_arguments(memory="lost_track_seconds")
@dataclass(frozen=True)
class Options:
    lost_track_seconds: float = 10.0
    memory = renamed_attribute("Options.memory", "lost_track_seconds")


class Model:
    def detect_each(self, frame: str) -> str:
        """Detect objects."""
        return frame

    attempt = renamed_function("Model.attempt", "Model.detect_each", detect_each)


@pytest.fixture(autouse=True)
def warnings_here() -> Iterator[None]:
    """Check that every warning names this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert {warning.filename for warning in caught} <= {__file__}


def test_deprecated_arguments_set_the_current_ones() -> None:
    with pytest.warns(
        FutureWarning, match=r"colour_by is deprecated .* removed in moondream-cv 0\.2; use color_by"
    ) as seen:
        assert draw("frame", colour_by="id") == ("frame", "id")  # type: ignore[call-arg]
    assert seen[0].filename == __file__
    with pytest.warns(FutureWarning, match="use lost_track_seconds") as seen:
        assert Options(memory=3.0).lost_track_seconds == 3.0  # type: ignore[call-arg]
    assert seen[0].filename == __file__


def test_current_arguments_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw("frame", color_by="id") == ("frame", "id")
        assert Options(3.0).lost_track_seconds == 3.0


def test_both_names_of_an_argument_raise() -> None:
    with pytest.raises(TypeError, match="colour_by and color_by are the same argument; pass color_by only"):
        draw("frame", colour_by="id", color_by="id")  # type: ignore[call-arg]


def test_help_shows_the_current_arguments_only() -> None:
    assert list(inspect.signature(draw).parameters) == ["image", "color_by"]
    assert list(inspect.signature(Options).parameters) == ["lost_track_seconds"]
    assert [field.name for field in fields(Options)] == ["lost_track_seconds"]


def test_deprecated_attributes_and_methods_use_the_current_ones() -> None:
    with pytest.warns(FutureWarning, match=r"Options\.memory is deprecated .* use Options\.lost_track_seconds") as seen:
        assert Options(3.0).memory == 3.0
    assert seen[0].filename == __file__
    with pytest.warns(FutureWarning, match=r"Model\.attempt is deprecated .* use Model\.detect_each") as seen:
        assert Model().attempt("frame") == "frame"
    assert seen[0].filename == __file__


def test_deprecated_names_of_a_lazy_package_resolve_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("lazy_package")
    submodule = types.ModuleType("lazy_package.names")
    submodule.track_streams = draw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lazy_package", package)
    monkeypatch.setitem(sys.modules, "lazy_package.names", submodule)
    package.__path__ = []
    package.__getattr__, package.__dir__ = lazy_names(  # type: ignore[method-assign,assignment]
        "lazy_package", {"track_streams": "names"}, {"watch": "track_streams"}
    )
    with pytest.warns(
        FutureWarning, match=r"lazy_package\.watch is deprecated .* use lazy_package\.track_streams"
    ) as seen:
        assert package.watch is draw
    assert seen[0].filename == __file__
    assert package.track_streams is draw
    assert "watch" not in dir(package)
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_old_names_of_models_and_scenes_work_with_a_warning() -> None:
    from moondream_cv import scenes
    from moondream_cv.engine.scheduler import Limits

    with pytest.warns(FutureWarning, match=r"Limits: the argument rows is deprecated .*; use max_num_seqs"):
        limits = Limits(rows=8)
    assert limits == Limits(max_num_seqs=8)
    with pytest.warns(FutureWarning, match=r"Limits\.images is deprecated .*; use Limits\.max_images"):
        limits.images = 3
    assert limits.max_images == 3
    with pytest.warns(FutureWarning, match=r"scenes\.COLOURS is deprecated .*; use moondream_cv\.scenes\.COLORS"):
        assert scenes.COLOURS is scenes.COLORS


def test_old_name_of_preprocess_image_works_with_a_warning() -> None:
    from moondream_cv.engine.local_model import LocalModel
    from tests.helpers.models import random_model

    image = np.zeros((40, 60, 3), np.uint8)
    with pytest.warns(FutureWarning, match=r"LocalModel\.prepare_image is deprecated .*; use LocalModel\.preprocess_"):
        preprocessed = LocalModel.prepare_image(random_model(), image)
    assert preprocessed.size == (60, 40)


def test_replace_of_a_dataclass_accepts_the_old_argument() -> None:
    with pytest.warns(FutureWarning, match="Options: the argument memory is deprecated"):
        assert replace(Options(1.0), memory=4.0) == Options(4.0)  # type: ignore[call-arg]


def test_old_names_of_scene_objects_work_with_a_warning() -> None:
    from moondream_cv.scenes import SceneObject

    circle = SceneObject.from_name("red circle", (0.0, 0.0, 4.0, 2.0))
    with pytest.warns(FutureWarning, match=r"SceneObject\.colour is deprecated .*; use SceneObject\.color"):
        assert circle.colour == "red"
    with pytest.warns(FutureWarning, match=r"SceneObject\.centre is deprecated .*; use SceneObject\.center"):
        assert circle.centre == (2.0, 1.0)
    with pytest.warns(FutureWarning, match=r"SceneObject\.answers is deprecated .*; use SceneObject\.matches"):
        assert circle.answers("circle")
