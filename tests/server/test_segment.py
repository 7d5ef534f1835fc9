"""`/v1/segment` with the unmodified `moondream` client, and the selection of boxes.

The segmentation model is a function that fills the ellipse in each box; one test runs a tiny random SAM 2.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import cv2
import httpx
import moondream
import numpy as np
import pytest
from PIL import Image

from moondream_cv import scenes
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import DetectedObject
from moondream_cv.server import segmentation
from moondream_cv.server.segmentation import select_boxes
from tests.helpers.serve_process import serving
from tests.helpers.served import Served, served
from tests.helpers.tiny_sam import save_tiny_sam2
from tests.helpers.waiting import until


def fill_ellipses(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
    """Return the ellipse in each box, and a disk of 10 pixels around each point; raise an error for black images."""
    if not image.any():
        raise RuntimeError("no light")
    masks = np.zeros((len(xyxy), *image.shape[:2]), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, xyxy.tolist(), strict=True):
        center, axes = ((left + right) / 2, (top + bottom) / 2), (right - left or 20, bottom - top or 20)
        cv2.ellipse(mask, (center, axes, 0), 1, -1)
    return masks.astype(bool)


@pytest.fixture(scope="module")
def server(tiny: LocalModel) -> Iterator[Served]:
    with served(tiny, load_masks=lambda: fill_ellipses) as running:
        until(lambda: running.service.ready)
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return moondream.vl(endpoint=f"{server.url}/v1")


def box_of(reply: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return the bounding box of a reply in pixels."""
    return np.array([reply["bbox"][name] for name in ("x_min", "y_min", "x_max", "y_max")]) * (*size, *size)


def draw(reply: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a reply: the path is relative to the bounding box, and filled by the even-odd rule."""
    left, top, right, bottom = box_of(reply, size)
    mask = np.zeros((size[1], size[0]), np.uint8)
    for subpath in filter(None, reply["path"].split("M")):
        points = np.array([float(word) for word in subpath.split() if word not in "LZ"]).reshape(-1, 2)
        polygon = points * (right - left, bottom - top) + (left, top)
        part = np.zeros_like(mask)
        cv2.fillPoly(part, [np.round((polygon - 0.5) * 16).astype(np.int32)], 1, shift=4)
        mask ^= part
    return mask.astype(bool)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def object_box(scene: scenes.Scene, name: str) -> tuple[float, float, float, float]:
    return next(item.xyxy for item in scene.objects if item.name == name)


def test_client_gets_the_outline_of_an_object(client: Any, scene_image: Image.Image, scene: scenes.Scene) -> None:
    reply = client.segment(scene_image, "red circle")
    assert reply.keys() == {"path", "bbox"}
    assert box_of(reply, scene_image.size) == pytest.approx(object_box(scene, "red circle"), abs=6)
    pixels = np.asarray(scene_image)
    (expected,) = fill_ellipses(pixels, box_of(reply, scene_image.size)[None])
    assert iou(draw(reply, scene_image.size), expected) > 0.95


def test_client_streams_the_outline(client: Any, scene_image: Image.Image) -> None:
    whole = client.segment(scene_image, "cat")
    first, *chunks, last = client.segment(scene_image, "cat", stream=True)
    assert first == {"bbox": whole["bbox"]}
    assert "".join(chunk["chunk"] for chunk in chunks) == whole["path"]
    assert last == {**whole, "completed": True}


def test_absent_objects_have_no_outline(client: Any, scene_image: Image.Image) -> None:
    assert client.segment(scene_image, "green star") == {"path": ""}
    assert list(client.segment(scene_image, "green star", stream=True)) == [
        {"path": "", "bbox": None, "completed": True}
    ]


def test_references_select_objects(client: Any, scene_image: Image.Image, scene: scenes.Scene) -> None:
    width, height = scene_image.size
    left, top, right, bottom = object_box(scene, "cat")
    point = [(left + right) / 2 / width, (top + bottom) / 2 / height]
    assert client.segment(scene_image, "cat", spatial_refs=[point]) == client.segment(scene_image, "cat")
    region = [0.9 * left / width, 0.9 * top / height, min(right / width * 1.1, 1), min(bottom / height * 1.1, 1)]
    assert client.segment(scene_image, "cat", spatial_refs=[region]) == client.segment(scene_image, "cat")


def test_references_without_an_object_are_prompts(client: Any, scene_image: Image.Image) -> None:
    reply = client.segment(scene_image, "green star", spatial_refs=[[0.5, 0.5], [0.1, 0.1, 0.3, 0.4]])
    width, height = scene_image.size
    prompts = np.array([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.3, 0.4]]) * (width, height, width, height)
    expected = fill_ellipses(np.asarray(scene_image), prompts).any(axis=0)
    assert iou(draw(reply, scene_image.size), expected) > 0.95


def test_invalid_requests_are_rejected(server: Served, client: Any, scene_image: Image.Image, uri: str) -> None:
    for refs in ([[0.5, 1.5]], [[0.1, 0.2, 0.3]]):
        with pytest.raises(HTTPError, match="400"):
            client.segment(scene_image, "cat", spatial_refs=refs)
    assert server.post("/v1/segment", {"image_url": uri}).status_code == 422
    body = {"image_url": uri, "object": " "}
    segmented, detected = (server.post(route, body) for route in ("/v1/segment", "/v1/detect"))
    assert segmented.status_code == 400
    assert segmented.json() == detected.json()
    assert server.post("/v1/segment", {"image_url": uri, "object": "cat", "model": "gpt-9"}).status_code == 404


def test_errors_of_the_segmentation_model_get_503(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(HTTPError) as caught:
        client.segment(Image.new("RGB", (64, 64)), "cat", spatial_refs=[[0.5, 0.5]])
    assert caught.value.code == 503
    assert "the segmentation model failed; see the server log" in caught.value.read().decode()
    assert "RuntimeError: no light" in caplog.text


def test_models_route_lists_the_skill(server: Served) -> None:
    assert "segment" in server.client.get("/v1/models").json()["models"][0]["skills"]


def test_model_that_cannot_be_loaded_fails_the_service(tiny: LocalModel) -> None:
    def fail() -> Any:
        raise ValueError("no segmentation model")

    with served(tiny, load_masks=fail) as running:
        while running.service.failure is None:
            assert running.client.get("/ready").status_code == 503
        assert str(running.service.failure) == "no segmentation model"


def test_functions_may_change_the_image(tiny: LocalModel, uri: str) -> None:
    def erase(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        masks = fill_ellipses(image, xyxy)
        image[:] = 0
        return masks

    with served(tiny, load_masks=lambda: erase) as running:
        until(lambda: running.service.ready)
        first, second = (running.post("/v1/segment", {"image_url": uri, "object": "cat"}) for _ in range(2))
        assert first.status_code == second.status_code == 200
        assert first.json()["path"] == second.json()["path"] != ""


def test_masks_of_large_images_are_computed_in_several_calls(
    tiny: LocalModel, scene_image: Image.Image, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def record(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        sizes.append(len(xyxy))
        return fill_ellipses(image, xyxy)

    body = {"image_url": uri, "object": "green star", "spatial_refs": [[x / 10, 0.5] for x in range(1, 6)]}
    with served(tiny, load_masks=lambda: record) as running:
        until(lambda: running.service.ready)
        whole = running.post("/v1/segment", body).json()
        monkeypatch.setattr(segmentation, "_MAX_MASK_PIXELS", 2 * scene_image.width * scene_image.height)
        assert running.post("/v1/segment", body).json()["path"] == whole["path"]
    assert sizes == [5, 2, 2, 1]


def test_other_requests_continue_while_the_function_runs(tiny: LocalModel, uri: str) -> None:
    calls: list[int] = []
    release = threading.Event()

    def wait(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        calls.append(len(xyxy))
        release.wait()
        return fill_ellipses(image, xyxy)

    body = {"image_url": uri, "object": "cat"}
    with served(tiny, load_masks=lambda: wait) as running:
        until(lambda: running.service.ready)
        waiting = running.service.segmenter._jobs
        connections = []
        for is_sent in (lambda: calls == [1], lambda: waiting.qsize() == 1):
            connections.append(HTTPConnection(running.url.removeprefix("http://")))
            headers = {"Content-Type": "application/json"}
            connections[-1].request("POST", "/v1/segment", json.dumps(body), headers)
            until(is_sent)
        assert running.post("/v1/detect", body).status_code == 200
        assert running.service.in_flight == 2
        for connection in connections:
            connection.close()
        until(lambda: running.service.in_flight == 0)
        release.set()
        assert running.post("/v1/segment", body).status_code == 200
        assert calls == [1, 1]  # the function was not called for the canceled request


def test_canceled_work_releases_its_image() -> None:
    started, release = threading.Event(), threading.Event()

    def wait(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        started.set()
        release.wait()
        return fill_ellipses(image, xyxy)

    async def run() -> None:
        segmenter = await segmentation.Segmenter.load(lambda: wait)
        images = [Image.new("RGB", (8, 8), "red") for _ in range(2)]
        running, waiting = (segmenter.submit(image, [(0, 0, 1, 1)]) for image in images)
        await asyncio.to_thread(started.wait, 240)
        canceled = weakref.ref(images.pop())
        waiting.cancel()
        while canceled() is not None:
            await asyncio.sleep(0.001)
        release.set()
        assert (await running).subpaths
        segmenter.close()

    asyncio.run(asyncio.wait_for(run(), 240))


def test_server_stops_while_the_segmentation_model_loads(tiny: LocalModel) -> None:
    loading, release = threading.Event(), threading.Event()

    def wait() -> Any:
        loading.set()
        release.wait()
        return fill_ellipses

    with served(tiny, load_masks=wait) as running:
        assert loading.wait(240)
        assert running.client.get("/ready").status_code == 503
    release.set()


def test_process_exits_while_the_function_runs() -> None:
    script = """
import asyncio, threading
from PIL import Image
from moondream_cv.server.segmentation import Segmenter

async def main():
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(image, xyxy):
        loop.call_soon_threadsafe(started.set)
        threading.Event().wait()

    segmenter = await Segmenter.load(lambda: hang)
    running = segmenter.submit(Image.new("RGB", (8, 8)), [(0, 0, 1, 1)])
    await started.wait()
    running.cancel()
    segmenter.close()

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def found(*box: float, confidence: float = 0.5) -> DetectedObject:
    return DetectedObject(*box, confidence=confidence)


@pytest.mark.parametrize(
    ("refs", "expected"),
    [
        ((), [(0.5, 0.5, 0.9, 0.9)]),
        (((0.2, 0.2),), [(0.1, 0.1, 0.3, 0.3)]),  # the smaller of two
        (((0.35, 0.35),), [(0.0, 0.0, 0.4, 0.4)]),
        (((0.95, 0.05),), [(0.95, 0.05, 0.95, 0.05)]),  # no object: the point
        (((0.45, 0.45, 1.0, 1.0),), [(0.5, 0.5, 0.9, 0.9)]),
        (((0.05, 0.05, 0.3, 0.3),), [(0.1, 0.1, 0.3, 0.3)]),  # the higher IoU of two
        (((0.6, 0.0, 1.0, 0.4),), [(0.6, 0.0, 1.0, 0.4)]),  # no object: the box
        (((0.2, 0.2), (0.6, 0.6), (0.21, 0.21)), [(0.1, 0.1, 0.3, 0.3), (0.5, 0.5, 0.9, 0.9)]),
    ],
)
def test_select_boxes(refs: tuple[tuple[float, ...], ...], expected: list[tuple[float, ...]]) -> None:
    objects = [
        found(0.0, 0.0, 0.4, 0.4),
        found(0.1, 0.1, 0.3, 0.3),
        found(0.5, 0.5, 0.9, 0.9, confidence=0.8),
    ]
    assert select_boxes(objects, refs) == expected
    assert select_boxes([], ()) == []


def test_serve_masks_option_loads_sam2(tmp_path: Path, uri: str) -> None:
    with serving("--model", "tiny", "--masks", save_tiny_sam2(tmp_path), "--device", "cpu") as server:
        body = {"image_url": uri, "object": "red circle"}
        reply = httpx.post(f"{server.url}/v1/segment", json=body, timeout=240)
        assert reply.status_code == 200
        assert reply.json()["path"].startswith("M ")
        status, log = server.end()
    assert status == 0
    assert "%|" not in log  # no progress bars
