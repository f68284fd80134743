"""All tests, in two lanes side by side: `python -m tests.run_all`, which `make test` calls.

SLURM's tests mostly wait: for its deadlines, for Ray to start, for a fault's end. So two of them run at a time, on a
cluster each. The rest uses what they leave of the processors, in Linux's idle class, so that SLURM and Ray run as if
they were alone. Every line says when it was printed and by which lane. Exit code: 0 if every test passed, and 1
otherwise; a call of pytest that ran no test fails.
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
SHARED_BY = ["--no-loadscope-reorder", "--durations=10"]
LANES: dict[str, list[str]] = {
    "slurm": [SLURM, "-v", "-n", "2", "--dist=loadgroup", *SHARED_BY],  # test by test, as each has its own run
    # File by file, as tests of a file share what they compare.
    "rest": ["tests", f"--ignore={SLURM}", "-n", "logical", "--maxprocesses=8", "--dist=loadfile", *SHARED_BY],
}
"""What pytest is called with."""
LONGEST = (
    *("test_faults.py", "test_elastic.py", "test_races.py", "test_missing_node.py"),
    *("test_every_objective.py", "test_imagenet_shape.py", "test_compiled.py", "test_command_line.py"),
    *("test_exact_resume.py", "test_bounded_restarts.py", "test_non_finite.py", "test_engine.py", "test_full_disk.py"),
    *("test_world_sizes.py", "test_free.py", "test_attacks.py", "test_tracked_run.py", "test_overfitting.py"),
)
"""Files whose tests take longest, the longest first: conftest begins with them, in this order."""
POLITE = "rest"


def _leave_processors_to_others() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _run(name: str, began: float) -> int:
    """pytest's exit code, once all that it printed has been shown. Ctrl-C reaches every pytest, which cleans up."""
    lane = subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", *LANES[name]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_leave_processors_to_others if name == POLITE else None,
    )
    assert lane.stdout is not None
    for line in lane.stdout:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"{minutes:2d}:{seconds:02d} {name:5s} {line}", end="", flush=True)
    return lane.wait()


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hydra-tests-") as folder, ThreadPoolExecutor(len(LANES)) as pool:
        os.environ[FOLDER] = folder
        codes = dict(zip(LANES, pool.map(lambda name: _run(name, began), LANES), strict=True))
    for name, code in codes.items():
        print(f"lane {name}: {'passed' if not code else f'FAILED, with the exit code {code} of pytest'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
