"""Test answers and captions as inputs of Roboflow's parsers of language model output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moondream_cv_blocks import ModelPool
from tests.helpers.remote_server import RemoteServer, Reply, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import compile_workflow, run_engine, run_workflow, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

CLASSES = ["dog", "bus"]
QUESTION = 'Classify the image as dog or bus. Reply with JSON: {"class_name": "...", "confidence": 0.0}'
TEXTS = {"query": "answer", "caption": "caption"}
every_text = pytest.mark.parametrize("block", TEXTS)
every_notation = pytest.mark.parametrize("notation", ["{}", "```json\n{}\n```"], ids=["JSON", "Markdown"])

ONE_CLASS = {"class_name": "bus", "confidence": 0.75}
SEVERAL_CLASSES = {"predicted_classes": [{"class": "dog", "confidence": 0.5}, {"class": "bus", "confidence": 0.25}]}
BOXES = {
    "detections": [{"x_min": 0.25, "y_min": 0.5, "x_max": 0.5, "y_max": 1.0, "class_name": "bus", "confidence": 0.75}]
}


def core(block: str, **fields: Any) -> dict[str, Any]:
    """Return a step `parser` with one of Roboflow's blocks, such as "json_parser@v1"."""
    return {"type": f"roboflow_core/{block}", "name": "parser", **fields}


def parsed_by(parser: dict[str, Any], block: str, model: str) -> dict[str, Any]:
    """Return a workflow that generates text in a step `text`, followed by a parser."""
    question = {"question": QUESTION} if block == "query" else {}
    return workflow(step(block, "text", model=model, **question), parser)


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    """Start a server with the models route of `moondream-cv serve`; `parse` sets its answers."""
    with remote_server() as running:
        yield running.on("/v1/models", Reply({"models": [{"id": "any"}]}))


def parse(server: RemoteServer, block: str, parser: dict[str, Any], text: str, image: np.ndarray) -> dict[str, Any]:
    """Return the outputs of a parser for an answer or caption of the server."""
    server.on("/v1/query", Reply({"answer": text})).on("/v1/caption", Reply({"caption": text}))
    engine = compile_workflow(parsed_by(parser, block, server.url), **{"moondream_cv_blocks.models": ModelPool()})
    (outputs,) = run_engine(engine, image)
    return outputs


def json_parser(block: str) -> dict[str, Any]:
    return core("json_parser@v1", raw_json=f"$steps.text.{TEXTS[block]}", expected_fields=["class_name", "confidence"])


def vlm(parser: str, block: str, **fields: Any) -> dict[str, Any]:
    selector = f"$steps.text.{TEXTS[block]}"
    return core(parser, image="$inputs.image", vlm_output=selector, classes=CLASSES, **fields)


@every_text
@every_notation
def test_json_parser_parses_text(block: str, notation: str, server: RemoteServer, bgr: np.ndarray) -> None:
    text = notation.replace("{}", json.dumps(ONE_CLASS))
    assert parse(server, block, json_parser(block), text, bgr) == {**ONE_CLASS, "error_status": False}


@every_text
@every_notation
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_vlm_as_classifier_parses_text(
    block: str, notation: str, version: str, server: RemoteServer, bgr: np.ndarray
) -> None:
    parser = vlm(f"vlm_as_classifier@{version}", block)
    one = parse(server, block, parser, notation.replace("{}", json.dumps(ONE_CLASS)), bgr)
    assert one["error_status"] is False
    assert (one["predictions"]["top"], one["predictions"]["confidence"]) == ("bus", 0.75)
    several = parse(server, block, parser, notation.replace("{}", json.dumps(SEVERAL_CLASSES)), bgr)
    assert several["predictions"]["predicted_classes"] == ["dog", "bus"]


@every_text
@every_notation
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_vlm_as_detector_parses_text(
    block: str, notation: str, version: str, server: RemoteServer, bgr: np.ndarray
) -> None:
    fields = {"model_type": "anthropic-claude", "task_type": "object-detection"}
    parser = vlm(f"vlm_as_detector@{version}", block, **fields)
    outputs = parse(server, block, parser, notation.replace("{}", json.dumps(BOXES)), bgr)
    assert outputs["error_status"] is False
    assert outputs["predictions"].xyxy.tolist() == [[80, 120, 160, 240]]
    assert outputs["predictions"].class_id.tolist() == [1]


def parsers_of(block: str) -> list[dict[str, Any]]:
    detector = vlm("vlm_as_detector@v2", block, model_type="openai", task_type="object-detection")
    return [json_parser(block), vlm("vlm_as_classifier@v2", block), detector]


@every_text
@pytest.mark.parametrize("index", range(3), ids=["json_parser", "vlm_as_classifier", "vlm_as_detector"])
@pytest.mark.parametrize("image", ["readable", "unreadable"])
def test_parsers_report_text_that_is_not_json(block: str, index: int, image: str, bgr: np.ndarray) -> None:
    """The tiny model does not answer in JSON, and a failed image has no text."""
    pixels = bgr if image == "readable" else np.zeros((0, 0, 3), np.uint8)
    definition = parsed_by(parsers_of(block)[index], block, "tiny")
    definition["outputs"].append({"type": "JsonField", "name": "failed", "selector": "$steps.text.error_status"})
    (outputs,) = run_workflow(definition, pixels)
    assert outputs["failed"] is (image == "unreadable")
    assert outputs["*"]["error_status"] is True
