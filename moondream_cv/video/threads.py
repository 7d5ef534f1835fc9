"""Iterators that run in threads of their own, and come out as one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")


class _End:
    """Stands behind the last item of an iterator, with the error that ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def in_threads(
    items: Sequence[Iterable[T]],
    names: Sequence[str],
    room: int,
    on_error: Callable[[str, BaseException], None] | None = None,
) -> Generator[T, None, None]:
    """Give what several iterables give, as it comes.

    One that fails does not stop the others; the first error is raised at the end. A cancelled future ends its iterable
    like any other end.

    Args:
        names: Of the iterables, for their threads and for `on_error`.
        room: Items that wait to be taken at the most.
        on_error: Told of each error when it happens, in the thread where it does.
    """
    waiting: queue.Queue[Any] = queue.Queue(room)
    stopped = threading.Event()

    def put(item: Any) -> None:
        """Put an item where there is room for it, unless nobody takes any more."""
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.2)
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

    for iterable, name in zip(items, names, strict=True):
        threading.Thread(target=run, args=(iterable, name), name=f"moondream_cv {name}", daemon=True).start()
    running, failed = len(items), None
    try:
        while running:
            item = waiting.get()
            if isinstance(item, _End):
                running, failed = running - 1, failed or item.error
            else:
                yield item
        if failed is not None:
            raise failed
    finally:
        stopped.set()
