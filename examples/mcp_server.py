"""Serve detect, point, query and caption as tools for assistants, with the Model Context Protocol (MCP).

    python examples/mcp_server.py --model moondream2

An assistant starts this command (docs/examples.md). Requires `pip install "moondream-cv[examples]"`.
"""

import argparse
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from mcp.server import MCPServer, mcpserver
from pydantic import Field, create_model

from moondream_cv import MoondreamError
from moondream_cv.loading import open_model

Image = Annotated[str, Field(description="Path, http(s) URL, or data URI in base64.")]
Box = create_model("Box", x_min=float, y_min=float, x_max=float, y_max=float, confidence=float)
Point = create_model("Point", x=float, y=float, confidence=float)
parser = argparse.ArgumentParser(description="Serve a model as MCP tools on standard input and output.")
parser.add_argument("--model", default="moondream2", help="model name, folder or server URL (default: moondream2)")
model = ThreadPoolExecutor(1).submit(open_model, parser.parse_args().model)  # the assistant can connect meanwhile


def run(skill: str, image: str, argument: str) -> dict[str, Any]:
    """Run a skill on an image. The messages of its errors reach the assistant."""
    try:
        content = base64.b64decode(image.partition(",")[2]) if image.startswith("data:") else image
        return getattr(model.result(), skill)(content, argument)
    except (MoondreamError, ValueError) as error:
        raise mcpserver.exceptions.ToolError(str(error)) from error


def detect(image: Image, name: str) -> list[Box]:
    """Return the boxes of all objects of a class such as 'red car', as fractions of the image."""
    return run("detect", image, name)["objects"]


def point(image: Image, name: str) -> list[Point]:
    """Return one point on each object of a class such as 'red car', as fractions of the image."""
    return run("point", image, name)["points"]


def query(image: Image, question: str) -> str:
    """Return the answer to a question about an image."""
    return run("query", image, question)["answer"]


def caption(image: Image, length: Literal["short", "normal", "long"] = "normal") -> str:
    """Return a description of an image."""
    return run("caption", image, length)["caption"]


server = MCPServer("moondream")
for tool in (detect, point, query, caption):
    server.add_tool(tool)
server.run()
