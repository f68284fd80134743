"""Runs all tests, in three parallel lanes: `python -m tests.run_all`, which `make test` calls.

SLURM's tests often wait: for its deadlines, for Ray to start, for a fault to end. The runs use the CPU time that they
leave, and the unit tests what both leave, so that no lane slows an earlier one down. Two SLURM clusters at a time on
two cores led to timeouts, and saved nothing. Every line of output has its time and lane. Exit code: 0 if every test
passed, and 1 otherwise; a call of pytest that runs no test counts as failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.shared import FOLDER

LANES: dict[str, list[str]] = {
    "slurm": ["tests/slurm", "-v"],
    # One at a time: most of them start several processes.
    "runs": ["tests/distributed", "tests/end_to_end", "tests/fault", "tests/golden"],
    # A process that dies is not replaced: with --dist=loadfile, its replacement may wait for ever.
    "unit": ["tests/unit", "-n", "logical", "--maxprocesses=8", "--dist=loadfile", "--max-worker-restart=0"],
}
"""Lane -> the arguments of its call of pytest."""
LONGEST = (
    *("test_faults.py", "test_elastic.py", "test_races.py", "test_missing_node.py"),
    *("test_every_objective.py", "test_imagenet_shape.py", "test_compiled.py", "test_command_line.py"),
    *("test_exact_resume.py", "test_bounded_restarts.py", "test_non_finite.py", "test_engine.py", "test_full_disk.py"),
    *("test_world_sizes.py", "test_free.py", "test_attacks.py", "test_tracked_run.py", "test_overfitting.py"),
)
"""Files whose tests take longest, the longest first: conftest runs them first, in this order."""


def _yield_to_earlier_lanes(lane: str) -> None:
    if lane == "runs":
        os.nice(19)
    elif lane == "unit":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _run_lane(lane: str, start: float) -> int:
    """Call pytest and print its output; returns its exit code. Ctrl-C reaches every pytest, which cleans up."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", *LANES[lane], "--durations=10"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: _yield_to_earlier_lanes(lane),
    )
    assert process.stdout is not None
    for line in process.stdout:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        print(f"{minutes:2d}:{seconds:02d} {lane:5s} {line}", end="", flush=True)
    return process.wait()


def main() -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="robust-tests-") as folder, ThreadPoolExecutor(len(LANES)) as pool:
        os.environ[FOLDER] = folder
        codes = dict(zip(LANES, pool.map(lambda lane: _run_lane(lane, start), LANES), strict=True))
    for lane, code in codes.items():
        print(f"lane {lane}: {f'FAILED, with exit code {code} of pytest' if code else 'passed'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
