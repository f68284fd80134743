"""An observer that lets a job train slowly, so that a fault has a step to land in, until it is told to go on."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

FOLDER = "HYDRA_TEST_THROTTLE"
"""Names the folder in which a file `full-speed` ends the throttling."""
_PAUSE_S = 0.3
_never = threading.Event()


def slow(event: str, facts: dict[str, Any]) -> None:
    """Called on every worker at every event."""
    if event == "step" and not (Path(os.environ[FOLDER]) / "full-speed").exists():
        _never.wait(_PAUSE_S)
