"""Threads that work ahead of their consumer, one in order or several at once: bounded, stoppable, and never silent.

Their error is raised where the consumer is, a result that does not come in time is an error too, and stopping them
half-way leaves no thread behind but one that is stuck. For that one nobody waits, not even the process when it ends.
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


def mapped(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, deadline_s: float
) -> Generator[Result]:
    """function(item) of every item, in their order; by `threads` threads, which begin all of them ahead.

    Errors: the function's, after which no other item is begun; LoaderError naming the item whose result does not come
    within `deadline_s` seconds after the one before it.
    """
    # Not a ThreadPoolExecutor: Python waits for its threads at the end of the process, however long they hang.
    tasks: list[tuple[Item, Future[Result]]] = [(item, Future()) for item in items]
    left = iter(tasks)  # of a list: taking from it is one step for all threads

    def work() -> None:
        for item, future in left:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(threads, len(tasks))):
        threading.Thread(target=work, name="mapped", daemon=True).start()
    try:
        for item, future in tasks:
            if wait([future], deadline_s).not_done:
                raise LoaderError(f"{item}: nothing within {deadline_s:g} s; its reader is stuck")
            yield future.result()
    finally:
        for _, future in tasks:
            future.cancel()
