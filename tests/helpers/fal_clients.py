"""Runs fal's clients in separate processes, because the Python client reads its hosts when it is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates import Certificates
from tests.helpers.served import Served

NODE_MODULES = Path(__file__).parents[1] / "npm" / "node_modules"
SECONDS = 240

PYTHON = """
import asyncio, json, sys, time
import fal_client
from fal_client import FalClientHTTPError, FalClientTimeoutError
APP = "fal-ai/moondream2"
given = json.load(sys.stdin)
uri = given["uri"]
def show(value):
    print(json.dumps(value, default=vars))
def failure(call):
    try:
        return {"returned": call()}
    except FalClientHTTPError as error:
        headers = error.response_headers
        return {"message": error.message, "status": error.status_code, "error_type": error.error_type,
                "id": headers["x-fal-request-id"], "timeout_type": headers.get("x-fal-request-timeout-type")}
"""

NODE = """
import { createFalClient, ApiError, ValidationError } from "@fal-ai/client";
const APP = "fal-ai/moondream2";
const { server, uri, key } = JSON.parse(process.env.GIVEN);
const requestMiddleware = async (request) => ({
  ...request,
  url: request.url.replace("https://queue.fal.run", `${server}/queue`).replace("https://fal.run", `${server}/run`),
});
const fal = createFalClient({ credentials: key, requestMiddleware });
const show = (value) => console.log(JSON.stringify(value));
const failure = async (call) => {
  try {
    return { returned: await call() };
  } catch (error) {
    return { name: error.name, status: error.status, body: error.body, id: error.requestId };
  }
};
"""


def run_python(code: str, server: Served, certificates: Certificates, uri: str = "", key: str = "kid:ksec") -> Any:
    """Run a script with fal-client over TLS and return the value it passes to `show`; `uri` is a variable in it."""
    host = server.url.removeprefix("https://")
    environment = {
        "FAL_RUN_HOST": f"{host}/run",
        "FAL_QUEUE_RUN_HOST": f"{host}/queue",
        "FAL_KEY": key,
        "SSL_CERT_FILE": certificates.authority,
    }
    return _run([sys.executable, "-c", PYTHON + code], environment, json.dumps({"uri": uri}))


def run_node(code: str, server: Served, uri: str = "", key: str = "kid:ksec") -> Any:
    """Run a script with @fal-ai/client and return the value it passes to `show`. Skip the test if it is missing."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (NODE_MODULES / "@fal-ai" / "client").is_dir():
        pytest.skip("@fal-ai/client is not installed: run npm ci in tests/npm")
    given = {"GIVEN": json.dumps({"server": server.url, "uri": uri, "key": key})}
    return _run([node, "--input-type=module", "-e", NODE + code], given, "")


def _run(command: list[str], environment: dict[str, str], given: str) -> Any:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**kept, **environment},
        cwd=NODE_MODULES.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
