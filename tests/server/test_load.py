"""Many concurrent clients with all skills and APIs: every answer is correct, and nothing leaks.

Run with `pytest tests/server/test_load.py`; `make soak` sends fifty times as many requests.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import Caption, Detect, Point, Query, Settings
from moondream_cv.scenes import render_scene
from tests.helpers.served import Served, data_uri, served

CLIENTS = 32
NAMES = ("cat", "red circle", "blue square")
FIRM = {"temperature": 0}
QUESTION = "How many cats are there?"
Ask = Callable[[httpx.Client, Image.Image], Any]
Know = Callable[[LocalModel, Image.Image], Any]


def json_of(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text[:500]
    return answer.json()


def detect(client: httpx.Client, image: Image.Image) -> Any:
    return json_of(client, "/v1/detect", {"image_url": data_uri(image), "object": "cat"})["objects"]


def point(client: httpx.Client, image: Image.Image) -> Any:
    return json_of(client, "/v1/point", {"image_url": data_uri(image), "object": "red circle"})["points"]


def caption(client: httpx.Client, image: Image.Image) -> Any:
    body = {"image_url": data_uri(image), "length": "short", "settings": FIRM}
    return json_of(client, "/v1/caption", body)["caption"]


def streamed(client: httpx.Client, image: Image.Image) -> Any:
    text = ""
    body = {"image_url": data_uri(image), "length": "normal", "settings": FIRM, "stream": True}
    with client.stream("POST", "/v1/caption", json=body) as answer:
        for line in answer.iter_lines():
            text += json.loads(line[6:]).get("chunk", "") if line else ""
    return text


def openai(client: httpx.Client, image: Image.Image) -> Any:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_uri(image)}}]
    body = {"model": "moondream2", "messages": [{"role": "user", "content": parts}], **FIRM}
    return json_of(client, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def roboflow(client: httpx.Client, image: Image.Image) -> Any:
    file = io.BytesIO()
    image.save(file, "PNG")
    value = base64.b64encode(file.getvalue()).decode()
    body = {"model_id": "moondream2", "prompt": "cat", "image": {"type": "base64", "value": value}}
    width, height = image.size
    return [
        {
            "x_min": (found["x"] - found["width"] / 2) / width,
            "y_min": (found["y"] - found["height"] / 2) / height,
            "x_max": (found["x"] + found["width"] / 2) / width,
            "y_max": (found["y"] + found["height"] / 2) / height,
            "confidence": found["confidence"],
        }
        for found in json_of(client, "/infer/lmm", body)["predictions"]
    ]


def fal(client: httpx.Client, image: Image.Image) -> Any:
    body = {"image_url": data_uri(image), "object": "cat"}
    return json_of(client, "/fal-ai/moondream2/object-detection", body)["objects"]


def boxes(model: LocalModel, image: Image.Image) -> Any:
    return model.run([Detect(image, "cat")])[0].to_dict()["objects"]  # type: ignore[union-attr]


def points(model: LocalModel, image: Image.Image) -> Any:
    return model.run([Point(image, "red circle")])[0].to_dict()["points"]  # type: ignore[union-attr]


def captioned(length: str) -> Know:
    return lambda model, image: model.run([Caption(image, length, Settings(temperature=0))])[0].caption  # type: ignore[union-attr]


def answered(model: LocalModel, image: Image.Image) -> Any:
    return model.run([Query(image, QUESTION, settings=Settings(temperature=0))])[0].answer  # type: ignore[union-attr]


ASKED: list[tuple[Ask, Know]] = [
    (detect, boxes),
    (streamed, captioned("normal")),
    (roboflow, boxes),
    (openai, answered),
    (point, points),
    (caption, captioned("short")),
    (fal, boxes),
]


def scene_image(seed: int) -> Image.Image:
    return Image.fromarray(render_scene(seed, resolution_wh=(200 + seed % 5 * 40, 160), names=NAMES).image)


def ask_all(running: Served, tiny: LocalModel, count: int) -> None:
    """Send requests from 32 concurrent clients and compare each answer with the answer of the model."""

    def one(number: int) -> None:
        ask, know = ASKED[number % len(ASKED)]
        image = scene_image(number // 3)  # some share an image
        with httpx.Client(base_url=running.url, timeout=120) as client:
            found = ask(client, image)
        right = know(tiny, image)
        if isinstance(right, list):
            assert len(found) == len(right)
            for item, true_item in zip(found, right, strict=True):
                assert item == pytest.approx(true_item, abs=2e-3)
        else:
            assert found == right

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(one, range(count)))
    assert running.service.in_flight == 0


def test_concurrent_clients_get_correct_answers(tiny: LocalModel) -> None:
    with served(tiny) as running:
        ask_all(running, tiny, 40)
        text = running.client.get("/metrics").text
    assert 'status="5' not in text
    assert 'status="429"' not in text


@pytest.mark.soak
def test_sustained_load_gives_correct_answers_and_leaks_nothing(tiny: LocalModel) -> None:
    process = psutil.Process(os.getpid())
    with served(tiny) as running:
        ask_all(running, tiny, 400)
        gc.collect()
        before, objects = process.memory_info().rss, len(gc.get_objects())
        for _ in range(4):
            ask_all(running, tiny, 400)
        gc.collect()
        assert len(gc.get_objects()) - objects < 2_000  # more than one of each kind
        # The clients run in this process too, and 32 threads fragment the memory.
        assert process.memory_info().rss - before < 120 * 2**20
