"""A model that computes only as far as a test lets it, so that what happens meanwhile is no matter of time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tests.helpers.models import random_model
from tests.helpers.served import Served, served


class HeldModel:
    """Random weights, whose texts go on until their tokens are spent, behind a scheduler that stops.

    It is held at first, or after some steps; `go_on` lets it compute freely.
    """

    def __init__(self, steps: int = 0, then_fails: bool = False) -> None:
        """Make one.

        Args:
            steps: That it takes before it stops.
            then_fails: Whether the step after these fails, as on a device that is lost.
        """
        self._model = random_model()
        self._left, self._fails = steps, then_fails
        self._open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def go_on(self) -> None:
        """Compute freely from now on."""
        self._open.set()

    def scheduler(self) -> Any:
        """The model's own scheduler, whose steps wait."""
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
    """A server of a held model, which is let go at the end at the latest, so that the server can stop.

    Args:
        steps: As in `HeldModel`.
        then_fails: As in `HeldModel`.
        **options: As in `served`.
    """
    model = HeldModel(steps, then_fails)
    with served(model, **options) as running:
        try:
            yield model, running
        finally:
            model.go_on()
