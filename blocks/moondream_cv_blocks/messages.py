"""Rewrite error messages for users of workflows: fields and environment variables instead of Python arguments.

The messages of models and servers address Python users.
"""

from __future__ import annotations

import re

ALLOWED = "MOONDREAM_CV_BLOCKS_MODELS"
DEVICE = "MOONDREAM_CV_BLOCKS_DEVICE"
TIMEOUT = "MOONDREAM_CV_BLOCKS_TIMEOUT"

_KEY_ADVICE = f"{ALLOWED} must list a server on another machine before it gets the key"
_TERMS = (  # pattern in a message for Python users → replacement for users of workflows
    (r"increase timeout=", f"increase the environment variable {TIMEOUT}"),
    (r"pass api_key= or set (\w+)", rf"set the environment variable \1; {_KEY_ADVICE}"),
    (
        r"the server requires a key: pass api_key=",
        f"the server requires an API key: set MOONDREAM_API_KEY or OPENAI_API_KEY; {_KEY_ADVICE}",
    ),
    (
        r"remove it, and pass a key as api_key=",
        "remove it, and set an environment variable such as MOONDREAM_API_KEY",
    ),
    (r"pass dialect= to skip probing", "check the URL in the field model"),
    (
        r"pass dialect= with one of [\w, ]+",
        "the field model must be the URL of moondream-cv serve, Roboflow Inference, Moondream's API or an "
        "OpenAI-compatible server",
    ),
    (r"; for moondream-cv serve use MoondreamAPI, which needs no extra package", ""),
    (r"use MoondreamAPI( or a model from moondream_cv\.load\(\))?", "use moondream2 or moondream-cv serve"),
    (r"^\w+ cannot (.*); use ", r"this server cannot \1; use "),
    (r"^RoboflowInference needs", "the client of Roboflow Inference servers needs"),
    (
        r"load the model with dtype='bfloat16' or 'float32'",
        f"select another device with the environment variable {DEVICE}",
    ),
)


def workflow_message(error: Exception | str) -> str:
    """Return the message of an error for users of workflows; the type of the error if it has no message."""
    text = str(error) or type(error).__name__
    for pattern, advice in _TERMS:
        text = re.sub(pattern, advice, text)
    return text
