"""A stop event that a test writes the script of: what happens between two looks of something that polls."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Script(threading.Event):
    """A stop event whose every wait does the next thing that happens to the run; set when all has happened."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        super().__init__()
        self.actions = list(actions)

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "a wait without deadline"
        if self.actions:
            self.actions.pop(0)()
            return False
        return True
