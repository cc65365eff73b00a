"""The next items of an iterator are made while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterator[T], depth: int = 1) -> Generator[T, None, None]:
    """The items of an iterator, in order, made by a thread that is ahead of the caller.

    What the iterator raises is raised here, after the items before it. When the caller stops early and closes this
    generator, the thread ends after the item it is at, and closes the iterator. Grad mode and the current CUDA device
    belong to a thread, so the iterator must set what it needs.

    Args:
        items: used by that thread alone from now on.
        depth: items that may wait, besides the one being made; 0 is without a thread.
    """
    if depth < 1:
        try:
            yield from items
        finally:
            _close(items)
        return
    waiting: queue.Queue[object] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        last: object = _END
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as error:  # also KeyboardInterrupt and the like: the caller decides
            last = _Raised(error)
        finally:
            try:
                _close(items)
            except BaseException as error:
                last = _Raised(error)
            put(last)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if item is _END:
                return
            if isinstance(item, _Raised):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _close(items: Iterator[T]) -> None:
    if isinstance(items, Generator):
        items.close()
