"""A stop event that runs a test's script: what happens between two polls of the code under test."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Script(threading.Event):
    """A stop event whose every wait runs the next action; set once all have run."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        super().__init__()
        self.actions = list(actions)

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "a wait without deadline"
        if self.actions:
            self.actions.pop(0)()
            return False
        return True
