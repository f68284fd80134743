"""A thread that works ahead of its consumer: bounded, stoppable, and never silent.

Its error is raised where the consumer is, a result that does not come in time is an error too, and stopping it half-way
leaves no thread behind.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class LoaderError(RuntimeError):
    """No batch came: the reader is stuck past its deadline, or closed."""


class Prefetch(Generic[Item]):
    """Takes `items` in a thread of its own, at most `ahead` before they are asked for; `name` is used in errors."""

    def __init__(self, items: Iterable[Item], ahead: int, name: str) -> None:
        self._items, self._name = items, name
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._late = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._items:
                if self._stopped.is_set():
                    return
                self._queue.put(item)
        except BaseException as error:
            last = error
        if not self._stopped.is_set():
            self._queue.put(last)

    def next(self, deadline_s: float) -> Item | None:
        """The next item, or None after the last one.

        Errors: whatever ended the thread; LoaderError if nothing comes for `deadline_s` seconds, or it was stopped.
        """
        try:
            item = self._queue.get(timeout=deadline_s)
        except queue.Empty:
            self._late = True
            raise LoaderError(
                f"{self._name}: no batch within {deadline_s:g} s; its reader is "
                f"{'stuck' if self._thread.is_alive() else 'dead'}"
            ) from None
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self, join_s: float = 10.0) -> bool:
        """End the thread and wait `join_s` seconds at most; whether it has ended. Stopping twice is fine.

        A thread that missed its deadline is not waited for: it ends by itself as soon as it gets on.
        """
        self._stopped.set()
        # Told to stop, the thread puts one more item at most, and the emptied queue has room for it.
        self._empty()
        self._thread.join(0 if self._late else join_s)
        self._empty()
        self._queue.put_nowait(LoaderError(f"{self._name}: the loader is closed"))
        return not self._thread.is_alive()

    def _empty(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return
