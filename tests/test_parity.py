"""Parity with the golden sets: outputs of the published implementation on random weights, in float32, greedy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moondream_cv import load
from moondream_cv.engine.crops import cut_crops
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.images import to_rgb
from moondream_cv.requests import Caption, Chat, Detect, Point, Query, Turn
from tests.helpers.batch_invariance import recording

GOLDEN = Path(__file__).parent / "data" / "golden"
IMAGES = ("0_378x378.png", "1_640x480.png", "2_1280x720.png", "3_200x900.png", "4_50x40.png")
TEXT = {"temperature": 0, "max_tokens": 24, "top_p": 0.3}


class GoldenSet:
    """A golden set: a model and its expected replies."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        self.expected: dict[str, Any] = json.loads((self.folder / "expected.json").read_text())
        self.tensors = load_file(self.folder / "expected.safetensors")
        self.model: LocalModel = load(str(self.folder), device="cpu", dtype="float32")

    def image(self, name: str) -> str:
        return str(self.folder / "images" / name)


@pytest.fixture(scope="module", params=["mha", "gqa"])
def golden(request: pytest.FixtureRequest) -> GoldenSet:
    return GoldenSet(request.param)


def boxes(reply: dict[str, Any], key: str) -> list[dict[str, float]]:
    return [{k: v for k, v in item.items() if k != "confidence"} for item in reply[key]]


def replies(model: LocalModel, image: Any) -> dict[str, Any]:
    """Return everything that the golden files contain for an image, in their layout."""
    encoded = model.encode_image(image)
    names = ("dog", "red circle", "license plate")
    reasoned = model.query(encoded, "how many dogs are there?", reasoning=True, settings=TEXT)
    return {
        "detect": {n: boxes(model.detect(encoded, n, settings={"max_objects": 6}), "objects") for n in names},
        "point": {n: boxes(model.point(encoded, n, settings={"max_objects": 8}), "points") for n in names},
        "query": {
            q: model.query(encoded, q, settings=TEXT)["answer"]
            for q in ("how many dogs are there?", "what colour is the car?")
        },
        "query_spatial": {
            kind: model.query(encoded, "what is this?", spatial_refs=[ref], settings=TEXT)["answer"]
            for kind, ref in (("point", (0.25, 0.75)), ("box", (0.1, 0.2, 0.6, 0.9)))
        },
        "query_reasoning": {"answer": reasoned["answer"], "reasoning": json.loads(json.dumps(reasoned["reasoning"]))},
        "caption": {
            length: model.caption(encoded, length, settings=TEXT)["caption"] for length in ("short", "normal", "long")
        },
    }


@pytest.mark.parametrize("image", IMAGES)
def test_crops_are_byte_equal(golden: GoldenSet, image: str) -> None:
    crops = cut_crops(to_rgb(golden.image(image)), golden.model.config.vision)
    expected = golden.expected["images"][image]
    assert list(crops.tiling) == expected["tiling"]
    assert len(crops.pixels) == expected["n_crops"]
    assert hashlib.sha256(crops.pixels.tobytes()).hexdigest() == expected["crops_sha256"]


@pytest.mark.parametrize("index", range(len(IMAGES)), ids=IMAGES)
def test_embeddings_and_kv_caches_equal_published_values(golden: GoldenSet, index: int) -> None:
    encoded = golden.model.encode_image(golden.image(IMAGES[index]))
    first_keys, last_values = encoded.prefix.layers[0][0][0], encoded.prefix.layers[-1][1][0]
    for got, name in (
        (encoded.embedding, "image_embedding"),
        (first_keys[:, ::37], "k_cache.0"),
        (last_values[:, ::37], "v_cache.last"),
    ):
        torch.testing.assert_close(got, golden.tensors[f"{index}.{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("image", IMAGES)
def test_replies_equal_published_values(golden: GoldenSet, image: str) -> None:
    got, expected = replies(golden.model, golden.image(image)), golden.expected["images"][image]
    for skill, value in got.items():
        assert value == expected[skill], skill


def test_query_without_image_equals_published_values(golden: GoldenSet) -> None:
    answer = golden.model.query(question="what colour is the car?", settings=TEXT)["answer"]
    assert answer == golden.expected["query_without_image"]


CONVERSATIONS = tuple(json.loads((GOLDEN / "mha" / "conversations.json").read_text()))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_equals_published_tokens_and_leads(golden: GoldenSet, name: str) -> None:
    expected = json.loads((golden.folder / "conversations.json").read_text())[name]
    images = {Path(path).name: golden.model.encode_image(path) for path in map(golden.image, IMAGES[:2])}
    turns = [Turn(question, answer, [images[i] for i in names]) for question, answer, names in expected["turns"]]
    with recording(golden.model) as choices:
        (result,) = golden.model.run([Chat(tuple(turns), settings=TEXT)])  # type: ignore[arg-type]
    assert result.to_dict()["answer"] == expected["answer"]  # type: ignore[union-attr]
    assert choices.chosen == expected["tokens"]
    assert choices.gaps == pytest.approx(expected["leads"], abs=1e-3)
    (result,) = golden.model.run([Chat(tuple(turns), True, TEXT)])  # type: ignore[arg-type]
    assert json.loads(json.dumps({k: result.to_dict()[k] for k in ("reasoning", "answer")})) == expected["reasoning"]  # type: ignore[union-attr]


def test_recorded_conversations_differ(golden: GoldenSet) -> None:
    recorded = json.loads((golden.folder / "conversations.json").read_text()).values()
    assert len({tuple(conversation["leads"]) for conversation in recorded}) == len(recorded) == 7


@pytest.mark.slow
@pytest.mark.parametrize("image", IMAGES[:3])
def test_replies_with_adapter_equal_published_values(golden: GoldenSet, image: str) -> None:
    adapted = load(str(golden.folder), device="cpu", dtype="float32", adapter=str(golden.folder / "adapter.pt"))
    got, expected = replies(adapted, golden.image(image)), golden.expected["adapter"]["images"][image]
    for skill, value in expected.items():
        assert {key: got[skill][key] for key in value} == value, skill


def test_variant_setting_selects_the_adapter(golden: GoldenSet) -> None:
    variant = {"variant": str(golden.folder / "adapter.pt"), "max_objects": 6}
    reply = golden.model.detect(golden.image(IMAGES[1]), "dog", settings=variant)
    expected = golden.expected["adapter"]["images"][IMAGES[1]]["detect"]["dog"]
    assert boxes(reply, "objects") == expected
    assert expected != golden.expected["images"][IMAGES[1]]["detect"]["dog"]


def test_run_equals_single_calls(golden: GoldenSet) -> None:
    image, expected = golden.image(IMAGES[2]), golden.expected["images"][IMAGES[2]]
    results = golden.model.run(
        [
            Detect(image, "dog", {"max_objects": 6}),  # type: ignore[arg-type]
            Caption(image, "short", TEXT),  # type: ignore[arg-type]
            Point(image, "red circle", {"max_objects": 8}),  # type: ignore[arg-type]
            Query(image, "how many dogs are there?", settings=TEXT),  # type: ignore[arg-type]
        ]
    )
    assert boxes(results[0].to_dict(), "objects") == expected["detect"]["dog"]  # type: ignore[union-attr]
    assert results[1].to_dict()["caption"] == expected["caption"]["short"]  # type: ignore[union-attr]
    assert boxes(results[2].to_dict(), "points") == expected["point"]["red circle"]  # type: ignore[union-attr]
    assert results[3].to_dict()["answer"] == expected["query"]["how many dogs are there?"]  # type: ignore[union-attr]
