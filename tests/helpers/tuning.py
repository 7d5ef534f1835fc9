"""Servers with the tuning API, and requests to them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import moondream as md
import pytest

from moondream_cv.server.runtime.tuning_worker import TuningWorker
from tests.helpers.served import Served


def fine_tune(url: str, name: str = "parts", rank: int = 8) -> Any:
    """Create a finetune, or continue it, with Moondream's client.

    Args:
        url: Base URL of the server.
        name: Name of the finetune.
        rank: Rank of the adapter.
    """
    return md.ft(api_key="key", endpoint=f"{url}/v1/tuning", name=name, rank=rank)


def no_objects(uri: str, name: str = "cat") -> dict[str, Any]:
    """Return a group that teaches the model to find no object of a class."""
    request = {"skill": "detect", "image_url": uri, "object": name}
    return {"mode": "sft", "request": request, "target": {"boxes": []}}


def step_body(finetune_id: str, uri: str, name: str = "cat") -> bytes:
    """Return the body of a train step, which is the same for equal arguments."""
    groups = [no_objects(uri, name)]
    return json.dumps({"finetune_id": finetune_id, "groups": groups, "lr": 5e-3}).encode()


def step_of(server: Served, finetune_id: str) -> int:
    """Return the number of the last train step."""
    answer = server.client.get(f"/v1/tuning/finetunes/{finetune_id}")
    return int(answer.json()["finetune"]["step"])


class HeldTraining:
    """Train steps of engines in this process wait until `resume` is called.

    Attributes:
        started: Set when a train step has started.
    """

    def __init__(self) -> None:
        self.started = threading.Event()
        self._open = threading.Event()

    def resume(self) -> None:
        """Run train steps without waiting from now on."""
        self._open.set()

    def wait(self) -> None:
        """Wait until `resume` is called."""
        self.started.set()
        assert self._open.wait(240)


@contextlib.contextmanager
def held_training() -> Iterator[HeldTraining]:
    """Hold the train steps of engines in this process. They resume at the end, so that servers can stop."""
    held, train_step = HeldTraining(), TuningWorker.train_step

    def wait_and_train(worker: TuningWorker, finetune_id: str, groups: Any, lr: float) -> dict[str, Any]:
        held.wait()
        return train_step(worker, finetune_id, groups, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuningWorker, "train_step", wait_and_train)
        try:
            yield held
        finally:
            held.resume()
