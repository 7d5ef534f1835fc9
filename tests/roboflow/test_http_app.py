"""Test the responses of Roboflow's inference server for Moondream 2, the reference for `moondream-cv serve`."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene
from tests.helpers.roboflow_app import MODEL_ID, MODEL_IDS, boxes_of, encoded, expected_boxes, skip_without_server

skip_without_server()
pytestmark = pytest.mark.roboflow

MISSING: Any = ...
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
UNREADABLE = {"message": "Could not load input image. Cause: Malformed base64 input image."}
INTERNAL = {"message": "Internal error."}
UNREACHABLE = {"message": "Internal error. Could not connect to Roboflow API."}


def changed(body: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**body, **changes}.items() if value is not MISSING}


@pytest.mark.parametrize("model_id", MODEL_IDS)
@pytest.mark.parametrize("in_path", [False, True], ids=["body", "path"])
def test_response_has_the_documented_fields(
    url: str, tiny: LocalModel, scene: Scene, body: dict[str, Any], model_id: str, in_path: bool
) -> None:
    path = f"/infer/lmm/{model_id}" if in_path else "/infer/lmm"
    answer = requests.post(url + path, json={**body, "model_id": model_id})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Model-Id"] == model_id
    assert answer.headers["X-Inference-Engine"] == "inference-models"
    reply = answer.json()
    (box,) = expected_boxes(tiny, scene.image)
    (found,) = reply["predictions"]
    assert UUID.fullmatch(found.pop("detection_id"))
    assert found == {
        **dict(zip(("x", "y", "width", "height"), box, strict=True)),
        "confidence": 1.0,
        "class": "dog",
        "class_id": 0,
    }
    assert UUID.fullmatch(reply.pop("inference_id"))
    assert reply.pop("time") > 0
    assert reply.pop("resolved_model").keys() == {"model_id", "model_package_id", "backend", "quantization"}
    assert reply == {"image": {"width": 320, "height": 240}, "predictions": reply["predictions"]}


def test_response_without_detections(url: str, body: dict[str, Any]) -> None:
    reply = requests.post(url + "/infer/lmm", json={**body, "prompt": "banana"}).json()
    assert reply["predictions"] == []
    assert reply["image"] == {"width": 320, "height": 240}


def test_objects_share_one_class_id(url: str, tiny: LocalModel, scene: Scene, body: dict[str, Any]) -> None:
    twice = np.hstack([scene.image, scene.image])
    image = {"type": "base64", "value": encoded(twice)}
    reply = requests.post(url + "/infer/lmm", json={**body, "image": image}).json()
    assert len(reply["predictions"]) == 2
    assert boxes_of(reply) == expected_boxes(tiny, twice)
    assert {found["class_id"] for found in reply["predictions"]} == {0}


@pytest.mark.parametrize(
    "changes",
    [
        {"api_key": None},
        {"api_key": "a-key"},
        {"confidence": 2.0},
        {"enable_thinking": True},
        {"max_new_tokens": -1},
        {"source": "camera", "source_info": "7"},
        {"unknown": 1},
        {"visualize_predictions": True},
    ],
    ids=str,
)
def test_ignored_fields_do_not_change_the_response(url: str, body: dict[str, Any], changes: dict[str, Any]) -> None:
    plain, other = (requests.post(url + "/infer/lmm", json=payload).json() for payload in (body, {**body, **changes}))
    assert len(boxes_of(plain)) == 1
    assert boxes_of(other) == boxes_of(plain)
    assert other.keys() == plain.keys()


def test_id_is_returned_as_inference_id(url: str, body: dict[str, Any]) -> None:
    assert requests.post(url + "/infer/lmm", json={**body, "id": "mine"}).json()["inference_id"] == "mine"


@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"], ids=["bare", "data URI"])
def test_image_formats_are_accepted(url: str, scene: Scene, body: dict[str, Any], form: str, prefix: str) -> None:
    image = {"type": "base64", "value": prefix + encoded(scene.image, form)}
    reply = requests.post(url + "/infer/lmm", json={**body, "image": image}).json()
    assert np.allclose(boxes_of(reply), boxes_of(requests.post(url + "/infer/lmm", json=body).json()), atol=2)


@pytest.mark.parametrize(("ignored", "size"), [(False, (320, 240)), (True, (240, 320))])
def test_exif_orientation_is_applied_unless_disabled(
    url: str, scene: Scene, body: dict[str, Any], ignored: bool, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    image = {"type": "base64", "value": encoded(np.rot90(scene.image), "JPEG", exif=exif, quality=95)}
    payload = {**body, "image": image, "disable_preproc_auto_orient": ignored}
    reply = requests.post(url + "/infer/lmm", json=payload).json()
    assert (reply["image"]["width"], reply["image"]["height"]) == size


# --- Errors ----------------------------------------------------------------------------------------------------------


def base64_image(value: Any) -> dict[str, Any]:
    return {"image": {"type": "base64", "value": value}}


@pytest.mark.parametrize(
    ("changes", "status", "reply"),
    [
        ({"model_id": "nonsense"}, 503, UNREACHABLE),
        ({"model_id": "nonsense/1"}, 503, UNREACHABLE),
        ({"model_id": "a/b/c"}, 400, {"message": "Invalid Model ID sent in request."}),
        ({"model_id": ""}, 500, INTERNAL),
        ({"prompt": None}, 500, INTERNAL),
        ({"prompt": MISSING}, 500, INTERNAL),
        ({"image": []}, 500, INTERNAL),
        (base64_image(None), 500, INTERNAL),
        (base64_image("bm90IGFuIGltYWdl"), 400, UNREADABLE),
        (base64_image(""), 400, {"message": "Could not load input image. Cause: Empty image payload."}),
        (
            {"image": {"type": "film", "value": "x"}},
            400,
            {"message": "Could not load input image. Cause: Image declaration contains not recognised image type."},
        ),
        (
            {"image": {"type": "numpy", "value": [[[0, 0, 0]]]}},
            400,
            {
                "message": "Could not load input image. Cause: NumPy image type is not supported in this "
                "configuration of `inference`."
            },
        ),
    ],
    ids=str,
)
def test_invalid_request_returns_an_error(
    url: str, body: dict[str, Any], changes: dict[str, Any], status: int, reply: dict[str, str]
) -> None:
    answer = requests.post(url + "/infer/lmm", json=changed(body, changes))
    assert (answer.status_code, answer.json()) == (status, reply)


def test_unknown_moondream_version_returns_500(url: str, body: dict[str, Any]) -> None:
    answer = requests.post(url + "/infer/lmm", json={**body, "model_id": "moondream2/another"})
    assert answer.status_code == 500
    assert answer.json().keys() == {"message", "help_url"}
    assert answer.json()["message"].startswith("Could not retrieve model")


@pytest.mark.parametrize("count", [1, 2])
def test_list_of_images_returns_500(url: str, body: dict[str, Any], count: int) -> None:
    answer = requests.post(url + "/infer/lmm", json={**body, "image": [body["image"]] * count})
    assert (answer.status_code, answer.json()) == (500, INTERNAL)


def test_schema_declares_flat_lists_of_responses(url: str) -> None:
    """Models that accept lists return such a list, and so does `moondream-cv serve`."""
    responses = requests.get(url + "/openapi.json").json()["paths"]["/infer/lmm"]["post"]["responses"]
    one, several, *_ = responses["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert several["type"] == "array"
    assert several["items"] == one


@pytest.mark.parametrize(
    ("changes", "errors"),
    [
        ({"model_id": MISSING}, [("missing", ["body", "model_id"])]),
        ({"model_id": 5}, [("string_type", ["body", "model_id"])]),
        ({"prompt": ["dog", "bus"]}, [("string_type", ["body", "prompt"])]),
        ({"max_new_tokens": "many"}, [("int_parsing", ["body", "max_new_tokens"])]),
        ({"image": MISSING}, [("missing", ["body", "image"])]),
        ({"image": {"value": "x"}}, None),
        ({"image": "x"}, None),
    ],
    ids=str,
)
def test_validation_error_returns_422(
    url: str, body: dict[str, Any], changes: dict[str, Any], errors: list[Any] | None
) -> None:
    answer = requests.post(url + "/infer/lmm", json=changed(body, changes))
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert all({"type", "loc", "msg", "input"} <= error.keys() for error in detail)
    if errors is None:  # one error for each type that an image can have
        assert {tuple(error["loc"][:3]) for error in detail} >= {("body", "image", "list[InferenceRequestImage]")}
    else:
        assert [(error["type"], error["loc"]) for error in detail] == errors


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/infer/lmm/moondream2", 400, "Model ID mismatch: path specifies 'moondream2' but request body {}"),
        ("/infer/lmm/", 400, "Model ID mismatch: path specifies '' but request body {}"),
        ("//infer/lmm", 405, "Method Not Allowed"),
    ],
)
def test_model_id_in_the_path_must_match_the_body(
    url: str, body: dict[str, Any], path: str, status: int, detail: str
) -> None:
    answer = requests.post(url + path, json=body)
    assert answer.status_code == status
    assert answer.json() == {"detail": detail.format(f"specifies '{MODEL_ID}'")}


def test_model_id_in_the_body_is_required(url: str, body: dict[str, Any]) -> None:
    answer = requests.post(f"{url}/infer/lmm/{MODEL_ID}", json=changed(body, {"model_id": MISSING}))
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "model_id"]


@pytest.mark.parametrize("sent", [b"{", b""])
def test_body_that_is_not_json_returns_422(url: str, sent: bytes) -> None:
    answer = requests.post(url + "/infer/lmm", data=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "body"


def test_json_without_content_type_returns_422(url: str, body: dict[str, Any]) -> None:
    assert requests.post(url + "/infer/lmm", data=json.dumps(body)).status_code == 422


def test_info_and_health_routes(url: str) -> None:
    assert requests.get(url + "/info").json().keys() == {"name", "version", "uuid"}
    assert requests.get(url + "/healthz").json() == {"status": "healthy"}
    assert requests.get(url + "/readiness").json() == {"status": "ready"}
    assert requests.get(url + "/nothing").status_code == 404
