"""Checks the responses of running servers against /openapi.json, with random requests and one response of each kind.

Run with `pytest tests/server/test_schema.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.served import Served, data_uri, served
from tests.helpers.waiting import until

EXAMPLES = 15  # valid requests per route, and as many invalid ones
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
]
# The other checks do not apply: a valid string need not be an image (positive_data_acceptance), and unknown fields and
# other content types are accepted (negative_data_rejection). Other tests cover API keys (ignored_auth) and methods
# (unsupported_method).
ALLOWED = ["2xx", "4xx", "503", "504"]  # a server can be busy or slow, but must not fail
IMAGE_KEYS = ("image_url", "url", "value", "image")
FILE = "/v1/tuning/downloads/{finetune_id}/{step}"
OUTPUT = "/v1/batch/outputs/{file_id}/{index}"
OPEN = {"/health": 200, "/ready": 200, "/info": 200, FILE: 403, OUTPUT: 403}  # statuses of routes that need no API key
SIGNATURE = {"expires": 0, "signature": "none"}
PARAMETERS = {FILE: SIGNATURE, OUTPUT: SIGNATURE}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "minLength": 1}}}
FAL, LMM, CHAT = "/fal-ai/moondream2", "/infer/lmm", "/v1/chat/completions"
QUEUE = f"/queue{FAL}"
REQUEST = f"{QUEUE}/requests/{{request_id}}"

IMAGE = data_uri(Image.new("RGB", (8, 8), "red"))
FEW = {"max_tokens": 3}
DETECT, CAPTION = {"image_url": IMAGE, "object": "cat"}, {"image_url": IMAGE, "settings": FEW}
GAZE = {"image_url": IMAGE, "eye": [0.5, 0.25]}
SAID = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 3}
FOUND = {"response_format": {"type": "json_schema", "json_schema": {"name": "moondream_detect"}}}
TOOL = {"type": "function", "function": {"name": "answer"}}
SEEN = [{"type": "text", "text": "cat"}, {"type": "image_url", "image_url": {"url": IMAGE}}]
SENT = {"type": "base64", "value": IMAGE}
PREDICT = "/x-anylabeling/v1/predict"
LABEL = {"model": "tiny", "image": IMAGE, "params": {"text_prompt": "cat, dog"}}

GOOD: dict[str, tuple[str, Any]] = {  # routes that run the model
    "caption": ("/v1/caption", CAPTION),
    "caption, streamed": ("/v1/caption", {**CAPTION, "stream": True}),
    "query": ("/v1/query", {"image_url": IMAGE, "question": "What?", "settings": FEW}),
    "query with thoughts": ("/v1/query", {"image_url": IMAGE, "question": "What?", "reasoning": True, "settings": FEW}),
    "detect": ("/v1/detect", DETECT),
    "point": ("/v1/point", DETECT),
    "gaze": ("/v1/gaze", GAZE),
    "gaze, streamed": ("/v1/gaze", {**GAZE, "force_detect": True, "stream": True}),
    "batch": ("/v1/batch", {"skill": "detect", **DETECT}),
    "chat": (CHAT, SAID),
    "chat with thoughts": (CHAT, {**SAID, "reasoning": True}),
    "chat with boxes": (CHAT, {"messages": [{"role": "user", "content": SEEN}], **FOUND}),
    "chat with a forced call": (CHAT, {**SAID, "tools": [TOOL], "tool_choice": "required"}),
    "chat, streamed": (CHAT, {**SAID, "stream": True, "stream_options": {"include_usage": True}}),
    "lmm": (LMM, {"model_id": "moondream2", "prompt": "cat", "image": SENT}),
    "lmm of two": (LMM, {"model_id": "moondream2", "prompt": "cat", "image": [SENT, SENT]}),
    "fal's caption": (FAL, CAPTION),
    "fal's caption, streamed": (f"{FAL}/stream", CAPTION),
    "fal's query": (f"{FAL}/visual-query", {**CAPTION, "prompt": "What?"}),
    "fal's query, streamed": (f"{FAL}/visual-query/stream", {**CAPTION, "prompt": "What?"}),
    "fal's boxes": (f"{FAL}/object-detection", DETECT),
    "fal's boxes, streamed": (f"{FAL}/object-detection/stream", DETECT),
    "fal's points": (f"{FAL}/point-object-detection", DETECT),
    "fal's points, streamed": (f"{FAL}/point-object-detection/stream", DETECT),
    "x-anylabeling's boxes": (PREDICT, LABEL),
    "x-anylabeling's caption": (PREDICT, {**LABEL, "params": {"current_task": "caption"}}),
    "queue": (QUEUE, CAPTION),
    "queue's boxes": (f"{QUEUE}/object-detection", DETECT),
}
LATER = ("/v1/batch", QUEUE)  # errors of the model are sent after the status

BAD: dict[str, tuple[str, Any, int]] = {
    "range": ("/v1/detect", {**DETECT, "settings": {"temperature": -1}}, 400),
    "another model": ("/v1/detect", {**DETECT, "model": "yolo"}, 404),
    "no object": ("/v1/detect", {"image_url": IMAGE}, 422),
    "an eye outside of the image": ("/v1/gaze", {**GAZE, "eye": [2, 0]}, 400),
    "segments": ("/v1/segment", DETECT, 400),
    "an empty batch": ("/v1/batch", None, 400),
    "chat without messages": (CHAT, {}, 400),
    "chat with tools": (CHAT, {**SAID, "tools": [{}]}, 400),
    "chat with parameters of a tool that are not an object": (
        CHAT,
        {
            **SAID,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": []}}],
            "tool_choice": "required",
        },
        400,
    ),
    "chat with another model": (CHAT, {**SAID, "model": "gpt"}, 404),
    "lmm without a prompt": (LMM, {"model_id": "moondream2", "image": SENT}, 400),
    "lmm without an image": (LMM, {}, 422),
    "lmm with another model": (LMM, {"model_id": "yolo", "prompt": "cat", "image": SENT}, 404),
    "x-anylabeling without classes": (PREDICT, {**LABEL, "params": {}}, 400),
    "x-anylabeling without an image": (PREDICT, {"model": "tiny"}, 422),
    "x-anylabeling with another model": (PREDICT, {**LABEL, "model": "yolo"}, 404),
    "fal's no image": (FAL, {"image_url": "none"}, 400),
    "fal's no image, streamed": (f"{FAL}/stream", {"image_url": "none"}, 400),
    "fal's nothing": (FAL, {}, 422),
    "queue's nothing": (QUEUE, {}, 422),
    "a finetune of another rank": ("/v1/tuning/finetunes", {"name": "a", "rank": 7}, 400),
    "a finetune without a name": ("/v1/tuning/finetunes", {}, 422),
    "rollouts of no finetune": (
        "/v1/tuning/rollouts",
        {"finetune_id": "none", "request": {"skill": "detect", **DETECT}},
        404,
    ),
    "rollouts of an unknown skill": ("/v1/tuning/rollouts", {"finetune_id": "none", "request": {"skill": "a"}}, 400),
    "a train step without groups": ("/v1/tuning/train_step", {"finetune_id": "none", "groups": []}, 400),
    "a train step without a finetune": ("/v1/tuning/train_step", {"groups": []}, 422),
}

SITUATIONS: dict[int, dict[str, Any]] = {
    401: {"api_keys": ("one",)},
    413: {"max_body": 10},
    429: {"queue": 1},
    503: {},
    504: {"timeout": 0.001},
}


@schemathesis.serializer("application/x-ndjson", "application/jsonl")
def lines(_: Any, value: Any) -> bytes:
    """Serialize a body of JSON lines, which is sent unchanged."""
    return value.encode("utf-8", "replace") if isinstance(value, str) else json.dumps(value).encode()


@pytest.fixture(scope="module")
def target(tiny: LocalModel) -> Iterator[Served]:
    with served(tiny, timeout=240) as running:
        yield running


@pytest.fixture(scope="module")
def document(target: Served) -> dict[str, Any]:
    """The published schema."""
    found: dict[str, Any] = target.client.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def published(target: Served, document: dict[str, Any]) -> Any:
    """The schema for schemathesis, without event streams, whose schema it would apply to single events."""
    adapted = json.loads(json.dumps(document))
    for path in adapted["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                if "text/event-stream" in response.get("content", {}):
                    response["content"]["text/event-stream"] = {"itemSchema": EVENT}
    schema = schemathesis.openapi.from_dict(adapted, config=SchemathesisConfig())
    schema.config.update(base_url=target.url)
    schema.config.checks.update(included_check_names=CHECKS)
    schema.config.checks.not_a_server_error.expected_statuses = ALLOWED
    return schema


@pytest.fixture(scope="module")
def ended(target: Served) -> str:
    """ID of a finished request of fal's queue."""
    own = target.post(f"{QUEUE}/object-detection", DETECT).json()["request_id"]
    until(lambda: target.client.get(REQUEST.format(request_id=own)).status_code == 200)
    return str(own)


def with_images(value: Any) -> Any:
    """Return a body with an image in every second image field, so that some requests succeed."""
    if isinstance(value, list):
        return [with_images(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: IMAGE if key in IMAGE_KEYS and isinstance(item, str) and len(item) % 2 == 0 else with_images(item)
        for key, item in value.items()
    }


def fuzz(operation: Any, mode: GenerationMode, ended: str, examples: int, seen: Counter[int]) -> None:
    """Send random requests to a route.

    Args:
        operation: Operation of schemathesis's schema.
        mode: Whether to generate valid or invalid requests.
        ended: ID for every second request about a queued request.
        examples: Number of requests.
        seen: Set that collects the statuses of the responses.
    """

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        case.body = with_images(case.body)
        if len(str(case.path_parameters.get("request_id", "a"))) % 2 == 0:
            case.path_parameters["request_id"] = ended
        seen[case.call_and_validate(timeout=240).status_code] += 1

    send()


def fuzz_all(target: Served, published: Any, ended: str, subtests: pytest.Subtests, examples: int) -> None:
    """Send random requests to all routes, and check that no request remains in flight."""
    seen: Counter[int] = Counter()
    operations = [found.ok() for found in published.get_all_operations()]
    assert len(operations) >= 30
    for operation in operations:
        for mode in ("positive", "negative"):
            if mode == "negative" and not (operation.body or operation.query):
                continue  # the route has no parameters to invalidate
            with subtests.test(f"{operation.label}, {mode}"):
                fuzz(operation, GenerationMode(mode), ended, examples, seen)
    assert seen.keys() >= {200, 400, 404, 422}, seen
    until(lambda: target.service.in_flight == 0, 60)
    assert target.post("/v1/detect", DETECT).status_code == 200


def test_responses_to_random_requests_match_the_schema(
    target: Served, published: Any, ended: str, subtests: pytest.Subtests
) -> None:
    fuzz_all(target, published, ended, subtests, EXAMPLES)


@pytest.mark.soak
def test_responses_to_many_random_requests_match_the_schema(
    target: Served, published: Any, ended: str, subtests: pytest.Subtests
) -> None:
    fuzz_all(target, published, ended, subtests, EXAMPLES * 50)


def check(published: Any, document: dict[str, Any], answer: httpx.Response, template: str | None = None) -> None:
    """Check a response against the documentation of its status and content type.

    Args:
        template: Path of the route, if it has parameters.
    """
    path, method = template or answer.request.url.path, answer.request.method
    documented = document["paths"][path][method.lower()]["responses"]
    assert str(answer.status_code) in documented, (path, answer.status_code, answer.text[:300])
    content = documented[str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].split(";")[0]
    assert content[kind]["schema"], (path, answer.status_code)
    published[path][method].validate_response(answer)


def send(server: Served, path: str, body: Any) -> httpx.Response:
    return server.client.post(path, json=body) if body is not None else server.client.post(path)


@pytest.mark.parametrize("name", GOOD)
def test_successful_responses_match_the_schema(
    target: Served, published: Any, document: dict[str, Any], name: str
) -> None:
    answer = send(target, *GOOD[name])
    assert answer.status_code == 200, answer.text
    check(published, document, answer)


@pytest.mark.parametrize("name", BAD)
def test_error_responses_match_the_schema(target: Served, published: Any, document: dict[str, Any], name: str) -> None:
    path, body, status = BAD[name]
    answer = send(target, path, body)
    assert answer.status_code == status, answer.text
    check(published, document, answer)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/ready", 200),
        ("/info", 200),
        ("/metrics", 200),
        ("/v1/models", 200),
        ("/v1/models/tiny", 200),
        ("/x-anylabeling/v1/models", 200),
        ("/v1/models/other", 404),
        ("/v1/tuning/finetunes", 200),
        (REQUEST, 200),
        (f"{REQUEST}/status", 200),
        (f"{REQUEST}/status/stream", 200),
        (f"{QUEUE}/requests/none", 404),
        (f"{QUEUE}/requests/none/status", 404),
    ],
)
def test_responses_without_a_body_match_the_schema(
    target: Served, published: Any, document: dict[str, Any], ended: str, path: str, status: int
) -> None:
    answer = target.client.get(path.format(request_id=ended), params={"logs": "true"} if "status" in path else None)
    assert answer.status_code == status, answer.text
    template = path.replace("/none", "/{request_id}")
    template = "/v1/models/{name}" if template.startswith("/v1/models/") else template
    check(published, document, answer, template)


def test_responses_of_the_queue_match_the_schema(
    target: Served, published: Any, document: dict[str, Any], ended: str
) -> None:
    def ask(method: str, end: str, request: str, **options: Any) -> int:
        answer = target.client.request(method, REQUEST.format(request_id=request) + end, **options)
        check(published, document, answer, REQUEST + end)
        return answer.status_code

    assert ask("PUT", "/cancel", ended) == 400
    assert ask("PUT", "/cancel", "none") == 404
    assert ask("GET", "/status", ended, params={"logs": "maybe"}) == 422
    refused = target.post(QUEUE, {"image_url": "none"}).json()["request_id"]
    until(lambda: target.client.get(REQUEST.format(request_id=refused) + "/status").status_code == 200)
    assert ask("GET", "", refused) == 400
    assert ask("GET", "/status", refused) == 200
    cancelled = target.post(f"{QUEUE}/visual-query", {**CAPTION, "prompt": "What?", "settings": {}}).json()
    assert ask("PUT", "/cancel", cancelled["request_id"]) in (202, 400)  # 400 if the request had already ended


def no_model() -> Any:
    raise OSError("there is no such model")


@pytest.mark.parametrize("status", SITUATIONS)
def test_common_errors_of_every_route_are_documented(
    tiny: LocalModel, published: Any, document: dict[str, Any], subtests: pytest.Subtests, status: int
) -> None:
    with served(no_model if status == 503 else tiny, **SITUATIONS[status]) as server:
        if status == 429:
            server.service.acquire_slot()
        for name, (path, body) in GOOD.items():
            if status == 504 and path.startswith(LATER):
                continue
            with subtests.test(name):
                answer = send(server, path, body)
                assert answer.status_code == status, answer.text
                check(published, document, answer)
        if status == 429:
            server.service.release_slot()


@pytest.mark.parametrize("status", [401, 503])
def test_common_errors_of_routes_without_a_body_are_documented(
    tiny: LocalModel, published: Any, document: dict[str, Any], subtests: pytest.Subtests, status: int
) -> None:
    with served(no_model if status == 503 else tiny, **SITUATIONS[status]) as server:
        for template, operations in document["paths"].items():
            for method in operations.keys() & {"get", "put"}:
                with subtests.test(f"{method} {template}"):
                    path = template.format(
                        name="tiny", request_id="none", finetune_id="none", step=1, file_id="none", index=0
                    )
                    answer = server.client.request(method, path, params=PARAMETERS.get(template))
                    if status == 401:
                        assert answer.status_code == OPEN.get(template, 401)
                    check(published, document, answer, template)


def test_repeated_routes_are_documented_once(target: Served, document: dict[str, Any]) -> None:
    assert not [path for path in document["paths"] if path.startswith("/run")]
    assert target.post(f"/run{FAL}", CAPTION).status_code == 200
