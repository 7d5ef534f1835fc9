"""A model that a test can pause and resume, so that results do not depend on timing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tests.helpers.models import random_model
from tests.helpers.served import Served, served


class HeldModel:
    """A model with random weights and long replies. Its scheduler pauses after some steps until `resume` is called."""

    def __init__(self, steps: int = 0, then_fails: bool = False) -> None:
        """Create a model.

        Args:
            steps: Number of steps before the pause.
            then_fails: Whether the next step fails instead, as with a lost device.
        """
        self._model = random_model()
        self._left, self._fails = steps, then_fails
        self._open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def resume(self) -> None:
        """Run without pauses from now on."""
        self._open.set()

    def scheduler(self) -> Any:
        """Return a scheduler whose steps wait while the model is paused."""
        scheduler = self._model.scheduler()
        step = scheduler.step

        def held_step() -> bool:
            if self._left == 0 and self._fails:
                raise RuntimeError("the device is lost")
            if self._left == 0:
                self._open.wait(240)
            else:
                self._left -= 1
            return step()

        scheduler.step = held_step  # type: ignore[method-assign]
        return scheduler


@contextlib.contextmanager
def held_server(steps: int = 0, then_fails: bool = False, **options: Any) -> Iterator[tuple[HeldModel, Served]]:
    """Serve a `HeldModel`, which is resumed at the end so that the server can stop.

    Args:
        steps: Number of steps before the pause.
        then_fails: Whether the next step fails instead.
        **options: Further arguments of `served`.
    """
    model = HeldModel(steps, then_fails)
    with served(model, **options) as running:
        try:
            yield model, running
        finally:
            model.resume()
