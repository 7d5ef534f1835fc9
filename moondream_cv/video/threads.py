"""Iterate over several iterables in background threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.2


class _End:
    """End of an iterable, with the error that ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def iterate_in_threads(
    iterables: Sequence[Iterable[T]],
    names: Sequence[str],
    max_waiting: int,
    on_error: Callable[[str, BaseException], None] | None = None,
) -> Generator[T, None, None]:
    """Yield the items of several iterables in order of arrival, each iterable in its own thread.

    If one iterable fails, the others continue, and the first error is raised at the end. `CancelledError` ends an
    iterable without an error.

    Args:
        iterables: Iterables to run.
        names: Name of each iterable, for its thread and for `on_error`.
        max_waiting: Maximum number of items that wait to be consumed.
        on_error: Function that is called with the name and the error, in the thread of the iterable.
    """
    waiting: queue.Queue[Any] = queue.Queue(max_waiting)
    stopped = threading.Event()

    def put(item: Any) -> None:
        """Put an item into the queue, unless the consumer has stopped."""
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def run(iterable: Iterable[T], name: str) -> None:
        end = _End()
        try:
            for item in iterable:
                put(item)
                if stopped.is_set():
                    break
        except CancelledError:
            pass
        except BaseException as error:
            if on_error is not None:
                on_error(name, error)
            end = _End(error)
        finally:
            if isinstance(iterable, Generator):
                iterable.close()
        put(end)

    # Start the threads
    for iterable, name in zip(iterables, names, strict=True):
        threading.Thread(target=run, args=(iterable, name), name=f"moondream_cv {name}", daemon=True).start()

    # Yield items until all iterables have ended
    running, first_error = len(iterables), None
    try:
        while running:
            item = waiting.get()
            if isinstance(item, _End):
                running, first_error = running - 1, first_error or item.error
            else:
                yield item
        if first_error is not None:
            raise first_error
    finally:
        stopped.set()
