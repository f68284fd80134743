"""Threads that work ahead of their consumer, one in order or several at once: bounded and stoppable.

Their errors are raised in the consumer, a result that does not arrive in time is an error too, and stopping early
leaves no thread behind, unless it is stuck. A stuck thread is a daemon: not even the exiting process waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class LoaderError(RuntimeError):
    """No batch arrived: the reader has missed its deadline, failed, or is closed."""


class Prefetch(Generic[Item]):
    """Iterates over `items` in its own thread, at most `ahead` items ahead of `next`; `name` is used in errors."""

    def __init__(self, items: Iterable[Item], ahead: int, name: str) -> None:
        self._items, self._name = items, name
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._late = False
        self._thread = threading.Thread(target=self._fill_queue, name="prefetch", daemon=True)
        self._thread.start()

    def _fill_queue(self) -> None:
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

        Errors: whatever `items` raises; LoaderError if no item arrives within `deadline_s` seconds, or after `stop`.
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
        """End the thread, waiting at most `join_s` seconds; returns whether it has ended. Stopping twice is allowed.

        A thread that missed its deadline is not waited for: it ends by itself once its read returns.
        """
        self._stopped.set()
        # After this the thread puts at most one more item, for which the empty queue has room.
        self._clear_queue()
        self._thread.join(0 if self._late else join_s)
        self._clear_queue()
        self._queue.put_nowait(LoaderError(f"{self._name}: the loader is closed"))
        return not self._thread.is_alive()

    def _clear_queue(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, deadline_s: float
) -> Generator[Result]:
    """Yield function(item) of every item, in order; `threads` threads work through all items ahead of the consumer.

    Errors: the function's, after which no further item is started; LoaderError naming the item whose result does not
    arrive within `deadline_s` seconds after the previous one.
    """
    # Not a ThreadPoolExecutor: Python waits for its threads when the process exits, however long they hang.
    tasks: list[tuple[Item, Future[Result]]] = [(item, Future()) for item in items]
    remaining = iter(tasks)  # a list's iterator is atomic, so threads can share it

    def work() -> None:
        for item, future in remaining:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(threads, len(tasks))):
        threading.Thread(target=work, name="map_in_threads", daemon=True).start()
    try:
        for item, future in tasks:
            if wait([future], deadline_s).not_done:
                raise LoaderError(f"{item}: no result within {deadline_s:g} s; its reader is stuck")
            yield future.result()
    finally:
        for _, future in tasks:
            future.cancel()
