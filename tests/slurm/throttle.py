"""An observer that slows a job down, so that a fault can hit a step or a save, until a file ends that.

While a worker is inside one, a file says so: `inside-<place>-<pid>`, which holds the step.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

FOLDER = "HYDRA_TEST_THROTTLE"
"""Names the folder in which a file `full-speed` ends the throttling."""
PLACES = {"forward": "step", "before_manifest": "save"}
"""Where it pauses: inside a step, with incomplete gradients, and inside a checkpoint without a manifest."""
SLOWLY = "slowly"
"""While this file exists, steps take seconds: for faults that come a minute or two after they are requested."""
_PAUSE_S, _LONG_PAUSE_S = 0.3, 5.0
_never = threading.Event()


def slow(event: str, facts: dict[str, Any]) -> None:
    """Called on every worker at every event."""
    place, folder = PLACES.get(event), Path(os.environ[FOLDER])
    if place is None or facts.get("micro_batch", 0) > 0 or (folder / "full-speed").exists():
        return
    mark = folder / f"inside-{place}-{os.getpid()}"
    mark.write_text(str(facts["step"]))
    _never.wait(_LONG_PAUSE_S if place == "step" and (folder / SLOWLY).exists() else _PAUSE_S)
    mark.unlink()


def inside(folder: Path, place: str) -> Path | None:
    """The mark of a living worker that is inside a step or a save now."""
    for mark in folder.glob(f"inside-{place}-*"):
        if Path("/proc", mark.name.rpartition("-")[2]).exists() and mark.exists():
            return mark
    return None
