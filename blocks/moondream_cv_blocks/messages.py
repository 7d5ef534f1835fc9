"""Error messages in the terms of a workflow: fields and environment variables instead of Python arguments.

Models, servers and images raise the errors. Their messages advise Python users, who pass arguments.
"""

from __future__ import annotations

import re

ALLOWED = "MOONDREAM_CV_BLOCKS_MODELS"
DEVICE = "MOONDREAM_CV_BLOCKS_DEVICE"
TIMEOUT = "MOONDREAM_CV_BLOCKS_TIMEOUT"

_KEY_ADVICE = f"{ALLOWED} must list a server on another machine before it gets the key"
_TERMS = (  # pattern of the advice for Python users → advice for users of workflows
    (r"allow more with timeout=", f"allow more with the environment variable {TIMEOUT}"),
    (r"pass api_key= or set (\w+)", rf"set the environment variable \1; {_KEY_ADVICE}"),
    (r"it wants a key: pass api_key=", f"it needs an API key: set MOONDREAM_API_KEY or OPENAI_API_KEY; {_KEY_ADVICE}"),
    (
        r"leave that away, and pass a key as api_key=",
        "remove it, and set an environment variable such as MOONDREAM_API_KEY",
    ),
    (r"name its dialect to go on", "check the URL in the field model"),
    (
        r"name its dialect: [\w, ]+",
        "the field model must be the URL of moondream-cv serve, Roboflow Inference, Moondream's API or an "
        "OpenAI-compatible server",
    ),
    (r"^\w+ cannot (.*); MoondreamAPI can", r"this server cannot \1; moondream2 and moondream-cv serve can"),
    (r"MoondreamAPI and a model from moondream_cv\.load\(\) can", "moondream2 and moondream-cv serve can"),
    (r"^RoboflowInference needs", "the client of Roboflow Inference servers needs"),
    (r"; where the server is this project's own, MoondreamAPI needs nothing", ""),
    (r"load it with dtype='bfloat16' or 'float32'", f"select another device with the environment variable {DEVICE}"),
)


def workflow_message(error: Exception | str) -> str:
    """Return the message of an error as users of a workflow can act on it; the error's type if it has no message."""
    text = str(error) or type(error).__name__
    for pattern, advice in _TERMS:
        text = re.sub(pattern, advice, text)
    return text
