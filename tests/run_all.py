"""Runs all tests, in two parallel lanes: `python -m tests.run_all`, which `make test` calls.

SLURM's tests often wait: for its deadlines, for Ray to start, for a fault to end. The other tests use the remaining CPU
time, in Linux's idle scheduling class, so that they do not slow SLURM and Ray down. Two clusters at a time on two cores
led to timeouts, and saved nothing. Every line of output has its time and lane. Exit code: 0 if every test passed, and 1
otherwise; a call of pytest that runs no test counts as failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.shared import FOLDER

SLURM = "tests/slurm"
LANES: dict[str, list[str]] = {
    "slurm": [SLURM, "-v", "--durations=10"],
    # Distributed by file, as tests of a file share runs and data.
    "rest": [
        *("tests", f"--ignore={SLURM}", "--durations=10"),
        *("-n", "logical", "--maxprocesses=8", "--dist=loadfile", "--no-loadscope-reorder"),
    ],
}
"""Lane -> pytest's arguments."""
LONGEST = (
    *("test_faults.py", "test_elastic.py", "test_races.py", "test_missing_node.py"),
    *("test_every_objective.py", "test_imagenet_shape.py", "test_compiled.py", "test_command_line.py"),
    *("test_exact_resume.py", "test_bounded_restarts.py", "test_non_finite.py", "test_engine.py", "test_full_disk.py"),
    *("test_world_sizes.py", "test_free.py", "test_attacks.py", "test_tracked_run.py", "test_overfitting.py"),
)
"""Files whose tests take longest, the longest first: conftest runs them first, in this order."""
IDLE_LANE = "rest"


def _use_idle_scheduling() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _run_lane(name: str, start: float) -> int:
    """Run a lane and print its output; returns pytest's exit code. Ctrl-C reaches every pytest, which cleans up."""
    lane = subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", *LANES[name]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_use_idle_scheduling if name == IDLE_LANE else None,
    )
    assert lane.stdout is not None
    for line in lane.stdout:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        print(f"{minutes:2d}:{seconds:02d} {name:5s} {line}", end="", flush=True)
    return lane.wait()


def main() -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="robust-tests-") as folder, ThreadPoolExecutor(len(LANES)) as pool:
        os.environ[FOLDER] = folder
        codes = dict(zip(LANES, pool.map(lambda name: _run_lane(name, start), LANES), strict=True))
    for name, code in codes.items():
        print(f"lane {name}: {'passed' if not code else f'FAILED, with the exit code {code} of pytest'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
