"""examples/mcp_server.py, started by the client of the `mcp` package over standard input and output."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

from moondream_cv import load
from moondream_cv.scenes import render_scene

mcp = pytest.importorskip("mcp", reason="needs mcp (make test-newest)")

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "examples" / "mcp_server.py"
PAGE = ROOT / "docs" / "examples.md"

pytestmark = pytest.mark.compat


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(render_scene(3, names=["dog", "dog", "red circle"]).image).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def call_tools(
    calls: Sequence[tuple[str, dict[str, Any]]], arguments: Sequence[str] = (str(SERVER), "--model", "tiny")
) -> tuple[list[Any], list[Any]]:
    """Start the server; return its tools, and the results of the calls."""
    command = mcp.StdioServerParameters(command=sys.executable, args=list(arguments))

    async def run() -> tuple[list[Any], list[Any]]:
        async with mcp.Client(mcp.stdio_client(command)) as client:
            tools = (await client.list_tools()).tools
            return tools, [await client.call_tool(name, given) for name, given in calls]

    return anyio.run(run)


def test_tools_return_the_typed_results_of_the_model(image: Path) -> None:
    path, uri = str(image), f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    tools, results = call_tools(
        [
            ("detect", {"image": path, "name": "dog"}),
            ("point", {"image": uri, "name": "red circle"}),
            ("query", {"image": path, "question": "How many dogs are there?"}),
            ("caption", {"image": uri, "length": "short"}),
        ]
    )
    found = [None if result.is_error else result.structured_content["result"] for result in results]

    model = load("tiny", device="cpu")
    expected = [
        model.detect(path, "dog")["objects"],
        model.point(path, "red circle")["points"],
        model.query(path, "How many dogs are there?")["answer"],
        model.caption(path, length="short")["caption"],
    ]
    model.close()
    assert [len(expected[0]), len(expected[1]), expected[2]] == [2, 1, "2"]
    for items, true_items in zip(found[:2], expected[:2], strict=True):
        assert [pytest.approx(item, abs=1e-4) for item in true_items] == items
    assert found[2:] == expected[2:]

    # The schemas that an assistant receives
    assert [tool.name for tool in tools] == ["detect", "point", "query", "caption"]
    assert all(tool.input_schema["properties"]["image"]["description"] for tool in tools)
    boxes = tools[0].output_schema
    assert set(boxes["$defs"]["Box"]["properties"]) == {"x_min", "y_min", "x_max", "y_max", "confidence"}


def test_assistant_receives_the_messages_of_errors(image: Path) -> None:
    _, results = call_tools(
        [
            ("detect", {"image": str(image.with_name("missing.png")), "name": "dog"}),
            ("detect", {"image": str(image), "name": " "}),
            ("caption", {"image": "data:image/png;base64,bm8gaW1hZ2U="}),
            ("query", {"image": str(image)}),
        ]
    )
    assert all(result.is_error for result in results)
    missing, blank, broken, no_question = (result.content[0].text for result in results)
    assert "missing.png': no such image file" in missing
    assert "must not be" in blank
    assert "is not an image in a supported format" in broken
    assert "question" in no_question


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are not part of a source distribution")
def test_printed_configuration_starts_the_server_and_an_unknown_model_is_reported(image: Path) -> None:
    (block,) = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ((name, configured),) = json.loads(block)["mcpServers"].items()
    assert (name, Path(configured["command"]).name) == ("moondream", "python")
    script, *options = configured["args"]
    assert Path(script).parts[-2:] == SERVER.parts[-2:]

    options[options.index("moondream2")] = "./no-such-folder"
    tools, (result,) = call_tools([("caption", {"image": str(image)})], [str(SERVER), *options])
    assert len(tools) == 4
    assert result.is_error
    assert "no-such-folder" in result.content[0].text
