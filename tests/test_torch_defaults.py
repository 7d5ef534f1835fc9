"""Replies do not depend on global settings of torch: default dtype, default device, autocast."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moondream_cv
from moondream_cv import load
from moondream_cv.detector import Detector
from moondream_cv.engine.local_model import LocalModel
from tests.test_parity import GOLDEN, replies

IMAGE = "4_50x40.png"
PACKAGE = Path(moondream_cv.__file__).parent
CHANGED = {
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "meta": {"device": "meta"},  # a tensor on the default device fails when it is read
    "float64, meta": {"dtype": torch.float64, "device": "meta"},
    "autocast": {"autocast": torch.bfloat16},
}


@contextmanager
def changed_defaults(
    dtype: torch.dtype | None = None, device: str | None = None, autocast: torch.dtype | None = None
) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        torch.set_default_device(device)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.fixture(params=CHANGED, ids=str)
def _changed(request: pytest.FixtureRequest) -> Iterator[None]:
    with changed_defaults(**CHANGED[request.param]):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_changed")
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_replies_equal_the_published_ones(name: str) -> None:
    model = load(GOLDEN / name, device="cpu", dtype="float32")
    expected = json.loads((GOLDEN / name / "expected.json").read_text())["images"][IMAGE]
    got = replies(model, str(GOLDEN / name / "images" / IMAGE))
    assert got == {skill: expected[skill] for skill in got}


@pytest.mark.slow
@pytest.mark.usefixtures("_changed")
def test_replies_with_an_adapter_equal_the_published_ones() -> None:
    folder = GOLDEN / "mha"
    model = load(folder, device="cpu", dtype="float32", adapter=folder / "adapter.pt")
    name = "1_640x480.png"
    expected = json.loads((folder / "expected.json").read_text())["adapter"]["images"][name]
    got = replies(model, str(folder / "images" / name))
    for skill, value in expected.items():
        assert {key: got[skill][key] for key in value} == value, skill


def everything(model: LocalModel, frame: np.ndarray) -> list[Any]:
    """Return replies of all skills, sampled and greedy, with confidences, and a re-encoded frame."""
    sampled = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 12, "seed": 3}
    first = model.encode_image(frame)
    moved = frame.copy()
    moved[:40, :40] = 0
    return [
        model.detect(frame, "dog", {"max_objects": 4}),
        model.point(frame, "dog", {"max_objects": 4}),
        model.query(frame, "what?", settings=sampled),
        model.query(frame, "what?", reasoning=True, settings=sampled),
        model.query(frame, "this?", spatial_refs=[(0.2, 0.3), (0.1, 0.2, 0.4, 0.6)], settings=sampled),
        model.query(question="why?", settings=sampled),
        model.caption(frame, settings=sampled),
        model.detect_gaze(frame, (0.5, 0.25), unstable_settings={"force_detect": True}),
        model.point(model.encode_image(moved, previous=first), "dog", {"max_objects": 4}),
        "".join(model.caption(frame, stream=True, settings=sampled)["caption"]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_tiny_model_does_not_depend_on_defaults(changed: dict[str, Any], frame: np.ndarray) -> None:
    expected = everything(load("tiny", device="cpu"), frame)
    with changed_defaults(**changed):
        assert everything(load("tiny", device="cpu"), frame) == expected


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_unseeded_sampling_repeats_after_manual_seed(changed: dict[str, Any], frame: np.ndarray) -> None:
    model = load("tiny", device="cpu")

    def sample() -> str:
        torch.manual_seed(5)
        return str(model.caption(frame, settings={"temperature": 1.0, "top_p": 1.0, "max_tokens": 12})["caption"])

    expected = sample()
    with changed_defaults(**changed):
        assert sample() == expected


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_detections_do_not_depend_on_defaults(changed: dict[str, Any], frame: np.ndarray) -> None:
    expected = Detector("tiny", device="cpu")(frame, ["circle", "star"])
    with changed_defaults(**changed):
        got = Detector("tiny", device="cpu")(frame, ["circle", "star"])
    assert np.array_equal(got.xyxy, expected.xyxy)
    assert np.array_equal(got.confidence, expected.confidence)


FACTORIES = {"tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "linspace", "eye"}


def implicit_defaults(source: str) -> list[str]:
    """Return the calls of torch's factories without an explicit device or dtype.

    Parameters of modules are left out: they follow the defaults as those of torch's own modules do, and checkpoints
    replace them.
    """
    tree = ast.parse(source)
    parameters = {id(node) for call in ast.walk(tree) if _name(call) == "Parameter" for node in ast.walk(call)}
    found = []
    for call in ast.walk(tree):
        name = _name(call)
        if not isinstance(call, ast.Call) or name not in FACTORIES or not ast.unparse(call.func).startswith("torch."):
            continue
        given = {keyword.arg for keyword in call.keywords}
        needed = {"device", "dtype"} - ({"dtype"} if name in ("arange", "randint") else set())
        if not needed <= given and id(call) not in parameters:
            found.append(ast.unparse(call))
    return found


def _name(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else ""


def test_no_tensor_is_made_with_implicit_defaults() -> None:
    assert implicit_defaults(
        "torch.zeros(3, device=d)\ntorch.arange(3)\ntorch.tensor(1.0, device=d)\nnn.Parameter(torch.empty(3))"
    ) == [
        "torch.zeros(3, device=d)",
        "torch.arange(3)",
        "torch.tensor(1.0, device=d)",
    ]
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if (calls := implicit_defaults(path.read_text(encoding="utf-8")))
    }
    assert found == {}
