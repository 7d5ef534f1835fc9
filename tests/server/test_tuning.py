"""The tuning API with Moondream's client, and with plain HTTP for requests that the client cannot send.

Run with `pytest tests/server/test_tuning.py`.
"""

from __future__ import annotations

import io
import json
import re
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import moondream as md
import pytest
import torch
from moondream.types import Base64EncodedImage
from PIL import Image
from safetensors.torch import load_file, save_file

from moondream_cv import connect
from moondream_cv.cli.models import ModelOptions
from moondream_cv.cli.serve import load_model
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.finetune.store import FinetuneStore
from moondream_cv.model.adapters import load_adapter
from moondream_cv.server.apis.signed_urls import UrlSigner
from moondream_cv.server.checkpoints import Checkpoint
from moondream_cv.server.errors import ServerError
from moondream_cv.server.runtime.engine_process import ProcessEngine
from tests.helpers.served import Served, data_uri, served
from tests.helpers.tuning import fine_tune, held_training, no_objects, step_of
from tests.helpers.waiting import until

TUNING = "/v1/tuning"
LR = 5e-3
NO_ID = "0" * 26


@pytest.fixture(scope="module", params=["thread", "process"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a folder for finetunes, with each kind of engine."""
    folder = tmp_path_factory.mktemp("finetunes")
    if request.param == "thread":
        with served(request.getfixturevalue("tiny"), finetunes=folder) as server:
            yield server
        return
    engine = ProcessEngine(partial(load_model, ModelOptions("tiny", "cpu"), 4))
    with served(engine, finetunes=folder) as server:
        yield server
    engine.close()


@pytest.fixture(scope="module")
def local(tiny: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with an engine in this process."""
    with served(tiny, finetunes=tmp_path_factory.mktemp("finetunes")) as server:
        yield server


@pytest.fixture(scope="module")
def lossless(uri: str) -> Base64EncodedImage:
    return Base64EncodedImage(image_url=uri)


@pytest.fixture(scope="module")
def trained(local: Served, uri: str) -> Checkpoint:
    """A saved checkpoint that finds no cats, other than the model."""
    return train_checkpoint(local, "no cats", uri)


def train_checkpoint(server: Served, name: str, uri: str) -> Checkpoint:
    ft = fine_tune(server.url, name.replace(" ", "-"))
    for _ in range(6):
        ft.train_step([no_objects(uri)], lr=LR)
    saved = ft.save_checkpoint()["checkpoint"]
    return Checkpoint(ft.finetune_id, saved["step"])


def status_of(call: Callable[[], Any]) -> int:
    """Return the status of the error that the client raises."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        call()
    with caught.value as answer:
        return answer.code


def test_client_runs_the_whole_life_cycle(running: Served, lossless: Any, uri: str) -> None:
    # Create
    ft = fine_tune(running.url, "life-cycle")
    assert fine_tune(running.url, "life-cycle").finetune_id == ft.finetune_id
    found = md.ft(api_key="key", endpoint=ft.endpoint, finetune_id=ft.finetune_id)
    assert (found.name, found.rank) == ("life-cycle", 8)
    assert status_of(lambda: fine_tune(running.url, "life-cycle", rank=16)) == 409

    # Sample rollouts; the model finds the cat, which is not at this box
    response = ft.rollouts(
        "detect", image=lossless, object="cat", num_rollouts=4, ground_truth={"boxes": [[0.0, 0.5, 0.2, 0.9]]}
    )
    assert [len(rollout["output"]["objects"]) for rollout in response["rollouts"]] == [1] * 4
    assert len(response["rewards"]) == 4
    answers = ft.rollouts("query", question="How many cats are there?", image=lossless, num_rollouts=2)
    assert answers["rewards"] is None
    assert ft.rollouts("query", question="Hello?", reasoning=False)["request"] == {
        "skill": "query",
        "question": "Hello?",
        "reasoning": False,
        "spatial_refs": [],
        "settings": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 128},
    }

    # Train: RL with the request of the response, SFT with an image of the client, and both
    rl = {"mode": "rl", **{key: response[key] for key in ("request", "rollouts")}, "rewards": [0.0, 1.0, 0.5, 0.25]}
    sft = {"mode": "sft", "request": {"skill": "detect", "object": "cat", "image": lossless}, "target": {"boxes": []}}
    first = ft.train_step([rl], lr=LR, further_option=True)
    assert (first["step"], first["applied"], first["kl"], first["router_kl"]) == (1, True, 0.0, 0.0)
    assert first["reward_mean"] == pytest.approx(0.4375)
    losses = [ft.train_step([sft], lr=LR)["sft_loss"] for _ in range(6)]
    assert losses[-1] < 0.1 * losses[0]
    mixed = ft.train_step([rl, sft])
    assert mixed["step"] == step_of(running, ft.finetune_id) == 8
    assert ft.log_metrics(8, {"f1": 0.5, "loss": 1}) == {"ok": True, "step": 8, "logged_count": 2}

    # Save and list checkpoints
    assert ft.save_checkpoint()["checkpoint"]["step"] == 8
    assert ft.train_step([rl, sft])["step"] == 9
    assert ft.save_checkpoint()["ok"] is True
    page = ft.list_checkpoints(limit=1)
    assert (page["checkpoints"][0]["step"], page["has_more"]) == (9, True)
    page = ft.list_checkpoints(limit=1, cursor=page["next_cursor"])
    assert (page["checkpoints"][0]["step"], page["has_more"], page["next_cursor"]) == (8, False, None)

    # Use them
    base, tuned = (md.vl(endpoint=f"{running.url}/v1", model=name) for name in (None, ft.model(9)))
    assert len(base.detect(lossless, "cat")["objects"]) == 1
    assert tuned.detect(lossless, "cat")["objects"] == []
    assert f"moondream2/{ft.finetune_id}@9" in [card["id"] for card in running.client.get("/v1/models").json()["data"]]

    # Delete
    ft.delete_checkpoint(9)
    assert status_of(lambda: tuned.detect(lossless, "cat")) == 404
    assert status_of(lambda: ft.train_step([sft])) == 410
    assert status_of(lambda: ft.delete_checkpoint(9)) == 410
    ft.delete()
    assert status_of(lambda: ft.save_checkpoint()) == 404
    assert len(base.detect(lossless, "cat")["objects"]) == 1


def test_rollout_stream_returns_every_context(running: Served, lossless: Any) -> None:
    ft = fine_tune(running.url, "stream")
    names = ["cat", "red circle", "blue square", "dog"] * 3
    requests = [(i, {"skill": "point", "image": lossless, "object": name}) for i, name in enumerate(names)]
    found = dict(ft.rollout_stream(requests, max_concurrency=6))
    assert found.keys() == set(range(12))
    counts = [len(found[i]["rollouts"][0]["output"]["points"]) for i in range(12)]
    assert counts == [1, 1, 1, 0] * 3
    assert [found[i]["request"]["object"] for i in range(12)] == names


def test_detections_during_train_steps_succeed(running: Served, uri: str, tiny: LocalModel) -> None:
    ft = fine_tune(running.url, "busy")
    names = ["cat", "red circle", "blue square", "dog"]
    with ThreadPoolExecutor(8) as pool:
        training = pool.submit(lambda: [ft.train_step([no_objects(uri)] * 4)["step"] for _ in range(8)])
        answers = []
        while not training.done():
            asked = [{"image_url": uri, "object": name} for name in names]
            answers += list(pool.map(partial(running.post, "/v1/detect"), asked))
        assert training.result() == list(range(1, 9))
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert [len(answer.json()["objects"]) for answer in answers] == [1, 1, 1, 0] * (len(answers) // 4)


def test_requests_wait_for_a_train_step_beyond_their_time_limit(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with (
        ThreadPoolExecutor() as pool,
        held_training() as held,
        served(tiny, finetunes=tmp_path, timeout=240) as server,
    ):
        ft = fine_tune(server.url)
        training = pool.submit(ft.train_step, [no_objects(uri)])
        assert held.started.wait(240)
        before = server.service.now()
        detection = pool.submit(server.post, "/v1/detect", {"image_url": uri, "object": "cat"})
        until(lambda: server.service.in_flight == 2)
        assert server.service.now() == before  # the time of time limits does not advance
        held.resume()
        assert training.result()["step"] == 1
        assert detection.result().status_code == 200
        until(lambda: server.service.now() > before)


def test_serving_alone_does_not_create_the_folder(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "finetunes"
    with served(tiny, finetunes=folder) as server:
        assert server.post("/v1/detect", {"image_url": uri, "object": "cat"}).status_code == 200
        assert len(server.client.get("/v1/models").json()["data"]) == 1
        assert not folder.exists()
        assert server.client.get(f"{TUNING}/finetunes").json() == {
            "finetunes": [],
            "next_cursor": None,
            "has_more": False,
        }
        assert folder.is_dir()


def test_locked_folder_affects_the_tuning_api_only(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    with served(tiny, finetunes=tmp_path) as server:
        with FinetuneStore(tmp_path):
            answer = server.client.get(f"{TUNING}/finetunes")
            assert answer.status_code == 423
            assert "in use by another process" in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.text
            assert server.post("/v1/detect", {"image_url": uri, "object": "cat"}).status_code == 200
        assert server.client.get(f"{TUNING}/finetunes").status_code == 200
    with FinetuneStore(tmp_path):
        pass  # a server that has stopped does not lock the folder


def test_remote_models_cannot_be_tuned(local: Served, trained: Checkpoint, uri: str) -> None:
    with connect(local.url, "moondream") as model, served(model) as gateway:
        answer = gateway.post(f"{TUNING}/finetunes", {"name": "parts", "rank": 8})
        assert answer.status_code == 501
        assert "local model" in answer.json()["error"]["message"]
        steps = gateway.post(f"{TUNING}/train_step", {"finetune_id": NO_ID, "groups": [no_objects(uri)]})
        assert steps.status_code == 501
        asked = {"image_url": uri, "object": "cat", "model": trained.variant}
        assert gateway.post("/v1/detect", asked).status_code == 404


def test_finetunes_are_listed_in_pages(local: Served) -> None:
    created = [
        local.post(f"{TUNING}/finetunes", {"name": f"page-{i}", "rank": 16}).json()["finetune_id"] for i in range(3)
    ]
    first = local.client.get(f"{TUNING}/finetunes", params={"limit": 2}).json()
    assert [one["finetune_id"] for one in first["finetunes"]] == created[:0:-1]
    assert first["has_more"] is True
    second = local.client.get(f"{TUNING}/finetunes", params={"limit": 100, "cursor": first["next_cursor"]}).json()
    assert second["finetunes"][0]["name"] == "page-0"
    record = local.client.get(f"{TUNING}/finetunes/{created[0]}").json()["finetune"]
    assert second["finetunes"][0] == record
    assert (record["model"], record["rank"], record["step"]) == ("tiny", 16, 0)


def group(mode: str, uri: str, **fields: Any) -> dict[str, Any]:
    return {"mode": mode, "request": {"skill": "detect", "image_url": uri, "object": "cat"}, **fields}


INVALID_STEPS: list[tuple[Callable[[str], Any], str]] = [
    (lambda uri: [], "groups must have 1 to 64"),
    (lambda uri: [no_objects(uri)] * 65, "groups must have 1 to 64"),
    (lambda uri: ["group"], r"groups\[0\] must be an object"),
    (lambda uri: [group("dpo", uri)], r"groups\[0\]\.mode must be one of"),
    (lambda uri: [group("sft", uri, target={"points": []})], r"groups\[0\]\.target"),
    (lambda uri: [group("sft", uri, target={"boxes": [[0.5, 0.5, 0.1, 0.1]]})], "positive area"),
    (
        lambda uri: [group("sft", "none", target={"boxes": []})],
        r"groups\[0\]\.request\.image_url: the encoded image",
    ),
    (
        lambda uri: [{**group("sft", uri, target={"boxes": []}), "request": {"skill": "detect", "object": "cat"}}],
        r"groups\[0\]\.request\.image_url is missing",
    ),
    (
        lambda uri: [
            {"mode": "sft", "request": {"skill": "detect", "object": "cat", "image": "/etc/hostname"}, "target": {}}
        ],
        r"groups\[0\]\.request\.image is not supported",
    ),
    (
        lambda uri: [group("sft", "http://127.0.0.1:9/a.png", target={"boxes": []})],
        r"groups\[0\]\.request\.image_url: .*127\.0\.0\.1",
    ),
]


@pytest.mark.parametrize(("groups", "message"), INVALID_STEPS)
def test_invalid_train_steps_change_nothing(
    local: Served, uri: str, groups: Callable[[str], Any], message: str
) -> None:
    ft = fine_tune(local.url, "invalid")
    answer = local.post(f"{TUNING}/train_step", {"finetune_id": ft.finetune_id, "groups": groups(uri)})
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])
    assert step_of(local, ft.finetune_id) == 0


@pytest.mark.parametrize("change", ["rewards", "coords", "image", "finetune", "nan"])
def test_changed_rollouts_are_rejected(local: Served, uri: str, change: str) -> None:
    ft = fine_tune(local.url, "signed")
    other = fine_tune(local.url, "signed-too")
    request = {"skill": "detect", "image_url": uri, "object": "cat"}
    body = {"finetune_id": ft.finetune_id, "num_rollouts": 2, "request": request}
    sampled = local.post(f"{TUNING}/rollouts", body).json()
    rl = {"mode": "rl", "request": sampled["request"], "rollouts": sampled["rollouts"], "rewards": [0.0, 1.0]}
    step: dict[str, Any] = {"finetune_id": ft.finetune_id, "groups": [rl]}
    status = 400
    if change == "rewards":
        rl["rewards"] = [0.0]
    elif change == "coords":
        rl["rollouts"][0]["coords"][0] += 0.25
    elif change == "image":
        rl["request"]["image_url"] = data_uri(Image.new("RGB", (32, 24), "red"))
    elif change == "finetune":
        step["finetune_id"] = other.finetune_id
    else:
        rl["rewards"], status = [0.0, float("nan")], 422
    answer = local.client.post(f"{TUNING}/train_step", content=json.dumps(step))
    assert answer.status_code == status, answer.text
    assert step_of(local, step["finetune_id"]) == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/finetunes", {"name": "a b", "rank": 8}, 400),
        ("POST", "/finetunes", {"name": "a", "rank": 9}, 400),
        ("POST", "/finetunes", {"name": "a", "rank": "8"}, 422),
        ("GET", f"/finetunes/{NO_ID}", None, 404),
        ("GET", "/finetunes/..%2f..%2fetc", None, 404),
        ("GET", "/finetunes?limit=0", None, 400),
        ("GET", "/finetunes?limit=many", None, 422),
        ("GET", "/finetunes?cursor=none", None, 400),
        ("DELETE", f"/finetunes/{NO_ID}", None, 404),
        ("POST", f"/finetunes/{NO_ID}/metrics", {"step": 1, "metrics": {"loss": 1.0}}, 404),
        ("POST", f"/finetunes/{NO_ID}/metrics", {"step": -1, "metrics": {"loss": 1.0}}, 400),
        ("POST", f"/finetunes/{NO_ID}/metrics", {"step": 1, "metrics": {"loss": "low"}}, 422),
        ("POST", f"/finetunes/{NO_ID}/checkpoints/save", None, 404),
        ("GET", f"/finetunes/{NO_ID}/checkpoints", None, 404),
        ("DELETE", f"/finetunes/{NO_ID}/checkpoints/1", None, 404),
        ("DELETE", f"/finetunes/{NO_ID}/checkpoints/last", None, 422),
        ("GET", f"/finetunes/{NO_ID}/checkpoints/1/download", None, 404),
        ("POST", "/rollouts", {"finetune_id": NO_ID, "request": {"skill": "query", "question": "Why?"}}, 404),
        ("POST", "/rollouts", {"finetune_id": NO_ID, "request": {"skill": "caption"}}, 400),
        ("POST", "/rollouts", {"finetune_id": NO_ID, "request": "detect"}, 422),
        ("POST", "/train_step", {"finetune_id": NO_ID, "groups": "all"}, 422),
        ("POST", "/train_step", {"groups": []}, 422),
    ],
)
def test_errors_have_statuses_that_clients_do_not_retry(
    local: Served, method: str, path: str, body: Any, status: int
) -> None:
    options = {} if body is None else {"json": body}
    answer = local.client.request(method, TUNING + path, **options)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert str(local.service.finetunes) not in answer.text


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"num_rollouts": 0}, 400),
        ({"num_rollouts": 17}, 400),
        ({"ground_truth": {"points": []}}, 400),
        ({"request": {"skill": "detect", "object": "cat", "image_url": "none"}}, 400),
        ({"request": {"skill": "detect", "object": "cat", "image_url": 1}}, 400),
        ({"request": {"skill": "detect", "object": "cat", "image": "/etc/hostname"}}, 400),
        ({"request": {"skill": "detect", "object": "cat", "settings": {"variant": "/etc/hostname"}}}, 400),
    ],
)
def test_invalid_rollouts_are_rejected(local: Served, uri: str, fields: dict[str, Any], status: int) -> None:
    ft = fine_tune(local.url, "invalid")
    request = {"skill": "detect", "image_url": uri, "object": "cat"}
    answer = local.post(f"{TUNING}/rollouts", {"finetune_id": ft.finetune_id, "request": request, **fields})
    assert answer.status_code == status, answer.text


def test_bodies_of_train_steps_can_have_more_values(local: Served, uri: str) -> None:
    ft = fine_tune(local.url, "large")
    request = {"skill": "query", "question": "How many cats are there?", "image_url": uri}
    body = {"finetune_id": ft.finetune_id, "num_rollouts": 16, "request": {**request, "settings": {"max_tokens": 4}}}
    sampled = local.post(f"{TUNING}/rollouts", body).json()
    rl = {"mode": "rl", "request": sampled["request"], "rollouts": sampled["rollouts"], "rewards": [0.0, 1.0] * 8}
    step = {"finetune_id": ft.finetune_id, "groups": [rl], "further": [0] * 30_000}
    answer = local.post(f"{TUNING}/train_step", step)
    assert answer.status_code == 200, answer.text
    assert local.post(f"{TUNING}/rollouts", {**body, "further": [0] * 30_000}).status_code == 413


# Checkpoints in the other APIs


def names_of(checkpoint: Checkpoint) -> list[str]:
    return [prefix + checkpoint.variant for prefix in ("", "moondream2/", "moondream3-preview/", "tiny/")]


def test_moondream_api_selects_checkpoints(local: Served, trained: Checkpoint, uri: str) -> None:
    asked = {"image_url": uri, "object": "cat"}
    assert len(local.post("/v1/detect", asked).json()["objects"]) == 1
    for name in names_of(trained):
        assert local.post("/v1/detect", {**asked, "model": name}).json()["objects"] == []
        assert local.post("/v1/detect", {**asked, "variant": name}).json()["objects"] == []
    for name in names_of(trained)[:3]:
        assert local.post("/v1/detect", {**asked, "settings": {"variant": name}}).json()["objects"] == []


def test_other_apis_select_checkpoints(local: Served, trained: Checkpoint, uri: str) -> None:
    # OpenAI
    parts = [{"type": "text", "text": "cat"}, {"type": "image_url", "image_url": {"url": uri}}]
    chat = {
        "messages": [{"role": "user", "content": parts}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "moondream_detect"}},
    }
    for name, count in ((None, 1), (trained.variant, 0)):
        answer = local.post("/v1/chat/completions", {**chat, "model": name}).json()
        assert len(json.loads(answer["choices"][0]["message"]["content"])["objects"]) == count
        assert answer["model"] == (name or "tiny")
    card = local.client.get(f"/v1/models/moondream2/{trained.variant}").json()
    assert card["id"] == f"moondream2/{trained.variant}"

    # Roboflow
    for name, count in (("tiny", 1), (f"moondream2/{trained.variant}", 0)):
        body = {"model_id": name, "prompt": "cat", "image": {"type": "base64", "value": uri}}
        assert len(local.post("/infer/lmm", body).json()["predictions"]) == count
        assert len(local.post(f"/infer/lmm/{name}", {**body, "model_id": None}).json()["predictions"]) == count

    # fal
    for settings, count in (({}, 1), ({"variant": trained.variant}, 0)):
        body = {"image_url": uri, "object": "cat", "settings": settings}
        answer = local.post("/fal-ai/moondream2/object-detection", body).json()
        assert len(answer["objects"]) == count

    # Batches
    lines = [{"skill": "detect", "image_url": uri, "object": "cat", "model": name} for name in (None, trained.variant)]
    headers = {"Content-Type": "application/x-ndjson"}
    text = local.client.post("/v1/batch", content="\n".join(map(json.dumps, lines)), headers=headers).text
    assert [len(json.loads(line)["result"]["objects"]) for line in text.splitlines()] == [1, 0]


def test_requests_with_and_without_checkpoint_decode_together(local: Served, trained: Checkpoint, uri: str) -> None:
    names = [None, trained.variant] * 8
    with ThreadPoolExecutor(16) as pool:
        bodies = [{"image_url": uri, "object": "cat", "model": name} for name in names]
        answers = list(pool.map(partial(local.post, "/v1/detect"), bodies))
    assert [len(answer.json()["objects"]) for answer in answers] == [1, 0] * 8


def test_unknown_checkpoints_get_404_in_the_format_of_the_api(local: Served, trained: Checkpoint, uri: str) -> None:
    for name in (f"{NO_ID}@1", f"{trained.finetune_id}@999", f"moondream3-preview/{NO_ID}@1"):
        asked = {"image_url": uri, "object": "cat"}
        answer = local.post("/v1/detect", {**asked, "model": name})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
        assert local.post("/v1/detect", {**asked, "settings": {"variant": name}}).status_code == 404
        chat = {"model": name, "messages": [{"role": "user", "content": "What?"}]}
        answer = local.post("/v1/chat/completions", chat)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert local.client.get(f"/v1/models/{name}").status_code == 404
        lmm = {"model_id": name, "prompt": "cat", "image": {"type": "base64", "value": uri}}
        answer = local.post("/infer/lmm", lmm)
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found_error")
        fal = local.post("/fal-ai/moondream2/object-detection", {**asked, "settings": {"variant": name}})
        assert (fal.status_code, fal.json()["error_type"]) == (404, "not_found_error")


def test_variants_are_never_paths(local: Served, trained: Checkpoint, uri: str) -> None:
    file = trained.file(local.service.finetunes)
    assert file.is_file()
    for variant in (str(file), file.as_uri(), f"{trained.finetune_id}/checkpoints/{trained.step}", "some-id"):
        asked = {"image_url": uri, "object": "cat"}
        assert local.post("/v1/detect", {**asked, "settings": {"variant": variant}}).status_code == 400
        assert local.post("/v1/detect", {**asked, "variant": variant}).status_code == 404
        assert local.post("/v1/detect", {**asked, "model": variant}).status_code == 404


def test_checkpoint_of_another_model_gets_404(local: Served, trained: Checkpoint, uri: str) -> None:
    ft = fine_tune(local.url, "damaged")
    saved = Checkpoint(ft.finetune_id, 0)
    ft.save_checkpoint()
    save_file({"text.blocks.0.attn.qkv.A": torch.zeros(8, 3)}, saved.file(local.service.finetunes))
    answer = local.post("/v1/detect", {"image_url": uri, "object": "cat", "model": saved.variant})
    assert answer.status_code == 404
    assert str(local.service.finetunes) not in answer.text
    assert local.post("/v1/detect", {"image_url": uri, "object": "cat"}).status_code == 200


# Downloads


def test_downloaded_checkpoint_loads_as_an_adapter(tiny: LocalModel, tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "finetunes"
    with served(tiny, finetunes=folder, api_keys=("key",)) as server:
        headers = {"X-Moondream-Auth": "key"}
        ft = fine_tune(server.url, "download")
        ft.train_step([no_objects(uri)])
        ft.save_checkpoint()
        path = f"{TUNING}/finetunes/{ft.finetune_id}/checkpoints/1/download"
        assert server.client.get(path).status_code == 401
        link = server.client.get(path, headers=headers).json()
        assert link["expires_in"] == 3600

        # The URL needs no key, and cannot be changed
        answer = httpx.get(link["url"])
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(answer.content)
        for changed in (
            link["url"].replace("/1?", "/0?"),
            link["url"].replace("expires=1", "expires=2"),
            link["url"][:-1] + ("0" if link["url"][-1] != "0" else "1"),
        ):
            assert httpx.get(changed).status_code == 403
        assert httpx.get(link["url"].partition("?")[0]).status_code == 422

        # The file has the tensors of the checkpoint
        downloaded = torch.load(io.BytesIO(answer.content), weights_only=True)
        expected = load_file(Checkpoint(ft.finetune_id, 1).file(folder))
        assert downloaded.keys() == {"lora_state_dict"}
        assert downloaded["lora_state_dict"].keys() == expected.keys()
        (tmp_path / "adapter.pt").write_bytes(answer.content)
        adapter = load_adapter(tmp_path / "adapter.pt", tiny.config, "cpu", torch.float32)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.tensors())

        # A deleted checkpoint cannot be downloaded
        ft.delete_checkpoint(1)
        assert httpx.get(link["url"]).status_code == 404
        assert server.client.get(path, headers=headers).status_code == 410


def test_download_urls_expire() -> None:
    signer, path, expired = UrlSigner(), f"{TUNING}/downloads/{NO_ID}/1", 1
    with pytest.raises(ServerError, match="has expired") as caught:
        signer.check(path, expired, signer.signature(path, expired))
    assert caught.value.status == 403
