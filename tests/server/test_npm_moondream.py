"""Moondream's JavaScript client from npm, in Node. Run with `pytest tests/server/test_npm_moondream.py`.

It needs `node` and the packages that `npm ci` installs in tests/npm.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.images import to_rgb
from moondream_cv.server.images import decode_base64
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

PACKAGES = Path(__file__).parents[1] / "npm"
KEY = "npm-key-4711"
SCRIPT = """
import { readFileSync } from "node:fs";
import { vl } from "moondream";

const [endpoint, apiKey, file, wanted] = process.argv.slice(1);
const client = new vl(apiKey ? { endpoint, apiKey } : { endpoint });
const image = file.startsWith("data:") ? { imageUrl: file } : readFileSync(file);
const replies = [];
for (const [method, request] of JSON.parse(wanted)) {
  try {
    const { withoutImage, ...rest } = request;
    const reply = await client[method](withoutImage ? rest : { image, ...rest });
    for (const [key, value] of Object.entries(reply)) {
      if (value?.[Symbol.asyncIterator]) {
        reply[key] = [];
        for await (const piece of value) reply[key].push(piece);
      }
    }
    replies.push(reply);
  } catch (error) {
    replies.push({ error: error.message });
  }
}
console.log(JSON.stringify({ replies, sent: (await client.encodeImage(image)).imageUrl }));
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (PACKAGES / "node_modules" / "moondream").is_dir(),
        reason="npm's moondream is not installed: npm ci in tests/npm",
    ),
]


def drive(url: str, image: str, *wanted: tuple[str, dict[str, Any]], key: str = "") -> tuple[list[Any], Image.Image]:
    """Call the client in Node.

    Args:
        url: URL of the server.
        image: A file or a data URI.
        wanted: Methods of the client and their requests, without the image.
        key: API key; an empty string sends none.

    Returns:
        The result or the error of each call, and the image as the client sent it.
    """
    arguments = [f"{url}/v1", key, image, json.dumps(wanted)]
    ran = subprocess.run(
        ["node", "--input-type=module", "-e", SCRIPT, "--", *arguments],
        cwd=PACKAGES, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    output = json.loads(ran.stdout)
    return output["replies"], Image.fromarray(to_rgb(decode_base64(output["sent"])))


@pytest.fixture(scope="module")
def file(scene_image: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("npm") / "scene.png"
    scene_image.save(path)
    return str(path)


def test_client_gets_objects_and_points(server: Served, tiny: LocalModel, file: str) -> None:
    asked = {"object": "cat"}
    (found, pointed, nothing), seen = drive(
        server.url, file, ("detect", asked), ("point", asked), ("detect", {"object": "yellow star"})
    )
    for reply, expected, key in (
        (found, tiny.detect(seen, "cat"), "objects"),
        (pointed, tiny.point(seen, "cat"), "points"),
    ):
        assert reply.keys() == {key}
        assert len(expected[key]) == 1
        assert reply[key] == [pytest.approx(item, abs=1e-4) for item in expected[key]]
    assert nothing == {"objects": []}


def test_client_gets_captions(server: Served, tiny: LocalModel, uri: str) -> None:
    replies, seen = drive(
        server.url,
        uri,
        ("caption", {}),
        ("caption", {"length": "short"}),
        ("caption", {"length": "short", "stream": True}),
    )
    normal, short, streamed = (reply["caption"] for reply in replies)
    likeliest = {"temperature": 0.0}  # with the published settings, the tiny model rarely returns another answer
    assert normal == tiny.caption(seen, settings=likeliest)["caption"]
    assert short == tiny.caption(seen, "short", settings=likeliest)["caption"]
    assert "".join(streamed) == short
    assert len(streamed) > 1


def test_client_gets_answers(server: Served, tiny: LocalModel, uri: str) -> None:
    asked = {"question": "How many blue squares are there?"}
    replies, seen = drive(
        server.url,
        uri,
        ("query", asked),
        ("query", {**asked, "stream": True}),
        ("query", {**asked, "reasoning": True}),
        ("query", {**asked, "reasoning": False}),
        ("query", {"question": "What is this?", "withoutImage": True}),
    )
    whole, streamed, reasoned, plain, blind = replies
    expected = tiny.query(seen, **asked, reasoning=True, settings={"temperature": 0.0})
    assert whole == plain == {"answer": tiny.query(seen, **asked, settings={"temperature": 0.0})["answer"]}
    assert "".join(streamed["answer"]) == whole["answer"]
    assert reasoned == {"answer": expected["answer"], "reasoning": json.loads(json.dumps(expected["reasoning"]))}
    assert blind.keys() == {"answer"}


def test_client_gets_outlines(tiny: LocalModel, uri: str) -> None:
    def fill_boxes(image: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
        masks = np.zeros((len(xyxy), *image.shape[:2]), bool)
        for mask, (left, top, right, bottom) in zip(masks, xyxy.astype(int), strict=True):
            mask[top:bottom, left:right] = True
        return masks

    with served(tiny, load_masks=lambda: fill_boxes) as running:
        until(lambda: running.service.ready)
        asked = {"object": "cat"}
        replies, seen = drive(
            running.url,
            uri,
            ("segment", asked),
            ("segment", {**asked, "stream": True}),
            ("segment", {**asked, "spatialRefs": [[0.5, 0.5, 0.75, 1.0]]}),
        )
    whole, streamed, region = replies
    (box,) = tiny.detect(seen, "cat")["objects"]
    assert whole["bbox"] == pytest.approx({name: box[name] for name in whole["bbox"]}, abs=0.01)
    assert whole["path"].startswith("M ")
    assert streamed["stream"][0] == {"bbox": whole["bbox"]}
    assert streamed["stream"][-1] == {**whole, "completed": True}
    assert region["bbox"].keys() == whole["bbox"].keys()


def test_client_raises_errors(server: Served, uri: str) -> None:
    replies, _ = drive(
        server.url,
        uri,
        ("detect", {"object": "cat", "variant": "01ABC@20"}),
        ("detect", {"object": " "}),
        ("segment", {"object": "cat"}),
        ("segment", {"object": "cat", "stream": True}),
        ("caption", {"length": "huge", "stream": True}),
    )
    assert [reply["error"] for reply in replies[:3]] == [f"HTTP error! status: {code}" for code in (404, 400, 400)]
    assert replies[3:] == [{"stream": []}, {"caption": []}]  # this client ignores the status of a stream


def test_client_sends_api_keys(tiny: LocalModel, uri: str) -> None:
    with served(tiny, api_keys=(KEY,)) as running:
        for key, expected in ((KEY, "objects"), ("another", "error"), ("", "error")):
            (reply,), _ = drive(running.url, uri, ("detect", {"object": "cat"}), key=key)
            assert reply.keys() == {expected}
            assert "401" in reply["error"] if expected == "error" else len(reply["objects"]) == 1
